"""Which threshold to use: for a false accept rate (FAR) that one can live with, and as a probability.

What a threshold does on the pairs it was chosen on is not what it will do on other people. Pairs share identities, and
some people resemble many others ("lambs" of Doddington et al., 1998), so a thousand pairs say less than a thousand
independent ones. The intervals are those of Korn and Graubard (1998, "Confidence intervals for proportions with small
expected number of positive counts estimated from survey data"): an error rate p whose dyadic jackknife variance over
identities is V (``statistics.py``) counts as one of

    m = p (1 - p) / V * (z / t_f)^2

independent pairs, z and t_f the quantiles of the normal and of Student's distribution, and has Jeffreys' interval for
m p errors among m. V comes from the identities that have errors, which may be few: f are Satterthwaite's degrees of
freedom, 2 sum(q)^2 / (sum(q^2) - sum(q)^2 / G) with q the squared change of p when one of the G identities is left out.

The rate of false accepts is chosen, not found: people among whom there happen to be too few lambs get too low a
threshold and too small a V at once, and intervals as above miss too often; for it f is half as large. With this half,
which was found by simulation (benchmarks/threshold_intervals.py), the intervals of FAR and TAR hold the truth in 93 to
97 of 100 draws of identities; in more where fewer than about ten genuine pairs are rejected.

A FAR is refused where it would be measured by fewer than 10 false accepts, or these count as fewer than 3 independent
ones, where an interval spans a factor of ten. The second bound is low on purpose: V is an estimate, and a higher bound
lets through those draws above all whose V is too small. With 10 in place of 3, where pairs count as 7 on average, the
intervals that are given cover the truth in 79 of 100.
"""

from dataclasses import dataclass

import numpy as np
from scipy.special import betaincinv, expit, logit, ndtri, stdtrit  # scipy.stats has them too; it takes a second

from ufo_ds.errors import UserError
from ufo_ds.evaluation import roc
from ufo_ds.evaluation.retrieval import JUNK, UNKNOWN_CAMERA, normalise
from ufo_ds.evaluation.statistics import ALPHA, Items, cluster_jackknife, joined
from ufo_ds.evaluation.verification import check_finite, similarities
from ufo_ds.seeding import numpy_generator

EFFECTIVE = 3  # independent false accepts that those seen must count as
_BLOCK = 2**20  # genuine pairs looked at a time


@dataclass(frozen=True)
class Threshold:
    """Pairs whose similarity is ``threshold`` or more are accepted.

    Attributes:
        far: what was asked for.
        threshold: the lowest similarity of an impostor pair that keeps the FAR of the pairs to that.
        expected_far: the FAR of the pairs, less than ``far`` by as much as ties and their number make it.
        far_interval: 95% interval of the FAR on other pairs of other identities drawn alike.
        tar: the true accept rate of the pairs.
        tar_interval: of it.
        impostors, genuine, identities: how many there were.
    """

    far: float
    threshold: float
    expected_far: float
    far_interval: tuple[float, float]
    tar: float
    tar_interval: tuple[float, float]
    impostors: int
    genuine: int
    identities: int


@dataclass(frozen=True)
class Probability:
    """The log odds that a pair is genuine are ``slope * similarity + intercept``, where half of the pairs are."""

    slope: float
    intercept: float

    def of(self, similarity: np.ndarray | float, prior: float = 0.5) -> np.ndarray | float:
        """The probability that a pair is genuine where a share ``prior`` of all pairs is."""
        return expit(self.slope * np.asarray(similarity, dtype=np.float64) + self.intercept + logit(prior))


@dataclass(frozen=True)
class Rate:
    """A share of pairs: ``value``, its 95% interval, and how many independent pairs the pairs count as."""

    value: float
    interval: tuple[float, float]
    effective: float


