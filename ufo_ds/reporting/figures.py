"""Every figure of a report, as plain values that JSON can hold: the page shows nothing else.

Metrics are shares in 0..1, but for thresholds; figures published elsewhere are kept as they were published, in percent.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ufo_ds.evaluation import statistics
from ufo_ds.model.architecture import Architecture
from ufo_ds.model.cost import head_cost, path_cost, supernet_parameters
from ufo_ds.reporting import details
from ufo_ds.reporting.pictures import Pictures
from ufo_ds.reporting.runs import Evaluated, Run

Values = dict[str, Any]
AllPictures = Mapping[tuple[int, str], Pictures]  # by number of the run and task/benchmark

_LISTS = 8  # rank lists, pairs or mistakes of a benchmark, over all runs
_POINTS = 200  # of a curve over steps


def published() -> dict[str, dict[str, list[dict[str, str]]]]:
    """Figures of others: benchmark -> metric -> value in percent, system and source."""
    return yaml.safe_load((Path(__file__).parent / "published.yaml").read_text())


def of_runs(runs: Sequence[Run], pictures: AllPictures) -> Values:
    """All figures of a report about runs, of which the first is its subject. A benchmark is of the protocol with which
    the first run that has it was evaluated; a run evaluated with another one has no result there."""
    keys = list(dict.fromkeys(key for run in runs for key in run.benchmarks))
    elsewhere = published()
    lists = max(3, _LISTS // len(runs))
    benchmarks = {}
    for key in keys:
        about = _about(next(run.benchmarks[key] for run in runs if key in run.benchmarks), elsewhere)
        alike = [key in r.benchmarks and r.benchmarks[key].outcomes.protocol == about["protocol"] for r in runs]
        benchmarks[key] = {
            **about,
            "runs": [
                _result(run, key, pictures[number, key], lists) if alike[number] else None
                for number, run in enumerate(runs)
            ],
            "differences": [
                _difference(runs[0], run, key) if alike[0] and its else None
                for run, its in zip(runs[1:], alike[1:], strict=True)
            ],
        }
    values = {"runs": [_run(run) for run in runs], "benchmarks": benchmarks}
    return _finite(values)


def _finite(value: Any) -> Any:
    """The same with None for what is no number, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _run(run: Run) -> Values:
    recipe, backbone = run.recipe, run.recipe.model.backbone
    return {
        "name": run.name,
        "path": str(run.path),
        "recipe": recipe.name,
        "seed": recipe.seed,
        "step": run.step,
        "steps": recipe.schedule.steps,
        "date": run.date.isoformat(timespec="seconds"),
        "backbone": {"name": backbone.name, "dim": backbone.dim, "depth": backbone.depth, "heads": backbone.heads},
        "experts": list(recipe.model.experts),
        "supernet_parameters": supernet_parameters(recipe),
        "tasks": {task.name: _task(run, task.name) for task in recipe.tasks},
        "training": _training(run),
        "routes": _routes(run),
    }


def _task(run: Run, name: str) -> Values:
    """What a task is trained on, and what its dense path and its head cost."""
    task = next(t for t in run.recipe.tasks if t.name == name)
    backbone, classes = run.recipe.model.backbone, len(run.classes.get(name, ())) or task.num_classes
    path = path_cost(backbone, Architecture.of(backbone), task.input)
    head = head_cost(task, backbone.dim, classes) if classes else None
    return {
        "input": list(task.input),
        "train": [entry.shards for entry in task.train],
        "classes": classes,
        "samples_per_step": task.samples_per_step or None,
        "parameters": path.parameters,
        "flops": path.flops,
        "head_parameters": head.parameters if head else None,
        "head_flops": head.flops if head else None,
    }


