"""What `ufo search` finds in a trained elastic run beside random choice with the same number of evaluations.

    python benchmarks/search_run.py RUN [--task T ...] [--evaluations 24] [--seeds 3]

Both arms begin with the whole and the smallest subnet of a task and evaluate every other truly, on the task's first
benchmark; random choice draws each size uniformly. A front of metric against parameters is worth its hypervolume, from
the smallest metric that either arm has seen to the parameters of the whole; ``share``: of that of all subnets that the
arms of all seeds have evaluated, mean over tasks and seeds. The last line is one JSON object.
"""

import argparse
import contextlib
import dataclasses
import io
import itertools
import json
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":  # started by its path: the repository, not this folder, is where packages are found
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
import torch

from ufo_ds import checkpoint, search
from ufo_ds.evaluation.features import open_images
from ufo_ds.model.architecture import SearchSpace
from ufo_ds.model.cost import subnet_cost
from ufo_ds.model.loading import spec_of
from ufo_ds.model.spec import SubnetSpec
from ufo_ds.recipe import Recipe, only
from ufo_ds.subnets import pareto

Points = np.ndarray  # [N, 2]: metric and parameters


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--task", action="append", help="(default: all)")
    parser.add_argument("--evaluations", type=int, default=24)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    reader = checkpoint.Reader(checkpoint.of_run(options.run))
    shares: dict[str, np.ndarray] = {}
    for task in options.task or [task.name for task in reader.recipe.tasks]:
        whole = spec_of(reader, task)
        evaluate = evaluator(reader, options.run, task)
        arms = [
            (searched(options.run, task, options.evaluations, seed), drawn(whole, evaluate, options.evaluations, seed))
            for seed in range(options.seeds)
        ]
        everything = np.concatenate([points for of_seed in arms for points in of_seed])
        floor, bounds = float(everything[:, 0].min()), everything[:1, 1]
        all_of_them = pareto.hypervolume(everything[:, 0], everything[:, 1:], floor, bounds)
        shares[task] = np.array(
            [[pareto.hypervolume(p[:, 0], p[:, 1:], floor, bounds) / all_of_them for p in of_seed] for of_seed in arms]
        )
        print(f"{task:<12} search {shares[task][:, 0].mean():.3f}  random {shares[task][:, 1].mean():.3f}", flush=True)
    every = np.concatenate(list(shares.values()))
    ratio = float((every[:, 0] / every[:, 1]).mean())
    figures = {"share_search": every[:, 0].mean(), "share_random": every[:, 1].mean(),
               "ahead": (every[:, 0] > every[:, 1]).mean(), "evaluations": options.evaluations}  # fmt: skip
    result = {
        "benchmark": "search_run",
        "figures": {name: round(float(value), 4) for name, value in figures.items()},
        "bars": {"ratio": {"value": round(ratio, 4), "bar": 1.0, "ok": ratio > 1.0}},
    }
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


def evaluator(reader: checkpoint.Reader, run: Path, task: str) -> search.Evaluator:
    recipe: Recipe = only(reader.recipe, [task])
    first = dataclasses.replace(recipe.tasks[0], benchmarks=recipe.tasks[0].benchmarks[:1])
    recipe = dataclasses.replace(recipe, tasks=[first])
    return search.Evaluator(reader, run, recipe, open_images(recipe), None, "cpu")


def searched(run: Path, task: str, evaluations: int, seed: int) -> Points:
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "search"
        words = ["--task", task, "--out", str(out), "--evaluations", str(evaluations), "--seed", str(seed), "--json"]
        with contextlib.redirect_stdout(io.StringIO()):
            search.main([str(run), *words])
        records = [json.loads(line) for line in (out / "evaluations.jsonl").read_text().splitlines()]
    return np.array([
        [record["subnets"][0]["metrics"][record["subnets"][0]["metric"]], record["costs"]["parameters"]]
        for record in records
    ])  # fmt: skip


def drawn(whole: SubnetSpec, evaluate: search.Evaluator, evaluations: int, seed: int) -> Points:
    space, recipe, classes = SearchSpace.of(evaluate.recipe.model), evaluate.recipe, evaluate.reader.index.classes
    others = (whole.sliced(space.draw(seed, "random choice", i)) for i in itertools.count())
    chosen: dict[str, SubnetSpec] = {}  # no one twice
    for spec in itertools.chain([whole, whole.sliced(space.smallest)], others):
        chosen[spec.name] = spec
        if len(chosen) == evaluations:
            break
    costs = [subnet_cost(recipe, spec, len(classes[spec.task])).parameters for spec in chosen.values()]
    return np.array([[evaluate(spec).value, cost] for spec, cost in zip(chosen.values(), costs, strict=True)])


if __name__ == "__main__":
    main()
