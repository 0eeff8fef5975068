"""Moving averages of the weights: kept beside the optimizer's state, and put in the weights' place for evaluation.

Of parameters the optimizer keeps them; the necks' running statistics are averaged here in the same way.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ufo_ds.checkpoint import AVERAGE
from ufo_ds.parallel.experts import EMPTY
from ufo_ds.parallel.optimizers import average_decay
from ufo_ds.parallel.shards import refresh_low_precision

if TYPE_CHECKING:
    from ufo_ds.parallel.engine import Engine


def head_buffers(engine: "Engine") -> dict[str, Tensor]:
    """The running statistics of this rank's heads, by name."""
    return {
        name: buffer
        for name, buffer in engine.model.named_buffers()
        if name.startswith("heads.") and EMPTY not in name and buffer.is_floating_point()
    }


class BufferAverages:
    """Moving averages of the heads' running statistics; ``values`` are their tensors by name, none without
    ``optimizer.average``."""

    def __init__(self, engine: "Engine"):
        self.engine, self.decay = engine, engine.recipe.optimizer.average
        self.values = {} if self.decay is None else {n: b.clone() for n, b in head_buffers(engine).items()}

    def update(self) -> None:
        """To be called after each step of the optimizer."""
        if self.decay is not None:
            keep = average_decay(self.decay, self.engine.optimizer.steps)
            for name, buffer in head_buffers(self.engine).items():
                self.values[name].lerp_(buffer, 1 - keep)


@contextmanager
def averaged(engine: "Engine") -> Iterator[None]:
    """With the averages in place of weights and statistics, where the recipe asks for averages; then exactly as before.
    Every rank calls it."""
    if engine.recipe.optimizer.average is None:
        yield
        return
    _swap(engine)
    try:
        yield
    finally:
        _swap(engine)


@torch.no_grad()
def _swap(engine: "Engine") -> None:
    buffers, averages = head_buffers(engine), engine.buffer_averages.values
    pairs = [(flat, state[AVERAGE]) for flat, state in engine.optimizer.state.items()]
    for a, b in pairs + [(buffers[name], averages[name]) for name in buffers]:
        kept = a.detach().clone()
        a.copy_(b)
        b.copy_(kept)
    refresh_low_precision(engine)
