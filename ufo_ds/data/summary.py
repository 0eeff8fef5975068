"""What a recipe reads, in figures."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ufo_ds.data.attributes import names_in
from ufo_ds.data.shards import ShardSet
from ufo_ds.data.source import TrainSource
from ufo_ds.recipe import Recipe


@dataclass(frozen=True)
class TaskFigures:
    """Training data of a task. Quarter turns count: an image is four samples, a class four.

    Attributes:
        classes: with samples, or attributes; identities of several sets stay apart.
        identities_per_step: None without PK sampling, and so ``images_per_identity`` (least, median, most).
        steps_per_epoch: of the task's own steps; with PK sampling until each identity was met once.
    """

    task: str
    samples: int
    classes: int
    shards: int
    samples_per_step: int
    identities_per_step: int | None
    steps_per_epoch: float
    images_per_identity: tuple[int, float, int] | None


@dataclass(frozen=True)
class BenchmarkFigures:
    """A part (``shards``, ``query``, ``gallery``) of a benchmark; ``pairs`` is None where it has no list of them.

    Attributes:
        ids: identities, classes or attributes.
    """

    benchmark: str
    protocol: str
    part: str
    samples: int
    ids: int
    cameras: int
    pairs: int | None


def task_figures(recipe: Recipe, sources: dict[str, TrainSource]) -> list[TaskFigures]:
    """Of every task; the recipe's have ``samples_per_step``."""
    figures = []
    for task in recipe.tasks:
        turns = 4 if task.quarter_turns else 1
        images = np.unique(sources[task.name].labels, return_counts=True)[1]
        samples, classes, p = turns * int(images.sum()), turns * len(images), task.identities_per_step
        if task.loss.multi_label:
            classes = len(sources[task.name].classes)
        figures.append(
            TaskFigures(
                task=task.name,
                samples=samples,
                classes=classes,
                shards=sources[task.name].shards,
                samples_per_step=task.samples_per_step,
                identities_per_step=p,
                steps_per_epoch=sources[task.name].steps_per_epoch,
                images_per_identity=(int(images.min()), float(np.median(images)), int(images.max())) if p else None,
            )
        )
    return figures


def benchmark_figures(recipe: Recipe) -> list[BenchmarkFigures]:
    """
    Raises:
        UserError: shards that are missing or damaged.
    """
    figures = []
    for task in recipe.tasks:
        for benchmark in task.benchmarks:
            for part, directory in benchmark.parts.items():
                shards = ShardSet.open(directory, recipe.data.shard_cache)
                pairs = None if shards.pairs is None else len(shards.pairs)
                ids = {shards.classes[label] for label in np.unique(shards.labels)}
                if benchmark.protocol == "attributes":
                    ids = {name for label in ids for name in names_in(label)}
                figures.append(
                    BenchmarkFigures(
                        benchmark=f"{task.name}/{benchmark.name}",
                        protocol=benchmark.protocol,
                        part=part,
                        samples=len(shards),
                        ids=len(ids),
                        cameras=len(np.unique(shards.camera_ids[shards.camera_ids >= 0])),
                        pairs=pairs,
                    )
                )
    return figures


def report(tasks: Sequence[TaskFigures], benchmarks: Sequence[BenchmarkFigures]) -> Iterator[str]:
    """Lines of two tables."""
    rows = [["task", "samples", "classes", "shards", "a step", "steps an epoch", "images an identity"]]
    for t in tasks:
        step = (
            f"{t.identities_per_step} x {t.samples_per_step // t.identities_per_step}" if t.identities_per_step else ""
        )
        images = "{} / {:g} / {}".format(*t.images_per_identity) if t.images_per_identity else "-"
        rows.append(
            [t.task, f"{t.samples:,}", f"{t.classes:,}", f"{t.shards:,}", step or str(t.samples_per_step),
             f"{t.steps_per_epoch:,.1f}", images]
        )  # fmt: skip
    yield from aligned(rows, left=1)
    rows = [["benchmark", "protocol", "", "samples", "ids", "cameras", "pairs"]]
    for b in benchmarks:
        part = "" if b.part == "shards" else b.part
        cameras, pairs = (f"{count:,}" if count else "-" for count in (b.cameras, b.pairs))
        rows.append([b.benchmark, b.protocol, part, f"{b.samples:,}", f"{b.ids:,}", cameras, pairs])
    yield ""
    yield from aligned(rows, left=3)


def aligned(rows: Sequence[Sequence[str]], left: int) -> Iterator[str]:
    """Lines of a table with the first ``left`` columns to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [f"{c:<{w}}" if n < left else f"{c:>{w}}" for n, (c, w) in enumerate(zip(row, widths, strict=True))]
        yield "  ".join(cells).rstrip()
