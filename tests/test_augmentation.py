"""Augmentation against its description, and against slow and obvious ways to compute the same."""

import colorsys
import dataclasses
import math

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from ufo_ds.data.augmentation import CROP_ATTEMPTS, augmented, crop_box
from ufo_ds.recipe_task import Affine, Augment, AutoAugment, Jitter, RandAugment, RandomResizedCrop
from ufo_ds.seeding import numpy_generator


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    pixels.setflags(write=False)  # whoever writes into it fails
    return pixels


def blurred(height: int, width: int) -> np.ndarray:
    """An image in which a bilinear step of a thousandth of a pixel is less than one value."""
    small = Image.fromarray(noise(6, 6, seed=3))
    return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))


class Fixed:
    """A generator whose next uniform numbers are known."""

    def __init__(self, *numbers: float):
        self.numbers = np.array(numbers)

    def random(self, size: int) -> np.ndarray:
        assert size == len(self.numbers)
        return self.numbers


def test_without_augmentation_pixels_stay() -> None:
    pixels = noise(24, 16)
    np.testing.assert_array_equal(augmented(pixels, (24, 16), Augment(), np.random.default_rng(0)), pixels)


def test_crop_and_flip_give_every_shift_of_the_padded_image() -> None:
    pad, height, width = 1, 3, 4
    plain = noise(height, width)
    padded = np.zeros((height + 2 * pad, width + 2 * pad, 3), dtype=np.uint8)
    padded[pad:-pad, pad:-pad] = plain
    shifts = [padded[y : y + height, x : x + width] for y in range(3) for x in range(3)]
    expected = {view.tobytes() for shift in shifts for view in (shift, shift[:, ::-1])}
    augment = Augment(pad=pad, flip=True)
    drawn = [augmented(plain, (height, width), augment, numpy_generator("crop", n)) for n in range(600)]
    assert {pixels.tobytes() for pixels in drawn} == expected
    assert len(expected) == 18


@pytest.mark.parametrize("pad", [0, 1])
def test_a_larger_image_is_cropped_anywhere(pad: int) -> None:
    larger = noise(5, 4)
    padded = np.pad(larger, ((pad, pad), (pad, pad), (0, 0)))
    windows = {padded[y : y + 3, x : x + 3].tobytes() for y in range(5 + 2 * pad - 2) for x in range(4 + 2 * pad - 2)}
    augment = Augment(pad=pad, resize=(5, 4))
    drawn = [augmented(larger, (3, 3), augment, numpy_generator("crop", n)).tobytes() for n in range(600)]
    assert set(drawn) == windows


def test_half_of_the_images_are_flipped() -> None:
    plain, flips = noise(8, 8), 0
    for n in range(400):
        pixels = augmented(plain, (8, 8), Augment(flip=True), numpy_generator("flip", n))
        flips += int((pixels == plain[:, ::-1]).all())
        assert (pixels == plain).all() or (pixels == plain[:, ::-1]).all()
    assert 160 < flips < 240  # 200 +- 4 standard deviations of 10


@pytest.mark.parametrize("input_hw", [(64, 64), (96, 48)])
def test_erasing_fills_one_rectangle_of_the_published_size_with_noise(input_hw: tuple[int, int]) -> None:
    height, width = input_hw
    plain = np.full((height, width, 3), 7, dtype=np.uint8)
    plain.setflags(write=False)
    erased, values, areas = 0, [], []
    for n in range(400):
        pixels = augmented(plain, input_hw, Augment(erasing=0.5), numpy_generator("erase", n))
        changed = (pixels != 7).any(axis=2)
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
        box = pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        values.append(box.ravel())
        assert (box == 7).mean() < 0.05  # all of it is noise: one value in 256
    assert 160 < erased < 240
    assert min(areas) < 0.06
    assert max(areas) > 0.33
    joined = np.concatenate(values)
    assert abs(joined.mean() - 127.5) < 1
    assert set(np.unique(joined)) == set(range(256))


