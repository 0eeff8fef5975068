"""Top-1 accuracy."""

from collections.abc import Mapping

import numpy as np

from ufo_ds.errors import UserError


def top1(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """The share of images whose right class scores highest: :func:`metrics` of :func:`outcomes`."""
    return metrics(outcomes(scores, labels))


def outcomes(scores: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    """Whether the right class of each image scores highest.

    Pessimistic: a right class that only ties with another counts as wrong, and so does a row with a NaN, so that a
    model that says the same of everything is right about nothing.

    Args:
        scores: float [N, C]; higher is more likely.
        labels: int [N], each in 0 .. C - 1.

    Returns:
        ``right``: bool [N]; ``label``: int [N].

    Raises:
        UserError: no images, or a label that is not one of the C classes.
    """
    images, classes = scores.shape
    if images == 0:
        raise UserError("classification: 0 images to evaluate; check the benchmark's shards")
    if labels.min() < 0 or labels.max() >= classes:
        wrong = labels.min() if labels.min() < 0 else labels.max()
        raise UserError(
            f"classification: label {wrong} of the benchmark is not one of the model's {classes} classes; evaluate on "
            f"shards with the labels of the training set"
        )
    rows = np.arange(images)
    others = scores.astype(np.float64)
    own = others[rows, labels]
    others[rows, labels] = -np.inf
    right = own > others.max(axis=1)  # max hands a NaN on, and no comparison with it holds
    return {"right": right, "label": labels}


def metrics(outcomes: Mapping[str, np.ndarray]) -> dict[str, float]:
    """``top1`` in 0..1."""
    return {"top1": float(np.mean(outcomes["right"]))}
