"""SubnetSpec: the one description of a dense path through the supernet."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ufo_ds.errors import UserError
from ufo_ds.recipe import Recipe, number_of_routes

UNITS = ("embed", "norm", "attn", "ffn")


@dataclass(frozen=True)
class SubnetSpec:
    """For one task and each unit, the copy used in every layer: ``"shared"`` or ``"own"``.

    ``routes["ffn"][i]`` and ``routes["attn"][i]`` belong to block i, ``routes["norm"][i]`` to both norms of block i
    (the last entry to the final norm), ``routes["embed"]`` has one entry.
    """

    task: str
    routes: dict[str, tuple[str, ...]]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2)

    @classmethod
    def from_values(cls, values: Any, source: str) -> "SubnetSpec":
        """Check plain values, of a JSON file for instance.

        Raises:
            UserError: a key that is missing or unknown, or a route that is neither shared nor own.
        """
        if not isinstance(values, dict) or set(values) != {"task", "routes"}:
            raise UserError(f"{source} is no subnet spec: it needs the keys task and routes, nothing else")
        routes = values["routes"]
        if not isinstance(routes, dict) or set(routes) != set(UNITS):
            raise UserError(f"{source}: routes needs the units {', '.join(UNITS)}")
        for unit, layers in routes.items():
            if not isinstance(layers, list):
                raise UserError(f"{source}: routes of {unit} are {layers!r}: give a list, one route a layer")
            for layer in layers:
                if layer not in ("shared", "own"):
                    raise UserError(f"{source}: route {layer!r} of {unit}: use shared or own")
        return cls(str(values["task"]), {unit: tuple(layers) for unit, layers in routes.items()})

    @classmethod
    def load(cls, path: Path) -> "SubnetSpec":
        try:
            values = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"{path} is no subnet spec: {error}") from None
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
