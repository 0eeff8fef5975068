"""Steps that would do harm are left out: those whose loss or gradient is not finite, or far above what is usual.

DeepSpeed computes the norm of the gradient, asks the device whether it is finite, and leaves the step out where it is
not. Here the norm that it asks about is made infinite wherever a step is to be left out. So nothing waits for the
device that did not wait before, and what a step left out must not touch (weights, optimizer state, moving averages) is
what DeepSpeed leaves alone; running statistics, which the forward pass changes, are put back.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from ufo_ds.parallel.averages import head_buffers
from ufo_ds.parallel.shards import weigh_gradient_norm
from ufo_ds.recipe import Guard as Options

if TYPE_CHECKING:
    from ufo_ds.parallel.engine import Engine

WINDOW = 100  # steps taken whose median is what is usual


@dataclass(frozen=True)
class LeftOut:
    """A step that was not taken: its global loss, the norm of its gradient, and whether a rank asked to stop."""

    loss: float
    gradient_norm: float
    asked: bool


class Guard:
    """Decides in every step, on all ranks alike, whether it is taken.

    Attributes:
        left_out: the last step, if it was not taken.
        count: steps left out so far, over all starts of the run.
        in_a_row: those since the last step that was taken.
        watching: off where gradients are only looked at.
    """

    def __init__(self, engine: "Engine", options: Options):
        self.engine, self.options = engine, options
        self.left_out: LeftOut | None = None
        self.count = self.in_a_row = self._taken = 0
        self.watching = True
        device = engine.deepspeed.device
        self._usual_W2 = torch.zeros(WINDOW, 2, device=device)  # loss and norm of the last steps taken
        self._loss, self._asked = torch.zeros((), device=device), False
        self._values_3: Tensor | None = None  # loss, norm and number of ranks that ask to stop, of this step
        self._statistics = list(head_buffers(engine).values())
        self._kept = [buffer.clone() for buffer in self._statistics]
        weigh_gradient_norm(engine, self._weight)

    def begin(self, asked: bool) -> None:
        """To be called before a step; ``asked``: this rank cannot go on, and no rank is to take the step."""
        self._asked, self._values_3, self.left_out = asked, None, None
        if self._statistics:
            torch._foreach_copy_(self._kept, self._statistics)

    def note(self, loss: Tensor) -> None:
        """This rank's part of the loss of the micro-batches so far."""
        self._loss = loss

    def end(self) -> bool:
        """To be called after the optimizer was; whether it took the step."""
        if not self.engine.deepspeed.optimizer.overflow:
            if self._values_3 is not None:
                self._usual_W2[self._taken % WINDOW] = self._values_3[:2]
            self._taken, self.in_a_row = self._taken + 1, 0
            return True
        if self._values_3 is None:  # DeepSpeed looks for NaN in bf16 before it computes a norm
            self._values_3 = self._exchange(torch.full_like(self._loss, float("nan")))
        loss, norm, asked = self._values_3.tolist()
        self.left_out = LeftOut(loss, norm, bool(asked))
        self.count, self.in_a_row = self.count + 1, self.in_a_row + 1
        if self._statistics:
            torch._foreach_copy_(self._statistics, self._kept)
        return False

    def memory(self) -> dict[str, Any]:
        """What is to be kept, so that a resumed run leaves out the steps that an uninterrupted one does."""
        usual = self._usual_W2[: self._taken].tolist()
        return {"taken": self._taken, "count": self.count, "in_a_row": self.in_a_row, "usual": usual}

    def remember(self, memory: dict[str, Any]) -> None:
        """What :meth:`memory` gave; of a checkpoint without it nothing is remembered."""
        self._taken, self.count = memory.get("taken", 0), memory.get("count", 0)
        self.in_a_row = memory.get("in_a_row", 0)
        for row, values in zip(self._usual_W2, memory.get("usual", []), strict=False):
            row.copy_(torch.tensor(values))

    def _weight(self, norm: Tensor) -> Tensor:
        """1, or infinity where the step is to be left out."""
        if not self.watching:
            return torch.ones_like(norm)
        values_3 = self._values_3 = self._exchange(norm)
        fine = values_3.isfinite().all() & (values_3[2] == 0)
        if self.options.spike is not None and self._taken >= WINDOW:
            fine &= (values_3[:2] <= self.options.spike * self._usual_W2.median(0).values).all()
        return torch.where(fine, 1.0, float("inf")).to(norm.dtype)

    def _exchange(self, norm: Tensor) -> Tensor:
        """The same values on all ranks, to the bit: the norm, which may come out of sums in other orders, is the first
        rank's."""
        first = self.engine.rank == 0
        asked = torch.full_like(self._loss, float(self._asked))
        values_3 = torch.stack([self._loss, norm.to(self._loss) if first else torch.zeros_like(self._loss), asked])
        dist.all_reduce(values_3)
        return values_3
