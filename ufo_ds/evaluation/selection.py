"""Which benchmarks are evaluated: those of a trained recipe or of another one, some of them."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from ufo_ds import recipe_file
from ufo_ds.errors import UserError
from ufo_ds.recipe import Recipe, only


def select(
    trained: Recipe, run: Path, other: str | None, tasks: Sequence[str] | None, benchmarks: Sequence[str] | None
) -> Recipe:
    """The recipe of what is evaluated: its tasks, with the benchmarks that are asked for.

    Args:
        trained: what the model was trained by.
        run: where that is from.
        other: a recipe whose benchmarks are taken; tasks go by their names.
        tasks, benchmarks: names; all if left out.

    Raises:
        UserError: none is left, or a name is not there.
    """
    recipe = trained
    asked = {task.name: task.benchmarks for task in recipe.tasks}
    if other:
        others = {task.name: task.benchmarks for task in recipe_file.load(other).tasks}
        if not asked.keys() & others.keys():
            raise UserError(
                f"--recipe {other} has the tasks {', '.join(others)}, {run} has {', '.join(asked)}: none in common"
            )
        asked = {name: others[name] for name in asked if name in others}
        recipe = only(recipe, list(asked))
    if tasks:
        recipe = only(recipe, list(tasks))
    if benchmarks:
        known = [benchmark.name for task in recipe.tasks for benchmark in asked[task.name]]
        for name in benchmarks:
            if name not in known:
                raise UserError(f"--benchmark {name!r} is not there: choose of {', '.join(known) or 'none'}")
        asked = {task: [b for b in of_task if b.name in benchmarks] for task, of_task in asked.items()}
    if not any(asked[task.name] for task in recipe.tasks):
        raise UserError(f"{run}: no benchmarks for {', '.join(t.name for t in recipe.tasks)}: give --recipe")
    chosen = [dataclasses.replace(task, benchmarks=asked[task.name]) for task in recipe.tasks]
    evaluation = dataclasses.replace(recipe.evaluation, best=None)  # may be of a benchmark that is not there
    return dataclasses.replace(recipe, tasks=chosen, evaluation=evaluation)