def _training(run: Run) -> Values:
    """Courses over steps, at most so many points each: losses of every task, what is shared, conflict and sampling."""
    lines = _thinned(run.records.get("train", []))
    names = [task.name for task in run.recipe.tasks]
    general = [key for key in ("loss", "learning_rate", "gradient_norm", "images_per_second") if _has(lines, key)]
    conflicts = _thinned(run.records.get("conflict", []))
    rates = run.records.get("balance", [])
    return {
        "step": [line["step"] for line in lines],
        **{key: [line.get(key) for line in lines] for key in general},
        "tasks": {
            name: {
                key.split("/", 1)[1]: [line.get(key) for line in lines]
                for key in dict.fromkeys(key for line in lines for key in line)
                if key.startswith(f"{name}/") and not key.endswith("/unreadable")
            }
            for name in names
        },
        "conflict": {
            "step": [line["step"] for line in conflicts],
            "cosine": {
                name: [line.get(f"{name}/gradient_cosine") for line in conflicts]
                for name in names if _has(conflicts, f"{name}/gradient_cosine")
            },
        },
        "rates": {
            "step": [line["step"] for line in rates],
            "tasks": {name: [line["rates"].get(name) for line in rates] for name in names} if rates else {},
        },
    }  # fmt: skip


def _routes(run: Run) -> Values:
    """Where each task goes, and the course of the probabilities of own copies where routes were learned."""
    history = _thinned(run.records.get("routes", []))
    return {
        "of_tasks": run.routes(),
        "step": [line["step"] for line in history],
        "own": {
            task.name: {
                unit: [[line["own"][task.name][unit][layer] for line in history] for layer in range(len(layers))]
                for unit, layers in history[-1]["own"].get(task.name, {}).items()
            }
            for task in run.recipe.tasks
        } if history else {},
    }  # fmt: skip


def _thinned(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if len(lines) <= _POINTS:
        return lines
    return [lines[i] for i in np.linspace(0, len(lines) - 1, _POINTS).round().astype(int)]


def _has(lines: Sequence[Mapping[str, Any]], key: str) -> bool:
    return any(key in line for line in lines)


def _about(found: Evaluated, elsewhere: Mapping[str, Any]) -> Values:
    return {
        "task": found.task.name,
        "benchmark": found.benchmark.name,
        "protocol": found.outcomes.protocol,
        "metric": found.main_metric,
        "published": {
            name: entries
            for name, entries in elsewhere.get(found.benchmark.name, {}).items()
            if name in found.outcomes.metrics()
        },
    }


def _result(run: Run, key: str, pictures: Pictures, lists: int) -> Values:
    found = run.benchmarks[key]
    scores, items = found.outcomes.scores, found.outcomes.items
    low, high = statistics.interval(scores, items)
    evaluations = run.records.get("evaluation", [])
    metrics = found.outcomes.metrics()
    names = dict(enumerate(run.classes.get(found.task.name, ())))
    if "label" in found.outcomes.arrays:
        names |= pictures.class_names(found.outcomes.arrays["label"])
    return {
        "step": found.step,
        "settings": found.outcomes.settings,
        "items": len(scores),
        "clusters": items.clusters,
        "value": float(scores @ items.weight),
        "low": low,
        "high": high,
        "metrics": metrics,
        "chance": found.outcomes.chance(),
        "course": {
            "step": [line["step"] for line in evaluations],
            "metrics": {
                name: [line.get(f"{key}/{name}") for line in evaluations]
                for name in metrics if _has(evaluations, f"{key}/{name}")
            },
        },
        "pictures_missing": pictures.missing,
        **details.of_benchmark(found.outcomes, names, lists),
    }  # fmt: skip


def _difference(subject: Run, other: Run, key: str) -> Values | None:
    """Of another run to the subject, with an interval over test items; None unless both met the same
    items."""
    mine, its = subject.benchmarks[key].outcomes, other.benchmarks[key].outcomes
    if (mine.data, len(mine.scores)) != (its.data, len(its.scores)):
        return None
    if mine.items.clusters < 2:
        return None
    found = statistics.compare(its.scores[None], mine.scores[None], mine.items)
    low, high = found.interval
    return {"value": found.value, "low": low, "high": high}
