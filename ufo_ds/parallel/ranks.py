"""What the ranks of a job tell each other as Python values. Alone, without a job, a process answers itself."""

from typing import Any

import torch.distributed as dist


def this() -> int:
    """This process' rank."""
    return dist.get_rank() if dist.is_initialized() else 0


def count() -> int:
    """The number of ranks."""
    return dist.get_world_size() if dist.is_initialized() else 1


def from_first(value: Any) -> Any:
    """Rank 0's value of something, on all ranks."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def from_all(value: Any) -> list[Any]:
    """Every rank's value of something, on all ranks."""
    everyone: list[Any] = [value] * count()
    if dist.is_initialized():
        dist.all_gather_object(everyone, value)
    return everyone


def wait_for_all() -> None:
    if dist.is_initialized():
        dist.barrier()
