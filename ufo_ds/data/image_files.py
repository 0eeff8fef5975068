"""Images to be used rather than trained on: a folder of files, or shards; what cannot be read is left out."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ufo_ds.data.layouts import IMAGE_EXTENSIONS, is_image
from ufo_ds.data.manifest import MANIFEST
from ufo_ds.data.shard_specs import is_url, tars_of
from ufo_ds.data.shards import DEFAULT_CACHE, MAX_IMAGE_BYTES, ShardSet
from ufo_ds.data.transforms import CorruptImage, evaluation_transform
from ufo_ds.errors import UserError
from ufo_ds.recipe import ShardCache


def read_image(path: Path) -> bytes:
    """The bytes of an image file.

    Raises:
        CorruptImage: it cannot be read, or has more than :data:`MAX_IMAGE_BYTES`.
    """
    try:
        if path.stat().st_size > MAX_IMAGE_BYTES:
            raise CorruptImage(f"{path.stat().st_size} bytes are more than {MAX_IMAGE_BYTES}")
        return path.read_bytes()
    except OSError as error:
        raise CorruptImage(error.strerror or type(error).__name__) from None


class FolderImages:
    """The images below a folder, in the order of their paths.

    Attributes:
        names: paths relative to the folder.
        labels: the first-level sub-folder that each is in, None where it is in none.
        licence: of the images.
    """

    licence = "unknown"

    def __init__(self, folder: Path):
        """
        Raises:
            UserError: no such folder, or no image below it.
        """
        if not folder.is_dir():
            raise UserError(f"{folder} is no directory: give one with images, or with shards")
        self._folder = folder
        self._paths = sorted(path.relative_to(folder) for path in folder.rglob("*") if is_image(path))
        if not self._paths:
            raise UserError(f"{folder} holds no image ({', '.join(IMAGE_EXTENSIONS)}), nor shards: give one that does")
        self.names = [_text(str(path)) for path in self._paths]
        self.labels = [_text(path.parts[0]) if len(path.parts) > 1 else None for path in self._paths]

    def digest(self) -> str:
        """Of the names, sizes and times of change of the files."""
        digest = hashlib.sha256()
        for path in self._paths:
            try:
                about = (self._folder / path).stat()
                digest.update(f"{path!s} {about.st_size} {about.st_mtime_ns}\n".encode(errors="surrogateescape"))
            except OSError:
                digest.update(f"{path!s}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()

    def read(self, index: int) -> bytes:
        """For the errors see :func:`read_image`."""
        return read_image(self._folder / self._paths[index])


class ShardImages:
    """The samples of shards, in their order.

    Attributes:
        names: of the shard, and the position in it.
        labels: names of the classes.
        licence: of the images.
    """

    def __init__(self, spec: str, cache: ShardCache = DEFAULT_CACHE):
        """For the errors see :meth:`ShardSet.open`."""
        self._shards = ShardSet.open(spec, cache)
        self.licence = self._shards.licence
        sizes = zip(self._shards.tars, self._shards.shard_sizes, strict=True)
        self.names = [f"{Path(tar.name).name}:{position}" for tar, size in sizes for position in range(size)]
        self.labels: list[str | None] = [self._shards.classes[label] for label in self._shards.labels]

    def digest(self) -> str:
        """Of the manifest, which has sizes and checksums."""
        return hashlib.sha256(repr(self._shards.manifest).encode()).hexdigest()

    def read(self, index: int) -> bytes:
        """For the errors see :meth:`ShardSet.read`."""
        return self._shards.read(index)


Images = FolderImages | ShardImages


def open_images(source: str) -> Images:
    """Shards, as a recipe names them, or any other folder of images.

    Raises:
        UserError: neither is there.
    """
    if tars_of(source) is not None or is_url(source) or (Path(source) / MANIFEST).is_file():
        return ShardImages(source)
    return FolderImages(Path(source))


class Read(NamedTuple):
    """Some images: their positions, their pixels uint8 [B, 3, H, W], and by position why others could not be read."""

    positions: list[int]
    pixels: Tensor
    faults: dict[int, str]


def batches(images: Images, input_hw: tuple[int, int], batch_size: int, workers: int) -> Iterator[Read]:
    """All images in order, as evaluation sees them."""
    dataset = _Batches(images, input_hw, batch_size)
    loader: Any = DataLoader(
        dataset, batch_size=None, sampler=range(len(dataset)), num_workers=workers, generator=torch.Generator()
    )
    return iter(loader)


class _Batches(Dataset[Read]):
    def __init__(self, images: Images, input_hw: tuple[int, int], batch_size: int):
        self.images, self.input_hw, self.batch_size = images, input_hw, batch_size

    def __len__(self) -> int:
        return -(-len(self.images.names) // self.batch_size)

    def __getitem__(self, number: int) -> Read:
        first = number * self.batch_size
        pixels, positions, faults = [], [], {}
        for position in range(first, min(first + self.batch_size, len(self.images.names))):
            try:
                pixels.append(evaluation_transform(self.images.read(position), self.input_hw))
                positions.append(position)
            except CorruptImage as error:
                faults[position] = str(error)
        stacked = np.stack(pixels) if pixels else np.empty((0, 3, *self.input_hw), dtype=np.uint8)
        return Read(positions, torch.from_numpy(stacked), faults)


def _text(name: str) -> str:
    """A file's name as text that can be written and printed, whatever bytes it has."""
    return name.encode(errors="surrogateescape").decode(errors="replace")
