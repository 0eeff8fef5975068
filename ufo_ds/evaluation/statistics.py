"""Is one recipe better than another, or were its seeds and its test images kinder to it?

A metric of a run is a weighted mean of one score per item: AP per query, right or wrong per pair or image. The score of
run r of arm a on item i is taken as

    mu_a  +  u_ai  +  s_ar  +  e_ari

with an effect u of the item, s of the seed and e of both. Test items are a sample, as seeds are (Bouthillier et al.,
2021, "Accounting for variance in machine learning benchmarks"), so the difference D of the arms' means varies by

    Var(D) = U + R,   U = Var(mean of u_A - u_B),   R = sum over arms of Var(s + mean of e) / runs

Items come in clusters: queries of one identity are answered well or badly together, so U is estimated from the sums of
residuals over a cluster (:func:`cluster_variance`). Both arms see the same items, so what they share cancels (Dror et
al., 2018, paired tests). The variance V of the seed-averaged differences between clusters holds U and a part E due to
e; E also is in R, and is estimated from the runs' own residuals and taken off (Cameron, Gelbach and Miller, 2011, for
two ways of clustering: V + R - E). R is estimated from the runs' metrics, pooled over both arms with
f = runs_A + runs_B - 2 degrees of freedom: the spread over seeds is taken to be alike in both arms. With

    half-width^2 = max(t_c^2 U + t_f^2 R,  t_c^2 V),   c = clusters - 1,   t_k the quantile of Student's t for k

the interval D +- half-width covers the truth at least as often as it says, however few seeds there are: a sum of t^2
times independent variance estimates always does (Banerjee, 1960, Sankhya 22). Welch-Satterthwaite degrees of freedom
are narrower but fall short with few seeds, and so does a bootstrap over three seeds. The second branch holds where the
runs happen to agree better than their items allow.

To V the variance of one more item that turned out differently is added, as Agresti and Min (2005) do for paired
proportions: that all runs are right about all of 20 images does not prove them equal.

Not covered: the gallery and the thresholds of verification's folds are taken as given; seeds that both arms use count
as independent, which is safe where they make the arms more alike.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components
from scipy.special import stdtrit

ALPHA = 0.05


@dataclass(frozen=True)
class Items:
    """The items of a benchmark, the same for all runs.

    ``weight`` [N] adds up to 1; ``cluster`` [N, 1] or, for items of two identities each, [N, 2].
    """

    weight: np.ndarray
    cluster: np.ndarray

    @property
    def clusters(self) -> int:
        return len(np.unique(self.cluster))


@dataclass(frozen=True)
class Difference:
    """Mean of arm A minus mean of arm B over one benchmark or several.

    Attributes:
        value: D.
        items: per task its benchmarks' (U, V, c) of the module's formula.
        seeds: (R, f) of the module's formula; None where an arm has a single run, whose spread cannot be known.
    """

    value: float
    items: Sequence[Sequence[tuple[float, float, int]]]
    seeds: tuple[float, int] | None

    def half_width(self, alpha: float = ALPHA) -> float:
        """Half the width of the interval that misses the truth with probability ``alpha``; over items alone where
        the seeds' part is not known."""
        count = sum(map(len, self.items))

        def squared(which: int) -> float:
            # Benchmarks of one task may share images, so their errors are added as if they always agreed.
            return (
                sum(sum(_quantile(part[2], alpha) * part[which] ** 0.5 for part in task) ** 2 for task in self.items)
                / count**2
            )

        if self.seeds is None:
            return squared(1) ** 0.5
        variance, freedom = self.seeds
        return max(squared(0) + _quantile(freedom, alpha) ** 2 * variance, squared(1)) ** 0.5

    @property
    def interval(self) -> tuple[float, float]:
        half = self.half_width()
        return self.value - half, self.value + half

    @property
    def p(self) -> float | None:
        """The smallest ``alpha`` whose interval leaves out 0; None where the seeds' part is not known."""
        if self.seeds is None:
            return None
        low, high = 0.0, 1.0
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if self.half_width(middle) >= abs(self.value) else (low, middle)
        return high


def compare(a_RN: np.ndarray, b_RN: np.ndarray, items: Items) -> Difference:
    """Two arms on one benchmark.

    Args:
        a_RN, b_RN: scores of each run (they may differ in number) and item.
    """
    value = float((a_RN.mean(0) - b_RN.mean(0)) @ items.weight)
    one_more = float(np.square(items.weight).mean())
    between = cluster_variance(a_RN.mean(0) - b_RN.mean(0), items) + one_more
    within = 0.0
    for arm_RN in (a_RN, b_RN):
        n = len(arm_RN)
        if n > 1:
            within += sum(cluster_variance(row_N, items) for row_N in arm_RN - arm_RN.mean(0)) / (n * (n - 1))
    part = max(0.0, between - within), between, items.clusters - 1
    return Difference(value, [[part]], _seeds(a_RN @ items.weight, b_RN @ items.weight))