def choose(similarity: np.ndarray, same: np.ndarray, identity: np.ndarray, far: float) -> Threshold:
    """The lowest threshold whose FAR is ``far`` or less, and what to expect of it.

    Args:
        similarity: float [M].
        same: bool [M], whether the pair is genuine.
        identity: int [M, 2], of each pair; what shares one is not independent. Where only images are known, these:
            those of a genuine pair count as one, which is most of what there is to know.
        far: in 0..1.

    Raises:
        UserError: the pairs cannot support this FAR, genuine pairs are of one identity, or a similarity is NaN.
    """
    if not 0 < far < 1:
        raise UserError(f"a false accept rate of {far:g}: give one between 0 and 1, as 0.001")
    _check(similarity, same)
    identity = joined(identity, same)
    impostor = np.sort(similarity[~same])
    allowed = roc.false_accepts(len(impostor), far)
    if allowed < roc.RESOLVED:
        raise UserError(
            f"a false accept rate of {far:g} needs {int(np.ceil(roc.RESOLVED / far))} impostor pairs, of which "
            f"{roc.RESOLVED} are accepted; there are {len(impostor)}: ask for a higher rate or give more pairs"
        )
    highest_rejected = impostor[len(impostor) - allowed - 1]
    higher = impostor[np.searchsorted(impostor, highest_rejected, side="right") :]
    if not len(higher):
        raise UserError(
            f"a false accept rate of {far:g}: more than {allowed} of {len(impostor)} impostor pairs share the highest "
            f"similarity, {highest_rejected:g}, so no threshold has it: ask for a higher rate or use a better model"
        )
    threshold = higher[0]
    accepted = similarity >= threshold
    false_accepts = rate(accepted[~same], identity[~same], chosen=True)
    if false_accepts.effective * false_accepts.value < EFFECTIVE:
        raise UserError(
            f"a false accept rate of {far:g}: the {len(impostor)} impostor pairs share "
            f"{len(np.unique(identity[~same]))} identities and count as {int(false_accepts.effective)} independent "
            f"ones; {int(np.ceil(EFFECTIVE / far))} are needed: ask for a higher rate or give more identities"
        )
    false_rejects = rate(~accepted[same], identity[same])
    low, high = false_rejects.interval
    return Threshold(
        far, float(threshold), false_accepts.value, false_accepts.interval, 1 - false_rejects.value,
        (1 - high, 1 - low), len(impostor), int(same.sum()), len(np.unique(identity)),
    )  # fmt: skip


def rate(wrong: np.ndarray, identity: np.ndarray, chosen: bool = False) -> Rate:
    """An error rate with the interval of the module's docstring.

    Where no pair is wrong, or all are, each identity counts as one pair: it may be so for other identities' pairs
    together.

    Args:
        wrong: bool [M], M at least 1.
        identity: int [M, 1 or 2].
        chosen: whether a threshold was set to have this rate.

    Raises:
        UserError: all pairs are of one identity.
    """
    value, count = float(wrong.mean()), len(wrong)
    variance, change_G = cluster_jackknife(wrong.astype(np.float64), Items(np.full(count, 1 / count), identity))
    if len(change_G) < 2:
        raise UserError(f"all {count} pairs are of one identity: an interval for others needs pairs of several")
    if 0 < value < 1:
        effective = min(float(count), value * (1 - value) / max(variance, 1e-300))
    else:
        effective = float(len(change_G))
    q_G = np.square(change_G)
    spread = np.square(q_G).sum() - q_G.sum() ** 2 / len(q_G)
    freedom = float(2 * q_G.sum() ** 2 / spread if spread > 0 else np.inf) / (2 if chosen else 1)
    freedom = min(max(1.0, freedom), len(q_G) - 1.0)
    m = effective * (ndtri(1 - ALPHA / 2) / stdtrit(freedom, 1 - ALPHA / 2)) ** 2
    errors, others = m * value + 0.5, m * (1 - value) + 0.5
    low = float(betaincinv(errors, others, ALPHA / 2)) if value > 0 else 0.0
    high = float(betaincinv(errors, others, 1 - ALPHA / 2)) if value < 1 else 1.0
    return Rate(value, (low, high), effective)


def calibrate(similarity: np.ndarray, same: np.ndarray) -> Probability:
    """Logistic regression of whether a pair is genuine on its similarity, both kinds of pairs with the same weight.

    Args:
        similarity: float [M].
        same: bool [M].

    Raises:
        UserError: pairs of only one kind, a NaN, or genuine pairs that are not more similar than others.
    """
    from sklearn.linear_model import LogisticRegression  # takes a second to import: only where it is fitted

    _check(similarity, same)
    mean, deviation = float(similarity.mean(dtype=np.float64)), float(similarity.std(dtype=np.float64))
    standard = (similarity.astype(np.float64) - mean) / max(deviation, 1e-12)
    # On this scale the default penalty is that of one pair or so; it keeps the slope finite where no pair is in doubt.
    model = LogisticRegression(class_weight="balanced").fit(standard[:, None], same)
    slope = float(model.coef_[0, 0]) / max(deviation, 1e-12)
    if not slope > 0 or deviation == 0:
        raise UserError(
            f"no calibration: the {int(same.sum())} genuine pairs are not more similar than the {int((~same).sum())} "
            f"impostor pairs; check the pairs, or use a model that has learned the task"
        )
    return Probability(slope, float(model.intercept_[0]) - slope * mean)


