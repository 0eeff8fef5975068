"""A task added to a model that was trained without it, on little data and on all, by each choice of what is trained.

    export OPEN_SMALL=data_shards/open_small/test      # made by: ufo shards open_small SOURCE data_shards/open_small
    python benchmarks/extend.py --task clothing --seeds 0 1 2

For each seed the recipe ``open_small`` is trained on one path for all, without the task. To a copy of what comes out
``ufo extend`` adds the task, training its head alone or with other parts, on 10% of the training data and on all of it:
of classes that part of the images, of identities that part of them. Beside these: everything own and trained from
random values, on the same data for as many steps; and a probe without training, logistic regression on the frozen
features of the shared path, or for retrieval these features themselves. After each, ``ufo verify untouched`` compares
the other tasks with the run it started from. What is finished is not repeated. Prints the table as Markdown, and as its
last line one JSON object.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import open_small
import torch
from open_small import SHARED, TASKS
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from subnets import METRICS, ufo

from ufo_ds import checkpoint, recipe_file
from ufo_ds.data.fraction import fraction_of
from ufo_ds.data.source import TrainSource, open_sets
from ufo_ds.evaluation import benchmarks, outcomes
from ufo_ds.evaluation.features import open_images
from ufo_ds.recipe import only
from ufo_ds.subnets.task_model import open_model
from ufo_ds.training.new_task import fitted

FRACTIONS = (0.1, 1.0)
SCRATCH, PROBE = "from scratch", "probe"
# With what rates the most was learned on .../val: small parts at 3e-3, many parameters at 1e-3.
ARMS: dict[str, list[str]] = {
    "head": ["--train", "head", "--lr", "3e-3"],
    "norms": ["--train", "norms", "--lr", "3e-3"],
    "last block": ["--train", "last", "--lr", "3e-3"],
    "own FFNs": ["--train", "ffn", "--lr", "3e-3"],
    "own stem, norms": ["--train", "embed", "norms", "--lr", "3e-3"],
    "own stem, norms, FFNs": ["--train", "embed", "norms", "ffn", "--lr", "1e-3"],
    SCRATCH: ["--from_scratch", "--lr", "1e-3"],
}
SETTINGS = ["--steps", "400", "--batch_size", "32"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="clothing", choices=TASKS, help="the one that is left out, then added")
    parser.add_argument("--runs", type=Path, default=Path("runs/without"), help="where those without a task live")
    parser.add_argument("--out_runs", type=Path, default=Path("runs/extended"), help="where what is added goes")
    parser.add_argument("--joint_runs", type=Path, help="of open_small.py, for a row of the task trained with all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="which (default: 0 1 2)")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="trainings at a time")
    parser.add_argument("--quick", action="store_true", help="a few steps of two arms, without bars")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    options = parser.parse_args()
    seeds, arms = options.seeds, [*ARMS, PROBE]
    if options.quick:
        seeds, arms, options.runs = [0], ["head", "norms", PROBE], options.runs / "quick"
        options.out_runs /= "quick"
    with ThreadPoolExecutor(options.jobs) as pool:
        starts = dict(zip(seeds, pool.map(lambda seed: start(options, seed), seeds), strict=True))
        jobs = [(seed, fraction, arm) for seed in seeds for fraction in FRACTIONS for arm in arms if arm != PROBE]
        measured = pool.map(lambda job: extended(options, starts[job[0]], *job), jobs)
        found = {}
        for done, (job, result) in enumerate(zip(jobs, measured, strict=True), start=1):
            found[job] = result
            print(f"[{done}/{len(jobs)}] {job}: {result['metric']:.4f}", flush=True)
    for seed in seeds:  # after the heads, out of which they take the features
        for fraction in FRACTIONS:
            found[seed, fraction, PROBE] = probe(options, seed, fraction)
    figures: dict[str, Any] = {
        arm: {
            "updated": found[seeds[0], FRACTIONS[0], arm]["updated"],
            **{f"{f:g}": [found[seed, f, arm]["metric"] for seed in seeds] for f in FRACTIONS},
        }
        for arm in arms
    }
    figures |= joint(options, seeds)
    print("\n".join(table(figures)))
    untouched = sum(not result.get("untouched", True) for result in found.values())
    bars = {"changed_tasks": {"value": untouched, "bar": 0, "ok": not untouched}}
    result = {"benchmark": "extend", "task": options.task, "figures": figures, "bars": bars}
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


def start(options: argparse.Namespace, seed: int) -> Path:
    """The run without the task, trained if it is not there; its best checkpoint."""
    run = options.runs / f"{options.task}-{seed}"
    short = ["--schedule.steps", "6", "--schedule.warmup_steps", "2"] if options.quick else []
    others = [word for task in TASKS if task != options.task for word in ("--task", task)]
    if not (run / "evaluations").is_dir() or options.quick:  # finished, or not begun
        open_small.train((run, [*SHARED, *others, "--seed", str(seed), *short]))
    return checkpoint.of_run(run)


def place(options: argparse.Namespace, seed: int, fraction: float, arm: str) -> Path:
    name = "-".join([options.task, arm.replace(" ", "_"), f"{fraction:g}", str(seed)])
    return options.out_runs / name


def extended(options: argparse.Namespace, begun: Path, seed: int, fraction: float, arm: str) -> dict[str, Any]:
    """Metric, parameters that were trained, and whether the other tasks are the same."""
    run = place(options, seed, fraction, arm)
    result = run / "result.json"
    if not result.is_file():
        shutil.rmtree(run, ignore_errors=True)
        copy = run / "checkpoints" / begun.name
        shutil.copytree(begun, copy, copy_function=_link)
        settings = ["--steps", "4", "--batch_size", "8"] if options.quick else SETTINGS
        said = json.loads(ufo(
            "extend", str(run), "--recipe", "open_small", "--task", options.task, "--fraction", str(fraction),
            "--seed", str(seed), "--device", "cpu", "--json", *settings, *ARMS[arm],
        ).splitlines()[-1])  # fmt: skip
        proof = json.loads(ufo("verify", "untouched", str(run), str(begun), "--json"))
        key = f"{options.task}/{options.task}/{METRICS[options.task]}"
        values = {
            "metric": said["metrics"][key], "untouched": proof["ok"], "tensors": proof["tensors"],
            **{name: said[name] for name in ("updated", "parameters", "images")},
        }  # fmt: skip
        checkpoint.write_text(result, json.dumps(values) + "\n")
    return json.loads(result.read_text())


def _link(source: str, target: str) -> None:
    """Files of a checkpoint never change, so a copy need not take room; the index is replaced."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def probe(options: argparse.Namespace, seed: int, fraction: float) -> dict[str, Any]:
    """The same of frozen features of the shared path, which the path of the head alone is."""
    model = open_model(place(options, seed, fraction, "head"), options.task)
    recipe = only(recipe_file.load("open_small"), [options.task])
    task, features = recipe.tasks[0], {}
    images = open_images(recipe)[task.name]

    def features_of(pixels_N: Any) -> np.ndarray:
        found = []
        for start in range(0, len(pixels_N), 64):
            with torch.no_grad():
                found.append(model.network.feature(torch.from_numpy(np.stack(pixels_N[start : start + 64]))).numpy())
        return np.concatenate(found)

    features = features_of([images.load(i) for i in range(len(images))])
    predictions: dict[str, dict[Any, np.ndarray]] = {task.name: {"embedding": features}}
    classes: list[str] = []
    updated = 0
    if task.head.type == "linear":
        sets = fraction_of(open_sets(task), task, fraction, seed)
        source = TrainSource(fitted(task, sets, None), seed, sets)
        train, classes = features_of([source.pixels(i) for i in range(len(source))]), source.classes
        classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)).fit(train, source.labels)
        predictions[task.name] = {"logits": classifier.decision_function(features).astype(np.float32)}
        updated = features.shape[1] * len(classes) + len(classes)
    found = outcomes.flatten(
        benchmarks.score(recipe, {task.name: images}, predictions, {task.name: classes})
    )  # fmt: skip
    return {"metric": found[f"{task.name}/{task.name}/{METRICS[task.name]}"], "updated": updated}


def joint(options: argparse.Namespace, seeds: list[int]) -> dict[str, Any]:
    """Rows of the task trained together with all others, on all its data."""
    if options.joint_runs is None:
        return {}
    key, values = f"{options.task}/{options.task}/{METRICS[options.task]}", []
    for seed in seeds:
        reader = checkpoint.Reader(checkpoint.of_run(open_small.place(options.joint_runs, "all shared", seed), "last"))
        values.append(reader.index.metrics[key])
    return {"in the joint training": {"updated": None, "1": values}}


def table(figures: dict[str, Any]) -> Iterator[str]:
    """Markdown: means over seeds, and their range."""
    yield "| trained | parameters updated | 10% of the data | all of it |"
    yield "|---|---|---|---|"
    for arm, of_arm in figures.items():
        cells = ["" if of_arm["updated"] is None else f"{of_arm['updated']:,}"]
        for fraction in FRACTIONS:
            values = of_arm.get(f"{fraction:g}")
            cells.append("" if values is None else f"{np.mean(values):.3f} ({min(values):.3f} .. {max(values):.3f})")
        yield f"| {arm} | {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())
