"""Pixels: equal to those of transformers' own processor; augmentation against its description."""

import io

import numpy as np
import pytest
from PIL import Image
from transformers import ViTImageProcessorPil

from ufo_ds.data.transforms import CorruptImage, decode, evaluation_transform, resize_image, training_transform
from ufo_ds.recipe import Augment
from ufo_ds.seeding import numpy_generator

PLAIN = Augment()


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


def test_without_augmentation_training_is_evaluation() -> None:
    data, generator = encode(make_image("RGB", 31, 47)), np.random.default_rng(0)
    np.testing.assert_array_equal(
        training_transform(data, (24, 16), PLAIN, generator), evaluation_transform(data, (24, 16))
    )


def test_crop_and_flip_give_every_shift_of_the_padded_image() -> None:
    data, pad, height, width = encode(make_image("RGB", 4, 3)), 1, 3, 4
    plain = evaluation_transform(data, (height, width))
    padded = np.zeros((3, height + 2 * pad, width + 2 * pad), dtype=np.uint8)
    padded[:, pad:-pad, pad:-pad] = plain
    shifts = [padded[:, y : y + height, x : x + width] for y in range(3) for x in range(3)]
    expected = {view.tobytes() for shift in shifts for view in (shift, shift[:, :, ::-1])}
    augment = Augment(pad=pad, flip=True)
    drawn = [training_transform(data, (height, width), augment, numpy_generator("crop", n)) for n in range(600)]
    assert {pixels.tobytes() for pixels in drawn} == expected
    assert len(expected) == 18
    assert all(pixels.flags.c_contiguous and pixels.shape == (3, height, width) for pixels in drawn)


def test_half_of_the_images_are_flipped() -> None:
    data = encode(make_image("RGB", 8, 8))
    plain = evaluation_transform(data, (8, 8))
    flips = 0
    for n in range(400):
        pixels = training_transform(data, (8, 8), Augment(flip=True), numpy_generator("flip", n))
        flips += int((pixels == plain[:, :, ::-1]).all())
        assert (pixels == plain).all() or (pixels == plain[:, :, ::-1]).all()
    assert 160 < flips < 240  # 200 +- 4 standard deviations of 10


@pytest.mark.parametrize("input_hw", [(64, 64), (96, 48)])
def test_erasing_fills_one_rectangle_of_the_published_size_with_noise(input_hw: tuple[int, int]) -> None:
    height, width = input_hw
    data = encode(Image.new("RGB", (width, height), (7, 7, 7)))
    erased, noise, areas = 0, [], []
    for n in range(400):
        pixels = training_transform(data, input_hw, Augment(erasing=0.5), numpy_generator("erase", n))
        changed = (pixels != 7).any(axis=0)
        if not changed.any():
            continue
        erased += 1
        rows, columns = np.flatnonzero(changed.any(axis=1)), np.flatnonzero(changed.any(axis=0))
        h, w = rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1
        areas.append(h * w / (height * width))
        # Half a pixel of rounding on either side.
        assert (h + 0.5) / (w - 0.5) >= 0.3
        assert (h - 0.5) / (w + 0.5) <= 1 / 0.3
        assert (h + 0.5) * (w + 0.5) >= 0.02 * height * width
        assert (h - 0.5) * (w - 0.5) <= 0.4 * height * width
        box = pixels[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        noise.append(box.ravel())
        assert (box == 7).mean() < 0.05  # all of it is noise: one value in 256
    assert 160 < erased < 240
    assert min(areas) < 0.06
    assert max(areas) > 0.33
    values = np.concatenate(noise)
    assert abs(values.mean() - 127.5) < 1
    assert set(np.unique(values)) == set(range(256))


def test_augmentation_is_a_function_of_the_generator() -> None:
    data, augment = encode(make_image("RGB", 30, 30)), Augment(pad=4, flip=True, erasing=0.5)
    first = [training_transform(data, (24, 24), augment, numpy_generator(0, n)).tobytes() for n in range(20)]
    again = [training_transform(data, (24, 24), augment, numpy_generator(0, n)).tobytes() for n in range(20)]
    assert first == again
    assert len(set(first)) == 20
