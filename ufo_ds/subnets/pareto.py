"""Fronts of accuracy against costs: what is on one, how much it holds, what would raise that, and a search for one.

Candidates are rows of whole numbers, ``levels_NG``; accuracy is to be high, each of M costs to be low.
"""

from collections.abc import Callable

import numpy as np
from pymoo.algorithms.moo.nsga2 import NSGA2
from pymoo.core.problem import Problem
from pymoo.core.repair import Repair
from pymoo.indicators.hv import HV
from pymoo.operators.crossover.ux import UniformCrossover
from pymoo.operators.mutation.pm import PolynomialMutation
from pymoo.optimize import minimize
from scipy.stats import norm

POPULATION = 64
RETRIES = 3  # where children are there already, as mostly where there are few candidates


def on_front(accuracy_N: np.ndarray, costs_NM: np.ndarray) -> np.ndarray:
    """Which of N no other beats, bool [N]: another at least as good in everything and better in something. Of those
    that are alike in everything the first stays."""
    losses_NL = np.column_stack([-accuracy_N, costs_NM])
    as_good_NN = (losses_NL[:, None] <= losses_NL[None]).all(2)
    better_NN = as_good_NN & (losses_NL[:, None] < losses_NL[None]).any(2)
    earlier_NN = np.triu(np.ones_like(as_good_NN), 1)
    alike_before_NN = as_good_NN & as_good_NN.T & earlier_NN
    return ~np.any(better_NN | alike_before_NN, axis=0)


def hypervolume(accuracy_N: np.ndarray, costs_NM: np.ndarray, floor: float, bounds_M: np.ndarray) -> float:
    """The volume of all that N together beat, down to the accuracy ``floor`` and up to costs ``bounds_M`` (Zitzler and
    Thiele, 1999)."""
    losses_NL = np.column_stack([-accuracy_N, costs_NM])
    return float(HV(ref_point=np.array([-floor, *bounds_M]))(losses_NL))


def expected_gain(
    mean_N: np.ndarray,
    std_N: np.ndarray,
    costs_NM: np.ndarray,
    found_K: np.ndarray,
    found_costs_KM: np.ndarray,
    floor: float,
    bounds_M: np.ndarray,
) -> np.ndarray:
    """By how much each of N candidates is expected to raise the hypervolume of the K found ones (Emmerich, 2005, where
    only the accuracy is uncertain): the integral, over all budgets of costs that a candidate keeps to, of its expected
    improvement over the best one found within that budget (Jones, Schonlau and Welch, 1998, eq. 15).

    Args:
        mean_N, std_N: normal predictions of accuracy.
        floor, bounds_M: as of :func:`hypervolume`; a candidate beyond the bounds gains nothing.
    """
    kept = on_front(found_K, found_costs_KM) & (found_costs_KM <= bounds_M).all(1)
    front_F, front_costs_FM = found_K[kept], found_costs_KM[kept]
    lowest_M = np.concatenate([costs_NM, front_costs_FM, bounds_M[None]]).min(0)
    edges = [
        np.unique([low, *front_costs_FM[:, m], bound])
        for m, (low, bound) in enumerate(zip(lowest_M, bounds_M, strict=True))
    ]
    lows_CM, highs_CM = (
        np.stack([side.ravel() for side in np.meshgrid(*ends, indexing="ij")], 1)
        for ends in ([edge[:-1] for edge in edges], [edge[1:] for edge in edges])
    )
    within_CF = (front_costs_FM[None] <= lows_CM[:, None]).all(2)
    best_C = np.where(within_CF, front_F[None], floor).max(1, initial=floor)
    volume_NC = np.clip(highs_CM[None] - np.maximum(lows_CM[None], costs_NM[:, None]), 0, None).prod(2)
    std_N1 = np.maximum(std_N, 1e-12)[:, None]
    z_NC = (mean_N[:, None] - best_C) / std_N1
    return (volume_NC * std_N1 * (z_NC * norm.cdf(z_NC) + norm.pdf(z_NC))).sum(1)


def nsga2(
    objectives: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray]],
    highest_G: np.ndarray,
    start_NG: np.ndarray,
    tidy: Callable[[np.ndarray], np.ndarray],
    generations: int,
    seed: int,
) -> np.ndarray:
    """NSGA-II (Deb et al., 2002) over all levels from 0 to ``highest_G``, limits by constraint domination.

    Args:
        objectives: of levels, the accuracy [N], the costs [N, M] and by how much each exceeds each of K limits [N, K].
        start_NG: the first population, or the first of it; what is missing is drawn.
        tidy: rewrites levels so that candidates that are the same have the same ones.

    Returns:
        The last front that it has within the limits, or no rows.
    """

    class Levels(Problem):
        def _evaluate(self, x, out, *args, **kwargs):
            accuracy_N, costs_NM, excess_NK = objectives(x.astype(int))
            out["F"], out["G"] = np.column_stack([-accuracy_N, costs_NM]), excess_NK

    class Whole(Repair):
        def _do(self, problem, x, **kwargs):
            return tidy(np.rint(x).astype(int)).astype(float)

    generator = np.random.default_rng(seed)
    drawn_NG = generator.integers(0, highest_G + 1, (max(0, POPULATION - len(start_NG)), len(highest_G)))
    start_NG = np.unique(tidy(np.concatenate([start_NG, drawn_NG])), axis=0)
    _, first_costs, first_excess = objectives(start_NG[:1])
    problem = Levels(
        n_var=len(highest_G), n_obj=1 + first_costs.shape[1], n_ieq_constr=first_excess.shape[1], xl=0, xu=highest_G
    )
    # Mutated once a child on average, often by a whole step though there are few.
    mutation = PolynomialMutation(prob=1.0, prob_var=1 / len(highest_G), eta=2)
    algorithm = NSGA2(
        pop_size=POPULATION, sampling=start_NG.astype(float), crossover=UniformCrossover(), mutation=mutation,
        repair=Whole(),
    )  # fmt: skip
    algorithm.mating.n_max_iterations = RETRIES
    found = minimize(problem, algorithm, ("n_gen", generations), seed=seed)
    return np.empty((0, len(highest_G)), int) if found.X is None else np.atleast_2d(found.X).astype(int)
