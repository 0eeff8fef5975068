"""The demo's shards, made once for real: what is in them, and that matching pixels does not solve them."""

import io

import numpy as np
import pytest
from PIL import Image

from ufo_ds.data import demo
from ufo_ds.data.shards import ShardSet
from ufo_ds.errors import UserError
from ufo_ds.evaluation import classification, pixels, retrieval, verification

NAMES = ["digits/train", "digits/test", "glyphs/train", "glyphs/query", "glyphs/gallery", "glyphs/pairs"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("demo") / "shards" / "demo"
    demo.make(directory)
    return directory


@pytest.fixture(scope="module")
def sets(directory):
    return {name: ShardSet.open(directory / name) for name in NAMES}


def features(shards):
    images = [np.asarray(Image.open(io.BytesIO(shards.read(index))).convert("RGB")) for index in range(len(shards))]
    return pixels.pixel_features(np.stack(images).transpose(0, 3, 1, 2))


def identities(shards):
    """By name, not by position: two directories of shards number their classes each for itself."""
    return np.array([int(shards.classes[label].removeprefix("U+"), base=16) for label in shards.labels])


def cameras(shards, names):
    return np.array([names.index(shards.cameras[camera]) for camera in shards.camera_ids])


def test_only_the_finished_directory_is_left(directory):
    assert [path.name for path in directory.parent.iterdir()] == ["demo"]


def test_an_existing_directory_is_left_alone(directory):
    before = sorted(path.stat().st_mtime_ns for path in directory.rglob("*"))
    with pytest.raises(UserError, match="exists: remove it"):
        demo.make(directory)
    assert sorted(path.stat().st_mtime_ns for path in directory.rglob("*")) == before


def test_digits_are_split_evenly(sets):
    train, test = sets["digits/train"], sets["digits/test"]
    assert (len(train), len(test)) == (1437, 360)
    assert train.classes == test.classes == list("0123456789")
    assert np.bincount(test.labels).min() >= 34
    assert "CC BY 4.0" in train.licence
    assert Image.open(io.BytesIO(train.read(0))).size == (16, 16)


def test_glyphs_are_many_and_test_characters_are_new(sets):
    train, query, gallery = (sets[f"glyphs/{name}"] for name in ("train", "query", "gallery"))
    assert len(train.classes) > 100
    assert len(gallery.classes) > 50
    assert set(query.classes) == set(gallery.classes) == set(sets["glyphs/pairs"].classes)
    assert not set(train.classes) & set(gallery.classes)
    assert sum(len(shards) for shards in sets.values()) < 20_000
    for shards in (train, gallery):
        assert np.bincount(shards.labels).min() >= 6  # fonts
        assert shards.camera_ids.min() >= 0
    # Cases and shapes shared between alphabets count once at most.
    kept = {chr(int(name.removeprefix("U+"), base=16)) for name in train.classes + gallery.classes}
    for alike in ("CcСсϹ", "XxХхΧ", "AΑА", "HΗН", "PΡРр", "BΒВ", "0OoОоΟο", "3Зз"):
        assert len(kept & set(alike)) <= 1


def test_every_glyph_has_ink_within_its_frame(sets):
    shards = sets["glyphs/gallery"]
    for index in range(len(shards)):
        image = np.asarray(Image.open(io.BytesIO(shards.read(index))))
        assert image.shape == (32, 32)
        assert np.ptp(image) > 30
        border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
        assert np.mean(border == np.median(border)) > 0.7  # the ground: not a frame, nor a glyph that is cut off


def test_pairs_are_balanced_and_across_fonts(sets):
    shards = sets["glyphs/pairs"]
    fold, first, second, same = shards.pairs.T
    assert np.unique(fold).tolist() == list(range(10))
    assert all(same[fold == number].mean() == 0.5 for number in range(10))
    assert (shards.camera_ids[first] != shards.camera_ids[second]).all()
    np.testing.assert_array_equal(shards.labels[first] == shards.labels[second], same == 1)
    characters = [set(shards.labels[np.concatenate([first[fold == n], second[fold == n]])]) for n in range(10)]
    assert sum(len(of_fold) for of_fold in characters) == len(set().union(*characters))


def test_glyphs_do_not_depend_on_when_they_are_made():
    mask = demo._masks("DejaVuSans")["Ж"]
    first, again, other = (
        np.asarray(demo._photograph(mask, demo.numpy_generator(0, "glyph", copy))) for copy in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_pixel_floors(sets):
    """Digits are nearly solved by their pixels; glyphs are not, and yet are no noise."""
    train, test = sets["digits/train"], sets["digits/test"]
    scores = pixels.nearest_neighbour_scores(features(test), features(train), train.labels, 10)
    assert 0.95 < classification.evaluate(scores, test.labels)["top1"] < 1

    query, gallery, pairs = (sets[f"glyphs/{name}"] for name in ("query", "gallery", "pairs"))
    floor = retrieval.evaluate(
        features(query), identities(query), cameras(query, gallery.cameras),
        features(gallery), identities(gallery), cameras(gallery, gallery.cameras),
    )  # fmt: skip
    assert 0.2 < floor["mAP"] < 0.5
    assert 0.6 < verification.evaluate(features(pairs), pairs.pairs)["accuracy"] < 0.9
