"""Which samples of which tasks make up a micro-batch, and the part of it that a rank reads.

Heterogeneous batches hold a fixed number of samples of each task; isomorphic ones are of one task, the tasks in turn.
Which samples make up a global micro-batch is a function of its index alone; a rank reads a range of positions of it.
So any split over ranks, any number of workers and any resumption give the same training.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ufo_ds.data.source import TrainSource


@dataclass
class TaskBatch:
    """This rank's samples of one task.

    Attributes:
        images: uint8 [n, 3, H, W].
        labels: int64 [n].
        positions: of the samples in the task's global micro-batch; they stay on the host.
        global_count: samples of the task in the global micro-batch.
    """

    images: Tensor
    labels: Tensor
    positions: range
    global_count: int

    def to(self, device: torch.device | str, non_blocking: bool = True) -> "TaskBatch":
        images, labels = (tensor.to(device, non_blocking=non_blocking) for tensor in (self.images, self.labels))
        return TaskBatch(images, labels, self.positions, self.global_count)

    def pin_memory(self) -> "TaskBatch":
        return TaskBatch(self.images.pin_memory(), self.labels.pin_memory(), self.positions, self.global_count)


@dataclass
class Batch:
    """This rank's part of a micro-batch; ``skipped`` holds, per task, the indices of samples that were unreadable."""

    step: int
    micro_step: int
    tasks: dict[str, TaskBatch]
    skipped: dict[str, list[int]]

    def to(self, device: torch.device | str, non_blocking: bool = True) -> "Batch":
        tasks = {name: part.to(device, non_blocking) for name, part in self.tasks.items()}
        return Batch(self.step, self.micro_step, tasks, self.skipped)

    def pin_memory(self) -> "Batch":
        """Called by torch's DataLoader, by this name."""
        tasks = {name: part.pin_memory() for name, part in self.tasks.items()}
        return Batch(self.step, self.micro_step, tasks, self.skipped)


class HeterogeneousBatches(Dataset[Batch]):
    """This rank's part of every micro-batch, by index ``step * accumulation + micro_step``.

    Args:
        sources: training data by task.
        samples: by task, the positions of its global micro-batch that this rank reads; a range may be empty.
        accumulation: micro-batches per step; it divides every task's samples and identities per step.
    """

    def __init__(self, sources: dict[str, TrainSource], samples: dict[str, range], accumulation: int):
        self.sources, self.samples, self.accumulation = sources, samples, accumulation

    def __getitem__(self, i: int) -> Batch:
        return self._batch(i, dict.fromkeys(self.samples, i))

    def _batch(self, i: int, number: dict[str, int]) -> Batch:
        """Micro-batch ``i``, with the micro-batch ``number[task]`` of each task that is trained in it."""
        step, micro_step = divmod(i, self.accumulation)
        tasks: dict[str, TaskBatch] = {}
        skipped: dict[str, list[int]] = {}
        for name, positions in self.samples.items():
            source = self.sources[name]
            global_count = source.task.samples_per_step // self.accumulation
            if name in number:
                first = number[name] * global_count
                tasks[name], skipped[name] = _task_batch(source, positions, first, global_count)
            else:
                tasks[name], skipped[name] = _task_batch(source, range(0), first=0, global_count=0)
        return Batch(step, micro_step, tasks, skipped)


class IsomorphicBatches(HeterogeneousBatches):
    """The same, but step s trains the task number s modulo their number alone, in the order of ``sources``.

    The other tasks are there without samples. A task goes through the same samples, in as many steps of its own.
    """

    def __getitem__(self, i: int) -> Batch:
        step, micro_step = divmod(i, self.accumulation)
        own_step, trained = divmod(step, len(self.sources))
        return self._batch(i, {list(self.sources)[trained]: own_step * self.accumulation + micro_step})


def _task_batch(source: TrainSource, positions: range, first: int, global_count: int) -> tuple[TaskBatch, list[int]]:
    """The draws ``first + position``, and the indices of the images among them that could not be read."""
    images = np.empty((len(positions), 3, *source.task.input), dtype=np.uint8)
    labels = np.empty(len(positions), dtype=np.int64)
    all_skipped = []
    for n, position in enumerate(positions):
        images[n], labels[n], skipped = source.load(first + position)
        all_skipped += skipped
    return TaskBatch(torch.from_numpy(images), torch.from_numpy(labels), positions, global_count), all_skipped


def loader(dataset: HeterogeneousBatches, start: int, stop: int, workers: int, pin: bool) -> Iterator[Batch]:
    """Batches ``start`` to ``stop - 1``, in order, read ahead by ``workers`` processes (0: when asked, in this one).

    Each worker process has one torch thread, as torch sets it.
    """
    return iter(
        DataLoader(
            dataset,
            batch_size=None,
            sampler=range(start, stop),
            num_workers=workers,
            pin_memory=pin,
            # Without one of its own, DataLoader seeds its workers from torch's global generator, and so moves it.
            generator=torch.Generator(),
        )
    )
