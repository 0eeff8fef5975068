"""Prove that a run's tasks are the same to the bit as before `ufo extend` or `ufo remove`.

ufo verify untouched runs/demo                  compared with what the last change recorded
ufo verify untouched runs/demo runs/before      compared with another run or checkpoint, on images too

Of every task that was there before and after: the sha256 of all weights of its path, and of what it says of fixed
images of noise. Outputs are compared with recorded ones only where torch and the CPU are the same. Exit status 1 where
a task differs, with one line that names the task and the tensor.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from ufo_ds import checkpoint
from ufo_ds.checkpoint import Reader
from ufo_ds.data.evaluation_set import EvaluationSet
from ufo_ds.data.shard_specs import is_here
from ufo_ds.errors import ArgumentParser, UserError

IMAGES = 16  # of each task's benchmarks


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(
        prog="ufo verify untouched", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="a run directory (its best checkpoint), or one checkpoint")
    parser.add_argument("before", type=Path, nargs="?", help="the same, as it was before")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    options = parser.parse_args(argv)
    reader = Reader(checkpoint.of_run(options.run))
    found = _with_record(reader) if options.before is None else _with_other(reader, options.before)
    if options.json:
        print(json.dumps(found))
    elif found["ok"]:
        print("\n".join(_lines(found)))
    if not found["ok"]:
        if not options.json:
            print(f"{options.run}: {found['difference']}", file=sys.stderr)
        raise SystemExit(1)


def _with_record(reader: Reader) -> dict[str, Any]:
    """
    Raises:
        UserError: there is no record, or it is damaged.
    """
    from ufo_ds.subnets import untouched  # takes seconds to import

    line = untouched.last_line(reader.directory)
    if line is None:
        raise UserError(
            f"{reader.directory} has no {untouched.CHANGES}: no task was added or removed; name another run to compare "
            "with"
        )
    before, here = untouched.digests_of_line(line), untouched.here()
    is_same_machine = all(line.get(key) == value for key, value in here.items())
    known = [task.name for task in reader.recipe.tasks]
    after = untouched.digests(reader, [task for task in before.weights if task in known])
    difference = untouched.first_difference(reader, before, after, outputs=is_same_machine)
    return {
        "ok": difference is None, "difference": difference, "tasks": list(before.weights),
        "tensors": len(before.tensors), "against": f"{line['change']} of {line['task']}, {line['time']}",
        "outputs": "compared" if is_same_machine else
        f"not compared: recorded by torch {line.get('torch')} on {line.get('cpu')}, here is torch {here['torch']} on "
        f"{here['cpu']}",
    }  # fmt: skip


def _with_other(reader: Reader, before_path: Path) -> dict[str, Any]:
    """
    Raises:
        UserError: they have no task in common.
    """
    from ufo_ds.subnets import untouched

    other = Reader(checkpoint.of_run(before_path))
    names = [task.name for task in other.recipe.tasks if task.name in [t.name for t in reader.recipe.tasks]]
    if not names:
        raise UserError(f"{before_path} has none of the tasks of {reader.directory}: nothing to compare")
    before, after = untouched.digests(other, names), untouched.digests(reader, names)
    difference = untouched.first_difference(reader, before, after)
    images = 0
    for name in names:
        count, is_same = _same_on_images(reader, other, name)
        images += count
        if difference is None and not is_same:
            difference = f"{name}: the outputs on test images differ"
    return {
        "ok": difference is None, "difference": difference, "tasks": names, "tensors": len(after.tensors),
        "against": str(before_path), "outputs": f"compared, also on {images} test images",
    }  # fmt: skip


def _same_on_images(reader: Reader, other: Reader, name: str) -> tuple[int, bool]:
    """Some of the task's test images, if their shards are here: how many, and whether outputs agree to the bit."""
    import numpy as np
    import torch

    from ufo_ds.model.loading import spec_of
    from ufo_ds.subnets import untouched

    task = next(task for task in reader.recipe.tasks if task.name == name)
    directories = [d for b in task.benchmarks for d in b.parts.values() if is_here(d)]
    if not directories:
        return 0, True
    data = EvaluationSet.open(directories[0], reader.recipe.data.shard_cache)
    chosen = range(0, len(data), max(1, len(data) // IMAGES))[:IMAGES]
    pixels = torch.from_numpy(np.stack([data.load(i, task.input) for i in chosen]))
    one, two = (untouched.open_task(r, spec_of(r, name)).embed(pixels) for r in (reader, other))
    return len(pixels), all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def _lines(found: dict[str, Any]) -> list[str]:
    return [
        f"{', '.join(found['tasks'])}: the same to the bit, {found['tensors']} tensors ({found['against']})",
        f"outputs on noise {found['outputs']}",
    ]
