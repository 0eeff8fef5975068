"""Tars of others are read like shards of ours: the bytes of stock webdataset's tars; every fault is one line."""

import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.elsewhere.served import add, make_tar, make_tars, png, refused
from tests.test_mixing import make_shards
from ufo_ds.data import tar_index
from ufo_ds.data.evaluation_set import EvaluationSet
from ufo_ds.data.shard_specs import tars_of
from ufo_ds.data.shards import ShardSet, verify


def test_one_string_names_a_directory_or_tars(tmp_path: Path) -> None:
    assert tars_of("/d/t-{00..02}.tar") == ["/d/t-00.tar", "/d/t-01.tar", "/d/t-02.tar"]
    assert tars_of("a.tar::b-{0..1}.tar") == ["a.tar", "b-0.tar", "b-1.tar"]
    assert tars_of("pipe:cat x{1,2} | awk '{print $1}'") == [f"pipe:cat x{n} | awk '{{print $1}}'" for n in (1, 2)]
    assert tars_of("https://h/t.tar?key=1") == ["https://h/t.tar?key=1"]
    assert tars_of("https://h/set?key=a.tar") is None
    assert tars_of("data/flowers") is None
    (tmp_path / "a{1..2}.tar").mkdir()
    assert tars_of(str(tmp_path / "a{1..2}.tar")) is None
    for spec, words in [("a{0..9.tar", "a brace"), ("a.tar.gz", "pipe:gzip -dc"), ("s3://b/a.tar", "pipe:aws"),
                        ("a.tar::", "empty"), ("http://[/a.tar", "Invalid")]:  # fmt: skip
        assert words in refused(spec)


def test_tars_of_stock_webdataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = make_tars(tmp_path / "data", 4)
    spec = f"{tmp_path}/data/train-{{00000..00003}}.tar"
    shards = ShardSet.open(spec)
    assert [shards.read(n) for n in range(len(shards))] == images
    assert shards.classes == [str(3 * n) for n in range(11)]  # by value: "12" after "9"
    assert shards.labels.tolist() == [n % 11 for n in range(24)]
    assert (shards.cameras, shards.pairs, shards.licence, shards.name) == ([], None, "unknown", spec)
    assert shards.camera_ids.tolist() == [-1] * 24
    verify(spec)
    # From now on nothing is scanned, by whatever process; a changed tar is, alone.
    scanned: list[str] = []
    scan = tar_index.scan
    monkeypatch.setattr(tar_index, "scan", lambda file, name: scanned.append(name) or scan(file, name))
    again = ShardSet.open(spec)
    assert scanned == []
    for name in ("labels", "camera_ids", "_shard", "_offset", "_length"):
        np.testing.assert_array_equal(getattr(again, name), getattr(shards, name))
    last = tmp_path / "data" / "train-00003.tar"
    os.utime(last, ns=(0, 0))
    ShardSet.open(spec)
    assert scanned == [str(last)]
    # An index that was not written out is made again.
    for path in (tmp_path / "cache" / "indices").iterdir():
        path.write_bytes(path.read_bytes()[:-9])
    assert ShardSet.open(spec).read(23) == images[23]
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.suffix in (".part", ".tar")]


def test_names_of_classes_and_cameras_from_json(tmp_path: Path) -> None:
    def sample(key: str, seed: int, fields: object) -> list[tuple[str, bytes]]:
        return [(f"{key}.JPEG", png(seed)), (f"{key}.json", json.dumps(fields).encode()), (f"{key}.txt", b"a caption")]

    first = make_tar(tmp_path / "a.tar", *sample("./x/1", 0, {"label": "p2", "camera": "c9"}),
                     *sample("x/2.left", 1, {"cls": 7}), ("__meta__/a.json", b"?"), ("README", b"?"))  # fmt: skip
    fields = {"label": "p10", "camera": 4}
    second = make_tar(tmp_path / "b.tar", *sample("1", 2, fields), ("1.cls", b"5"), ("2.png", png(3)), ("2.cls", b"7"))
    # "x/2.left.JPEG" is no image by itself: the extension is all behind the first dot.
    assert "sample 'x/2' has 0 images" in refused(f"{first}::{second}")
    first = make_tar(tmp_path / "a.tar", *sample("./x/1", 0, {"label": "p2", "camera": "c9"}),
                     *sample("x/2", 1, {"cls": 7}), ("__meta__/a.json", b"?"), ("README", b"?"))  # fmt: skip
    shards = ShardSet.open(f"{first}::{second}")
    assert shards.classes == ["7", "p10", "p2"]
    assert shards.labels.tolist() == [2, 0, 1, 0]
    assert shards.cameras == ["4", "c9"]
    assert shards.camera_ids.tolist() == [1, -1, 0, -1]
    assert [shards.read(n) for n in range(4)] == [png(n) for n in range(4)]
    verify(f"{first}::{second}")
    benchmark = EvaluationSet.open(f"{first}::{second}")
    assert benchmark.label_names == ["p2", "7", "p10", "7"]
    assert benchmark.camera_names == ["c9", None, "4", None]


