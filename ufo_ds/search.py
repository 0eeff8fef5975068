"""Find the subnets of an elastic model that are best for what they cost: the front of accuracy against costs.

ufo search runs/elastic --task person --out person-front --limit parameters=4e6
ufo search runs/elastic --task person --out person-phone --profile phone.json --limit latency=3.5
ufo search runs/elastic --task person --task flowers --out both-front --limit parameters=8e6    # over shared copies
ufo search runs/elastic --task person --out person-front --recipe val.yaml    # chosen on other images than are reported
ufo extract runs/elastic --task person --spec person-front/front/NAME.json --out person-small

Subnets are truly evaluated, each by the main metric of a benchmark, so many as --evaluations says; which ones, a
Gaussian process and NSGA-II choose. What is found best on a benchmark is best there partly by luck: take the images of
--recipe from a part of the training set that was held out, and report on others.

Of several tasks a candidate is a subnet of each. Their accuracy is the mean of their metrics, each relative to that of
the task's whole path; parameters of copies that they share count once, FLOPs and latency add up.

After an interruption the same command goes on where it stopped, and ends as it would have. DIR has front.json,
front.png, front/NAME.json for `ufo extract --spec`, and evaluations.jsonl.
"""

import argparse
import dataclasses
import math
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ufo_ds import checkpoint
from ufo_ds.devices import check_device
from ufo_ds.errors import ArgumentParser, UserError
from ufo_ds.evaluation import benchmarks
from ufo_ds.evaluation.features import FeatureFiles, TaskImages, open_images, predict
from ufo_ds.evaluation.selection import select
from ufo_ds.model.architecture import SearchSpace
from ufo_ds.model.loading import spec_of
from ufo_ds.model.spec import SubnetSpec
from ufo_ds.progress import Progress
from ufo_ds.recipe import Recipe, only
from ufo_ds.subnets import search
from ufo_ds.subnets.latency import Profile
from ufo_ds.subnets.search_journal import Evaluated, Journal, Record
from ufo_ds.subnets.search_report import report
from ufo_ds.subnets.search_space import COSTS, ElasticSpace, check_limits

FEWEST = 4
LOW_IS_BETTER = ("eer", "threshold")  # metrics that are no aim, as those that end in _std


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(
        prog="ufo search", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="a run directory (its best checkpoint), or one checkpoint")
    parser.add_argument("--task", required=True, action="append", help="may be given several times: searched together")
    parser.add_argument("--out", type=Path, required=True, help="directory to make, or to go on in")
    parser.add_argument(
        "--limit", action="append", default=[], metavar="COST=VALUE",
        help=f"what subnets may cost at most, of all tasks together: {', '.join(COSTS)} (of one image; ms)",
    )  # fmt: skip
    parser.add_argument(
        "--costs", help="costs that the front is of, with commas (default: those of the limits, else parameters)"
    )
    parser.add_argument(
        "--profile", type=Path, action="append", default=[],
        help="of `ufo latency`, for latency (several times where tasks have inputs of different sizes)",
    )  # fmt: skip
    parser.add_argument("--evaluations", type=int, default=40, help="of subnets of each task (default 40)")
    parser.add_argument("--recipe", help="take the benchmarks from this recipe (tasks go by their names)")
    parser.add_argument("--benchmark", action="append", help="of each task (default: its first)")
    parser.add_argument("--metric", help="of the benchmarks (default: the main one of their protocol)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", action="store_true", help="print front.json")
    options = parser.parse_args(argv)
    limits = parse_limits(options.limit)
    objectives = parse_costs(options.costs, limits)
    if "latency" in {*limits, *objectives} and not options.profile:
        raise UserError("latency needs --profile: measure one with `ufo latency`")
    if options.evaluations < FEWEST:
        raise UserError(f"--evaluations {options.evaluations}: give {FEWEST} or more")
    profiles = [Profile.load(path) for path in options.profile]
    reader = checkpoint.Reader(checkpoint.of_run(options.run))
    recipe = _evaluated(reader.recipe, options)
    tasks = [task.name for task in recipe.tasks]
    space = _space(reader, tasks, options.run, profiles)
    check_limits(space, limits)
    images = open_images(recipe)
    benchmarks.check(recipe, images, reader.index.classes)
    arguments = {
        "checkpoint": {"step": reader.index.step, "sha256": reader.index.sha256},
        "benchmarks": {task.name: dataclasses.asdict(task.benchmarks[0]) for task in recipe.tasks},
        "metric": options.metric,
        "limits": limits,
        "costs": objectives,
        "profiles": [profile.values() for profile in profiles],
        "evaluations": options.evaluations,
        "seed": options.seed,
    }
    journal = Journal(options.out, arguments)
    try:
        known(space, journal.records)
    except (ValueError, KeyError) as error:
        raise UserError(f"--out {options.out} holds other subnets: {error}: choose another directory") from None
    evaluator = Evaluator(reader, options.run, recipe, images, options.metric, options.device)
    searched = space.searched(objectives, limits)
    found = _evaluate_all(space, searched, evaluator, journal, options.evaluations, options.seed)
    report(options.run, options.out, space, searched, found, journal.records, limits, options.seed, options.json)


