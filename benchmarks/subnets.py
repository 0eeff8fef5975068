"""Subnets of an elastic supernet against the same architectures trained alone, on six small public data sets.

    export OPEN_SMALL=data_shards/open_small/test      # made by: ufo shards open_small SOURCE data_shards/open_small
    python benchmarks/open_small.py --seeds 3          # the runs in which the routes were found
    python benchmarks/subnets.py --seeds 3

From each run of ``open_small`` (recipe open_small, arm "learned routes") three elastic ones go on with its weights and
routes, half as many steps again: by the sandwich rule with in-place distillation; the same with heads and channels
ordered by importance first (``ufo order``); with one random subnet of each task in a step, as published. Out of each,
subnets of three sizes are evaluated, of the same architecture for all tasks, none of which was chosen by its metrics.
Alone, a model of one task with the architecture and the recipe's schedule sees as many samples of the task as both runs
did. Runs that are finished are not repeated, and one that was killed goes on. Prints the table as Markdown, and as its
last line one JSON object.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import open_small
from open_small import REPOSITORY, SHARED, TASKS, place

from ufo_ds import checkpoint, recipe_file
from ufo_ds.model.architecture import Architecture, SearchSpace
from ufo_ds.model.cost import path_cost
from ufo_ds.model.loading import spec_of
from ufo_ds.recipe import Recipe

STEPS, CHIP_STEPS = 2000, 1000
SPACE = "depth: [2, 3, 4], dim: [96, 144, 192], stem: [0.33334, 0.66667, 1.0], heads: [2, 3, 4], mlp_ratio: [2, 3, 4]"
GOES_ON = [
    "--model.branch_at", "null", "--model.router.freeze_at", "null", "--optimizer.rules", "[]",
    "--schedule.steps", str(CHIP_STEPS),
]  # fmt: skip
ARMS = {
    "sandwich": f"{{{SPACE}}}",
    "sandwich, ordered": f"{{{SPACE}}}",
    "one random": f"{{{SPACE}, sampling: random}}",
}
LARGEST = "whole"
SIZES = {  # depth, dim, share of the stem's channels, heads, MLP ratio
    "a sixth": (4, 96, 0, 2, 2),
    "a third": (3, 144, 1, 2, 3),
    "two thirds": (4, 192, 1, 3, 3),
    LARGEST: (4, 192, 2, 4, 4),
}
METRICS = {
    "omniglot": "mAP", "vehicles": "mAP", "groceries": "mAP", "faces": "accuracy", "clothing": "top1", "digits": "top1",
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/open_small"), help="where those of open_small.py live")
    parser.add_argument("--out_runs", type=Path, default=Path("runs/subnets"), help="where the new ones go")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="trainings at a time")
    parser.add_argument("--without", action="append", default=[], help="leave out an arm, or alone")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    options = parser.parse_args()
    arms = [arm for arm in ARMS if arm not in options.without]
    jobs = [(seed, arm) for seed in range(options.seeds) for arm in arms]
    with ThreadPoolExecutor(options.jobs) as pool:
        found = dict(zip(jobs, pool.map(lambda job: elastic(options, *job), jobs), strict=True))
        if "alone" not in options.without:
            pairs = [(seed, size) for seed in range(options.seeds) for size in SIZES if size != LARGEST]
            alone_of = dict(zip(pairs, pool.map(lambda pair: alone(options, *pair), pairs), strict=True))
    figures: dict[str, dict[str, dict[str, list[float]]]] = {
        arm: {
            size: {task: [found[seed, arm][size][task] for seed in range(options.seeds)] for task in TASKS}
            for size in SIZES
        }
        for arm in arms
    }
    if "alone" not in options.without:
        figures["alone"] = {
            size: {task: [alone_of[seed, size][task] for seed in range(options.seeds)] for task in TASKS}
            for size in SIZES
            if size != LARGEST
        }
    print("\n".join(table(figures, costs())))
    result = {"benchmark": "subnets", "figures": figures, "bars": {}}
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


def architecture(space: SearchSpace, size: str) -> Architecture:
    depth, dim, stem, heads, ratio = SIZES[size]
    layers = space.depth[-1]
    once = [space.depth.index(depth), space.dim.index(dim), stem]
    return space.architecture(once, [space.heads.index(heads)] * layers, [space.mlp_ratio.index(ratio)] * layers)


def elastic(options: argparse.Namespace, seed: int, arm: str) -> dict[str, dict[str, float]]:
    """Train, and evaluate each size; the metric by size and task."""
    start = place(options.runs, "learned routes", seed)
    if arm == "sandwich, ordered":
        ordered = place(options.out_runs, "ordered", seed)
        if not ordered.exists():
            ufo("order", str(start), "--out", str(ordered))
        start = ordered
    run = place(options.out_runs, arm.replace(",", ""), seed)
    sizes = ["--model.init", str(start), "--model.elastic", ARMS[arm], "--seed", str(seed)]
    open_small.train((run, [*GOES_ON, *sizes]))
    reader = checkpoint.Reader(checkpoint.of_run(run, "last"))
    space, found = SearchSpace.of(reader.recipe.model), {}
    for size in SIZES:
        specs = []
        for task in TASKS:
            file = run / "specs" / f"{size.replace(' ', '_')}-{task}.json"
            file.parent.mkdir(exist_ok=True)
            file.write_text(spec_of(reader, task).sliced(architecture(space, size)).to_json())
            specs += ["--spec", str(file)]
        found[size] = main_metrics(json.loads(ufo("evaluate", str(run), "--last", "--json", *specs)))
    return found


def alone(options: argparse.Namespace, seed: int, size: str) -> dict[str, float]:
    """Train a model for each task; the metric by task."""
    whole, found = elastic_recipe().model, {}
    kept = architecture(SearchSpace.of(whole), size)
    backbone = dataclasses.asdict(whole.backbone) | {
        "dim": kept.dim, "depth": kept.depth, "heads": list(kept.heads), "head_dim": whole.backbone.head_width,
        "mlp_ratio": [hidden / kept.dim for hidden in kept.hidden], "stem": list(kept.stem),
    }  # fmt: skip
    for task in TASKS:
        run = place(options.out_runs, f"alone {size}", seed, task)
        sizes = ["--model.backbone", json.dumps(backbone), "--schedule.steps", str(STEPS + CHIP_STEPS)]
        open_small.train((run, [*SHARED, "--task", task, *sizes, "--seed", str(seed)]))
        found |= main_metrics(json.loads(ufo("evaluate", str(run), "--last", "--json")))
    return found


def elastic_recipe() -> Recipe:
    return recipe_file.load("open_small", [("model.elastic", f"{{{SPACE}}}")])


def main_metrics(metrics: dict[str, float]) -> dict[str, float]:
    return {task: metrics[key] for task in TASKS if (key := f"{task}/{task}/{METRICS[task]}") in metrics}


def ufo(*arguments: str) -> str:
    """What a verb prints."""
    command = [sys.executable, "-c", "import sys; from ufo_ds.cli import main; sys.exit(main())", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"ufo {' '.join(arguments)}: {done.stderr}")
    return done.stdout


def costs() -> dict[str, float]:
    """Parameters of each size over those of the whole."""
    recipe = elastic_recipe()
    space = SearchSpace.of(recipe.model)
    of_size = {
        size: path_cost(recipe.model.backbone, architecture(space, size), recipe.tasks[0].input).parameters
        for size in SIZES
    }
    return {size: count / of_size[LARGEST] for size, count in of_size.items()}


def table(figures: dict[str, dict[str, dict[str, list[float]]]], parameters: dict[str, float]) -> Iterator[str]:
    """Markdown: means over seeds; the mean of all tasks with the range of seeds."""
    yield f"| parameters | trained | {' | '.join(TASKS)} | mean (seeds) |"
    yield "|---" * (3 + len(TASKS)) + "|"
    for size in SIZES:
        for arm, of_arm in figures.items():
            if size not in of_arm:
                continue
            values = np.array([of_arm[size][task] for task in TASKS])  # [task, seed]
            means = values.mean(0)
            cells = " | ".join(f"{value:.3f}" for value in values.mean(1))
            yield (
                f"| {parameters[size]:.3f} | {arm} | {cells} | {means.mean():.3f} "
                f"({means.min():.3f} .. {means.max():.3f}) |"
            )


if __name__ == "__main__":
    main()
