"""The run directory: all that a run needs to go on.

::

    recipe.yaml        the resolved recipe
    deepspeed.json     the resolved DeepSpeed configuration
    metrics.jsonl      one JSON object a line: losses and speed of logged steps, metrics of evaluations
    starts.jsonl       one JSON object for each time that training began or went on: when, from which step, ranks
    evaluations/       step-00001000/ ...: what each evaluation found, item by item
    tensorboard/       the same for TensorBoard
    routes.png         learned routes and how they came about
    checkpoints/       step-00001000/ ..., best.json; damaged-step-.../ was set aside
"""

import contextlib
import fcntl
import json
import math
import os
import shutil
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

from ufo_ds import checkpoint
from ufo_ds.errors import UserError
from ufo_ds.recipe import Recipe
from ufo_ds.recipe_file import dump, to_yaml

STARTS = "starts.jsonl"

# What may differ between two starts of one run: where it stops and what it shows, not what it computes.
_FREE = (
    "schedule.steps", "guard.patience", "data.workers", "data.shard_cache.", "evaluation.", "checkpoint.", "logging.",
    "model.activation_checkpointing",
)  # fmt: skip


class RunDirectory:
    """Held by rank 0 from start to end: a second run in the same directory is refused."""

    def __init__(self, path: Path, recipe: Recipe, deepspeed: dict[str, Any], tensorboard: bool):
        """
        Raises:
            UserError: not writable, or another process is training in it.
        """
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock: TextIO = (path / ".lock").open("a")
            (path / "checkpoints").mkdir(exist_ok=True)
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"--run_dir {path}: another process trains in it: stop that or use another") from None
            checkpoint.write_text(path / "recipe.yaml", to_yaml(recipe))
            checkpoint.write_text(path / "deepspeed.json", json.dumps(deepspeed, indent=2) + "\n")
        except OSError as error:
            raise UserError(f"--run_dir {path}: {error.strerror}: choose a directory you can write to") from None
        self._tensorboard = tensorboard
        self._board: Any = None
        self._metrics: TextIO | None = None

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def begin(self, step: int, ranks: int) -> None:
        """Drop what was recorded after ``step``: those steps are about to be computed again."""
        with (self.path / STARTS).open("a") as starts:
            when = datetime.now().astimezone().isoformat(timespec="seconds")
            print(json.dumps({"step": step, "time": when, "ranks": ranks}), file=starts)
        path = self.path / "metrics.jsonl"
        kept = [line for line in path.read_text().splitlines() if _step(line) <= step] if path.exists() else []
        checkpoint.write_text(path, "".join(f"{line}\n" for line in kept))
        for evaluation in (self.path / "evaluations").glob("step-*"):
            if evaluation.name > checkpoint.name_of(step):
                shutil.rmtree(evaluation)
        self._metrics = path.open("a")
        if self._tensorboard:
            from torch.utils.tensorboard.writer import SummaryWriter  # takes seconds to import

            self._board = SummaryWriter(str(self.path / "tensorboard"), purge_step=step + 1)

    def was_evaluated(self, step: int) -> bool:
        """Whether an evaluation after this step is recorded."""
        lines = read_lines(self.path / "metrics.jsonl")
        return any(line["step"] == step and line["kind"] == "evaluation" for line in lines)

    def set_aside(self, damaged: Iterable[Path]) -> None:
        """Rename checkpoints, so that nothing takes them for whole ones."""
        for path in damaged:
            aside = path.with_name(f"damaged-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            print(f"{path} is damaged: set aside as {aside.name}", flush=True)

    def record(self, step: int, values: dict[str, float], kind: str) -> None:
        """Append one line; ``kind`` is ``train``, ``evaluation`` or ``conflict``."""
        assert self._metrics is not None
        print(json.dumps({"step": step, "kind": kind, **values}), file=self._metrics, flush=True)
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(f"{kind}/{name}", value, step)

    def record_routes(
        self, step: int, probabilities: dict[str, dict[str, list[float | None]]], temperature: float, changed_at: int
    ) -> None:
        """Append the probability of the own copy by task, unit and layer (None: not learned), the router's temperature
        and the last step at which a more probable branch changed."""
        assert self._metrics is not None
        line = {"temperature": temperature, "changed_at": changed_at, "own": probabilities}
        print(json.dumps({"step": step, "kind": "routes", **line}), file=self._metrics, flush=True)

    def record_rates(self, step: int, rates: dict[str, float], slowness: dict[str, float]) -> None:
        """Append the rates of sampling from ``step`` on, and what they follow from."""
        assert self._metrics is not None
        line = {"step": step, "kind": "balance", "rates": rates, "slowness": slowness}
        print(json.dumps(line), file=self._metrics, flush=True)

    def record_left_out(self, step: int, loss: float, gradient_norm: float, count: int, in_a_row: int) -> None:
        """Append a step that was not taken (values that are not finite as null), and how many were not so far."""
        assert self._metrics is not None
        finite = {
            key: value if math.isfinite(value) else None
            for key, value in {"loss": loss, "gradient_norm": gradient_norm}.items()
        }
        line = {"step": step, "kind": "left_out", **finite, "count": count, "in_a_row": in_a_row}
        print(json.dumps(line), file=self._metrics, flush=True)

    def draw_routes(self) -> None:
        """Draw what was recorded of routes, if any was."""
        lines = [json.loads(line) for line in (self.path / "metrics.jsonl").read_text().splitlines()]
        history = [line for line in lines if line["kind"] == "routes"]
        if history:
            from ufo_ds.training import route_chart  # matplotlib takes a second to import

            route_chart.draw(history, self.path / "routes.png")

    def close(self) -> None:
        if self._board is not None:
            self._board.close()
        if self._metrics is not None:
            self._metrics.close()
        self._lock.close()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file with one a line, but for one that is being written; none without the file."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):  # cut short
            found.append(json.loads(line))
    return found


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError):
        return float("inf")  # cut short by a kill


