"""Tasks that learn slowly are sampled more often, as UDON does with domains (Ypsilantis et al., 2024).

How slowly is measured as in GradNorm, by a task's loss relative to what it was at first (the inverse training rate:
Chen et al., 2018). Training goes in phases of equally many steps; the rates of one follow from the losses of the one
before, so those of the first two are 1. A task of rate r is trained in r steps of its own per step, each as the recipe
has it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ufo_ds.errors import UserError
from ufo_ds.parallel import ranks
from ufo_ds.recipe import Balance

if TYPE_CHECKING:
    from ufo_ds.parallel.engine import Engine


@dataclass
class Phases:
    """Which of its own steps a task is trained in, a function of the step of the run.

    Attributes:
        length: of a phase, in steps of the run.
        counts: of every phase so far, how many of its own steps each task takes in it; 1 a step in the first phase.
    """

    length: int
    counts: list[dict[str, int]] = field(default_factory=list)

    @property
    def stop(self) -> int:
        """The step after the last phase so far."""
        return len(self.counts) * self.length

    def task_steps(self, step: int, task: str) -> range:
        """Spread as evenly over the phase as can be, and numbered over all phases without a gap."""
        phase, i = divmod(step, self.length)
        before = sum(counts[task] for counts in self.counts[:phase])
        count = self.counts[phase][task]
        return range(before + i * count // self.length, before + (i + 1) * count // self.length)


def slowness_of(first: Mapping[str, float], last: Mapping[str, float]) -> dict[str, float]:
    """Mean loss of the last phase / mean loss of the first, by task."""
    least = 1e-12  # a loss may be 0
    return {task: max(last[task], least) / max(first[task], least) for task in first}


def rates_of(slowness: Mapping[str, float], samples: Mapping[str, int], options: Balance) -> dict[str, float]:
    """Rates proportional to ``slowness ** strength``, but cut off at 1 / largest and largest, at which the mean step
    has as many samples as one with every rate 1. There is such a scale, as both bounds are on either side of 1.
    """
    slowest = max(slowness.values())
    weights = {task: max((value / slowest) ** options.strength, 1e-300) for task, value in slowness.items()}

    def rates(scale: float) -> dict[str, float]:
        return {task: min(max(scale * w, 1 / options.largest), options.largest) for task, w in weights.items()}

    # With the first of these scales every rate is the smallest, with the second the largest.
    low, high = 1 / options.largest, options.largest / min(weights.values())
    for _ in range(100):
        middle = math.sqrt(low) * math.sqrt(high)
        found = sum(rate * samples[task] for task, rate in rates(middle).items())
        low, high = (middle, high) if found < sum(samples.values()) else (low, middle)
    return rates(high)


def counts_of(rates: Mapping[str, float], options: Balance) -> dict[str, int]:
    """Rates as whole steps of each task in a phase, within the same bounds. Rounding moves a task by less than one step
    of its own in a phase."""
    smallest, largest = math.ceil(options.every / options.largest), math.floor(options.every * options.largest)
    return {task: min(max(round(rate * options.every), smallest), largest) for task, rate in rates.items()}


class Balancer:
    """The phases of a run, from the losses that this rank sees parts of.

    Args:
        saved: :meth:`memory`, on any number of ranks; empty at the start of a run.
    """

    def __init__(self, engine: "Engine", options: Balance, saved: dict[str, Any]):
        self.engine, self.options = engine, options
        self.samples = {task.name: task.samples_per_step for task in engine.recipe.tasks}
        self.phases = Phases(options.every, saved.get("counts", [dict.fromkeys(self.samples, options.every)]))
        self.first: dict[str, float] = saved.get("first", {})  # mean losses of the first phase, once it is over
        # This rank's part of the sum over the phase's steps, and over each task's own steps in them. Where there were
        # as many ranks each goes on with its own, so that no sum is added up in another order.
        self.sums_T = torch.zeros(len(self.samples), dtype=torch.float64, device=engine.device)
        for sums in saved.get("sums", [])[engine.rank :: engine.world_size]:
            self.sums_T += torch.tensor(sums, dtype=torch.float64, device=engine.device)

    def note(self, step: int, parts_TK: Tensor) -> None:
        """Add the losses of a step, as :meth:`Engine.step` returns them."""
        own_steps = [len(self.phases.task_steps(step, task)) for task in self.samples]
        self.sums_T += parts_TK.sum(1) * torch.tensor(own_steps).to(parts_TK.device, non_blocking=True)

    def is_due(self, step: int) -> bool:
        """Whether a phase begins with ``step`` whose rates are not known yet."""
        return step == self.phases.stop

    def begin_phase(self) -> tuple[dict[str, float], dict[str, float]]:
        """Add a phase, on all ranks alike; its rates, and the slowness that they follow from.

        Raises:
            UserError: a loss that is not finite.
        """
        means = dict(zip(self.samples, self.engine.sum_over_ranks(self.sums_T).tolist(), strict=True))
        for task, count in self.phases.counts[-1].items():
            means[task] /= count
            if not math.isfinite(means[task]):
                raise UserError(
                    f"task {task}: its mean loss before step {self.phases.stop} is {means[task]}: "
                    "lower optimizer.lr, or remove data.balance to go on"
                )
        self.sums_T.zero_()
        self.first = self.first or means
        slowness = slowness_of(self.first, means)
        counts = counts_of(rates_of(slowness, self.samples, self.options), self.options)
        self.phases.counts.append(counts)
        return {task: count / self.options.every for task, count in counts.items()}, slowness

    def memory(self) -> dict[str, Any]:
        """What to store; every rank calls it."""
        sums = ranks.from_all(self.sums_T.tolist())
        return {"counts": list(self.phases.counts), "first": self.first, "sums": sums}
