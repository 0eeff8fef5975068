"""Prove on this machine's CPU that a checkpoint goes on at any other topology.

ufo verify resume                                   a small recipe on the demo's data: 8 minutes of CPU time
ufo verify resume --ranks 1,2 --optimizers adamw    less of it
ufo verify resume --recipe mine.yaml                a recipe of yours, at full precision
ufo verify resume runs/mine                         from the last checkpoint of a run, which is left as it is

The recipe is trained for three steps on every topology (ranks x expert parallelism x ZeRO stage), saved, and trained
on. Then every topology loads the checkpoint of every topology and makes the same steps. They have to train on the same
samples, find the same losses and end with the same weights, averages, running statistics and optimizer state as the run
that was not interrupted, to 1e-5. Exit status 1 where a pair differs.
"""

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ufo_ds import checkpoint, recipe_file
from ufo_ds.data import demo_shards
from ufo_ds.data.source import open_sources
from ufo_ds.errors import ArgumentParser, UserError
from ufo_ds.progress import Progress
from ufo_ds.recipe import Recipe
from ufo_ds.training.run_differences import differences

if TYPE_CHECKING:
    from ufo_ds.training.resuming import Job

BAR = 1e-5  # of differences, in fp32
# Of optimizers that the recipe was not made for: large enough that a lost state shows.
RATES = {"sgd": 0.1, "adamw": 1e-3, "lars": 1.0, "lamb": 1e-2}


def main(argv: list[str] | None = None) -> None:
    # For the ranks, which share this machine's cores.
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    options, overrides = _parse(argv)
    with tempfile.TemporaryDirectory(prefix="ufo-verify-") as scratch:
        job, began = make_job(options, overrides, Path(scratch)), time.monotonic()
        with Progress(number_of_runs(job), unit="runs", name="resume") as progress:
            train_references(job, progress)
            pairs = resume_all(job, progress)
        references = compare_references(job)
        seconds = time.monotonic() - began
    ok = all(pair["ok"] for pair in pairs) and all(pair["same_samples"] for pair in references)
    if options.json:
        head = {"ok": ok, "bar": BAR, "recipe": job.name, "steps": job.steps, "first_step": job.saved}
        print(json.dumps(head | {"seconds": round(seconds, 1), "references": references, "pairs": pairs}))
    else:
        print("\n".join(_lines(job, pairs, references, seconds)))
    if not ok:
        raise SystemExit(1)


def _parse(words: list[str] | None) -> tuple[argparse.Namespace, list[tuple[str, str]]]:
    parser = ArgumentParser(
        usage="ufo verify resume [RUN | --recipe RECIPE [--section.key VALUE ...]] [options]", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        epilog="RUN is a run directory, from whose last checkpoint all go on. Any value of a recipe can be set.",
    )  # fmt: skip
    parser.add_argument("--recipe", help="a shipped recipe or a YAML file (default: resume)")
    parser.add_argument("--ranks", default="1,2,4", help="numbers of ranks (default: 1,2,4)")
    parser.add_argument("--ep", default="1,2,4", help="sizes of expert parallelism, where they divide the ranks")
    parser.add_argument("--zero", default="1,3", help="ZeRO stages (default: 1,3)")
    parser.add_argument("--optimizers", help=f"of {', '.join(RATES)} (default: sgd,adamw; of a run its own)")
    parser.add_argument("--steps", default="3", help="to compare (default: 3)")
    parser.add_argument("--json", action="store_true", help="print every pair as JSON")
    options, rest = parser.parse_known_args(words)
    # Not argparse's, which would take the value of a recipe's key for it.
    options.run = Path(rest.pop(0)) if rest and not rest[0].startswith("--") else None
    return options, recipe_file.overrides_of(rest)


