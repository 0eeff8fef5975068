"""Which samples of which tasks make up a micro-batch, and the part of it that a rank reads.

A task is trained in steps of its own, of ``samples_per_step`` samples each. Which of them a step of the run holds is a
function of the step: heterogeneous batches one of each task, isomorphic ones one of a single task, the tasks in turn;
``ufo_ds.training.balance`` has batches of none, one or several of each task. Which samples make up a global micro-batch
is a function of its index alone; a rank reads a range of positions of it. So any split over ranks, any number of
workers and any resumption give the same training.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

if TYPE_CHECKING:  # a model knows batches, but needs no reader of shards
    from ufo_ds.data.source import TrainSource

TaskSteps = Callable[[int, str], range]  # step of the run, task -> the task's own steps that it holds
# Samples of every task in a global micro-batch -> the positions in it that a rank reads, of all tasks that it may read.
Positions = Callable[[dict[str, int]], dict[str, range]]


@dataclass
class TaskBatch:
    """This rank's samples of one task.

    Attributes:
        images: uint8 [n, 3, H, W].
        labels: int64 [n]; of a multi-label task as in ``ufo_ds.data.attributes``.
        positions: of the samples in the task's global micro-batch; they stay on the host.
        global_count: samples of the task in the global micro-batch.
        mix_labels: int64 [n], of the images that these are mixed with; of a task that mixes, else None.
        mix_weight: float32 [n], of ``labels``; the rest of 1 is that of ``mix_labels``.
    """

    images: Tensor
    labels: Tensor
    positions: range
    global_count: int
    mix_labels: Tensor | None = None
    mix_weight: Tensor | None = None

    def to(self, device: torch.device | str, non_blocking: bool = True) -> "TaskBatch":
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "TaskBatch":
        return self._each(Tensor.pin_memory)

    def _each(self, act: Callable[[Tensor], Tensor]) -> "TaskBatch":
        mix_labels, mix_weight = (None if x is None else act(x) for x in (self.mix_labels, self.mix_weight))
        return TaskBatch(act(self.images), act(self.labels), self.positions, self.global_count, mix_labels, mix_weight)


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


def one_of_each(step: int, task: str) -> range:
    """Heterogeneous batches: every step is the step of this number of every task."""
    return range(step, step + 1)


def in_turn(tasks: Sequence[str], step: int, task: str) -> range:
    """Isomorphic batches: every step is one of a single task, the tasks in turn."""
    own, turn = divmod(step, len(tasks))
    return range(own, own + 1) if tasks[turn] == task else range(0)


class Batches(Dataset[Batch]):
    """This rank's part of every micro-batch, by index ``step * accumulation + micro_step``.

    A task that a step does not hold, or of which this rank reads nothing in it, is there without samples.

    Args:
        sources: training data by task.
        positions: that this rank reads, by the samples in a micro-batch; its ranges may be empty.
        accumulation: micro-batches per step; it divides every task's samples and identities per step, and each of a
            task's own steps is spread over all of them.
        task_steps: what the steps hold.
    """

    def __init__(
        self,
        sources: "dict[str, TrainSource]",
        positions: Positions,
        accumulation: int,
        task_steps: TaskSteps = one_of_each,
    ):
        self.sources, self.positions, self.accumulation, self.task_steps = sources, positions, accumulation, task_steps

    def __getitem__(self, i: int) -> Batch:
        tasks: dict[str, TaskBatch] = {}
        skipped: dict[str, list[int]] = {}
        for name, (positions, draws, global_count) in self.draws(i).items():
            tasks[name], skipped[name] = _load(self.sources[name], draws, positions, global_count)
        return Batch(*divmod(i, self.accumulation), tasks, skipped)

    def draws(self, i: int) -> dict[str, tuple[range, list[int], int]]:
        """What this rank reads of a micro-batch, by task: positions in its global micro-batch, their draw indices, and
        the samples of the global micro-batch."""
        step, micro_step = divmod(i, self.accumulation)
        own_steps = {name: self.task_steps(step, name) for name in self.sources}
        sizes = {name: source.task.samples_per_step // self.accumulation for name, source in self.sources.items()}
        counts = {name: len(own_steps[name]) * sizes[name] for name in self.sources}
        found = {}
        for name, positions in self.positions(counts).items():
            draws = []
            for position in positions:
                nth, place = divmod(position, sizes[name])
                draws.append((own_steps[name][nth] * self.accumulation + micro_step) * sizes[name] + place)
            found[name] = (positions, draws, counts[name])
        return found


def _load(
    source: "TrainSource", draws: Sequence[int], positions: range, global_count: int
) -> tuple[TaskBatch, list[int]]:
    """The samples of these draws, and the indices of the images among them that could not be read."""
    images = np.empty((len(draws), 3, *source.task.input), dtype=np.uint8)
    labels = np.empty(len(draws), dtype=np.int64)
    mix_labels, mix_weight = np.empty_like(labels), np.empty(len(draws), dtype=np.float32)
    all_skipped = []
    for n, draw in enumerate(draws):
        if source.task.augment.mixes:
            images[n], labels[n], mix_labels[n], mix_weight[n], skipped = source.load_mixed(draw)
        else:
            images[n], labels[n], skipped = source.load(draw)
        all_skipped += skipped
    part = TaskBatch(torch.from_numpy(images), torch.from_numpy(labels), positions, global_count)
    if source.task.augment.mixes:
        part.mix_labels, part.mix_weight = torch.from_numpy(mix_labels), torch.from_numpy(mix_weight)
    return part, all_skipped


def loader(dataset: Batches, start: int, stop: int, workers: int, pin: bool) -> Iterator[Batch]:
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
