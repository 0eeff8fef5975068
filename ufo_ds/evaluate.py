"""Run the benchmarks of a trained run or of an extracted model.

ufo evaluate runs/demo
ufo evaluate runs/demo --task glyphs --pixels
ufo evaluate glyphs-vit --recipe other.yaml --task glyphs    # benchmarks of another recipe
ufo evaluate runs/demo --spec small.json        # a subnet of an elastic model
ufo evaluate glyphs-vit --far 0.001             # also thresholds for "the same or not", kept with the model
ufo evaluate runs/demo --audit audit/audit.json     # also without the test images that training has seen
torchrun --nproc_per_node 8 ufo_ds/evaluate.py runs/big

What it finds is kept in `evaluations` of the run directory or model, where it may write there: metrics.json, and item
by item for `ufo compare` and `ufo report`.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

if __name__ == "__main__":  # started by its path: the repository, not this folder, is where packages are found
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
import torch

from ufo_ds import checkpoint
from ufo_ds.data import attributes
from ufo_ds.data.source import TrainSource
from ufo_ds.errors import ArgumentParser, UserError, run
from ufo_ds.evaluation import benchmarks, outcomes, overlap, thresholds
from ufo_ds.evaluation.features import FeatureFiles, Kind, Predictions, TaskImages, open_images, predict
from ufo_ds.evaluation.outcomes import Outcomes
from ufo_ds.evaluation.pixels import nearest_neighbour_attributes, nearest_neighbour_scores, pixel_features
from ufo_ds.evaluation.selection import select
from ufo_ds.model.loading import check_path, spec_of
from ufo_ds.model.spec import SubnetSpec
from ufo_ds.parallel import ranks, scoring
from ufo_ds.parallel.launch import adopt_environment, finish_distributed, init_distributed
from ufo_ds.parallel.placement import share
from ufo_ds.recipe import Recipe, only
from ufo_ds.subnets import calibration as calibrations
from ufo_ds.subnets import recalibration
from ufo_ds.subnets.calibration import Calibration
from ufo_ds.subnets.task_model import TaskModel, is_model, open_model, task_model


@dataclass(frozen=True)
class Subject:
    """What is evaluated.

    Attributes:
        what: for people.
        recipe: that it was trained by; of a model, restricted to its task.
        classes: per task, the names behind the logits.
        step: of the training; None where that is not known.
        keep: where what is found goes; None for a checkpoint outside of its run, and for subnets.
        open: loads a task's model.
    """

    what: str
    recipe: Recipe
    classes: dict[str, list[str]]
    step: int | None
    keep: Path | None
    open: Callable[[str], TaskModel]


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(
        prog="ufo evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="a run directory (its best checkpoint), a checkpoint, or a model")
    parser.add_argument("--recipe", help="take the benchmarks from this recipe (tasks go by their names)")
    parser.add_argument("--task", action="append", help="only this task (may be given several times)")
    parser.add_argument("--benchmark", action="append", help="only this benchmark (may be given several times)")
    parser.add_argument(
        "--spec", type=Path, action="append", default=[], metavar="FILE",
        help="only this subnet of the run, a SubnetSpec as JSON (may be given several times, once for a task)",
    )  # fmt: skip
    parser.add_argument(
        "--statistics", metavar="SOURCE",
        help="with --spec, shards or a folder of training images for the statistics of its neck (default: the train "
        "sets of the task)",
    )  # fmt: skip
    parser.add_argument("--last", action="store_true", help="the last checkpoint instead of the best")
    parser.add_argument("--pixels", action="store_true", help="the floor instead: matching of 32x32 grey pixels")
    parser.add_argument(
        "--far", type=float, action="append", metavar="F",
        help="find the threshold of this false accept rate (may be given several times; the first decides)",
    )  # fmt: skip
    parser.add_argument(
        "--audit", type=Path, metavar="JSON", help="of `ufo data --audit`: every metric without overlapping images too"
    )
    parser.add_argument("--batch_size", type=int, help="images in a forward pass (default: evaluation.batch_size)")
    parser.add_argument("--scratch", type=Path, help="directory for features that all nodes see (default: a local one)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", action="store_true", help="print the metrics as JSON")
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)  # from launchers
    options = parser.parse_args(argv)
    if options.far and options.pixels:
        raise UserError("--far and --pixels: thresholds are a model's: leave one of them out")
    for far in options.far or []:
        if not 0 < far < 1:
            raise UserError(f"--far {far:g}: give a rate between 0 and 1, such as 0.001")
    if adopt_environment() > 1:
        init_distributed()
    subject = _subject(options.run, options.last, options.device, options.spec, options.statistics)
    recipe = select(subject.recipe, options.run, options.recipe, options.task, options.benchmark)
    images = open_images(recipe)
    left_out = overlap.left_out(options.audit, subject.recipe, recipe) if options.audit else {}
    benchmarks.check(recipe, images, subject.classes)
    with scoring.feature_files(options.scratch) as files:
        if options.pixels:
            models = {}
            predictions, classes = _of_pixels(recipe, images)
        else:
            models = _predict(subject, recipe, images, options, files)
            predictions, classes = files.read(images), subject.classes
        found = scoring.score(recipe, images, predictions, classes)
        if ranks.this() == 0:
            without = overlap.score_without(recipe, images, predictions, classes, left_out)
            measured, problems = _measure(options.far or [], recipe, images, predictions, found, models)
            _report(options, subject, found, without, left_out, measured)
            for line in benchmarks.without_match(recipe, images, found):
                print(line, file=sys.stderr)
            for path, calibration in measured:
                calibrations.write(path, calibration)
            if problems:
                raise UserError("; ".join(problems))
    if ranks.count() > 1:
        finish_distributed()


def _subject(path: Path, last: bool, device: str, spec_files: list[Path], statistics: str | None) -> Subject:
    """
    Raises:
        UserError: there is no such model or run, or it has not the subnets that are asked for.
    """
    if is_model(path):
        if spec_files:
            raise UserError(f"--spec {spec_files[0]} is for a run, {path} is a model: give the run it was cut out of")
        if statistics is not None:
            raise UserError(f"--statistics {statistics} is for a subnet of a run, {path} is a model that has its own")
        model = open_model(path, device=device)
        classes = {model.task: model.classes}
        return Subject(str(path), model.recipe, classes, None, path, lambda task: model)
    reader = checkpoint.Reader(checkpoint.of_run(path, "last" if last else "best"))
    specs: dict[str, SubnetSpec] = {}
    for file in spec_files:
        spec = SubnetSpec.load(file)
        if spec.task in specs:
            raise UserError(f"--spec {file} is one more for task {spec.task!r}: evaluate them one after the other")
        check_path(reader, spec)
        specs[spec.task] = spec
    if statistics is not None and len(specs) != 1:
        raise UserError(f"--statistics {statistics} is for the subnet of one task: give one --spec")
    recipe = only(reader.recipe, list(specs)) if specs else reader.recipe

    def open_task(task: str) -> TaskModel:
        pixels = None if statistics is None else recalibration.training_pixels(recipe, task, statistics)
        return task_model(reader, path, specs.get(task) or spec_of(reader, task), device, pixels)

    checkpoints = reader.directory.resolve().parent
    return Subject(
        ", ".join([f"{path}, step {reader.index.step}", *(spec.name for spec in specs.values())]),
        recipe,
        reader.index.classes,
        reader.index.step,
        checkpoints.parent if checkpoints.name == "checkpoints" and not specs else None,
        open_task,
    )


def _predict(
    subject: Subject, recipe: Recipe, images: dict[str, TaskImages], options: argparse.Namespace, files: FeatureFiles
) -> dict[str, tuple[str, Path]]:
    """Run the images, each rank a part of every task's, task by task: one dense path is in memory at a time.

    Returns:
        Per task the model's fingerprint and the place of its calibration.

    Raises:
        UserError: shards or weights that are missing or damaged.
    """
    models = {}
    for name, mine in images.items():
        model = subject.open(name)
        models[name] = model.fingerprint, model.calibration
        predict(
            model.forward,
            {name: mine},
            {name: share(range(len(mine)), ranks.count(), ranks.this())},
            options.batch_size or recipe.evaluation.batch_size,
            recipe.data.workers,
            files,
            quiet=ranks.this() != 0,
        )
    ranks.wait_for_all()
    return models


def _of_pixels(recipe: Recipe, images: dict[str, TaskImages]) -> tuple[Predictions, dict[str, list[str]]]:
    """The same by pixel matching, logits by the nearest training images, and the names behind the logits."""
    predictions: dict[str, dict[Kind, np.ndarray]] = {}
    classes: dict[str, list[str]] = {}
    for task in recipe.tasks:
        if task.name not in images:
            continue
        mine = images[task.name]
        features = pixel_features(np.stack([mine.load(i) for i in range(len(mine))]))
        predictions[task.name], classes[task.name] = {"embedding": features}, []
        if "logits" in mine.kinds:
            source = TrainSource.open(task, recipe.seed, shard_cache=recipe.data.shard_cache)
            train = pixel_features(np.stack([source.pixels(i) for i in range(len(source))]))
            classes[task.name] = source.classes
            count = len(source.classes)
            predictions[task.name]["logits"] = (
                nearest_neighbour_attributes(features, train, attributes.from_bits(source.labels, count))
                if task.loss.multi_label
                else nearest_neighbour_scores(features, train, source.labels, count)
            )
    return predictions, classes


def _measure(
    fars: list[float],
    recipe: Recipe,
    images: dict[str, TaskImages],
    predictions: Predictions,
    found: dict[str, Outcomes],
    models: dict[str, tuple[str, Path]],
) -> tuple[list[tuple[Path, Calibration]], list[str]]:
    """Thresholds of each task by its first benchmark whose pairs support them, lists of pairs before what searches; and
    why there are none of some tasks."""
    measured, problems = [], []
    for task in recipe.tasks if fars else []:
        refusals = []
        for benchmark in sorted(task.benchmarks, key=lambda b: b.protocol != "verification"):
            key = f"{task.name}/{benchmark.name}"
            pairs = benchmarks.pairs(benchmark, images[task.name], predictions[task.name], found[key])
            if pairs is None:
                continue
            fingerprint, path = models[task.name]
            try:
                calibration = Calibration(
                    model=fingerprint, task=task.name, benchmark=benchmark.name, flip=benchmark.flip,
                    probability=thresholds.calibrate(*pairs[:2]),
                    thresholds=[thresholds.choose(*pairs, far) for far in fars],
                )  # fmt: skip
            except UserError as error:
                refusals.append(f"{key}: {error}")
            else:
                measured.append((path, calibration))
                break
        else:
            problems += refusals
    if fars and not measured and not problems:
        problems.append("--far needs a benchmark of pairs or one that searches, and those evaluated are neither")
    return measured, problems


def _report(
    options: argparse.Namespace,
    subject: Subject,
    found: dict[str, Outcomes],
    without: dict[str, Outcomes | None],
    left_out: overlap.LeftOut,
    measured: list[tuple[Path, Calibration]],
) -> None:
    """Print what was found, and keep it."""
    metrics = outcomes.flatten(found)
    if options.json:
        values = overlap.as_values(metrics, without, left_out) if options.audit else metrics
        print(json.dumps(values | ({"calibration": [asdict(found) for _, found in measured]} if measured else {})))
    else:
        print("pixel matching" if options.pixels else subject.what, file=sys.stderr)
        lines = overlap.table(metrics, without, left_out) if options.audit else benchmarks.table(metrics)
        print("\n".join(lines))
        for path, calibration in measured:
            print("\n".join(["", *calibrations.table(calibration), f"kept in {path}"]))
    if subject.keep is not None and not options.pixels:
        try:
            outcomes.store(subject.keep, subject.step, found)
        except UserError as error:  # somebody else's run, mostly
            print(error, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(run(main))
