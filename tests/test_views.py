"""Views of images to distil on: functions of seed, task and number, with labels by name."""

import numpy as np
import pytest

from tests.image_folder import make_folder, with_task
from ufo_ds.data.augmentation import augmented
from ufo_ds.data.image_files import FolderImages
from ufo_ds.data.transforms import resized_pixels
from ufo_ds.data.views import UNKNOWN, Drawn, Views
from ufo_ds.distillation.corrupt import Corrupt
from ufo_ds.errors import UserError
from ufo_ds.seeding import numpy_generator
from ufo_ds.subnets.task_model import open_model

AUGMENT = {"resize": [28, 20], "flip": True, "erasing": 0.5, "jitter": {"brightness": 0.3}}


def test_a_view_is_a_function_of_seed_task_and_number(run, tmp_path):
    folder = FolderImages(make_folder(tmp_path / "images"))
    recipe = with_task(run, augment=AUGMENT)
    views = Views(recipe, [folder], [], 3, 0.0)
    assert len(views) == 36
    order = np.random.default_rng(0).permutation(36).tolist()
    found = {number: views.load(number)[0].copy() for number in order}
    for number in (0, 7, 35):
        wanted = augmented(
            resized_pixels(folder.read(number // 3), (28, 20), None), (24, 16), recipe.tasks[0].augment,
            numpy_generator(recipe.seed, "view", "glyphs", number),
        )  # fmt: skip
        assert np.array_equal(found[number], wanted.transpose(2, 0, 1))
    assert not np.array_equal(found[0], found[1])


def test_a_share_is_mixed_with_other_views_and_has_no_label(run, tmp_path):
    folder = FolderImages(make_folder(tmp_path / "images"))
    recipe = with_task(run, augment=AUGMENT)
    plain, some, all_of_them = (Views(recipe, [folder], [], 20, share) for share in (0.0, 0.3, 1.0))
    count = 0
    for number in range(len(plain)):
        pixels, label, _ = plain.load(number)
        found, found_label, _ = some.load(number)
        mixed, mixed_label, _ = all_of_them.load(number)
        assert mixed_label == UNKNOWN
        generator = numpy_generator(recipe.seed, "mixed view", "glyphs", number)
        chance, weight = generator.random(2).tolist()
        other = plain.load(int(generator.integers(len(plain))))[0]
        assert np.abs(mixed - (weight * pixels + (1 - weight) * other)).max() <= 0.51
        is_mixed = chance < 0.3
        count += is_mixed
        assert np.array_equal(found, mixed if is_mixed else pixels)
        assert found_label == (UNKNOWN if is_mixed else label)
    assert 0.2 < count / len(plain) < 0.4


def test_labels_by_name_or_as_identities(run, tmp_path):
    make_folder(tmp_path / "a", 6, ("zero", "one", "nine"))
    make_folder(tmp_path / "b", 2, ())
    sources = [FolderImages(tmp_path / name) for name in "ab"]
    recipe = open_model(run, "digits").recipe
    views = Views(recipe, sources, ["one", "two", "zero"], 1, 0.0)
    names = [source.names[i].split("/")[0] for source in sources for i in range(len(source.names))]
    wanted = [{"one": 0, "zero": 2}.get(name, -1) for name in names]
    assert views.labels.tolist() == wanted
    assert views.num_classes == 3
    views = Views(with_task(run), [sources[0], sources[0], sources[1]], [], 1, 0.0)
    assert views.num_classes == 6  # of each source its own
    assert sorted(views.labels.tolist()) == sorted([0, 1, 2, 3, 4, 5] * 2 + [-1, -1])


def test_quarter_turns_are_samples_of_other_classes(run, tmp_path):
    folder = FolderImages(make_folder(tmp_path / "images", 6, size=(16, 16)))
    recipe = with_task(run, quarter_turns=True, input=[16, 16])
    views = Views(recipe, [folder], [], 2, 0.0)
    assert views.num_classes == 12
    assert len(views) == 6 * 4 * 2
    plain, label, _ = views.load(2 * 1)
    turned, turned_label, _ = views.load(2 * (3 * 6 + 1))
    assert np.array_equal(np.rot90(plain, 3, (1, 2)), turned)
    assert turned_label == label + 3 * 3


def test_draws_of_identities(run, tmp_path):
    folder = FolderImages(make_folder(tmp_path / "images", 40, tuple("abcdefgh")))
    views = Views(with_task(run, samples_per_step=8, identities_per_step=2), [folder], [], 5, 0.0)
    drawn = Drawn(views, 14)
    assert drawn.batch_size == 12  # 3 of 4
    for step in range(6):
        numbers = [drawn.number(12 * step + i) for i in range(12)]
        labels = views.labels[[number // 5 for number in numbers]]
        assert [len(set(labels[i : i + 4].tolist())) for i in (0, 4, 8)] == [1, 1, 1]
        assert len(set(labels.tolist())) == 3
    assert len({drawn.number(i) % 5 for i in range(100)}) == 5


def test_unreadable_images_are_replaced_and_counted(run, tmp_path):
    folder = make_folder(tmp_path / "images", 6, ())
    (folder / "002.png").write_bytes(b"no image")
    (folder / "005.png").write_bytes(b"")
    views = Views(with_task(run), [FolderImages(folder)], [], 1, 0.0)
    for number, instead in ((2, 3), (5, 0)):
        pixels, _, skipped = views.load(number)
        assert skipped == [number]
        assert np.array_equal(pixels, views.load(instead)[0])
    corrupt = Corrupt(6, 0.2)
    corrupt.add([2])
    corrupt.add([2, 2])
    with pytest.raises(UserError, match=r"2 of 6 images cannot be read, more than data.max_corrupt 0.2"):
        corrupt.add([5])
    for path in folder.iterdir():
        path.write_bytes(b"")
    with pytest.raises(UserError, match="none of the 6 images"):
        Views(with_task(run), [FolderImages(folder)], [], 1, 0.0).load(0)
