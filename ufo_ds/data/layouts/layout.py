"""What a layout is read into: samples, and pairs of them."""

from dataclasses import dataclass
from typing import Protocol

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "bmp", "webp")


class ImageFile(Protocol):
    """What holds the bytes of one image: a path, or a part of a larger file. ``str()`` of it names it in messages."""

    @property
    def suffix(self) -> str:
        """``.jpg`` and so on."""

    def read_bytes(self) -> bytes:
        """The image as it is encoded.

        Raises:
            OSError: it cannot be read.
        """


@dataclass(frozen=True)
class Sample:
    path: ImageFile
    label: str
    camera: str | None = None


@dataclass(frozen=True)
class Pair:
    """Two images of a verification protocol; ``first`` and ``second`` index the layout's samples."""

    fold: int
    first: int
    second: int
    same: bool


@dataclass
class Layout:
    samples: list[Sample]
    pairs: list[Pair] | None = None


def is_image(path: ImageFile) -> bool:
    return path.suffix[1:].lower() in IMAGE_EXTENSIONS
