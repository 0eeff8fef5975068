"""Cut one task out of a run as a dense Hugging Face model, or several that share weights.

ufo extract runs/demo --task glyphs --out glyphs-vit --verify
ufo extract runs/demo --task glyphs --spec small.json --out glyphs-small    # a subnet of an elastic model
ufo extract runs/demo --task digits --task glyphs --out both    # for ufo evaluate, predict and extract
"""

import argparse
import json
from pathlib import Path
from typing import Any

from ufo_ds import checkpoint
from ufo_ds.errors import ArgumentParser, UserError
from ufo_ds.model.loading import check_path, spec_of
from ufo_ds.model.spec import SubnetSpec
from ufo_ds.subnets import licences
from ufo_ds.subnets.certificate_images import certificate_images


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(
        prog="ufo extract", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="a run directory (its best checkpoint), or one checkpoint")
    parser.add_argument(
        "--task", required=True, action="append",
        help="the task to cut out; of several, by --task A --task B, one directory holds once what they share",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, help="directory to make")
    parser.add_argument(
        "--spec", type=Path, action="append", default=[], metavar="FILE",
        help="a subnet's SubnetSpec as JSON, one for a task (default: the whole path)",
    )  # fmt: skip
    parser.add_argument(
        "--statistics", metavar="SOURCE",
        help="shards or a folder of training images for the statistics of a smaller subnet's neck (default: the train "
        "sets of the task)",
    )  # fmt: skip
    parser.add_argument("--allow", choices=["commercial"], help="refuse what the images' licences do not permit")
    parser.add_argument("--verify", action="store_true", help="compare with the supernet on image files")
    parser.add_argument("--images", type=Path, nargs="+", help="files to verify with (default: of the benchmarks)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    options = parser.parse_args(argv)

    reader = checkpoint.Reader(checkpoint.of_run(options.run))
    specs = _specs(reader, options.task, options.spec)
    if options.statistics is not None and len(specs) > 1:
        raise UserError(f"--statistics {options.statistics} is for the subnet of one task: give one --task")
    if options.allow is not None:
        for spec in specs:
            licences.check_commercial_use(reader.index, reader.recipe, spec)
    is_one = len(specs) == 1
    if options.images and not (options.verify and is_one):
        raise UserError(f"--images {options.images[0]} is to verify the model of one task: leave it out")
    if options.out.exists():  # before statistics are found, which may take a minute
        raise UserError(f"--out {options.out} exists: choose another directory or delete it")
    images = []
    if options.verify and is_one:
        images = certificate_images(reader.recipe, specs[0].task, options.images)

    from transformers.utils import logging  # takes seconds to import

    from ufo_ds.subnets import extraction, joint, recalibration

    logging.set_verbosity_error()  # its loading report lists the half of the file that the other class reads
    logging.disable_progress_bar()

    pixels = None
    if options.statistics is not None:
        pixels = recalibration.training_pixels(reader.recipe, specs[0].task, options.statistics)
    statistics: dict[str, Any] = {}
    for spec in specs:
        statistics |= recalibration.statistics(reader, spec, pixels, progress=True)
    result: dict[str, Any] = {"out": str(options.out), "step": reader.index.step}
    if is_one:
        result |= {"task": specs[0].task, "spec": specs[0].name}
        result["parameters"] = extraction.extract(reader, specs[0], options.out, statistics)
    else:
        result |= {"specs": {spec.task: spec.name for spec in specs}}
        result["parameters"] = joint.extract(reader, specs, options.out, statistics)
    checked = ""
    if options.verify and is_one:
        found = extraction.verify(reader, specs[0], options.out, images, statistics)
        result["max_difference"] = found["max_difference"]
        checked = f", differs from the supernet by {found['max_difference']:.1e} at most"
    elif options.verify:
        joint.verify(reader, specs, options.out, statistics)
        result["max_difference"] = 0.0
        checked = ", the weights of each are those of the run to the bit"
    if options.json:
        print(json.dumps(result))
    else:
        names = ", ".join(spec.task for spec in specs)
        size = f"{result['parameters'] / 1e6:.2f} M parameters"
        print(f"{options.out}: {names}, {size}, step {reader.index.step}{checked}")


def _specs(reader: checkpoint.Reader, tasks: list[str], files: list[Path]) -> list[SubnetSpec]:
    """Of every task, the one of a file or else the run's.

    Raises:
        UserError: a task that the checkpoint lacks, or a file of another model or task, or one more of a task.
    """
    given: dict[str, SubnetSpec] = {}
    for file in files:
        spec = SubnetSpec.load(file)
        if spec.task not in tasks:
            raise UserError(f"--spec {file} is for task {spec.task!r}, --task is {', '.join(map(repr, tasks))}")
        if spec.task in given:
            raise UserError(f"--spec {file} is one more for task {spec.task!r}: give one of each")
        check_path(reader, spec)
        given[spec.task] = spec
    return [given.get(task) or spec_of(reader, task) for task in dict.fromkeys(tasks)]
