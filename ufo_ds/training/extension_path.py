"""The path of a task that is added to a trained supernet: which copies it shares, which become its own, and what those
start from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor

from ufo_ds.checkpoint import Reader
from ufo_ds.errors import UserError
from ufo_ds.model.experts import OWN, SHARED, RoutedUnit
from ufo_ds.model.initialization import Values, start_values
from ufo_ds.model.layers import resize_position
from ufo_ds.model.loading import spec_of
from ufo_ds.model.parameters import address_of
from ufo_ds.model.spec import UNITS
from ufo_ds.model.supernet import Supernet
from ufo_ds.recipe import Recipe
from ufo_ds.recipe_model import number_of_routes
from ufo_ds.recipe_task import Unit

PARTS = ("head", "norms", "ffn", "last", "embed")
Routes = dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class ExtensionPath:
    """
    Attributes:
        start: the copies that it starts from, as routes of the task ``like``, or of no task in particular.
        trained: the layers of each unit that the task trains.
    """

    like: str | None
    start: Routes
    trained: Mapping[str, frozenset[int]]

    @property
    def routes(self) -> Routes:
        """Its own are those that it trains, and those that were not shared where it starts from."""
        return {
            unit: tuple(OWN if i in self.trained[unit] else route for i, route in enumerate(self.start[unit]))
            for unit in UNITS
        }

    @property
    def units(self) -> list[Unit]:
        """Those of which it has own copies."""
        return [unit for unit in get_args(Unit) if OWN in self.routes[unit]]

    def is_trained(self, name: str) -> bool:
        """Whether a parameter of the task's path is; ``name`` as in the supernet."""
        address = address_of(name)
        return (
            address.unit in ("head", "neck")
            or address.layer % len(self.start[address.unit]) in self.trained[address.unit]
        )


def find_path(reader: Reader, like: str | None, parts: Sequence[str], last_blocks: int | None) -> ExtensionPath:
    """
    Args:
        parts: of :data:`PARTS`.
        last_blocks: how many blocks "last" means; default: a quarter of them.

    Raises:
        UserError: the start has copies that no task of the run has trained.
    """
    depth = reader.recipe.model.backbone.depth
    start = shared_path(reader) if like is None else spec_of(reader, like).routes
    return ExtensionPath(like, start, trained_layers(depth, parts, last_blocks))


def trained_layers(depth: int, parts: Sequence[str], last_blocks: int | None) -> dict[str, frozenset[int]]:
    """Per unit the layers that these parts are."""
    count = max(1, round(depth / 4)) if last_blocks is None else last_blocks
    if count > depth:
        raise UserError(f"--last_blocks {count}: the model has {depth} blocks")
    last = set(range(depth - count, depth)) if "last" in parts else set()
    every = set(range(depth))
    return {
        "embed": frozenset({0} if "embed" in parts else ()),
        "norm": frozenset({*every, depth} if "norms" in parts else {*last, depth} if last else ()),
        "attn": frozenset(last),
        "ffn": frozenset(every if "ffn" in parts else last),
    }


def everything(recipe: Recipe) -> ExtensionPath:
    """A path that trains all and starts from nothing."""
    depth = recipe.model.backbone.depth
    start = {unit: (SHARED,) * number_of_routes(unit, depth) for unit in UNITS}
    return ExtensionPath(None, start, trained_layers(depth, PARTS, depth))


def shared_path(reader: Reader) -> Routes:
    """All shared copies.

    Raises:
        UserError: one of them serves no task of the run, so that it has learned nothing, or not to the end.
    """
    recipe = reader.recipe
    routes = [spec_of(reader, task.name).routes for task in recipe.tasks if task.name not in reader.index.added]
    for unit in UNITS:
        for layer in range(number_of_routes(unit, recipe.model.backbone.depth)):
            if not recipe.model.shared_samples and all(of_task[unit][layer] == OWN for of_task in routes):
                where = "" if unit == "embed" else f" in layer {layer}"
                raise UserError(
                    f"{reader.directory}: the shared {unit}{where} serves no task of the run, so a new one cannot "
                    f"start from it: start from a task's path with --like {recipe.tasks[0].name}"
                )
    return {unit: (SHARED,) * number_of_routes(unit, recipe.model.backbone.depth) for unit in UNITS}


def build(
    recipe: Recipe, num_classes: int, reader: Reader, path: ExtensionPath, scratch: bool, device: torch.device | str
) -> Supernet:
    """The new task's path with a new head, ready to be trained: only what the path trains has gradients.

    Args:
        recipe: of the new task alone, with the routes of the path.
        scratch: draw all values in place of the run's.
    """
    (task,) = recipe.tasks
    with torch.device("meta"):
        model = Supernet(recipe, {task.name: num_classes})
    for module in list(model.modules()):
        if isinstance(module, RoutedUnit):
            module.drop_unused()
    model.to_empty(device=device)
    model.fill_constants()
    drawn, read = start_values(recipe), partial(_start, reader, path, task.name, task.input)
    for name, parameter in model.named_parameters():
        is_new = scratch or address_of(name).unit in ("head", "neck")
        with torch.no_grad():
            parameter.copy_(_whole(drawn, name, parameter) if is_new else read(name))
        parameter.requires_grad_(path.is_trained(name))
    return model


def _whole(values: Values, name: str, parameter: Tensor) -> Tensor:
    return values(name, parameter.shape, range(parameter.numel())).view(parameter.shape)


def _start(reader: Reader, path: ExtensionPath, task: str, input_hw: tuple[int, int], name: str) -> Tensor:
    """What a parameter of the path starts as: the copy that it replaces, a position embedding resized to its grid."""
    address = address_of(name)
    if address.owner is None:
        return reader.parameter(name)
    is_own = path.start[address.unit][address.layer] == OWN
    value = reader.parameter(name.replace(f".own.{task}.", f".own.{path.like}." if is_own else ".shared."))
    if name.endswith(".position"):
        recipe = reader.recipe
        base = recipe.model.input or recipe.tasks[0].input
        if is_own:
            base = next(t.input for t in recipe.tasks if t.name == path.like)
        patch = recipe.model.backbone.patch_size
        value = resize_position(value, (base[0] // patch, base[1] // patch),
                                (input_hw[0] // patch, input_hw[1] // patch))  # fmt: skip
    return value


def as_routes(routes: Routes) -> dict[Any, Any]:
    """For a recipe's task."""
    return {unit: list(layers) for unit, layers in routes.items()}
