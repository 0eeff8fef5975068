"""Cut one task out of a run as a dense Hugging Face model.

ufo extract runs/demo --task glyphs --out glyphs-vit --verify
ufo extract runs/demo --task glyphs --spec small.json --out glyphs-small    # a subnet of an elastic model
"""

import argparse
import json
from pathlib import Path

from ufo_ds import checkpoint
from ufo_ds.data.shard_specs import is_here
from ufo_ds.data.shards import ShardSet
from ufo_ds.errors import UserError
from ufo_ds.model.loading import spec_of
from ufo_ds.model.spec import SubnetSpec
from ufo_ds.recipe import Recipe
from ufo_ds.subnets import licences


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="ufo extract", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="a run directory (its best checkpoint), or one checkpoint")
    parser.add_argument("--task", required=True, help="the task to cut out")
    parser.add_argument("--out", type=Path, required=True, help="directory to make")
    parser.add_argument("--spec", type=Path, help="a subnet's SubnetSpec as JSON (default: the whole path of the task)")
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
    spec = SubnetSpec.load(options.spec) if options.spec else spec_of(reader, options.task)
    if spec.task != options.task:
        raise UserError(f"--spec {options.spec} is for task {spec.task!r}, --task is {options.task!r}")
    if options.allow is not None:
        licences.check_commercial_use(reader.index, reader.recipe, spec)
    images = _images(reader.recipe, options.task, options.images) if options.verify else []

    from transformers.utils import logging  # takes seconds to import

    from ufo_ds.subnets import extraction, recalibration

    logging.set_verbosity_error()  # its loading report lists the half of the file that the other class reads
    logging.disable_progress_bar()

    pixels = None
    if options.statistics is not None:
        pixels = recalibration.training_pixels(reader.recipe, spec.task, options.statistics)
    statistics = recalibration.statistics(reader, spec, pixels)
    parameters = extraction.extract(reader, spec, options.out, statistics)
    result = {
        "task": spec.task,
        "spec": spec.name,
        "out": str(options.out),
        "step": reader.index.step,
        "parameters": parameters,
    }
    if options.verify:
        result["max_difference"] = extraction.verify(reader, spec, options.out, images, statistics)["max_difference"]
    if options.json:
        print(json.dumps(result))
    else:
        checked = f", differs from the supernet by {result['max_difference']:.1e} at most" if options.verify else ""
        print(f"{options.out}: {spec.task}, {parameters / 1e6:.2f} M parameters, step {reader.index.step}{checked}")


def _images(recipe: Recipe, task: str, files: list[Path] | None, count: int = 32) -> list[bytes]:
    """Image files to compare with: those given, or some that the recipe knows for this task."""
    if files:
        try:
            return [path.read_bytes() for path in files]
        except OSError as error:
            raise UserError(f"--images {error.filename}: {error.strerror}") from None
    found = next(t for t in recipe.tasks if t.name == task)
    directories = [d for b in found.benchmarks for d in b.parts.values()] + [s.shards for s in found.train]
    for directory in directories:
        if is_here(directory):
            shards = ShardSet.open(directory, recipe.data.shard_cache)
            step = max(1, len(shards) // count)
            return [shards.read(index) for index in range(0, len(shards), step)][:count]
    raise UserError(f"--verify needs images: none of {', '.join(directories) or 'no shards'} is here; give --images")
