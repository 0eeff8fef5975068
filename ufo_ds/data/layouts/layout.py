"""What a layout is read into: samples, and pairs of them."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

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


@dataclass(frozen=True, slots=True)
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


@dataclass(eq=False)
class Templates:
    """Sets of images that are compared as one (IJB-B, IJB-C).

    Attributes:
        template: int64 [N], the set of each sample.
        media: int64 [N], the video or still that each is from; images of a template with the same number share one.
        score: float32 [N], of the face detector.
        pairs: int64 [M, 3] of first template, second template, same identity (0 or 1).
    """

    template: np.ndarray
    media: np.ndarray
    score: np.ndarray
    pairs: np.ndarray


@dataclass
class Layout:
    samples: list[Sample]
    pairs: list[Pair] | None = None
    templates: Templates | None = None


def is_image(path: ImageFile) -> bool:
    return path.suffix[1:].lower() in IMAGE_EXTENSIONS


def image_suffix(data: bytes) -> str:
    """The type of an image by its first bytes, ``.png`` or ``.jpg``; what is neither fails when it is decoded."""
    return ".png" if data.startswith(b"\x89PNG\r\n\x1a\n") else ".jpg"
