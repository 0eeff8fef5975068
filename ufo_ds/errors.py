"""The exception for wrong input, and how an entry script ends on it."""

import argparse
import os
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


def run(main: Callable[[list[str] | None], None], argv: list[str] | None = None) -> int:
    """Run an entry script's ``main``; 0 done, 2 wrong input (one line on stderr, no traceback)."""
    try:
        main(argv)
    except UserError as error:
        # From a loader's worker process torch brings the traceback as text, with our line at its end.
        line = " ".join(str(error).rsplit("UserError: ", 1)[-1].split())
        if os.environ.get("RANK", "0") != "0":
            time.sleep(5)  # mostly all ranks see the same fault, and the launcher ends the others once one has said it
        print(f"error: {line}", file=sys.stderr, flush=True)
        return 2
    return 0
