"""From image bytes to uint8 pixels; they are normalised later, on the device.

Evaluation pixels equal those of ``transformers.ViTImageProcessorPil(do_convert_rgb=True)`` before it rescales, so that
an extracted model meets the same pixels with the stock processor: they are made by Pillow alone. Training decodes JPEG
with libjpeg-turbo directly (simplejpeg), which is faster, and at a fraction of the size where that is enough. The EXIF
orientation is not applied: that processor does not either.
"""

import io
import math
from typing import Literal

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError

# Of an image's header, in any format: 512 MiB as RGB, and the number at which Pillow's own check raises.
MAX_PIXELS = 178_956_970
# Whatever a file is called; not those for which Pillow starts another program.
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF", "PPM")

Interpolation = Literal["bilinear", "bicubic"]


class CorruptImage(Exception):
    """Bytes that are not a complete image, or one of more than :data:`MAX_PIXELS`."""


def decode(data: bytes) -> Image.Image:
    """Decode fully with Pillow, as RGB; transparent pixels are laid over white, as transformers does.

    Raises:
        CorruptImage: not an image, not all of it, or too large a one, which is not decoded.
    """
    return as_rgb(_open(data))


def as_rgb(image: Image.Image) -> Image.Image:
    """The same of an image that Pillow has opened."""
    try:
        image.load()
        if "A" in image.getbands() or image.info.get("transparency") is not None:
            white = Image.new("RGBA", image.size, (255, 255, 255, 255))
            image = Image.alpha_composite(white, image.convert("RGBA"))
        return image.convert("RGB")
    except Exception as error:  # on broken bytes Pillow's decoders raise nearly anything, SyntaxError included
        raise CorruptImage(str(error) or type(error).__name__) from error


def _open(data: bytes) -> Image.Image:
    """Read the header."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:  # its own message prints the BytesIO object
        raise CorruptImage("not an image") from None
    except Exception as error:
        raise CorruptImage(str(error) or type(error).__name__) from error
    _check_size(image.height, image.width)
    return image


def _check_size(height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise CorruptImage(f"{width} x {height} pixels are more than the {MAX_PIXELS} allowed")


def resize_image(image: Image.Image, input_hw: tuple[int, int]) -> Image.Image:
    """Resize to (height, width), bilinear with antialiasing."""
    height, width = input_hw
    return image.resize((width, height), Image.Resampling.BILINEAR)


def evaluation_transform(image: bytes | Image.Image, input_hw: tuple[int, int]) -> np.ndarray:
    """Decode, unless Pillow has done that, and resize.

    Returns:
        uint8 [3, H, W], contiguous.

    Raises:
        CorruptImage: see :func:`decode`.
    """
    rgb = as_rgb(image) if isinstance(image, Image.Image) else decode(image)
    return channels_first(np.asarray(resize_image(rgb, input_hw)))


def channels_first(pixels_HWC: np.ndarray) -> np.ndarray:
    """uint8 [3, H, W], contiguous."""
    return np.ascontiguousarray(pixels_HWC.transpose(2, 0, 1))


# --- training ---------------------------------------------------------------------------------------------------------


def image_size(data: bytes) -> tuple[int, int]:
    """Height and width, from the header.

    Raises:
        CorruptImage: see :func:`decode`.
    """
    size_hw = _jpeg_size(data)
    if size_hw is None:
        image = _open(data)
        size_hw = image.height, image.width
    return size_hw


def decode_pixels(data: bytes, least_hw: tuple[int, int]) -> np.ndarray:
    """Decode for training, as RGB. A JPEG at least twice as large as ``least_hw`` is decoded at the smallest size not
    below it that libjpeg's scaled inverse DCT offers (k / 8 of its size, k = 1 to 4).

    Anything that simplejpeg does not read as Pillow does (CMYK) or finds a fault with is left to Pillow.

    Returns:
        uint8 [H, W, 3].

    Raises:
        CorruptImage: see :func:`decode`.
    """
    if _jpeg_size(data) is not None:
        least_h, least_w = least_hw
        try:
            # Larger fractions take longer to decode than the whole image: min_factor leaves them out.
            return simplejpeg.decode_jpeg(data, min_height=least_h, min_width=least_w, min_factor=2)
        except ValueError:
            pass
    return np.array(decode(data))  # a copy of its own, as torch wants writable memory


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Height and width of a JPEG that simplejpeg decodes as Pillow does, else None."""
    if not data.startswith(b"\xff\xd8"):
        return None
    try:
        height, width, colors, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    _check_size(height, width)
    return (height, width) if colors in ("YCbCr", "Gray", "RGB") else None


def resize_pixels(pixels_HWC: np.ndarray, hw: tuple[int, int], interpolation: Interpolation) -> np.ndarray:
    """Resize with antialiasing by torch: Pillow's filters in a third of its time. Values are up to 1 off Pillow's,
    bicubic ones more in a few places, where the filter overshoots black or white between its two passes.

    Returns:
        uint8 [h, w, 3], the same array if it has that size.
    """
    if pixels_HWC.shape[:2] == hw:
        return pixels_HWC
    pixels_1CHW = torch.from_numpy(pixels_HWC).permute(2, 0, 1)[None]
    return F.interpolate(pixels_1CHW, hw, mode=interpolation, antialias=True)[0].permute(1, 2, 0).numpy()


def resized_pixels(data: bytes, hw: tuple[int, int], interpolation: Interpolation | None = None) -> np.ndarray:
    """Decode for training and resize to (height, width); without ``interpolation`` as in evaluation.

    Returns:
        uint8 [h, w, 3].

    Raises:
        CorruptImage: see :func:`decode`.
    """
    pixels_HWC = decode_pixels(data, hw)
    if interpolation is None:
        return np.asarray(resize_image(Image.fromarray(pixels_HWC), hw))
    return resize_pixels(pixels_HWC, hw, interpolation)


def cropped_pixels(
    data: bytes, box: tuple[int, int, int, int], hw: tuple[int, int], interpolation: Interpolation
) -> np.ndarray:
    """Decode for training and resize a part of the image to (height, width), in one interpolation.

    Args:
        box: top, left, height and width in pixels of the whole image (:func:`image_size`). Where that is decoded at a
            fraction of its size, the box is rounded to pixels of the smaller one.

    Returns:
        uint8 [h, w, 3].

    Raises:
        CorruptImage: see :func:`decode`.
    """
    size_hw, (top, left, *box_hw) = image_size(data), box
    least_hw = [math.ceil(out * whole / part) for out, whole, part in zip(hw, size_hw, box_hw, strict=True)]
    pixels_HWC = decode_pixels(data, (least_hw[0], least_hw[1]))
    y, x = (found / whole for found, whole in zip(pixels_HWC.shape, size_hw, strict=False))
    rows = slice(round(top * y), max(round((top + box_hw[0]) * y), round(top * y) + 1))
    columns = slice(round(left * x), max(round((left + box_hw[1]) * x), round(left * x) + 1))
    return resize_pixels(pixels_HWC[rows, columns], hw, interpolation)
