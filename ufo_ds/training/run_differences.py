"""What sets two runs of one recipe apart: losses, all numbers of their last checkpoints, and the samples they saw."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ufo_ds import checkpoint
from ufo_ds.checkpoint import AVERAGE, Reader

SEEN = "seen.json"  # of a run directory: {"samples": [[step, ...], ...], "losses": [by task and name, of every step]}


def differences(one: Path, other: Path, start: int, end: int) -> dict[str, Any]:
    """Compare the runs of two directories from step ``start``, from which on both were trained, to step ``end``.

    Returns:
        ``differences``: the largest by kind: of weights, their averages and the heads' running statistics as they are
        (of elements above 1 relative to the largest of their tensor), of losses too (above 1 relative), of every kind
        of optimizer state relative to the largest element of all. What is not finite differs by the largest float.
        ``at``: where each is. ``same_samples``, ``same_routes`` (and what the router remembers): whether they are.
    """
    found = _Largest()
    seen, of_other = (json.loads((run / SEEN).read_text()) for run in (one, other))
    a, b = (Reader(run / "checkpoints" / checkpoint.name_of(end)) for run in (one, other))
    for step in range(start - end, 0):
        for task, losses in seen["losses"][step].items():
            for name, value in losses.items():
                wanted, loss = torch.tensor([value, of_other["losses"][step][task][name]], dtype=torch.float64)
                found.note("loss", f"step {end + step + 1}: {task}/{name}", wanted, loss)
    state: dict[str, float] = {}  # largest element by kind
    for name, parameter in a.index.parameters.items():
        for kind in parameter.kinds:
            x, y = (reader.read(name, kind, 0, math.prod(parameter.shape)) for reader in (a, b))
            if kind in ("weight", AVERAGE):
                found.note(kind, name, x, y)
            else:
                state[kind] = max(state.get(kind, 0.0), x.abs().max().item())
                found.note(kind, name, x, y, scale=1.0)
    for kind, largest in state.items():
        found.value[kind] /= largest or 1.0
    for name in a.index.buffers:
        found.note("buffer", name, a.stored_buffer(name), b.stored_buffer(name))
    samples, of_other = (sorted(s for s in run["samples"] if s[0] >= start) for run in (seen, of_other))
    return {
        "differences": found.value,
        "at": found.at,
        "same_samples": bool(samples) and samples == of_other,
        "same_routes": (a.index.routes, a.index.router) == (b.index.routes, b.index.router),
    }


class _Largest:
    """The largest difference of each kind, and where it is."""

    def __init__(self) -> None:
        self.value: dict[str, float] = {}
        self.at: dict[str, str] = {}

    def note(self, kind: str, name: str, x: Tensor, y: Tensor, scale: float | None = None) -> None:
        scale = scale or max(1.0, x.abs().max().item())
        difference = ((x - y).abs().max() / scale).item()
        if not math.isfinite(difference):
            difference = sys.float_info.max  # JSON has no infinity
        if difference >= self.value.get(kind, 0.0):
            self.value[kind], self.at[kind] = difference, name
