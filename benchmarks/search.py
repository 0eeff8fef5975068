"""Fronts of accuracy against FLOPs: what search finds beside random choice with the same number of evaluations.

python benchmarks/search.py --data architectures.json       # or GP_NAS_TRACK2; --quick: within a minute

The data are those of the performance prediction track of the CVPR 2022 NAS challenge (see benchmarks/predictor.py):
subnets of a ViT-B supernet and their ranks on eight tasks. Both arms choose among the subnets listed there, beginning
with those of most and of fewest FLOPs; to evaluate one is to look its rank up. ``hypervolume``: of what was evaluated,
over that of all listed; mean over tasks and seeds. ``ratio``: search over random choice, ``ahead``: in which share of
tasks and seeds search has more. The last line is one JSON object.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # started by its path: the repository, not this folder, is where packages are found
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
import torch

from benchmarks.predictor import load
from ufo_ds.errors import UserError
from ufo_ds.model.architecture import Architecture
from ufo_ds.model.cost import path_cost
from ufo_ds.recipe_model import Backbone
from ufo_ds.subnets import pareto, search
from ufo_ds.subnets.predictor import Choices

EVALUATIONS = (20, 40)
BACKBONE = Backbone(dim=768, depth=12, heads=12, patch_size=16)
HEADS, RATIOS = (10, 11, 12), (3.0, 3.5, 4.0)  # of every block, by levels
INPUT = (224, 224)
SEEDS = 3


class Table:
    """Listed subnets as a space of one level, the number in the list, whose first two are the largest and smallest."""

    def __init__(self, choices: Choices, labels_NT: np.ndarray):
        flops_N = np.array([flops(heads, ratios) for heads, ratios in choices.layers_NUL])
        ends = [int(flops_N.argmax()), int(flops_N.argmin())]
        order = [*ends, *np.setdiff1d(np.arange(len(choices)), ends)]
        self.choices, self.flops_N, self.accuracy_NT = choices[np.array(order)], flops_N[order], -labels_NT[order]
        self.listed_N1 = np.arange(len(order))[:, None]
        self.space = search.Space(
            np.array([len(order) - 1]),
            lambda levels_N1: levels_N1,
            lambda levels_N1: [self.choices[levels_N1[:, 0]]],
            lambda levels_N1: self.flops_N[levels_N1[:, 0], None],
            [0],
            np.array([np.inf]),
            [slice(0, 1)],
        )

    def searched(self, task: int, evaluations: int, seed: int) -> list[int]:
        """Which ones search evaluates."""
        rows: list[int] = []
        while len(rows) < evaluations:
            at = np.array(rows, dtype=int)
            known = search.Known(
                at[:, None], self.accuracy_NT[at][:, [task]], self.flops_N[at][:, None], self.accuracy_NT[0, [task]]
            )
            found = search.following(self.space, known, evaluations, seed, self.listed_N1)
            assert found is not None
            rows.append(int(found[0]))
        return rows

    def drawn(self, evaluations: int, seed: int) -> list[int]:
        others = np.random.default_rng(seed).choice(len(self.flops_N) - 2, evaluations - 2, replace=False)
        return [0, 1, *(others + 2).tolist()]

    def hypervolume(self, task: int, rows: list[int] | None = None) -> float:
        """Of some, or of all."""
        at = np.arange(len(self.flops_N)) if rows is None else np.array(rows)
        bounds_M = self.space.bounds(self.flops_N[:2, None])
        accuracy_N = self.accuracy_NT[:, task]
        return pareto.hypervolume(accuracy_N[at], self.flops_N[at, None], float(accuracy_N.min()), bounds_M)


def flops(heads_L: np.ndarray, ratios_L: np.ndarray) -> float:
    """By levels; -1 past the depth."""
    heads = tuple(HEADS[level] for level in heads_L if level >= 0)
    hidden = tuple(round(BACKBONE.dim * RATIOS[level]) for level in ratios_L if level >= 0)
    return float(path_cost(BACKBONE, Architecture(BACKBONE.dim, (), heads, hidden), INPUT).flops)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=os.environ.get("GP_NAS_TRACK2"), help="architectures and their ranks")
    parser.add_argument("--evaluations", type=int, nargs="+", default=list(EVALUATIONS), help="(default: 20 40)")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--quick", action="store_true", help="one seed, with the fewest evaluations")
    options = parser.parse_args()
    if options.data is None:
        parser.error("give --data FILE, or set GP_NAS_TRACK2")
    torch.set_num_threads(1)
    try:
        choices, labels_NT, tasks = load(options.data)
    except UserError as error:
        parser.error(str(error))
    table = Table(choices, labels_NT)
    figures: dict[str, Any] = {}
    bars: dict[str, Any] = {}
    for evaluations in options.evaluations[:1] if options.quick else options.evaluations:
        found: list[tuple[list[float], list[float]]] = []  # by task: search, random choice
        print(f"{evaluations}: {'task':<16} {'search':>7} {'random':>7}")
        for task, name in enumerate(tasks):
            whole, arms = table.hypervolume(task), ([], [])
            for seed in range(1 if options.quick else options.seeds):
                arms[0].append(table.hypervolume(task, table.searched(task, evaluations, seed)) / whole)
                arms[1].append(table.hypervolume(task, table.drawn(evaluations, seed)) / whole)
            found.append(arms)
            print(f"{'':{len(str(evaluations))}}  {name.removesuffix('_rank'):<16} "
                  f"{np.mean(arms[0]):7.3f} {np.mean(arms[1]):7.3f}", flush=True)  # fmt: skip
        searched, drawn = (np.array([arms[i] for arms in found]) for i in (0, 1))
        figures[f"hypervolume_search_{evaluations}"] = round(float(searched.mean()), 4)
        figures[f"hypervolume_random_{evaluations}"] = round(float(drawn.mean()), 4)
        figures[f"hypervolume_search_{evaluations}_lowest"] = round(float(searched.min()), 4)
        figures[f"ahead_{evaluations}"] = round(float((searched > drawn).mean()), 4)
        ratio = round(float((searched / drawn).mean()), 4)
        bars[f"ratio_{evaluations}"] = {"value": ratio, "bar": 1.0, "ok": ratio > 1.0}
    print(json.dumps({"benchmark": "search", "figures": figures, "bars": bars}))


if __name__ == "__main__":
    main()
