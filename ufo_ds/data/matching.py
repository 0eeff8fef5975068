"""Which images of two sets are the same, or nearly: by digests, and by hash and thumbnail.

Two images are nearly the same if their hashes differ in at most 10 of 63 bits and their thumbnails by at most a fifth
of their contrast. Copies that were encoded again (JPEG of quality 40 and more) or resized (to half, to double, with
another aspect ratio) differ by less; pictures of the same thing by more. Copies that were cropped, mirrored or turned,
or whose colours were changed, are not found.
"""

import os
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
from tqdm import tqdm

from ufo_ds.data.fingerprints import Fingerprints

# Found on six sets of real images (characters, vehicles, groceries, faces, clothes, hands): of their encoded or resized
# copies the farthest were 5 bits and a difference of 0.11 away, and the nearest two different images, two photos of
# cars of one type, 0.28.
MAX_BITS = 10
MAX_DIFFERENCE = 0.2
_LEAST_CONTRAST = 10.0  # of 255: what thumbnails with less are measured by, or rounding would tell them apart
PER_IMAGE = 10  # matches of a test image in one training set that are kept, the nearest: of a placeholder all would be

_TEST_ROWS, _TRAIN_COLUMNS = 16, 2**14  # hashes compared at a time: 2 MiB, which stay in a core's cache
_THUMBNAILS = 2**12  # pairs of thumbnails compared at a time: 24 MiB

Kind = Literal["bytes", "pixels", "near"]


@dataclass(frozen=True, order=True)
class Match:
    """An image of the test found in training.

    Attributes:
        test_index, train_index: in their sets.
        difference: of the thumbnails, root of the mean square over pixels and channels, in units of the test image's
            contrast (its standard deviation); 0 for equal images.
        bits: in which the hashes differ.
        kind: equal files, equal pixels, or neither.
    """

    test_index: int
    difference: float
    bits: int
    train_index: int
    kind: Kind


def matches(train: Fingerprints, test: Fingerprints) -> list[Match]:
    """By test image, the nearest first, at most :data:`PER_IMAGE` of each kind for a test image.

    All pairs of hashes are compared, block by block, so that memory beyond the fingerprints is bounded: about 2 ns of
    one core for a pair.
    """
    found: dict[tuple[int, int], Match] = {}
    exact: list[tuple[Kind, np.ndarray, np.ndarray]] = [
        ("bytes", train.file_digests, test.file_digests),
        ("pixels", train.pixel_digests, test.pixel_digests),
    ]
    for kind, of_train, of_test in exact:
        for i, j in _equal(of_train, train.readable, of_test, test.readable):
            found.setdefault((i, j), Match(j, 0.0, 0, i, kind))
    for match in _near(train, test):
        found.setdefault((match.train_index, match.test_index), match)
    return sorted(found.values())


def _equal(
    train: np.ndarray, train_readable: np.ndarray, test: np.ndarray, test_readable: np.ndarray
) -> Iterator[tuple[int, int]]:
    """Positions of equal digests in train [N, 32] and test [M, 32]."""
    wanted = defaultdict(list)
    for j in np.flatnonzero(test_readable).tolist():
        wanted[test[j].tobytes()].append(j)
    seen: dict[int, int] = defaultdict(int)
    for i in np.flatnonzero(train_readable).tolist():
        for j in wanted.get(train[i].tobytes(), ()):
            seen[j] += 1
            if seen[j] <= PER_IMAGE:
                yield i, j


def _near(train: Fingerprints, test: Fingerprints) -> Iterator[Match]:
    train_indices, test_indices = np.flatnonzero(train.readable), np.flatnonzero(test.readable)
    train_hashes = train.hashes[train_indices]

    def of_rows(start: int) -> list[Match]:
        rows = test_indices[start : start + _TEST_ROWS]
        found: list[list[Match]] = [[] for _ in rows]
        for begin in range(0, len(train_hashes), _TRAIN_COLUMNS):
            columns = slice(begin, begin + _TRAIN_COLUMNS)
            bits = np.bitwise_count(test.hashes[rows, None] ^ train_hashes[None, columns])
            row, column = np.nonzero(bits <= MAX_BITS)
            for first in range(0, len(row), _THUMBNAILS):
                r, c = row[first : first + _THUMBNAILS], column[first : first + _THUMBNAILS]
                i, j = train_indices[columns][c], rows[r]
                differences = thumbnail_difference(train.thumbnails[i], test.thumbnails[j])
                for k in np.flatnonzero(differences <= MAX_DIFFERENCE).tolist():
                    match = Match(int(j[k]), float(differences[k]), int(bits[r[k], c[k]]), int(i[k]), "near")
                    found[r[k]].append(match)
                for of_row in found:
                    of_row[:] = sorted(of_row)[:PER_IMAGE]
        return [match for of_row in found for match in of_row]

    starts = range(0, len(test_indices), _TEST_ROWS)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        results = pool.map(of_rows, starts)
        for result in tqdm(results, "search", len(starts), leave=False, disable=None):
            yield from result


def thumbnail_difference(train: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Root mean square difference of uint8 [N, 16, 16, 3] in units of the contrast of ``test``, float64 [N]."""
    a, b = (array.reshape(len(array), -1).astype(np.float32) for array in (train, test))
    rms = np.sqrt(np.mean(np.square(a - b), axis=1))
    return rms / np.maximum(b.std(axis=1), _LEAST_CONTRAST)
