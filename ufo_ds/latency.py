"""Measure how long subnets take on this machine: a device profile, from which the time of any other is predicted.

ufo latency runs/elastic --task person --out phone.json                        # up to 40 subnets of model.elastic
ufo latency mine.yaml --task person --backend onnx --threads 4 --out phone.json
ufo latency person-vit --batch_size 16         # one model, of ufo extract or distill; of ufo export by ONNX Runtime

A run or recipe needs no checkpoint: weights are random. A call is from normalised pixels to the embedding; of an
extracted model with a classifier, to its logits. On one thread of a CPU, times are the thread's own, without what other
processes take of its core; otherwise those that pass.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any, get_args

import numpy as np

from ufo_ds import recipe_file
from ufo_ds.errors import ArgumentParser, UserError
from ufo_ds.model.architecture import SearchSpace
from ufo_ds.recipe import Recipe, only
from ufo_ds.subnets import latency
from ufo_ds.subnets.latency import WORK, Measurement, Profile, Target


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(
        prog="ufo latency", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    choices = {name: get_args(Target.__annotations__[name]) for name in ("backend", "device", "dtype")}
    parser.add_argument("model", help="a run directory or recipe with model.elastic, or an extracted model or student")
    parser.add_argument("--task", help="whose subnets (not needed for an extracted model)")
    parser.add_argument(
        "--backend", choices=choices["backend"], help="default: torch, eager; of an exported model onnx"
    )
    parser.add_argument("--device", choices=choices["device"], default="cpu", help="default: cpu")
    parser.add_argument("--batch_size", default="1", metavar="B", help="images of a call (default: 1)")
    parser.add_argument("--threads", default="1", metavar="N", help="of the CPU (default: 1)")
    parser.add_argument("--dtype", choices=choices["dtype"], default="fp32", help="default: fp32")
    parser.add_argument("--measurements", default="40", metavar="N", help="at most so many subnets (default: 40)")
    parser.add_argument("--out", type=Path, help="the profile to write")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    options = parser.parse_args(argv)
    exported = (Path(options.model) / "model.onnx").is_file()
    if exported and options.backend not in (None, "onnx"):
        raise UserError(f"--backend {options.backend}: {options.model} is for ONNX Runtime: leave --backend out")
    target = Target(
        backend=options.backend or ("onnx" if exported else "torch"),
        device=options.device,
        batch_size=_whole("--batch_size", options.batch_size, 1),
        threads=_whole("--threads", options.threads, 1),
        dtype=options.dtype,
    )
    count = _whole("--measurements", options.measurements, 2)

    from ufo_ds.subnets import timing  # these take seconds to import
    from ufo_ds.subnets.task_model import is_model

    timing.check(target)
    if is_model(Path(options.model)):
        if options.out is not None:
            raise UserError(
                f"--out {options.out}: a profile is of many subnets, {options.model} is one model: leave out"
            )
        result = _of_model(Path(options.model), options.task, target)
        text = "{images_per_second:.1f} images/s; {ms:.3f} ms a call, of which 80% take {low_ms:.3f} .. {high_ms:.3f}"
        print(json.dumps(result) if options.json else f"{options.model}: {text.format(**result)}")
        return
    recipe, task = _recipe_of(options.model, options.task)
    if options.out is None:
        raise UserError("--out: say where to write the profile")
    if not os.access(options.out.parent, os.W_OK) or options.out.is_dir():
        raise UserError(f"--out {options.out}: give a file in a directory that exists and that you can write to")
    profile = _of_space(recipe, task, target, count)
    try:
        profile.save(options.out)
    except OSError as error:
        raise UserError(f"--out {options.out}: {error.strerror}: choose a directory that you can write to") from None
    if options.json:
        print(json.dumps({"out": str(options.out), **profile.values()}))
        return
    taken = [measurement.ms for measurement in profile.measurements]
    print(
        f"{options.out}: {len(taken)} subnets of {task}, {min(taken):.3f} .. {max(taken):.3f} ms; each predicted from "
        f"the others to {profile.error:.1%}, mean of all"
    )


def _of_model(path: Path, task: str | None, target: Target) -> dict[str, Any]:
    """Times of a model as it lies in its directory."""
    import torch
    from transformers import AutoModel, AutoModelForImageClassification

    from ufo_ds.subnets import onnx_export, timing
    from ufo_ds.subnets.dense_model import quiet
    from ufo_ds.subnets.onnx_model import GRAPH, is_onnx_model
    from ufo_ds.subnets.task_model import open_model

    of_task = open_model(path, task).recipe.tasks[0]
    if is_onnx_model(path):
        session = onnx_export.session(path / GRAPH, target.device, target.threads)
        pixels_BCHW = torch.randn(target.batch_size, 3, *of_task.input)
        calls = [timing.call_of_session(session, pixels_BCHW, target)]
    else:
        auto = AutoModelForImageClassification if of_task.head.type == "linear" else AutoModel
        with quiet():
            model = auto.from_pretrained(path, use_safetensors=True, trust_remote_code=False, local_files_only=True)
        calls = timing.prepare([model], of_task.input, target)
    ms = 1e3 * timing.measure(calls, target).flatten()
    low, median, high = np.quantile(ms, [0.1, 0.5, 0.9]).tolist()
    images_per_second = 1e3 * target.batch_size / median
    return {"model": str(path), "ms": median, "low_ms": low, "high_ms": high, "images_per_second": images_per_second}


def _of_space(recipe: Recipe, task: str, target: Target, count: int) -> Profile:
    """Measure subnets and learn from them."""
    import torch

    from ufo_ds.model.dense import network
    from ufo_ds.subnets import timing

    space, backbone = SearchSpace.of(recipe.model), recipe.model.backbone
    architectures = latency.to_measure(space, count)
    if len(architectures) < 2:
        raise UserError("model.elastic has one subnet only: a profile needs two or more")
    input_hw = next(t.input for t in recipe.tasks if t.name == task)
    with torch.device("meta"):
        models = [network(recipe, task, architecture) for architecture in architectures]
    timing.with_random_weights(models, target)
    times_RNC = timing.measure(timing.prepare(models, input_hw, target), target)
    ms_N = 1e3 * timing.typical(times_RNC)
    work_NW = latency.work(backbone, input_hw, target.batch_size, architectures)
    return Profile(
        machine=timing.machine(target),
        versions=timing.versions(target),
        target=target,
        input=input_hw,
        backbone=backbone,
        space=space,
        measurements=[Measurement(architecture=a, ms=ms) for a, ms in zip(architectures, ms_N.tolist(), strict=True)],
        coefficients=dict(zip(WORK, latency.fit(work_NW, ms_N).tolist(), strict=True)),
        error=float(latency.left_out_errors(work_NW, ms_N).mean()),
    )


def _recipe_of(name: str, task: str | None) -> tuple[Recipe, str]:
    """
    Raises:
        UserError: no such run or recipe, no such task, or a model that is not elastic.
    """
    of_run = Path(name) / "recipe.yaml"
    if Path(name).is_dir() and not of_run.is_file():
        raise UserError(f"{name} is no run directory (no recipe.yaml) and no extracted model (no config.json)")
    recipe = recipe_file.load(str(of_run) if of_run.is_file() else name)
    if task is None:
        raise UserError(f"--task: say of which task: {', '.join(t.name for t in recipe.tasks)}")
    SearchSpace.of(only(recipe, [task]).model)
    return recipe, task


def _whole(name: str, text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise UserError(f"{name} {text!r}: give a whole number from {least}")
    return int(text)
