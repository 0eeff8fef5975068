"""The benchmarks of a model's task, on a model that is in memory."""

import tempfile
from dataclasses import replace
from pathlib import Path

from ufo_ds.data.shard_specs import is_here
from ufo_ds.errors import UserError
from ufo_ds.evaluation import benchmarks, outcomes
from ufo_ds.evaluation.features import FeatureFiles, open_images, predict
from ufo_ds.subnets.task_model import TaskModel


def metrics_of(model: TaskModel) -> dict[str, float]:
    """By ``task/benchmark/metric``, of the benchmarks whose images are on this machine.

    Raises:
        UserError: damaged images, or a benchmark that does not go with the model.
    """
    (task,) = model.recipe.tasks
    here = [b for b in task.benchmarks if all(is_here(directory) for directory in b.parts.values())]
    evaluation = replace(model.recipe.evaluation, best=None)  # may be of another task
    recipe = replace(model.recipe, tasks=[replace(task, benchmarks=here)], evaluation=evaluation)
    images, classes = open_images(recipe), {model.task: model.classes}
    if not images:
        return {}
    benchmarks.check(recipe, images, classes)
    try:
        with tempfile.TemporaryDirectory(prefix="ufo-features-") as directory:
            files, ranges = FeatureFiles(Path(directory)), {model.task: range(len(images[model.task]))}
            predict(model.forward, images, ranges, evaluation.batch_size, recipe.data.workers, files)
            return outcomes.flatten(benchmarks.score(recipe, images, files.read(images), classes))
    except OSError as error:
        raise UserError(f"{tempfile.gettempdir()}: {error.strerror}: no place for features: set TMPDIR") from None
