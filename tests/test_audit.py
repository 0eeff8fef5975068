"""Planted copies among other images, the search against a slow one, and evaluation without what was found."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from tests import tiny
from ufo_ds import data_report, recipe_file
from ufo_ds.data import audit_page, matching
from ufo_ds.data.audit import Audit, audit, counts_of
from ufo_ds.data.evaluation_set import EvaluationSet
from ufo_ds.data.fingerprints import Fingerprints, perceptual_hash, thumbnail
from ufo_ds.data.layouts import Layout, Sample
from ufo_ds.data.matching import MAX_BITS, MAX_DIFFERENCE, matches, thumbnail_difference
from ufo_ds.data.shard_writer import write
from ufo_ds.errors import UserError, run
from ufo_ds.evaluation import benchmarks, classification, overlap, retrieval, verification
from ufo_ds.recipe import only

SIZE = (72, 60)


def texture(generator, size=SIZE):
    """A smooth random picture with some noise, as photos are: coarse blobs of colour and finer ones."""
    layers = [
        np.asarray(
            Image.fromarray(generator.integers(0, 256, (n, n, 3), dtype=np.uint8)).resize(
                size, Image.Resampling.BICUBIC
            ),
            dtype=float,
        )
        for n in (3, 7, 15)
    ]
    pixels = 0.5 * layers[0] + 0.3 * layers[1] + 0.2 * layers[2] + generator.normal(0, 4, layers[0].shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def strokes(generator, size=SIZE):
    """Black lines on white."""
    pixels = np.full((size[1], size[0], 3), 255, dtype=np.uint8)
    points = np.cumsum(generator.normal(0, 2.5, (60, 2)), axis=0) + 32
    for y, x in points.clip(3, 56).astype(int):
        pixels[y - 2 : y + 2, x - 2 : x + 2] = 0
    return Image.fromarray(pixels)


def noise(generator, size=SIZE):
    return Image.fromarray(generator.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def encode(image, form="PNG", **options):
    data = io.BytesIO()
    image.save(data, form, **options)
    return data.getvalue()


def resized(image, across, down):
    return image.resize((round(image.width * across), round(image.height * down)), Image.Resampling.BICUBIC)


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


class Bytes:
    """An image file in memory, as a layout takes it."""

    suffix = ".png"  # Pillow looks at the bytes alone

    def __init__(self, data):
        self.data = data

    def read_bytes(self):
        return self.data


def shard_set(directory, images, labels=None):
    samples = [Sample(Bytes(data), labels[n] if labels else f"id{n:04d}") for n, data in enumerate(images)]
    return write(Layout(samples), directory, source="test", licence="none")


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


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Shards of tiny.py, with textures instead for one task: 2 of 8 classified images and some of its queries, gallery
    images and pairs were seen in training."""
    root = tmp_path_factory.mktemp("audit")
    tiny.make(root)
    generator = np.random.default_rng(0)
    train = [texture(generator) for _ in range(12)]
    test = [texture(generator) for _ in range(24)]
    shard_set(root / "train", [encode(i) for i in train], [f"id{n // 2}" for n in range(12)])
    fresh = [encode(i) for i in test]
    labels = [f"id{n % 6}" for n in range(8)]
    shard_set(root / "query", [encode(train[3]), *fresh[1:5], encode(train[0], "JPEG"), *fresh[6:8]], labels)
    shard_set(root / "gallery", [*fresh[8:15], encode(resized(train[7], 0.5, 0.5)), *fresh[15:19]],
              [f"id{n % 6}" for n in range(12)])  # fmt: skip
    shard_set(root / "classes", [encode(train[5]), *fresh[19:24], encode(train[5], "JPEG"), fresh[0]],
              [f"colour{n % 3}" for n in range(8)])  # fmt: skip
    (root / "audit.yaml").write_text(
        tiny.RECIPE.format(root=root)
        .replace(
            f"protocol: classification, shards: {root}/colours", f"protocol: classification, shards: {root}/classes"
        )
        .replace(f"query: {root}/stripes, gallery: {root}/stripes", f"query: {root}/query, gallery: {root}/gallery")
        .replace(f"train: [{{shards: {root}/stripes}}]", f"train: [{{shards: {root}/train}}]")
    )
    return root


