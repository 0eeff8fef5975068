"""From a recipe's benchmarks to metrics: which images to run, and which protocol to apply to what comes out."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ufo_ds.data.evaluation_set import EvaluationSet
from ufo_ds.data.mixing import Batch, TaskBatch
from ufo_ds.errors import UserError
from ufo_ds.evaluation import classification, retrieval, verification
from ufo_ds.model.heads import Outputs
from ufo_ds.recipe import Benchmark, Recipe, Size


@dataclass
class TaskImages:
    """All evaluation images of a task, one after another: ``sets`` by directory, ``starts`` where each begins."""

    input: Size
    sets: dict[str, EvaluationSet] = field(default_factory=dict)
    starts: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return sum(map(len, self.sets.values()))

    def load(self, index: int) -> np.ndarray:
        directory = [d for d, start in self.starts.items() if start <= index][-1]
        return self.sets[directory].load(index - self.starts[directory], self.input)


def open_images(recipe: Recipe) -> dict[str, TaskImages]:
    """The images behind the benchmarks of every task that has some, each directory once.

    Raises:
        UserError: shards that are missing or damaged.
    """
    images = {}
    for task in recipe.tasks:
        mine = TaskImages(task.input)
        for benchmark in task.benchmarks:
            for directory in (benchmark.shards, benchmark.query, benchmark.gallery):
                if directory is not None and directory not in mine.sets:
                    mine.starts[directory] = len(mine)
                    mine.sets[directory] = EvaluationSet.open(directory)
        if mine.sets:
            images[task.name] = mine
    return images


def check(recipe: Recipe, images: Mapping[str, TaskImages], classes: Mapping[str, list[str]]) -> None:
    """Whether all benchmarks can be scored, before hours are spent on what they would score.

    Raises:
        UserError: a class that the head lacks, pairs that the shards lack, or an ``evaluation.best`` that none yields.
    """
    names = []
    for task in recipe.tasks:
        for benchmark in task.benchmarks:
            names.append(f"{task.name}/{benchmark.name}/")
            if benchmark.shards is not None:
                data = images[task.name].sets[benchmark.shards]
                if benchmark.protocol == "classification":
                    class_labels(data, classes[task.name], benchmark.name)
                elif data.pairs is None:
                    raise UserError(
                        f"benchmark {benchmark.name}: {benchmark.shards} has no pairs: make it from a pair list"
                    )
    best = recipe.evaluation.best
    if best is not None and not best.startswith(tuple(names)):
        raise UserError(f"evaluation.best {best!r}: use a metric of one of {', '.join(names)}")


class _Rounds(Dataset[Batch]):
    """Round i holds the i-th ``batch_size`` images of every task's range."""

    def __init__(self, images: Mapping[str, TaskImages], ranges: Mapping[str, range], batch_size: int):
        self.images, self.ranges, self.batch_size = images, ranges, batch_size

    def __getitem__(self, i: int) -> Batch:
        tasks = {}
        for name, indices in self.ranges.items():
            chosen = indices[i * self.batch_size : (i + 1) * self.batch_size]
            pixels = np.empty((len(chosen), 3, *self.images[name].input), dtype=np.uint8)
            for row, index in enumerate(chosen):
                pixels[row] = self.images[name].load(index)
            count = len(chosen)
            tasks[name] = TaskBatch(torch.from_numpy(pixels), torch.zeros(count, dtype=torch.int64), chosen, count)
        return Batch(i, 0, tasks, {})


Predictions = dict[str, tuple[int, np.ndarray, np.ndarray]]  # task -> first image, embeddings [n, D], logits [n, C]


def predict(
    forward: Callable[[Batch], Mapping[str, Outputs]],
    images: Mapping[str, TaskImages],
    ranges: Mapping[str, range],
    rounds: int,
    batch_size: int,
    workers: int,
    quiet: bool = False,
) -> Predictions:
    """Run images through a model.

    Args:
        forward: the model in evaluation mode, on a batch that is still on the host.
        ranges: per task the images to run here; tasks without images take part with none.
        rounds: number of forward passes, the same on all ranks.
    """
    pieces: dict[str, list[Outputs]] = {name: [] for name in ranges}
    dataset = _Rounds(images, ranges, batch_size)
    loader: Any = DataLoader(
        dataset, batch_size=None, sampler=range(rounds), num_workers=workers, generator=torch.Generator()
    )
    with torch.no_grad():
        for batch in tqdm(loader, "evaluate", total=rounds, leave=False, disable=True if quiet else None):
            outputs = forward(batch)
            for name, task in batch.tasks.items():
                if len(task.labels):
                    pieces[name].append(Outputs(*(tensor.float().cpu() for tensor in outputs[name])))
    return {
        name: (
            ranges[name].start,
            torch.cat([p.embedding for p in found]).numpy(),
            torch.cat([p.logits for p in found]).numpy(),
        )
        for name, found in pieces.items() if found
    }  # fmt: skip


