"""WebDataset shards with an index for random access and a manifest that says what they hold.

A directory of shards::

    shard-000000.tar ...   000000012.jpg (the original bytes), 000000012.cls (label), 000000012.json (names)
    index.safetensors      per sample: shard, offset and length of the image in its tar, label, camera; and the pairs,
                           of images or of templates
    manifest.json          counts, class and camera names, licence, sizes and checksums

Any WebDataset reader streams the shards; :class:`ShardSet` reads single images by their offset. It reads other tars in
the form of WebDataset too, and shards that lie elsewhere: ``ufo_ds.data.shard_specs`` says how they are named.
"""

import contextlib
import copy
import dataclasses
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import webdataset
from tqdm import tqdm

from ufo_ds.data import tar_index
from ufo_ds.data.layouts.layout import Templates
from ufo_ds.data.manifest import (
    AGAIN,
    INDEX,
    MANIFEST,
    ClassEntry,
    Manifest,
    ShardEntry,
    from_directory,
    from_tars,
    from_url,
    sha256,
)
from ufo_ds.data.shard_cache import Store, Tar
from ufo_ds.data.shard_specs import is_url, tars_of
from ufo_ds.data.transforms import CorruptImage, decode
from ufo_ds.errors import UserError
from ufo_ds.recipe import ShardCache

__all__ = ["INDEX", "MANIFEST", "ClassEntry", "Manifest", "ShardEntry", "ShardSet", "sha256", "verify"]

DEFAULT_CACHE = ShardCache()
MAX_OPEN = 256  # shards a process keeps open: well below the usual limit of 1024 descriptors
MAX_IMAGE_BYTES = 1 << 28  # of an encoded image: more is a fault, and would take the memory of other things
# After a shard could not be fetched, its images count as unreadable for so long without a further attempt; after so
# many in a row all that would have to be fetched do. Else a step of a training would wait for every time limit.
HOLD_OFF_S = 300.0
HOLD_OFF_AFTER = 3


class ShardSet:
    """Shards, read image by image. Every process, forked or spawned, opens its own files.

    Attributes:
        name: the shards as the recipe names them.
        directory: where they are, if made by us and on this machine.
        manifest: what ``manifest.json`` says, or would say.
        classes, cameras: names, by label and by camera id.
        labels: int64 [N].
        camera_ids: int64 [N], -1 for a sample without camera.
        pairs: int64 [M, 4] of fold, first sample, second sample, same identity (0 or 1); or None.
        templates: sets of images to be compared as one; or None.
        licence: of the images.
        tars: the shards, in order.
    """

    def __init__(self, name: str, manifest: Manifest, index: dict[str, np.ndarray], tars: Sequence[Tar], store: Store):
        self.name = name
        self.directory = Path(name) if os.path.isdir(name) else None
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
        self.tars, self._store = tars, store
        self._descriptors: dict[int, int] = {}
        self._failed: dict[int, float] = {}  # shard -> when it last could not be fetched
        self._failed_in_a_row = 0
        self._pid = os.getpid()
        _check_room(name, [tar.size or 0 for tar in tars if tar.is_remote], store)

    @classmethod
    def open(cls, spec: str | Path, cache: ShardCache = DEFAULT_CACHE) -> "ShardSet":
        """Open shards, checking what is cheap to check. Tars without a manifest are indexed the first time.

        Args:
            spec: a directory written by :func:`ufo_ds.data.shard_writer.write`, or what else
                ``ufo_ds.data.shard_specs`` describes.
            cache: for shards that lie elsewhere, and for indices.

        Raises:
            UserError: no directory or manifest, a shard that is missing or of another size, a changed index; a tar
                that is not made of samples; a server that does not give what it should.
        """
        name, store = str(spec), Store.of(cache)
        names = tars_of(name)
        if names is not None:
            return cls(name, *from_tars(name, names, store), store)
        if is_url(name):
            return cls(name, *from_url(name, store), store)
        return cls(name, *from_directory(Path(name)), store)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shard_sizes(self) -> list[int]:
        """Samples of each shard, in the order of the samples."""
        return [entry.samples for entry in self.manifest.shards]

    def subset(self, chosen: np.ndarray, classes: np.ndarray | None = None) -> "ShardSet":
        """The images at these positions, without pairs and templates.

        Args:
            classes: labels that are kept, ascending, all those of the images among them; default: all.
        """
        kept = np.arange(len(self.classes)) if classes is None else classes
        found = copy.copy(self)
        found.labels = np.searchsorted(kept, self.labels[chosen])
        found.classes = [self.classes[label] for label in kept]
        found.camera_ids, found.pairs, found.templates = self.camera_ids[chosen], None, None
        found._shard, found._offset, found._length = self._shard[chosen], self._offset[chosen], self._length[chosen]
        counts = np.bincount(found._shard, minlength=len(self.tars)).tolist()
        shards = [
            dataclasses.replace(entry, samples=count) for entry, count in zip(self.manifest.shards, counts, strict=True)
        ]
        found.manifest = dataclasses.replace(self.manifest, shards=shards, samples=len(chosen))
        return found

    def read(self, index: int) -> bytes:
        """The bytes of an image as they were in its original file.

        Raises:
            CorruptImage: the shard cannot be read or fetched any more, or ends before the image does.
        """
        shard, length = int(self._shard[index]), int(self._length[index])
        name = self.tars[shard].name
        if length > MAX_IMAGE_BYTES:
            raise CorruptImage(f"{name}: image {index} has {length} bytes, more than {MAX_IMAGE_BYTES}")
        try:
            data = os.pread(self.descriptor(shard), length, int(self._offset[index]))
        except (OSError, UserError) as error:
            if shard in self._descriptors:
                os.close(self._descriptors.pop(shard))  # it may be there again the next time
            raise CorruptImage(f"{name}: {getattr(error, 'strerror', None) or error}") from None
        if len(data) < length:
            raise CorruptImage(f"{name} ends inside image {index}")
        return data

    def descriptor(self, shard: int) -> int:
        """Of a shard's open file, which stays this set's.

        Raises:
            OSError: it cannot be opened.
            UserError: it cannot be fetched.
        """
        if self._pid != os.getpid():  # forked: on a network file system a process should open files itself
            self._close()
            self._pid = os.getpid()
        tar = self.tars[shard]
        if shard not in self._descriptors:
            if tar.is_remote:
                self._close_evicted()
            if len(self._descriptors) == MAX_OPEN:
                os.close(self._descriptors.pop(next(iter(self._descriptors))))
            self._descriptors[shard] = self._open_remote(shard) if tar.is_remote else os.open(tar.name, os.O_RDONLY)
        if tar.is_remote:
            with contextlib.suppress(OSError):  # unless the shard is somebody else's
                os.utime(self._descriptors[shard])  # the last use of it
        return self._descriptors[shard]

    def _open_remote(self, shard: int) -> int:
        tar = self.tars[shard]
        descriptor = self._store.present(tar)
        if descriptor is not None:
            return descriptor
        recent = [at for at in self._failed.values() if time.monotonic() - at < HOLD_OFF_S]
        if self._failed.get(shard) in recent or (recent and self._failed_in_a_row >= HOLD_OFF_AFTER):
            raise UserError("could not be fetched a moment ago")
        try:
            descriptor = self._store.fetch(tar)
        except UserError:
            self._failed[shard] = time.monotonic()
            self._failed_in_a_row += 1
            raise
        self._failed_in_a_row = 0
        return descriptor

    def _close_evicted(self) -> None:
        """An open file that the cache has given up still takes its room on the disk."""
        for shard, descriptor in list(self._descriptors.items()):
            if os.fstat(descriptor).st_nlink == 0:
                os.close(self._descriptors.pop(shard))

    def _close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def __del__(self) -> None:
        if "_descriptors" in self.__dict__:  # else __init__ failed
            self._close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_descriptors": {}}


