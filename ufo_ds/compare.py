"""Compare two recipes by their runs, with intervals over seeds and test items.

ufo compare runs/joint-0,runs/joint-1,runs/joint-2 runs/twin-0,runs/twin-1,runs/twin-2
ufo compare 'runs/joint-*' 'runs/twin-*'

Each arm is one run directory or several that differ in the seed; an arm may also hold its tasks in several runs of one
seed, as single-task runs do. What counts is the end of the training, not the best checkpoint: that one was chosen on
the test set. ufo_ds/evaluation/statistics.py has the formula and its sources.
"""

import argparse
import glob
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ufo_ds import recipe_file
from ufo_ds.errors import ArgumentParser, UserError
from ufo_ds.evaluation import outcomes, statistics
from ufo_ds.evaluation.outcomes import Outcomes
from ufo_ds.evaluation.statistics import ALPHA, Difference
from ufo_ds.recipe import Recipe
from ufo_ds.training.run_directory import differences

_WIDTH = 100
_MAY_DIFFER = ("seed", "name", "data.workers", "evaluation.", "checkpoint.", "logging.")


@dataclass
class Run:
    path: Path
    recipe: Recipe
    outcomes: dict[str, Outcomes]  # by task/benchmark, of the last step


@dataclass
class Arm:
    """Runs of one recipe: per seed the outcomes of its benchmarks, the same ones for all seeds."""

    text: str
    runs: list[Run]
    seeds: dict[int, dict[str, Outcomes]]

    @property
    def benchmarks(self) -> list[str]:
        return list(next(iter(self.seeds.values())))

    def of(self, benchmark: str) -> list[Outcomes]:
        """What each seed found."""
        return [found[benchmark] for found in self.seeds.values()]

    def main_metric(self, benchmark: str) -> list[float]:
        return [float(found.scores @ found.items.weight) for found in self.of(benchmark)]

    def metrics(self, benchmark: str) -> dict[str, list[float]]:
        """Every metric, of each seed."""
        values = [found.metrics() for found in self.of(benchmark)]
        return {name: [v[name] for v in values] for name in values[0]}


