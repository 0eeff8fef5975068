"""A seeded part of a task's training images, to see what little data is enough for."""

import math

import numpy as np

from ufo_ds.data.shards import ShardSet
from ufo_ds.recipe_task import Task
from ufo_ds.seeding import numpy_generator


def fraction_of(sets: list[ShardSet], task: Task, fraction: float, seed: int) -> list[ShardSet]:
    """Of each set, and rounded up: for a linear head ``fraction`` of the images of each class; of attributes, whose
    combinations are no classes, of all images; for a margin head all images of ``fraction`` of the identities.

    A smaller fraction by the same seed is a part of a larger one.
    """
    if fraction == 1:
        return sets
    return [_part(shards, task, fraction, (seed, "fraction", task.name, n)) for n, shards in enumerate(sets)]


def _part(shards: ShardSet, task: Task, fraction: float, key: tuple[int | str, ...]) -> ShardSet:
    labels = shards.labels
    if task.head.type == "margin":
        kept = np.sort(_first(np.unique(labels), fraction, key))
        return shards.subset(np.flatnonzero(np.isin(labels, kept)), kept)
    groups = [np.arange(len(labels))]
    if not task.loss.multi_label:
        groups = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    chosen = [_first(group, fraction, (*key, n)) for n, group in enumerate(groups)]
    return shards.subset(np.sort(np.concatenate(chosen)))


def _first(items: np.ndarray, fraction: float, key: tuple[int | str, ...]) -> np.ndarray:
    count = math.ceil(round(fraction * len(items), 6))  # 0.07 * 100 is 7.000000000000001
    return numpy_generator(*key).permutation(items)[:count]
