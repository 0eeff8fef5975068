"""The shards of the six small sets, made from tiny trees of the same layout, against counts and rules by hand."""

import hashlib
import io
import json
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest
from PIL import Image

from ufo_ds import shards as command
from ufo_ds.data import open_small
from ufo_ds.data.shards import ShardSet, verify
from ufo_ds.errors import UserError

KOREAN = ["Korean-character01", "Korean-character02"]
OMNIGLOT = ["Greek-character01", *KOREAN, "Latin-character01"]
VEHICLES = [f"car_{n:04d}" for n in range(60)] + [f"truck_{n:04d}" for n in range(31)]
GROCERIES = [f"product{n:02d}" for n in range(11)]
PERSONS = [f"s{n:02d}" for n in range(8)]
# By running number. Pupils: 10-13, 14, 15-18 (a digit shown twice), 30-31, 40-44, so that 5 x 0.2 = 1 is held out.
DIGITS = dict(zip([*range(10, 19), 30, 31, 40, 41, 42, 43, 44], "0239103380501246", strict=True))


class Tree:
    """Makes images, each of its own colour, and the lists that name them."""

    def __init__(self, root: Path):
        self.root, self.count = root, 0

    def image(self, path: str) -> str:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        self.count += 1
        Image.new("RGB", (3, 2), (self.count % 256, self.count // 256, 0)).save(file)
        return path.split("/", 1)[1]

    def listing(self, file: str, header: str, rows: list[tuple[str, ...]]) -> None:
        lines = [",".join((self.image(f"{file.split('/')[0]}/{path}"), *rest)) for path, *rest in rows]
        (self.root / file).write_text("\n".join([header, *lines]) + "\n")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tree") / "data"
    tree = Tree(root)

    def identities(ids: list[str], images: int, folder: str) -> list[tuple[str, ...]]:
        # Against their order, so that whoever takes them as they come takes the wrong ones.
        return [(f"{folder}/{name}/{n:02d}.png", name) for name in reversed(ids) for n in reversed(range(images))]

    for name, ids, images in (("omniglot", OMNIGLOT, 7), ("grocery_products", GROCERIES, 8), ("faces_orl", PERSONS, 4)):
        tree.listing(f"{name}/train.csv", "path,id", identities(ids, images, "train"))
        tree.listing(f"{name}/query.csv", "path,id", identities(["new1", "new2"], 1, "query"))
        tree.listing(f"{name}/gallery.csv", "path,id", identities(["new1", "new2"], 3, "gallery"))
    (root / "faces_orl" / "pairs.csv").write_text(
        "fold,path1,path2,same\n0,gallery/new1/00.png,gallery/new1/01.png,1\n1,query/new1/00.png,query/new2/00.png,0\n"
    )

    def both_cameras(ids: list[str]) -> list[tuple[str, ...]]:
        return [(f"all/{name}_{camera}.png", name, camera) for name in ids for camera in ("cam2", "cam1")]

    tree.listing("vehicle_reid/train.csv", "path,id,camera", both_cameras(VEHICLES[::-1]))
    tree.listing("vehicle_reid/query.csv", "path,id,camera", both_cameras(["car_new"])[1:])
    tree.listing("vehicle_reid/gallery.csv", "path,id,camera", both_cameras(["car_new"])[:1])
    for part in ("train", "val", "test"):
        rows = [(f"{part}/{label}/{n}.png", label) for label in ("hat", "shirt") for n in range(2)]
        tree.listing(f"clothing/{part}.csv", "path,class", rows)
    numbered = [(f"train/{digit}/IMG_{number}.png", digit) for number, digit in DIGITS.items()]
    tree.listing("sign_digits/train.csv", "path,class", sorted(numbered))  # by class, as folders come
    tree.listing("sign_digits/test.csv", "path,class", [("test/3/IMG_50.png", "3")])
    return root


@pytest.fixture(scope="module")
def out(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "open_small"
    open_small.make(source, out)
    return out


def names_of(source: Path) -> dict[str, str]:
    """The file of every image, by checksum: all images differ."""
    files = list(source.rglob("*.png"))
    found = {hashlib.sha256(path.read_bytes()).hexdigest(): path for path in files}
    assert len(found) == len(files)
    return {digest: str(path.relative_to(source)) for digest, path in found.items()}


def files_in(directory: Path, source: Path) -> list[str]:
    """Files of the images in the shards, without the set's folder and sorted."""
    shard_set, names = ShardSet.open(directory), names_of(source)
    found = [names[hashlib.sha256(shard_set.read(index)).hexdigest()] for index in range(len(shard_set))]
    return sorted(name.split("/", 1)[1] for name in found)


def test_test_and_val_have_the_same_parts_all_sound(out: Path) -> None:
    parts = {
        "omniglot": ["gallery", "query", "train"],
        "vehicle_reid": ["gallery", "query", "train"],
        "grocery_products": ["gallery", "query", "train"],
        "faces_orl": ["gallery", "pairs", "query", "train"],
        "clothing": ["test", "train"],
        "sign_digits": ["test", "train"],
    }
    for stage in ("test", "val"):
        found = {path.name: sorted(part.name for part in path.iterdir()) for path in (out / stage).iterdir()}
        assert found == parts
        for name, names in parts.items():
            for part in names:
                verify(out / stage / name / part)
    assert [path.name for path in out.parent.iterdir()] == ["open_small"]
    assert sorted(path.name for path in out.iterdir()) == ["test", "val"]


def test_the_manifests_name_source_and_licence(out: Path) -> None:
    for stage in ("test", "val"):
        for name, licence in (("omniglot", "MIT"), ("clothing", "CC0 1.0"), ("sign_digits", "Apache-2.0")):
            manifest = ShardSet.open(out / stage / name / "train").manifest
            assert manifest.licence == licence
            assert manifest.source.startswith("https://github.com/")
    assert "credit to AT&T" in ShardSet.open(out / "val/faces_orl/pairs").licence


def test_final_training_is_on_the_lists_as_they_are(source: Path, out: Path) -> None:
    for list_ in source.rglob("*.csv"):
        name, part = list_.parent.name, list_.stem
        if part in ("pairs", "val"):
            continue
        listed = sorted(line.split(",")[0] for line in list_.read_text().splitlines()[1:])
        assert files_in(out / "test" / name / part, source) == listed
    assert ShardSet.open(out / "test/faces_orl/pairs").pairs.tolist() == [[0, 0, 1, 1], [1, 2, 3, 0]]
    assert files_in(out / "val/clothing/test", source) == [f"val/{c}/{n}.png" for c in ("hat", "shirt") for n in (0, 1)]
    assert files_in(out / "val/clothing/train", source) == files_in(out / "test/clothing/train", source)


@pytest.mark.parametrize(
    ("name", "held_out", "query"),
    [
        # Of 7 images the positions 0 and 4; of 8 the first 6; of 4 the first 3.
        ("omniglot", KOREAN, [f"train/{name}/{n:02d}.png" for name in KOREAN for n in (0, 4)]),
        (
            "grocery_products",
            ["product04", "product09"],
            [f"train/product{p}/{n:02d}.png" for p in ("04", "09") for n in range(6)],
        ),
        ("faces_orl", PERSONS[3:], [f"train/{name}/{n:02d}.png" for name in PERSONS[3:] for n in range(3)]),
        ("vehicle_reid", VEHICLES[11:], [f"all/{name}_cam1.png" for name in VEHICLES[11:]]),
    ],
)
def test_held_out_identities(source: Path, out: Path, name: str, held_out: list[str], query: list[str]) -> None:
    train, queries, gallery = (ShardSet.open(out / "val" / name / part) for part in ("train", "query", "gallery"))
    assert queries.classes == gallery.classes == held_out
    assert not set(train.classes) & set(held_out)
    assert files_in(queries.directory, source) == sorted(query)
    parts = [file for shard_set in (train, queries, gallery) for file in files_in(shard_set.directory, source)]
    assert sorted(parts) == files_in(out / "test" / name / "train", source)  # each image once
    if name == "vehicle_reid":
        assert len(held_out) == 80
        assert (queries.cameras, gallery.cameras, train.cameras) == (["cam1"], ["cam2"], ["cam1", "cam2"])


def test_pairs_of_held_out_faces(source: Path, out: Path) -> None:
    shard_set = ShardSet.open(out / "val/faces_orl/pairs")
    fold, first, second, same = shard_set.pairs.T
    person = shard_set.labels
    assert shard_set.classes == PERSONS[3:]
    assert [(person[a] == person[b]) for a, b in zip(first, second, strict=True)] == same.astype(bool).tolist()
    pairs = {frozenset(pair) for pair in zip(first.tolist(), second.tolist(), strict=True)}
    assert len(pairs) == len(same) == 60  # 5 persons x 4 x 3 / 2, and as many of two persons
    positive = {frozenset(p) for p in combinations(range(20), 2) if person[p[0]] == person[p[1]]}
    assert positive == {pair for pair in pairs if len({person[index] for index in pair}) == 1}
    assert Counter(zip(fold.tolist(), same.tolist(), strict=True)) == {(f, s): 3 for f in range(10) for s in (0, 1)}
    negative = {tuple(sorted((person[a], person[b]))) for a, b, s in zip(first, second, same, strict=True) if not s}
    assert len(negative) > 5  # drawn from all 10 couples of persons, not the first ones


def test_the_last_pupil_is_held_out(source: Path, out: Path) -> None:
    assert files_in(out / "val/sign_digits/test", source) == sorted(
        f"train/{DIGITS[number]}/IMG_{number}.png" for number in range(40, 45)
    )
    assert files_in(out / "val/sign_digits/train", source) == sorted(
        f"train/{digit}/IMG_{number}.png" for number, digit in DIGITS.items() if number < 40
    )


def test_images_keep_their_bytes_and_again_is_the_same(source: Path, out: Path, tmp_path: Path) -> None:
    shard_set = ShardSet.open(out / "val/omniglot/query")
    assert Image.open(io.BytesIO(shard_set.read(0))).size == (3, 2)
    for file in source.rglob("*.png"):
        file.touch()
    open_small.make(source, tmp_path / "again")
    first, again = (
        {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        for root in (out, tmp_path / "again")
    )
    assert first == again


def test_command_prints_every_directory(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "out"
    command.main(["open_small", str(source), str(target), "--json"])
    summaries = json.loads(capsys.readouterr().out)
    assert {each["directory"] for each in summaries} == {str(path.parent) for path in target.rglob("manifest.json")}
    assert len(summaries) == 34
    with pytest.raises(UserError, match="out exists: remove it"):
        command.main(["open_small", str(source), str(target)])


@pytest.mark.parametrize("fault", ["no set", "no list", "no image", "nothing to hold out"])
def test_a_failure_leaves_nothing(source: Path, tmp_path: Path, fault: str) -> None:
    copy = tmp_path / "data"
    for path in source.rglob("*"):
        if path.is_file():
            target = copy / path.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    if fault == "no set":
        (copy / "sign_digits").rename(tmp_path / "elsewhere")
        expected = "data has no folder sign_digits: it needs omniglot, "
    elif fault == "no list":
        (copy / "sign_digits" / "test.csv").unlink()
        expected = "sign_digits/test.csv cannot be read"
    elif fault == "no image":
        (copy / "sign_digits" / "test/3/IMG_50.png").write_bytes(b"")
        expected = "IMG_50.png is corrupt"
    else:
        lines = (copy / "omniglot" / "train.csv").read_text().splitlines()
        (copy / "omniglot" / "train.csv").write_text("\n".join(line for line in lines if "Korean" not in line))
        expected = "omniglot has no image for val/omniglot/query"
    with pytest.raises(UserError, match=expected) as error:
        open_small.make(copy, tmp_path / "out" / "open_small")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
