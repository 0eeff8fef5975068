"""Collectives that gradients flow through, for uneven numbers of rows."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ufo_ds.model.heads import HolderGroup
from ufo_ds.parallel.placement import share


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        y = x.clone()
        dist.all_reduce(y, group=group)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
        grad = grad.clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, send: Sequence[int], receive: Sequence[int], group: dist.ProcessGroup) -> Tensor:
        ctx.splits, ctx.group = (send, receive), group
        y = x.new_empty(sum(receive), *x.shape[1:])
        dist.all_to_all_single(y, x.contiguous(), list(receive), list(send), group=group)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None]:
        send, receive = ctx.splits
        return _AllToAll.apply(grad, receive, send, ctx.group), None, None, None


def all_to_all(x: Tensor, send: Sequence[int], receive: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """Send ``send[i]`` rows of ``x`` to rank i of the group and get ``receive[i]`` rows from it, in rank order."""
    return _AllToAll.apply(x, send, receive, group)


class RankGroup(HolderGroup):
    """The ranks that hold a task's head and samples; with the part ``first`` those begin that have one sample more.

    Gradients of the collectives are summed over the ranks, as if one process had computed the sum of all losses.
    """

    def __init__(self, group: dist.ProcessGroup, first: int = 0):
        self.group, self.first = group, first
        self.size, self.part = dist.get_world_size(group), dist.get_rank(group)

    def all_reduce(self, x: Tensor) -> Tensor:
        return _AllReduce.apply(x, self.group)

    def all_max(self, x: Tensor) -> Tensor:
        y = x.detach().clone()
        dist.all_reduce(y, op=dist.ReduceOp.MAX, group=self.group)
        return y

    def counts(self, total: int) -> list[int]:
        return [len(share(range(total), self.size, part, self.first)) for part in range(self.size)]

    def gathered_counts(self, x: Tensor) -> list[int]:
        counts = torch.zeros(self.size, dtype=torch.int64, device=x.device)
        counts[self.part] = len(x)
        dist.all_reduce(counts, group=self.group)
        return counts.tolist()

    def all_gather(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        # Every rank sends its rows to all: an all-to-all, whose backward sums what the ranks send back.
        return all_to_all(torch.cat([x] * self.size), [len(x)] * self.size, counts, self.group)

    def return_rows(self, x_M: Tensor, counts: Sequence[int]) -> Tensor:
        mine = counts[self.part]
        return all_to_all(x_M, counts, [mine] * self.size, self.group).unflatten(0, (self.size, mine))


def everyone() -> HolderGroup:
    """All ranks of the job, as holders of a task that every one of them trains on; alone, this process."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return HolderGroup()
    group = dist.new_group()  # of its own: DistributedDataParallel's sums of gradients may come between
    assert isinstance(group, dist.ProcessGroup)
    return RankGroup(group)
