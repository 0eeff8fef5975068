"""WebDataset shards with an index for random access and a manifest that says what they hold.

A directory of shards::

    shard-000000.tar ...   000000012.jpg (the original bytes), 000000012.cls (label), 000000012.json (names)
    index.safetensors      per sample: shard, offset and length of the image in its tar, label, camera; and the pairs,
                           of images or of templates
    manifest.json          counts, class and camera names, licence, sizes and checksums

Any WebDataset reader streams the shards; :class:`ShardSet` reads single images by their offset.
"""

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any, Literal

import numpy as np
import webdataset
from pydantic import TypeAdapter, ValidationError
from safetensors.numpy import load_file
from tqdm import tqdm

from ufo_ds.data.layouts.layout import Templates
from ufo_ds.data.transforms import CorruptImage, decode
from ufo_ds.errors import UserError

MANIFEST = "manifest.json"
INDEX = "index.safetensors"
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
    pairs: int | None  # of images, or of templates
    dropped_pairs: int  # left out because one of their images was, or all of a template's
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
        templates: sets of images to be compared as one; or None.
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
        self.templates = (
            Templates(index["template"], index["media"], index["score"], index["template_pairs"])
            if "template" in index
            else None
        )
        self._shard, self._offset, self._length = index["shard"], index["offset"], index["length"]
        self._descriptors: dict[int, int] = {}
        self._pid = os.getpid()

    @classmethod
    def open(cls, directory: str | Path) -> "ShardSet":
        """Open a directory written by :func:`ufo_ds.data.shard_writer.write`, checking what is cheap to check.

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
        if not (directory / INDEX).is_file() or sha256(directory / INDEX) != manifest.index_sha256:
            raise UserError(f"{directory / INDEX} is missing or not the one that was written: {_AGAIN}")
        return cls(directory, manifest, load_file(directory / INDEX))

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shard_sizes(self) -> list[int]:
        """Samples of each shard, in the order of the samples."""
        return [entry.samples for entry in self.manifest.shards]

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
            if sha256(path) != entry.sha256:
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
    fault = None if shards.templates is None else _template_fault(shards.templates, len(shards))
    if fault:
        raise UserError(f"{shards.directory / INDEX}: {fault}: {_AGAIN}")


def _template_fault(templates: Templates, samples: int) -> str | None:
    if any(array.shape != (samples,) for array in (templates.template, templates.media, templates.score)):
        return f"templates are not told for {samples} samples"
    if not np.isfinite(templates.score).all():
        return "a face score is not a number"
    if not np.isin(templates.pairs[:, :2], templates.template).all():
        return "a pair refers to a template that is not there"
    return None if np.isin(templates.pairs[:, 2], (0, 1)).all() else "a pair of templates is neither same nor different"


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


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
