"""Attributes of an image, each there or not: multi-label classification as pedestrian attributes report it.

An attribute is predicted where its logit is above 0, its probability above 1/2.

- ``mA``, by label (Deng et al., 2014, PETA): of each attribute the mean of the share of its positive and the share of
  its negative images that are judged rightly, averaged over attributes. An attribute without positive (or negative)
  images counts with its other share, as in scikit-learn's balanced accuracy.
- ``accuracy``, ``precision``, ``recall``, ``f1``, by image (Li et al., 2016, RAP; PA-100K uses the same): the mean over
  images of |Y & P| / |Y | P|, |Y & P| / |P| and |Y & P| / |Y| with Y the attributes that are there and P those
  predicted; F1 is 2 precision recall / (precision + recall) of these means. As in the evaluation code of RAP's authors
  images with empty Y are left out, and an empty P has precision 0. (scikit-learn's F1 with ``average="samples"`` and
  some toolboxes average the F1 of the images, another number.)
- ``mAP``: the mean over attributes with positive images of the average precision, the mean over positive images of the
  precision at each.

Ties are broken pessimistically: a logit of 0 or NaN is wrong whatever the truth, and negative images rank before
positive ones that score the same.
"""

from collections.abc import Mapping

import numpy as np

from ufo_ds.errors import UserError
from ufo_ds.evaluation.statistics import Items

MAIN_METRIC = "mA"


def evaluate(scores: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """:func:`metrics` of :func:`outcomes`."""
    return metrics(outcomes(scores, targets))


def outcomes(scores: np.ndarray, targets: np.ndarray) -> dict[str, np.ndarray]:
    """Which attributes of which images are judged rightly.

    Args:
        scores: float [N, A], logits.
        targets: bool [N, A], whether the image has the attribute.

    Returns:
        ``right``, bool [N, A]; ``target``, bool [N, A]; ``average_precision``, float [A], 0 for an attribute that no
        image has.

    Raises:
        UserError: no images, another number of attributes than the model has, or no image has any of them.
    """
    images, attributes = targets.shape
    if images == 0:
        raise UserError("attributes: 0 images to evaluate; check the benchmark's shards")
    if scores.shape != targets.shape:
        raise UserError(
            f"attributes: the benchmark's images have {attributes} attributes, the model has {scores.shape[1]}; "
            f"evaluate on shards with the attributes of the training set"
        )
    if not targets.any():
        raise UserError(f"attributes: none of the {images} images has any of the {attributes} attributes; check them")
    right = np.where(targets, scores > 0, scores < 0)
    average_precisions = [
        _average_precision(score_N[target_N], score_N[~target_N])
        for score_N, target_N in zip(scores.T, targets.T, strict=True)
    ]
    return {"right": right, "target": targets, "average_precision": np.array(average_precisions)}


def metrics(outcomes: Mapping[str, np.ndarray]) -> dict[str, float]:
    """``mA``, ``accuracy``, ``precision``, ``recall``, ``f1`` and ``mAP``, in 0..1."""
    right, target = outcomes["right"], outcomes["target"]
    answers = target, ~target
    images_2A = np.array([answer.sum(axis=0) for answer in answers])
    right_2A = np.array([np.sum(answer & right, axis=0) for answer in answers])
    share_A = np.sum(right_2A / np.maximum(images_2A, 1), axis=0) / np.sum(images_2A > 0, axis=0)
    some = target.any(axis=1)
    target_NA, predicted_NA = target[some], (target == right)[some]
    both_N = np.sum(target_NA & predicted_NA, axis=1)
    precision = float(np.mean(both_N / np.maximum(predicted_NA.sum(axis=1), 1)))
    recall = float(np.mean(both_N / target_NA.sum(axis=1)))
    return {
        "mA": float(np.mean(share_A)),
        "accuracy": float(np.mean(both_N / np.sum(target_NA | predicted_NA, axis=1))),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if precision + recall else 0.0,
        "mAP": float(np.mean(outcomes["average_precision"][target.any(axis=0)])),
    }


def items(outcomes: Mapping[str, np.ndarray]) -> tuple[np.ndarray, Items]:
    """Images, each with the weight that its attributes have in mA together."""
    target = outcomes["target"]
    positive_A, negative_A = target.sum(axis=0), np.sum(~target, axis=0)
    # In mA each attribute counts the same, and so does each of the answers to it that occur.
    answers_A = np.sign(positive_A) + np.sign(negative_A)
    weight_NA = 1 / (target.shape[1] * answers_A * np.where(target, positive_A, negative_A))
    weight_N = weight_NA.sum(axis=1)
    score_N = np.sum(weight_NA * outcomes["right"], axis=1) / weight_N
    return score_N, Items(weight_N, np.arange(len(weight_N))[:, None])


def chance(outcomes: Mapping[str, np.ndarray]) -> dict[str, float]:
    """mA of a fair coin."""
    return {"mA": 0.5}


def _average_precision(positive: np.ndarray, negative: np.ndarray) -> float:
    """Of the scores of an attribute's positive [P] and negative images."""
    if len(positive) == 0:
        return 0.0
    positive = np.sort(np.where(np.isnan(positive), -np.inf, positive))[::-1]
    negative = np.sort(negative)  # NaN sorts as the highest
    hits = np.arange(1, len(positive) + 1)
    return float(np.mean(hits / (hits + len(negative) - np.searchsorted(negative, positive, side="left"))))
