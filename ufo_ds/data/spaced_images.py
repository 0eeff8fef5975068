"""A few images of what may be many, the same ones every time: what is measured on a part of a training set."""

import bisect
import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from ufo_ds.data.image_files import Images
from ufo_ds.data.shards import ShardSet
from ufo_ds.data.transforms import CorruptImage, evaluation_transform
from ufo_ds.recipe_task import Size


def spaced_images(sets: Sequence[Images | ShardSet], most: int, input_hw: Size) -> Iterator[np.ndarray | None]:
    """Up to ``most`` images at equal distances over all sets, as evaluation sees them, uint8 [3, H, W]; None for one
    that cannot be read."""
    starts = list(itertools.accumulate(map(_count, sets), initial=0))
    for i in range(count := min(most, starts[-1])):
        index = i * starts[-1] // count
        number = bisect.bisect_right(starts, index) - 1
        try:
            yield evaluation_transform(sets[number].read(index - starts[number]), input_hw)
        except CorruptImage:
            yield None


def _count(images: Images | ShardSet) -> int:
    return len(images) if isinstance(images, ShardSet) else len(images.names)