def bilinear(pixels_HWC: np.ndarray, y: float, x: float) -> np.ndarray:
    """The value at a point, pixel centres at halves; beyond the border the last pixel's."""
    height, width, _ = pixels_HWC.shape
    top, left = math.floor(y - 0.5), math.floor(x - 0.5)
    dy, dx = y - 0.5 - top, x - 0.5 - left

    def at(row: int, column: int) -> np.ndarray:
        return pixels_HWC[min(max(row, 0), height - 1), min(max(column, 0), width - 1)].astype(float)

    upper = (1 - dx) * at(top, left) + dx * at(top, left + 1)
    lower = (1 - dx) * at(top + 1, left) + dx * at(top + 1, left + 1)
    return (1 - dy) * upper + dy * lower


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize(("source_hw", "input_hw"), [((20, 20), (20, 20)), ((30, 17), (24, 12)), ((13, 26), (8, 20))])
def test_affine_is_what_its_description_says(seed: int, source_hw: tuple[int, int], input_hw: tuple[int, int]) -> None:
    """Forward, point by point: the inverse is solved for each pixel, from the five numbers as they are drawn."""
    affine = Affine(rotation=60, scale=(0.5, 2.0), shear=30, translation=0.3)
    u = np.random.default_rng(seed).random(5)
    if seed == 0:
        u = np.array([1.0, 1.0, 0.0, 1.0, 0.0])  # the outermost corner of what can be drawn
    pixels, (h, w), (sh, sw) = blurred(*source_hw), input_hw, source_hw
    found = augmented(pixels, input_hw, Augment(affine=affine), Fixed(*u))
    assert found.shape == (h, w, 3)
    rotation, shear = math.radians(60 * (2 * u[0] - 1)), math.radians(30 * (2 * u[1] - 1))
    scale = 0.5 + 1.5 * u[2]

    def goes_to(x: float, y: float) -> tuple[float, float]:  # in input pixels from the centre
        x = x + math.tan(shear) * y
        x, y = math.cos(rotation) * x - math.sin(rotation) * y, math.sin(rotation) * x + math.cos(rotation) * y
        return scale * x + 0.3 * (2 * u[3] - 1) * w, scale * y + 0.3 * (2 * u[4] - 1) * h

    zero = np.array(goes_to(0, 0))
    linear = np.stack([np.array(goes_to(1, 0)) - zero, np.array(goes_to(0, 1)) - zero], axis=1)
    for row in range(h):
        for column in range(w):
            target = np.array([column + 0.5 - w / 2, row + 0.5 - h / 2])
            x, y = np.linalg.solve(linear, target - zero)
            expected = bilinear(pixels, y * sh / h + sh / 2, x * sw / w + sw / 2)
            np.testing.assert_allclose(found[row, column], expected, atol=1.01)  # Pillow cuts off the fraction


def test_affine_without_a_draw_is_the_image() -> None:
    pixels = noise(12, 9)
    found = augmented(pixels, (12, 9), Augment(affine=Affine()), np.random.default_rng(0))
    np.testing.assert_array_equal(found, pixels)


def test_affine_draws_within_its_bounds_to_both_sides() -> None:
    """A white disc on black: where it lies and how large it is tells translation and scale."""
    y, x = np.mgrid[:64, :64] - 31.5
    disc = np.repeat(((x**2 + y**2 < 100) * 255).astype(np.uint8)[:, :, None], 3, axis=2)
    augment = Augment(affine=Affine(rotation=180, scale=(0.5, 1.5), translation=0.25))
    centres, scales = [], []
    for n in range(300):
        white = augmented(disc, (64, 64), augment, numpy_generator("affine", n))[:, :, 0] / 255
        centres.append([(white * x).sum() / white.sum(), (white * y).sum() / white.sum()])
        scales.append(math.sqrt(white.sum() / (math.pi * 100)))
    assert np.abs(centres).max() < 16.5  # 0.25 x 64
    assert np.abs(np.mean(centres, axis=0)).max() < 16 / math.sqrt(3 * 300) * 4
    assert np.max(centres, axis=0).min() > 13
    assert np.min(centres, axis=0).max() < -13
    assert 0.45 < min(scales) < 0.6
    assert 1.4 < max(scales) < 1.55