@dataclass
class Row:
    """One benchmark, or the mean over them (whose ``metric`` is None); ``p_holm`` is None without enough seeds."""

    name: str
    metric: str | None
    a: float
    b: float
    difference: Difference
    p_holm: float | None = None

    @property
    def verdict(self) -> str:
        if self.p_holm is None:
            return "one seed cannot tell"
        if self.p_holm > ALPHA:
            return "no difference"
        return "A better" if self.difference.value > 0 else "B better"


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(
        prog="ufo compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("arms", nargs="+", metavar="ARM", help="two arms: RUN, RUN,RUN,... or a quoted 'PATTERN'")
    parser.add_argument("--json", action="store_true", help="print everything as JSON, all metrics of all seeds too")
    options = parser.parse_args(argv)
    if len(options.arms) != 2:
        raise UserError(
            f"ufo compare takes two arms, not {len(options.arms)}: write each as one word, RUN,RUN,... or 'PATTERN' in "
            f"quotes"
        )
    a, b = (read_arm(text) for text in options.arms)
    rows = compare(a, b)
    warnings = [*_mixed("A", a), *_mixed("B", b), *_unlike(a, b)]
    if options.json:
        print(json.dumps(_values(a, b, rows) | {"warnings": warnings}))
        return
    print("\n".join(report(a, b, rows)))
    for line in warnings:
        print(f"warning: {line}", file=sys.stderr)


def read_run(path: Path) -> Run:
    """A finished run with what its last evaluation found.

    Raises:
        UserError: no run directory, or nothing was kept of its last step.
    """
    if not (path / "recipe.yaml").is_file():
        raise UserError(f"{path} is no run directory (it has no recipe.yaml): give one that was trained")
    recipe = recipe_file.load(str(path / "recipe.yaml"))
    keys = [f"{task.name}/{benchmark.name}" for task in recipe.tasks for benchmark in task.benchmarks]
    if not keys:
        raise UserError(f"{path}: its recipe has no benchmarks: there is nothing to compare")
    return Run(path, recipe, {key: outcomes.load(path, recipe.schedule.steps, key) for key in keys})


def read_arm(text: str) -> Arm:
    """Read the runs that a word of the command line stands for.

    Raises:
        UserError: no such runs, two of one seed with the same benchmark, or seeds with different benchmarks.
    """
    runs = [read_run(path) for path in _paths(text)]
    seeds: dict[int, dict[str, Outcomes]] = {}
    where: dict[tuple[int, str], Path] = {}
    for run in runs:
        seed = run.recipe.seed
        for key, found in run.outcomes.items():
            if (seed, key) in where:
                raise UserError(
                    f"{where[seed, key]} and {run.path} both have {key} of seed {seed}: the runs of an arm must differ "
                    f"in the seed"
                )
            where[seed, key] = run.path
            seeds.setdefault(seed, {})[key] = found
    everything = {key for found in seeds.values() for key in found}
    for seed, of_seed in seeds.items():
        for key in sorted(everything - of_seed.keys()):
            raise UserError(f"{text}: seed {seed} has no {key}, other seeds have: add its run or leave the seed out")
    return Arm(text, runs, dict(sorted(seeds.items())))


def _paths(text: str) -> list[Path]:
    if Path(text).is_dir():
        return [Path(text)]
    paths: list[Path] = []
    for word in filter(None, text.split(",")):
        found = [Path(word)] if Path(word).is_dir() else [Path(p) for p in sorted(glob.glob(word)) if Path(p).is_dir()]
        if not found:
            raise UserError(f"no run directory {word!r}: give one, several with commas, or a pattern in quotes")
        paths += found
    if not paths:
        raise UserError(f"no run directory in {text!r}: give one, several with commas, or a pattern in quotes")
    return paths


def compare(a: Arm, b: Arm) -> list[Row]:
    """A row for each benchmark that both arms have and, where these are several, one for their mean.

    Raises:
        UserError: no benchmark in common, or one that was evaluated on other data.
    """
    names = [name for name in a.benchmarks if name in b.benchmarks]
    if not names:
        raise UserError(
            f"nothing to compare: {a.text} has {', '.join(a.benchmarks)}; {b.text} has {', '.join(b.benchmarks)}"
        )
    rows = []
    for name in names:
        _check_same_data(name, [*a.runs, *b.runs])
        first = a.of(name)[0]
        if first.items.clusters < 2:
            raise UserError(f"{name}: all {len(first.scores)} items are of one identity: no interval can be given")
        a_RN, b_RN = (np.stack([found.scores for found in arm.of(name)]) for arm in (a, b))
        difference = statistics.compare(a_RN, b_RN, first.items)
        rows.append(Row(name, first.main_metric, *_means(a, b, [name]), difference))
    if len(names) > 1:
        a_RB, b_RB = (np.array([arm.main_metric(name) for name in names]).T for arm in (a, b))
        tasks = [name.split("/")[0] for name in names]
        difference = statistics.mean([row.difference for row in rows], tasks, a_RB, b_RB)
        rows.append(Row(f"mean of {len(names)}", None, *_means(a, b, names), difference))
    adjusted = statistics.holm([row.difference.p for row in rows if row.difference.p is not None])
    for row, p in zip(rows, adjusted, strict=False):  # either all rows have a p-value or none has
        row.p_holm = p
    return rows


def _means(a: Arm, b: Arm, names: list[str]) -> tuple[float, float]:
    of_a, of_b = (float(np.mean([arm.main_metric(name) for name in names])) for arm in (a, b))
    return of_a, of_b


def _check_same_data(name: str, runs: list[Run]) -> None:
    first, *others = [run for run in runs if name in run.outcomes]
    wanted = first.outcomes[name]
    for run in others:
        found = run.outcomes[name]
        if (found.protocol, found.data, len(found.scores)) != (wanted.protocol, wanted.data, len(wanted.scores)):
            raise UserError(
                f"{name} is not the same benchmark ({wanted.protocol} on {len(wanted.scores)} items in {first.path}, "
                f"{found.protocol} on {len(found.scores)} in {run.path}, or other identities): use the same shards"
            )


def _mixed(which: str, arm: Arm) -> Iterator[str]:
    """Warnings where runs of one arm differ in more than the seed."""
    first: dict[tuple[str, ...], Run] = {}
    for run in arm.runs:
        tasks = tuple(task.name for task in run.recipe.tasks)
        other = first.setdefault(tasks, run)
        for key, one, two in differences(recipe_file.dump(other.recipe), recipe_file.dump(run.recipe)):
            if not key.startswith(_MAY_DIFFER):
                yield f"arm {which}: {key} is {one!r} in {other.path} and {two!r} in {run.path}: not one recipe"
                break


def _unlike(a: Arm, b: Arm) -> Iterator[str]:
    """Warnings where the arms are not evaluated alike."""
    for which, mine, others in (("A", a, b), ("B", b, a)):
        if alone := [name for name in mine.benchmarks if name not in others.benchmarks]:
            yield f"left out, only arm {which} has them: {', '.join(alone)}"
    for name in a.benchmarks:
        if name in b.benchmarks:
            settings = list(dict.fromkeys(_text(found.settings) for found in [*a.of(name), *b.of(name)]))
            if len(settings) > 1:
                yield f"{name}: some runs were evaluated with {settings[0]}, others with {settings[1]}"


def _text(settings: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in settings.items()) or "no settings"


def _values(a: Arm, b: Arm, rows: list[Row]) -> dict[str, Any]:
    """All there is, for machines; metrics of each seed in the order of the seeds."""
    benchmarks: dict[str, Any] = {}
    for row in rows:
        benchmarks[row.name] = {
            "metric": row.metric, "a": row.a, "b": row.b, "difference": row.difference.value,
            "interval": list(row.difference.interval), "p": row.difference.p, "p_holm": row.p_holm,
            "verdict": row.verdict,
        }  # fmt: skip
        if row.metric is not None:
            items, of_a, of_b = a.of(row.name)[0].items, a.metrics(row.name), b.metrics(row.name)
            benchmarks[row.name] |= {
                "items": len(items.weight),
                "clusters": items.clusters,
                "metrics": {name: {"a": of_a[name], "b": of_b[name]} for name in of_a},
            }
    arms = {
        name: {"runs": [str(run.path) for run in arm.runs], "seeds": list(arm.seeds)}
        for name, arm in (("a", a), ("b", b))
    }
    mean = next((benchmarks.pop(row.name) for row in rows if row.metric is None), None)
    verdicts = sum(row.p_holm is not None for row in rows)
    return {**arms, "benchmarks": benchmarks, "mean": mean, "verdicts": verdicts, "correction": "holm"}


def report(a: Arm, b: Arm, rows: list[Row]) -> Iterator[str]:
    """Lines of a table, no wider than 100 columns."""
    for which, arm in (("A", a), ("B", b)):
        seeds = f"{len(arm.seeds)} seed{'s' if len(arm.seeds) > 1 else ''}"
        yield f"{which}  {_shortened(arm.text, _WIDTH - 5 - len(seeds))}  {seeds}"
    names = [_shortened(f"{row.name} {row.metric or ''}".strip(), 31) for row in rows]
    width = max(map(len, names))
    yield ""
    yield f"{'':{width}}  {'A':>6}  {'B':>6}  {'A - B':>7}  {'95% interval':^18}  verdict"
    for name, row in zip(names, rows, strict=True):
        low, high = row.difference.interval
        verdict = row.verdict
        if verdict == "no difference":
            verdict += f" > {max(-low, high):.4f}"
        yield (
            f"{name:{width}}  {row.a:6.4f}  {row.b:6.4f}  {row.difference.value:+7.4f}  "
            f"[{low:+7.4f}, {high:+7.4f}]  {verdict}"
        )
    yield ""
    if rows[0].p_holm is None:
        yield "Intervals over test items alone: another seed may well give another order. Train each arm"
        yield "with three seeds or more for a verdict."
        return
    yield "Intervals, each by itself, over seeds and test items (identities where they are known)."
    together = f"Verdicts, {len(rows)} at once by Holm's method" if len(rows) > 1 else "Verdict"
    yield f'{together}: at most a 5% chance of any false "better".'
    if any(row.verdict == "no difference" for row in rows):
        yield "No difference > x: none was found, and one larger than x is excluded."


def _shortened(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width // 2 - 2]}...{text[len(text) - (width - width // 2 - 1) :]}"
