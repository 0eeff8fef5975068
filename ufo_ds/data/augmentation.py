"""What training does to pixels, drawn from the generator of the sample's draw: the same on any rank and any day."""

import math

import numpy as np
from PIL import Image

from ufo_ds.data import policies
from ufo_ds.recipe_task import Affine, Augment, Jitter, RandomResizedCrop, Size

# Random Erasing (Zhong et al., 2020), section 4.1: the erased share of the area and its height / width.
ERASING_AREA = (0.02, 0.4)
ERASING_ASPECT = (0.3, 1 / 0.3)
ERASING_ATTEMPTS = 100

CROP_ATTEMPTS = 10

LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601, as Pillow's mode "L"


def augmented(pixels_HWC: np.ndarray, input_hw: Size, augment: Augment, generator: np.random.Generator) -> np.ndarray:
    """What ``augment`` asks for after the resize: affine, policy, jitter, pad and crop, flip, erase, in this order.

    An image larger than the input is brought to its size by ``affine``, else by the random crop.

    Args:
        pixels_HWC: uint8, at least as large as the input; not changed.

    Returns:
        uint8 [h, w, 3], maybe a view of ``pixels_HWC``.
    """
    if augment.affine is not None:
        pixels_HWC = _affine(pixels_HWC, input_hw, augment.affine, generator)
    if augment.auto_augment is not None:
        pixels_HWC = policies.auto_augment(pixels_HWC, augment.auto_augment, generator)
    if augment.rand_augment is not None:
        pixels_HWC = policies.rand_augment(pixels_HWC, augment.rand_augment, generator)
    if augment.jitter is not None:
        pixels_HWC = _jitter(pixels_HWC, augment.jitter, generator)
    if augment.pad or pixels_HWC.shape[:2] != input_hw:
        pixels_HWC = _pad_and_crop(pixels_HWC, input_hw, augment.pad, generator)
    if augment.flip and generator.random() < 0.5:
        pixels_HWC = pixels_HWC[:, ::-1]
    if augment.erasing:
        pixels_HWC = _erase(pixels_HWC, augment.erasing, generator)
    return pixels_HWC


def crop_box(size_hw: Size, crop: RandomResizedCrop, u_4A: np.ndarray) -> tuple[int, int, int, int]:
    """The part of an image that is taken.

    The first of ten drawn shapes that fits counts; if none does, the largest part in the centre whose aspect is within
    its bounds. Area, aspect and place are independent of each other.

    Args:
        u_4A: uniform numbers in 0..1, for area, aspect, top and left of :data:`CROP_ATTEMPTS` attempts.

    Returns:
        Top, left, height and width in pixels.
    """
    height, width = size_hw
    smallest, largest = crop.area
    narrowest, widest = crop.aspect
    for u_area, u_aspect, u_top, u_left in u_4A.T.tolist():
        area = height * width * (smallest + u_area * (largest - smallest))
        aspect = narrowest * (widest / narrowest) ** u_aspect
        h, w = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < h <= height and 0 < w <= width:
            return int(u_top * (height - h + 1)), int(u_left * (width - w + 1)), h, w
    h, w = min(height, max(1, round(width / narrowest))), min(width, max(1, round(height * widest)))
    return (height - h) // 2, (width - w) // 2, h, w


def _affine(pixels_HWC: np.ndarray, input_hw: Size, affine: Affine, generator: np.random.Generator) -> np.ndarray:
    """Map the whole image onto the input, where a point at p, in input pixels from the centre, goes to s R K p + t.

    K shears, x + tan(shear) y; R rotates; s scales; t = (x, y) * translation * (width, height). Angles are uniform in
    +-``shear`` and +-``rotation``, s is uniform in ``scale``, x and y in +-1. One bilinear interpolation; beyond its
    border the image goes on as its last pixel does.

    Returns:
        uint8 [h, w, 3].
    """
    (height, width), (source_height, source_width) = input_hw, pixels_HWC.shape[:2]
    matrix, shift = _draw_affine(affine, generator)
    back = np.diag([source_width / width, source_height / height]) @ np.linalg.inv(matrix)
    x, y = np.array([width, height]) / 2 + shift * (width, height)  # where the centre goes
    # The rows and columns that the corners reach beyond the image, and half a pixel more against rounding, so that none
    # of the input is left without pixels.
    corners = back @ np.array([[-x, width - x, -x, width - x], [-y, -y, height - y, height - y]])
    reach_x, reach_y = np.abs(corners).max(axis=1)
    margin_x = max(0, math.ceil(reach_x - source_width / 2 + 0.5))
    margin_y = max(0, math.ceil(reach_y - source_height / 2 + 0.5))
    rows = np.arange(-margin_y, source_height + margin_y).clip(0, source_height - 1)
    columns = np.arange(-margin_x, source_width + margin_x).clip(0, source_width - 1)
    padded = Image.fromarray(pixels_HWC.take(rows, axis=0).take(columns, axis=1))
    (a, b), (d, e) = back
    c = padded.width / 2 - a * x - b * y
    f = padded.height / 2 - d * x - e * y
    moved = padded.transform(
        (width, height), Image.Transform.AFFINE, (a, b, c, d, e, f), resample=Image.Resampling.BILINEAR
    )
    return np.asarray(moved)


