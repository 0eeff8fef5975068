"""Tables of values apart by blanks, as data sets come with them."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from ufo_ds.errors import UserError


def rows(path: Path) -> Iterator[tuple[str, list[str]]]:
    """``("file:line", values)`` of every line that is not blank; where a line has tabs, values may have blanks.

    Raises:
        UserError: the file cannot be read, or is not text.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{path}:{number}", line.strip().split("\t") if "\t" in line else line.split()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give the text file of the data set") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text in UTF-8 ({error}): convert it") from None


def read_integers(path: Path, columns: int) -> np.ndarray:
    """A table of numbers from 0, int64 [N, columns], at some ten million values a second.

    Raises:
        UserError: the file cannot be read or is empty, or, with its line, what is not such a row.
    """
    try:
        text = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give the text file of the data set") from None
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
