"""Where each image of a standard WebDataset tar lies, its label and camera: found once, then kept.

A sample is the files of one tar that follow one another and share their name up to the first dot, as webdataset has it:
one image (``jpg``, ``png``, ...), and ``cls`` (the label) or ``json`` with ``label`` (or ``cls``) and perhaps
``camera``. Where there are both, ``json`` names the label: a number in ``cls`` may be a position in somebody's list.
"""

import hashlib
import json
import os
import re
import sys
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from tqdm import tqdm
from webdataset.tariterators import base_plus_ext

from ufo_ds.data.download import version_of
from ufo_ds.data.layouts import IMAGE_EXTENSIONS
from ufo_ds.data.shard_cache import Store, Tar
from ufo_ds.data.shard_specs import is_url
from ufo_ds.errors import UserError

MAX_LABEL_BYTES = 1 << 20  # of a cls or json file
_FORM = "1"  # of an index; another one is another key
_THREADS = 8
_BLOCK = 512  # bytes; a tar ends with a block of zeros


@dataclass
class TarIndex:
    """The samples of one tar, in its order.

    Attributes:
        offset, length: int64 [n], of the image, in bytes.
        label, camera: int64 [n], positions in ``classes`` and ``cameras``; -1 for a sample without camera.
        classes, cameras: names, in the order of their first sample.
        size: of the tar, in bytes.
    """

    offset: np.ndarray
    length: np.ndarray
    label: np.ndarray
    camera: np.ndarray
    classes: list[str]
    cameras: list[str]
    size: int


def indexed(spec: str, names: Sequence[str], store: Store) -> tuple[list[Tar], list[TarIndex]]:
    """The tars and what is in them, scanned by the first process that asks; others wait for it.

    Raises:
        UserError: a tar that is not there, cannot be fetched, or is not made of samples.
    """
    with ThreadPoolExecutor(_THREADS) as pool:
        tars = list(pool.map(_locate, names))
        found = list(pool.map(lambda tar: _load(store.index_path(tar.key)), tars))
        missing = [n for n, index in enumerate(found) if index is None]
        if missing and os.environ.get("RANK", "0") == "0":
            print(f"indexing {len(missing)} of {len(tars)} shards of {spec}, once", file=sys.stderr, flush=True)
        scanned = pool.map(lambda n: _index(tars[n], store), missing)  # after a fault the rest is not begun
        for n, index in zip(missing, tqdm(scanned, "index", len(missing), unit="shard", disable=None), strict=True):
            found[n] = index
    indices = [index for index in found if index is not None]
    return [replace(tar, size=index.size) for tar, index in zip(tars, indices, strict=True)], indices


def scan(file: BinaryIO, name: str) -> TarIndex:
    """Read the headers of a tar, and the labels; not the images.

    Args:
        name: for messages.

    Raises:
        UserError: not a whole tar; a member that is not a plain file in it; a sample without image or label, or with
            two.
    """
    places, labels, cameras = [], [], []
    label_of: dict[str, int] = {}
    camera_of: dict[str, int] = {}
    size = os.fstat(file.fileno()).st_size
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for key, members in groupby(_members(tar, file, size, name), key=lambda member: _parts(member)[0]):
                image, (label, camera) = _sample(tar, f"{name}: sample {key!r}", list(members))
                places.append((image.offset_data, image.size))
                labels.append(label_of.setdefault(label, len(label_of)))
                cameras.append(-1 if camera is None else camera_of.setdefault(camera, len(camera_of)))
    except (tarfile.TarError, ValueError, OverflowError) as error:  # a damaged header may hold any number
        raise UserError(f"{name} is not a whole tar ({error}): copy or make it again") from None
    if not places:
        raise UserError(f"{name} holds no sample: leave it out, or correct the names in it (KEY.jpg, KEY.cls)")
    place = np.array(places, dtype=np.int64)
    return TarIndex(
        place[:, 0].copy(), place[:, 1].copy(), np.array(labels, np.int64), np.array(cameras, np.int64),
        list(label_of), list(camera_of), size,
    )  # fmt: skip


def names_of(parts: Mapping[str, Any]) -> tuple[str, str | None]:
    """Label and camera of a sample, by the bytes of its ``cls`` and ``json``.

    Raises:
        ValueError: it has no label, or what it has is not a name.
    """
    fields = json.loads(parts["json"]) if "json" in parts else {}
    if not isinstance(fields, dict):
        fields = {}
    label = fields.get("label", fields.get("cls"))
    if label is None and "cls" in parts:
        label = parts["cls"].decode().strip()
        if re.fullmatch(r"[+-]?[0-9]+", label):
            label = int(label)
    if label is None:
        raise ValueError("has no label: add KEY.cls, or label to KEY.json")
    camera = fields.get("camera")
    return _name(label), None if camera is None else _name(camera)


