"""What ``manifest.json`` says of shards, read together with their index and checked; or made up for tars of others."""

import dataclasses
import hashlib
import io
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit, urlunsplit

import numpy as np
from pydantic import TypeAdapter, ValidationError
from safetensors.numpy import load, load_file

from ufo_ds.data import download, tar_index
from ufo_ds.data.shard_cache import Store, Tar
from ufo_ds.errors import UserError

MANIFEST = "manifest.json"
INDEX = "index.safetensors"
AGAIN = "make the shards again with `ufo shards`"


@dataclasses.dataclass
class ClassEntry:
    name: str
    samples: int


@dataclasses.dataclass
class ShardEntry:
    name: str
    bytes: int
    sha256: str  # empty for a tar of others
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


Opened = tuple[Manifest, dict[str, np.ndarray], list[Tar]]  # with the columns of the index, by name


def from_directory(directory: Path) -> Opened:
    """Of a directory of shards, all of which are checked to be there.

    Raises:
        UserError: one is missing or of another size, or manifest or index are not those that were written.
    """
    try:
        text = (directory / MANIFEST).read_bytes()
    except OSError as error:
        raise UserError(
            f"no shards in {directory} ({MANIFEST}: {error.strerror}): make them with `ufo shards`, or name the tars "
            f"of others, such as {directory}/{{000..009}}.tar"
        ) from None
    manifest = _parsed(text, str(directory / MANIFEST))
    for entry in manifest.shards:
        path = directory / entry.name
        if not path.is_file():
            raise UserError(f"{path} is missing: {AGAIN}")
        if path.stat().st_size != entry.bytes:
            raise UserError(f"{path} has {path.stat().st_size} bytes, expected {entry.bytes}: {AGAIN}")
    if not (directory / INDEX).is_file() or sha256(directory / INDEX) != manifest.index_sha256:
        raise UserError(f"{directory / INDEX} is missing or not the one that was written: {AGAIN}")
    tars = [Tar(str(directory / entry.name), size=entry.bytes) for entry in manifest.shards]
    return manifest, load_file(directory / INDEX), tars


def from_url(url: str, store: Store) -> Opened:
    """Of a directory of shards behind a URL; the index is fetched once, the shards when they are read.

    Raises:
        UserError: manifest or index cannot be fetched, or are not those that were written.
    """
    manifest = _parsed(_fetched(_below(url, MANIFEST)), _below(url, MANIFEST))
    path = store.index_path(manifest.index_sha256)
    with store.lock(f"{manifest.index_sha256}-index"):
        if not path.is_file() or sha256(path) != manifest.index_sha256:
            content = _fetched(_below(url, INDEX))
            if hashlib.sha256(content).hexdigest() != manifest.index_sha256:
                raise UserError(f"{_below(url, INDEX)} is not the one that was written: copy the shards again")
            tar_index.write_whole(path, content)
        index = load(path.read_bytes())
    tars = [
        Tar(_below(url, entry.name), entry.sha256, entry.bytes, download.Version(None, entry.bytes))
        for entry in manifest.shards
    ]
    return manifest, index, tars


def _fetched(url: str) -> bytes:
    content = io.BytesIO()
    download.fetch(url, content, lambda size: None)
    return content.getvalue()


def _below(url: str, name: str) -> str:
    parts = urlsplit(url)
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{name}"))


def _parsed(text: bytes, where: str) -> Manifest:
    try:
        manifest = TypeAdapter(Manifest).validate_json(text)
    except ValidationError as error:
        fault = error.errors()[0]
        place = ".".join(str(part) for part in fault["loc"])
        raise UserError(f"{where}: {place} {fault['msg']}: {AGAIN}") from None
    for name in [manifest.index_sha256, *(part for entry in manifest.shards for part in (entry.name, entry.sha256))]:
        if Path(name).name != name:  # these become paths
            raise UserError(f"{where}: {name!r} is not the name of a file or a checksum: {AGAIN}")
    return manifest


def from_tars(spec: str, names: list[str], store: Store) -> Opened:
    """Of tars without a manifest.

    Raises:
        UserError: as :func:`ufo_ds.data.tar_index.indexed`.
    """
    tars, indices = tar_index.indexed(spec, names, store)
    classes = tar_index.ordered({name for index in indices for name in index.classes})
    cameras = tar_index.ordered({name for index in indices for name in index.cameras})
    label_of = {name: label for label, name in enumerate(classes)}
    camera_of = {name: camera for camera, name in enumerate(cameras)}
    counts = [len(index.offset) for index in indices]
    joined = {
        "shard": np.repeat(np.arange(len(tars), dtype=np.int32), counts),
        "offset": np.concatenate([index.offset for index in indices]),
        "length": np.concatenate([index.length for index in indices]),
        "label": np.concatenate([np.array([label_of[name] for name in i.classes])[i.label] for i in indices]),
        # The last one is for -1: no camera.
        "camera": np.concatenate([np.array([*(camera_of[name] for name in i.cameras), -1])[i.camera] for i in indices]),
    }
    of_class = np.bincount(joined["label"], minlength=len(classes)).tolist()
    manifest = Manifest(
        version=1,
        samples=sum(counts),
        classes=[ClassEntry(name, count) for name, count in zip(classes, of_class, strict=True)],
        cameras=cameras,
        shards=[ShardEntry(t.name, i.size, "", n) for t, i, n in zip(tars, indices, counts, strict=True)],
        index_sha256="",
        corrupt=0,
        pairs=None,
        dropped_pairs=0,
        source=spec,
        licence="unknown",
    )
    return manifest, joined, tars


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
