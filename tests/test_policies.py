"""AutoAugment and RandAugment: the published table, and operations against direct calls of Pillow."""

import hashlib
import math
from collections import Counter

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from tests.test_augmentation import Fixed, blurred, noise
from ufo_ds import recipe_file
from ufo_ds.data import policies
from ufo_ds.data.policies import IMAGENET_POLICY, RAND_OPERATIONS, auto_augment, rand_augment
from ufo_ds.errors import UserError
from ufo_ds.recipe_task import AutoAugment, RandAugment
from ufo_ds.seeding import numpy_generator

IMAGE = Image.fromarray(blurred(40, 66) // 2 + 40)  # not of full contrast
GREY, BILINEAR = (128, 128, 128), Image.Resampling.BILINEAR


def same(found: Image.Image, expected: Image.Image) -> bool:
    return found.mode == expected.mode == "RGB" and found.tobytes() == expected.tobytes()


def test_the_table_is_the_published_one() -> None:
    """sha256 of the 25 rows as typed from the paper's table 9: name, probability in tenths, magnitude, twice."""
    assert len(IMAGENET_POLICY) == 25
    rows = "|".join(
        " ".join(f"{name.replace('_', '')} {probability * 10:.0f} {magnitude}" for name, probability, magnitude in pair)
        for pair in IMAGENET_POLICY
    )
    assert (
        hashlib.sha256(rows.encode()).hexdigest() == "0559a2c9d6383913f450f89c5678a7e00291270e426bc3bf932b13785727694c"
    )


def test_randaugment_has_its_fourteen_operations() -> None:
    published = {
        "Identity", "AutoContrast", "Equalize", "Rotate", "Solarize", "Color", "Posterize", "Contrast", "Brightness",
        "Sharpness", "ShearX", "ShearY", "TranslateX", "TranslateY",
    }  # fmt: skip
    assert {name.replace("_", "") for name in RAND_OPERATIONS} == {name.lower() for name in published}
    assert len(RAND_OPERATIONS) == 14


def affine(*back: float) -> Image.Image:
    return IMAGE.transform(IMAGE.size, Image.Transform.AFFINE, back, resample=BILINEAR, fillcolor=GREY)


# At AutoAugment's magnitude 4 of 9 and 9 of 9, to both sides: table 6's ranges in ten steps.
EXPECTED = {
    ("shear_x", 4, 1): lambda: affine(1, 0.3 * 4 / 9, 0, 0, 1, 0),
    ("shear_x", 9, -1): lambda: affine(1, -0.3, 0, 0, 1, 0),
    ("shear_y", 9, 1): lambda: affine(1, 0, 0, 0.3, 1, 0),
    ("translate_x", 9, 1): lambda: affine(1, 0, 30, 0, 1, 0),  # 150 of 331 pixels: 29.9 of 66
    ("translate_x", 4, -1): lambda: affine(1, 0, -13, 0, 1, 0),
    ("translate_y", 9, -1): lambda: affine(1, 0, 0, 0, 1, -18),
    ("rotate", 9, 1): lambda: IMAGE.rotate(30, BILINEAR, fillcolor=GREY),
    ("rotate", 3, -1): lambda: IMAGE.rotate(-10, BILINEAR, fillcolor=GREY),
    ("posterize", 0, 1): lambda: IMAGE,
    ("posterize", 4, 1): lambda: ImageOps.posterize(IMAGE, 6),
    ("posterize", 9, 1): lambda: ImageOps.posterize(IMAGE, 4),
    ("solarize", 0, 1): lambda: IMAGE,
    ("solarize", 4, 1): lambda: ImageOps.solarize(IMAGE, 142),
    ("solarize", 9, 1): lambda: ImageOps.invert(IMAGE),
    ("autocontrast", 4, 1): lambda: ImageOps.autocontrast(IMAGE),
    ("equalize", 4, 1): lambda: ImageOps.equalize(IMAGE),
    ("invert", 4, 1): lambda: ImageOps.invert(IMAGE),
    ("identity", 9, 1): lambda: IMAGE,
    ("color", 9, -1): lambda: ImageEnhance.Color(IMAGE).enhance(0.1),
    ("color", 4, 1): lambda: ImageEnhance.Color(IMAGE).enhance(1.4),
    ("contrast", 9, 1): lambda: ImageEnhance.Contrast(IMAGE).enhance(1.9),
    ("brightness", 9, -1): lambda: ImageEnhance.Brightness(IMAGE).enhance(0.1),
    ("sharpness", 0, 1): lambda: IMAGE,
    ("sharpness", 4, -1): lambda: ImageEnhance.Sharpness(IMAGE).enhance(0.6),
}


@pytest.mark.parametrize(("operation", "magnitude", "side"), EXPECTED)
def test_operations_are_those_of_pillow(operation: str, magnitude: int, side: int) -> None:
    expected = EXPECTED[operation, magnitude, side]()
    assert same(policies.apply(IMAGE, operation, magnitude / 9, side), expected)
    assert (operation == "identity" or magnitude == 0) == same(expected, IMAGE)


def test_a_content_that_moves_right_or_down_leaves_grey_behind() -> None:
    """The side -1 of a translation moves what is seen to the right, or down."""
    moved = np.asarray(policies.apply(IMAGE, "translate_x", 1.0, -1))
    assert (moved[:, :30] == 128).all()
    np.testing.assert_array_equal(moved[:, 30:], np.asarray(IMAGE)[:, :-30])


def test_every_pair_is_applied_as_drawn() -> None:
    pixels = np.asarray(IMAGE)
    for row, pair in enumerate(IMAGENET_POLICY):
        for applied in ((0, 0), (0, 1), (1, 0), (1, 1)):
            u = [0.0 if on else 0.9999 for on in applied]
            found = auto_augment(pixels, AutoAugment(), Fixed(0.5, (row + 0.5) / 25, *u, 0.2, 0.8))
            expected = IMAGE
            for (operation, probability, magnitude), on, side in zip(pair, applied, (1, -1), strict=True):
                if (on and probability > 0) or probability == 1:
                    expected = policies.apply(expected, operation, magnitude / 9, side)
            np.testing.assert_array_equal(found, np.asarray(expected))


def test_operations_come_as_often_as_published(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within 4.5 standard deviations of the table's probabilities, at half of the images."""
    calls: Counter[str] = Counter()
    monkeypatch.setattr(policies, "apply", lambda image, name, *_: calls.update([name]) or image)
    pixels, n = noise(2, 2), 6000
    for i in range(n):
        auto_augment(pixels, AutoAugment(probability=0.5), numpy_generator("often", i))
    for name in {name for pair in IMAGENET_POLICY for name, _, _ in pair}:
        share = sum(probability for pair in IMAGENET_POLICY for other, probability, _ in pair if other == name)
        assert abs(calls[name] - n * 0.5 * share / 25) < 4.5 * math.sqrt(n * 0.5 * share / 25) + 1
    calls.clear()
    for i in range(n // 2):
        rand_augment(pixels, RandAugment(operations=3), numpy_generator("rand", i))
    assert set(calls) == set(RAND_OPERATIONS)
    for count in calls.values():
        assert abs(count - 9000 / 14) < 4.5 * math.sqrt(9000 / 14)


def test_randaugment_is_its_operations_one_after_another() -> None:
    pixels = np.asarray(IMAGE)
    rotate, solarize = (RAND_OPERATIONS.index(name) for name in ("rotate", "solarize"))

    class Drawn:
        def random(self, size: tuple[int, int]) -> np.ndarray:
            assert size == (2, 2)
            return np.array([[(rotate + 0.5) / 14, 0.7], [(solarize + 0.5) / 14, 0.1]])

    found = rand_augment(pixels, RandAugment(operations=2, magnitude=5), Drawn())
    expected = ImageOps.solarize(IMAGE.rotate(-15, BILINEAR, fillcolor=GREY), 128)
    np.testing.assert_array_equal(found, np.asarray(expected))


@pytest.mark.parametrize(
    ("augment", "message"),
    [
        ("{auto_augment: {}, rand_augment: {}}", "glyphs: both auto_augment and rand_augment: remove one of them"),
        ("{auto_augment: {policy: svhn}}", "auto_augment.policy"),
        ("{rand_augment: {magnitude: 11}}", "rand_augment.magnitude"),
        ("{random_resized_crop: {}, resize: [40, 40]}", "glyphs: random_resized_crop takes the place of resize"),
        ("{random_resized_crop: {area: [0.5, 0.2]}}", "area [0.5, 0.2]: give the smaller one first"),
        ("{random_resized_crop: {aspect: [2, 1]}}", "aspect [2.0, 1.0]: give the smaller one first"),
        ("{interpolation: nearest}", "augment.interpolation"),
        ("{jitter: {hue: 0.6}}", "jitter.hue"),
    ],
)
def test_settings_that_do_not_fit(augment: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        recipe_file.load("demo", [("tasks.glyphs.augment", augment)])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_cropped_images_cannot_be_cached() -> None:
    overrides = [("tasks.glyphs.augment", "{random_resized_crop: {}}")]
    recipe_file.load("demo", overrides)
    with pytest.raises(UserError, match=r"glyphs: data.cache keeps resized images, random_resized_crop needs the"):
        recipe_file.load("demo", [*overrides, ("data.cache", "true")])
