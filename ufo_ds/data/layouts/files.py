"""Folders and list files of a data set, found and read with errors that say where."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from ufo_ds.data.layouts.layout import IMAGE_EXTENSIONS, Layout, Sample, is_image
from ufo_ds.errors import UserError


def find(source: Path, *names: str) -> Path:
    """The first of ``source / name`` that exists; ``names`` are what the packagings of a data set call the same thing.

    Raises:
        UserError: there is none.
    """
    for name in names:
        if (source / name).exists():
            return source / name
    raise UserError(f"{source} holds no {' or '.join(names)}: give the directory of the data set that does")


def file_names(folder: Path) -> list[str]:
    """What a folder holds, sorted.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise UserError(f"{folder} cannot be read ({error.strerror}): it should be a folder of images") from None


def lines(path: Path) -> Iterator[tuple[str, str]]:
    """``("file:line", text)`` of every line that is not blank, without the white space around it.

    Raises:
        UserError: the file cannot be read, or is not UTF-8.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if text := line.strip():
                    yield f"{path}:{number}", text
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give a text file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text in UTF-8 ({error}): convert it") from None


def values(where: str, text: str, form: str) -> list[str]:
    """The values of a line, separated by white space.

    Args:
        where: ``file:line``.
        text: the line.
        form: the names of its values, such as ``"path identity"``.

    Raises:
        UserError: more or fewer values than names.
    """
    found = text.split()
    if len(found) != len(form.split()):
        raise UserError(f"{where}: {text!r} is not of the form {form!r}: correct the line")
    return found


def rows(path: Path) -> Iterator[tuple[str, list[str]]]:
    """``("file:line", values)`` of every line that is not blank; where a line has tabs, values may have blanks.

    Raises:
        UserError: the file cannot be read, or is not UTF-8.
    """
    for where, text in lines(path):
        yield where, text.split("\t") if "\t" in text else text.split()


def read_integers(path: Path, columns: int) -> np.ndarray:
    """A table of numbers from 0, int64 [N, columns], at some ten million values a second.

    Raises:
        UserError: the file cannot be read or is empty, or, with its line, what is not such a row.
    """
    try:
        text = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give a text file") from None
    lines = text.strip().count(b"\n") + 1
    # fromstring stops at what is not a number, with a warning only: hence the look at the characters.
    if not text.translate(None, b"0123456789 \t\r\n"):
        values = np.fromstring(text, dtype=np.int64, sep=" ")
        if values.size == lines * columns:
            return values.reshape(-1, columns)
    for number, line in enumerate(text.splitlines(), 1):
        if len(line.split()) != columns or not b"".join(line.split()).isdigit():
            shown = line[:80].decode(errors="replace")
            raise UserError(f"{path}:{number}: {shown!r} is not {columns} numbers: copy the file again")
    raise UserError(f"{path} is empty: copy it again")


def are_numbers(values: Iterable[str]) -> bool:
    """Whether all are whole numbers from 0."""
    return all(value.isascii() and value.isdigit() for value in values)


def listed(source: Path, samples: list[Sample]) -> Layout:
    """The samples of a list or folder.

    Raises:
        UserError: there are none.
    """
    if not samples:
        raise UserError(
            f"{source} holds no image ({', '.join(IMAGE_EXTENSIONS)}): get it again, it should not be empty"
        )
    return Layout(samples)


class Images:
    """Images that lists name. Each folder is listed once, which is cheaper than to ask for each of many files."""

    def __init__(self) -> None:
        self._names: dict[Path, set[str]] = {}

    def path(self, where: str, folder: Path, name: str) -> Path:
        """``folder / name``, which is an image that exists.

        Args:
            where: ``file:line`` that names it.
            folder: to which the names in that file are relative.
            name: of the image.

        Raises:
            UserError: it is not named like an image, or is not there.
        """
        path = folder / name
        if not is_image(path):
            raise UserError(f"{where}: {name!r} is not an image: its name must end in {', '.join(IMAGE_EXTENSIONS)}")
        parent = path.parent
        if parent not in self._names:
            self._names[parent] = set(file_names(parent)) if parent.is_dir() else set()
        if path.name not in self._names[parent]:
            raise UserError(
                f"{where}: {path} does not exist: add it, or correct the path, which is relative to {folder}"
            )
        return path
