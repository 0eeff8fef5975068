"""Random streams by key: what may be computed twice, or elsewhere, is drawn the same every time.

A stream belongs to a key such as ``(seed, "augment", task, draw index)``, never to a rank, a worker or a position in
time. Sample draws are keyed by (seed, task, draw index), model draws by (seed, step, task, ...).
"""

import hashlib

import numpy as np
import torch


def _digest(key: tuple[int | str, ...]) -> int:
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little")


def numpy_generator(*key: int | str) -> np.random.Generator:
    """A generator of its own for this key."""
    return np.random.Generator(np.random.Philox(_digest(key)))


def torch_generator(*key: int | str) -> torch.Generator:
    """The same on the CPU for torch: draw there and copy, so that every device sees the same numbers."""
    return torch.Generator().manual_seed(_digest(key) >> 1)
