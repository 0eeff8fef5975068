"""Folders and list files of a data set, found and read with errors that say where."""

import os
from collections.abc import Iterator
from pathlib import Path

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
