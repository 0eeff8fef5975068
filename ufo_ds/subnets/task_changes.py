"""A task more or a task less in a checkpoint that is finished, without a change to any bit of the others.

Files of a checkpoint never change: what is new is in new files, and the index that takes them in replaces the old one
in one step. Before it does, every other task is compared with what it was (:mod:`ufo_ds.subnets.untouched`).
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from copy import deepcopy
from itertools import count
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from torch import Tensor

from ufo_ds import checkpoint, recipe_file
from ufo_ds.checkpoint import INDEX, Index, Parameter, Reader, checksum, write_tensors
from ufo_ds.errors import UserError
from ufo_ds.model.parameters import address_of
from ufo_ds.model.spec import routes_of
from ufo_ds.recipe import Recipe, only
from ufo_ds.recipe_file import dump, parse
from ufo_ds.recipe_task import Task, Unit
from ufo_ds.subnets import untouched

STAGED = ".changed"  # where the new index is checked; left over after a kill, it is harmless


def with_task(recipe: Recipe, task: Task, units: list[Unit]) -> Recipe:
    """The recipe with one more task that has own copies of these units; the others keep their routes.

    Raises:
        UserError: the task does not go with the recipe, or its name is taken.
    """
    if task.name in [t.name for t in recipe.tasks]:
        raise UserError(f"--task {task.name!r} is there already: choose another name, or `ufo remove` it first")
    new = [unit for unit in units if unit not in recipe.model.experts]
    routes: dict[Any, Any] = {**recipe.model.routes, **dict.fromkeys(new, "shared")}
    model = dataclasses.replace(recipe.model, experts=[*recipe.model.experts, *new], routes=routes)
    values = dump(dataclasses.replace(recipe, model=model))
    values["tasks"].append(TypeAdapter(Task).dump_python(task, mode="json"))
    return parse(values, f"task {task.name}")


def without_task(recipe: Recipe, name: str) -> Recipe:
    """The recipe without a task, and without experts of the units that all others share."""
    left = only(recipe, [task.name for task in recipe.tasks if task.name != name])
    given = recipe.model.input if recipe.tasks[0].name != name else left.model.input
    asked = [routes_of(left, task.name) for task in left.tasks]
    experts = [unit for unit in recipe.model.experts if any({*of_task[unit]} != {"shared"} for of_task in asked)]
    dropped = [unit for unit in recipe.model.experts if unit not in experts]  # their routes say nothing any more
    routes: dict[Any, Any] = {unit: route for unit, route in recipe.model.routes.items() if unit not in dropped}
    recipe = left
    best = recipe.evaluation.best
    if best is not None and best.startswith(f"{name}/"):
        recipe = dataclasses.replace(recipe, evaluation=dataclasses.replace(recipe.evaluation, best=None))
    return dataclasses.replace(
        recipe, model=dataclasses.replace(recipe.model, experts=experts, routes=routes, input=given)
    )


# --- changes ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def held(directory: Path) -> Iterator[None]:
    """Keep a checkpoint, and the run that it is of, from training and other changes.

    Raises:
        UserError: no permission to write there, or it is held by another process, or see :func:`check_changeable`.
    """
    run = run_of(directory)
    try:
        if not os.access(directory, os.W_OK | os.X_OK):
            raise PermissionError(0, "no permission to write there", str(directory))
        lock = ((run or directory) / ".lock").open("a")
    except OSError as error:
        raise UserError(
            f"{error.filename}: {error.strerror}: copy the run to where you can write, and change that"
        ) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{run or directory}: another process trains or changes it: wait until it is done"
            ) from None
        check_changeable(Reader(directory))
        settle(directory)
        yield


def run_of(directory: Path) -> Path | None:
    """The run directory of a checkpoint, if it lies in one."""
    parent = directory.resolve().parent
    return parent.parent if parent.name == "checkpoints" else None


def check_changeable(reader: Reader) -> None:
    """
    Raises:
        UserError: it holds subnets of several tasks, and no whole model.
    """
    if reader.index.specs:
        raise UserError(
            f"{reader.directory} holds subnets of {', '.join(reader.index.specs)} and no whole model: change the run "
            "that they are of, and extract them again"
        )


def check_name(index: Index, task: str) -> None:
    """
    Raises:
        UserError: the name is that of a task that was removed, but of which something is left.
    """
    if task in {*index.removed, *index.added} - {t["name"] for t in index.recipe["tasks"]}:
        raise UserError(
            f"--task {task!r} was removed, but what is left has learned from its images, whose licences are kept by "
            "that name: choose another"
        )


def add(
    directory: Path, task: Task, units: list[Unit], tensors: Mapping[str, Tensor], buffers: Mapping[str, Tensor],
    classes: list[str], routes: Mapping[str, list[str]], licences: list[str], about: dict[str, Any],
    metrics: Mapping[str, float],
) -> None:  # fmt: skip
    """Write a task that was trained into a checkpoint.

    Args:
        units: of which it has own copies.
        tensors: its own copies and its head, by name, fp32 on the CPU; ``buffers``: its neck's statistics.
        classes: names behind the head's rows.
        licences: of the images behind its weights.
        about: for :attr:`Index.added`.

    Raises:
        UserError: the name is taken, no room, or another task would not be the same: nothing has changed then.
    """
    reader = Reader(directory)
    check_changeable(reader)
    index = deepcopy(reader.index)
    check_name(index, task.name)
    index.recipe = dump(with_task(reader.recipe, task, units))
    flat = {f"{name}|weight": tensor.flatten() for name, tensor in tensors.items()} | dict(buffers)
    number = len(index.files)
    for name, tensor in tensors.items():
        index.parameters[name] = Parameter(list(tensor.shape), ["weight"], [(number, 0, tensor.numel())])
    index.buffers |= dict.fromkeys(buffers, number)
    index.classes[task.name], index.licences[task.name] = classes, licences
    index.routes[task.name] = {unit: list(layers) for unit, layers in routes.items()}
    index.added[task.name] = about
    index.metrics |= metrics
    path = directory / _free_name(index, f"task-{task.name}")
    with _writing(directory):
        checksums = {key: checksum(tensor) for key, tensor in flat.items()}
        shapes = {key: tensor.shape for key, tensor in flat.items()}
        entry = write_tensors(path, shapes, flat.values(), checksums)
        _publish(reader, index, [*index.files, entry], "extend", task.name)


def remove(directory: Path, task: str) -> None:
    """Take a task's tensors out of a checkpoint: its own copies, head, statistics, route logits, and all that the
    optimizer keeps of them. A file that only it has is deleted; one that holds others too is replaced, one tensor in
    memory at a time.

    Raises:
        UserError: no such task, it is the last one, no room, or another task would not be the same.
    """
    reader = Reader(directory)
    check_changeable(reader)
    names = [t.name for t in reader.recipe.tasks]
    if task not in names:
        raise UserError(f"--task {task!r} is not there: {directory} has {', '.join(names)}")
    if len(names) == 1:
        raise UserError(f"--task {task!r} is the only one in {directory}: one has to remain")
    index = deepcopy(reader.index)
    gone = {name for name in index.parameters if address_of(name).owner == task}
    gone |= {key for key in index.buffers if address_of(key.split("|")[0]).owner == task}
    index.parameters = {name: p for name, p in index.parameters.items() if name not in gone}
    index.buffers = {key: file for key, file in index.buffers.items() if key not in gone}
    index.recipe = dump(without_task(reader.recipe, task))
    _forget(index, task)
    with _writing(directory):
        _publish(reader, index, _without(reader, index, gone), "remove", task)


def _forget(index: Index, task: str) -> None:
    """What the index says of a task, but for the licences of images that others have learned from."""
    for values in (index.classes, index.routes):
        values.pop(task, None)
    index.metrics = {key: value for key, value in index.metrics.items() if not key.startswith(f"{task}/")}
    if task in index.added:  # no part of what training goes on with
        there = {t["name"] for t in index.recipe["tasks"]}
        behind = {name for t, about in index.added.items() if t in there for name in about["behind"]}
        for name in index.added.keys() - there - behind:
            del index.added[name]
            index.licences.pop(name, None)
        return
    index.licences.setdefault(task, [])  # what others share has learned from its images, whatever their licence
    index.router = {
        key: {t: v for t, v in value.items() if t != task} if isinstance(value, dict) else value
        for key, value in index.router.items()
    }
    index.balance, index.guard = {}, {}  # training does not go on from here
    index.removed.append(task)


def _without(reader: Reader, index: Index, gone: set[str]) -> list[dict[str, Any]]:
    """Write anew the files that hold something of what is gone; the files then, by which ``index`` is numbered."""
    number, files = dict[int, int](), list[dict[str, Any]]()
    for i, entry in enumerate(reader.index.files):
        tensors, checksums = reader.contents(i)
        kept = [key for key in tensors if key not in gone and key.rsplit("|", 1)[0] not in gone]
        if not kept and tensors:
            continue
        number[i] = len(files)
        if len(kept) < len(tensors):
            stem = entry["name"].removesuffix(".safetensors").split(".")[0]
            entry = write_tensors(
                reader.directory / _free_name(reader.index, stem),
                {key: tensors[key] for key in kept},
                (reader.stored(i, key) for key in kept),
                {key: value for key, value in checksums.items() if key in kept},
            )
        files.append(entry)
    for parameter in index.parameters.values():
        parameter.pieces = [(number[file], start, length) for file, start, length in parameter.pieces]
    index.buffers = {key: number[file] for key, file in index.buffers.items()}
    return files


def _free_name(index: Index, stem: str) -> str:
    """Of a file that the index does not have; what is left over of that name is overwritten."""
    used = {entry["name"] for entry in index.files}
    names = (f"{stem}{'' if n == 0 else f'.{n}'}.safetensors" for n in count())
    return next(name for name in names if name not in used)


def _publish(reader: Reader, index: Index, files: list[dict[str, Any]], change: str, task: str) -> None:
    """Have the index replace that of the reader, if all tasks that both have are the same.

    Raises:
        UserError: one is not.
    """
    directory, staged = reader.directory, reader.directory / STAGED
    others = [t.name for t in reader.recipe.tasks if t.name != task]
    try:
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir()
        for entry in files:
            (staged / entry["name"]).symlink_to(directory.resolve() / entry["name"])
        checkpoint.write_index(staged, index, files)
        before, after = untouched.digests(reader, others), untouched.digests(Reader(staged), others)
        difference = untouched.first_difference(Reader(staged), before, after)
        if difference is not None:
            raise UserError(f"{directory}: {change} of {task} is not published, as {difference}: nothing has changed")
        changes = directory / untouched.CHANGES
        earlier = changes.read_bytes() if changes.is_file() else b""
        line = json.dumps(untouched.line(change, task, after))
        checkpoint.write_bytes(changes, earlier + f"{line}\n".encode())
        os.replace(staged / INDEX, directory / INDEX)
        checkpoint.sync_directory(directory)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


@contextlib.contextmanager
def _writing(directory: Path) -> Iterator[None]:
    """Write files that an index may take in; in the end those that it does not have are gone."""
    try:
        try:
            yield
        finally:
            settle(directory)
    except OSError as error:
        raise UserError(
            f"{directory}: {error.strerror}: make room or get permission to write there, and try again"
        ) from None


def settle(directory: Path) -> None:
    """Finish what a kill may have left undone: delete the files of weights that the index does not have (any more), and
    have the recipe of the run, from which `ufo status` and `ufo report` know its tasks, name those of its best
    checkpoint."""
    reader = Reader(directory)
    used = {entry["name"] for entry in reader.index.files}
    for pattern in ("rank-*.safetensors", "task-*.safetensors"):
        for file in directory.glob(pattern):
            if file.name not in used:
                file.unlink()
    checkpoint.sync_directory(directory)
    run = run_of(directory)
    if run is None or not (run / "recipe.yaml").is_file() or checkpoint.of_run(run).name != directory.name:
        return
    recipe, found = recipe_file.load(str(run / "recipe.yaml")), reader.recipe
    if [task.name for task in recipe.tasks] != [task.name for task in found.tasks]:
        stays = {name: getattr(recipe, name) for name in ("schedule", "guard", "checkpoint", "logging")}
        checkpoint.write_text(run / "recipe.yaml", recipe_file.to_yaml(dataclasses.replace(found, **stays)))