def _draw_affine(affine: Affine, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The matrix s R K and the shift in shares of width and height."""
    u_rotation, u_shear, u_scale, *u_shift = generator.random(5)
    rotation = math.radians(affine.rotation) * (2 * u_rotation - 1)
    shear = math.tan(math.radians(affine.shear) * (2 * u_shear - 1))
    smallest, largest = affine.scale
    scale = smallest + u_scale * (largest - smallest)
    cos, sin = math.cos(rotation), math.sin(rotation)
    matrix = scale * np.array([[cos, -sin], [sin, cos]]) @ np.array([[1, shear], [0, 1]])
    return matrix, affine.translation * (2 * np.array(u_shift) - 1)


def _jitter(pixels_HWC: np.ndarray, jitter: Jitter, generator: np.random.Generator) -> np.ndarray:
    """Multiply by the brightness; move away from the image's mean grey by the contrast; from each pixel's own grey by
    the saturation, which is 0 with probability ``grayscale``. Each factor is uniform in 1 +- its value.

    The three are one matrix and one offset, so values are rounded and clipped once. Then the hue is turned by a share
    of a full turn, uniform in +- its value.
    """
    u_brightness, u_contrast, u_saturation, chance = generator.random(4)
    brightness = 1 + jitter.brightness * (2 * u_brightness - 1)
    contrast = 1 + jitter.contrast * (2 * u_contrast - 1)
    saturation = 0.0 if chance < jitter.grayscale else 1 + jitter.saturation * (2 * u_saturation - 1)
    image = Image.fromarray(pixels_HWC)
    mean_grey = np.asarray(image.convert("L")).mean()
    matrix = np.empty((3, 4))
    matrix[:, :3] = brightness * contrast * (saturation * np.eye(3) + (1 - saturation) * LUMA)
    matrix[:, 3] = brightness * (1 - contrast) * mean_grey
    image = image.convert("RGB", tuple(matrix.ravel().tolist()))
    if jitter.hue:
        turn = jitter.hue * (2 * generator.random() - 1)
        hue, *others = image.convert("HSV").split()
        hue = hue.point([round(value + 256 * turn) % 256 for value in range(256)])
        image = Image.merge("HSV", (hue, *others)).convert("RGB")
    return np.asarray(image)


def _pad_and_crop(pixels_HWC: np.ndarray, input_hw: Size, pad: int, generator: np.random.Generator) -> np.ndarray:
    """A window of the input's size, anywhere in the image with ``pad`` black pixels on every side."""
    (height, width), (source_height, source_width) = input_hw, pixels_HWC.shape[:2]
    top, left = (int(generator.integers(0, n + 2 * pad + 1)) for n in (source_height - height, source_width - width))
    if not pad:
        return pixels_HWC[top : top + height, left : left + width]
    window = np.zeros((height, width, 3), dtype=np.uint8)
    y, x = pad - top, pad - left  # where the image's corner is in the window
    part = pixels_HWC[max(-y, 0) : height - y, max(-x, 0) : width - x]
    y, x = max(y, 0), max(x, 0)
    window[y : y + part.shape[0], x : x + part.shape[1]] = part
    return window


def _erase(pixels_HWC: np.ndarray, probability: float, generator: np.random.Generator) -> np.ndarray:
    """Fill the first drawn rectangle that fits with random bytes."""
    height, width, _ = pixels_HWC.shape
    if generator.random() >= probability:
        return pixels_HWC
    # All attempts at once, so that the number of draws before the fill does not depend on their outcome.
    area, aspect, top, left = generator.random((4, ERASING_ATTEMPTS))
    area = height * width * (ERASING_AREA[0] + area * (ERASING_AREA[1] - ERASING_AREA[0]))
    aspect = ERASING_ASPECT[0] + aspect * (ERASING_ASPECT[1] - ERASING_ASPECT[0])
    heights = np.rint(np.sqrt(area * aspect)).astype(int)
    widths = np.rint(np.sqrt(area / aspect)).astype(int)
    fitting = np.flatnonzero((heights <= height) & (widths <= width))
    if not len(fitting):
        return pixels_HWC
    first = fitting[0]
    h, w = heights[first], widths[first]
    y, x = int(top[first] * (height - h + 1)), int(left[first] * (width - w + 1))
    erased = pixels_HWC.copy()
    erased[y : y + h, x : x + w] = generator.integers(0, 256, size=(h, w, 3), dtype=np.uint8)
    return erased
