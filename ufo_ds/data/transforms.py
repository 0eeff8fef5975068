"""From image bytes to uint8 pixels, with Pillow and numpy; pixels are normalised later, on the device.

Evaluation pixels equal those of ``transformers.ViTImageProcessorPil(do_convert_rgb=True)`` before it rescales, so that
an extracted model meets the same pixels with the stock processor.
"""

import io

import numpy as np
from PIL import Image, UnidentifiedImageError

from ufo_ds.recipe import Augment

# Random Erasing (Zhong et al., 2020), section 4.1: the erased share of the area and its height / width.
ERASING_AREA = (0.02, 0.4)
ERASING_ASPECT = (0.3, 1 / 0.3)
ERASING_ATTEMPTS = 100


class CorruptImage(Exception):
    """Bytes that are not a complete image."""


def decode(data: bytes) -> Image.Image:
    """Decode fully, as RGB; transparent pixels are laid over white, as transformers does.

    Raises:
        CorruptImage: not an image, or not all of it.
    """
    try:
        image: Image.Image = Image.open(io.BytesIO(data))
        image.load()
        if "A" in image.getbands() or image.info.get("transparency") is not None:
            white = Image.new("RGBA", image.size, (255, 255, 255, 255))
            image = Image.alpha_composite(white, image.convert("RGBA"))
        return image.convert("RGB")
    except UnidentifiedImageError:  # its own message prints the BytesIO object
        raise CorruptImage("not an image") from None
    except Exception as error:  # on broken bytes Pillow's decoders raise nearly anything, SyntaxError included
        raise CorruptImage(str(error) or type(error).__name__) from error


def resize_image(image: Image.Image, input_hw: tuple[int, int]) -> Image.Image:
    """Resize to (height, width), bilinear with antialiasing."""
    height, width = input_hw
    return image.resize((width, height), Image.Resampling.BILINEAR)


def evaluation_transform(data: bytes, input_hw: tuple[int, int]) -> np.ndarray:
    """Decode and resize.

    Returns:
        uint8 [3, H, W], contiguous.

    Raises:
        CorruptImage: see :func:`decode`.
    """
    return _channels_first(np.asarray(resize_image(decode(data), input_hw)))


def training_transform(
    data: bytes, input_hw: tuple[int, int], augment: Augment, generator: np.random.Generator
) -> np.ndarray:
    """Decode, resize, then what ``augment`` asks for: pad and crop, flip, erase.

    Returns:
        uint8 [3, H, W], contiguous.

    Raises:
        CorruptImage: see :func:`decode`; nothing has been drawn from ``generator`` then.
    """
    pixels_HWC = np.array(resize_image(decode(data), input_hw))
    if augment.pad:
        pixels_HWC = _pad_and_crop(pixels_HWC, augment.pad, generator)
    if augment.flip and generator.random() < 0.5:
        pixels_HWC = pixels_HWC[:, ::-1]
    if augment.erasing:
        _erase(pixels_HWC, augment.erasing, generator)
    return _channels_first(pixels_HWC)


def _pad_and_crop(pixels_HWC: np.ndarray, pad: int, generator: np.random.Generator) -> np.ndarray:
    height, width, _ = pixels_HWC.shape
    top, left = generator.integers(0, 2 * pad + 1, size=2)
    padded = np.pad(pixels_HWC, ((pad, pad), (pad, pad), (0, 0)))
    return padded[top : top + height, left : left + width]


def _erase(pixels_HWC: np.ndarray, probability: float, generator: np.random.Generator) -> None:
    """Fill, in place, the first drawn rectangle that fits with random bytes."""
    height, width, _ = pixels_HWC.shape
    chance = generator.random()
    # All attempts at once, so that the number of draws before the fill does not depend on their outcome.
    area, aspect, top, left = generator.random((4, ERASING_ATTEMPTS))
    area = height * width * (ERASING_AREA[0] + area * (ERASING_AREA[1] - ERASING_AREA[0]))
    aspect = ERASING_ASPECT[0] + aspect * (ERASING_ASPECT[1] - ERASING_ASPECT[0])
    heights = np.rint(np.sqrt(area * aspect)).astype(int)
    widths = np.rint(np.sqrt(area / aspect)).astype(int)
    fitting = np.flatnonzero((heights <= height) & (widths <= width))
    if chance >= probability or not len(fitting):
        return
    first = fitting[0]
    h, w = heights[first], widths[first]
    y, x = int(top[first] * (height - h + 1)), int(left[first] * (width - w + 1))
    pixels_HWC[y : y + h, x : x + w] = generator.integers(0, 256, size=(h, w, 3), dtype=np.uint8)


def _channels_first(pixels_HWC: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(pixels_HWC.transpose(2, 0, 1))