def pairs_of(
    query: np.ndarray,
    query_ids: np.ndarray,
    query_cameras: np.ndarray,
    gallery: np.ndarray,
    gallery_ids: np.ndarray,
    gallery_cameras: np.ndarray,
    limit: int = 500_000,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Genuine and impostor pairs of a retrieval benchmark: a query and a gallery image each.

    The rules are those of ``retrieval.py``: no junk, and no genuine pair of the same known camera. Where query and
    gallery are the same images, a camera of its own for each image keeps it from being paired with itself. Of more
    than ``limit`` genuine pairs that many are drawn, of all other pairs about as many, seeded.

    Args:
        query: float32 [Q, D], normalised here; with ids and cameras int [Q].
        gallery: float32 [G, D], normalised here; with ids and cameras int [G].

    Returns:
        What :func:`choose` takes: similarity, float32 [M], the cosine; same, bool [M]; identity, int [M, 2].

    Raises:
        UserError: a feature that is NaN or infinite.
    """
    check_finite(query, np.arange(len(query)), "query")
    check_finite(gallery, np.arange(len(gallery)), "gallery")
    generator = numpy_generator(seed, "pairs of a retrieval benchmark")

    # Sorted by identity, the gallery images of a query's identity are neighbours: genuine pairs can be numbered.
    order = np.argsort(gallery_ids, kind="stable")
    start_Q = np.searchsorted(gallery_ids[order], query_ids, side="left")
    count_Q = np.searchsorted(gallery_ids[order], query_ids, side="right") - start_Q
    count_Q[query_ids == JUNK] = 0
    end_Q = np.cumsum(count_Q)
    total, shift_Q = int(count_Q.sum()), start_Q - (end_Q - count_Q)

    def locate(number: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        one = np.searchsorted(end_Q, number, side="right")
        return one, order[number + shift_Q[one]]

    # Those with the smallest of random keys are as good as any draw, and one block after the other finds them.
    kept, keys = np.empty(0, dtype=np.int64), np.empty(0)
    for begin in range(0, total, _BLOCK):
        number = np.arange(begin, min(begin + _BLOCK, total))
        one, other = locate(number)
        camera = gallery_cameras[other]
        number = number[(camera != query_cameras[one]) | (camera == UNKNOWN_CAMERA)]
        kept, keys = np.concatenate([kept, number]), np.concatenate([keys, generator.random(len(number))])
        if len(kept) > limit:
            smallest = np.argpartition(keys, limit)[:limit]
            kept, keys = kept[smallest], keys[smallest]
    one, other = locate(np.sort(kept))
    genuine = len(one)

    everything = len(query) * len(gallery)
    number = np.arange(everything) if everything <= limit else np.unique(generator.integers(0, everything, limit))
    first, second = number // max(1, len(gallery)), number % max(1, len(gallery))
    known = (query_ids[first] != JUNK) & (gallery_ids[second] != JUNK)
    impostor = known & (query_ids[first] != gallery_ids[second])
    first, second = np.concatenate([one, first[impostor]]), np.concatenate([other, second[impostor]])
    identity = np.stack([query_ids[first], gallery_ids[second]], axis=1)
    return (
        similarities(normalise(query), normalise(gallery), first, second),
        np.arange(len(first)) < genuine,
        identity,
    )


def _check(similarity: np.ndarray, same: np.ndarray) -> None:
    nan = int(np.isnan(similarity).sum())
    if nan:
        raise UserError(
            f"{nan} of {len(same)} pairs have the similarity NaN: the model has diverged; use an earlier one"
        )
    if same.all() or not same.any():
        raise UserError(
            f"{int(same.sum())} genuine and {int((~same).sum())} impostor pairs: a threshold needs pairs of both kinds"
        )
