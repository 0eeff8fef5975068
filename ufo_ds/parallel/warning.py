"""The signal that warns a run of its end: whichever ranks it reaches, and when, all leave after the same step."""

import signal
from types import FrameType

import torch
import torch.distributed as dist

from ufo_ds.errors import UserError

LEFT = 75  # the exit status of a run that was warned, has saved and can go on (EX_TEMPFAIL of sysexits.h)


class WarningSignal:
    """Notes the signal from when it is made. The ranks ask each other while they compute a step, over a gloo group on
    the host: no step waits for it, and no device.
    """

    def __init__(self, number: signal.Signals):
        self.number = number
        self._noted = False
        self._group: dist.ProcessGroup | None = None
        signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted = True

    def ask(self) -> None:
        """To be called by every rank before a step."""
        if self._group is None:
            self._group = dist.new_group(backend="gloo")
        self._count = torch.tensor([float(self._noted)])
        self._asked = dist.all_reduce(self._count, group=self._group, async_op=True)

    def came(self) -> bool:
        """To be called by every rank after it: whether the signal had reached any of them when it asked."""
        self._asked.wait()
        return self._count.item() > 0


def signal_named(name: str) -> signal.Signals:
    """``USR1`` or ``SIGUSR1``.

    Raises:
        UserError: no such signal, or one that no process can note.
    """
    number = signal.Signals.__members__.get(f"SIG{name.upper().removeprefix('SIG')}")
    if number is None or number in (signal.SIGKILL, signal.SIGSTOP):
        raise UserError(f"--warning_signal {name!r}: use the name of a signal that can be noted, such as USR1")
    return number