def join(parts: list[Predictions]) -> Predictions:
    """Put together what the ranks predicted."""
    joined: Predictions = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        found = sorted((part[name] for part in parts if name in part), key=lambda piece: piece[0])
        joined[name] = 0, np.concatenate([p[1] for p in found]), np.concatenate([p[2] for p in found])
    return joined


def score(
    recipe: Recipe, images: Mapping[str, TaskImages], predictions: Predictions, classes: Mapping[str, list[str]]
) -> dict[str, float]:
    """Metrics of all benchmarks: ``task/benchmark/metric`` -> value.

    Args:
        classes: per task, the names behind the columns of the logits.

    Raises:
        UserError: a benchmark has a class that the head lacks.
    """
    metrics: dict[str, float] = {}
    for task in recipe.tasks:
        for benchmark in task.benchmarks:
            _, embeddings, logits = predictions[task.name]
            values = _score(benchmark, images[task.name], embeddings, logits, classes[task.name])
            metrics |= {f"{task.name}/{benchmark.name}/{name}": value for name, value in values.items()}
    return metrics


def _score(
    benchmark: Benchmark, images: TaskImages, embeddings: np.ndarray, logits: np.ndarray, classes: list[str]
) -> dict[str, float]:
    def rows(array: np.ndarray, directory: str) -> np.ndarray:
        start = images.starts[directory]
        return array[start : start + len(images.sets[directory])]

    if benchmark.protocol == "retrieval":
        assert benchmark.query is not None
        assert benchmark.gallery is not None
        query, gallery = images.sets[benchmark.query], images.sets[benchmark.gallery]
        return retrieval.evaluate(
            rows(embeddings, benchmark.query), *_numbers(query, gallery),
            rows(embeddings, benchmark.gallery), *_numbers(gallery, query),
        )  # fmt: skip
    assert benchmark.shards is not None
    data = images.sets[benchmark.shards]
    if benchmark.protocol == "verification":
        assert data.pairs is not None  # see check
        return verification.evaluate(rows(embeddings, benchmark.shards), data.pairs)
    return classification.top1(rows(logits, benchmark.shards), class_labels(data, classes, benchmark.name))


def class_labels(data: EvaluationSet, classes: list[str], where: str) -> np.ndarray:
    """Labels in the head's numbering, by class name.

    Raises:
        UserError: a class that the head was not trained on.
    """
    numbers = {name: i for i, name in enumerate(classes)}
    for name in dict.fromkeys(data.label_names):
        if name not in numbers:
            raise UserError(f"benchmark {where}: label {name!r} out of range: not among the {len(classes)} classes")
    return np.array([numbers[name] for name in data.label_names])


def _numbers(data: EvaluationSet, other: EvaluationSet) -> tuple[np.ndarray, np.ndarray]:
    """Identities and cameras numbered alike in query and gallery, by name; "-1" is junk, no camera is -1."""

    def number(mine: list[Any], theirs: list[Any], unknown: Any) -> np.ndarray:
        names = {name: i for i, name in enumerate(sorted({*mine, *theirs} - {unknown}))}
        return np.array([names.get(name, -1) for name in mine])

    return (
        number(data.label_names, other.label_names, "-1"),
        number(data.camera_names, other.camera_names, None),
    )


def table(metrics: Mapping[str, float]) -> Iterator[str]:
    """Lines of a plain table, one benchmark a line."""
    by_benchmark: dict[str, list[str]] = {}
    for key, value in metrics.items():
        benchmark, name = key.rsplit("/", 1)
        by_benchmark.setdefault(benchmark, []).append(f"{name} {value:.4f}")
    width = max(map(len, by_benchmark), default=0)
    for benchmark, values in by_benchmark.items():
        yield f"{benchmark:<{width}}  {'  '.join(values)}"
