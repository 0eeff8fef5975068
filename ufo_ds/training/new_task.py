"""A task that is not in a recipe yet: from a directory of shards and a protocol."""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from ufo_ds.data.manifest import MANIFEST
from ufo_ds.data.shards import ShardSet
from ufo_ds.errors import UserError
from ufo_ds.recipe import Recipe
from ufo_ds.recipe_benchmark import Benchmark, Protocol
from ufo_ds.recipe_task import BinaryCrossEntropy, CosFace, CrossEntropy, Head, Loss, Task, TrainSet, Triplet

BATCH, IMAGES_PER_IDENTITY = 32, 4
# Where each protocol's shards are looked for in the directory: the first of these that are all there.
_PLACES: dict[str, tuple[dict[str, str], ...]] = {
    "retrieval": ({"query": "query", "gallery": "gallery"},),
    "identification": ({"query": "query", "gallery": "gallery"},),
    "verification": ({"shards": "pairs"},),
    "templates": ({"shards": "templates"}, {"shards": "test"}, {"shards": "val"}),
    "recall": ({"shards": "test"}, {"shards": "val"}, {"query": "query", "gallery": "gallery"}),
}
_TESTED: tuple[dict[str, str], ...] = ({"shards": "test"}, {"shards": "val"})  # of the others


def train_shards(data: Path) -> Path:
    """
    Raises:
        UserError: neither the directory nor ``train`` in it was made by ``ufo shards``.
    """
    for directory in (data / "train", data):
        if (directory / MANIFEST).is_file():
            return directory
    raise UserError(f"--data {data}: neither it nor {data / 'train'} has a {MANIFEST}: make it with `ufo shards`")


def name_for(data: Path) -> str:
    """The default name of a task: that of its directory.

    Raises:
        UserError: that is no name for a task.
    """
    name = re.sub(r"\W", "_", data.resolve().name.lower())
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise UserError(f"--data {data}: {name!r} is no name for a task: give one with --task")
    return name


def benchmarks_of(data: Path, name: str, protocol: Protocol) -> list[Benchmark]:
    """The one benchmark for whose protocol the directory has shards, or none."""
    for places in _PLACES.get(protocol, _TESTED):
        if all((data / place / MANIFEST).is_file() for place in places.values()):
            found: dict[str, Any] = {key: str(data / place) for key, place in places.items()}
            return [Benchmark(name=name, protocol=protocol, **found)]
    return []


def template_of(recipe: Recipe, protocol: Protocol, like: str | None) -> Task | None:
    """The task that a new one takes its settings from: ``like``, or the first whose head is of the protocol's kind.

    Raises:
        UserError: no task ``like``.
    """
    if like is not None:
        return task_of(recipe, like)
    return next((task for task in recipe.tasks if _kind(task) == kind_of(protocol)), None)


def task_of(recipe: Recipe, like: str) -> Task:
    """The task that ``--like`` names.

    Raises:
        UserError: there is none.
    """
    found = next((task for task in recipe.tasks if task.name == like), None)
    if found is None:
        raise UserError(f"--like {like!r} is no task of this run: it has {', '.join(t.name for t in recipe.tasks)}")
    return found


def kind_of(protocol: Protocol) -> str:
    return protocol if protocol in ("classification", "attributes") else "margin"


def _kind(task: Task) -> str:
    if task.head.type == "margin":
        return "margin"
    return "attributes" if task.loss.multi_label else "classification"


