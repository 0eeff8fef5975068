"""Verification, "are these two the same?", by the protocol of LFW (Huang et al., 2007), and the curve over thresholds.

Accuracy is over folds, each judged by a threshold of the others. Area under the curve, equal error rate and TAR at a
FAR are of all pairs together, by cosine similarity: ``roc.py`` has their definitions; TAR is pessimistic with ties.
"""

from collections.abc import Mapping

import numpy as np

from ufo_ds.errors import UserError
from ufo_ds.evaluation import roc
from ufo_ds.evaluation.retrieval import normalise
from ufo_ds.evaluation.statistics import Items, joined

MAIN_METRIC = "accuracy"
FARS = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)

_BLOCK = 2**23  # numbers of gathered features held at a time (32 MiB), however many pairs there are
_THRESHOLDS = np.arange(0, 4, 0.01)  # squared L2 distance of two unit vectors: 0 equal, 4 opposite


def evaluate(features: np.ndarray, pairs: np.ndarray) -> dict[str, float]:
    """Accuracy over folds: :func:`metrics` of :func:`outcomes`."""
    return metrics(outcomes(features, pairs))


def outcomes(features: np.ndarray, pairs: np.ndarray) -> dict[str, np.ndarray]:
    """Which pairs are judged rightly; each fold is judged by the threshold that is best on all the others.

    A pair is called the same when the squared L2 distance of its normalised features is below the threshold. Of
    several thresholds equally good on the other folds the smallest is taken, as in the evaluation code of facenet and
    insightface. A pair whose distance is NaN counts as wrong.

    Args:
        features: float [N, D], normalised here.
        pairs: int64 [M, 4]: fold, index of the first image, index of the second, 1 if they are the same else 0.

    Returns:
        Of every pair: ``right``, bool [M]; ``fold``, int [M]; ``threshold``, float [M], the one of its fold;
        ``similarity``, float32 [M], the cosine; ``same``, bool [M]; ``first`` and ``second``, int [M], its images.

    Raises:
        UserError: fewer than two folds, or a feature of a pair that is NaN or infinite.
    """
    fold_of, first, second = pairs[:, 0], pairs[:, 1], pairs[:, 2]
    same = pairs[:, 3] == 1
    folds = np.unique(fold_of)
    if len(folds) < 2:
        raise UserError(
            f"verification: {len(pairs)} pairs in {len(folds)} folds; the threshold for one fold is chosen on the "
            f"others, so give the pairs of the benchmark at least 2 folds"
        )
    check_finite(features, pairs[:, 1:3], "verification")
    features = normalise(features)
    distance = np.square(features[first] - features[second]).sum(axis=1)
    # Right answers [fold, threshold].
    right = np.stack([_right_answers(distance[fold_of == fold], same[fold_of == fold]) for fold in folds])
    best = np.argmax(right.sum(axis=0) - right, axis=1)  # the first of equals
    threshold = _THRESHOLDS[best][np.searchsorted(folds, fold_of)]
    judged = ((distance < threshold) == same) & ~np.isnan(distance)
    return {
        "right": judged,
        "fold": fold_of,
        "threshold": threshold,
        "similarity": similarities(features, features, first, second),
        "same": same,
        "first": first,
        "second": second,
    }


def metrics(outcomes: Mapping[str, np.ndarray]) -> dict[str, float]:
    """``accuracy`` and ``accuracy_std`` (mean and standard deviation over folds, in 0..1), ``threshold`` (mean over
    folds, a squared distance in 0..4); where there are pairs of both kinds ``auc``, ``eer`` and ``tar@far=1e-2`` and
    so on, at the FARs that the pairs can resolve."""
    folds, first = np.unique(outcomes["fold"], return_index=True)
    accuracy = np.array([outcomes["right"][outcomes["fold"] == fold].mean() for fold in folds])
    found = {
        "accuracy": float(accuracy.mean()),
        "accuracy_std": float(accuracy.std()),
        "threshold": float(outcomes["threshold"][first].mean()),
    }
    if "similarity" not in outcomes:  # kept by an evaluation that looked at folds alone
        return found
    similarity, same = outcomes["similarity"], outcomes["same"]
    impostors = int((~same).sum())
    if not 0 < impostors < len(same):
        return found
    above = roc.impostors_above(similarity, same)
    found |= {"auc": roc.auc(similarity, same), "eer": roc.eer(similarity, same)}
    return found | {roc.name_of(far): roc.tar_at(above, impostors, far) for far in roc.resolved(impostors, FARS)}


def items(outcomes: Mapping[str, np.ndarray]) -> tuple[np.ndarray, Items]:
    """Each pair's ``right``, float64 [M], and its weight in the mean over folds of means; its clusters are its two
    identities, ``identity`` int [M, 2] of the outcomes; where only images are known, those that genuine pairs tell."""
    _, fold_M, sizes = np.unique(outcomes["fold"], return_inverse=True, return_counts=True)
    same = outcomes.get("same", np.zeros(len(fold_M), dtype=bool))
    weight_M = 1 / (len(sizes) * sizes[fold_M])
    return outcomes["right"].astype(np.float64), Items(weight_M, joined(outcomes["identity"], same))


def chance(outcomes: Mapping[str, np.ndarray]) -> dict[str, float]:
    """``accuracy`` of always the same answer, the more frequent one; ``auc``, ``eer`` and the TAR at each FAR of
    similarities that know nothing."""
    folds = np.unique(outcomes["fold"])
    share = np.mean([outcomes["same"][outcomes["fold"] == fold].mean() for fold in folds])
    found = {"accuracy": float(max(share, 1 - share))}
    impostors = int((~outcomes["same"]).sum())
    if not 0 < impostors < len(outcomes["same"]):
        return found
    return found | {"auc": 0.5, "eer": 0.5} | {roc.name_of(far): far for far in roc.resolved(impostors, FARS)}


def similarities(one_ND: np.ndarray, other_ND: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Dot products of row ``first[m]`` of one and row ``second[m]`` of the other, float32 [M], block by block."""
    found = np.empty(len(first), dtype=np.float32)
    block = max(1, _BLOCK // one_ND.shape[1])
    for begin in range(0, len(found), block):
        chosen = slice(begin, begin + block)
        found[chosen] = np.einsum("md,md->m", one_ND[first[chosen]], other_ND[second[chosen]])
    return found


def check_finite(features: np.ndarray, used: np.ndarray, where: str) -> None:
    """Refuse features that say nothing.

    Args:
        features: float [N, D].
        used: int, rows that matter.
        where: the protocol, for the message.

    Raises:
        UserError: one of those rows has a NaN or an infinite number.
    """
    rows = np.unique(used)
    wrong = rows[~np.isfinite(features[rows]).all(axis=1)]
    if wrong.size:
        raise UserError(
            f"{where}: the features of {wrong.size} of {len(rows)} images are NaN or infinite, the first of image "
            f"{wrong[0]}: the model has diverged; evaluate an earlier checkpoint or train with a lower learning rate"
        )


def _right_answers(distance: np.ndarray, same: np.ndarray) -> np.ndarray:
    """How many of the pairs [M] each threshold [T] decides rightly."""
    below_if_same = np.searchsorted(np.sort(distance[same]), _THRESHOLDS)  # NaN sorts last: never below
    different = np.sort(distance[~same & ~np.isnan(distance)])
    return below_if_same + len(different) - np.searchsorted(different, _THRESHOLDS)
