"""Which ranks hold which tasks' experts and heads, and which samples each rank reads.

Runs of ``world_size / ep_size`` consecutive ranks have the same tasks: they share the gradients of these experts and,
under ZeRO, their memory (DeepSpeed's expert-data-parallel group). That is most of what is sent, and neighbours are on
the same node. An expert-parallel group holds every task once: the first ranks of all runs, their second ones, and so
on.

A placement is not part of a checkpoint, and which samples a task draws does not depend on it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ufo_ds.model.architecture import Architecture
from ufo_ds.model.cost import head_cost, path_cost
from ufo_ds.parallel.partition import EVEN, partition
from ufo_ds.recipe import Recipe

PRECISION = 100_000  # of loads, parts of the whole


@dataclass(frozen=True)
class Work:
    """What a task has to do: ``samples`` of a global micro-batch, ``flops`` of one of them; the ``classes`` of its
    head, and whether that is ``sharded``."""

    samples: int
    flops: int
    classes: int = 0
    sharded: bool = False


@dataclass(frozen=True)
class Placement:
    """``tasks_of[e]`` are the tasks of expert-parallel rank e; all ranks have ``slots`` slots, some of them empty.

    ``first[task]`` is the replica with which the parts of the task's samples that are one longer begin.
    """

    world_size: int
    ep_size: int
    tasks_of: tuple[tuple[str, ...], ...]
    first: Mapping[str, int]

    @property
    def slots(self) -> int:
        return max(len(tasks) for tasks in self.tasks_of)

    @property
    def replicas(self) -> int:
        return self.world_size // self.ep_size

    @property
    def tasks(self) -> list[str]:
        """All tasks, sorted by the rank that owns them."""
        return [task for tasks in self.tasks_of for task in tasks]

    def ep_rank(self, rank: int) -> int:
        return rank // self.replicas

    def replica(self, rank: int) -> int:
        return rank % self.replicas

    def holders(self, ep_rank: int) -> range:
        """The ranks that have the same tasks."""
        return range(ep_rank * self.replicas, (ep_rank + 1) * self.replicas)

    def group(self, rank: int) -> range:
        """The ranks that hold every task once, with this rank among them."""
        return range(self.replica(rank), self.world_size, self.replicas)

    def template(self, slot: int) -> str:
        """The task whose modules an empty slot mirrors: the one in this slot of the fullest rank."""
        return max(self.tasks_of, key=len)[slot]

    def owned(self, rank: int, samples: Mapping[str, int]) -> dict[str, range]:
        """Positions in each task's global micro-batch (``samples`` of it) that this rank trains on."""
        return {task: self._of_replica(rank, task, samples[task]) for task in self.tasks_of[self.ep_rank(rank)]}

    def read_evenly(self, rank: int, samples: Mapping[str, int]) -> dict[str, range]:
        """The same where each rank of a group reads a part of every task and the samples then move to their owners."""
        positions, first = {}, 0
        for task in self.tasks:
            group = self._of_replica(rank, task, samples[task])
            positions[task] = share(group, self.ep_size, self.ep_rank(rank), first)
            first = (first + len(group)) % self.ep_size
        return positions

    def _of_replica(self, rank: int, task: str, samples: int) -> range:
        return share(range(samples), self.replicas, self.replica(rank), self.first[task])


def share(positions: range, parts: int, part: int, first: int = 0) -> range:
    """The part-th of ``parts`` neighbouring ranges. Some are one longer: so many in a row, round the end, beginning
    with the ``first``."""
    each, longer = divmod(len(positions), parts)
    end = first + longer

    def before(k: int) -> int:
        return k * each + max(0, min(k, end) - first) + max(0, min(k, end - parts))

    return positions[before(part) : before(part + 1)]


def work_of(recipe: Recipe, num_classes: Mapping[str, int], accumulation: int) -> dict[str, Work]:
    """What each task of a micro-batch costs: forward FLOPs of a dense path and of the head, sampled negatives counted
    by their number on average. A backward pass has twice as many, and probes of learned routes a part of as many, for
    all tasks."""
    backbone = recipe.model.backbone
    work = {}
    for task in recipe.tasks:
        head = head_cost(task, backbone.dim, num_classes[task.name]).flops
        path = path_cost(backbone, Architecture.of(backbone), task.input)
        flops = path.flops + round(head * task.head.sampled_negatives)
        samples = task.samples_per_step // accumulation
        work[task.name] = Work(samples, flops, num_classes[task.name], task.head.sharded)
    return work


def place(work: Mapping[str, Work], world_size: int, ep_size: int | None) -> Placement:
    """Choose which tasks share an expert-parallel rank, by :func:`ufo_ds.parallel.partition.partition`: so that all
    ranks have as much to do, to 2%, and the fullest few slots, for every rank holds, gathers and reduces as many.

    Without an ``ep_size`` it is the largest divisor of the number of ranks that leaves none more than 2% above the
    mean; 1, where every rank has all tasks, always does. The largest has the fewest slots: least memory for experts at
    ZeRO stages 1 and 2, least to gather and keep gathered at stage 3, and most samples of a task at once; and the
    shortest runs of ranks with the same tasks, which fit into nodes best (``benchmarks/plan.py``). What a rank stores
    of experts at stage 3 is ``slots x ep_size / world_size`` dense paths, for all sizes the same but for empty slots.

    The tasks of a rank are in the order of their classes, those with sharded heads first: in a slot, whose heads all
    take the room of the largest, are then heads of similar sizes.

    Args:
        work: of every task, in the recipe's order.
        ep_size: a divisor of ``world_size``.
    """
    tasks, total = list(work), sum(of_task.samples * of_task.flops for of_task in work.values())
    # Rounded, so that tasks that differ in some classes of their heads only are equal, and the search is short.
    loads = [round(of_task.samples * of_task.flops / total * PRECISION) for of_task in work.values()]
    parts = _most_parts(loads, world_size) if ep_size is None else partition(loads, ep_size)
    parts = [sorted(part, key=lambda i: (not work[tasks[i]].sharded, -work[tasks[i]].classes)) for part in parts]
    replicas = world_size // len(parts)
    first: dict[str, int] = {}
    for part in parts:  # where replicas do not divide a task's samples, those left over are dealt in turn
        turn = 0
        for i in part:
            first[tasks[i]] = turn
            turn = (turn + work[tasks[i]].samples) % replicas
    return Placement(world_size, len(parts), tuple(tuple(tasks[i] for i in part) for part in parts), first)


def _most_parts(loads: Sequence[int], world_size: int) -> list[list[int]]:
    """The partition into as many parts as divide the ranks and are even."""
    for size in (size for size in range(world_size, 1, -1) if world_size % size == 0):
        bound = EVEN * sum(loads) / size
        if max(loads) <= bound:
            parts = partition(loads, size)
            if max(sum(loads[i] for i in part) for part in parts) <= bound:
                return parts
    return partition(loads, 1)


def imbalance(placement: Placement, work: Mapping[str, Work]) -> float:
    """The largest load of a rank over the mean of all."""
    samples = {task: of_task.samples for task, of_task in work.items()}
    loads = [
        sum(len(positions) * work[task].flops for task, positions in placement.owned(rank, samples).items())
        for rank in range(placement.world_size)
    ]
    return max(loads) * len(loads) / sum(loads)
