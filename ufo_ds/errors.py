"""The exceptions for wrong input, and how an entry script ends on them."""

import os
import sys
import time
from collections.abc import Callable


class UserError(Exception):
    """Wrong input. The message is one line: the value, where it came from, what to do.

    In a run of several ranks all of them raise it, and the first one says it.
    """


class RankError(UserError):
    """Wrong input that this rank alone has seen (its own samples, say): it says so itself."""


def run(main: Callable[[list[str] | None], None], argv: list[str] | None = None) -> int:
    """Run an entry script's ``main``; 0 done, 2 wrong input (one line on stderr, no traceback)."""
    try:
        main(argv)
    except UserError as error:
        if os.environ.get("RANK", "0") == "0" or isinstance(error, RankError):
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        else:
            time.sleep(1)  # a launcher ends all ranks when one does: let the first one speak
        return 2
    return 0
