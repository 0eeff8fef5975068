"""Write a model as an ONNX file, with what is needed to use it, and a certificate that it computes the same.

ufo export glyphs-vit --out glyphs-onnx
ufo export runs/demo --task glyphs --out glyphs-onnx --int8        # and glyphs-onnx/int8, with metrics before and after
ufo export faces-vit --out faces-onnx --images a.jpg b.jpg c.jpg   # to certify it with, where the benchmarks are not

ufo evaluate, predict, index and latency take the directory as they take any model, and its int8 likewise.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ufo_ds import checkpoint
from ufo_ds.errors import ArgumentParser, UserError
from ufo_ds.progress import Progress

if TYPE_CHECKING:  # transformers takes seconds to import
    from torch import Tensor

    from ufo_ds.subnets.export_card import Int8
    from ufo_ds.subnets.task_model import TaskModel

ROUNDS = 20  # of calls whose time is measured


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(
        prog="ufo export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="extracted or distilled, or a run directory or checkpoint with --task")
    parser.add_argument("--task", help="of a run with several")
    parser.add_argument("--out", type=Path, required=True, help="directory to make")
    parser.add_argument("--int8", action="store_true", help="also an int8 version, in OUT/int8")
    parser.add_argument(
        "--calibration", metavar="SOURCE",
        help="shards or a folder of images from which --int8 learns ranges (default: the train sets of the task)",
    )  # fmt: skip
    parser.add_argument("--images", type=Path, nargs="+", help="files to certify with (default: of the benchmarks)")
    parser.add_argument("--no-verify", action="store_true", help="write it without a certificate")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    options = parser.parse_args(argv)
    if options.calibration is not None and not options.int8:
        raise UserError(f"--calibration {options.calibration} is for --int8: give that too, or leave it out")
    if options.images and options.no_verify:
        raise UserError(f"--images {options.images[0]} and --no-verify: leave one of them out")
    if options.out.exists():
        raise UserError(f"--out {options.out} exists: choose another directory or delete it")

    from ufo_ds.subnets import exporting, onnx_export, quantization  # these take seconds to import
    from ufo_ds.subnets.certificate_images import certificate_images
    from ufo_ds.subnets.export_card import export_card
    from ufo_ds.subnets.onnx_model import is_onnx_model
    from ufo_ds.subnets.task_model import open_model

    onnx_export.check_installed("ufo export")
    if is_onnx_model(options.model):
        raise UserError(f"{options.model} is exported already: give the model that it was made from")
    model = open_model(options.model, options.task)
    spec, licences = _source(options.model, model)
    images = [] if options.no_verify else certificate_images(model.recipe, model.task, options.images)
    pixels = quantization.calibration_images(model.recipe, options.calibration) if options.int8 else None

    steps = ["graph", *([] if options.no_verify else ["certificate"]), *(["int8"] if options.int8 else [])]
    certificate, int8 = None, None
    with Progress(len(steps), unit="steps", name="export") as progress:
        exporting.export(model, spec, options.out)
        progress.update()
        if not options.no_verify:
            certificate = exporting.verify(model, options.out, images)
            progress.update()
        if pixels is not None:
            source = options.calibration or ", ".join(entry.shards for entry in model.recipe.tasks[0].train)
            int8 = _int8(model, options.out, pixels, source)
            progress.update()
    size = exporting.size_of(options.out)
    for directory, is_int8 in [(options.out, False), *([(options.out / exporting.INT8, True)] if int8 else [])]:
        card = export_card(model, licences, exporting.size_of(directory), certificate, int8, is_int8)
        checkpoint.write_text(directory / "README.md", card)
    result: dict[str, Any] = {"out": str(options.out), "task": model.task, "bytes": size}
    if certificate is not None:
        result |= {name: certificate[name] for name in ("max_difference", "rank_lists", "rank_inversion")}
    if int8 is not None:
        result["int8"] = asdict(int8)
    print(json.dumps(result) if options.json else "\n".join(_lines(options.out, result, certificate, int8)))


def _source(path: Path, model: "TaskModel") -> tuple[str | None, dict[str, list[str]]]:
    """The spec of the model's path, if it has one, as JSON, and the licences of the images behind its weights."""
    from ufo_ds.model.loading import spec_of
    from ufo_ds.subnets.extraction import SPEC
    from ufo_ds.subnets.licences import behind
    from ufo_ds.subnets.model_card import CARD, licences_on_card
    from ufo_ds.subnets.task_model import is_model

    if is_model(path):
        spec = (path / SPEC).read_text() if (path / SPEC).is_file() else None
        return spec, licences_on_card(path / CARD, model.task)
    reader = checkpoint.Reader(checkpoint.of_run(path))
    of_task = spec_of(reader, model.task)
    return of_task.to_json() + "\n", behind(reader.index, reader.recipe, of_task)


def _int8(model: "TaskModel", out: Path, images: "Tensor", source: str) -> "Int8":
    """Write the int8 version, and measure it beside the fp32 one."""
    from ufo_ds.evaluation import outcomes
    from ufo_ds.subnets import exporting, measuring, timing
    from ufo_ds.subnets.export_card import Int8
    from ufo_ds.subnets.latency import Target
    from ufo_ds.subnets.task_model import open_model

    layers = exporting.export_int8(out, model.network.normalize(images))
    directories = {"fp32": out, "int8": out / exporting.INT8}
    target = Target(backend="onnx")
    ms = timing.milliseconds(exporting.calls(model, list(directories.values()), target), target, ROUNDS)
    known = measuring.here(model.recipe)
    metrics = {
        name: outcomes.flatten(measuring.measure(open_model(directory), known))
        for name, directory in directories.items()
    }
    found = Int8(
        calibration=source,
        images=len(images),
        layers=layers,
        bytes={name: exporting.size_of(directory) for name, directory in directories.items()},
        ms=dict(zip(("torch", *directories), ms, strict=True)),
        cpu=timing.machine(target)["cpu"],
        before=metrics["fp32"],
        after=metrics["int8"],
    )
    checkpoint.write_text(out / exporting.INT8 / exporting.QUANTIZATION, json.dumps(asdict(found), indent=1) + "\n")
    return found


def _lines(out: Path, result: dict[str, Any], certificate: dict[str, Any] | None, int8: "Int8 | None") -> list[str]:
    checked = "not certified" if certificate is None else (
        f"differs from the torch model by {certificate['max_difference']:.1e} at most, "
        f"{certificate['rank_lists']} rank lists the same"
    )  # fmt: skip
    lines = [f"{out}: {result['task']}, {result['bytes'] / 1e6:.2f} MB, {checked}"]
    if int8 is None:
        return lines
    size, ms = int8.bytes["int8"] / 1e6, int8.ms
    lines.append(
        f"{out / 'int8'}: {size:.2f} MB, {ms['int8']:.2f} ms an image on one thread (fp32 {ms['fp32']:.2f}, torch "
        f"{ms['torch']:.2f})"
    )
    width = max(map(len, int8.after), default=0)
    lines += [f"  {key:<{width}}  {int8.before[key]:.4f} -> {value:.4f}" for key, value in int8.after.items()]
    return lines
