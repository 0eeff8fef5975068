"""Layouts of face verification: lists of image pairs, and such pairs packed into a ``.bin`` file."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ufo_ds.data.layouts import files, restricted_pickle
from ufo_ds.data.layouts.layout import Layout, Pair, Sample, image_suffix, is_image
from ufo_ds.errors import UserError

FOLDS = 10
Rows = list[tuple[str, list[str]]]


def read_pairs(source: Path) -> Layout:
    """A list of face pairs: LFW's pairs.txt, or lines of "path1 path2 1" (0: different people).

    Lines of LFW's list are "name n1 n2" (the same person) and "name1 n1 name2 n2" (different people) for the images
    name/name_000n.jpg. They are looked for in the list's folder and then in the folders directly in it. A first line
    "10 300" tells 10 folds of 300 pairs of the same person and then 300 of different people. Without it, or with a
    number of pairs alone, there are 10 folds of successive pairs, of either kind alike; for "path1 path2 1" 10 folds
    of successive pairs.

    The label is the person's name, or the path where no name is told. Format: "Labeled Faces in the Wild" (Huang et
    al., 2007), README of its View 2.

    Raises:
        UserError: with file and line, for what is neither form, counts that differ from the first line, or an image
            that is not there.
    """
    source = Path(source)
    lines = list(files.rows(source))
    header = lines.pop(0)[1] if lines and len(lines[0][1]) <= 2 and files.are_numbers(lines[0][1]) else []
    if not lines:
        raise UserError(f"{source} lists no pair: give the whole list")
    if not header and is_image(Path(lines[0][1][0])):
        return _pairs_of_paths(source, lines)
    pairs, same = [], []
    for where, row in lines:
        if len(row) == 3 and files.are_numbers(row[1:]):
            pairs.append((where, (row[0], row[1]), (row[0], row[2])))
        elif len(row) == 4 and files.are_numbers(row[1::2]):
            pairs.append((where, (row[0], row[1]), (row[2], row[3])))
        else:
            raise UserError(f"{where}: {' '.join(row)!r} is no pair: write name n1 n2 or name1 n1 name2 n2")
        same.append(len(row) == 3)
    folds = _folds_of_header(source, [int(value) for value in header], [where for where, _ in lines], same)
    root = _root(source, lines[0][0], pairs[0][1][0])
    images = _Samples()
    found = []
    for fold, (where, *two), is_same in zip(folds, pairs, same, strict=True):
        first, second = (images.add(where, root, f"{name}/{name}_{int(number):04d}.jpg", name) for name, number in two)
        found.append(Pair(fold, first, second, is_same))
    return Layout(images.samples, found)


def read_facebin(source: Path) -> Layout | dict[str, Layout]:
    """A file of packed face pairs, lfw.bin, or a directory of such files: a part by the name of each.

    It is a pickle of the list of encoded images and the list that tells of each two of them whether they are the same
    person; in it no function is called, whatever it asks for. 10 folds of successive pairs, the first ones longer by
    one if need be. Format and folds: eval/verification.py of insightface's arcface_torch, KFold of scikit-learn.

    Raises:
        UserError: no such file in the directory, one that asks for other than images and truth values, or has
            another number of images than two for each pair.
    """
    source = Path(source)
    if not source.is_dir():
        return _read_bin(source)
    packed = sorted(source.glob("*.bin"))
    if not packed:
        raise UserError(f"{source} holds no .bin file: give one, or a directory of them")
    return {file.stem: _read_bin(file) for file in packed}


@dataclass(frozen=True, slots=True)
class BinImage:
    """An image of a ``.bin`` file, which is held in memory as a whole."""

    file: Path
    number: int
    data: bytes = field(repr=False)

    @property
    def suffix(self) -> str:
        return image_suffix(self.data)

    def read_bytes(self) -> bytes:
        return self.data

    def __str__(self) -> str:
        return f"{self.file} image {self.number}"


def contiguous_folds(count: int) -> list[int]:
    """The fold of each of ``count`` successive pairs, as in scikit-learn's ``KFold(10)`` without shuffling."""
    return [fold for fold in range(FOLDS) for _ in range(count // FOLDS + (fold < count % FOLDS))]


class _Samples:
    """Samples, each image once."""

    def __init__(self) -> None:
        self.samples: list[Sample] = []
        self._images = files.Images()
        self._index_of: dict[str, int] = {}

    def add(self, where: str, root: Path, name: str, label: str) -> int:
        if name not in self._index_of:
            path = self._images.path(where, root, name)
            self._index_of[name] = len(self.samples)
            self.samples.append(Sample(path, label))
        return self._index_of[name]


def _pairs_of_paths(source: Path, lines: Rows) -> Layout:
    root = _root(source, lines[0][0], lines[0][1][0])
    images = _Samples()
    pairs = []
    for fold, (where, row) in zip(contiguous_folds(len(lines)), lines, strict=True):
        if len(row) != 3 or row[2] not in ("0", "1"):
            raise UserError(
                f"{where}: {' '.join(row)!r} is no pair: write path1 path2 and 1, or 0 for different people"
            )
        first, second = (images.add(where, root, name, name) for name in row[:2])
        pairs.append(Pair(fold, first, second, row[2] == "1"))
    return Layout(images.samples, pairs)


def _folds_of_header(source: Path, header: list[int], places: list[str], same: list[bool]) -> list[int]:
    if len(header) == 2:
        folds, each = header
        if len(same) != 2 * folds * each:
            raise UserError(
                f"{source}: {len(same)} pairs, but its first line tells {folds} folds of 2 x {each}: give all lines"
            )
        for row, (where, is_same) in enumerate(zip(places, same, strict=True)):
            if is_same != (row % (2 * each) < each):
                raise UserError(f"{where}: a fold has {each} pairs name n1 n2, then {each} of two names: sort the list")
        return [row // (2 * each) for row in range(len(same))]
    if header and len(same) not in (header[0], 2 * header[0]):
        raise UserError(f"{source}: {len(same)} pairs, but its first line tells {header[0]}: give the whole list")
    # Kind by kind: successive pairs of a list that has all same ones first would make folds of one kind.
    of_kind = {kind: iter(contiguous_folds(same.count(kind))) for kind in (True, False)}
    return [next(of_kind[kind]) for kind in same]


def _root(source: Path, where: str, first: str) -> Path:
    """The folder that holds the first image's folder or path."""
    folder = source.parent
    for root in (folder, *sorted(path for path in folder.iterdir() if path.is_dir())):
        if (root / first).exists():
            return root
    raise UserError(
        f"{where}: {first} is neither in {folder} nor in a folder directly in it: put the list beside its images"
    )


def _read_bin(file: Path) -> Layout:
    content = restricted_pickle.read(file)
    if not (isinstance(content, tuple | list) and len(content) == 2 and isinstance(content[0], list)):
        raise UserError(f"{file} does not hold a list of images and a list of truth values: give another file")
    images = [BinImage(file, number, _image(file, number, item)) for number, item in enumerate(content[0])]
    same = _truths(file, content[1])
    if not same or len(images) != 2 * len(same):
        raise UserError(f"{file} holds {len(images)} images for {len(same)} pairs: give a file with two for each pair")
    width = len(str(len(images) - 1))
    samples = [Sample(image, f"{image.number:0{width}d}") for image in images]
    folds = contiguous_folds(len(same))
    return Layout(samples, [Pair(folds[i], 2 * i, 2 * i + 1, is_same) for i, is_same in enumerate(same)])


def _image(file: Path, number: int, item: Any) -> bytes:
    if isinstance(item, restricted_pickle.Array) and item.dtype == "u1":
        return item.data
    if not isinstance(item, bytes | bytearray):
        raise UserError(f"{file} image {number} is of type {type(item).__name__}, not bytes: give another file")
    return bytes(item)


def _truths(file: Path, same: Any) -> list[bool]:
    values = list(same.data) if isinstance(same, restricted_pickle.Array) else same
    if not isinstance(values, list | tuple) or any(not isinstance(v, int) or v not in (0, 1) for v in values):
        raise UserError(f"{file}: what it tells of its pairs are not truth values: give another file")
    return [bool(value) for value in values]