@pytest.fixture(scope="module")
def found(root):
    return audit(recipe_file.load(str(root / "audit.yaml")))


def test_every_training_set_is_compared_with_every_benchmark(found, root):
    counts = {
        (train.task, test.benchmark, test.part): counts_of(pairs) for train, test, pairs in found.overlaps() if pairs
    }
    assert counts == {
        ("stripes", "colours/colours", "shards"): (1, 1),  # another task's test
        ("stripes", "stripes/stripes", "query"): (1, 1),
        ("stripes", "stripes/stripes", "gallery"): (0, 1),
    }
    assert len(list(found.overlaps())) == 2 * 4
    pairs = {(p.benchmark, p.part, p.index): (p.task, p.shards, p.train_index, p.kind) for p in found.pairs}
    train = ("stripes", f"{root}/train")
    assert pairs["stripes/stripes", "query", 0] == (*train, 3, "bytes")
    assert pairs["stripes/stripes", "gallery", 7] == (*train, 7, "near")
    assert len(pairs) == len(found.pairs) == 5


def test_audit_comes_back_from_its_file(found, tmp_path):
    (tmp_path / "audit.json").write_text(found.to_json())
    assert Audit.load(tmp_path / "audit.json") == found
    (tmp_path / "other.json").write_text('{"pairs": []}')
    with pytest.raises(UserError, match="is not an audit"):
        Audit.load(tmp_path / "other.json")
    with pytest.raises(UserError, match="No such file"):
        Audit.load(tmp_path / "none.json")


def test_page_shows_each_pair(found):
    page = audit_page.page(found)
    assert page.count("<figure>") == 5
    assert page.count("data:image/jpeg;base64,") == 10
    assert "http" not in page  # nothing is loaded from elsewhere


def test_metrics_without_overlap_are_those_of_the_subset(found, root, tmp_path):
    """Against the protocols applied by hand to what is left; pairs lose those with an image that was seen."""
    recipe = recipe_file.load(str(root / "audit.yaml"))
    pairs = EvaluationSet.open(root / "pairs").pairs
    seen = sorted({int(pairs[0, 1]), int(pairs[5, 2])})
    entry = next(p for p in found.pairs if p.benchmark == "colours/colours")
    planted = [
        dict(vars(entry), benchmark="stripes/stripe_pairs", part="shards", index=index, train_index=0) for index in seen
    ]
    values = json.loads(found.to_json())
    values["pairs"] += [{k: v for k, v in p.items() if not k.startswith("__")} for p in planted]
    (tmp_path / "audit.json").write_text(json.dumps(values))
    left_out = overlap.left_out(tmp_path / "audit.json", recipe, recipe)
    assert left_out == {
        "colours/colours": {f"{root}/classes": {0, 6}},
        "stripes/stripes": {f"{root}/query": {0, 5}, f"{root}/gallery": {7}},
        "stripes/stripe_pairs": {f"{root}/pairs": set(seen)},
    }

    images = benchmarks.open_images(recipe)
    generator = np.random.default_rng(0)
    outputs = {name: generator.normal(size=(len(of_task), 6)).astype(np.float32) for name, of_task in images.items()}
    predictions = {name: (0, values, values[:, :3]) for name, values in outputs.items()}
    classes = {"colours": ["colour0", "colour1", "colour2"], "stripes": []}
    without = overlap.score_without(recipe, images, predictions, classes, left_out)

    keep = [1, 2, 3, 4, 5, 7]
    labels = np.array([n % 3 for n in keep])
    scores = outputs["colours"][keep, :3]
    assert without["colours/colours"].metrics() == classification.top1(scores, labels)
    rows = outputs["stripes"]
    query, gallery, of_pairs = rows[:8], rows[8:20], rows[20:]
    q, g = [1, 2, 3, 4, 6, 7], [n for n in range(12) if n != 7]
    unknown = np.full(12, -1)
    expected = retrieval.evaluate(query[q], np.array(q) % 6, unknown[q], gallery[g], np.array(g) % 6, unknown[g])
    assert without["stripes/stripes"].metrics() == expected
    left = np.array([pair for pair in pairs if pair[1] not in seen and pair[2] not in seen])
    assert 0 < len(left) < len(pairs)
    assert without["stripes/stripe_pairs"].metrics() == verification.evaluate(of_pairs, left)

    alone = only(recipe, ["colours"])  # trained without the other task, whose training set holds all that was found
    assert overlap.left_out(tmp_path / "audit.json", alone, alone) == {"colours/colours": {f"{root}/classes": set()}}


