"""What a search has found, as a picture: a panel for each cost."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

_FRONT, _PREDICTED, _EVALUATED, _LIMIT = "#2b6cb0", "#c05621", "#9aa5b1", "#8b1a1a"
UNITS = {"parameters": (1e6, "parameters, M"), "flops": (1e9, "GFLOPs"), "latency": (1.0, "latency, ms")}


@dataclass(frozen=True)
class Points:
    """Accuracy [N], half the width of its interval [N] where it is predicted, and costs [N, M]."""

    accuracy: np.ndarray
    costs: np.ndarray
    half_width: np.ndarray | None = None


def draw(
    path: Path, names: Sequence[str], limits: dict[str, float], label: str, evaluated: Points, front: Points,
    predicted: Points,
) -> None:  # fmt: skip
    """
    Args:
        path: a PNG.
        names: of the M costs.
        label: what accuracy is.
    """
    figure = Figure(figsize=(1.2 + 5.4 * len(names), 4.6), dpi=120, layout="constrained")
    grid = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for m, (axes, name) in enumerate(zip(grid, names, strict=True)):
        scale, text = UNITS[name]
        order = np.argsort(predicted.costs[:, m])
        x = predicted.costs[order, m] / scale
        axes.errorbar(
            x, predicted.accuracy[order], yerr=None if predicted.half_width is None else predicted.half_width[order],
            fmt=".", ms=3, lw=0.7, color=_PREDICTED, alpha=0.45, label="front as predicted, 90% intervals", zorder=1,
        )  # fmt: skip
        axes.scatter(
            evaluated.costs[:, m] / scale, evaluated.accuracy, s=26, facecolor="none", edgecolor=_EVALUATED,
            label="evaluated", zorder=2,
        )  # fmt: skip
        order = np.argsort(front.costs[:, m])
        x, y = front.costs[order, m] / scale, front.accuracy[order]
        if len(names) == 1:  # of several costs the front is a surface
            axes.step(x, y, where="post", lw=1.2, color=_FRONT, zorder=3)
        axes.scatter(x, y, s=30, color=_FRONT, label="front, evaluated", zorder=4)
        if limits.get(name, np.inf) <= 1.2 * evaluated.costs[:, m].max():  # in sight
            axes.axvline(limits[name] / scale, color=_LIMIT, ls="--", lw=1, label="limit")
        axes.set_xlabel(text)
        axes.grid(alpha=0.25, lw=0.5)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    grid[0].set_ylabel(label)
    low, high = (end([*evaluated.accuracy, *front.accuracy]) for end in (min, max))
    room = 0.12 * (high - low) or 0.01
    grid[0].set_ylim(low - room, high + room)  # intervals may go far beyond
    entries = {label: handle for axes in grid for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(
        entries.values(), entries.keys(), loc="outside upper center", ncols=2 * len(names) + 2, frameon=False,
        fontsize=8,
    )  # fmt: skip
    figure.savefig(path)
