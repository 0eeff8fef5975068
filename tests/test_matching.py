"""Planted copies among other images, and the search against a slow one."""

import numpy as np
import pytest
from PIL import Image

from tests.pictures import SIZE, encode, noise, resized, shard_set, strokes, texture
from ufo_ds.data import matching
from ufo_ds.data.fingerprints import Fingerprints, perceptual_hash, thumbnail
from ufo_ds.data.matching import MAX_BITS, MAX_DIFFERENCE, matches, thumbnail_difference

# What is made of an image, and as what it must be found.
COPIES = {
    "bytes": (encode, "bytes"),
    "png": (lambda image: encode(image, compress_level=1), "pixels"),
    "webp": (lambda image: encode(image, "WEBP", lossless=True), "pixels"),
    "jpeg40": (lambda image: encode(image, "JPEG", quality=40), "near"),
    "jpeg70": (lambda image: encode(image, "JPEG", quality=70), "near"),
    "jpeg95": (lambda image: encode(image, "JPEG", quality=95), "near"),
    "half": (lambda image: encode(resized(image, 0.5, 0.5)), "near"),
    "double": (lambda image: encode(resized(image, 2, 2)), "near"),
    "aspect": (lambda image: encode(resized(image, 1.2, 1)), "near"),
    "smaller jpeg": (lambda image: encode(resized(image, 0.75, 0.75), "JPEG", quality=80), "near"),
}


@pytest.mark.parametrize("make", [texture, strokes])
def test_copies_of_all_kinds_are_found_and_nothing_else(make, tmp_path):
    generator = np.random.default_rng(0)
    train = [make(generator) for _ in range(30)]
    others = [maker(generator) for maker in (texture, strokes, noise) for _ in range(30)]
    test = [(copy(image), n, kind) for n, image in enumerate(train) for copy, kind in COPIES.values()]
    of_train = Fingerprints.of(
        shard_set(tmp_path / "train", [encode(i) for i in train] + [encode(noise(generator))]), ""
    )
    of_test = Fingerprints.of(
        shard_set(tmp_path / "test", [data for data, *_ in test] + [encode(i) for i in others]), ""
    )
    found = matches(of_train, of_test)
    assert {(m.test_index, m.train_index, m.kind) for m in found} == {
        (j, i, kind) for j, (_, i, kind) in enumerate(test)
    }
    for match in found:
        assert (match.bits, match.difference) == (0, 0.0) or match.kind == "near"


def test_pictures_without_structure_are_told_apart_by_their_colour(tmp_path):
    """An empty page is like an empty page of another size and encoding, not like one of another colour."""

    def plain(colour, size=SIZE):
        return Image.new("RGB", size, colour)

    train = shard_set(tmp_path / "train", [encode(plain("white")), encode(plain((90, 120, 60)))])
    test = shard_set(
        tmp_path / "test",
        [encode(plain("white", (40, 40)), "JPEG"), encode(plain((91, 120, 61))), encode(plain((120, 90, 60)))],
    )
    found = matches(Fingerprints.of(train, ""), Fingerprints.of(test, ""))
    assert [(m.test_index, m.train_index, m.kind) for m in found] == [(0, 0, "near"), (1, 1, "near")]


def random_prints(generator, count, centres, thumbnails):
    """Hashes and thumbnails some way from few centres, so that near and far pairs abound; two in five unreadable."""
    hashes = centres[generator.integers(len(centres), size=count)]
    for _ in range(9):
        flips = np.uint64(1) << generator.integers(0, 64, count).astype(np.uint64)
        hashes = np.where(generator.random(count) < 0.7, hashes ^ flips, hashes)
    chosen = thumbnails[generator.integers(len(thumbnails), size=count)].astype(int)
    chosen += np.rint(generator.normal(0, 1, chosen.shape) * generator.uniform(0, 20, (count, 1, 1, 1))).astype(int)
    digests = np.zeros((2, count, 32), dtype=np.uint8)
    digests[..., 0] = generator.integers(0, 200, (2, count))
    return Fingerprints(*digests, hashes, chosen.clip(0, 255).astype(np.uint8), generator.random(count) < 0.6)


