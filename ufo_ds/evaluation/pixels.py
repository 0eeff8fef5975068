"""The floor that a trained model must beat: pixels as features, the nearest training image's class or attributes."""

import numpy as np
import torch

from ufo_ds.evaluation.retrieval import normalise

_SIDE = 32
_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R BT.601, as Pillow's mode "L"


def pixel_features(images: np.ndarray) -> np.ndarray:
    """Small grey images with their mean removed, so that the cosine of two is their correlation.

    Args:
        images: uint8 [N, 3, H, W].

    Returns:
        float32 [N, 1024], of 32 x 32 pixels.
    """
    grey = np.einsum("nchw,c->nhw", images.astype(np.float32), _LUMA)
    small = torch.nn.functional.interpolate(
        torch.from_numpy(grey[:, None]), size=(_SIDE, _SIDE), mode="bilinear", antialias=True
    )
    features = small.flatten(1)
    return (features - features.mean(dim=1, keepdim=True)).numpy()


def nearest_neighbour_scores(
    query: np.ndarray, train: np.ndarray, train_labels: np.ndarray, num_classes: int
) -> np.ndarray:
    """Class scores of a nearest-neighbour classifier: the highest cosine with any training image of each class.

    Args:
        query: float32 [Q, D].
        train: float32 [N, D].
        train_labels: int [N].
        num_classes: C; a class without training images scores -inf.

    Returns:
        float32 [Q, C].
    """
    query, train = normalise(query), normalise(train)
    scores = np.full((len(query), num_classes), -np.inf, dtype=np.float32)
    for label in np.unique(train_labels):  # one class at a time: never all Q x N similarities at once
        scores[:, label] = (query @ train[train_labels == label].T).max(axis=1)
    return scores


def nearest_neighbour_attributes(query: np.ndarray, train: np.ndarray, train_targets: np.ndarray) -> np.ndarray:
    """Attribute scores by nearest neighbours: the highest cosine with any training image that has the attribute, less
    that with any that has not; above 0 where the nearest training image has it.

    Args:
        query: float32 [Q, D].
        train: float32 [N, D].
        train_targets: bool [N, A]; each attribute has images.

    Returns:
        float32 [Q, A], inf for an attribute that all training images have.
    """
    of_each = [nearest_neighbour_scores(query, train, has_N.astype(np.int64), 2) for has_N in train_targets.T]
    return np.stack([score_Q2[:, 1] - score_Q2[:, 0] for score_Q2 in of_each], axis=1)
