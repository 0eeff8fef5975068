"""Optimizers on ZeRO's flat partitions that treat every parameter by a rule of its own.

DeepSpeed hands an optimizer flat fp32 tensors in which the slices of many parameters lie one behind the other. The
optimizers here know the slices: each has its learning rate, weight decay and layer-wise rate, and may be left alone.
Everything is done on views of slices, many in one kernel (``torch._foreach_*``), without asking the device for a value;
the gradient serves as scratch space, so that no step needs memory of its own.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ufo_ds.checkpoint import AVERAGE
from ufo_ds.model.parameters import UpdateRule, without_effect
from ufo_ds.parallel.shards import Slice
from ufo_ds.recipe import Optimizer as Options


@dataclass
class Bucket:
    """Slices of one partition with the same rule: ``chunks`` are their numbers in the cut partition."""

    rule: UpdateRule
    chunks: list[int]
    norms: Tensor  # where their parameters stand among the adapted ones of the partition


@dataclass
class Plan:
    """How a partition is cut (``sizes``, gaps included) and what becomes of the pieces.

    ``adapted`` counts the parameters with a layer-wise rate, those without a slice here included: it is the same on
    all ranks of ``group``, which share the parameters.
    """

    sizes: list[int]
    buckets: list[Bucket]
    adapted: int
    group: dist.ProcessGroup
    device: torch.device

    def cut(self, tensor: Tensor) -> tuple[Tensor, ...]:
        return tensor.detach().split(self.sizes)


class ShardedOptimizer(torch.optim.Optimizer):
    """What all of them have in common; :meth:`prepare` must follow DeepSpeed's construction.

    Args:
        groups: parameter groups as DeepSpeed needs them; their ``lr`` is the schedule's, before any scale.
        options: of the recipe.
    """

    def __init__(self, groups: list[dict[str, Any]], options: Options):
        super().__init__(groups, {"lr": options.lr})
        self.options = options
        self.watch: Callable[[Tensor], None] | None = None  # sees partitions with their gradients, instead of a step
        self._slices: list[Slice] = []
        self._rules: Mapping[str, UpdateRule] = {}
        self._plans: dict[Tensor, Plan] = {}

    def state_keys(self) -> list[str]:
        """Names of the state tensors, each as large as the partition and zero in the beginning."""
        raise NotImplementedError

    def update(self, plan: Plan, chunks: "Chunks", lr: float, step: int) -> None:
        """Change the slices of one partition; ``step`` counts from 1."""
        raise NotImplementedError

    def prepare(self, slices: Iterable[Slice], rules: Mapping[str, UpdateRule]) -> None:
        """Take note of where this rank's slices lie, and of the rule of every parameter; make the state."""
        self._slices, self._rules = list(slices), rules
        for flat in {piece.flat: None for piece in self._slices}:
            state = self.state[flat]
            state["step"] = 0.0
            for key in self.state_keys():
                state[key] = torch.zeros_like(flat, requires_grad=False)
            if self.options.average is not None:
                state[AVERAGE] = flat.detach().clone()
        self.leave_out(())

    def leave_out(self, unused: Collection[str]) -> None:
        """From now on neither step nor decay these parameters, nor touch their state."""
        by_flat: dict[Tensor, list[Slice]] = {}
        for piece in self._slices:
            by_flat.setdefault(piece.flat, []).append(piece)
        self._plans = {flat: self._plan(flat, pieces, unused) for flat, pieces in by_flat.items()}

    def _plan(self, flat: Tensor, pieces: list[Slice], unused: Collection[str]) -> Plan:
        used = [piece for piece in pieces if piece.name not in unused]
        adapted = [piece.name for piece in used if self._rules[piece.name].adapted]
        place = {name: i for i, name in enumerate(adapted)}
        sizes: list[int] = []
        found: dict[UpdateRule, list[tuple[int, str]]] = {}
        end = 0
        for piece in sorted((piece for piece in used if piece.length), key=lambda piece: piece.offset):
            for start, stop in _stepped(piece):
                sizes += [start - end, stop - start]
                end = stop
                found.setdefault(self._rules[piece.name], []).append((len(sizes) - 1, piece.name))
        sizes.append(flat.numel() - end)
        buckets = [
            Bucket(
                rule,
                [chunk for chunk, _ in items],
                torch.tensor([place[name] for _, name in items if rule.adapted], dtype=torch.int64, device=flat.device),
            )
            for rule, items in found.items()
        ]
        return Plan(sizes, buckets, len(adapted), pieces[0].group, flat.device)

    @property
    def steps(self) -> int:
        """Steps taken so far."""
        return int(next(iter(self.state.values()))["step"])

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step of the partitions that are in the groups now; DeepSpeed calls it once for each."""
        for group in self.param_groups:
            for flat in group["params"]:
                if self.watch is not None:
                    self.watch(flat)
                    continue
                state, plan = self.state[flat], self._plans[flat]
                state["step"] += 1
                chunks = Chunks(plan, {"weight": flat, "gradient": flat.grad}, state)
                self.update(plan, chunks, group["lr"], int(state["step"]))
                if self.options.average is not None:
                    keep = average_decay(self.options.average, int(state["step"]))
                    for bucket in plan.buckets:
                        torch._foreach_lerp_(chunks.of(AVERAGE, bucket), chunks.of("weight", bucket), 1 - keep)


def _stepped(piece: Slice) -> list[tuple[int, int]]:
    """The ranges of the partition in which a slice is stepped: all of it but what has no effect."""
    idle, stop = without_effect(piece.name, piece.shape), piece.start + piece.length
    ranges = [(piece.start, min(stop, idle.start)), (max(piece.start, idle.stop), stop)]
    shift = piece.offset - piece.start
    return [(low + shift, high + shift) for low, high in ranges if low < high]


class Chunks:
    """The pieces of a partition's tensors."""

    def __init__(self, plan: Plan, tensors: Mapping[str, Tensor], state: Mapping[str, Any]):
        states = {key: value for key, value in state.items() if torch.is_tensor(value)}
        self._cut = {key: plan.cut(tensor) for key, tensor in {**tensors, **states}.items()}

    def of(self, key: str, bucket: Bucket) -> list[Tensor]:
        """One kind of tensor of a bucket's slices."""
        pieces = self._cut[key]
        return [pieces[i] for i in bucket.chunks]


