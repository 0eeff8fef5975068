"""How far a run is, from its files alone: while it trains, from anywhere, or afterwards.

ufo status runs/demo
ufo status runs/demo --json
"""

import argparse
import json
import statistics
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ufo_ds import checkpoint, recipe_file
from ufo_ds.errors import ArgumentParser, UserError
from ufo_ds.evaluation.benchmarks import table
from ufo_ds.recipe import Recipe
from ufo_ds.training.run_directory import STARTS, read_lines

RECENT = 20  # logged steps whose median is the speed


@dataclass(frozen=True)
class Status:
    """What the files say; None where they say nothing of it.

    Attributes:
        step: the last that is recorded; what was done since the last checkpoint is done again after a kill.
        images_per_second: median of the last logged steps.
        seconds_per_step, seconds_left: of training alone, at that speed; evaluations and saving come on top.
        seconds_ago: since something was recorded.
        starts: how often training began or went on, and from which steps.
        left_out: steps that were not taken, for a loss or gradient that is not finite or a spike.
        loss: of the last logged step, by task.
        metrics: of the last evaluation, after ``evaluated_at``.
        best: step, metric and value of the best checkpoint.
    """

    run: str
    recipe: str
    step: int
    steps: int
    images_per_second: float | None
    seconds_per_step: float | None
    seconds_left: float | None
    seconds_ago: float | None
    checkpoint: int | None
    checkpoint_seconds_ago: float | None
    starts: list[dict[str, Any]]
    left_out: int
    loss: dict[str, float]
    metrics: dict[str, float]
    evaluated_at: int | None
    best: dict[str, Any] | None


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(
        prog="ufo status", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="a run directory")
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    options = parser.parse_args(argv)
    found = read(options.run)
    print(json.dumps(asdict(found)) if options.json else "\n".join(_lines(found)))


def read(run: Path) -> Status:
    """
    Raises:
        UserError: it is no run directory.
    """
    if not (run / "recipe.yaml").is_file():
        raise UserError(f"{run} is no run directory (it has no recipe.yaml): give the --run_dir of a training")
    recipe, now = recipe_file.load(str(run / "recipe.yaml")), time.time()
    of_kind: dict[str, list[dict[str, Any]]] = {}
    for line in read_lines(run / "metrics.jsonl"):
        of_kind.setdefault(line["kind"], []).append(line)
    trained, left_out = of_kind.get("train", []), of_kind.get("left_out", [])
    checkpoints = checkpoint.find(run / "checkpoints")
    newest = checkpoints[-1] if checkpoints else None
    recipe = _joint(recipe, newest)
    saved = None if newest is None else int(newest.name.removeprefix("step-"))
    step = max([line["step"] for line in trained + left_out] + [saved or 0])
    speed = statistics.median(line["images_per_second"] for line in trained[-RECENT:]) if trained else None
    seconds = None if speed is None else images_per_step(recipe) / speed
    evaluation = of_kind["evaluation"][-1] if "evaluation" in of_kind else None
    best = run / "checkpoints" / "best.json"
    return Status(
        run=str(run),
        recipe=recipe.name,
        step=step,
        steps=recipe.schedule.steps,
        images_per_second=speed,
        seconds_per_step=seconds,
        seconds_left=None if seconds is None else (recipe.schedule.steps - step) * seconds,
        seconds_ago=None if not trained else now - (run / "metrics.jsonl").stat().st_mtime,
        checkpoint=saved,
        checkpoint_seconds_ago=None if newest is None else now - (newest / checkpoint.INDEX).stat().st_mtime,
        starts=read_lines(run / STARTS),
        left_out=left_out[-1]["count"] if left_out else 0,
        loss=_losses(recipe, trained[-1]) if trained else {},
        metrics={} if evaluation is None else {k: v for k, v in evaluation.items() if k not in ("step", "kind")},
        evaluated_at=None if evaluation is None else evaluation["step"],
        best=json.loads(best.read_text()) if best.is_file() else None,
    )


def images_per_step(recipe: Recipe) -> float:
    """Over all tasks and ranks; where steps differ, their mean at the recipe's rates."""
    images = sum(task.samples_per_step for task in recipe.tasks)
    return images / len(recipe.tasks) if recipe.data.batches == "isomorphic" else images


def _joint(recipe: Recipe, newest: Path | None) -> Recipe:
    """Without the tasks that were added to the trained run, of which no step of its training knows."""
    try:
        added = checkpoint.Reader(newest).index.added if newest else {}
    except checkpoint.Damaged:  # what a training that goes on has to deal with
        added = {}
    return replace(recipe, tasks=[task for task in recipe.tasks if task.name not in added])


def _losses(recipe: Recipe, line: dict[str, Any]) -> dict[str, float]:
    """Per task the sum of its losses, as they are logged in training."""
    found = {}
    for task in recipe.tasks:
        names = [f"{task.name}/{name}" for name in (*task.loss.given, "distillation")]
        found[task.name] = sum(line[name] for name in names if name in line)
    return found


def _lines(status: Status) -> list[str]:
    duration = tqdm.format_interval
    lines = [f"{status.run}: {status.recipe}, step {status.step} of {status.steps} ({status.step / status.steps:.0%})"]
    if status.seconds_ago is not None:
        lines[0] += f", last recorded {duration(status.seconds_ago)} ago"
    if status.images_per_second and status.seconds_per_step and status.seconds_left is not None:
        left = "trained" if status.step == status.steps else f"{duration(status.seconds_left)} of training left"
        lines.append(
            f"speed        {status.images_per_second:.0f} images/s, {status.seconds_per_step:.3g} s a step; {left}"
        )
    saved = "none yet"
    if status.checkpoint is not None and status.checkpoint_seconds_ago is not None:
        saved = f"step {status.checkpoint}, {duration(status.checkpoint_seconds_ago)} ago"
    if status.best is not None:
        saved += f"; best {status.best['metric']} {status.best['value']:.4f} at step {status.best['step']}"
    lines.append(f"checkpoint   {saved}")
    starts = [
        f"step {start['step']} on {start['ranks']} rank{'s' * (start['ranks'] > 1)}, {start['time'][:16]}"
        for start in status.starts
    ]
    if len(starts) > 4:
        starts = [starts[0], "...", *starts[-2:]]
    lines.append(f"restarts     {max(0, len(status.starts) - 1)}{': ' if starts else ''}{'; '.join(starts)}")
    if status.left_out:
        lines.append(f"left out     {status.left_out} steps that were not finite, or spikes")
    if status.loss:
        lines.append("loss         " + "  ".join(f"{task} {value:.3f}" for task, value in status.loss.items()))
    if status.evaluated_at is not None:
        lines.append(f"metrics      after step {status.evaluated_at}")
        lines += [f"  {line}" for line in table(status.metrics)]
    return lines
