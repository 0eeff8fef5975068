"""``exchange: input``: samples read anywhere in an expert-parallel group move once, as uint8, to their owners."""

import torch
import torch.distributed as dist
from deepspeed.utils import groups
from torch import Tensor

from ufo_ds.data.mixing import Batch, TaskBatch
from ufo_ds.parallel.placement import Placement


def exchange_samples(batch: Batch, placement: Placement, rank: int, samples: dict[str, int]) -> Batch:
    """Turn a batch read by :meth:`Placement.read_evenly` into the one :meth:`Placement.owned` would have read.

    One all-to-all of bytes: images, then labels, task by task. All sizes follow from the placement.
    """
    size, mine = placement.ep_size, placement.tasks_of[placement.ep_rank(rank)]
    first = placement.replica(rank) * size
    read_by = [placement.read_evenly(first + e, samples) for e in range(size)]
    pixels = {name: task.images.shape[1:] for name, task in batch.tasks.items()}

    def nbytes(task: str, images: int) -> int:
        return images * (pixels[task].numel() + 8)

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
    parts: dict[str, list[tuple[Tensor, Tensor]]] = {task: [] for task in mine}
    for read in read_by:
        for task in mine:
            parts[task].append(_from_bytes(next(pieces), len(read[task]), pixels[task]))
    owned = placement.owned(rank, samples)
    tasks = {
        task: TaskBatch(
            images=torch.cat([images for images, _ in parts[task]]),
            labels=torch.cat([labels for _, labels in parts[task]]),
            positions=owned[task],
            global_count=samples[task],
        )
        for task in mine
    }
    return Batch(batch.step, batch.micro_step, tasks, batch.skipped)


def _to_bytes(task: TaskBatch) -> Tensor:
    return torch.cat([task.images.flatten(), task.labels.view(torch.uint8)])


def _from_bytes(data: Tensor, count: int, shape: torch.Size) -> tuple[Tensor, Tensor]:
    images, labels = data.split([count * shape.numel(), count * 8])
    return images.view(count, *shape), labels.clone().view(torch.int64)
