"""What a run directory says of its run, for a report: the recipe, what was recorded in training, and of every benchmark
what its last evaluation found."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from ufo_ds import checkpoint, recipe_file
from ufo_ds.errors import UserError
from ufo_ds.evaluation import outcomes
from ufo_ds.evaluation.outcomes import Outcomes
from ufo_ds.model.spec import UNITS, routes_of
from ufo_ds.recipe import Recipe
from ufo_ds.recipe_benchmark import Benchmark
from ufo_ds.recipe_task import Task


@dataclass
class Evaluated:
    """One benchmark of a run, at the last step at which it was evaluated."""

    task: Task
    benchmark: Benchmark
    step: int
    date: datetime
    outcomes: Outcomes

    @property
    def main_metric(self) -> str:
        return self.outcomes.main_metric


@dataclass
class Run:
    """
    Attributes:
        benchmarks: by task/benchmark, in the order of the recipe; those that were evaluated.
        records: the lines of metrics.jsonl by their kind, oldest first.
        classes: per task the names behind its head's rows; none without a checkpoint.
    """

    path: Path
    recipe: Recipe
    benchmarks: dict[str, Evaluated]
    records: dict[str, list[dict[str, Any]]]
    classes: dict[str, list[str]]

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def step(self) -> int:
        return max(found.step for found in self.benchmarks.values())

    @property
    def date(self) -> datetime:
        """Of the last evaluation."""
        return max(found.date for found in self.benchmarks.values())

    def routes(self) -> dict[str, dict[str, list[str]]]:
        """Each task's route per unit and layer: shared, own, or learned where none was recorded yet.

        A learned route ends as its more probable branch, and the probabilities were last recorded as it froze.
        """
        history = self.records.get("routes")
        own = history[-1]["own"] if history else {}
        found: dict[str, dict[str, list[str]]] = {}
        for task in self.recipe.tasks:
            routes = routes_of(self.recipe, task.name)
            found[task.name] = {unit: list(routes[unit]) for unit in UNITS}
            for unit, layers in own.get(task.name, {}).items():
                for layer, probability in enumerate(layers):
                    if probability is not None:
                        found[task.name][unit][layer] = "own" if probability > 0.5 else "shared"
        return found


def read(path: Path) -> Run:
    """Read a run directory; it may lack checkpoints.

    Raises:
        UserError: it is no run directory, none of its benchmarks was evaluated, or a file of it is damaged.
    """
    if not (path / "recipe.yaml").is_file():
        raise UserError(f"{path} is no run directory (it has no recipe.yaml): give one that was trained")
    recipe = recipe_file.load(str(path / "recipe.yaml"))
    benchmarks = dict(_evaluated(path, recipe))
    if not benchmarks:
        raise UserError(
            f"{path}: no evaluation of its benchmarks is kept there: finish its training, or `ufo evaluate {path}`"
        )
    return Run(path, recipe, benchmarks, _records(path / "metrics.jsonl"), _classes(path))


def _evaluated(path: Path, recipe: Recipe) -> Iterator[tuple[str, Evaluated]]:
    steps = sorted(
        (int(p.name.removeprefix("step-")) for p in (path / "evaluations").glob("step-*[0-9]")), reverse=True
    )
    for task in recipe.tasks:
        for benchmark in task.benchmarks:
            key = f"{task.name}/{benchmark.name}"
            for step in steps:
                file = outcomes.path_of(path, step, key)
                if file.is_file():
                    date = datetime.fromtimestamp(file.stat().st_mtime).astimezone()
                    yield key, Evaluated(task, benchmark, step, date, outcomes.load(path, step, key))
                    break


def _records(path: Path) -> dict[str, list[dict[str, Any]]]:
    records: dict[str, list[dict[str, Any]]] = {}
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            values = json.loads(line)
            records.setdefault(values["kind"], []).append(values)
        except (ValueError, KeyError):
            continue  # cut short by a kill
    return records


def _classes(path: Path) -> dict[str, list[str]]:
    if not checkpoint.find(path / "checkpoints"):
        return {}
    best = checkpoint.of_run(path)  # which has the tasks that were added later
    try:
        return json.loads((best / checkpoint.INDEX).read_text())["classes"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{best} is no checkpoint: {error}") from None