def make_job(options: argparse.Namespace, overrides: list[tuple[str, str]], scratch: Path) -> "Job":
    """All that is to be trained, with everything checked that can be.

    Raises:
        UserError: wrong options, a recipe or run that cannot be trained, or not on one of the topologies.
    """
    numbers = {name: _numbers(f"--{name}", getattr(options, name)) for name in ("ranks", "ep", "zero", "steps")}
    if len(numbers["steps"]) > 1:
        raise UserError(f"--steps {options.steps!r}: give one number")
    if any(stage > 3 for stage in numbers["zero"]):
        raise UserError(f"--zero {options.zero!r}: use 1, 2 or 3")
    shapes = [(r, e, z) for r in numbers["ranks"] for e in numbers["ep"] for z in numbers["zero"] if r % e == 0]
    if len({ranks for ranks, _, _ in shapes}) < len(numbers["ranks"]):
        raise UserError(f"--ep {options.ep!r}: none of them divides one of --ranks {options.ranks!r}: add 1")
    start, first, accumulation = None, 0, 1
    if options.run is None:
        recipe = recipe_file.load(options.recipe or "resume", overrides)
        optimizers = (options.optimizers or "sgd,adamw").split(",")
    else:
        recipe, start, first, accumulation = _of_run(options, overrides, scratch)
        optimizers = [recipe.optimizer.type]
    for name in optimizers:
        if name not in RATES:
            raise UserError(f"--optimizers {name!r}: use some of {', '.join(RATES)}")
    if demo_shards.reads_demo(recipe):
        demo_shards.make_if_absent()
    counted, _ = open_sources(recipe, accumulation)

    from ufo_ds.training import resuming  # takes seconds to import

    topologies = tuple(resuming.Topology(*shape) for shape in shapes)
    for topology in topologies:
        topology.config(counted, accumulation)
    rates = RATES | {recipe.optimizer.type: recipe.optimizer.lr}
    steps = numbers["steps"][0]
    recipes = {name: resuming.for_comparison(recipe, name, rates[name], first, steps) for name in optimizers}
    return resuming.Job(scratch, recipes, topologies, accumulation, start, first, steps)


def _of_run(
    options: argparse.Namespace, overrides: list[tuple[str, str]], scratch: Path
) -> tuple[Recipe, Path, int, int]:
    """Recipe, a copy of the last checkpoint, its step, and micro-batches a step."""
    given = [f"--{name}" for name in ("recipe", "optimizers") if getattr(options, name)]
    for name in given + [f"--{key}" for key, _ in overrides]:
        raise UserError(f"{name} with the run {options.run}: its checkpoint goes with its own: remove one of them")
    reader = checkpoint.Reader(checkpoint.of_run(options.run, "last"))
    reader.verify()
    shutil.copytree(reader.directory, scratch / "start")
    try:
        deepspeed = json.loads((options.run / "deepspeed.json").read_text())
    except (OSError, ValueError):
        raise UserError(f"{options.run} has no deepspeed.json: give a run directory, not a checkpoint") from None
    return reader.recipe, scratch / "start", reader.index.step, deepspeed["gradient_accumulation_steps"]


def _numbers(name: str, text: str) -> list[int]:
    words = text.split(",")
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise UserError(f"{name} {text!r}: give positive whole numbers with commas between them")
    return sorted({int(word) for word in words})


def number_of_runs(job: "Job") -> int:
    return len(job.recipes) * len(job.topologies) * (len(job.topologies) + 1)


def train_references(job: "Job", progress: Progress) -> None:
    """Train the runs that are not interrupted.

    Raises:
        UserError: as of training.
    """
    from ufo_ds.training import resuming

    _launch(resuming.train_references, job, progress)


def resume_all(job: "Job", progress: Progress) -> list[dict[str, Any]]:
    """Go on from every reference's checkpoint on every topology; what came of each pair.

    Raises:
        UserError: as of training.
    """
    from ufo_ds.training import resuming

    order = list(job.recipes)
    found = _launch(resuming.resume, job, progress)
    found.sort(key=lambda pair: (order.index(pair["optimizer"]), pair["source"], pair["target"]))
    names = [str(topology) for topology in job.topologies]
    return [
        {"source": names[pair.pop("source")], "target": names[pair.pop("target")], **_judged(pair)} for pair in found
    ]


def compare_references(job: "Job") -> list[dict[str, Any]]:
    """The runs that are not interrupted against each other, over all their steps; for information: from the first step
    on Adam divides by the size of gradients, and where these are as small as rounding errors, so are steps alike."""
    found = []
    for optimizer in job.recipes:
        for one, other in combinations(job.topologies, 2):
            pair = {"one": str(one), "other": str(other), "optimizer": optimizer}
            runs = job.reference(optimizer, one), job.reference(optimizer, other)
            found.append(pair | _judged(differences(*runs, job.first, job.end)))
    return found


