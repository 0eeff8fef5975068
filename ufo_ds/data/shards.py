"""WebDataset shards with an index for random access and a manifest that says what they hold.

A directory of shards::

    shard-000000.tar ...   000000012.jpg (the original bytes), 000000012.cls (label), 000000012.json (names)
    index.safetensors      per sample: shard, offset and length of the image in its tar, label, camera; and the pairs
    manifest.json          counts, class and camera names, licence, sizes and checksums

Any WebDataset reader streams the shards; :class:`ShardSet` reads single images by their offset.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import tarfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import numpy as np
import webdataset
from pydantic import TypeAdapter, ValidationError
from safetensors.numpy import load_file, save
from tqdm import tqdm

from ufo_ds.data.layouts import Layout, Pair, Sample, is_image
from ufo_ds.data.transforms import CorruptImage, decode
from ufo_ds.errors import UserError

MANIFEST = "manifest.json"
INDEX = "index.safetensors"
READ_AHEAD = 64  # images held in memory while they are checked, per worker
_AGAIN = "make the shards again with `ufo shards`"
MAX_OPEN = 256  # shards a process keeps open: well below the usual limit of 1024 descriptors


@dataclasses.dataclass
class ClassEntry:
    name: str
    samples: int


@dataclasses.dataclass
class ShardEntry:
    name: str
    bytes: int
    sha256: str
    samples: int


@dataclasses.dataclass
class Manifest:
    version: Literal[1]
    samples: int
    classes: list[ClassEntry]  # sorted by name; the position is the label
    cameras: list[str]  # sorted; the position is the camera id
    shards: list[ShardEntry]
    index_sha256: str
    corrupt: int  # images left out because they could not be decoded
    pairs: int | None
    dropped_pairs: int  # left out because one of their images was
    source: str
    licence: str


class ShardSet:
    """A directory of shards, read image by image. Every process, forked or spawned, opens its own files.

    Attributes:
        directory: where the shards are.
        manifest: what ``manifest.json`` says.
        classes, cameras: names, by label and by camera id.
        labels: int64 [N].
        camera_ids: int64 [N], -1 for a sample without camera.
        pairs: int64 [M, 4] of fold, first sample, second sample, same identity (0 or 1); or None.
        licence: of the images.
    """

    def __init__(self, directory: Path, manifest: Manifest, index: dict[str, np.ndarray]):
        self.directory = directory
        self.manifest = manifest
        self.classes = [entry.name for entry in manifest.classes]
        self.cameras = manifest.cameras
        self.licence = manifest.licence
        self.labels = index["label"]
        self.camera_ids = index["camera"]
        self.pairs = index.get("pairs")
        self._shard, self._offset, self._length = index["shard"], index["offset"], index["length"]
        self._descriptors: dict[int, int] = {}
        self._pid = os.getpid()

    @classmethod
    def open(cls, directory: str | Path) -> "ShardSet":
        """Open a directory written by :func:`write`, checking what is cheap to check.

        Raises:
            UserError: no directory or manifest, a shard that is missing or of another size, a changed index.
        """
        directory = Path(directory)
        try:
            text = (directory / MANIFEST).read_bytes()
        except OSError as error:
            raise UserError(
                f"no shards in {directory} ({MANIFEST}: {error.strerror}): make them with `ufo shards`"
            ) from None
        try:
            manifest = TypeAdapter(Manifest).validate_json(text)
        except ValidationError as error:
            fault = error.errors()[0]
            where = ".".join(str(part) for part in fault["loc"])
            raise UserError(f"{directory / MANIFEST}: {where} {fault['msg']}: {_AGAIN}") from None
        for entry in manifest.shards:
            path = directory / entry.name
            if not path.is_file():
                raise UserError(f"{path} is missing: {_AGAIN}")
            if path.stat().st_size != entry.bytes:
                raise UserError(f"{path} has {path.stat().st_size} bytes, expected {entry.bytes}: {_AGAIN}")
        if not (directory / INDEX).is_file() or _sha256(directory / INDEX) != manifest.index_sha256:
            raise UserError(f"{directory / INDEX} is missing or not the one that was written: {_AGAIN}")
        return cls(directory, manifest, load_file(directory / INDEX))

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> bytes:
        """The bytes of an image as they were in its original file.

        Raises:
            CorruptImage: the shard ends before the image does.
        """
        length = int(self._length[index])
        data = os.pread(self._descriptor(int(self._shard[index])), length, int(self._offset[index]))
        if len(data) < length:
            raise CorruptImage(f"{self._path(int(self._shard[index]))} ends inside image {index}")
        return data

    def _path(self, shard: int) -> Path:
        return self.directory / self.manifest.shards[shard].name

    def _descriptor(self, shard: int) -> int:
        if self._pid != os.getpid():  # forked: on a network file system a process should open files itself
            self._close()
            self._pid = os.getpid()
        if shard not in self._descriptors:
            if len(self._descriptors) == MAX_OPEN:
                os.close(self._descriptors.pop(next(iter(self._descriptors))))
            self._descriptors[shard] = os.open(self._path(shard), os.O_RDONLY)
        return self._descriptors[shard]

    def _close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def __del__(self) -> None:
        if "_descriptors" in self.__dict__:  # else __init__ failed
            self._close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_descriptors": {}}


def write(
    layout: Layout,
    out: Path,
    *,
    source: str,
    licence: str = "unknown",
    shard_size: int = 10_000,
    max_corrupt: float = 0.0,
    workers: int = 1,
) -> ShardSet:
    """Write a layout as shards; the same input gives the same bytes.

    The directory appears complete, or not at all.

    Args:
        layout: the samples; each image is decoded once, and left out if that fails.
        out: a directory that does not exist yet.
        source: where the data comes from, for the manifest.
        licence: of the data, for the manifest.
        shard_size: samples per shard.
        max_corrupt: share of the images that may be left out.
        workers: threads that read and decode.

    Raises:
        UserError: ``out`` exists or cannot be written, an image cannot be read, or too many are corrupt.
    """
    out = Path(out)
    if shard_size < 1:
        raise UserError(f"shard_size {shard_size}: give 1 or more samples per shard")
    if not 0 <= max_corrupt <= 1:
        raise UserError(f"max_corrupt {max_corrupt}: give a share of the images, from 0 to 1")
    with complete_or_nothing(out) as directory:
        readable = _readable(layout.samples, max_corrupt, workers)
        kept, shards = _write_shards(layout.samples, readable, directory, shard_size)
        _write_index(layout, kept, shards, directory, source, licence)
    return ShardSet.open(out)


@contextlib.contextmanager
def complete_or_nothing(out: Path) -> Iterator[Path]:
    """A temporary sibling of ``out`` that takes its place at the end, or goes, with the parents made for it.

    Raises:
        UserError: ``out`` exists or cannot be written.
    """
    if os.path.lexists(out):
        raise UserError(f"{out} exists: remove it or choose another directory")
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    made = [parent for parent in out.parents if not parent.exists()]
    try:
        temporary.mkdir(parents=True)
        yield temporary
        temporary.rename(out)
    except BaseException as error:  # KeyboardInterrupt too
        shutil.rmtree(temporary, ignore_errors=True)
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()
        if isinstance(error, OSError):
            raise UserError(
                f"{out} cannot be written ({error.strerror}): free space there or choose another directory"
            ) from None
        raise


def _readable(samples: list[Sample], max_corrupt: float, workers: int) -> Iterator[tuple[int, bytes]]:
    """``(index, bytes)`` of the samples that decode, as long as the share of the others is at most ``max_corrupt``."""
    total, ahead, corrupt = len(samples), READ_AHEAD * workers, 0
    with ThreadPoolExecutor(workers) as pool, tqdm(total=total, unit="image", disable=None) as progress:
        for start in range(0, total, ahead):
            checked = pool.map(_read_and_check, samples[start : start + ahead])
            for index, (data, fault) in enumerate(checked, start):
                progress.update()
                if fault is None:
                    yield index, data
                    continue
                corrupt += 1
                if corrupt == total or corrupt / total > max_corrupt:
                    raise UserError(
                        f"{samples[index].path} is corrupt ({fault}), number {corrupt} of {total} images: repair or "
                        f"remove it, or allow a share of them with --max_corrupt (now {max_corrupt})"
                    )


def _read_and_check(sample: Sample) -> tuple[bytes, CorruptImage | None]:
    try:
        data = sample.path.read_bytes()
    except OSError as error:
        raise UserError(f"{sample.path} cannot be read ({error.strerror}): make it readable or remove it") from None
    try:
        decode(data)
    except CorruptImage as fault:
        return data, fault
    return data, None


def _write_shards(
    samples: list[Sample], readable: Iterator[tuple[int, bytes]], directory: Path, shard_size: int
) -> tuple[list[int], list[ShardEntry]]:
    """Returns the indices of the samples written, in order, and what to say about each shard."""
    label_of = {name: label for label, name in enumerate(_classes(samples))}
    kept: list[int] = []
    shards = []
    for number, group in groupby(enumerate(readable), key=lambda item: item[0] // shard_size):
        path = directory / f"shard-{number:06d}.tar"
        before = len(kept)
        # A fixed time and TarWriter's fixed user make the bytes a function of the input.
        with path.open("wb") as file, webdataset.TarWriter(file, encoder=False, mtime=0) as tar:
            for position, (index, data) in group:
                sample = samples[index]
                names = {"label": sample.label} | ({"camera": sample.camera} if sample.camera else {})
                tar.write(
                    {
                        "__key__": f"{position:09d}",
                        sample.path.suffix[1:].lower(): data,
                        "cls": str(label_of[sample.label]).encode(),
                        "json": json.dumps(names).encode(),
                    }
                )
                kept.append(index)
        shards.append(ShardEntry(path.name, path.stat().st_size, _sha256(path), len(kept) - before))
    return kept, shards


def _write_index(
    layout: Layout, kept: list[int], shards: list[ShardEntry], directory: Path, source: str, licence: str
) -> None:
    """Write index and manifest of the shards in ``directory``."""
    samples = [layout.samples[index] for index in kept]
    classes, cameras = _classes(layout.samples), sorted({s.camera for s in layout.samples if s.camera})
    label_of = {name: label for label, name in enumerate(classes)}
    camera_of: dict[str | None, int] = {name: camera for camera, name in enumerate(cameras)}
    places = np.array([place for entry in shards for place in _image_places(directory / entry.name)], dtype=np.int64)
    index: dict[str, np.ndarray] = {
        "shard": np.repeat(np.arange(len(shards), dtype=np.int32), [entry.samples for entry in shards]),
        "offset": places[:, 0].copy(),
        "length": places[:, 1].copy(),
        "label": np.array([label_of[s.label] for s in samples], dtype=np.int64),
        "camera": np.array([camera_of.get(s.camera, -1) for s in samples], dtype=np.int64),
    }
    if layout.pairs is not None:
        index["pairs"] = _kept_pairs(layout.pairs, kept)
    (directory / INDEX).write_bytes(save(index))  # save_file would make it readable by its owner alone
    counts = Counter(sample.label for sample in samples)
    pairs = len(index["pairs"]) if layout.pairs is not None else None
    manifest = Manifest(
        version=1,
        samples=len(kept),
        classes=[ClassEntry(name, counts[name]) for name in classes],
        cameras=cameras,
        shards=shards,
        index_sha256=_sha256(directory / INDEX),
        corrupt=len(layout.samples) - len(kept),
        pairs=pairs,
        dropped_pairs=len(layout.pairs or []) - (pairs or 0),
        source=source,
        licence=licence,
    )
    (directory / MANIFEST).write_text(json.dumps(dataclasses.asdict(manifest), indent=1) + "\n")


def _kept_pairs(pairs: list[Pair], kept: list[int]) -> np.ndarray:
    """int64 [M, 4] of the pairs both of whose images were kept, by their new positions."""
    position_of = {index: position for position, index in enumerate(kept)}
    rows = [
        (pair.fold, position_of[pair.first], position_of[pair.second], pair.same)
        for pair in pairs
        if pair.first in position_of and pair.second in position_of
    ]
    return np.array(rows, dtype=np.int64).reshape(-1, 4)


def verify(directory: str | Path) -> None:
    """Check everything: checksums, that a plain WebDataset reader sees the indexed samples, that images decode.

    Raises:
        UserError: the first fault.
    """
    shards = ShardSet.open(directory)
    position = 0
    with tqdm(total=len(shards), unit="image", disable=None) as progress:
        for entry in shards.manifest.shards:
            path = shards.directory / entry.name
            if _sha256(path) != entry.sha256:
                raise UserError(f"{path} has another sha256 than its manifest: {_AGAIN}")
            stop = position + entry.samples
            for sample in webdataset.WebDataset([str(path.resolve())], shardshuffle=False):
                if position == stop:
                    raise UserError(f"{path} holds more than the {entry.samples} samples of its manifest: {_AGAIN}")
                fault = _fault(shards, position, sample)
                if fault:
                    raise UserError(f"{path}: sample {position} ({sample['__key__']}) {fault}: {_AGAIN}")
                position += 1
                progress.update()
            if position < stop:
                raise UserError(f"{path} holds {stop - position} samples less than its manifest says: {_AGAIN}")
    counts = np.bincount(shards.labels, minlength=len(shards.classes)).tolist()
    if position != len(shards) or counts != [entry.samples for entry in shards.manifest.classes]:
        raise UserError(f"{shards.directory / MANIFEST}: counts differ from the index: {_AGAIN}")
    if shards.pairs is not None and (shards.pairs < 0).any() | (shards.pairs[:, 1:3] >= len(shards)).any():
        raise UserError(f"{shards.directory / INDEX}: a pair refers to a sample that is not there: {_AGAIN}")


def _fault(shards: ShardSet, position: int, sample: dict[str, Any]) -> str | None:
    """What is wrong with a sample as WebDataset read it, compared with the index."""
    label = int(shards.labels[position])
    if not 0 <= label < len(shards.classes):
        return f"has label {label}, out of range for {len(shards.classes)} classes"
    if sample.get("cls") != str(label).encode():
        return f"has cls {sample.get('cls')!r}, the index says {label}"
    if json.loads(sample.get("json", b"{}")).get("label") != shards.classes[label]:
        return f"has another label name than {shards.classes[label]!r}"
    try:
        data = shards.read(position)
        if data not in sample.values():
            return "has another image than the one at its offset"
        decode(data)
    except CorruptImage as error:
        return f"is corrupt ({error})"
    return None


def _classes(samples: list[Sample]) -> list[str]:
    return sorted({sample.label for sample in samples})


def _image_places(path: Path) -> list[tuple[int, int]]:
    """Offset and length in bytes of every image in a tar."""
    with tarfile.open(path, "r:") as tar:
        return [(member.offset_data, member.size) for member in tar if is_image(Path(member.name))]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