def parse_limits(words: list[str]) -> dict[str, float]:
    """``COST=VALUE`` of the command line.

    Raises:
        UserError: no such cost, one that is there twice, or no positive number.
    """
    limits: dict[str, float] = {}
    for word in words:
        name, _, text = word.partition("=")
        if name not in COSTS:
            raise UserError(f"--limit {word}: give COST=VALUE with one of {', '.join(COSTS)}")
        if name in limits:
            raise UserError(f"--limit {word} is one more of {name}: give one")
        try:
            limits[name] = float(text)
        except ValueError:
            limits[name] = math.nan
        if not 0 < limits[name] < math.inf:
            raise UserError(f"--limit {word}: {text!r} is no positive number")
    return limits


def parse_costs(text: str | None, limits: Mapping[str, float]) -> list[str]:
    """What the front is of.

    Raises:
        UserError: no such cost.
    """
    if text is None:
        return [name for name in COSTS if name in limits] or ["parameters"]
    names = list(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in COSTS:
            raise UserError(f"--costs {text}: {name!r} is none of {', '.join(COSTS)}")
    return names


def _evaluated(trained: Recipe, options: argparse.Namespace) -> Recipe:
    """The tasks that are searched, each with the one benchmark by which.

    Raises:
        UserError: a task or benchmark that is not there, or two benchmarks of one task.
    """
    only(trained, options.task)  # before the tasks of another recipe are looked at
    recipe = select(trained, options.run, options.recipe, options.task, options.benchmark)
    tasks = []
    for task in recipe.tasks:
        if not task.benchmarks:
            raise UserError(f"{options.run}: task {task.name} has no benchmarks among those asked for: give one of its")
        if options.benchmark and len(task.benchmarks) > 1:
            names = ", ".join(benchmark.name for benchmark in task.benchmarks)
            raise UserError(f"--benchmark {names} are both of task {task.name}: give one for each task")
        tasks.append(dataclasses.replace(task, benchmarks=task.benchmarks[:1]))
    return dataclasses.replace(recipe, tasks=tasks)


def _space(reader: checkpoint.Reader, tasks: list[str], run: Path, profiles: list[Profile]) -> ElasticSpace:
    """
    Raises:
        UserError: the model has no elastic sizes, or a profile is of another one, or of another target than the first.
    """
    recipe = reader.recipe
    try:
        SearchSpace.of(recipe.model)
    except UserError as error:
        raise UserError(f"{run}: {error}") from None
    for profile in profiles[1:]:
        if profile.target != profiles[0].target:
            raise UserError(
                f"--profile {profiles[0].source} is of {profiles[0].target}, {profile.source} of {profile.target}: "
                "their times do not add up: measure both alike"
            )
    latency = []
    for task in only(recipe, tasks).tasks if profiles else []:
        profile = next((p for p in profiles if p.input == task.input), profiles[0])
        profile.check(recipe, task.name)
        latency.append(profile.predict)
    classes = {task: len(reader.index.classes[task]) for task in tasks}
    return ElasticSpace(recipe, [spec_of(reader, task) for task in tasks], classes, latency)


class Evaluator:
    """Runs a subnet's benchmark."""

    def __init__(
        self, reader: checkpoint.Reader, run: Path, recipe: Recipe, images: dict[str, TaskImages], metric: str | None,
        device: str,
    ):  # fmt: skip
        from ufo_ds.subnets import recalibration, task_model  # transformers takes seconds to import

        check_device(device)
        self._models, self._recalibration = task_model, recalibration
        self.reader, self.run, self.recipe, self.images, self.metric = reader, run, recipe, images, metric
        self.device = device
        self._pixels: dict[str, torch.Tensor] = {}

    def __call__(self, spec: SubnetSpec) -> Evaluated:
        """
        Raises:
            UserError: weights or images that are missing or damaged, or no such metric.
        """
        if spec.task not in self._pixels and self._recalibration.is_needed(self.reader, spec):
            self._pixels[spec.task] = self._recalibration.training_pixels(self.reader.recipe, spec.task)
        model = self._models.task_model(self.reader, self.run, spec, self.device, self._pixels.get(spec.task))
        mine, recipe = self.images[spec.task], only(self.recipe, [spec.task])
        with tempfile.TemporaryDirectory(prefix="ufo-search-") as place:
            files = FeatureFiles(Path(place))
            batch, workers = recipe.evaluation.batch_size, recipe.data.workers
            predict(model.forward, {spec.task: mine}, {spec.task: range(len(mine))}, batch, workers, files, quiet=True)
            images = {spec.task: mine}
            ((key, found),) = benchmarks.score(recipe, images, files.read(images), self.reader.index.classes).items()
        metrics, name = found.metrics(), self.metric or found.main_metric
        if name not in metrics or name in LOW_IS_BETTER or name.endswith("_std"):
            aims = [n for n in metrics if n not in LOW_IS_BETTER and not n.endswith("_std")]
            raise UserError(f"--metric {name} is none of {key} of which more is better: choose of {', '.join(aims)}")
        return Evaluated(spec, name, metrics)


def _evaluate_all(
    space: ElasticSpace, searched: search.Space, evaluator: Evaluator, journal: Journal, evaluations: int, seed: int
) -> search.Known:
    """Evaluate what is not yet in the journal, and say what all of it is."""
    values = {s.spec.name: s for record in journal.records for s in record.subnets}
    with Progress(evaluations, done=len(journal.records), unit="evaluations", name="search") as progress:
        while len(journal.records) < evaluations:
            levels_G = search.following(searched, known(space, journal.records), evaluations, seed)
            if levels_G is None:
                print("nothing within the limits is left to evaluate", file=sys.stderr)
                break
            specs = space.specs(levels_G)
            for spec in specs:
                if spec.name not in values:
                    values[spec.name] = evaluator(spec)
            subnets = [values[spec.name] for spec in specs]
            for whole in subnets if not journal.records and len(specs) > 1 else []:
                if whole.value <= 0:
                    raise UserError(
                        f"{whole.metric} of the whole path of {whole.spec.task} is {whole.value:g}, nothing to relate "
                        "others to: choose another --metric or leave the task out"
                    )
            costs = dict(zip(space.cost_names, space.costs(levels_G[None])[0].tolist(), strict=True))
            journal.add(Record(subnets, costs))
            progress.update()
    return known(space, journal.records)


def known(space: ElasticSpace, records: list[Record]) -> search.Known:
    """As :mod:`ufo_ds.subnets.search` takes it."""
    levels: list[Any] = [space.levels([s.spec for s in record.subnets]) for record in records]
    metrics = [[s.value for s in record.subnets] for record in records]
    costs = [[record.costs[name] for name in space.cost_names] for record in records]
    tasks = len(space.parts)
    metrics_NT = np.array(metrics).reshape(-1, tasks)
    return search.Known(
        np.array(levels, dtype=int).reshape(len(records), tasks * space.width),
        metrics_NT,
        np.array(costs).reshape(-1, len(space.cost_names)),
        metrics_NT[0] if records else np.ones(tasks),
    )
