"""Subnets of several tasks over one shared copy.

The directory is a checkpoint like those of training, of a supernet that has these tasks alone and of every size just
the largest that one of them keeps, without copies that no route takes; ``specs`` of its index say each task's path. So
whatever works with a run's checkpoint works with it: ``ufo evaluate``, ``ufo predict``, ``ufo extract``. What several
tasks share is there once.
"""

import dataclasses
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ufo_ds.checkpoint import Index, Parameter, Reader, checksum, write_index, write_tensors, write_text
from ufo_ds.errors import UserError
from ufo_ds.model.architecture import Architecture
from ufo_ds.model.dense import leading, path_names
from ufo_ds.model.loading import check_path, routes_to
from ufo_ds.model.spec import SubnetSpec
from ufo_ds.model.supernet import Supernet
from ufo_ds.recipe import Recipe, only
from ufo_ds.recipe_file import dump
from ufo_ds.recipe_model import Backbone
from ufo_ds.subnets import licences
from ufo_ds.subnets.model_card import joint_card
from ufo_ds.subnets.weights import Statistics, read, state_of

WEIGHTS = "model.safetensors"


def extract(reader: Reader, specs: list[SubnetSpec], out: Path, statistics: Statistics) -> int:
    """Write the subnets of several tasks, one of each. Only what they need is read, twice, one tensor at a time.
    Returns the number of parameters: of all that is there, margin heads and what own copies have beyond their subnet's
    sizes too, unlike :func:`ufo_ds.model.cost.joint_cost`.

    Args:
        statistics: of all their necks that need some; see :func:`recalibration.statistics`.

    Raises:
        UserError: ``out`` exists, or a path does not fit the model, or what is read is damaged.
    """
    for spec in specs:
        check_path(reader, spec)
    if out.exists():
        raise UserError(f"--out {out} exists: choose another directory or delete it")
    recipe = restricted(reader.recipe, specs)
    classes = {spec.task: reader.index.classes[spec.task] for spec in specs}
    with torch.device("meta"):
        model = Supernet(recipe, {task: len(names) for task, names in classes.items()})
    units = [f"{unit}." for spec in specs for unit, _ in path_names(spec)] + [f"heads.{task}." for task in classes]
    shapes = {name: value.shape for name, value in model.named_parameters() if name.startswith(tuple(units))}
    widths = {spec.task: spec.architecture.dim for spec in specs}
    buffers = {
        name: torch.Size([widths[name.split(".")[1]]])
        for name, _ in model.named_buffers()
        if name in reader.index.buffers
    }
    whole, stored = reader.recipe.model.backbone, partial(read, reader, statistics)
    keys = {f"{name}|weight": (shape.numel(),) for name, shape in shapes.items()} | buffers
    index = Index(
        step=reader.index.step,
        recipe=dump(recipe),
        classes=classes,
        routes={spec.task: routes_to(recipe.model.backbone.depth, spec) for spec in specs},
        licences={name: licences.of_task(reader.index, name) for name in licences.trained(reader.index, reader.recipe)},
        started_from=reader.index.started_from,
        specs={spec.task: asdict(spec) for spec in specs},
        parameters={
            name: Parameter(list(shape), ["weight"], [(0, 0, shape.numel())]) for name, shape in shapes.items()
        },
        buffers=dict.fromkeys(buffers, 0),
    )

    def tensors() -> Iterator[Tensor]:
        yield from (sliced(name, stored(name), shape, whole).flatten() for name, shape in shapes.items())
        yield from (leading(stored(name), *shape) for name, shape in buffers.items())

    unfinished = out.with_name(f".{out.name}.partial")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        checksums = dict(zip(keys, map(checksum, tensors()), strict=True))
        entry = write_tensors(unfinished / WEIGHTS, keys, tensors(), checksums)
        parameters = sum(shape.numel() for shape in shapes.values())
        write_text(unfinished / "README.md", joint_card(reader, specs, parameters))
        write_index(unfinished, index, [entry])
        unfinished.rename(out)
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}: choose a directory with room that you can write to") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return parameters


def restricted(recipe: Recipe, specs: list[SubnetSpec]) -> Recipe:
    """The recipe of a model that has just room for these paths.

    Raises:
        UserError: of two stems each has layers wider than the other's, in a way that no stem has room for both.
    """
    recipe, backbone = only(recipe, [spec.task for spec in specs]), recipe.model.backbone
    kept = [spec.architecture for spec in specs]
    dim, depth = max(a.dim for a in kept), max(a.depth for a in kept)
    hidden = [max(a.hidden[i] for a in kept if a.depth > i) for i in range(depth)]
    backbone = dataclasses.replace(
        backbone,
        name="custom",
        dim=dim,
        depth=depth,
        heads=[max(a.heads[i] for a in kept if a.depth > i) for i in range(depth)],
        head_dim=backbone.head_width,
        mlp_ratio=[width / dim for width in hidden],
        stem=[max(widths) for widths in zip(*(a.stem for a in kept), strict=True)],
    )
    assert backbone.hidden_L == hidden
    if not all(a.fits(Architecture.of(backbone)) for a in kept):
        raise UserError(f"stems {', '.join(str(list(a.stem)) for a in kept)} do not go into one: extract them alone")
    experts = [unit for unit in recipe.model.experts if any("own" in spec.routes[unit] for spec in specs)]
    model = dataclasses.replace(recipe.model, backbone=backbone, experts=experts, routes={}, elastic=None)
    routes: dict[str, Any] = {spec.task: routes_to(depth, spec) for spec in specs}
    tasks = [dataclasses.replace(task, routes=routes[task.name]) for task in recipe.tasks]
    return dataclasses.replace(recipe, model=model, tasks=tasks)


def sliced(name: str, value: Tensor, shape: torch.Size, whole: Backbone) -> Tensor:
    """The leading slice of a parameter that a narrower supernet has in its place."""
    part = name.split(".")[-2]
    if part == "qkv":  # of queries, keys and values the leading heads each
        return leading(value.unflatten(0, (3, -1)), 3, shape[0] // 3, *shape[1:]).flatten(0, 1)
    if part == "patch" and len(shape) == 2:  # of what a patch's pixels have become the leading channels
        channels = [3, *whole.stem][-1]
        return leading(value.unflatten(1, (channels, -1)), shape[0], shape[1] * channels // value.shape[1]).flatten(1)
    return leading(value, *shape)


def verify(reader: Reader, specs: list[SubnetSpec], directory: Path, statistics: Statistics) -> None:
    """Whether every task's dense model is the same to the bit, cut out of the directory or of where it is from.

    Raises:
        UserError: one is not.
    """
    joint = Reader(directory)
    for spec in specs:
        wanted, found = state_of(reader, spec, statistics), state_of(joint, spec)
        for name, value in wanted.items():
            if not torch.equal(found[name], value):
                raise UserError(f"{directory}: {name} of {spec.task} is not that of the run: extract it again")
