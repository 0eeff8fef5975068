"""The demo brings its own data: made once, in seconds, where its recipe looks for it."""

import sys
from pathlib import Path

from ufo_ds.recipe import Recipe

DIRECTORY = Path("data_shards/demo")


def reads_demo(recipe: Recipe) -> bool:
    """Whether a task trains on the demo's shards."""
    return any(Path(entry.shards).is_relative_to(DIRECTORY) for task in recipe.tasks for entry in task.train)


def make_if_absent() -> None:
    """
    Raises:
        UserError: they cannot be written.
    """
    if not DIRECTORY.exists():
        print(f"making the demo's shards in {DIRECTORY} ...", file=sys.stderr, flush=True)
        from ufo_ds.data import demo  # takes seconds to import

        demo.make(DIRECTORY)
