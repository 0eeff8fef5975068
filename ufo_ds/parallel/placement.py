"""Which ranks hold which tasks' experts and heads, and which samples each rank reads.

The expert-parallel groups are runs of ``ep_size`` consecutive ranks; each group holds every task once, its copies in
the other groups share their gradients and, under ZeRO, their memory (DeepSpeed's expert-data-parallel group).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Placement:
    """``tasks_of[e]`` are the tasks of expert-parallel rank e; all ranks have ``slots`` slots, some of them empty."""

    world_size: int
    ep_size: int
    tasks_of: tuple[tuple[str, ...], ...]

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
        return rank % self.ep_size

    def replica(self, rank: int) -> int:
        return rank // self.ep_size

    def template(self, slot: int) -> str:
        """The task whose modules an empty slot mirrors: the one in this slot of the fullest rank."""
        return max(self.tasks_of, key=len)[slot]

    def owned(self, rank: int, samples: dict[str, int]) -> dict[str, range]:
        """Positions in each task's global micro-batch (``samples`` of it) that this rank trains on."""
        parts, part = self.replicas, self.replica(rank)
        return {task: share(range(samples[task]), parts, part) for task in self.tasks_of[self.ep_rank(rank)]}

    def read_evenly(self, rank: int, samples: dict[str, int]) -> dict[str, range]:
        """The same where each rank of a group reads a part of every task and the samples then move to their owners."""
        positions = {}
        for task in self.tasks:
            group = share(range(samples[task]), self.replicas, self.replica(rank))
            positions[task] = share(group, self.ep_size, self.ep_rank(rank))
        return positions


def share(positions: range, parts: int, part: int) -> range:
    """The part-th of ``parts`` neighbouring ranges of nearly equal length."""
    return positions[len(positions) * part // parts : len(positions) * (part + 1) // parts]


def place(tasks: list[str], world_size: int, ep_size: int) -> Placement:
    """Spread tasks over the expert-parallel ranks in their order, numbers as equal as can be; ``ep_size`` divides
    ``world_size`` (:func:`ufo_ds.parallel.config.resolve` sees to it)."""
    everyone = range(len(tasks))
    return Placement(
        world_size, ep_size, tuple(tuple(tasks[i] for i in share(everyone, ep_size, e)) for e in range(ep_size))
    )


def largest_ep_size(num_tasks: int, world_size: int) -> int:
    """What ``"auto"`` means: the largest divisor of the number of ranks that leaves no rank without a task."""
    return max(size for size in range(1, min(num_tasks, world_size) + 1) if world_size % size == 0)
