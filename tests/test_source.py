"""Quarter turns as classes and the cache of decoded images: the same samples as without, found the slow way."""

import dataclasses
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.test_mixing import break_image, make_shards, margin_task
from ufo_ds import recipe_file
from ufo_ds.data.augmentation import CROP_ATTEMPTS, crop_box
from ufo_ds.data.mixing import Batches, loader
from ufo_ds.data.source import TrainSource
from ufo_ds.data.transforms import evaluation_transform
from ufo_ds.errors import UserError
from ufo_ds.recipe_task import Augment, RandomResizedCrop, Task
from ufo_ds.seeding import numpy_generator

COUNTS = {"p1": 2, "p2": 3, "p3": 3}


def turning_task(shards: str, **changes: object) -> Task:
    task = margin_task("signs", shards, samples_per_step=12, identities_per_step=6)
    return dataclasses.replace(task, input=(8, 8), augment=Augment(), quarter_turns=True, **changes)


def files_of(root: Path) -> list[Path]:
    return [root / "images" / f"{name}_{n}.png" for name, count in COUNTS.items() for n in range(count)]


@pytest.mark.parametrize("identities_per_step", [6, None])
def test_every_turn_of_every_image_once_per_epoch(tmp_path: Path, identities_per_step: int | None) -> None:
    """Each draw is the picture turned as often as its class says, and all 4 x 8 come before one comes again."""
    source = TrainSource.open(
        turning_task(make_shards(tmp_path, COUNTS), identities_per_step=identities_per_step), seed=1
    )
    assert (len(source), source.num_classes) == (8, 12)
    assert source.classes == ["p1", "p2", "p3"] + [f"{p} turned {t}" for t in (90, 180, 270) for p in COUNTS]
    plain = [evaluation_transform(file.read_bytes(), (8, 8)) for file in files_of(tmp_path)]
    seen: list[tuple[int, int]] = []
    for draw in range(96):
        pixels, label, skipped = source.load(draw)
        assert skipped == []
        name, _, angle = source.classes[label].partition(" turned ")
        turns = int(angle or 0) // 90
        upright = np.rot90(pixels, -turns, axes=(1, 2))
        (image,) = [n for n, candidate in enumerate(plain) if (candidate == upright).all()]
        assert files_of(tmp_path)[image].name.startswith(name)
        seen.append((image, turns))
    if identities_per_step is None:
        for epoch in range(3):
            assert len(set(seen[32 * epoch : 32 * (epoch + 1)])) == 32
    else:
        for step in range(8):
            labels = [source.load(12 * step + n)[1] for n in range(12)]
            assert sorted(Counter(labels).values()) == [2] * 6  # P = 6 turned identities of K = 2 images
        assert set(Counter(turns for _, turns in seen).values()) == {24}  # each of 12 classes in every other step


def test_turned_images_that_cannot_be_read_are_replaced_by_ones_turned_alike(tmp_path: Path) -> None:
    shards = make_shards(tmp_path, COUNTS)
    break_image(shards, files_of(tmp_path)[2])  # the first of p2
    source = TrainSource.open(turning_task(shards), seed=1)
    other = evaluation_transform(files_of(tmp_path)[3].read_bytes(), (8, 8))
    broken = [draw for draw in range(96) if source.index(draw) % 8 == 2]
    assert len({source.index(draw) for draw in broken}) == 4
    for draw in broken:
        pixels, label, skipped = source.load(draw)
        turns = source.index(draw) // 8
        np.testing.assert_array_equal(pixels, np.rot90(other, turns, axes=(1, 2)))
        assert (label, skipped) == (3 * turns + 1, [2])