def _check_room(name: str, sizes: list[int], store: Store) -> None:
    """Whether shards of these sizes can be fetched into the cache, and whether they can stay in it."""
    if max(sizes, default=0) > store.bound:
        raise UserError(
            f"{name}: its largest shard has {max(sizes)} bytes, but the shard cache in {store.directory} holds "
            f"{store.bound}: raise data.shard_cache.gib"
        )
    if sum(sizes) > store.bound and os.environ.get("RANK", "0") == "0":
        print(
            f"{name}: its {sum(sizes) / 2**30:.1f} GiB are more than the shard cache in {store.directory} holds, "
            f"{store.bound / 2**30:.1f} GiB (data.shard_cache.gib): unless few are read at a time, they are fetched "
            f"again and again",
            file=sys.stderr,
            flush=True,
        )


def verify(spec: str | Path, cache: ShardCache = DEFAULT_CACHE) -> None:
    """Check everything: checksums, that a plain WebDataset reader sees the indexed samples, that images decode.

    Args:
        spec, cache: as of :meth:`ShardSet.open`.

    Raises:
        UserError: the first fault.
    """
    shards = ShardSet.open(spec, cache)
    position = 0
    with tqdm(total=len(shards), unit="image", disable=None) as progress:
        for number, (entry, tar) in enumerate(zip(shards.manifest.shards, shards.tars, strict=True)):
            # By its open file: the cache may drop the path meanwhile.
            path = Path(f"/dev/fd/{shards.descriptor(number)}")
            remedy = AGAIN if entry.sha256 else "copy or make the tar again"
            if entry.sha256 and sha256(path) != entry.sha256:
                raise UserError(f"{tar.name} has another sha256 than its manifest: {remedy}")
            stop = position + entry.samples
            for sample in webdataset.WebDataset([str(path)], shardshuffle=False):
                if position == stop:
                    raise UserError(f"{tar.name} holds more than the {entry.samples} samples of its index: {remedy}")
                fault = _fault(shards, position, sample)
                if fault:
                    raise UserError(f"{tar.name}: sample {position} ({sample['__key__']}) {fault}: {remedy}")
                position += 1
                progress.update()
            if position < stop:
                raise UserError(f"{tar.name} holds {stop - position} samples less than its index says: {remedy}")
    counts = np.bincount(shards.labels, minlength=len(shards.classes)).tolist()
    if position != len(shards) or counts != [entry.samples for entry in shards.manifest.classes]:
        raise UserError(f"{shards.name}: counts of the manifest differ from the index: {AGAIN}")
    if shards.pairs is not None and (shards.pairs < 0).any() | (shards.pairs[:, 1:3] >= len(shards)).any():
        raise UserError(f"{shards.name}: a pair refers to a sample that is not there: {AGAIN}")
    fault = None if shards.templates is None else _template_fault(shards.templates, len(shards))
    if fault:
        raise UserError(f"{shards.name}: {fault}: {AGAIN}")


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
    made_by_us = bool(shards.manifest.index_sha256)
    if made_by_us and sample.get("cls") != str(label).encode():
        return f"has cls {sample.get('cls')!r}, the index says {label}"
    try:
        if tar_index.names_of(sample)[0] != shards.classes[label]:
            return f"has another label name than {shards.classes[label]!r}"
    except ValueError as error:
        return f"has no label that can be read ({error})"
    try:
        data = shards.read(position)
        if data not in sample.values():
            return "has another image than the one at its offset"
        decode(data)
    except CorruptImage as error:
        return f"is corrupt ({error})"
    return None
