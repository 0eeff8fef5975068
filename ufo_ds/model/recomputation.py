"""Activation checkpointing (Chen et al., 2016): of a block only its input is kept for the backward pass, which computes
the block again first."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def recomputed(block: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """``block(*arguments)``; the block must draw no random numbers from torch's own generators."""
    # To its end, or ZeRO-3 would not release what the last module gathered.
    return checkpoint(_run, block, *arguments, use_reentrant=False, preserve_rng_state=False, early_stop=False)


def _run(block: Callable[..., Tensor], *arguments: Any) -> Tensor:
    return _AgainFirst.apply(block(*arguments))


class _AgainFirst(torch.autograd.Function):
    """The identity. What is saved here is the first thing that the backward pass asks for, and has the block computed
    again before ZeRO-3 gathers anything for it. What of a block is asked for first else depends on a rank's tasks and
    routes, and with it the order in which ranks gather."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        ctx.save_for_backward(y.new_empty(0))
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        ctx.saved_tensors  # noqa: B018
        return grad