def ordered(names: set[str]) -> list[str]:
    """Sorted, integers by their value."""
    if all(re.fullmatch(r"-?[0-9]+", name) for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


def _name(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).isprintable() or value == "":
        raise ValueError(f"has {str(value)[:50]!r} for a label or camera: use a number or a name")
    return str(value)


def _members(tar: tarfile.TarFile, file: BinaryIO, size: int, name: str) -> Iterator[tarfile.TarInfo]:
    """The files that belong to samples, in the order of the tar; that it is whole is known at the end."""
    for member in tar:
        path = PurePosixPath(member.name)
        if path.is_absolute() or ".." in path.parts:
            raise UserError(f"{name}: member {member.name!r} points outside of the tar: make the tar again without it")
        if member.isdir():
            continue
        if not member.isreg() or member.issparse():
            raise UserError(f"{name}: member {member.name!r} is not a plain file: make the tar again without it")
        if not 0 <= member.size <= size - member.offset_data:
            raise tarfile.ReadError(f"it ends inside {member.name!r}, at byte {size}")
        if _parts(member)[0] is not None and not re.match(r"__[^/]*__($|/)", member.name):  # webdataset's own notes
            yield member
    file.seek(tar.offset)
    if file.read(_BLOCK) != bytes(_BLOCK):  # tarfile takes a damaged header for the end
        raise tarfile.ReadError(f"it breaks off at byte {tar.offset}")


def _parts(member: tarfile.TarInfo) -> tuple[str | None, str]:
    key, extension = base_plus_ext(member.name)
    return key, (extension or "").lower()


def _sample(tar: tarfile.TarFile, where: str, members: list[tarfile.TarInfo]) -> tuple[tarfile.TarInfo, Any]:
    """The image of a sample, its label and camera."""
    by_extension = {_parts(member)[1]: member for member in members}
    images = [member for member in members if _parts(member)[1] in IMAGE_EXTENSIONS]
    if len(images) != 1:
        raise UserError(
            f"{where} has {len(images)} images among {', '.join(by_extension)}: one is needed, next to its label, as "
            f"one of {', '.join(IMAGE_EXTENSIONS)}"
        )
    try:
        if len(by_extension) < len(members):
            raise ValueError("has two files of one name: give every sample a key of its own")
        wanted: list[str] = [extension for extension in by_extension if extension in ("cls", "json")]
        return images[0], names_of({extension: _read(tar, by_extension[extension]) for extension in wanted})
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} {error if str(error).startswith('has ') else f'has no label: {error}'}") from None


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    if member.size > MAX_LABEL_BYTES:
        raise ValueError(f"has {member.size} bytes in {member.name!r}, too many for a label")
    content = tar.extractfile(member)
    assert content is not None
    return content.read()


def _locate(name: str) -> Tar:
    """The key changes with what is in the tar, as far as can be told without reading it."""
    if is_url(name):
        version = version_of(name)
        return Tar(name, _digest(name, version.tag, version.size), version.size, version)
    if Tar(name).is_remote:
        return Tar(name, _digest(name))
    path = Path(name)
    try:
        found = path.stat()
    except OSError as error:
        raise UserError(f"shard {name}: {error.strerror}: correct its path or range") from None
    if not path.is_file():
        raise UserError(f"shard {name} is not a file: name tars, or one directory made by `ufo shards`")
    return Tar(name, _digest(str(path.resolve()), found.st_size, found.st_mtime_ns), found.st_size)


def _digest(*parts: object) -> str:
    return hashlib.sha256("\n".join(map(str, (_FORM, *parts))).encode(errors="surrogateescape")).hexdigest()[:40]


def _index(tar: Tar, store: Store) -> TarIndex:
    path = store.index_path(tar.key)
    with store.lock(f"{tar.key}-index"):
        index = _load(path)
        if index is None:
            index = _scan(tar, store)
            write_whole(path, _saved(index))
    return index


def _scan(tar: Tar, store: Store) -> TarIndex:
    if tar.is_remote:
        with store.fetched(tar) as file:
            return scan(file, tar.name)
    try:
        with open(tar.name, "rb") as file:
            return scan(file, tar.name)
    except OSError as error:
        raise UserError(f"shard {tar.name} cannot be read ({error.strerror}): make it readable") from None


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that appears complete; the caller holds its lock.

    Raises:
        UserError: it cannot be written.
    """
    part = path.with_suffix(".part")
    try:
        part.write_bytes(content)
        part.rename(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written ({error.strerror}): free space there or set UFO_CACHE") from None


def _saved(index: TarIndex) -> bytes:
    columns = {name: getattr(index, name) for name in ("offset", "length", "label", "camera")}
    names = json.dumps({"classes": index.classes, "cameras": index.cameras, "size": index.size})
    return save(columns, {"names": names})


def _load(path: Path) -> TarIndex | None:
    try:
        with safe_open(path, "np") as file:
            columns = {name: file.get_tensor(name) for name in ("offset", "length", "label", "camera")}
            return TarIndex(**columns, **json.loads(file.metadata()["names"]))
    except (OSError, SafetensorError):  # none yet, or the machine went down before it was written out
        return None
