"""Take a task out of a run; every other task stays the same to the bit.

ufo remove runs/demo --task glyphs

The task's own copies, head and optimizer state are deleted from the run's best checkpoint. This is not unlearning: what
tasks share has learned from its images, as have copies that branched off, and nothing of that is undone. So the
licences of its images stay those of the shared copies. A task that `ufo extend` added had no part in them. Other
checkpoints of the run, and what was extracted from it before, still have the task.
"""

import argparse
import json
from pathlib import Path

from ufo_ds import checkpoint
from ufo_ds.errors import ArgumentParser


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(
        prog="ufo remove", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="a run directory (its best checkpoint), or one checkpoint")
    parser.add_argument("--task", required=True, help="the task to take out")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    options = parser.parse_args(argv)

    from ufo_ds.subnets import task_changes  # takes seconds to import

    directory = checkpoint.of_run(options.run)
    with task_changes.held(directory):
        before = sum(entry["bytes"] for entry in checkpoint.Reader(directory).index.files)
        task_changes.remove(directory, options.task)
    reader = checkpoint.Reader(directory)
    tasks = [task.name for task in reader.recipe.tasks]
    freed = before - sum(entry["bytes"] for entry in reader.index.files)
    joint = options.task in reader.index.licences or options.task in reader.index.added
    if options.json:
        print(json.dumps({"checkpoint": str(directory), "removed": options.task, "tasks": tasks, "bytes": freed}))
    else:
        print(
            f"{directory}: without {options.task}, {freed / 1e6:.1f} MB less; "
            f"{', '.join(tasks)} are the same to the bit"
            + ("; what they share has learned from its images, which this does not undo" if joint else "")
        )
