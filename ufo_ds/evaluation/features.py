"""What a model says of a task's evaluation images, computed on any number of ranks.

Embeddings and logits go into one file for each task, at the place of their images, whichever rank has computed them.
They are read back memory-mapped: neither the ranks nor the protocols hold all of them in memory.
"""

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ufo_ds.data.evaluation_set import EvaluationSet
from ufo_ds.data.mixing import Batch, TaskBatch
from ufo_ds.errors import UserError
from ufo_ds.model.heads import Outputs
from ufo_ds.recipe import Recipe
from ufo_ds.recipe_benchmark import OF_LOGITS
from ufo_ds.recipe_task import Size, Task

Kind = Literal["embedding", "logits"]
Predictions = Mapping[str, Mapping[Kind, np.ndarray]]  # by task: float32 [N, D] and [N, C], of all its images


@dataclass
class TaskImages:
    """All evaluation images of a task, one after another.

    Attributes:
        input: height and width.
        kinds: what its benchmarks need of each image.
        sets: by directory.
        starts: by directory and whether mirrored, where its images begin.
    """

    input: Size
    kinds: tuple[Kind, ...]
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
        UserError: shards that are missing, empty or damaged.
    """
    images = {}
    for task in recipe.tasks:
        mine = TaskImages(task.input, kinds_of(task))
        for benchmark in task.benchmarks:
            for directory in benchmark.parts.values():
                if directory not in mine.sets:
                    mine.sets[directory] = EvaluationSet.open(directory, recipe.data.shard_cache)
                    if not len(mine.sets[directory]):
                        raise UserError(f"benchmark {benchmark.name}: {directory} has no images: make it again")
                for mirrored in (False, True) if benchmark.flip else (False,):
                    if (directory, mirrored) not in mine.starts:
                        mine.starts[directory, mirrored] = len(mine)
        if mine.sets:
            images[task.name] = mine
    return images


def kinds_of(task: Task) -> tuple[Kind, ...]:
    """What the benchmarks of a task are computed from."""
    of_logits = [benchmark.protocol in OF_LOGITS for benchmark in task.benchmarks]
    wanted: dict[Kind, bool] = {"embedding": not all(of_logits), "logits": any(of_logits)}
    return tuple(kind for kind, is_wanted in wanted.items() if is_wanted)


class FeatureFiles:
    """Rows of float32 in files of nothing else, ``<task>.<kind>.f32``, which several processes write at once.

    They are written with ``pwrite`` and read only when all is written, which also holds on a network file system.
    """

    def __init__(self, directory: Path):
        self.directory = directory

    def create(self) -> None:
        """Make the directory anew, on one rank, before any rank writes.

        Raises:
            UserError: it cannot be made.
        """
        try:
            shutil.rmtree(self.directory, ignore_errors=True)
            self.directory.mkdir(parents=True)
        except OSError as error:
            raise UserError(f"{self.directory}: {error.strerror}: no place for the features of an evaluation") from None

    def write(self, task: str, kind: Kind, start: int, rows_ND: np.ndarray) -> None:
        """
        Raises:
            UserError: no room, or a directory that this rank does not see.
        """
        data = np.ascontiguousarray(rows_ND, dtype=np.float32)
        try:
            descriptor = os.open(self._path(task, kind), os.O_WRONLY | os.O_CREAT, 0o644)
            try:
                view, offset = data.reshape(-1).view(np.uint8).data, start * data[0].nbytes
                while view:  # a single call writes 2 GiB at most
                    written = os.pwrite(descriptor, view, offset)
                    view, offset = view[written:], offset + written
            finally:
                os.close(descriptor)
        except OSError as error:
            raise UserError(
                f"{self.directory}: {error.strerror} while writing features: give them a place with room that all "
                f"ranks see"
            ) from None

    def read(self, images: Mapping[str, TaskImages]) -> Predictions:
        """What all ranks have written, memory-mapped."""
        return {name: {kind: self._map(name, kind, len(mine)) for kind in mine.kinds} for name, mine in images.items()}

    def _map(self, task: str, kind: Kind, count: int) -> np.ndarray:
        return np.memmap(self._path(task, kind), dtype=np.float32, mode="r").reshape(count, -1)

    def _path(self, task: str, kind: Kind) -> Path:
        return self.directory / f"{task}.{kind}.f32"

    def remove(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)


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


def predict(
    forward: Callable[[Batch], Mapping[str, Outputs]],
    images: Mapping[str, TaskImages],
    ranges: Mapping[str, range],
    batch_size: int,
    workers: int,
    files: FeatureFiles,
    rounds: int | None = None,
    quiet: bool = False,
) -> None:
    """Run images through a model and write what it says of them.

    Args:
        forward: the model in evaluation mode, on a batch that is still on the host.
        ranges: per task the images to run here; tasks without images take part with none.
        rounds: number of forward passes, where it must be the same on all ranks; default: as many as are needed.
    """
    if rounds is None:
        rounds = max((-(-len(indices) // batch_size) for indices in ranges.values()), default=0)
    dataset = _Rounds(images, ranges, batch_size)
    loader: Any = DataLoader(
        dataset, batch_size=None, sampler=range(rounds), num_workers=workers, generator=torch.Generator()
    )
    with torch.no_grad():
        for batch in tqdm(loader, "evaluate", total=rounds, leave=False, disable=True if quiet else None):
            outputs = forward(batch)
            for name, task in batch.tasks.items():
                if task.positions:
                    for kind in images[name].kinds:
                        rows = getattr(outputs[name], kind).float().cpu().numpy()
                        files.write(name, kind, task.positions[0], rows)
