"""What is kept of each image of a shard set to find it again: digests for equal images, a hash and a thumbnail for
nearly equal ones."""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from PIL import Image
from tqdm import tqdm

from ufo_ds.data.shards import ShardSet
from ufo_ds.data.transforms import CorruptImage, decode

SIDE = 16  # of a thumbnail, in pixels
_HASH_SIDE = 32  # of the grey image that is hashed
_FREQUENCIES = 8  # kept of each axis
# A coefficient of the orthonormal DCT that rounding of the grey image to whole numbers alone can make: in an image
# without structure all are smaller, so that all such images have one hash.
_NOTHING = 1.0
_READ_AHEAD = 256  # images held in memory while they are worked on


@dataclass
class Fingerprints:
    """Of N images, in their order.

    Attributes:
        file_digests: SHA-256 of the bytes, uint8 [N, 32].
        pixel_digests: SHA-256 of size and RGB pixels, uint8 [N, 32].
        hashes: pHash, uint64 [N].
        thumbnails: uint8 [N, 16, 16, 3].
        readable: bool [N]; of an image that is not, all else is 0.
    """

    file_digests: np.ndarray
    pixel_digests: np.ndarray
    hashes: np.ndarray
    thumbnails: np.ndarray
    readable: np.ndarray

    @classmethod
    def of(cls, shards: ShardSet, name: str) -> "Fingerprints":
        """Read and decode every image once, in threads; ``name`` is shown beside the progress."""
        count = len(shards)
        found = cls(
            np.zeros((count, 32), np.uint8), np.zeros((count, 32), np.uint8), np.zeros(count, np.uint64),
            np.zeros((count, SIDE, SIDE, 3), np.uint8), np.zeros(count, bool),
        )  # fmt: skip
        with (
            ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool,
            tqdm(total=count, desc=name, unit="image", leave=False, disable=None) as progress,
        ):
            for start in range(0, count, _READ_AHEAD):
                # Read here, one after another: a shard set is not made for several threads.
                data = (_read(shards, index) for index in range(start, min(start + _READ_AHEAD, count)))
                for index, result in enumerate(pool.map(_fingerprint, data), start):
                    progress.update()
                    if result is not None:
                        file, pixels, found.hashes[index], found.thumbnails[index] = result
                        found.file_digests[index] = np.frombuffer(file, np.uint8)
                        found.pixel_digests[index] = np.frombuffer(pixels, np.uint8)
                        found.readable[index] = True
        return found


def _read(shards: ShardSet, index: int) -> bytes | None:
    try:
        return shards.read(index)
    except CorruptImage:
        return None


def _fingerprint(data: bytes | None) -> tuple[bytes, bytes, int, np.ndarray] | None:
    if data is None:
        return None
    try:
        image = decode(data)
    except CorruptImage:
        return None
    pixels = hashlib.sha256(f"{image.width}x{image.height}".encode() + image.tobytes()).digest()
    return hashlib.sha256(data).digest(), pixels, perceptual_hash(image), thumbnail(image)


def thumbnail(image: Image.Image) -> np.ndarray:
    """uint8 [16, 16, 3]."""
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BILINEAR))


def perceptual_hash(image: Image.Image) -> int:
    """pHash (Zauner, 2010): which of the 8 x 8 lowest frequencies of the grey image's DCT are above their median.

    The constant one is left out: it says how bright an image is, which thumbnails do better.
    """
    grey = np.asarray(image.convert("L").resize((_HASH_SIDE, _HASH_SIDE), Image.Resampling.BILINEAR), dtype=np.float64)
    coefficients = (_DCT @ grey @ _DCT.T).ravel()[1:]
    bits = coefficients > np.median(coefficients) + _NOTHING
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def _dct_rows(frequencies: int, points: int) -> np.ndarray:
    """The first rows of the orthonormal DCT-II."""
    k, n = np.arange(frequencies)[:, None], np.arange(points)[None]
    rows = np.sqrt(2 / points) * np.cos(np.pi * k * (2 * n + 1) / (2 * points))
    rows[0] /= np.sqrt(2)
    return rows


_DCT = _dct_rows(_FREQUENCIES, _HASH_SIDE)
