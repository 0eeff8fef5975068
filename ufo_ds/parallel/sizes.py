"""What ZeRO's settings go by: sizes of the ranks' parameters, and memory."""

from collections.abc import Sequence

import torch

from ufo_ds.parallel import ranks


def sizes_of_ranks(sizes: Sequence[int]) -> tuple[bool, int]:
    """Whether all ranks have the same ``sizes`` of parameters, and the sum of the rank with most. Every rank calls
    it."""
    everyone = ranks.from_all((hash(tuple(sizes)), sum(sizes)))
    return len({key for key, _ in everyone}) == 1, max(total for _, total in everyone)


def smallest_memory() -> int | None:
    """Bytes of the smallest GPU of the job; None without GPUs. Every rank calls it."""
    if not torch.cuda.is_available():
        return None
    return min(ranks.from_all(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory))
