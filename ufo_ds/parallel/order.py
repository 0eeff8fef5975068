"""The same order of DeepSpeed's collectives on all ranks.

DeepSpeed takes parameters to gather from a Python set, and gradients to reduce as autograd makes them; the one differs
between processes, the other where a rank has no samples, or of other tasks than another. What ranks then bring together
does not belong together, and NCCL may wait for ever.

Private names of DeepSpeed 0.19.8 (``runtime/zero/partition_parameters.py``, ``stage3.py``, ``stage_1_and_2.py``) are
used.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any


def gather_in_order(parameters: Iterable[Any]) -> None:
    """Of parameters that are fetched ahead of their use DeepSpeed gathers those of each group of ranks in one
    collective; this puts the groups in an order."""
    for parameter in parameters:
        parameter.all_gather_coalesced = partial(_in_order, parameter.all_gather_coalesced)


def _in_order(gather: Callable[..., Any], parameters: Iterable[Any], **options: Any) -> Any:
    return gather(sorted(parameters, key=lambda parameter: parameter.ds_id), **options)


class OrderedReduction:
    """Hands gradients on to DeepSpeed in a given order, each once it and those before it are there.

    Not waited for is what got no gradient in the backward pass before; all ranks must give gradients to the same
    parameters. What comes without being waited for is reduced at the end of the backward pass.

    Args:
        optimizer: DeepSpeed's, of any ZeRO stage.
        order: all parameters, roughly as their gradients come.
        expected: those that get a gradient in the first backward pass.
    """

    def __init__(self, optimizer: Any, order: Sequence[Any], expected: Iterable[Any]):
        self._order = list(order)
        self._expected = {id(parameter) for parameter in expected}
        self._ready: dict[int, tuple[Any, ...]] = {}
        self._came: set[int] = set()
        self._next = 0
        self._reduce = optimizer.reduce_ready_partitions_and_remove_grads
        self._finish = optimizer.independent_gradient_partition_epilogue
        optimizer.reduce_ready_partitions_and_remove_grads = self._add
        optimizer.independent_gradient_partition_epilogue = self._end

    def _add(self, parameter: Any, *more: Any) -> None:
        """A gradient is there; ``more`` is what DeepSpeed says with it."""
        self._ready[id(parameter)] = (parameter, *more)
        self._came.add(id(parameter))
        while self._next < len(self._order):
            key = id(self._order[self._next])
            if key in self._expected:
                if key not in self._ready:
                    return
                self._reduce(*self._ready.pop(key))
            self._next += 1

    def _end(self) -> None:
        for parameter in self._order:
            if id(parameter) in self._ready:
                self._reduce(*self._ready.pop(id(parameter)))
        self._expected, self._came, self._next = self._came, set(), 0
        self._finish()
