"""Which subnets to evaluate next, so that those evaluated hold the front of accuracy against costs.

A candidate is a row of levels: one subnet of a task, or one of each of T tasks. A Gaussian process for each task
(:mod:`ufo_ds.subnets.predictor`) says how good those would be that were not evaluated.

1. The first ones are the largest, the smallest, and of others drawn within the limits those that would say most.
2. Then NSGA-II finds the front of what is promised within the limits, somewhat hopefully; of it and some drawn ones
   that is next which is expected to raise the hypervolume most.
3. The last ones are finalists, of the front of the plain prediction: no more chances are taken, and that is next whose
   prediction raises the hypervolume most.

What comes next follows from the seed and what was evaluated before, so that a search can go on after an interruption.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ufo_ds.seeding import numpy_generator
from ufo_ds.subnets import pareto
from ufo_ds.subnets.predictor import Choices, Predictor

FIRST, FINALISTS = 0.25, 0.25  # share of the evaluations
DRAWN = 400  # candidates beside those that NSGA-II finds
GENERATIONS = 30
OPTIMISM = 1.0  # standard deviations
MARGIN = 0.1  # of the range of costs, by which bounds of the hypervolume lie beyond it


@dataclass(frozen=True)
class Space:
    """What is searched.

    Attributes:
        highest_G: of each level; the lowest is 0.
        tidy: rewrites levels [N, G] so that candidates that are the same have the same ones.
        choices: of levels, what the predictor of each of T tasks takes.
        costs: of levels, all that is low at best [N, A].
        objectives: which M of the A costs the front is of.
        limits_A: what a candidate may cost at most; infinite where that does not matter.
        parts: which of the G levels are of each task.
    """

    highest_G: np.ndarray
    tidy: Callable[[np.ndarray], np.ndarray]
    choices: Callable[[np.ndarray], list[Choices]]
    costs: Callable[[np.ndarray], np.ndarray]
    objectives: Sequence[int]
    limits_A: np.ndarray
    parts: Sequence[slice]

    @property
    def ends(self) -> np.ndarray:
        """The largest and the smallest [2, G]."""
        return self.tidy(np.stack([self.highest_G, np.zeros_like(self.highest_G)]))

    def within(self, costs_NA: np.ndarray) -> np.ndarray:
        return np.all(costs_NA <= self.limits_A, axis=1)

    def bounds(self, costs_2A: np.ndarray) -> np.ndarray:
        """Costs [M] up to which volumes count, somewhat beyond the limits, from those of :attr:`ends`."""
        largest_M, smallest_M = costs_2A[:, list(self.objectives)]
        most_M = np.minimum(self.limits_A[list(self.objectives)], largest_M)
        return most_M + MARGIN * np.maximum(most_M - smallest_M, 1e-9 * np.abs(most_M))

    def draw(self, count: int, generator: np.random.Generator) -> np.ndarray:
        """Candidates within the limits, of all sizes: each has its levels below a share of the highest that is drawn
        first. There may be fewer than asked for, and none."""
        share_N1 = generator.random((count, 1))
        top_NG = np.rint(share_N1 * self.highest_G).astype(int)
        levels_NG = np.unique(self.tidy(generator.integers(0, top_NG + 1)), axis=0)
        return levels_NG[self.within(self.costs(levels_NG))]


@dataclass(frozen=True)
class Known:
    """What was evaluated, in order.

    Attributes:
        levels_NG: the candidates.
        metrics_NT: of each task, higher being better.
        costs_NA: all costs.
        whole_T: the metric of each task's largest subnet.
    """

    levels_NG: np.ndarray
    metrics_NT: np.ndarray
    costs_NA: np.ndarray
    whole_T: np.ndarray

    def __len__(self) -> int:
        return len(self.levels_NG)

    def __getitem__(self, rows: np.ndarray) -> "Known":
        return Known(self.levels_NG[rows], self.metrics_NT[rows], self.costs_NA[rows], self.whole_T)

    @property
    def accuracy_N(self) -> np.ndarray:
        return self.metrics_NT @ self.scale_T

    @property
    def scale_T(self) -> np.ndarray:
        """What each task's metric counts in the accuracy. That is the metric of a single task; of several the mean of
        theirs, each relative to that of its largest subnet."""
        tasks = len(self.whole_T)
        return np.ones(1) if tasks == 1 else 1 / (tasks * self.whole_T)


class Model:
    """What the evaluated ones say of the others: a Gaussian process for each task."""

    def __init__(self, space: Space, known: Known):
        self.space, self.known = space, known
        of_tasks = enumerate(space.choices(known.levels_NG))
        self.predictors = [Predictor(choices, known.metrics_NT[:, [task]]) for task, choices in of_tasks]

    def accuracy(self, levels_NG: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation [N] of what evaluations would give."""
        choices = self.space.choices(levels_NG)
        found = [predictor.moments(of_task) for predictor, of_task in zip(self.predictors, choices, strict=True)]
        mean_NT, std_NT = (np.concatenate(of_tasks, 1) for of_tasks in zip(*found, strict=True))
        scale_T = self.known.scale_T
        return mean_NT @ scale_T, np.sqrt(((std_NT * scale_T) ** 2).sum(1))

    def information(self, levels_NG: np.ndarray) -> np.ndarray:
        """How much the evaluation of each [N] would say, over all tasks."""
        choices = self.space.choices(levels_NG)
        return sum(
            predictor.information(of_task) for predictor, of_task in zip(self.predictors, choices, strict=True)
        ) + np.zeros(len(levels_NG))

    def front(self, seed: int, optimism: float = 0.0) -> np.ndarray:
        """The levels that NSGA-II finds best in accuracy, ``optimism`` standard deviations above the mean."""
        space, known = self.space, self.known

        def objectives(levels_NG: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            mean_N, std_N = self.accuracy(levels_NG)
            costs_NA = space.costs(levels_NG)
            return mean_N + optimism * std_N, costs_NA[:, list(space.objectives)], excess(space, costs_NA)

        generator = numpy_generator(seed, "search", "front", len(known))
        start_NG = np.concatenate([known.levels_NG, space.draw(DRAWN // 8, generator)])
        draw = int(generator.integers(2**31))
        return pareto.nsga2(objectives, space.highest_G, start_NG, space.tidy, GENERATIONS, draw)


def excess(space: Space, costs_NA: np.ndarray) -> np.ndarray:
    """By how much costs exceed each limit that there is [N, K], relative to it."""
    limited = np.isfinite(space.limits_A)
    return costs_NA[:, limited] / space.limits_A[limited] - 1


def following(
    space: Space, known: Known, evaluations: int, seed: int, listed_NG: np.ndarray | None = None
) -> np.ndarray | None:
    """The levels of the candidate to evaluate next.

    Args:
        evaluations: how many there will be in all.
        listed_NG: choose among these, rather than among all of the space; its ends are the first two.

    Returns:
        None where none within the limits that is found is new.
    """
    ends = space.ends if listed_NG is None else listed_NG[:2]
    if len(known) < 2:
        return ends[len(known)]
    generator = numpy_generator(seed, "search", "draw", len(known))
    drawn_NG = space.draw(DRAWN, generator) if listed_NG is None else listed_NG
    model = Model(space, known)
    first, finalist = len(known) < FIRST * evaluations, len(known) >= (1 - FINALISTS) * evaluations
    if listed_NG is None and not first:
        drawn_NG = np.concatenate([model.front(seed, optimism=0.0 if finalist else OPTIMISM), drawn_NG])
    new_NG = _new(space, known, drawn_NG)
    if not len(new_NG):
        return None
    if first:
        return new_NG[model.information(new_NG).argmax()]
    mean_N, std_N = model.accuracy(new_NG)
    kept = space.within(known.costs_NA)
    gain_N = pareto.expected_gain(
        mean_N,
        np.zeros_like(std_N) if finalist else std_N,
        space.costs(new_NG)[:, list(space.objectives)],
        known.accuracy_N[kept],
        known.costs_NA[kept][:, list(space.objectives)],
        known.accuracy_N[kept].min(),
        space.bounds(known.costs_NA[:2]),
    )
    return new_NG[(gain_N if gain_N.max() > 0 else std_N).argmax()]


def front(space: Space, known: Known, seed: int) -> Known:
    """The front of what was evaluated, from cheap to dear by the first objective. Of several tasks the subnets are
    combined anew, as each task's metric is known of each of its subnets."""
    if len(space.parts) > 1:
        known = _combined(space, known, seed)
    known = known[np.flatnonzero(space.within(known.costs_NA))]
    costs_NM = known.costs_NA[:, list(space.objectives)]
    kept = pareto.on_front(known.accuracy_N, costs_NM)
    return known[np.flatnonzero(kept)[np.lexsort(costs_NM[kept].T[::-1])]]


def _combined(space: Space, known: Known, seed: int) -> Known:
    """The same subnets, one of each task, in the combinations that NSGA-II finds best, and those that were evaluated
    together."""
    subnets = [np.unique(known.levels_NG[:, part], axis=0, return_index=True) for part in space.parts]

    def chosen(which_NT: np.ndarray) -> Known:
        levels_NG = np.concatenate([rows[which_NT[:, t]] for t, (rows, _) in enumerate(subnets)], 1)
        metrics_NT = np.stack([known.metrics_NT[at[which_NT[:, t]], t] for t, (_, at) in enumerate(subnets)], 1)
        return Known(levels_NG, metrics_NT, space.costs(levels_NG), known.whole_T)

    def objectives(which_NT: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        found = chosen(which_NT)
        return found.accuracy_N, found.costs_NA[:, list(space.objectives)], excess(space, found.costs_NA)

    together_NT = np.stack(
        [np.unique(known.levels_NG[:, part], axis=0, return_inverse=True)[1].reshape(-1) for part in space.parts], 1
    )
    highest_T = np.array([len(rows) - 1 for rows, _ in subnets])
    found_NT = pareto.nsga2(objectives, highest_T, together_NT, lambda which_NT: which_NT, GENERATIONS * 3, seed)
    return chosen(np.concatenate([found_NT, together_NT]))


def _new(space: Space, known: Known, levels_NG: np.ndarray) -> np.ndarray:
    """Those within the limits that are not known, each once."""
    levels_NG = np.unique(levels_NG, axis=0)
    there = {tuple(row) for row in known.levels_NG.tolist()}
    levels_NG = levels_NG[[tuple(row) not in there for row in levels_NG.tolist()]]
    return levels_NG[space.within(space.costs(levels_NG))] if len(levels_NG) else levels_NG
