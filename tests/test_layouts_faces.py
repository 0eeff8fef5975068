"""Pair lists and .bin files, written here by hand, come through `ufo shards` to the byte; no pickle runs anything."""

import os
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.model_selection import KFold

from tests.layout_files import contents, converted, encoded, fault
from ufo_ds import shards as command
from ufo_ds.data.layouts.faces import read_facebin, read_pairs
from ufo_ds.data.shards import ShardSet
from ufo_ds.errors import UserError


def write_people(folder: Path, people: dict[str, int]) -> dict[tuple[str, int], bytes]:
    images = {(name, n): encoded(100 * i + n) for i, name in enumerate(people) for n in range(1, people[name] + 1)}
    for (name, n), data in images.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / f"{name}_{n:04d}.jpg").write_bytes(data)
    return images


FOLDS_OF_2 = [
    [("Ann_A", 1, "Ann_A", 2), ("Bo", 1, "Bo", 3), ("Ann_A", 1, "Bo", 1), ("Bo", 2, "Cy_C", 1)],
    [("Ann_A", 2, "Ann_A", 3), ("Bo", 2, "Bo", 3), ("Cy_C", 1, "Ann_A", 3), ("Cy_C", 1, "Bo", 3)],
]


def lfw_lines(rows: list[tuple[str, int, str, int]]) -> str:
    return "".join(f"{a}\t{m}\t{n}\n" if a == b else f"{a}\t{m}\t{b}\t{n}\n" for a, m, b, n in rows)


@pytest.mark.parametrize("images_in", ["", "lfw-deepfunneled"])
def test_lfw_pairs(tmp_path: Path, images_in: str) -> None:
    images = write_people(tmp_path / "lfw" / images_in, {"Ann_A": 3, "Bo": 3, "Cy_C": 1})
    (tmp_path / "lfw" / "pairs.txt").write_text("2\t2\n" + "".join(map(lfw_lines, FOLDS_OF_2)))
    shard_set = converted("pairs", tmp_path / "lfw" / "pairs.txt", tmp_path / "out")
    assert shard_set.pairs is not None
    expected = [(f, (a, m), (b, n)) for f, rows in enumerate(FOLDS_OF_2) for a, m, b, n in rows]
    assert len(shard_set.pairs) == len(expected)
    for (fold, first, second, same), (f, one, two) in zip(shard_set.pairs.tolist(), expected, strict=True):
        assert (fold, same) == (f, one[0] == two[0])
        assert shard_set.read(first) == images[one]
        assert shard_set.read(second) == images[two]
        assert [shard_set.classes[shard_set.labels[i]] for i in (first, second)] == [one[0], two[0]]
    assert len(shard_set) == 7, "an image of several pairs is stored once"


@pytest.mark.parametrize("header", ["", "40\n", "20\n"])
def test_lfw_pairs_without_folds(tmp_path: Path, header: str) -> None:
    """In the order of LFW's View 2 the folds are those that its header would tell; kind by kind, both are in each."""
    write_people(tmp_path, {"Ann_A": 3, "Bo": 3, "Cy_C": 1})
    rows = [row for _ in range(5) for fold in FOLDS_OF_2 for row in fold]
    for ordered in (rows, sorted(rows, key=lambda row: row[0] != row[2])):
        (tmp_path / "pairs.txt").write_text(header + lfw_lines(ordered))
        layout = read_pairs(tmp_path / "pairs.txt")
        assert layout.pairs is not None
        for kind in (True, False):
            assert [p.fold for p in layout.pairs if p.same == kind] == [fold for fold in range(10) for _ in range(2)]
    (tmp_path / "pairs.txt").write_text("10 2\n" + lfw_lines(rows))
    headed = read_pairs(tmp_path / "pairs.txt")
    (tmp_path / "pairs.txt").write_text(header + lfw_lines(rows))
    assert read_pairs(tmp_path / "pairs.txt") == headed