def test_classes_that_the_data_lacks_are_turned_too(tmp_path: Path) -> None:
    shards = make_shards(tmp_path, COUNTS)
    source = TrainSource.open(turning_task(shards, num_classes=5), seed=1)
    assert source.num_classes == 20
    assert len(source.classes) == 12
    with pytest.raises(UserError, match=r"label out of range: 2 \('p3'\)"):
        TrainSource.open(turning_task(shards, num_classes=2), seed=1)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([("tasks.digits.quarter_turns", "true")], "digits: quarter_turns need a margin head"),
        (
            [("tasks.glyphs.quarter_turns", "true"), ("tasks.glyphs.input", "[32, 16]")],
            "glyphs: quarter_turns need a square input",
        ),
        (
            [("tasks.glyphs.quarter_turns", "true"), ("tasks.glyphs.augment", "{resize: [40, 32]}")],
            "glyphs: quarter_turns need a square input",
        ),
        ([("tasks.glyphs.augment.resize", "[40, 31]")], "glyphs: augment.resize (40, 31) is smaller than the input"),
        ([("tasks.glyphs.augment.affine", "{scale: [1.2, 0.9]}")], "scale [1.2, 0.9]: give the smaller one first"),
        ([("tasks.glyphs.augment.affine", "{scale: [0, 1]}")], "affine.scale"),
    ],
)
def test_settings_that_do_not_fit(overrides: list[tuple[str, str]], message: str) -> None:
    with pytest.raises(UserError) as caught:
        recipe_file.load("demo", overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("resize", [None, (11, 10)])
@pytest.mark.parametrize("quarter_turns", [False, True])
def test_cached_images_are_those_of_the_files(
    tmp_path: Path, resize: tuple[int, int] | None, quarter_turns: bool
) -> None:
    """Two epochs with everything random, cached and not, in this process and in workers."""
    shards = make_shards(tmp_path, COUNTS)
    augment = Augment(pad=1, flip=True, erasing=0.9, resize=(10, 10) if quarter_turns and resize else resize)
    task = dataclasses.replace(turning_task(shards), augment=augment, quarter_turns=quarter_turns)
    if not quarter_turns:
        task = dataclasses.replace(task, identities_per_step=3)
    plain, cached = (TrainSource.open(task, seed=2, cache=cache) for cache in (False, True))
    expected = [plain.load(draw) for draw in range(64)]
    for draw in [*range(64), *range(64)]:
        pixels, label, _ = cached.load(draw)
        assert pixels.tobytes() == expected[draw][0].tobytes()
        assert label == expected[draw][1]
    fresh = Batches(
        {"signs": TrainSource.open(task, seed=2, cache=True)}, lambda counts: {"signs": range(counts["signs"])}, 1
    )
    for i, batch in enumerate(loader(fresh, 0, 5, workers=2, pin=False)):
        for position in range(12):
            assert batch.tasks["signs"].images[position].numpy().tobytes() == expected[12 * i + position][0].tobytes()


def test_a_cached_image_is_read_once(tmp_path: Path) -> None:
    """What was read before its shard broke is still there; what was not is not."""
    shards = make_shards(tmp_path, {"a": 1, "b": 1})
    task = dataclasses.replace(turning_task(shards), identities_per_step=2, samples_per_step=4, quarter_turns=False)
    plain, cached = (TrainSource.open(task, seed=0, cache=cache) for cache in (False, True))
    expected = cached.load(0)[0].tobytes()
    for name in ("a", "b"):
        break_image(shards, tmp_path / "images" / f"{name}_0.png")
    assert cached.load(0)[0].tobytes() == expected
    assert {len(cached.load(draw)[2]) for draw in range(4)} == {0, 1}
    with pytest.raises(UserError, match="none of its 2 images can be read"):
        plain.load(0)


def test_crops_are_those_of_the_drawn_boxes(tmp_path: Path) -> None:
    """Of the original image, before all else; an unreadable image is replaced by another's part at the same numbers."""
    shards = make_shards(tmp_path, COUNTS)
    break_image(shards, files_of(tmp_path)[2])
    crop = RandomResizedCrop(area=(0.2, 0.9))
    task = dataclasses.replace(
        turning_task(shards), quarter_turns=False, identities_per_step=3, input=(8, 10), augment=Augment(
            random_resized_crop=crop, flip=True
        )
    )  # fmt: skip
    source, boxes = TrainSource.open(task, seed=2), set()
    for draw in range(60):
        pixels, _, skipped = source.load(draw)
        generator = numpy_generator(2, "augment", "signs", draw)
        box = crop_box((11, 9), crop, generator.random((4, CROP_ATTEMPTS)))
        file = files_of(tmp_path)[3 if skipped else source.index(draw)]
        part = Image.open(file).crop((box[1], box[0], box[1] + box[3], box[0] + box[2]))
        expected = np.asarray(part.resize((10, 8), Image.Resampling.BILINEAR)).astype(int)
        if generator.random() < 0.5:
            expected = expected[:, ::-1]
        assert np.abs(pixels.transpose(1, 2, 0) - expected).max() <= 1
        boxes.add(box)
    assert len(boxes) > 30
