"""Random streams by key: what may be computed twice, or elsewhere, is drawn the same every time.

A stream belongs to a key such as ``(seed, "augment", task, draw index)``, never to a rank, a worker or a position in
time. Sample draws are keyed by (seed, task, draw index), model draws by (seed, step, task, ...).
"""

import hashlib
import math

import numpy as np
import torch
from torch import Tensor

STEP = 8  # numbers of 32 bits that Philox makes at once
CHUNK = 2**20  # elements whose temporaries fit into a cache


def _digest(key: tuple[int | str, ...]) -> int:
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little")


def numpy_generator(*key: int | str) -> np.random.Generator:
    """A generator of its own for this key."""
    return np.random.Generator(np.random.Philox(_digest(key)))


def torch_generator(*key: int | str) -> torch.Generator:
    """The same on the CPU for torch: draw there and copy, so that every device sees the same numbers."""
    return torch.Generator().manual_seed(_digest(key) >> 1)


def uniform_elements(span: range, *key: int | str) -> Tensor:
    """Elements of the key's endless sequence of numbers, uniform in -1 .. 1, whatever others are asked for; fp32."""
    return torch.from_numpy(_words(span, key).view(np.int32)).float().mul_(2.0**-31)


def normal_elements(span: range, *key: int | str) -> Tensor:
    """The same, standard normal (Box and Muller, 1958: each two uniform numbers make two)."""
    values = torch.empty(len(span))
    first = span.start // 2 * 2
    for start in range(first, span.stop, CHUNK):
        stop = min(start + CHUNK, -(-span.stop // 2) * 2)
        # In double precision the last bit, which may depend on an element's place among the others, is rounded away.
        pairs = (_words(range(start, stop), key).astype(np.float64).reshape(-1, 2) + 1.0) * 2.0**-32  # 0 < x <= 1
        radius, angle = np.sqrt(-2.0 * np.log(pairs[:, 0])), 2.0 * math.pi * pairs[:, 1]
        drawn = torch.from_numpy(np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1)).flatten()
        wanted = range(max(start, span.start), min(stop, span.stop))
        values[wanted.start - span.start : wanted.stop - span.start] = drawn[wanted.start - start : wanted.stop - start]
    return values


def _words(span: range, key: tuple[int | str, ...]) -> np.ndarray:
    """Numbers ``span`` of 32 bits of the key's sequence; Philox counts (Salmon et al., 2011), so none before them are
    made."""
    steps = span.start // STEP
    generator = np.random.Philox(_digest(key))
    generator.advance(steps)
    words = generator.random_raw(-(-span.stop // STEP) * STEP // 2 - steps * STEP // 2).astype("<u8", copy=False)
    return words.view("<u4")[span.start - steps * STEP : span.stop - steps * STEP]