@pytest.mark.parametrize("seed", range(3))
def test_search_in_blocks_is_the_obvious_search(seed, monkeypatch):
    monkeypatch.setattr(matching, "_TEST_ROWS", 7)
    monkeypatch.setattr(matching, "_TRAIN_COLUMNS", 11)
    monkeypatch.setattr(matching, "_THUMBNAILS", 5)
    monkeypatch.setattr(matching, "PER_IMAGE", 1000)
    generator = np.random.default_rng(seed)
    centres = generator.integers(0, 2**63, 3).astype(np.uint64)
    thumbnails = generator.integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    train, test = (random_prints(generator, count, centres, thumbnails) for count in (60, 45))
    expected = {}
    for j in range(45):
        for i in range(60):
            if not (train.readable[i] and test.readable[j]):
                continue
            bits = bin(int(train.hashes[i]) ^ int(test.hashes[j])).count("1")
            a, b = train.thumbnails[i].astype(float), test.thumbnails[j].astype(float)
            difference = np.sqrt(((a - b) ** 2).mean()) / max(b.std(), 10)
            if (train.file_digests[i] == test.file_digests[j]).all():
                expected[j, i] = ("bytes", 0, 0.0)
            elif (train.pixel_digests[i] == test.pixel_digests[j]).all():
                expected[j, i] = ("pixels", 0, 0.0)
            elif bits <= MAX_BITS and difference <= MAX_DIFFERENCE:
                expected[j, i] = ("near", bits, pytest.approx(difference, abs=1e-5))
    found = matches(train, test)
    assert {(m.test_index, m.train_index): (m.kind, m.bits, m.difference) for m in found} == expected
    assert len({kind for kind, *_ in expected.values()}) == 3
    assert found == sorted(found)


def test_of_many_copies_the_nearest_are_kept():
    generator = np.random.default_rng(0)
    thumbnail = generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)
    count = 40
    digests = [np.arange(count * 32, dtype=np.int64).reshape(count, 32).astype(np.uint8) for _ in range(2)]
    thumbnails = np.stack([np.clip(thumbnail.astype(int) + n, 0, 255) for n in range(count)]).astype(np.uint8)
    train = Fingerprints(*digests, np.zeros(count, np.uint64), thumbnails[::-1], np.ones(count, bool))
    zeros = np.zeros((1, 32), np.uint8)
    test = Fingerprints(zeros + 255, zeros + 255, np.zeros(1, np.uint64), thumbnail[None], np.ones(1, bool))
    assert [m.train_index for m in matches(train, test)] == list(range(39, 29, -1))


def test_hash_is_that_of_a_plain_dct():
    """Each coefficient by the definition of the DCT, against their median."""
    generator = np.random.default_rng(0)
    image = texture(generator, (32, 32))
    grey = np.asarray(image.convert("L"), dtype=float)
    n = np.arange(32)
    scale = np.array([np.sqrt(1 / 32)] + [np.sqrt(2 / 32)] * 7)

    def coefficient(u, v):
        waves = np.outer(np.cos(np.pi * u * (2 * n + 1) / 64), np.cos(np.pi * v * (2 * n + 1) / 64))
        return scale[u] * scale[v] * (grey * waves).sum()

    coefficients = [coefficient(u, v) for u in range(8) for v in range(8)][1:]
    bits = [c > np.median(coefficients) + 1 for c in coefficients] + [False]
    assert perceptual_hash(image) == int("".join("01"[int(bit)] for bit in bits), 2)
    assert thumbnail(Image.new("RGB", (5, 9), (1, 2, 3))).reshape(-1, 3).tolist() == [[1, 2, 3]] * 256


def test_thumbnail_difference_by_hand():
    low, high = np.full((1, 16, 16, 3), 100, np.uint8), np.full((1, 16, 16, 3), 100, np.uint8)
    high[:, :8] = 180  # its contrast is 40
    np.testing.assert_allclose(thumbnail_difference(high, high), 0)
    np.testing.assert_allclose(thumbnail_difference(high + 4, high), 0.1)
    np.testing.assert_allclose(thumbnail_difference(low + 4, low), 0.4)  # of the least contrast, 10
