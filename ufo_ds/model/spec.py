"""SubnetSpec: the one description of a dense path through the supernet."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ufo_ds.errors import UserError
from ufo_ds.model.architecture import Architecture
from ufo_ds.recipe import Recipe
from ufo_ds.recipe_model import number_of_routes

UNITS = ("embed", "norm", "attn", "ffn")


@dataclass(frozen=True)
class SubnetSpec:
    """For one task and each unit, the copy used in every layer: ``"shared"`` or ``"own"``; and how much of it.

    ``routes["ffn"][i]`` and ``routes["attn"][i]`` belong to block i, ``routes["norm"][i]`` to both norms of block i
    (the last entry to the final norm), ``routes["embed"]`` has one entry. Only blocks that are kept have routes.
    """

    task: str
    routes: dict[str, tuple[str, ...]]
    architecture: Architecture

    @property
    def name(self) -> str:
        """Short, and another one for every other spec: ``person-4x144-9f2c61ab`` has 4 blocks of width 144."""
        text = json.dumps(asdict(self), sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        return f"{self.task}-{self.architecture.depth}x{self.architecture.dim}-{digest}"

    def sliced(self, architecture: Architecture) -> "SubnetSpec":
        """A smaller one on the same path."""
        depth = architecture.depth
        routes = {unit: layers[:depth] for unit, layers in self.routes.items() if unit in ("attn", "ffn")}
        norms = (*self.routes["norm"][:depth], self.routes["norm"][-1])
        return SubnetSpec(self.task, {"embed": self.routes["embed"], "norm": norms, **routes}, architecture)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2)

    @classmethod
    def from_values(cls, values: Any, source: str) -> "SubnetSpec":
        """Check plain values, of a JSON file for instance.

        Raises:
            UserError: a key that is missing or unknown, a route that is neither shared nor own, or a size that is none.
        """
        if not isinstance(values, dict) or set(values) != {"task", "routes", "architecture"}:
            raise UserError(f"{source} is no subnet spec: it needs the keys task, routes, architecture, nothing else")
        architecture = Architecture.from_values(values["architecture"], source)
        routes = values["routes"]
        if not isinstance(routes, dict) or set(routes) != set(UNITS):
            raise UserError(f"{source}: routes needs the units {', '.join(UNITS)}")
        for unit, layers in routes.items():
            if not isinstance(layers, list):
                raise UserError(f"{source}: routes of {unit} are {layers!r}: give a list, one route a layer")
            for layer in layers:
                if layer not in ("shared", "own"):
                    raise UserError(f"{source}: route {layer!r} of {unit}: use shared or own")
        return cls(str(values["task"]), {unit: tuple(routes[unit]) for unit in UNITS}, architecture)

    @classmethod
    def load(cls, path: Path) -> "SubnetSpec":
        try:
            values = json.loads(path.read_text())
        except (OSError, ValueError, RecursionError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise UserError(f"{path} is no subnet spec ({reason}): give one of `ufo search` or `ufo extract`") from None
        return cls.from_values(values, str(path))


def routes_of(recipe: Recipe, task: str) -> dict[str, tuple[str, ...]]:
    """The routes that a recipe gives a task, per unit and layer: shared, own or learned."""
    model = recipe.model
    found: dict[Any, Any] = dict(model.routes)
    found.update(next(t for t in recipe.tasks if t.name == task).routes)
    routes = {}
    for unit in UNITS:
        default = "own" if unit in model.experts else "shared"
        route = found.get(unit, default)
        layers = number_of_routes(unit, model.backbone.depth)
        routes[unit] = tuple(route) if isinstance(route, list) else (route,) * layers
    return routes


def with_routes(recipe: Recipe, found: Mapping[str, Mapping[str, Sequence[str]]]) -> Recipe:
    """The recipe with ``found[task][unit]`` in place of its learned routes, where it has as many layers."""
    tasks = []
    for task in recipe.tasks:
        routes: dict[Any, Any] = dict(task.routes)
        for unit, asked in routes_of(recipe, task.name).items():
            layers = found.get(task.name, {}).get(unit, asked)
            if len(layers) == len(asked):
                decided = tuple(b if a == "learned" else a for a, b in zip(asked, layers, strict=True))
                routes |= {unit: list(decided)} if decided != asked else {}
        tasks.append(dataclasses.replace(task, routes=routes))
    return dataclasses.replace(recipe, tasks=tasks)