def make_task(name: str, data: Path, protocol: Protocol, recipe: Recipe, template: Task | None) -> Task:
    """A task whose head and loss follow from the protocol, and the rest from ``template``, losses too where that has
    the same kind of head.

    Raises:
        UserError: no shards to train on, or a name that is none.
    """
    train = train_shards(data)
    kind = kind_of(protocol)
    head = Head(type="margin" if kind == "margin" else "linear", neck=kind == "classification")
    same = template is not None and _kind(template) == kind
    if same:
        assert template is not None
        head = dataclasses.replace(template.head, sharded=False)
    has_pairs = kind == "margin" and _has_pairs([ShardSet.open(train, recipe.data.shard_cache)])
    loss = template.loss if same and template is not None else _loss(kind, has_pairs)
    wants_pk = loss.triplet is not None or (same and template is not None and bool(template.identities_per_step))
    if not has_pairs:
        loss, wants_pk = dataclasses.replace(loss, triplet=None), False
    samples, each = BATCH, IMAGES_PER_IDENTITY
    if template is not None:
        samples = template.samples_per_step
        each = samples // template.identities_per_step if template.identities_per_step else IMAGES_PER_IDENTITY
    if template is None:
        values: dict[str, Any] = {"input": recipe.model.input or recipe.tasks[0].input}
    else:
        augment = template.augment
        if augment.mixes and (kind == "margin" or loss.triplet is not None):
            augment = dataclasses.replace(augment, mixup=None, cutmix=None)
        turns = template.quarter_turns and kind == "margin"
        values = {"input": template.input, "augment": augment, "quarter_turns": turns}
    if wants_pk:
        values["identities_per_step"] = max(2, samples // each)
        samples = values["identities_per_step"] * each
    try:
        return Task(
            name=name, head=head, loss=loss, samples_per_step=samples, train=[TrainSet(shards=str(train))],
            benchmarks=benchmarks_of(data, name, protocol), **values,
        )  # fmt: skip
    except ValidationError as error:
        fault = error.errors()[0]
        raise UserError(f"task {name!r}: {'.'.join(map(str, fault['loc']))}: {fault['msg']}") from None


def _loss(kind: str, has_pairs: bool) -> Loss:
    if kind == "classification":
        return Loss(cross_entropy=CrossEntropy(label_smoothing=0.1))
    if kind == "attributes":
        return Loss(binary_cross_entropy=BinaryCrossEntropy())
    return Loss(cosface=CosFace(), triplet=Triplet() if has_pairs else None)


def _has_pairs(sets: Sequence[ShardSet]) -> bool:
    """Whether half of the identities or more have two images: what a triplet loss learns from."""
    counts = np.concatenate([np.unique(shards.labels, return_counts=True)[1] for shards in sets])
    return bool((counts >= 2).mean() >= 0.5)


def fitted(task: Task, sets: Sequence[ShardSet], batch_size: int | None) -> Task:
    """The task with ``batch_size`` samples in a step, or as many as its images allow.

    Raises:
        UserError: fewer than two classes or identities, or a batch that does not go with its images of an identity.
    """
    images = sum(map(len, sets))
    present = sum(len(np.unique(shards.labels)) for shards in sets)
    if task.head.type == "linear" and not task.loss.multi_label:
        present = len({shards.classes[label] for shards in sets for label in np.unique(shards.labels)})
    if present < 2 and not task.loss.multi_label:
        kind = "identities" if task.head.type == "margin" else "classes"
        raise UserError(
            f"task {task.name}: {images} images of {present} of its {kind} to train on, at least 2 are needed: add "
            "shards or raise --fraction"
        )
    if images < 2:
        raise UserError(f"task {task.name}: {images} image to train on: add shards or raise --fraction")
    samples, identities = batch_size or task.samples_per_step, task.identities_per_step
    if identities is not None:
        each = task.samples_per_step // identities
        if samples % each or samples < 2 * each:
            raise UserError(
                f"--batch_size {samples}: task {task.name} takes {each} images of an identity: give a multiple of "
                f"that, {2 * each} or more"
            )
        turned = present * (4 if task.quarter_turns else 1)
        identities = min(samples // each, turned)
        return dataclasses.replace(task, samples_per_step=identities * each, identities_per_step=identities)
    return dataclasses.replace(task, samples_per_step=min(samples, images))
