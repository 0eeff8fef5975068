"""Pixels: equal to those of transformers' own processor."""

import io

import numpy as np
import pytest
from PIL import Image
from transformers import ViTImageProcessorPil

from ufo_ds.data.transforms import CorruptImage, decode, evaluation_transform, resize_image


def make_image(mode: str, width: int, height: int, seed: int = 0) -> Image.Image:
    generator = np.random.default_rng(seed)
    if mode == "I;16":
        return Image.fromarray(generator.integers(0, 65536, (height, width), dtype=np.uint16))
    channels = {"LA": 2, "RGBA": 4}.get(mode, 3)
    image = Image.fromarray(generator.integers(0, 256, (height, width, channels), dtype=np.uint8))
    return image.convert(mode)


def encode(image: Image.Image, format: str = "png", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def processed(image: Image.Image, input_hw: tuple[int, int]) -> np.ndarray:
    """uint8 [3, H, W] as transformers makes them."""
    processor = ViTImageProcessorPil(
        size={"height": input_hw[0], "width": input_hw[1]},
        resample=Image.Resampling.BILINEAR,
        do_convert_rgb=True,
        do_rescale=False,
        do_normalize=False,
    )
    return processor(image, return_tensors="np")["pixel_values"][0]


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "LA", "RGBA", "CMYK", "I;16"])
@pytest.mark.parametrize(("width", "height"), [(31, 47), (5, 3), (64, 64), (1, 9)])
def test_evaluation_pixels_are_those_of_transformers(mode: str, width: int, height: int) -> None:
    image = make_image(mode, width, height)
    assert image.mode == mode
    data = encode(image, "jpeg" if mode == "CMYK" else "png")
    for input_hw in ((32, 48), (7, 5), (64, 64)):
        pixels = evaluation_transform(data, input_hw)
        assert pixels.dtype == np.uint8
        assert pixels.flags.c_contiguous
        assert pixels.tobytes() == processed(Image.open(io.BytesIO(data)), input_hw).tobytes()
        assert pixels.shape == (3, *input_hw)


def test_transparent_palette_is_laid_over_white() -> None:
    image = make_image("P", 13, 11)
    data = encode(image, transparency=int(np.asarray(image)[4, 5]))
    pixels = evaluation_transform(data, (11, 13))
    assert pixels[:, 4, 5].tolist() == [255, 255, 255]
    assert pixels.tobytes() == processed(Image.open(io.BytesIO(data)), (11, 13)).tobytes()


def test_resize_takes_height_first() -> None:
    assert resize_image(make_image("RGB", 20, 10), (30, 40)).size == (40, 30)


JPEG, PNG = encode(make_image("RGB", 40, 30), "jpeg"), encode(make_image("RGB", 40, 30))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not an image",
        JPEG[:2],
        JPEG[: len(JPEG) // 2],
        PNG[:40],
        PNG[: len(PNG) // 2],
        PNG[:60] + b"\xff" * 40 + PNG[100:],
    ],
)
def test_broken_bytes_are_corrupt_images(data: bytes) -> None:
    with pytest.raises(CorruptImage) as error:
        decode(data)
    assert "BytesIO" not in str(error.value)
