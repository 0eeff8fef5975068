"""Face images in an MXNet RecordIO file, as MS1M and Glint360K are distributed; read without MXNet.

A record is ``magic``, ``lrecord`` (upper 3 bits: which part of a record, lower 29: length), the payload, and zeros up
to a multiple of 4 bytes. A payload that contains the magic at a multiple of 4 is cut there into parts, the magic left
out. All numbers are little-endian. Source: recordio.h and recordio.cc of dmlc-core; the header of an image, ``IfQQ``,
from python/mxnet/recordio.py of MXNet; the record 0 from recognition/arcface_torch/dataset.py of insightface.
"""

import contextlib
import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ufo_ds.data.layouts import files
from ufo_ds.data.layouts.layout import Layout, Sample, image_suffix
from ufo_ds.errors import UserError

MAGIC = struct.pack("<I", 0xCED7230A)
_RECORD = struct.Struct("<II")  # magic, lrecord
_IMAGE = struct.Struct("<IfQQ")  # flag: number of labels that follow, or 0; label; two ids
_WHOLE, _FIRST, _MIDDLE, _LAST = range(4)
_TYPE_BYTES = 12  # by which an image's type is known


class _BadRecord(Exception):
    """What is wrong with a record."""


@dataclass(frozen=True, slots=True)
class RecordImage:
    """The image of one record. Each reading opens the file anew, so that threads and processes do not share it."""

    file: Path
    key: int
    offset: int
    suffix: str

    def read_bytes(self) -> bytes:
        with _mapped(self.file) as data:
            try:
                payload = _payload(data, self.offset, len(data))
                return payload[_labels(payload)[1] :]
            except _BadRecord as fault:
                raise UserError(f"{self} {fault}: copy the file again") from None

    def __str__(self) -> str:
        return f"{self.file} record {self.key}"


def read_recordio(source: Path) -> Layout:
    """A directory with train.rec and train.idx, or a .rec file with its .idx beside it.

    The label is the record's number of the identity, with zeros in front so that names sort as numbers do; the order
    that of the keys. If record 0 has no image but the first key that is no image's, the images are those before it.
    A file "property" (classes,height,width) is checked against the labels.

    Only the beginning of each record is read here.

    Raises:
        UserError: a file is missing, empty or cut off, the index does not fit the records, or a label is no class.
    """
    source = Path(source)
    file = source / "train.rec" if source.is_dir() else source
    keys, offsets = _read_index(file.with_suffix(".idx"))
    images: list[RecordImage] = []
    with _mapped(file) as data:
        chosen = _images(file, data, keys, offsets)
        keys, offsets = keys[chosen], offsets[chosen]
        labels = np.empty(len(keys), dtype=np.int64)
        for row in tqdm(range(len(keys)), "list", unit="image", disable=None):
            key, offset = int(keys[row]), int(offsets[row])
            label, first_bytes = _head(file, data, key, offset)
            if not (label >= 0 and label.is_integer()):  # false for NaN
                raise UserError(f"{file} record {key} has label {label}: number the identities from 0")
            labels[row] = int(label)
            images.append(RecordImage(file, key, offset, image_suffix(first_bytes)))
    highest = int(labels.max())
    _check_property(file.with_name("property"), highest)
    names = {label: f"{label:0{len(str(highest))}d}" for label in np.unique(labels).tolist()}
    return Layout([Sample(image, names[label]) for image, label in zip(images, labels.tolist(), strict=True)])


def _read_index(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Keys and offsets, int64 [N] each, by key."""
    table = files.read_integers(path, columns=2)
    table = table[np.argsort(table[:, 0], kind="stable")]
    twice = np.flatnonzero(np.diff(table[:, 0]) == 0)
    if twice.size:
        raise UserError(f"{path}: key {table[twice[0], 0]} is there twice: make the index again")
    return table[:, 0], table[:, 1]


def _images(file: Path, data: mmap.mmap, keys: np.ndarray, offsets: np.ndarray) -> slice:
    """Which records are images: all, or those from key 1 that record 0 tells of."""
    if keys[0] != 0:
        return slice(None)
    end, first_bytes = _head(file, data, 0, int(offsets[0]))
    if first_bytes:
        return slice(None)
    if not (2 <= end <= len(keys) and end.is_integer() and np.array_equal(keys[1 : int(end)], np.arange(1, end))):
        raise UserError(f"{file} record 0 says that images end before key {end:g}, but its index lacks some: copy both")
    return slice(1, int(end))


def _head(file: Path, data: mmap.mmap, key: int, offset: int) -> tuple[float, bytes]:
    """The first label of a record and the first bytes of its image."""
    try:
        payload = _payload(data, offset, _IMAGE.size + _TYPE_BYTES)
        (labels,) = struct.unpack_from("<I", payload.ljust(4, b"\0"))
        if labels:
            payload = _payload(data, offset, _IMAGE.size + 4 * labels + _TYPE_BYTES)
        label, start = _labels(payload)
    except _BadRecord as fault:
        raise UserError(f"{file} record {key} {fault}: copy the file and its index again") from None
    return label, payload[start:]


def _labels(payload: bytes) -> tuple[float, int]:
    """The first label, and where the image begins."""
    if len(payload) < _IMAGE.size:
        raise _BadRecord("is too short for an image")
    labels, label, _, _ = _IMAGE.unpack_from(payload)
    start = _IMAGE.size + 4 * labels
    if len(payload) < start:
        raise _BadRecord(f"is too short for its {labels} labels")
    return (struct.unpack_from("<f", payload, _IMAGE.size)[0] if labels else label), start


def _payload(data: mmap.mmap, offset: int, most: int) -> bytes:
    """The payload of the record at ``offset``, its first ``most`` bytes at least; its parts are all checked."""
    parts: list[bytes] = []
    while True:
        start = offset + _RECORD.size
        if start > len(data):
            raise _BadRecord(f"is at byte {offset}, and the file has {len(data)}")
        magic, lrecord = data[offset : offset + 4], _RECORD.unpack_from(data, offset)[1]
        part, length = lrecord >> 29, lrecord & 0x1FFFFFFF
        if magic != MAGIC or part not in ((_MIDDLE, _LAST) if parts else (_WHOLE, _FIRST)):
            raise _BadRecord(f"does not begin or go on at byte {offset}")
        if start + length > len(data):
            raise _BadRecord("ends after the file does")
        parts.append(data[start : start + min(length, most)])
        if part in (_WHOLE, _LAST):
            return MAGIC.join(parts)
        offset = start + (length + 3) // 4 * 4


def _check_property(path: Path, highest: int) -> None:
    if not path.is_file():
        return
    classes = next((row for _, row in files.rows(path)), [""])[0].partition(",")[0]
    if not classes.isdecimal() or highest >= int(classes):
        raise UserError(f"{path} tells of {classes!r} classes, but there is a label {highest}: correct or remove it")


@contextlib.contextmanager
def _mapped(file: Path) -> Iterator[mmap.mmap]:
    try:
        with file.open("rb") as opened:
            if opened.seek(0, 2) == 0:
                raise UserError(f"{file} is empty: copy it again")
            with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
                yield data
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}): give a .rec file or its directory") from None
