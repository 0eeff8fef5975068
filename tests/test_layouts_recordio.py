"""RecordIO files, written here by hand, come through `ufo shards` to the byte."""

import struct
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.layout_files import contents, converted, encoded, fault
from ufo_ds.data.layouts.recordio import read_recordio

MAGIC = struct.pack("<I", 0xCED7230A)


def record(payload: bytes) -> bytes:
    """A record as dmlc's writer makes it."""
    parts = [b""]
    for at in range(0, len(payload), 4):
        word = payload[at : at + 4]
        if word == MAGIC:
            parts.append(b"")
        else:
            parts[-1] += word
    flags = [0] if len(parts) == 1 else [1, *[2] * (len(parts) - 2), 3]
    return b"".join(
        MAGIC + struct.pack("<I", flag << 29 | len(part)) + part + bytes(-len(part) % 4)
        for flag, part in zip(flags, parts, strict=True)
    )


def packed(label: float | list[float], key: int, image: bytes = b"") -> bytes:
    if isinstance(label, list):
        return struct.pack("<IfQQ", len(label), 0, key, 0) + struct.pack(f"<{len(label)}f", *label) + image
    return struct.pack("<IfQQ", 0, label, key, 0) + image


def write_records(folder: Path, payloads: dict[int, bytes]) -> None:
    folder.mkdir(exist_ok=True)
    records, index = b"", ""
    for key, payload in payloads.items():
        index += f"{key}\t{len(records)}\n"
        records += record(payload)
    (folder / "train.rec").write_bytes(records)
    (folder / "train.idx").write_text(index)


def with_magic(jpeg: bytes) -> bytes:
    """A JPEG whose comment holds the magic, aligned and not, twice in succession and at the end of a part."""
    comment = b"ab" + MAGIC + MAGIC + b"c" + MAGIC + b"def" + MAGIC + b"gh"
    return jpeg[:2] + b"\xff\xfe" + struct.pack(">H", len(comment) + 2) + comment + jpeg[2:]


IMAGES = {1: encoded(1), 2: encoded(2, "PNG"), 3: with_magic(encoded(3)), 4: encoded(4, hw=(9, 7)), 5: encoded(5)}
LABELS = {1: 0, 2: 0, 3: 10, 4: 10, 5: 7}


def insightface_records() -> dict[int, bytes]:
    images = {key: packed(LABELS[key] if key != 4 else [10.0, 0.5], key, data) for key, data in IMAGES.items()}
    ranges = {6: packed([1, 3], 6), 7: packed([3, 5], 7), 8: packed([5, 6], 8)}
    return {0: packed([6, 9], 0)} | images | ranges


@pytest.mark.parametrize("form", ["insightface", "plain", "from 0"])
def test_recordio(tmp_path: Path, form: str) -> None:
    payloads = insightface_records()
    if form != "insightface":
        payloads = {key - (form == "from 0"): payloads[key] for key in IMAGES}
    write_records(tmp_path / "ms1m", payloads)
    (tmp_path / "ms1m" / "property").write_text("11,112,112\n")
    source = tmp_path / "ms1m" / "train.rec" if form == "plain" else tmp_path / "ms1m"
    shard_set = converted("recordio", source, tmp_path / "out")
    assert contents(shard_set) == list(IMAGES.values())
    assert shard_set.classes == ["00", "07", "10"]
    assert [int(shard_set.classes[label]) for label in shard_set.labels] == list(LABELS.values())
    layout = read_recordio(source)
    assert [sample.path.suffix for sample in layout.samples] == [".jpg", ".png", ".jpg", ".jpg", ".jpg"]
    assert str(layout.samples[2].path).endswith("train.rec record 2" if form == "from 0" else "train.rec record 3")


def test_records_with_magic_anywhere(tmp_path: Path) -> None:
    """Also in the header and among the labels, where the parts are shorter than what a listing looks at."""
    rng = np.random.default_rng(0)
    words = [MAGIC, b"\0\0\0\0", b"abcd"]
    bodies = [b"".join(words[i] for i in rng.integers(0, 3, 9)) + b"xyz"[: rng.integers(4)] for _ in range(60)]
    (magic,) = struct.unpack("<I", MAGIC)
    payloads = {
        n: struct.pack("<IfQQ", n % 4, 3, n if n % 5 else magic, magic) + struct.pack("<f", 3) * (n % 4) + body
        for n, body in enumerate(bodies)
    }
    write_records(tmp_path, payloads)
    samples = read_recordio(tmp_path).samples
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda sample: sample.path.read_bytes(), samples * 5)) == bodies * 5
    assert {sample.label for sample in samples} == {"3"}


