"""Benchmarks scored by all ranks: each takes its share of them, and each benchmark is scored by one rank alone, so that
the number of ranks changes no digit."""

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from ufo_ds.errors import UserError
from ufo_ds.evaluation import benchmarks
from ufo_ds.evaluation.features import FeatureFiles, Predictions, TaskImages
from ufo_ds.evaluation.outcomes import Outcomes
from ufo_ds.parallel import ranks
from ufo_ds.recipe import Recipe


def score(
    recipe: Recipe,
    images: Mapping[str, TaskImages],
    predictions: Predictions,
    classes: Mapping[str, list[str]],
    without: Mapping[str, benchmarks.LeftOut] | None = None,
) -> dict[str, Outcomes]:
    """:func:`benchmarks.score`, complete on every rank.

    Raises:
        UserError: on all ranks, what any of them raises.
    """
    mine: dict[str, Outcomes] = {}
    problem = None
    try:
        mine = benchmarks.score(recipe, images, predictions, classes, without, ranks.this(), ranks.count())
    except UserError as error:
        problem = str(error)
    everyone = ranks.from_all((mine, problem))
    for _, problem in everyone:
        if problem is not None:
            raise UserError(problem)
    found = {key: outcomes for part, _ in everyone for key, outcomes in part.items()}
    keys = [f"{task.name}/{benchmark.name}" for task in recipe.tasks for benchmark in task.benchmarks]
    return {key: found[key] for key in keys}


@contextlib.contextmanager
def feature_files(scratch: Path | None = None) -> Iterator[FeatureFiles]:
    """A place for features, the same for all ranks, removed in the end.

    Args:
        scratch: a directory that all ranks see; default: where temporary files go.

    Raises:
        UserError: nothing can be written there.
    """
    place = None
    if ranks.this() == 0:
        try:
            place = tempfile.mkdtemp(prefix="ufo-features-", dir=scratch)
        except OSError as error:
            where = tempfile.gettempdir() if scratch is None else f"--scratch {scratch}"
            raise UserError(f"{where}: {error.strerror}: no place for features, choose another") from None
    files = FeatureFiles(Path(ranks.from_first(place)))
    try:
        yield files
    finally:
        if place is not None:
            files.remove()
