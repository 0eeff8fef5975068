"""The benchmarks of a task, on a model that is in memory."""

import tempfile
from dataclasses import replace
from pathlib import Path

from ufo_ds.data.shard_specs import is_here
from ufo_ds.errors import UserError
from ufo_ds.evaluation import benchmarks
from ufo_ds.evaluation.features import FeatureFiles, open_images, predict
from ufo_ds.evaluation.outcomes import Outcomes
from ufo_ds.recipe import Recipe
from ufo_ds.subnets.task_model import TaskModel


def here(recipe: Recipe) -> Recipe:
    """Without the benchmarks whose images are not on this machine."""
    (task,) = recipe.tasks
    kept = [b for b in task.benchmarks if all(is_here(directory) for directory in b.parts.values())]
    evaluation = replace(recipe.evaluation, best=None)  # may be of another task
    return replace(recipe, tasks=[replace(task, benchmarks=kept)], evaluation=evaluation)


def measure(model: TaskModel, recipe: Recipe) -> dict[str, Outcomes]:
    """Outcomes by ``task/benchmark``.

    Args:
        recipe: of the model's task, with the benchmarks that are :func:`here`.

    Raises:
        UserError: damaged images, or a benchmark that does not go with the model.
    """
    if not recipe.tasks[0].benchmarks:
        return {}
    images, classes = open_images(recipe), {model.task: model.classes}
    benchmarks.check(recipe, images, classes)
    try:
        with tempfile.TemporaryDirectory(prefix="ufo-features-") as directory:
            files, mine = FeatureFiles(Path(directory)), images[model.task]
            batch, workers = recipe.evaluation.batch_size, recipe.data.workers
            ranges = {model.task: range(len(mine))}
            predict(model.forward, {model.task: mine}, ranges, batch, workers, files, quiet=True)
            return benchmarks.score(recipe, images, files.read(images), classes)
    except OSError as error:
        raise UserError(f"{tempfile.gettempdir()}: {error.strerror}: no place for features: set TMPDIR") from None