class ShardedSGD(ShardedOptimizer):
    """``torch.optim.SGD`` with momentum (no dampening) and coupled weight decay."""

    def state_keys(self) -> list[str]:
        return ["momentum_buffer"] if self.options.momentum else []

    def update(self, plan: Plan, chunks: Chunks, lr: float, step: int) -> None:
        for bucket in plan.buckets:
            weights, directions = chunks.of("weight", bucket), chunks.of("gradient", bucket)
            if bucket.rule.weight_decay:
                torch._foreach_add_(directions, weights, alpha=bucket.rule.weight_decay)
            if self.options.momentum:
                buffers = chunks.of("momentum_buffer", bucket)
                torch._foreach_mul_(buffers, self.options.momentum)
                torch._foreach_add_(buffers, directions)
                directions = buffers
            torch._foreach_add_(weights, directions, alpha=-lr * bucket.rule.lr_scale)


class ShardedAdamW(ShardedOptimizer):
    """``torch.optim.AdamW``."""

    eps = 1e-8

    def state_keys(self) -> list[str]:
        return ["exp_avg", "exp_avg_sq"]

    def update(self, plan: Plan, chunks: Chunks, lr: float, step: int) -> None:
        beta1, beta2 = self.options.betas
        for bucket in plan.buckets:
            weights, gradients = chunks.of("weight", bucket), chunks.of("gradient", bucket)
            means, squares = chunks.of("exp_avg", bucket), chunks.of("exp_avg_sq", bucket)
            rate = lr * bucket.rule.lr_scale
            if bucket.rule.weight_decay:
                torch._foreach_mul_(weights, 1 - rate * bucket.rule.weight_decay)
            add_moments(means, squares, gradients, beta1, beta2)
            root_of_squares(gradients, squares, 1 - beta2**step, self.eps)
            torch._foreach_addcdiv_(weights, means, gradients, -rate / (1 - beta1**step))


