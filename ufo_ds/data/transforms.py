"""From image bytes to uint8 pixels, with Pillow and numpy; pixels are normalised later, on the device.

Evaluation pixels equal those of ``transformers.ViTImageProcessorPil(do_convert_rgb=True)`` before it rescales, so that
an extracted model meets the same pixels with the stock processor.
"""

import io

import numpy as np
from PIL import Image, UnidentifiedImageError


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


def resized_pixels(data: bytes, hw: tuple[int, int]) -> np.ndarray:
    """Decode and resize to (height, width).

    Returns:
        uint8 [H, W, 3], read-only.

    Raises:
        CorruptImage: see :func:`decode`.
    """
    return np.asarray(resize_image(decode(data), hw))


def evaluation_transform(data: bytes, input_hw: tuple[int, int]) -> np.ndarray:
    """Decode and resize.

    Returns:
        uint8 [3, H, W], contiguous.

    Raises:
        CorruptImage: see :func:`decode`.
    """
    return channels_first(resized_pixels(data, input_hw))


def channels_first(pixels_HWC: np.ndarray) -> np.ndarray:
    """uint8 [3, H, W], contiguous."""
    return np.ascontiguousarray(pixels_HWC.transpose(2, 0, 1))
