"""Layouts that any data set can be brought into: a folder per class, a list of labelled images, a CSV of them or of
image pairs."""

import csv
from collections.abc import Iterator
from pathlib import Path

from ufo_ds.data.layouts.files import Images, lines, listed
from ufo_ds.data.layouts.layout import IMAGE_EXTENSIONS, Layout, Pair, Sample, is_image
from ufo_ds.errors import UserError

LABEL_HEADERS = (["path", "id"], ["path", "id", "camera"], ["path", "class"])
PAIR_HEADER = ["fold", "path1", "path2", "same"]


def read_folder(source: Path) -> Layout:
    """A directory with a sub-folder of images for each class.

    The label is the folder's name, the order that of the sorted paths.

    Raises:
        UserError: no such directory, no class in it, or a class without an image.
    """
    source = Path(source)
    if not source.is_dir():
        raise UserError(f"{source} is not a directory: give one with a sub-folder for each class")
    samples = []
    for folder in sorted(path for path in source.iterdir() if path.is_dir()):
        images = sorted(path for path in folder.rglob("*") if is_image(path))
        if not images:
            raise UserError(f"{folder} holds no image ({', '.join(IMAGE_EXTENSIONS)}): add some or remove the folder")
        samples += [Sample(path, folder.name) for path in images]
    if not samples:
        raise UserError(f"{source} has no sub-folder: put the images of each class into a folder of its name")
    return Layout(samples)


def read_list(source: Path) -> Layout:
    """A text file with lines "path label", such as ImageNet's train.txt.

    The label is what follows the last white space, so that paths may hold spaces; they are relative to the list's
    folder. The order is that of the list.

    Raises:
        UserError: with file and line, for a line without a label, or an image that is not there.
    """
    source = Path(source)
    images = Images()
    samples = []
    for where, text in lines(source):
        path, *label = text.rsplit(maxsplit=1)
        if not label:
            raise UserError(f"{where}: {text!r} has no label: write the path, a space or tab, and the label")
        samples.append(Sample(images.path(where, source.parent, path), label[0]))
    return listed(source, samples)


def read_csv(source: Path) -> Layout:
    """A CSV with header path,id[,camera] or path,class or fold,path1,path2,same.

    Paths are relative to the CSV's folder. The images of a pair list have no label; each takes its path as one.

    Raises:
        UserError: with file and line, for an unknown header, a wrong number of values, a value of the wrong kind, or
            an image that is not there.
    """
    source = Path(source)
    rows = _rows(source)
    _, header = next(rows, ("", []))
    if header == PAIR_HEADER:
        return _read_pairs(source, rows)
    if header not in LABEL_HEADERS:
        known = " or ".join(",".join(names) for names in (*LABEL_HEADERS, PAIR_HEADER))
        raise UserError(f"{source}:1: header {','.join(header)!r} is not known: use {known}")
    images = Images()
    samples = []
    for where, row in rows:
        _check_length(where, row, header)
        if not row[1]:
            raise UserError(f"{where}: {row[0]!r} has an empty {header[1]}: fill it in or remove the line")
        camera = row[2] if len(row) == 3 else ""
        samples.append(Sample(images.path(where, source.parent, row[0]), row[1], camera or None))
    if not samples:
        raise UserError(f"{source} lists no image: add lines below the header")
    return Layout(samples)


def _read_pairs(source: Path, rows: Iterator[tuple[str, list[str]]]) -> Layout:
    images = Images()
    samples: list[Sample] = []
    index_of: dict[str, int] = {}
    pairs = []
    for where, row in rows:
        _check_length(where, row, PAIR_HEADER)
        fold, *names, same = row
        if not (fold.isascii() and fold.isdigit()):
            raise UserError(f"{where}: fold {fold!r} is not a number: number the folds from 0")
        if same not in ("0", "1"):
            raise UserError(f"{where}: same is {same!r}: write 1 for the same identity, 0 for another")
        for name in names:
            if name not in index_of:
                index_of[name] = len(samples)
                samples.append(Sample(images.path(where, source.parent, name), name))
        pairs.append(Pair(int(fold), index_of[names[0]], index_of[names[1]], same == "1"))
    if not pairs:
        raise UserError(f"{source} lists no pair: add lines below the header")
    return Layout(samples, pairs)


def _rows(source: Path) -> Iterator[tuple[str, list[str]]]:
    """``("file:line", values)`` of every line that is not blank."""
    try:
        with source.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            for row in reader:
                if row:
                    yield f"{source}:{reader.line_num}", [value.strip() for value in row]
    except OSError as error:
        raise UserError(f"{source} cannot be read ({error.strerror}): give a CSV file") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{source} is not a CSV file in UTF-8 ({error}): convert it") from None


def _check_length(where: str, row: list[str], header: list[str]) -> None:
    if len(row) != len(header):
        raise UserError(f"{where}: {len(row)} values in {','.join(row)!r}: the header asks for {','.join(header)}")