def mean(differences: Sequence[Difference], tasks: Sequence[str], a_RB: np.ndarray, b_RB: np.ndarray) -> Difference:
    """The mean over benchmarks.

    Args:
        differences: of each benchmark.
        tasks: the task of each benchmark; those of one task may share images.
        a_RB, b_RB: the metric of each run and benchmark.
    """
    by_task: dict[str, list[tuple[float, float, int]]] = {}
    for task, difference in zip(tasks, differences, strict=True):
        by_task.setdefault(task, []).append(difference.items[0][0])
    value = float(np.mean([difference.value for difference in differences]))
    return Difference(value, list(by_task.values()), _seeds(a_RB.mean(1), b_RB.mean(1)))


def _seeds(a_R: np.ndarray, b_R: np.ndarray) -> tuple[float, int] | None:
    if min(len(a_R), len(b_R)) < 2:
        return None
    freedom = len(a_R) + len(b_R) - 2
    pooled = sum(float(np.square(arm_R - arm_R.mean()).sum()) for arm_R in (a_R, b_R)) / freedom
    return pooled * (1 / len(a_R) + 1 / len(b_R)), freedom


def cluster_variance(value_N: np.ndarray, items: Items) -> float:
    """Variance of the weighted mean of ``value_N`` over draws of clusters: of :func:`cluster_jackknife`."""
    return cluster_jackknife(value_N, items)[0]


def cluster_jackknife(value_N: np.ndarray, items: Items) -> tuple[float, np.ndarray]:
    """Variance of the weighted mean of ``value_N`` over draws of clusters, and by how much the mean falls when each of
    the clusters is left out, float64 [G].

    The jackknife over clusters, in closed form (CV3 of MacKinnon, Nielsen and Webb, 2023: on the safe side where
    clusters are few and of unequal size). Items of two identities correlate with every item that has one of them: to
    the sums over identities the pairs of identities contribute twice, and are taken off once (Aronow, Samii and
    Assenova, 2015).
    """
    residual_N = items.weight * (value_N - items.weight @ value_N)
    names, cluster_NC = np.unique(items.cluster, return_inverse=True)
    cluster_NC, count = cluster_NC.reshape(items.cluster.shape), len(names)
    first_N, last_N = cluster_NC[:, 0], cluster_NC[:, -1]
    two_N = first_N != last_N

    def sums(x_N: np.ndarray) -> np.ndarray:
        return np.bincount(first_N, x_N, count) + np.bincount(last_N[two_N], x_N[two_N], count)

    left_out_G = sums(residual_N) / np.maximum(1 - sums(items.weight), 1e-9)
    variance = np.square(left_out_G).sum()
    if two_N.any():
        pairs_N = np.minimum(first_N, last_N) * count + np.maximum(first_N, last_N)
        pairs, pair_N = np.unique(pairs_N, return_inverse=True)
        squared_P = np.square(np.bincount(pair_N, residual_N))
        variance = max(variance - squared_P[pairs // count != pairs % count].sum(), squared_P.sum())
    return float((count - 1) / count * variance), left_out_G


def interval(score_N: np.ndarray, items: Items, alpha: float = ALPHA) -> tuple[float, float]:
    """Where the mean of one run's scores, each in 0..1, may lie on other items of the same kind.

    Wilson's interval (1927) for as many items as would have the variance found between clusters (the effective sample
    size of Korn and Graubard, 1998), with Student's t. Where all scores are alike every cluster counts as one item.
    """
    mean, freedom = float(np.clip(items.weight @ score_N, 0, 1)), items.clusters - 1
    if freedom < 1:
        return 0.0, 1.0
    alike = score_N.min() == score_N.max()
    variance = mean * (1 - mean) / items.clusters if alike else cluster_variance(score_N, items)
    size = float(items.clusters) if alike else mean * (1 - mean) / variance
    squared = _quantile(freedom, alpha) ** 2
    middle = (mean + squared / (2 * size)) / (1 + squared / size)
    half = (squared * variance + squared**2 / (4 * size**2)) ** 0.5 / (1 + squared / size)
    return max(0.0, middle - half), min(1.0, middle + half)


def joined(cluster_N2: np.ndarray, same_N: np.ndarray) -> np.ndarray:
    """Clusters of pairs numbered anew, int [N, 2], those of a genuine pair as one.

    So images or templates, where no identities are told, become those that the genuine pairs tell.
    """
    names, number_N2 = np.unique(cluster_N2, return_inverse=True)
    number_N2 = number_N2.reshape(-1, 2)
    first, second = number_N2[same_N].T
    links = csr_array((np.ones(len(first)), (first, second)), shape=(len(names), len(names)))
    return connected_components(links, directed=False)[1][number_N2]


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values: calling all those up to alpha differences is wrong anywhere with probability alpha at most
    (Holm, 1979)."""
    adjusted, largest = [1.0] * len(p_values), 0.0
    for rank, index in enumerate(np.argsort(p_values)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def _quantile(freedom: int, alpha: float) -> float:
    return float(stdtrit(freedom, 1 - alpha / 2))
