"""MixUp and CutMix: pixels and weights by hand, and the same mixed samples from any split."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.test_mixing import ACCUMULATION, break_image, linear_task, make_shards, reading
from ufo_ds import recipe_file
from ufo_ds.data.mixing import Batches, loader
from ufo_ds.data.mixup import Mixing, draw_mixing, mixed
from ufo_ds.data.source import TrainSource
from ufo_ds.errors import UserError
from ufo_ds.recipe_task import Augment, Mix
from ufo_ds.seeding import numpy_generator

COUNTS = {"a": 4, "b": 5, "c": 6}
BOTH = Augment(pad=1, flip=True, mixup=Mix(alpha=1.0, probability=0.4), cutmix=Mix(alpha=0.8, probability=0.4))


def noise(seed: int, height: int = 12, width: int = 20) -> np.ndarray:
    pixels = np.random.default_rng(seed).integers(0, 256, (3, height, width), dtype=np.uint8)
    pixels.setflags(write=False)
    return pixels


def test_mixup_is_the_rounded_weighted_mean() -> None:
    first, second = noise(0), noise(1)
    for weight in (0.0, 0.25, 0.7, 1.0):
        found, kept = mixed(first, second, Mixing(weight, None))
        exact = weight * first.astype(float) + (1 - weight) * second
        assert found.dtype == np.uint8
        assert np.abs(found - exact).max() <= 0.501
        assert kept == weight


@pytest.mark.parametrize(
    ("weight", "centre", "rows", "columns"),
    [
        # sqrt(1 - 0.75) = half of 12 and of 20, around row 6 and column 10
        (0.75, (0.5, 0.5), (3, 9), (5, 15)),
        (0.75, (0.0, 0.99), (0, 3), (14, 20)),  # around row 0 and column 19, as far as the image goes
        (1.0, (0.5, 0.5), (6, 6), (10, 10)),
        (0.0, (0.5, 0.5), (0, 12), (0, 20)),
    ],
)
def test_cutmix_by_hand(
    weight: float, centre: tuple[float, float], rows: tuple[int, int], columns: tuple[int, int]
) -> None:
    first, second = noise(0), noise(1)
    found, kept = mixed(first, second, Mixing(weight, centre))
    inside = np.zeros((12, 20), dtype=bool)
    inside[slice(*rows), slice(*columns)] = True
    np.testing.assert_array_equal(found, np.where(inside, second, first))
    assert kept == pytest.approx(1 - inside.mean())


def test_draws_have_their_probabilities_and_beta_distribution() -> None:
    """Means and variances within 4.5 standard deviations; the variance of Beta(a, a) is 1 / (4 (2 a + 1))."""
    n = 3000
    drawn = [draw_mixing(BOTH, numpy_generator("draw", i)) for i in range(n)]
    of = {True: [], False: []}
    for mixing in drawn:
        if mixing is not None:
            of[mixing.centre is None].append(mixing.weight)
    for is_mixup, alpha in ((True, 1.0), (False, 0.8)):
        weights, variance = np.array(of[is_mixup]), 1 / (4 * (2 * alpha + 1))
        assert abs(len(weights) - 0.4 * n) < 4.5 * math.sqrt(0.24 * n)
        assert abs(weights.mean() - 0.5) < 4.5 * math.sqrt(variance / len(weights))
        assert abs(weights.var() / variance - 1) < 0.1
    centres = np.array([mixing.centre for mixing in drawn if mixing is not None and mixing.centre])
    assert np.abs(centres.mean(axis=0) - 0.5).max() < 4.5 / math.sqrt(12 * len(centres))
    assert all(draw_mixing(Augment(mixup=Mix(probability=1.0)), numpy_generator(i)) for i in range(50))
    assert not any(draw_mixing(Augment(), numpy_generator(i)) for i in range(50))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> TrainSource:
    shards = make_shards(tmp_path_factory.mktemp("mix"), COUNTS)
    return TrainSource.open(dataclasses.replace(linear_task("glyphs", shards), augment=BOTH), seed=3)


def test_a_mixed_sample_is_the_plain_one_and_another_of_the_task(source: TrainSource) -> None:
    """With nothing else random the partner is found by taking the plain sample out again."""
    plain_task = dataclasses.replace(source.task, augment=dataclasses.replace(BOTH, pad=0, flip=False))
    plain = TrainSource(plain_task, 3, source._sets)
    images = np.stack([plain.pixels(n) for n in range(len(plain))])
    partners, kinds = [], {"none": 0, "mixup": 0, "cutmix": 0}
    for draw in range(300):
        pixels, label, other_label, weight, skipped = plain.load_mixed(draw)
        first, _, _ = plain.load(draw)
        assert (label, skipped) == (plain.labels[plain.index(draw)], [])
        if (weight, other_label) == (1.0, label) and (pixels == first).all():
            kinds["none"] += 1
            continue
        means = np.abs(pixels - (weight * first.astype(float) + (1 - weight) * images)).max(axis=(1, 2, 3)) <= 0.51
        patches = ((pixels == first) | (pixels == images)).all(axis=(1, 2, 3))
        found = np.flatnonzero(means | patches)
        assert other_label in plain.labels[found]
        if len(found) == 1:
            partners.append(int(found[0]))
            kinds["mixup" if means[found[0]] else "cutmix"] += 1
            if patches[found[0]] and not means[found[0]]:
                changed = (pixels != first).any(axis=0).mean()  # pixels may be alike by chance
                assert changed <= 1 - weight + 1e-6
                assert changed > 0.9 * (1 - weight) - 0.02
    assert set(partners) == set(range(15))
    assert min(kinds.values()) > 30


def test_mixed_samples_are_a_function_of_the_draw(source: TrainSource, tmp_path: Path) -> None:
    """The same from a whole batch, from parts of it, from another process, and from another object."""
    whole = Batches({"glyphs": source}, reading(glyphs=range(4)), ACCUMULATION)
    parts = [Batches({"glyphs": source}, reading(glyphs=part), ACCUMULATION) for part in (range(1), range(1, 4))]
    for i, of_worker in enumerate(loader(whole, 0, 6, workers=1, pin=False)):
        expected, found = whole[i].tasks["glyphs"], [part[i].tasks["glyphs"] for part in parts]
        for field in ("images", "labels", "mix_labels", "mix_weight"):
            assert torch.equal(torch.cat([getattr(part, field) for part in found]), getattr(expected, field))
            assert torch.equal(getattr(of_worker.tasks["glyphs"], field), getattr(expected, field))
        assert (expected.mix_labels.dtype, expected.mix_weight.dtype) == (torch.int64, torch.float32)
        for place in range(4):
            pixels, label, other, weight, _ = source.load_mixed(4 * i + place)
            assert expected.images[place].numpy().tobytes() == pixels.tobytes()
            assert (expected.labels[place], expected.mix_labels[place]) == (label, other)
            assert expected.mix_weight[place] == np.float32(weight)
        moved = expected.to("cpu")
        assert torch.equal(moved.mix_weight, expected.mix_weight)


def test_a_partner_that_cannot_be_read_is_replaced(tmp_path: Path) -> None:
    shards = make_shards(tmp_path, {"a": 1, "b": 2})
    task = dataclasses.replace(linear_task("glyphs", shards), augment=Augment(mixup=Mix(probability=1.0)))
    source = TrainSource.open(task, seed=0)
    break_image(shards, tmp_path / "images" / "b_1.png")
    skipped = [source.load_mixed(draw)[4] for draw in range(40)]
    assert {tuple(each) for each in skipped} == {(), (2,), (2, 2)}


def test_a_task_that_does_not_mix_has_no_mix_labels(tmp_path: Path) -> None:
    plain = TrainSource.open(linear_task("glyphs", make_shards(tmp_path, COUNTS)), seed=3)
    part = Batches({"glyphs": plain}, reading(glyphs=range(4)), ACCUMULATION)[0].tasks["glyphs"].to("cpu")
    assert part.mix_labels is None
    assert part.mix_weight is None


@pytest.mark.parametrize(
    ("task", "augment", "message"),
    [
        ("glyphs", "{mixup: {}}", "glyphs: mixup and cutmix are for a linear head without triplet"),
        ("digits", "{mixup: {probability: 0.6}, cutmix: {}}", "digits: the probabilities of mixup and cutmix add up"),
        ("digits", "{cutmix: {alpha: 0}}", "cutmix.alpha"),
    ],
)
def test_settings_that_do_not_fit(task: str, augment: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        recipe_file.load("demo", [(f"tasks.{task}.augment", augment)])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