def test_pairs_of_paths(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = {f"img/{n:03d}.{'png' if n % 2 else 'jpg'}": encoded(n, "PNG" if n % 2 else "JPEG") for n in range(9)}
    (tmp_path / "data" / "img").mkdir(parents=True)
    for name, data in images.items():
        (tmp_path / "data" / name).write_bytes(data)
    rows = [(*rng.choice(list(images), 2), int(rng.integers(2))) for _ in range(23)]
    (tmp_path / "list.txt").write_text("\r\n".join(f"{a} {b} {same}" for a, b, same in rows))
    shard_set = converted("pairs", tmp_path / "list.txt", tmp_path / "out")
    assert shard_set.pairs is not None
    for (a, b, is_same), (_, first, second, same) in zip(rows, shard_set.pairs.tolist(), strict=True):
        assert (shard_set.read(first), shard_set.read(second), same) == (images[a], images[b], is_same)
    assert_kfold(shard_set.pairs[:, 0])


def assert_kfold(folds: np.ndarray) -> None:
    for fold, (_, test) in enumerate(KFold(10, shuffle=False).split(folds)):
        np.testing.assert_array_equal(np.flatnonzero(folds == fold), test)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "pairs.txt lists no pair"),
        ("10 300\n", "pairs.txt lists no pair"),
        ("1 2\nBo 1 2\nBo 1 Ann_A 1\n", "2 pairs, but its first line tells 1 folds of 2 x 2"),
        ("1 1\nBo 1 Ann_A 1\nBo 1 2\n", "pairs.txt:2: a fold has 1 pairs name n1 n2"),
        ("7\nBo 1 2\n", "1 pairs, but its first line tells 7"),
        ("Bo 1 2\nBo 1 two\n", "pairs.txt:2: 'Bo 1 two' is no pair"),
        ("Bo 1 2\nBo 1\n", "pairs.txt:2: 'Bo 1' is no pair"),
        ("Bo 1 2\nBo 1 7\n", r"pairs.txt:2: .*Bo_0007.jpg does not exist"),
        ("Dee 1 2\n", "pairs.txt:1: Dee is neither in .* nor in a folder directly in it"),
        ("Bo/Bo_0001.jpg Bo/Bo_0002.jpg 2\n", "pairs.txt:1: .* is no pair"),
        ("Bo/Bo_0001.jpg Bo/Bo_0002.gif 1\n", "'Bo/Bo_0002.gif' is not an image"),
        ("Bo/Bo_0001.jpg Bo/Bo_0009.jpg 1\n", r"pairs.txt:1: .*Bo_0009.jpg does not exist"),
        ("\udcff", "not text in UTF-8"),
    ],
)
def test_wrong_pairs(tmp_path: Path, text: str, message: str) -> None:
    write_people(tmp_path, {"Ann_A": 3, "Bo": 3})
    (tmp_path / "pairs.txt").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=message):
        read_pairs(tmp_path / "pairs.txt")


def python2(images: list[bytes], same: list[bool]) -> bytes:
    """As Python 2 pickles ``(images, same)`` with protocol 2: its strings are ``BINSTRING``."""
    strings = b"".join(b"T" + struct.pack("<i", len(data)) + data for data in images)
    truths = b"".join(b"\x88" if value else b"\x89" for value in same)
    return b"\x80\x02](" + strings + b"e](" + truths + b"e\x86."


def dumped(kind: str, images: list[bytes], same: list[bool]) -> bytes:
    if kind == "python 2":
        return python2(images, same)
    form, protocol = kind.split()
    arrays = [np.frombuffer(data, np.uint8) for data in images]
    if form == "bytes":
        return pickle.dumps((images, same), int(protocol))
    if form == "writable":
        return pickle.dumps([[array.copy() for array in arrays], np.array(same)], int(protocol))
    data = pickle.dumps((arrays, list(np.array(same))), int(protocol))
    return data.replace(b"numpy._core", b"numpy.core") if form == "numpy1" else data


KINDS = ["python 2", *(f"bytes {p}" for p in range(6)), *(f"arrays {p}" for p in range(6)), "numpy1 2", "writable 5"]


@pytest.mark.parametrize("kind", KINDS)
def test_facebin(tmp_path: Path, kind: str) -> None:
    images = [encoded(n, "PNG" if n == 3 else "JPEG") for n in range(46)]
    same = (np.random.default_rng(0).integers(0, 2, 23) == 1).tolist()
    (tmp_path / "lfw.bin").write_bytes(dumped(kind, images, same))
    shard_set = converted("facebin", tmp_path / "lfw.bin", tmp_path / "out")
    assert contents(shard_set) == images
    assert shard_set.pairs is not None
    assert shard_set.pairs[:, 1:].tolist() == [[2 * i, 2 * i + 1, int(is_same)] for i, is_same in enumerate(same)]
    assert_kfold(shard_set.pairs[:, 0])


