"""From a recipe's benchmarks to outcomes: which images to run, and which protocol to apply to what comes out."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ufo_ds.data.evaluation_set import EvaluationSet, digest
from ufo_ds.data.mixing import Batch, TaskBatch
from ufo_ds.errors import UserError
from ufo_ds.evaluation import classification, retrieval, verification
from ufo_ds.evaluation.outcomes import Outcomes
from ufo_ds.model.heads import Outputs
from ufo_ds.recipe import Recipe
from ufo_ds.recipe_task import Benchmark, Size


@dataclass
class TaskImages:
    """All evaluation images of a task, one after another.

    Attributes:
        input: height and width.
        sets: by directory.
        starts: by directory and whether mirrored, where its images begin.
    """

    input: Size
    sets: dict[str, EvaluationSet] = field(default_factory=dict)
    starts: dict[tuple[str, bool], int] = field(default_factory=dict)

    def __len__(self) -> int:
        return sum(len(self.sets[directory]) for directory, _ in self.starts)

    def load(self, index: int) -> np.ndarray:
        (directory, mirrored), start = [item for item in self.starts.items() if item[1] <= index][-1]
        pixels = self.sets[directory].load(index - start, self.input)
        return pixels[:, :, ::-1] if mirrored else pixels

    def rows(self, outputs: np.ndarray, directory: str, flip: bool) -> np.ndarray:
        """Of the outputs for all images those for one set, with ``flip`` averaged with its mirror images'.

        The average is of the outputs as they are; embeddings are normalised afterwards, by the protocols, as fast-reid
        and insightface do.
        """
        count = len(self.sets[directory])
        plain = outputs[self.starts[directory, False] :][:count]
        return (plain + outputs[self.starts[directory, True] :][:count]) / 2 if flip else plain


def open_images(recipe: Recipe) -> dict[str, TaskImages]:
    """The images behind the benchmarks of every task that has some, each directory once, and once mirrored if needed.

    Raises:
        UserError: shards that are missing or damaged.
    """
    images = {}
    for task in recipe.tasks:
        mine = TaskImages(task.input)
        for benchmark in task.benchmarks:
            for directory in (benchmark.shards, benchmark.query, benchmark.gallery):
                if directory is None:
                    continue
                if directory not in mine.sets:
                    mine.sets[directory] = EvaluationSet.open(directory, recipe.data.shard_cache)
                for mirrored in (False, True) if benchmark.flip else (False,):
                    if (directory, mirrored) not in mine.starts:
                        mine.starts[directory, mirrored] = len(mine)
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
    recipe: Recipe,
    images: Mapping[str, TaskImages],
    predictions: Predictions,
    classes: Mapping[str, list[str]],
    without: Mapping[str, Mapping[str, set[int]]] | None = None,
) -> dict[str, Outcomes]:
    """Outcomes of all benchmarks, by ``task/benchmark``.

    Args:
        classes: per task, the names behind the columns of the logits.
        without: per ``task/benchmark`` and directory the images, by position, that are left out, and with them every
            pair that one of them is in.

    Raises:
        UserError: a benchmark has a class that the head lacks.
    """
    outcomes = {}
    for task in recipe.tasks:
        for benchmark in task.benchmarks:
            _, embeddings, logits = predictions[task.name]
            key = f"{task.name}/{benchmark.name}"
            left_out = (without or {}).get(key, {})
            outcomes[key] = _score(benchmark, images[task.name], embeddings, logits, classes[task.name], left_out)
    return outcomes


def _score(
    benchmark: Benchmark,
    images: TaskImages,
    embeddings: np.ndarray,
    logits: np.ndarray,
    classes: list[str],
    without: Mapping[str, set[int]],
) -> Outcomes:
    def rows(array: np.ndarray, directory: str) -> np.ndarray:
        return images.rows(array, directory, benchmark.flip)

    def kept(directory: str) -> np.ndarray:
        mask = np.ones(len(images.sets[directory]), dtype=bool)
        mask[list(without.get(directory, []))] = False
        return mask

    if benchmark.protocol == "retrieval":
        assert benchmark.query is not None
        assert benchmark.gallery is not None
        query, gallery = images.sets[benchmark.query], images.sets[benchmark.gallery]
        of_query, of_gallery = (
            [array[kept(directory)] for array in (rows(embeddings, directory), *_numbers(one, other))]
            for directory, one, other in ((benchmark.query, query, gallery), (benchmark.gallery, gallery, query))
        )
        arrays = retrieval.outcomes(*of_query, *of_gallery)
        return Outcomes(benchmark.protocol, benchmark.flip, digest(query, gallery), arrays)
    assert benchmark.shards is not None
    data, keep = images.sets[benchmark.shards], kept(benchmark.shards)
    if benchmark.protocol == "verification":
        assert data.pairs is not None  # see check
        pairs = data.pairs[keep[data.pairs[:, 1]] & keep[data.pairs[:, 2]]]
        arrays = verification.outcomes(rows(embeddings, benchmark.shards), pairs)
        # Images of a pair list have no label and are their own identities.
        identities = np.unique(data.label_names, return_inverse=True)[1]
        arrays["identity"] = identities[pairs[:, 1:3]]
    else:
        labels = class_labels(data, classes, benchmark.name)
        arrays = classification.outcomes(rows(logits, benchmark.shards)[keep], labels[keep])
    return Outcomes(benchmark.protocol, benchmark.flip, digest(data), arrays)


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
