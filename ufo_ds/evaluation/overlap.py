"""Metrics without the test images that training has seen, as an audit found them."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ufo_ds.data.audit import Audit
from ufo_ds.data.evaluation_set import EvaluationSet, digest
from ufo_ds.errors import UserError
from ufo_ds.evaluation import benchmarks
from ufo_ds.evaluation.features import Predictions, TaskImages
from ufo_ds.evaluation.outcomes import Outcomes
from ufo_ds.recipe import Recipe

LeftOut = dict[str, dict[str, set[int]]]  # task/benchmark -> directory -> positions of images


def left_out(path: Path, trained: Recipe, evaluated: Recipe) -> LeftOut:
    """The test images of the benchmarks of ``evaluated`` that overlap with any training set of ``trained``.

    Args:
        path: of an audit.

    Raises:
        UserError: the file is no audit, or it is of other training sets or other benchmarks.
    """
    audit = Audit.load(path)
    again = "make one of this run: `ufo data RUN/recipe.yaml --audit`"
    train = {entry.shards for task in trained.tasks for entry in task.train}
    for shards in sorted(train - {entry.shards for entry in audit.train}):
        raise UserError(f"--audit {path} lacks the training set {shards}: {again}")
    data_of = {entry.benchmark: entry.data for entry in audit.test}
    found: LeftOut = {}
    for task in evaluated.tasks:
        for benchmark in task.benchmarks:
            key, directories = f"{task.name}/{benchmark.name}", benchmark.parts
            cache = evaluated.data.shard_cache
            if data_of.get(key) != digest(*(EvaluationSet.open(path, cache) for path in directories.values())):
                raise UserError(f"--audit {path} {'is of another' if key in data_of else 'lacks'} {key}: {again}")
            found[key] = {directory: set() for directory in directories.values()}
            for pair in audit.pairs:
                if pair.benchmark == key and pair.shards in train:
                    found[key][directories[pair.part]].add(pair.index)
    return found


def score_without(
    recipe: Recipe,
    images: Mapping[str, TaskImages],
    predictions: Predictions,
    classes: Mapping[str, list[str]],
    without: LeftOut,
) -> dict[str, Outcomes | None]:
    """As :func:`benchmarks.score`, of the benchmarks that lose images alone; None where too few are left."""
    found: dict[str, Outcomes | None] = {}
    for task in recipe.tasks:
        for benchmark in task.benchmarks:
            if count(without, f"{task.name}/{benchmark.name}"):
                alone = dataclasses.replace(recipe, tasks=[dataclasses.replace(task, benchmarks=[benchmark])])
                try:
                    found |= benchmarks.score(alone, images, predictions, classes, without)
                except UserError:  # no image, no query with a match or no second fold
                    found[f"{task.name}/{benchmark.name}"] = None
    return found


def count(left_out: LeftOut, key: str) -> int:
    """How many images of a benchmark are left out, of all its parts together."""
    return sum(len(images) for images in left_out.get(key, {}).values())


def as_values(
    metrics: Mapping[str, float], without: Mapping[str, Outcomes | None], left_out: LeftOut
) -> dict[str, Any]:
    """All there is, for machines: metrics of what is left are null where too little is."""
    kept = {name: _without(name, value, without) for name, value in metrics.items()}
    return {
        "metrics": dict(metrics),
        "without_overlap": kept,
        "left_out": {key: count(left_out, key) for key in left_out},
    }


def table(metrics: Mapping[str, float], without: Mapping[str, Outcomes | None], left_out: LeftOut) -> Iterator[str]:
    """Lines of a plain table: every metric of all images, and of those without overlap."""
    width = max(map(len, metrics), default=0)
    yield f"{'':{width}}     all  without overlap"
    for name, value in metrics.items():
        kept = _without(name, value, without)
        images = count(left_out, name.rsplit("/", 1)[0])
        note = f"  ({images} images left out)" if images else ""
        yield f"{name:{width}}  {value:.4f}  {'too few left' if kept is None else f'{kept:.4f}':>15}{note}"


def _without(name: str, value: float, without: Mapping[str, Outcomes | None]) -> float | None:
    key, metric = name.rsplit("/", 1)
    if key not in without:
        return value
    found = without[key]
    return None if found is None else found.metrics()[metric]
