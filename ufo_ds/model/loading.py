"""A single-device supernet, with some or all of its tasks, out of a checkpoint of any topology."""

import dataclasses
from typing import Any

import torch

from ufo_ds.checkpoint import INDEX, Reader
from ufo_ds.errors import UserError
from ufo_ds.model.architecture import Architecture, SearchSpace
from ufo_ds.model.experts import RoutedUnit
from ufo_ds.model.router import Place
from ufo_ds.model.spec import UNITS, SubnetSpec, routes_of
from ufo_ds.model.supernet import Supernet
from ufo_ds.recipe import Recipe, only
from ufo_ds.recipe_model import number_of_routes


def load_supernet(reader: Reader, specs: list[SubnetSpec], device: torch.device | str = "cpu") -> Supernet:
    """What some tasks need of a checkpoint's supernet, on the given paths, in evaluation mode: copies and blocks
    that none of them takes are neither built nor read. The statistics of necks are those in the checkpoint.

    Raises:
        UserError: a task that the checkpoint lacks.
    """
    tasks = [spec.task for spec in specs]
    recipe = only(reader.recipe, tasks)
    for spec in specs:
        check_path(reader, spec)
        recipe = _with_routes(recipe, spec)
    with torch.device("meta"):
        model = Supernet(recipe, {task: len(reader.index.classes[task]) for task in tasks})
    del model.blocks[max(spec.architecture.depth for spec in specs) :]
    for module in list(model.modules()):
        if isinstance(module, RoutedUnit):
            module.drop_unused()
    model.architectures = {spec.task: spec.architecture for spec in specs}
    model.to_empty(device=device)
    model.fill_constants()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(reader.parameter(name))
        for name, buffer in model.named_buffers():
            if name in reader.index.buffers:
                value = reader.buffer(name)  # of a narrower subnet the leading ones
                buffer[: len(value)].copy_(value)
    return model.eval()


def spec_of(reader: Reader, task: str) -> SubnetSpec:
    """A task's path in a checkpoint, the whole one unless that has less of it. Routes still being learned go to the
    more probable copy.

    Raises:
        UserError: a task that the checkpoint lacks.
    """
    recipe = only(reader.recipe, [task])
    if task in reader.index.specs:
        return SubnetSpec.from_values(reader.index.specs[task], str(reader.directory / INDEX))
    routes = {unit: list(layers) for unit, layers in reader.index.routes[task].items()}
    # The router's rows are the routes that the recipe left to learning, in its order, frozen or not.
    asked: list[Place] = [
        (unit, i) for unit in UNITS for i, route in enumerate(routes_of(recipe, task)[unit]) if route == "learned"
    ]
    if any("learned" in layers for layers in routes.values()):
        logits_R2 = reader.parameter(f"router.logits.{task}")
        for (unit, i), (shared, own) in zip(asked, logits_R2.tolist(), strict=True):
            if routes[unit][i] == "learned":
                routes[unit][i] = "own" if own > shared else "shared"
    whole = Architecture.of(recipe.model.backbone)
    return SubnetSpec(task, {unit: tuple(routes[unit]) for unit in UNITS}, whole)


def check_path(reader: Reader, spec: SubnetSpec) -> None:
    """
    Raises:
        UserError: the checkpoint lacks the task; the path is no slice of the model, or outside of what its elastic
            sizes may be, or takes an own copy of a unit without experts.
    """
    model = only(reader.recipe, [spec.task]).model
    if not spec.architecture.fits(whole := Architecture.of(model.backbone)):
        raise UserError(f"spec of {spec.task}: {spec.architecture} is no slice of this model, {whole}")
    if model.elastic is not None:
        try:
            SearchSpace.of(model).levels(spec.architecture)
        except ValueError as error:
            raise UserError(f"spec of {spec.task} is outside of the recipe's model.elastic: {error}") from None
    for unit, layers in spec.routes.items():
        depth = spec.architecture.depth
        if len(layers) != (wanted := number_of_routes(unit, depth)):
            raise UserError(f"spec of {spec.task}: {len(layers)} routes of {unit} for {depth} blocks: give {wanted}")
        if "own" in layers and unit not in model.experts:
            raise UserError(f"spec of {spec.task}: {unit} is own, but this model has only a shared {unit}")


def routes_to(depth: int, spec: SubnetSpec) -> dict[str, list[str]]:
    """The routes of a path through a model of so many blocks. Those of blocks left out do not matter."""
    routes = {unit: list(layers) for unit, layers in spec.routes.items()}
    left_out = ["shared"] * (depth - spec.architecture.depth)
    routes["attn"] += left_out
    routes["ffn"] += left_out
    routes["norm"][-1:-1] = left_out  # the last one is that of the final norm
    return routes


def _with_routes(recipe: Recipe, spec: SubnetSpec) -> Recipe:
    """Learned routes are decided by now: no router is needed."""
    routes: dict[Any, Any] = {**routes_to(recipe.model.backbone.depth, spec)}
    tasks = [dataclasses.replace(t, routes=routes) if t.name == spec.task else t for t in recipe.tasks]
    return dataclasses.replace(recipe, tasks=tasks)
