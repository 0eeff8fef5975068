"""Learned routes as a picture: where each task shares, and how that came about."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

_SHARED, _UNSURE, _OWN = "#2b6cb0", "#f7f7f7", "#c05621"


def draw(history: list[dict[str, Any]], path: Path) -> None:
    """Above the last probability of the own copy for every task and layer, unit by unit; below its course.

    Args:
        history: what :meth:`RunDirectory.record_routes` wrote, oldest first.
        path: a PNG.
    """
    last = history[-1]["own"]
    units = list(dict.fromkeys(unit for by_unit in last.values() for unit in by_unit))
    tasks = list(last)
    colours = LinearSegmentedColormap.from_list("routes", [_SHARED, _UNSURE, _OWN])
    layers = [max(len(by_unit.get(unit, [])) for by_unit in last.values()) for unit in units]
    figure = Figure(figsize=(2.5 + 0.42 * sum(layers) + 0.6 * len(units), 2.2 + 0.42 * len(tasks) + 2.4), dpi=120)
    grid = figure.add_gridspec(
        2, len(units), height_ratios=[0.42 * len(tasks) + 0.5, 2.4], width_ratios=layers, hspace=0.45, wspace=0.12
    )
    for column, unit in enumerate(units):
        axes = figure.add_subplot(grid[0, column])
        shown = np.full((len(tasks), layers[column]), np.nan)
        for row, task in enumerate(tasks):
            for layer, own in enumerate(last[task].get(unit, [])):
                if own is not None:
                    shown[row, layer] = own
                    word = "own" if own > 0.5 else "sh."
                    colour = "white" if abs(own - 0.5) > 0.3 else "black"
                    axes.text(layer, row, word, ha="center", va="center", fontsize=7, color=colour)
        axes.imshow(shown, cmap=colours, vmin=0, vmax=1, aspect="auto")
        axes.set_title(unit, fontsize=10)
        axes.set_xticks(range(layers[column]))
        axes.set_xlabel("layer", fontsize=8)
        axes.set_yticks(range(len(tasks)), tasks if column == 0 else [""] * len(tasks))
        axes.tick_params(length=0, labelsize=8)
        for spine in axes.spines.values():
            spine.set_visible(False)
    axes = figure.add_subplot(grid[1, :])
    steps = [line["step"] for line in history]
    palette = matplotlib.colormaps["tab10" if len(tasks) <= 10 else "tab20"]
    for row, task in enumerate(tasks):
        courses = [
            [line["own"][task][unit][layer] for line in history]
            for unit in last[task] for layer, own in enumerate(last[task][unit]) if own is not None
        ]  # fmt: skip
        for number, course in enumerate(courses):
            axes.plot(steps, course, color=palette(row % palette.N), lw=0.9, alpha=0.8, label=None if number else task)
    axes.axhline(0.5, color="grey", lw=0.5)
    axes.set_ylim(0, 1)
    axes.set_ylabel("probability of the own copy", fontsize=8)
    axes.set_xlabel("step", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.legend(fontsize=7, ncols=min(len(tasks), 8), loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    figure.savefig(path, bbox_inches="tight")