def test_tars_of_our_own_directory_have_its_names(tmp_path: Path) -> None:
    directory = make_shards(tmp_path, {"bee": 4, "ant": 3})
    whole, tars = ShardSet.open(directory), ShardSet.open(f"{directory}/shard-00000{{0..1}}.tar")
    assert tars.classes == whole.classes == ["ant", "bee"]
    np.testing.assert_array_equal(tars.labels, whole.labels)
    assert [tars.read(n) for n in range(7)] == [whole.read(n) for n in range(7)]


def special(kind: bytes) -> Callable[[tarfile.TarFile], None]:
    def write(tar: tarfile.TarFile) -> None:
        member = tarfile.TarInfo("b.png")
        member.type, member.linkname = kind, "/etc/passwd"
        tar.addfile(member)

    return write


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (lambda tar: add(tar, "/etc/b.png", b""), "'/etc/b.png' points outside"),
        (lambda tar: add(tar, "x/../../b.png", b""), "'x/../../b.png' points outside"),
        (special(tarfile.SYMTYPE), "'b.png' is not a plain file"),
        (special(tarfile.LNKTYPE), "'b.png' is not a plain file"),
        (special(tarfile.CHRTYPE), "'b.png' is not a plain file"),
        (special(tarfile.FIFOTYPE), "'b.png' is not a plain file"),
        (lambda tar: add(tar, "a.jpg", b""), "sample 'a' has 2 images among cls, png, jpg"),
        (lambda tar: add(tar, "a.cls", b"1"), "sample 'a' has two files of one name"),
        (lambda tar: add(tar, "b.cls", b"1"), "sample 'b' has 0 images among cls"),
        (lambda tar: add(tar, "b.png", b""), "sample 'b' has no label: add"),
        (lambda tar: (add(tar, "b.png", b""), add(tar, "b.json", b"{}")), "sample 'b' has no label: add"),
        (lambda tar: (add(tar, "b.png", b""), add(tar, "b.json", b"{")), "sample 'b' has no label: "),
        (lambda tar: (add(tar, "b.png", b""), add(tar, "b.json", b'{"label": [1]}')), "sample 'b' has '[1]' for a"),
        (lambda tar: (add(tar, "b.png", b""), add(tar, "b.cls", b"\xff\x00")), "sample 'b' has no label: "),
        (lambda tar: (add(tar, "b.png", b""), add(tar, "b.cls", bytes(2**20 + 1))), "too many for a label"),
    ],
)
def test_a_tar_that_is_not_made_of_samples(
    tmp_path: Path, write: Callable[[tarfile.TarFile], object], words: str
) -> None:
    path = tmp_path / "bad.tar"
    with tarfile.open(path, "w") as tar:
        add(tar, "a.cls", b"0")
        add(tar, "a.png", png(0))
        write(tar)
    message = refused(str(path))
    assert words in message
    assert str(path) in message


def test_a_tar_cut_anywhere_is_refused(tmp_path: Path) -> None:
    """At every block, and within: only the padding after the end's first block of zeros may lack."""
    make_tars(tmp_path / "data", 1, per_tar=2)
    whole = (tmp_path / "data" / "train-00000.tar").read_bytes()
    end = len(whole.rstrip(b"\0"))
    end += -end % 512 + 512
    path = tmp_path / "cut.tar"
    for size in [*range(0, len(whole), 512), 1, 300, 700, end - 1]:
        path.write_bytes(whole[:size])
        if size >= end:
            assert len(ShardSet.open(str(path))) == 2
        else:
            message = refused(str(path))
            assert f"{path} is not a whole tar" in message, size
            assert "copy or make it again" in message
    for at in range(0, end - 512, 512):  # a damaged header
        if whole[at + 257 : at + 262] == b"ustar":
            path.write_bytes(whole[: at + 100] + b"\xff" * 60 + whole[at + 160 :])
            assert f"{path} is not a whole tar" in refused(str(path))
    assert "correct its path or range" in refused(str(tmp_path / "none.tar"))
    assert "is not a file" in refused(f"{path}::{tmp_path}")
    make_tar(path)
    assert "holds no sample" in refused(str(path))