def test_only_heads_are_read_while_listing(tmp_path: Path) -> None:
    """Images of 16 MiB, holes of a sparse file: copying one would show in the memory in use."""
    size = 1 << 24
    with (tmp_path / "train.rec").open("wb") as file:
        for n in range(32):
            file.seek(n * (size + 8))
            file.write(MAGIC + struct.pack("<I", size) + packed(float(n), n))
        file.truncate(32 * (size + 8))
    (tmp_path / "train.idx").write_text("".join(f"{n}\t{n * (size + 8)}\n" for n in range(32)))
    tracemalloc.start()
    try:
        samples = read_recordio(tmp_path).samples
        assert tracemalloc.get_traced_memory()[1] < size / 4
    finally:
        tracemalloc.stop()
    assert [sample.label for sample in samples] == [f"{n:02d}" for n in range(32)]


def test_wrong_recordio(tmp_path: Path) -> None:
    def message(index: str | None = None, **records: Any) -> str:
        write_records(tmp_path, insightface_records() | {int(key[1:]): data for key, data in records.items()})
        if index is not None:
            (tmp_path / "train.idx").write_text(index)
        return fault(read_recordio, tmp_path)

    assert "record 2 has label 0.5" in message(_2=packed(0.5, 2, IMAGES[2]))
    assert "record 2 has label nan" in message(_2=packed(float("nan"), 2, IMAGES[2]))
    assert "record 2 has label -1" in message(_2=packed(-1, 2, IMAGES[2]))
    assert "record 2 is too short for an image" in message(_2=b"abc")
    assert "record 2 is too short for its 4000000000 labels" in message(_2=struct.pack("<IfQQ", 4_000_000_000, 0, 2, 0))
    assert "record 0 says that images end before key 99" in message(_0=packed([99, 100], 0))
    assert "record 0 says that images end before key nan" in message(_0=packed([float("nan"), 100], 0))
    assert "record 7 does not begin or go on at byte 2" in message(index="7\t2\n")
    assert "record 7 is at byte 999999" in message(index="7\t999999\n")
    assert "train.idx:2: '3' is not 2 numbers" in message(index="1\t0\n3\n")
    assert "train.idx:1: '1\\t-8' is not 2 numbers" in message(index="1\t-8\n")
    assert "train.idx: key 3 is there twice" in message(index="3\t0\n3\t0\n")
    assert "train.idx is empty" in message(index="")

    write_records(tmp_path, insightface_records())
    whole = (tmp_path / "train.rec").read_bytes()
    (tmp_path / "train.rec").write_bytes(whole[:-16])
    index = (tmp_path / "train.idx").read_text()
    (tmp_path / "train.idx").write_text("".join(index.splitlines(keepends=True)[1:]))
    assert "record 8 ends after the file does" in fault(read_recordio, tmp_path)
    (tmp_path / "train.rec").write_bytes(whole.replace(MAGIC + b"", b"none", 1))
    (tmp_path / "train.idx").write_text(index)
    assert "record 0 does not begin or go on at byte 0" in fault(read_recordio, tmp_path)
    (tmp_path / "train.rec").write_bytes(b"")
    assert "train.rec is empty" in fault(read_recordio, tmp_path)
    (tmp_path / "train.rec").unlink()
    assert "train.rec cannot be read" in fault(read_recordio, tmp_path)
    (tmp_path / "train.idx").unlink()
    assert "train.idx cannot be read" in fault(read_recordio, tmp_path)

    write_records(tmp_path, insightface_records())
    for property_text in ("10,112,112", "many", ""):
        (tmp_path / "property").write_text(property_text)
        assert "but there is a label 10" in fault(read_recordio, tmp_path)


def test_records_that_go_on_wrongly(tmp_path: Path) -> None:
    payload = packed(3, 1, with_magic(encoded(3)))
    flags = [at for at in range(0, len(record(payload)), 4) if record(payload)[at : at + 4] == MAGIC]
    for at, wrong in ((flags[0], 2), (flags[0], 3), (flags[1], 0), (flags[1], 1), (flags[-1], 2), (flags[0], 5)):
        data = bytearray(record(payload))
        data[at + 7] = wrong << 5 | data[at + 7] & 0x1F
        (tmp_path / "train.rec").write_bytes(data)
        (tmp_path / "train.idx").write_text("1\t0\n")
        assert "record 1" in fault(read_recordio, tmp_path)
