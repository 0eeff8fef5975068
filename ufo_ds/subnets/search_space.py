"""The subnets of an elastic model, of one task or of one of each of several, as rows of levels, and what they cost.

A task's levels are those of depth, width and stem, then of the heads of every block, then of its MLP ratio; those of
blocks that the depth leaves out are 0.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from ufo_ds.errors import UserError
from ufo_ds.model.architecture import Architecture, SearchSpace
from ufo_ds.model.cost import joint_cost, subnet_cost
from ufo_ds.model.spec import SubnetSpec
from ufo_ds.recipe import Recipe
from ufo_ds.subnets.predictor import Choices
from ufo_ds.subnets.search import Space

COSTS = ("parameters", "flops", "latency")
ONCE = 3  # depth, width, stem

Latency = Callable[[Sequence[Architecture]], np.ndarray]  # ms [N]


class ElasticSpace:
    """
    Args:
        whole: the whole path of each task.
        classes: of each task, how many.
        latency: of each task, where that is known.

    Raises:
        UserError: the model has no elastic sizes.
    """

    def __init__(
        self, recipe: Recipe, whole: Sequence[SubnetSpec], classes: Mapping[str, int], latency: Sequence[Latency] = ()
    ):
        self.recipe, self.whole, self.classes, self.latency = recipe, whole, classes, latency
        self.sizes = SearchSpace.of(recipe.model)
        sizes = self.sizes
        self._once = [len(choices) - 1 for choices in (sizes.depth, sizes.dim, sizes.stem)]
        self._layers = [len(choices) - 1 for choices in (sizes.heads, sizes.mlp_ratio)]
        self._blocks = sizes.depth[-1]
        self.width = ONCE + 2 * self._blocks
        self.parts = [slice(t * self.width, (t + 1) * self.width) for t in range(len(whole))]
        self._known_costs: dict[bytes, tuple[float, float]] = {}

    def searched(self, objectives: Sequence[str], limits: Mapping[str, float]) -> Space:
        """As :mod:`ufo_ds.subnets.search` takes it; latency is a cost where it is known."""
        highest = [*self._once, *(most for most in self._layers for _ in range(self._blocks))]
        return Space(
            np.tile(highest, len(self.whole)),
            self.tidy,
            self.choices,
            self.costs,
            [COSTS.index(name) for name in objectives],
            np.array([limits.get(name, math.inf) for name in self.cost_names]),
            self.parts,
        )

    @property
    def cost_names(self) -> tuple[str, ...]:
        return COSTS if self.latency else COSTS[:2]

    def tidy(self, levels_NG: np.ndarray) -> np.ndarray:
        levels_NG = levels_NG.copy()
        depth_of = np.array(self.sizes.depth)
        for part in self.parts:
            mine = levels_NG[:, part]
            left_out_NB = np.arange(self._blocks) >= depth_of[mine[:, 0]][:, None]
            mine[:, ONCE:][np.tile(left_out_NB, 2)] = 0
        return levels_NG

    def specs(self, levels_G: np.ndarray) -> list[SubnetSpec]:
        """Of each task."""
        found = []
        for whole, part in zip(self.whole, self.parts, strict=True):
            levels = levels_G[part].tolist()
            heads, ratios = levels[ONCE : ONCE + self._blocks], levels[ONCE + self._blocks :]
            found.append(whole.sliced(self.sizes.architecture(levels[:ONCE], heads, ratios)))
        return found

    def levels(self, specs: Sequence[SubnetSpec]) -> np.ndarray:
        """The reverse of :meth:`specs`, [G]. Where ratios round to one width, the levels are those of the first."""
        found = [np.concatenate(self.sizes.levels(spec.architecture)) for spec in specs]
        return np.maximum(np.concatenate(found), 0)

    def choices(self, levels_NG: np.ndarray) -> list[Choices]:
        return [self._choices(levels_NG[:, part]) for part in self.parts]

    def _choices(self, mine: np.ndarray) -> Choices:
        layers_NUL = mine[:, ONCE:].reshape(len(mine), 2, self._blocks)
        left_out_NB = np.arange(self._blocks) >= np.array(self.sizes.depth)[mine[:, 0]][:, None]
        layers_NUL = np.where(left_out_NB[:, None], -1, layers_NUL)
        return Choices(mine[:, :ONCE], layers_NUL, tuple(self._once), tuple(self._layers))

    def costs(self, levels_NG: np.ndarray) -> np.ndarray:
        """All of :attr:`cost_names` [N, A]. Parameters of copies that tasks share count once, FLOPs and milliseconds
        add up."""
        specs = [self.specs(row) for row in levels_NG]
        found_NA = np.zeros((len(specs), len(self.cost_names)))
        for n, (row, of_row) in enumerate(zip(levels_NG, specs, strict=True)):
            found_NA[n, :2] = self._parameters_and_flops(row.tobytes(), of_row)
        for t, of_task in enumerate(self.latency):
            found_NA[:, 2] += of_task([of_row[t].architecture for of_row in specs])
        return found_NA

    def _parameters_and_flops(self, key: bytes, specs: list[SubnetSpec]) -> tuple[float, float]:
        if key not in self._known_costs:
            if len(specs) == 1:
                cost = subnet_cost(self.recipe, specs[0], self.classes[specs[0].task])
            else:
                cost = joint_cost(self.recipe, specs, self.classes)
            self._known_costs[key] = cost.parameters, cost.flops
        return self._known_costs[key]


def check_limits(space: ElasticSpace, limits: Mapping[str, float]) -> None:
    """
    Raises:
        UserError: not even the smallest subnets keep to them.
    """
    smallest = space.searched([], limits).ends[1]
    needs = dict(zip(space.cost_names, space.costs(smallest[None])[0].tolist(), strict=True))
    too_low = [name for name in limits if needs[name] > limits[name]]
    if too_low:
        given = ", ".join(f"--limit {name}={limits[name]:g}" for name in too_low)
        wanted = ", ".join(f"{name}={in_full(name, needs[name])}" for name in too_low)
        which = "subnet" if len(space.whole) == 1 else "subnets together"
        tasks = " and ".join(spec.task for spec in space.whole)
        raise UserError(f"{given}: nothing keeps to it: the smallest {which} of {tasks} would need {wanted}")


def in_full(name: str, value: float) -> str:
    """A cost that, given as a limit, is one that holds."""
    return f"{math.ceil(value * 1000) / 1000:g}" if name == "latency" else str(round(value))
