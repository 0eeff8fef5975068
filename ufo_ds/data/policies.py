"""AutoAugment (Cubuk et al., 2019) and RandAugment (Cubuk et al., 2020), with Pillow's operations.

The range of every operation is that of AutoAugment's table 6, from no change at strength 0 to its end at strength 1;
where it has two sides, one is drawn. Translations are there for images of 331 pixels, here shares of the image's size.
What comes in from outside the image is grey.
"""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from ufo_ds.recipe_task import AutoAugment, RandAugment

MAX_SHEAR = 0.3  # columns per row, or rows per column, from the upper left corner
MAX_TRANSLATION = 150 / 331
MAX_ROTATION = 30.0  # degrees
MAX_ENHANCEMENT = 0.9  # of a factor 1
MAX_POSTERIZED = 4  # of 8 bits
GREY = (128, 128, 128)

# AutoAugment's table 9: pairs of an operation, its probability and its magnitude in 0..9. The magnitudes that the table
# gives for equalize, auto-contrast and invert say nothing.
IMAGENET_POLICY: tuple[tuple[tuple[str, float, int], tuple[str, float, int]], ...] = (
    (("posterize", 0.4, 8), ("rotate", 0.6, 9)),
    (("solarize", 0.6, 5), ("autocontrast", 0.6, 5)),
    (("equalize", 0.8, 8), ("equalize", 0.6, 3)),
    (("posterize", 0.6, 7), ("posterize", 0.6, 6)),
    (("equalize", 0.4, 7), ("solarize", 0.2, 4)),
    (("equalize", 0.4, 4), ("rotate", 0.8, 8)),
    (("solarize", 0.6, 3), ("equalize", 0.6, 7)),
    (("posterize", 0.8, 5), ("equalize", 1.0, 2)),
    (("rotate", 0.2, 3), ("solarize", 0.6, 8)),
    (("equalize", 0.6, 8), ("posterize", 0.4, 6)),
    (("rotate", 0.8, 8), ("color", 0.4, 0)),
    (("rotate", 0.4, 9), ("equalize", 0.6, 2)),
    (("equalize", 0.0, 7), ("equalize", 0.8, 8)),
    (("invert", 0.6, 4), ("equalize", 1.0, 8)),
    (("color", 0.6, 4), ("contrast", 1.0, 8)),
    (("rotate", 0.8, 8), ("color", 1.0, 2)),
    (("color", 0.8, 8), ("solarize", 0.8, 7)),
    (("sharpness", 0.4, 7), ("invert", 0.6, 8)),
    (("shear_x", 0.6, 5), ("equalize", 1.0, 9)),
    (("color", 0.4, 0), ("equalize", 0.6, 3)),
    (("equalize", 0.4, 7), ("solarize", 0.2, 4)),
    (("solarize", 0.6, 5), ("autocontrast", 0.6, 5)),
    (("invert", 0.6, 4), ("equalize", 1.0, 8)),
    (("color", 0.6, 4), ("contrast", 1.0, 8)),
    (("equalize", 0.8, 8), ("equalize", 0.6, 3)),
)

# RandAugment's section 3.
RAND_OPERATIONS = (
    "identity", "autocontrast", "equalize", "rotate", "solarize", "color", "posterize", "contrast", "brightness",
    "sharpness", "shear_x", "shear_y", "translate_x", "translate_y",
)  # fmt: skip


def auto_augment(pixels_HWC: np.ndarray, options: AutoAugment, generator: np.random.Generator) -> np.ndarray:
    """Both operations of one of the 25 pairs, each with its probability. Returns uint8 [H, W, 3]."""
    chance, which, *u = generator.random(6)
    if chance >= options.probability:
        return pixels_HWC
    image = Image.fromarray(pixels_HWC)
    pair = IMAGENET_POLICY[int(which * len(IMAGENET_POLICY))]
    for (operation, probability, magnitude), u_apply, u_side in zip(pair, u[:2], u[2:], strict=True):
        if u_apply < probability:
            image = apply(image, operation, magnitude / 9, 1 if u_side < 0.5 else -1)
    return np.asarray(image)


def rand_augment(pixels_HWC: np.ndarray, options: RandAugment, generator: np.random.Generator) -> np.ndarray:
    """Operations drawn from :data:`RAND_OPERATIONS`, one after another. Returns uint8 [H, W, 3]."""
    image = Image.fromarray(pixels_HWC)
    for which, u_side in generator.random((options.operations, 2)):
        operation = RAND_OPERATIONS[int(which * len(RAND_OPERATIONS))]
        image = apply(image, operation, options.magnitude / 10, 1 if u_side < 0.5 else -1)
    return np.asarray(image)


def apply(image: Image.Image, operation: str, strength: float, side: int) -> Image.Image:
    """One operation on an RGB image.

    Args:
        strength: 0..1.
        side: +1 or -1, for operations that have two.
    """
    signed = strength * side
    width, height = image.size
    match operation:
        case "identity":
            return image
        case "shear_x":
            return _affine(image, (1, MAX_SHEAR * signed, 0, 0, 1, 0))
        case "shear_y":
            return _affine(image, (1, 0, 0, MAX_SHEAR * signed, 1, 0))
        case "translate_x":
            return _affine(image, (1, 0, round(MAX_TRANSLATION * signed * width), 0, 1, 0))
        case "translate_y":
            return _affine(image, (1, 0, 0, 0, 1, round(MAX_TRANSLATION * signed * height)))
        case "rotate":
            return image.rotate(MAX_ROTATION * signed, Image.Resampling.BILINEAR, fillcolor=GREY)
        case "posterize":
            return ImageOps.posterize(image, 8 - round(MAX_POSTERIZED * strength))
        case "solarize":
            return ImageOps.solarize(image, round(256 * (1 - strength)))
        case "autocontrast" | "equalize" | "invert":
            plain: Callable[[Image.Image], Image.Image] = getattr(ImageOps, operation)
            return plain(image)
        case "color" | "contrast" | "brightness" | "sharpness":
            return getattr(ImageEnhance, operation.title())(image).enhance(1 + MAX_ENHANCEMENT * signed)
    raise ValueError(f"no operation {operation!r}")


def _affine(image: Image.Image, back: tuple[float, ...]) -> Image.Image:
    """``back`` maps pixels of the result to those of the image."""
    return image.transform(image.size, Image.Transform.AFFINE, back, resample=Image.Resampling.BILINEAR, fillcolor=GREY)
