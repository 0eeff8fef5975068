"""MixUp (Zhang et al., 2018) and CutMix (Yun et al., 2019) of two augmented images, as uint8."""

import math
from dataclasses import dataclass

import numpy as np

from ufo_ds.recipe_task import Augment


@dataclass(frozen=True)
class Mixing:
    """What was drawn: the weight of the first image, and the centre of CutMix' rectangle in shares of height and
    width; without one it is MixUp."""

    weight: float
    centre: tuple[float, float] | None


def draw_mixing(augment: Augment, generator: np.random.Generator) -> Mixing | None:
    """Whether and how a sample is mixed."""
    chance, y, x = generator.random(3).tolist()
    for mix, centre in ((augment.mixup, None), (augment.cutmix, (y, x))):
        if mix is None:
            continue
        if chance < mix.probability:
            return Mixing(float(generator.beta(mix.alpha, mix.alpha)), centre)
        chance -= mix.probability
    return None


def mixed(first_CHW: np.ndarray, second_CHW: np.ndarray, mixing: Mixing) -> tuple[np.ndarray, float]:
    """Mix two images of one size.

    CutMix takes a rectangle of the second, of its proportions and of 1 - weight of its area, and leaves out what of it
    is beyond the border; the weight is then the share of the first that is left.

    Returns:
        uint8 [3, H, W], and the weight of the first.
    """
    if mixing.centre is None:
        weight = np.float32(mixing.weight)
        mean_CHW = second_CHW + weight * (first_CHW.astype(np.float32) - second_CHW)
        return np.rint(mean_CHW).astype(np.uint8), mixing.weight
    _, height, width = first_CHW.shape
    side = math.sqrt(1 - mixing.weight)
    (top, bottom), (left, right) = (
        (max(int(size * centre) - int(size * side) // 2, 0), min(int(size * centre) + int(size * side) // 2, size))
        for size, centre in zip((height, width), mixing.centre, strict=True)
    )
    result_CHW = first_CHW.copy()
    result_CHW[:, top:bottom, left:right] = second_CHW[:, top:bottom, left:right]
    return result_CHW, 1 - (bottom - top) * (right - left) / (height * width)
