"""The exception for wrong input, and how an entry script ends on it."""

import argparse
import errno
import os
import re
import sys
import time
from collections.abc import Callable
from typing import NoReturn


class UserError(Exception):
    """Wrong input. The message is one line: the value, where it came from, what to do."""


class ArgumentParser(argparse.ArgumentParser):
    """One that raises :class:`UserError` on a wrong option, in place of its usage over many lines."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message}: see {self.prog} --help")


NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def run(main: Callable[[list[str] | None], None], argv: list[str] | None = None) -> int:
    """Run an entry script's ``main``; 0 done, 2 wrong input or a full disk (one line on stderr, no traceback)."""
    try:
        main(argv)
    except Exception as error:
        if isinstance(error, UserError):
            # From a loader's worker process torch brings the traceback as text, with our line at its end.
            line = " ".join(str(error).rsplit("UserError: ", 1)[-1].split())
        elif number := _no_room(error):
            name = getattr(error, "filename", None) or "a file"
            line = f"{name} could not be written: {os.strerror(number)}: make room, and start it again"
        else:
            raise
        if os.environ.get("RANK", "0") != "0":
            time.sleep(5)  # mostly all ranks see the same fault, and the launcher ends the others once one has said it
        print(f"error: {line}", file=sys.stderr, flush=True)
        return 2
    return 0


def _no_room(error: Exception) -> int | None:
    """The number of the system's error if it is one of no room; from Rust, as of safetensors, it comes as text."""
    number = error.errno if isinstance(error, OSError) else None
    if found := re.search(r"\(os error (\d+)\)", str(error)):
        number = int(found[1])
    return number if number in NO_ROOM else None