def test_directory_of_facebins(tmp_path: Path) -> None:
    sets = {"lfw": [encoded(n) for n in range(4)], "cfp_fp": [encoded(n) for n in range(10, 16)]}
    for name, images in sets.items():
        (tmp_path / f"{name}.bin").write_bytes(pickle.dumps((images, [True, False, True][: len(images) // 2]), 2))
    command.main(["facebin", str(tmp_path), str(tmp_path / "out")])
    for name, images in sets.items():
        assert contents(ShardSet.open(tmp_path / "out" / name)) == images


def text(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


def named(module: str, name: str) -> bytes:
    """Protocol 4: push module.name, where name may have dots."""
    return text(module) + text(name) + b"\x93"


class Call:
    """Is pickled as a call."""

    def __init__(self, function: Any, *arguments: Any):
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("function", ["os.system", "builtins.eval", "numpy.load", "getattr"])
@pytest.mark.parametrize("place", ["alone", "in the images", "as argument"])
def test_no_call_of_a_pickle_is_made(tmp_path: Path, protocol: int, function: str, place: str) -> None:
    trace = tmp_path / "trace"
    calls = {
        "os.system": Call(os.system, f"touch {trace}"),
        "builtins.eval": Call(eval, f"open({str(trace)!r}, 'w').close()"),
        "numpy.load": Call(np.load, str(trace), None, True),
        "getattr": Call(getattr, Call(__import__, "os"), "system"),
    }
    evil = calls[function]
    content = {
        "alone": evil,
        "in the images": ([encoded(0), evil], [True]),
        "as argument": ([encoded(0), Call(np.dtype, evil)], [True]),
    }[place]
    data = pickle.dumps(content, protocol)
    (tmp_path / "evil.bin").write_bytes(data)
    message = fault(read_facebin, tmp_path / "evil.bin")
    assert "asks for" in message
    assert any(name in message for name in ("system", "eval", "load", "getattr", "__import__"))
    assert not trace.exists()
    if function in ("os.system", "builtins.eval") and place == "alone":
        pickle.loads(data)
        assert trace.exists(), "the pickle is not malicious"


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (named("numpy", "dtype.__class__"), "'numpy.dtype.__class__'"),
        (named("numpy", "ndarray.tofile"), "'numpy.ndarray.tofile'"),
        (named("numpy._core.multiarray", "scalar.__self__.__loader__"), "scalar.__self__.__loader__"),
        (named("numpy.core.multiarray", "fromfile"), "'numpy.core.multiarray.fromfile'"),
        (named("numpy", "core.multiarray._reconstruct"), "'numpy.core.multiarray._reconstruct'"),
        (named("_codecs", "encode.__class__"), "'_codecs.encode.__class__'"),
        (b"cos\nsystem\n", "'os.system'"),
        (b"(S'true'\nios\nsystem\n", "'os.system'"),  # INST
        (named("ufo_ds.data.layouts.restricted_pickle", "_Unpickler"), "_Unpickler"),
        (named("_codecs", "encode") + text("aa") + text("hex") + b"\x86R", "bytes as 'hex'"),
        (named("_codecs", "encode") + b"}" + text("_function") + b"Nsb", "a function has no state"),
        (named("_codecs", "encode") + b")\x81", "not a pickle"),  # NEWOBJ
        (named("numpy", "dtype") + text("O") + b"\x85R", "an array of 'O'"),
        (named("numpy._core.numeric", "_frombuffer") + b"C\x01a" + text("u1") + b"\x86R", "without a dtype"),
        (b"Pos.system\n", "not a pickle"),  # PERSID
        (b"\x82\x01", "not a pickle"),  # EXT1
    ],
)
def test_no_other_way_out_of_a_pickle(tmp_path: Path, program: bytes, message: str) -> None:
    (tmp_path / "evil.bin").write_bytes(b"\x80\x04" + program + b".")
    assert message in fault(read_facebin, tmp_path / "evil.bin")
    test_facebin(tmp_path, "arrays 4")  # what was tried left nothing behind


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2, 3], "does not hold a list of images and a list"),
        (([encoded(0)] * 3, [True]), "3 images for 1 pairs"),
        (([], []), "0 images for 0 pairs"),
        (([encoded(0), "text"], [True]), "image 1 is of type str"),
        (([encoded(0)] * 2, [2]), "not truth values"),
        (([encoded(0)] * 2, None), "not truth values"),
        (([encoded(0), np.zeros(3)], [True]), "an array of 'f8'"),
        (([encoded(0), np.array([None])], [True]), "an array of 'O8'"),
    ],
)
def test_wrong_facebin(tmp_path: Path, content: Any, message: str) -> None:
    (tmp_path / "x.bin").write_bytes(pickle.dumps(content, 2))
    assert message in fault(read_facebin, tmp_path / "x.bin")


def test_broken_facebin(tmp_path: Path) -> None:
    data = pickle.dumps(([encoded(0)] * 2, [True]), 2)
    for end in (0, 1, 10, len(data) - 1):
        (tmp_path / "x.bin").write_bytes(data[:end])
        assert "not a pickle of images" in fault(read_facebin, tmp_path / "x.bin")
    (tmp_path / "x.bin").unlink()
    assert "holds no .bin file" in fault(read_facebin, tmp_path)
    assert "cannot be read" in fault(read_facebin, tmp_path / "x.bin")
