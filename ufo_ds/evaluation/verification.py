"""Verification, "are these two the same?", by the protocol of LFW (Huang et al., 2007)."""

from collections.abc import Mapping

import numpy as np

from ufo_ds.errors import UserError
from ufo_ds.evaluation.retrieval import normalise

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
        Of every pair: ``right``, bool [M]; ``fold``, int [M]; ``threshold``, float [M], the one of its fold.

    Raises:
        UserError: fewer than two folds.
    """
    fold_of, first, second = pairs[:, 0], pairs[:, 1], pairs[:, 2]
    same = pairs[:, 3] == 1
    folds = np.unique(fold_of)
    if len(folds) < 2:
        raise UserError(
            f"verification: {len(pairs)} pairs in {len(folds)} folds; the threshold for one fold is chosen on the "
            f"others, so give the pairs of the benchmark at least 2 folds"
        )
    features = normalise(features)
    distance = np.square(features[first] - features[second]).sum(axis=1)
    # Right answers [fold, threshold].
    right = np.stack([_right_answers(distance[fold_of == fold], same[fold_of == fold]) for fold in folds])
    best = np.argmax(right.sum(axis=0) - right, axis=1)  # the first of equals
    threshold = _THRESHOLDS[best][np.searchsorted(folds, fold_of)]
    judged = ((distance < threshold) == same) & ~np.isnan(distance)
    return {"right": judged, "fold": fold_of, "threshold": threshold}


def metrics(outcomes: Mapping[str, np.ndarray]) -> dict[str, float]:
    """``accuracy`` and ``accuracy_std`` (mean and standard deviation over folds, in 0..1), ``threshold`` (mean over
    folds, a squared distance in 0..4)."""
    folds, first = np.unique(outcomes["fold"], return_index=True)
    accuracy = np.array([outcomes["right"][outcomes["fold"] == fold].mean() for fold in folds])
    return {
        "accuracy": float(accuracy.mean()),
        "accuracy_std": float(accuracy.std()),
        "threshold": float(outcomes["threshold"][first].mean()),
    }


def _right_answers(distance: np.ndarray, same: np.ndarray) -> np.ndarray:
    """How many of the pairs [M] each threshold [T] decides rightly."""
    below_if_same = np.searchsorted(np.sort(distance[same]), _THRESHOLDS)  # NaN sorts last: never below
    different = np.sort(distance[~same & ~np.isnan(distance)])
    return below_if_same + len(different) - np.searchsorted(different, _THRESHOLDS)
