"""How the tasks' gradients get on with each other on the parameters they share (Yu et al., 2020, PCGrad: a conflict is
a negative cosine)."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from ufo_ds.data.mixing import Batch
from ufo_ds.model.parameters import used_together
from ufo_ds.parallel.averages import head_buffers
from ufo_ds.parallel.shards import Slice, parameter_slices

if TYPE_CHECKING:
    from ufo_ds.parallel.engine import Engine

_COUNTERS = ("micro_steps", "global_steps", "global_samples", "skipped_steps")


def gradient_conflict(engine: "Engine", batches: Sequence[Batch]) -> dict[str, dict[str, float]]:
    """Per task ``gradient_norm``, of its part of the loss (its weight included) on the backbone parameters that more
    than one task uses, and ``gradient_cosine`` with the sum of the other tasks' parts; what is undefined is left out.

    Every rank calls it with all micro-batches of a step. It takes one step's forward and backward passes for each task
    and one more for all; weights, state, statistics and counters are then what they were.
    """
    everything = [name for name, _ in engine.model.named_parameters()]
    names = used_together(everything, engine.model.routes, engine.recipe.model.shared_samples)
    if not names:
        return {}
    pieces = [piece for piece in parameter_slices(engine) if piece.name in names]
    products_T3 = torch.zeros(len(engine.samples), 3, device=engine.device)
    with _undisturbed(engine):
        whole = _gradient(engine, batches, pieces, None)
        for row, task in zip(products_T3, engine.samples, strict=True):
            mine = _gradient(engine, batches, pieces, task)
            others = whole - mine
            row.copy_(torch.stack([mine.square().sum(), mine.dot(others), others.square().sum()]))
    dist.all_reduce(products_T3)
    found = {}
    for task, (square, product, others_square) in zip(engine.samples, products_T3.tolist(), strict=True):
        if not math.isfinite(square + others_square):
            continue
        found[task] = {"gradient_norm": square**0.5}
        if square * others_square > 0:
            found[task]["gradient_cosine"] = product / (square * others_square) ** 0.5
    return found


def _gradient(engine: "Engine", batches: Sequence[Batch], pieces: Sequence[Slice], task: str | None) -> Tensor:
    """This rank's elements of the gradient of one task's part of the loss, or of the whole loss."""
    by_flat: dict[Tensor, list[Tensor]] = {}

    def look(flat: Tensor) -> None:
        assert flat.grad is not None
        by_flat[flat] = [piece.of(flat.grad).clone() for piece in pieces if piece.flat is flat]

    engine.optimizer.watch = look
    weights = engine.task_weights
    try:
        if task is not None:
            engine.task_weights = weights * engine.slot_mask(task)
        for batch in batches:
            engine.backward(batch)
            engine.deepspeed.step()
        if engine.deepspeed.optimizer.overflow:  # not finite: the optimizer saw nothing of it
            return weights.new_full((sum(piece.length for piece in pieces),), float("nan"))
    finally:
        engine.optimizer.watch, engine.task_weights = None, weights
        engine.forget_gradients()
    return torch.cat([element for found in by_flat.values() for element in found] or [weights.new_zeros(0)])


@contextmanager
def _undisturbed(engine: "Engine") -> Iterator[None]:
    """Run steps that only look, and leave no trace."""
    kept: list[tuple[Any, str, Any]] = [(engine.deepspeed, name, getattr(engine.deepspeed, name)) for name in _COUNTERS]
    kept.append((engine.deepspeed.optimizer, "clip_grad", engine.deepspeed.optimizer.clip_grad))
    kept.append((engine.guard, "watching", engine.guard.watching))
    buffers = [(buffer, buffer.clone()) for buffer in head_buffers(engine).values()]
    engine.deepspeed.optimizer.clip_grad, engine.guard.watching = 0.0, False
    try:
        yield
    finally:
        for owner, name, value in kept:
            setattr(owner, name, value)
        for buffer, value in buffers:
            buffer.copy_(value)
