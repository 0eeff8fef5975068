"""Layers of which a call may use leading slices only, another slice for every run of rows.

Rows of several subnets lie in one packed tensor, as wide as the widest of them; what is behind a narrower one's columns
is zero, never read, and has no gradient. Every layer is called once for all of them: ranks whose subnets differ then
still call the same modules equally often, which ZeRO-3 demands.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ufo_ds.model.packing import Segment

T = TypeVar("T")


class Run(NamedTuple):
    """Neighbouring rows (of a convolution: images) of one size: leading columns (channels) that are read and made."""

    rows: int
    width_in: int
    width: int


def same_sizes(segments: Iterable[Segment], sizes: Callable[[Segment], T], like: T) -> list[tuple[int, T]]:
    """Number of rows and sizes of each run of neighbouring segments whose sizes agree; without any rows one run of no
    rows, with the sizes ``like``."""
    pairs = [(segment.rows, sizes(segment)) for segment in segments if segment.rows]
    runs = [(key, sum(rows for rows, _ in run)) for key, run in groupby(pairs, key=lambda pair: pair[1])]
    return [(rows, key) for key, rows in runs] or [(0, like)]


def widen(x: Tensor, width: int) -> Tensor:
    """Zeros behind the columns (channels) of ``x``, up to ``width``."""
    missing = width - x.shape[1]
    return torch.cat([x, x.new_zeros(len(x), missing, *x.shape[2:])], dim=1) if missing else x


def in_runs(x: Tensor, runs: Sequence[Run], apply: Callable[[Tensor, Run], Tensor]) -> Tensor:
    """``apply`` to the columns of every run; its results, of the run's width, one below the other."""
    if len(runs) == 1:
        return apply(narrow(x, runs[0].width_in), runs[0])
    widest = max(run.width for run in runs)
    pieces = zip(x.split([run.rows for run in runs]), runs, strict=True)
    return torch.cat([widen(apply(narrow(piece, run.width_in), run), widest) for piece, run in pieces])


def narrow(x: Tensor, width: int, dim: int = 1) -> Tensor:
    """The leading entries; ``x`` itself where these are all, which spares its gradient a copy."""
    return x if x.shape[dim] == width else x.narrow(dim, 0, width)


class Linear(nn.Linear):
    def forward(self, x_NI: Tensor, runs: Sequence[Run]) -> Tensor:  # type: ignore[override]
        """``[N, the widest run]``"""
        return in_runs(x_NI, runs, self._one)

    def _one(self, x_NI: Tensor, run: Run) -> Tensor:
        weight = narrow(narrow(self.weight, run.width, 0), run.width_in)
        return F.linear(x_NI, weight, narrow(self.bias, run.width, 0))


class QKVLinear(nn.Linear):
    """Queries, keys and values, in this order, of every head; a run's width is that of its leading heads of each."""

    def forward(self, x_NI: Tensor, runs: Sequence[Run]) -> Tensor:  # type: ignore[override]
        return in_runs(x_NI, runs, self._one)

    def _one(self, x_NI: Tensor, run: Run) -> Tensor:
        weight, bias = self.weight, self.bias
        if run.width < len(weight):
            weight = weight.unflatten(0, (3, -1))[:, : run.width // 3].flatten(0, 1)
            bias = bias.unflatten(0, (3, -1))[:, : run.width // 3].flatten()
        return F.linear(x_NI, narrow(weight, run.width_in), bias)


class LayerNorm(nn.LayerNorm):
    def forward(self, x_ND: Tensor, runs: Sequence[Run]) -> Tensor:  # type: ignore[override]
        return in_runs(x_ND, runs, self._one)

    def _one(self, x_ND: Tensor, run: Run) -> Tensor:
        weight, bias = (narrow(parameter, run.width, 0) for parameter in (self.weight, self.bias))
        return F.layer_norm(x_ND, (run.width,), weight, bias, self.eps)


class Conv2d(nn.Conv2d):
    """3x3 convolutions without bias."""

    def forward(self, x_BCHW: Tensor, runs: Sequence[Run]) -> Tensor:  # type: ignore[override]
        return in_runs(x_BCHW, runs, self._one)

    def _one(self, x_BCHW: Tensor, run: Run) -> Tensor:
        weight = narrow(narrow(self.weight, run.width, 0), run.width_in)
        return F.conv2d(x_BCHW, weight, None, self.stride, self.padding)


class GroupNorm(nn.GroupNorm):
    """With as many groups as a layer of the run's channels has."""

    def __init__(self, channels: int):
        super().__init__(groups_of(channels), channels)

    def forward(self, x_BCHW: Tensor, runs: Sequence[Run]) -> Tensor:  # type: ignore[override]
        return in_runs(x_BCHW, runs, self._one)

    def _one(self, x_BCHW: Tensor, run: Run) -> Tensor:
        weight, bias = (narrow(parameter, run.width, 0) for parameter in (self.weight, self.bias))
        return F.group_norm(x_BCHW, groups_of(run.width), weight, bias, self.eps)


def groups_of(channels: int) -> int:
    """16 channels a group, as Wu and He (2018) advise, or one group."""
    return channels // 16 if channels % 16 == 0 else 1
