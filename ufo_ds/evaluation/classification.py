"""Classification into one of C classes: top-1 and top-5 accuracy, and the mean over classes of the accuracy.

Top-k as ImageNet reports it (Russakovsky et al., 2015); the mean over classes, also called balanced accuracy, as the
small fine-grained sets report it. Ties are broken pessimistically: a class that scores as high as the right one ranks
before it, and a row with a NaN ranks its right class last and counts as wrong, so that a model that says the same of
everything is right about nothing.
"""

from collections.abc import Mapping

import numpy as np

from ufo_ds.errors import UserError
from ufo_ds.evaluation.statistics import Items

MAIN_METRIC = "top1"

_BLOCK = 2**22  # scores copied at a time (32 MiB), whatever the number of images


def evaluate(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """:func:`metrics` of :func:`outcomes`."""
    return metrics(outcomes(scores, labels))


def outcomes(scores: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    """Where the right class of each image ranks.

    Args:
        scores: float [N, C], may be memory-mapped; higher is more likely.
        labels: int [N], each in 0 .. C - 1.

    Returns:
        Of every image: ``right``, bool [N]; ``label``, int [N]; ``predicted``, int [N], the label where it is right and
        the best of the other classes where it is not; ``rank``, int [N], of the right class, from 1. And ``classes``,
        int [1], C.

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
    right = np.empty(images, dtype=bool)
    predicted, rank = np.empty(images, dtype=np.int64), np.empty(images, dtype=np.int64)
    step = max(1, _BLOCK // classes)
    for begin in range(0, images, step):
        rows = slice(begin, begin + step)
        label_B = labels[rows]
        score_BC = np.maximum(scores[rows], np.finfo(np.float64).min, dtype=np.float64)  # -inf is used below
        own_B = score_BC[np.arange(len(label_B)), label_B]
        unknown_B = np.isnan(score_BC).any(axis=1)
        rank[rows] = np.where(unknown_B, classes, np.sum(score_BC >= own_B[:, None], axis=1))
        right[rows] = (rank[rows] == 1) & ~unknown_B
        score_BC[np.arange(len(label_B)), label_B] = -np.inf
        predicted[rows] = np.where(right[rows], label_B, np.argmax(score_BC, axis=1))
    return {"right": right, "label": labels, "predicted": predicted, "rank": rank, "classes": np.array([classes])}


def metrics(outcomes: Mapping[str, np.ndarray]) -> dict[str, float]:
    """``top1``, ``top5`` (of more than 5 classes) and ``mean_per_class`` (over the classes with images), in 0..1."""
    right, label = outcomes["right"], outcomes["label"]
    found = {"top1": float(np.mean(right))}
    if outcomes["classes"][0] > 5:
        found["top5"] = float(np.mean(outcomes["rank"] <= 5))
    images = np.bincount(label)
    found["mean_per_class"] = float(np.mean((np.bincount(label, right) / np.maximum(images, 1))[images > 0]))
    return found


def items(outcomes: Mapping[str, np.ndarray]) -> tuple[np.ndarray, Items]:
    """Images are right or wrong one by one: classes are not a sample of classes."""
    count = len(outcomes["right"])
    return outcomes["right"].astype(np.float64), Items(np.full(count, 1 / count), np.arange(count)[:, None])


def chance(outcomes: Mapping[str, np.ndarray]) -> dict[str, float]:
    """What a ranking of the classes at random gets."""
    classes = int(outcomes["classes"][0])
    found = {"top1": 1 / classes, "mean_per_class": 1 / classes}
    return found | {"top5": 5 / classes} if classes > 5 else found
