"""How far long work is: a bar on a terminal, elsewhere a plain line now and then."""

import sys
import time
from types import TracebackType

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 30.0


class Progress:
    """Counts what is done, on stderr.

    Args:
        total: how many there are.
        done: how many of them were done before.
        unit: what is counted, in the plural.
        name: of the work, before the count.
    """

    def __init__(self, total: int, *, done: int = 0, unit: str, name: str = ""):
        self._total, self._done, self._unit, self._name = total, done, unit, name
        self._bar = tqdm(total=total, initial=done, unit=f" {unit}", desc=name or None, disable=None)
        self._began = self._said = time.monotonic()
        self._done_before = done

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.close()

    def update(self) -> None:
        """One more is done."""
        self._done += 1
        self._bar.update()
        now = time.monotonic()
        if self._bar.disable and now - self._said >= SECONDS_BETWEEN_LINES:
            self._said = now
            rate = (self._done - self._done_before) / (now - self._began)
            left = tqdm.format_interval((self._total - self._done) / rate)
            name = f"{self._name}: " if self._name else ""
            digits = ".0f" if rate >= 10 else ".2g"
            counts = f"{self._done} of {self._total} {self._unit}, {rate:{digits}} {self._unit}/s, {left} left"
            print(f"{name}{counts}", file=sys.stderr, flush=True)
