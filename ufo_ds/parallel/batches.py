"""``exchange: input``: samples read anywhere in an expert-parallel group move once, as uint8, to their owners."""

import torch
import torch.distributed as dist
from deepspeed.utils import groups
from torch import Tensor

from ufo_ds.data.mixing import Batch, TaskBatch
from ufo_ds.parallel.placement import Placement


def exchange_samples(batch: Batch, placement: Placement, rank: int, samples: dict[str, int]) -> Batch:
    """Turn a batch read by :meth:`Placement.read_evenly` into the one :meth:`Placement.owned` would have read.

    One all-to-all of bytes: images, labels and what a mixing task has beside them, task by task. All sizes follow from
    the placement.
    """
    size, mine = placement.ep_size, placement.tasks_of[placement.ep_rank(rank)]
    read_by = [placement.read_evenly(other, samples) for other in placement.group(rank)]

    def nbytes(task: str, images: int) -> int:
        return images * sum(x.shape[1:].numel() * x.element_size() for x in _tensors(batch.tasks[task]))

    outgoing = [[_to_bytes(batch.tasks[task]) for task in tasks] for tasks in placement.tasks_of]
    send = [sum(map(len, pieces)) for pieces in outgoing]
    receive = [sum(nbytes(task, len(read[task])) for task in mine) for read in read_by]
    device = next(iter(batch.tasks.values())).images.device
    flat = torch.empty(sum(receive), dtype=torch.uint8, device=device)
    dist.all_to_all_single(
        flat,
        torch.cat([piece for pieces in outgoing for piece in pieces]),
        receive,
        send,
        group=groups._get_expert_parallel_group(f"ep_size_{size}"),
    )
    pieces = iter(flat.split([nbytes(task, len(read[task])) for read in read_by for task in mine]))
    parts: dict[str, list[list[Tensor]]] = {task: [] for task in mine}
    for read in read_by:
        for task in mine:
            parts[task].append(_from_bytes(next(pieces), len(read[task]), _tensors(batch.tasks[task])))
    owned = placement.owned(rank, samples)
    tasks = {}
    for task in mine:
        images, labels, *mix = (torch.cat(pieces) for pieces in zip(*parts[task], strict=True))
        tasks[task] = TaskBatch(images, labels, owned[task], samples[task], *mix)
    return Batch(batch.step, batch.micro_step, tasks, batch.skipped)


def _tensors(task: TaskBatch) -> list[Tensor]:
    """What travels; all ranks have the same of a task, be it without samples."""
    return [x for x in (task.images, task.labels, task.mix_labels, task.mix_weight) if x is not None]


def _to_bytes(task: TaskBatch) -> Tensor:
    return torch.cat([x.flatten().view(torch.uint8) for x in _tensors(task)])


def _from_bytes(data: Tensor, count: int, like: list[Tensor]) -> list[Tensor]:
    sizes = [count * x.shape[1:].numel() * x.element_size() for x in like]
    # A copy of each, as a view of wider numbers has to begin at a multiple of their size.
    return [
        piece.clone().view(x.dtype).view(count, *x.shape[1:]) for piece, x in zip(data.split(sizes), like, strict=True)
    ]