def test_too_few_left_and_nothing_left_out(root):
    recipe = only(recipe_file.load(str(root / "audit.yaml")), ["colours"])
    images = {"colours": benchmarks.open_images(recipe)["colours"]}
    scores = np.eye(8, 3, dtype=np.float32)
    predictions, classes = {"colours": (0, scores, scores)}, {"colours": ["colour0", "colour1", "colour2"]}
    everything = {"colours/colours": {f"{root}/classes": set(range(8))}}
    without = overlap.score_without(recipe, images, predictions, classes, everything)
    assert without == {"colours/colours": None}
    metrics = {"colours/colours/top1": 0.375}
    assert (
        list(overlap.table(metrics, without, everything))[1].split(maxsplit=2)[2] == "too few left  (8 images left out)"
    )
    assert overlap.as_values(metrics, without, everything)["without_overlap"] == {"colours/colours/top1": None}
    nothing = {"colours/colours": {f"{root}/classes": set()}}
    assert overlap.score_without(recipe, images, predictions, classes, nothing) == {}
    assert list(overlap.table(metrics, {}, nothing))[1].split() == ["colours/colours/top1", "0.3750", "0.3750"]


def test_an_audit_of_other_data_is_refused(found, root, tmp_path):
    recipe = recipe_file.load(str(root / "audit.yaml"))
    (tmp_path / "audit.json").write_text(found.to_json())
    more = recipe_file.load(str(root / "audit.yaml"), [("tasks.stripes.train", f"[{{shards: {root}/pairs}}]")])
    with pytest.raises(UserError, match=r"lacks the training set .*/pairs"):
        overlap.left_out(tmp_path / "audit.json", more, recipe)
    other = recipe_file.load(
        str(root / "audit.yaml"),
        [("tasks.colours.benchmarks", f"[{{name: colours, protocol: classification, shards: {root}/colours}}]")],
    )
    with pytest.raises(UserError, match="is of another colours/colours"):
        overlap.left_out(tmp_path / "audit.json", recipe, other)
    named = recipe_file.load(
        str(root / "audit.yaml"),
        [("tasks.colours.benchmarks", f"[{{name: hues, protocol: classification, shards: {root}/classes}}]")],
    )
    with pytest.raises(UserError, match="lacks colours/hues"):
        overlap.left_out(tmp_path / "audit.json", recipe, named)


def test_command(root, tmp_path, capsys):
    arguments = [str(root / "audit.yaml"), "--audit", "--out", str(tmp_path / "new" / "folder")]
    assert run(data_report.main, arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[2:] for line in lines[1:4]] == [
        ["colours/colours", "8", "1", "1"],
        ["stripes/stripes", "query", "8", "1", "1"],
        ["stripes/stripes", "gallery", "12", "0", "1"],
    ]
    assert lines[-1] == "5 of 8 combinations of a training set with test images share none."
    assert run(data_report.main, [*arguments, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert sum(entry["exact"] for entry in values["overlaps"]) == 2
    assert sum(entry["near"] for entry in values["overlaps"]) == 3
    Audit.load(tmp_path / "new" / "folder" / "audit.json")
    assert (tmp_path / "new" / "folder" / "audit.html").is_file()