class ShardedLARS(ShardedOptimizer):
    """LARS (You, Gitman and Ginsburg, 2017, algorithm 1): each matrix steps by a rate in proportion to its norm over
    its gradient's; everything else as SGD with the learning rate inside the momentum."""

    def state_keys(self) -> list[str]:
        return ["momentum_buffer"] if self.options.momentum else []

    def update(self, plan: Plan, chunks: Chunks, lr: float, step: int) -> None:
        norms = whole_norms(plan, chunks, ("weight", "gradient"))
        for bucket in plan.buckets:
            decay = bucket.rule.weight_decay
            weights, directions = chunks.of("weight", bucket), chunks.of("gradient", bucket)
            if decay:
                torch._foreach_add_(directions, weights, alpha=decay)
            if bucket.rule.adapted:
                w, g = norms[:, bucket.norms]
                rates = torch.where((w > 0) & (g > 0), self.options.trust * w / (g + decay * w), 1.0)
                torch._foreach_mul_(directions, list(rates.unbind()))
            torch._foreach_mul_(directions, lr * bucket.rule.lr_scale)
            if self.options.momentum:
                buffers = chunks.of("momentum_buffer", bucket)
                torch._foreach_mul_(buffers, self.options.momentum)
                torch._foreach_add_(buffers, directions)
                directions = buffers
            torch._foreach_sub_(weights, directions)


class ShardedLAMB(ShardedOptimizer):
    """LAMB (You et al., 2020, algorithm 2): AdamW's step, for each matrix scaled to its norm, clipped to
    ``norm_bounds`` (phi in the paper)."""

    eps = 1e-6

    def state_keys(self) -> list[str]:
        return ["exp_avg", "exp_avg_sq"]

    def update(self, plan: Plan, chunks: Chunks, lr: float, step: int) -> None:
        beta1, beta2 = self.options.betas
        for bucket in plan.buckets:
            gradients, means = chunks.of("gradient", bucket), chunks.of("exp_avg", bucket)
            squares = chunks.of("exp_avg_sq", bucket)
            add_moments(means, squares, gradients, beta1, beta2)
            root_of_squares(gradients, squares, 1 - beta2**step, self.eps)
            torch._foreach_reciprocal_(gradients)
            torch._foreach_mul_(gradients, means)
            torch._foreach_div_(gradients, 1 - beta1**step)
            if bucket.rule.weight_decay:
                torch._foreach_add_(gradients, chunks.of("weight", bucket), alpha=bucket.rule.weight_decay)
        norms = whole_norms(plan, chunks, ("weight", "gradient"))  # the gradients are the updates by now
        low, high = self.options.norm_bounds
        for bucket in plan.buckets:
            updates = chunks.of("gradient", bucket)
            if bucket.rule.adapted:
                w, u = norms[:, bucket.norms]
                phi = w.clamp(low, high)
                torch._foreach_mul_(updates, list(torch.where((phi > 0) & (u > 0), phi / u, 1.0).unbind()))
            torch._foreach_add_(chunks.of("weight", bucket), updates, alpha=-lr * bucket.rule.lr_scale)


def whole_norms(plan: Plan, chunks: Chunks, keys: Sequence[str]) -> Tensor:
    """Norms ``[keys, adapted]`` over whole parameters, of which this rank has slices; one collective."""
    squares = torch.zeros(len(keys), plan.adapted, device=plan.device)
    for bucket in plan.buckets:
        if bucket.rule.adapted:
            for row, key in zip(squares, keys, strict=True):
                row[bucket.norms] = torch.stack(torch._foreach_norm(chunks.of(key, bucket))).square()
    if plan.adapted:
        dist.all_reduce(squares, group=plan.group)
    return squares.sqrt()


def add_moments(
    means: list[Tensor], squares: list[Tensor], gradients: list[Tensor], beta1: float, beta2: float
) -> None:
    """Adam's moving averages of the gradient and of its square (Kingma and Ba, 2015)."""
    torch._foreach_lerp_(means, gradients, 1 - beta1)
    torch._foreach_mul_(squares, beta2)
    torch._foreach_addcmul_(squares, gradients, gradients, 1 - beta2)


def root_of_squares(out: list[Tensor], squares: list[Tensor], correction: float, eps: float) -> None:
    """Adam's denominator, written into ``out``."""
    torch._foreach_copy_(out, squares)
    torch._foreach_sqrt_(out)
    torch._foreach_div_(out, correction**0.5)
    torch._foreach_add_(out, eps)


def average_decay(decay: float, step: int) -> float:
    """How much of a moving average stays at a step (counted from 1).

    It rises to ``decay`` as (1 + t) / (10 + t), t = step - 1, so that the initial weights are soon forgotten: the rule
    of TensorFlow's ``ExponentialMovingAverage(num_updates=t)``.
    """
    return min(decay, step / (step + 9))


OPTIMIZERS: dict[str, type[ShardedOptimizer]] = {
    "sgd": ShardedSGD,
    "adamw": ShardedAdamW,
    "lars": ShardedLARS,
    "lamb": ShardedLAMB,
}