@pytest.mark.parametrize("seed", range(20))
def test_jitter_is_the_three_enhancements_of_pillow(seed: int) -> None:
    """In a mild image, where neither clips, the one matrix equals ImageEnhance three times up to its rounding."""
    pixels = (noise(10, 14, seed) // 3 + 80).astype(np.uint8)
    u = np.random.default_rng(seed).random(4)
    u[3] = 0.9
    augment = Augment(jitter=Jitter(brightness=0.2, contrast=0.3, saturation=0.5, grayscale=0.5))
    found = augmented(pixels, (10, 14), augment, Fixed(*u))
    image = Image.fromarray(pixels)
    for enhance, value, number in zip(
        (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color), (0.2, 0.3, 0.5), u, strict=False
    ):
        image = enhance(image).enhance(1 + value * (2 * number - 1))
    np.testing.assert_allclose(found.astype(int), np.asarray(image).astype(int), atol=4)


def test_grayscale_takes_the_colour_and_nothing_else() -> None:
    pixels = noise(9, 9)
    grey = np.asarray(Image.fromarray(pixels).convert("L").convert("RGB")).astype(int)
    augment, found = Augment(jitter=Jitter(grayscale=0.3)), []
    for n in range(400):
        result = augmented(pixels, (9, 9), augment, numpy_generator("grey", n)).astype(int)
        found.append(bool(np.abs(result - grey).max() <= 1))
        assert found[-1] or (result == pixels).all()
    assert 83 < sum(found) < 157  # 120 +- 4 standard deviations of 9.2


def test_jitter_draws_every_factor_between_its_bounds() -> None:
    grey = np.full((4, 4, 3), 100, dtype=np.uint8)
    values = [
        int(augmented(grey, (4, 4), Augment(jitter=Jitter(brightness=0.4)), numpy_generator("b", n))[0, 0, 0])
        for n in range(400)
    ]
    assert 60 <= min(values) < 63
    assert 137 < max(values) <= 140
    assert abs(np.mean(values) - 100) < 40 / math.sqrt(3 * 400) * 4
    half = np.zeros((4, 4, 3), dtype=np.uint8)
    half[:, 2:] = 100
    spread = [
        int(np.ptp(augmented(half, (4, 4), Augment(jitter=Jitter(contrast=0.5)), numpy_generator("c", n))))
        for n in range(400)
    ]
    assert 50 <= min(spread) < 53
    assert max(spread) > 120  # up to 150, but for what clips at black


@pytest.mark.parametrize("seed", range(10))
def test_hue_is_turned_in_hsv(seed: int) -> None:
    """On Pillow's own scale of 256 steps a turn, after the other parts of the jitter."""
    pixels, u = noise(10, 14, seed), np.random.default_rng(seed).random(5)
    pixels = (pixels // 3 + 80).astype(np.uint8)

    class TwoCalls:
        parts = iter((u[:4], u[4]))

        def random(self, size: int | None = None) -> np.ndarray:
            return next(self.parts)

    others = Jitter(brightness=0.2, saturation=0.3)
    before = Image.fromarray(augmented(pixels, (10, 14), Augment(jitter=others), Fixed(*u[:4])))
    found = augmented(pixels, (10, 14), Augment(jitter=dataclasses.replace(others, hue=0.25)), TwoCalls())
    hsv = np.array(before.convert("HSV"))
    hsv[:, :, 0] = np.mod(hsv[:, :, 0] + np.rint(256 * 0.25 * (2 * u[4] - 1)).astype(int), 256)
    expected = np.asarray(Image.fromarray(hsv, mode="HSV").convert("RGB"))
    np.testing.assert_array_equal(found, expected)


def test_turned_red_goes_both_ways_as_far_as_it_may() -> None:
    red = np.zeros((2, 2, 3), dtype=np.uint8)
    red[:, :, 0] = 200
    augment, hues = Augment(jitter=Jitter(hue=0.1)), []
    for n in range(300):
        pixel = augmented(red, (2, 2), augment, numpy_generator("hue", n))[0, 0] / 255
        hues.append((colorsys.rgb_to_hsv(*pixel)[0] + 0.5) % 1 - 0.5)
    assert -0.105 < min(hues) < -0.09
    assert 0.09 < max(hues) < 0.105


# --- random resized crop ----------------------------------------------------------------------------------------------


def attempts(*first: float) -> np.ndarray:
    """Numbers of which the first attempt has these, and the others ask for all of the area at the widest aspect."""
    u_4A = np.tile(np.array([[0.999999], [0.999999], [0.0], [0.0]]), CROP_ATTEMPTS)
    u_4A[:, 0] = first
    return u_4A


def test_crop_by_hand() -> None:
    """Area 0.1 + 0.5 x 0.3 = 0.25 of 100 x 64, aspect 0.5 x 4^0.5 = 1: 40 x 40, at 0.25 x 61 and 0.5 x 25."""
    crop = RandomResizedCrop(area=(0.1, 0.4), aspect=(0.5, 2.0))
    assert crop_box((100, 64), crop, attempts(0.5, 0.5, 0.25, 0.5)) == (15, 12, 40, 40)
    # Aspect 2: width sqrt(1600 x 2) = 56.57, height 28.28.
    assert crop_box((100, 64), crop, attempts(0.5, 1.0, 0.999, 0.0)) == (int(0.999 * 73), 0, 28, 57)


@pytest.mark.parametrize(
    ("size_hw", "expected"),
    [((30, 100), (0, 30, 30, 40)), ((100, 30), (30, 0, 40, 30)), ((30, 36), (0, 0, 30, 36)), ((1, 1), (0, 0, 1, 1))],
)
def test_without_a_fitting_shape_the_middle_is_taken(
    size_hw: tuple[int, int], expected: tuple[int, int, int, int]
) -> None:
    """More than the whole area at a different aspect never fits; the middle has 4 : 3, 3 : 4 or is everything."""
    crop = RandomResizedCrop(area=(1.0, 1.0))
    u_4A = attempts(0.999999, 0.999999, 0.0, 0.0)
    if size_hw == (30, 36):
        u_4A[1] = 0.0
    if size_hw == (1, 1):
        u_4A[1] = 0.5
    assert crop_box(size_hw, crop, u_4A) == expected


def test_the_first_shape_that_fits_counts() -> None:
    crop, u_4A = RandomResizedCrop(area=(0.25, 1.0), aspect=(0.5, 2.0)), attempts(1.0, 1.0, 0.0, 0.0)
    u_4A[:, 3] = (0.0, 0.5, 0.0, 0.999)
    u_4A[:, 4] = (0.0, 0.5, 0.0, 0.0)
    assert crop_box((60, 60), crop, u_4A) == (0, int(0.999 * 31), 30, 30)


def test_crops_are_uniform_in_area_place_and_logarithm_of_the_aspect() -> None:
    """Of a square with areas that always fit: the means of uniform variables, within 4 standard deviations."""
    crop, n = RandomResizedCrop(area=(0.1, 0.5)), 2000
    boxes = np.array([
        crop_box((900, 900), crop, numpy_generator("box", i).random((4, CROP_ATTEMPTS))) for i in range(n)
    ])  # fmt: skip
    top, left, height, width = boxes.T
    for values, low, high in (
        (height * width / 900**2, 0.1, 0.5),
        (np.log(width / height), math.log(3 / 4), math.log(4 / 3)),
        (top / (900 - height), 0.0, 1.0),
        (left / (900 - width), 0.0, 1.0),
    ):
        assert low - 0.005 <= values.min() < low + 0.01 * (high - low) + 0.002
        assert high + 0.005 >= values.max() > high - 0.01 * (high - low) - 0.002
        assert abs(values.mean() - (low + high) / 2) < 4 * (high - low) / math.sqrt(12 * n)


EVERYTHING = Augment(
    resize=(30, 30),
    affine=Affine(rotation=15, scale=(0.8, 1.2), shear=10, translation=0.1),
    auto_augment=AutoAugment(probability=0.8),
    jitter=Jitter(brightness=0.3, contrast=0.3, saturation=0.3, grayscale=0.2, hue=0.1),
    pad=2,
    flip=True,
    erasing=0.5,
)


@pytest.mark.parametrize(
    "augment", [Augment(pad=4, flip=True, erasing=0.5), Augment(rand_augment=RandAugment(), pad=4), EVERYTHING]
)
def test_augmentation_is_a_function_of_the_generator(augment: Augment) -> None:
    pixels = noise(30, 30)
    input_hw = (24, 24) if augment.resize else (30, 30)
    first = [augmented(pixels, input_hw, augment, numpy_generator(0, n)) for n in range(20)]
    again = [augmented(pixels, input_hw, augment, numpy_generator(0, n)) for n in range(20)]
    assert [each.tobytes() for each in first] == [each.tobytes() for each in again]
    assert len({each.tobytes() for each in first}) == 20
    assert {each.shape for each in first} == {(*input_hw, 3)}
