"""The one exception for wrong input, and how an entry script ends on it."""

import sys
from collections.abc import Callable


class UserError(Exception):
    """Wrong input. The message is one line: the value, where it came from, what to do."""


def run(main: Callable[[list[str] | None], None], argv: list[str] | None = None) -> int:
    """Run an entry script's ``main``; 0 done, 2 wrong input (one line on stderr, no traceback)."""
    try:
        main(argv)
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return 2
    return 0