def _judged(pair: dict[str, Any]) -> dict[str, Any]:
    largest = max(pair["differences"].values())
    ok = largest <= BAR and pair["same_samples"] and pair["same_routes"]
    return {**pair, "largest_difference": largest, "ok": ok}


def _launch(function: Callable[..., None], job: "Job", progress: Progress) -> list[dict[str, Any]]:
    """Call a function in the ranks of a job for each number of them; what they report."""
    from torch.multiprocessing.spawn import ProcessRaisedException

    from ufo_ds.parallel.processes import start_ranks

    lines: list[dict[str, Any]] = []
    for count in sorted({topology.ranks for topology in job.topologies}):
        report = job.scratch / f"{function.__name__}-{count}.jsonl"
        report.touch()
        context, over = start_ranks(function, (job, count, report), count), False
        try:
            with report.open() as file:
                while not over:
                    over = context.join(0.2)
                    for line in file:
                        lines.append(json.loads(line))
                        progress.update()
        except ProcessRaisedException as error:
            if "UserError: " in str(error):
                raise UserError(str(error)) from None
            raise
        finally:
            for process in context.processes:  # there are some where this one was interrupted
                process.kill()
                process.join()
    return lines


def _lines(job: "Job", pairs: list[dict[str, Any]], references: list[dict[str, Any]], seconds: float) -> Iterator[str]:
    """Tables no wider than 100 columns for twelve topologies."""
    topologies = job.topologies
    yield f"{job.name}: trained to step {job.saved} and saved; {job.steps} steps from there, against the source's own"
    for optimizer in job.recipes:
        of_all = iter(pair for pair in pairs if pair["optimizer"] == optimizer)
        yield ""
        for key, words in (("ranks", f"{optimizer:<8} to ranks"), ("ep", "EP"), ("zero", "ZeRO")):
            yield f"{words:>17}" + "".join(f"{getattr(topology, key):>6} " for topology in topologies)
        for i, source in enumerate(topologies):
            words = "from" if i == 0 else ""
            cells = "".join(_cell(next(of_all)) for _ in topologies)
            yield f"{words:<8}{source.ranks:>2} {source.ep:>2} {source.zero:>2} {cells}"
    yield ""
    for optimizer in job.recipes:
        yield f"{optimizer}: {_largest(pair for pair in pairs if pair['optimizer'] == optimizer)}"
        if other := _largest(pair for pair in references if pair["optimizer"] == optimizer):
            yield f"  uninterrupted runs against each other, from step {job.first}: {other}"
    failed = [pair for pair in pairs if not pair["ok"]]
    for pair in failed[:10]:
        kind = max(pair["differences"], key=pair["differences"].get)
        where = f"{pair['optimizer']}, {pair['source']} -> {pair['target']}"
        samples = "" if pair["same_samples"] else ", OTHER SAMPLES"
        routes = "" if pair["same_routes"] else ", OTHER ROUTES"
        yield f"FAILED: {where}: {kind} {pair['largest_difference']:.1e} at {pair['at'][kind]}{samples}{routes}"
    verdict = f"{len(failed)} of {len(pairs)} pairs FAILED" if failed else f"all {len(pairs)} pairs equal"
    yield f"{verdict}, to {BAR:g} (!: more, s: other samples, r: other routes); {seconds / 60:.1f} minutes"


def _cell(pair: dict[str, Any]) -> str:
    mark = "!" if pair["largest_difference"] > BAR else " "
    mark = mark if pair["same_routes"] else "r"
    mark = mark if pair["same_samples"] else "s"
    return f"{pair['largest_difference']:>6.0e}{mark}" if pair["largest_difference"] else f"{0:>6}{mark}"


def _largest(pairs: Iterator[dict[str, Any]]) -> str:
    """By kind, over pairs."""
    found: dict[str, float] = {}
    for pair in pairs:
        for kind, value in pair["differences"].items():
            found[kind] = max(found.get(kind, 0.0), value)
    return ", ".join(f"{kind} {value:.1e}" for kind, value in found.items())