def check_writable(path: Path) -> None:
    """
    Raises:
        UserError: not a directory, or not writable.
    """
    existing = next(p for p in [path, *path.absolute().parents] if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"--run_dir {path}: no permission to write in {existing}: choose another directory")


def check_resume(path: Path, recipe: Recipe, last: Path | None, damaged: Mapping[Path, str]) -> None:
    """Whether a run may go on from ``last``, its newest whole checkpoint, though newer ones are ``damaged`` (what is
    wrong with each).

    Raises:
        UserError: it was not told to; or the checkpoint is of another recipe (naming the first difference).
    """
    for fault in damaged.values():
        if last is None:
            raise UserError(f"{fault}, and no checkpoint before it is whole: start anew with another --run_dir")
        if recipe.checkpoint.damaged == "stop":
            raise UserError(f"{fault}: add --checkpoint.damaged set_aside to go on from {last.name}, which is whole")
    if last is None:
        return
    for changed in checkpoint.find(path / "checkpoints"):
        try:
            index = checkpoint.Reader(changed).index
        except checkpoint.Damaged:  # those that matter are in ``damaged``
            continue
        if names := [*index.added, *index.removed]:
            raise UserError(
                f"--run_dir {path}: {', '.join(names)} was added to or removed from its {changed.name}, so it cannot "
                f"train on: use a new directory, with --model.init {path} to start from what it has learned"
            )
    saved = dump(checkpoint.Reader(last).recipe)  # with the defaults of keys that came later
    for key, was, now in differences(saved, dump(recipe)):
        if not key.startswith(_FREE):
            raise UserError(
                f"--run_dir {path} holds a checkpoint of another recipe: {key} was {was!r}, is {now!r}: "
                "use a new directory or restore the value"
            )


def differences(a: Any, b: Any, key: str = "") -> list[tuple[str, Any, Any]]:
    """Where two dumped recipes differ: key, value in ``a``, value in ``b``."""
    if isinstance(a, dict) and isinstance(b, dict):
        keys = [*a, *(k for k in b if k not in a)]
        return [d for k in keys for d in differences(a.get(k), b.get(k), f"{key}.{k}" if key else k)]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in differences(x, y, f"{key}.{_tag(x, i)}")]
    return [] if a == b else [(key, a, b)]


def _tag(item: Any, index: int) -> str:
    return str(item.get("name", index)) if isinstance(item, dict) else str(index)
