"""What the images that a dense path learned from may be used for."""

import re
from pathlib import Path
from typing import NamedTuple

from ufo_ds.checkpoint import Index, Reader
from ufo_ds.errors import UserError
from ufo_ds.model.spec import SubnetSpec
from ufo_ds.recipe import Recipe

UNKNOWN = "unknown"
# By SPDX identifier or as people write it. What is not among them, whoever wrote it, is not taken to permit anything.
_COMMERCIAL = re.compile(
    r"(MIT|Apache([- ]Licen[cs]e)?(,? version)?|BSD([- ][23][- ]clause)?|ISC|zlib|Unlicense|CC0|PDDL|ODC[- ]By|ODbL"
    r"|CC[- ]BY([- ]SA)?|public domain)([- ]v?\d(\.\d)?)?(?![\w-])",
    re.IGNORECASE,
)
_LIMITED = re.compile(r"\bNC\b|\bND\b|non-?commercial|no derivatives|research|academic", re.IGNORECASE)


class Origin(NamedTuple):
    """Where the weights of a run come from, as its checkpoints say it, see :class:`Index`."""

    licences: dict[str, list[str]]
    started_from: str = ""


def origin(licences: dict[str, list[str]], last: Index | None, first: Path | None) -> Origin:
    """
    Args:
        licences: of the images that a run is trained on, by task.
        last: of the checkpoint from which it goes on.
        first: the checkpoint of another run from which it starts.
    """
    if last is not None:
        return Origin(_both(licences, last.licences), last.started_from)
    if first is not None:
        reader = Reader(first)
        return Origin(_both(licences, _inherited(reader.index, reader.recipe, list(licences))), str(first))
    return Origin(licences)


def _both(some: dict[str, list[str]], others: dict[str, list[str]]) -> dict[str, list[str]]:
    tasks = dict.fromkeys([*some, *others])
    return {task: list(dict.fromkeys([*some.get(task, []), *others.get(task, [])])) for task in tasks}


def _inherited(index: Index, recipe: Recipe, tasks: list[str]) -> dict[str, list[str]]:
    """Of the images behind what another run, of these tasks, starts from."""
    found = {task: of_task(index, task) for task in trained(index, recipe)}
    for task in tasks:
        if task in index.added:
            found[task] = [name for behind in (task, *index.added[task]["behind"]) for name in of_task(index, behind)]
    if recipe.model.branch_at is not None:  # own copies have learned from the images of all tasks
        everything = dict.fromkeys(licence for names in found.values() for licence in names)
        found = {task: list(everything) for task in found}
    if recipe.model.init is not None and not index.started_from:
        found = {task: [*names, UNKNOWN] for task, names in found.items()}
    return found


def behind(index: Index, recipe: Recipe, spec: SubnetSpec) -> dict[str, list[str]]:
    """Licences of the images by task, of all tasks that had a part in the weights of a path.

    Own copies and heads learn from their task's images alone. A shared copy learns from those of all tasks; so did an
    own one that started as the shared one was (``model.branch_at``). A task that was added later has no part in any
    other's weights; its own path started from some.
    """
    if spec.task in index.added:
        return {task: of_task(index, task) for task in (spec.task, *index.added[spec.task]["behind"])}
    takes_shared = any("shared" in layers for layers in spec.routes.values())
    tasks = trained(index, recipe) if takes_shared or recipe.model.branch_at else [spec.task]
    return {task: of_task(index, task) for task in tasks}


def trained(index: Index, recipe: Recipe) -> list[str]:
    """All tasks that a checkpoint was trained on jointly; some may not be in it any more."""
    names = dict.fromkeys([*(task.name for task in recipe.tasks), *index.licences])
    return [name for name in names if name not in index.added]


def of_task(index: Index, task: str) -> list[str]:
    return index.licences.get(task) or [UNKNOWN]


def permits_commercial_use(licence: str) -> bool:
    """Whether a licence is known to permit it, by its name at the beginning of the text."""
    return _COMMERCIAL.match(licence) is not None and not _LIMITED.search(licence)


def check_commercial_use(index: Index, recipe: Recipe, spec: SubnetSpec) -> None:
    """
    Raises:
        UserError: images behind the weights of a path have a licence that is not known to permit commercial use, or the
            model did not start from scratch.
    """
    if recipe.model.init is not None and not index.started_from:
        raise UserError(
            f"--allow commercial: {spec.task} started from {recipe.model.init!r}, whose images are not known: "
            "train from scratch, or look into it yourself"
        )
    for task, licences in behind(index, recipe, spec).items():
        for licence in licences:
            if not permits_commercial_use(licence):
                whose = task if task == spec.task else f"{task} (which shares weights with {spec.task})"
                raise UserError(
                    f"--allow commercial: the licence {licence!r} of the images of {whose} is not known to permit it: "
                    "train without them, or look into it yourself"
                )
