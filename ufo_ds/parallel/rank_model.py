"""What each rank holds of a model, known before there is a job: the same construction as the engine's, on the meta
device."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from deepspeed.runtime.torch_autocast import LOWER_PRECISION_SAFE_MODULES
from torch import nn

from ufo_ds.model.classifiers import HolderGroup
from ufo_ds.model.experts import LEARNED, OWN, SHARED, RoutedUnit
from ufo_ds.model.heads import TaskHead
from ufo_ds.model.parameters import address_of, unused, update_rule
from ufo_ds.model.supernet import Supernet
from ufo_ds.parallel.experts import expert_sizes, parallelize
from ufo_ds.parallel.placement import Placement, place, work_of
from ufo_ds.recipe import Recipe


@dataclass(frozen=True)
class Held:
    """A parameter of a rank: ``holders`` ranks share it, and partition it under ZeRO.

    ``module`` is what ZeRO-3 gathers it with, ``calls`` how often that is called in a forward pass (0: on no path).
    ``lower``: under autocast it travels, and is multiplied, in bf16. ``adapted``: with a rate of its own in the
    layer-wise optimizers.
    """

    name: str
    module: str
    numel: int
    experts: int
    holders: int
    calls: int
    lower: bool
    adapted: bool

    @property
    def part(self) -> int:
        """Elements of a rank's part under ZeRO-3, padding included."""
        return -(-self.numel // self.holders)

    @property
    def padded(self) -> int:
        return self.part * self.holders

    @property
    def block(self) -> int | None:
        parts = self.name.split(".")
        return int(parts[1]) if parts[0] == "blocks" else None


@dataclass(frozen=True)
class RankModel:
    """Of all ranks of one expert-parallel rank."""

    tasks: tuple[str, ...]
    heads: tuple[TaskHead, ...]  # of every slot, empty ones too
    parameters: tuple[Held, ...]  # in the model's order
    buffers: int  # elements, fp32
    recomputed: range  # blocks


class _Holders(HolderGroup):
    """The size of a group that is not there."""

    def __init__(self, size: int):
        self.size, self.part = size, 0


class RankModels:
    """Builds the model once and cuts it for any number of ranks.

    Args:
        recipe: with ``samples_per_step`` of every task.
        num_classes: outputs of every task's head.
    """

    def __init__(self, recipe: Recipe, num_classes: Mapping[str, int]):
        self.recipe, self.num_classes = recipe, num_classes
        with torch.device("meta"):
            self.model = Supernet(recipe, num_classes)
        units = [module for module in self.model.modules() if isinstance(module, RoutedUnit)]
        self._own = [(unit, unit.own) for unit in units]
        self._heads = self.model.heads
        self.whole = whole_parameters(self.model)
        self._calls = Calls(self.model)
        self._known: dict[tuple[int, tuple[tuple[str, ...], ...]], list[RankModel]] = {}

    def placement(self, world_size: int, ep_size: int | None, accumulation: int) -> Placement:
        """Where the engine puts the tasks."""
        return place(work_of(self.recipe, self.num_classes, accumulation), world_size, ep_size)

    def of(self, placement: Placement) -> list[RankModel]:
        """The model of every expert-parallel rank."""
        key = placement.world_size, placement.tasks_of
        if key not in self._known:
            self._known[key] = [self._cut(placement, rank) for rank in range(placement.ep_size)]
        return self._known[key]

    def _cut(self, placement: Placement, ep_rank: int) -> RankModel:
        model = self.model
        for unit, own in self._own:
            unit.own = own
        model.heads = copy.deepcopy(self._heads)  # some lose rows
        # Which samples move where is no matter of the model: all exchanges cut it alike.
        parallelize(
            model, placement, placement.holders(ep_rank)[0], {}, "aligned", lambda first: _Holders(placement.replicas)
        )
        sizes = expert_sizes(model, placement.world_size)
        lower = {
            f"{prefix}.{name}"
            for prefix, module in model.named_modules() if module.__class__ in LOWER_PRECISION_SAFE_MODULES
            for name, _ in module.named_parameters(recurse=False)
        }  # fmt: skip
        names = [name for name, _ in model.named_parameters()]
        idle = unused(names, model.routes, self.recipe.model.shared_samples)
        held = []
        for name, parameter in model.named_parameters():
            parts = name.split(".")
            experts = sizes.get(name, 0)
            held.append(
                Held(
                    name,
                    ".".join(parts[:2] if parts[0] == "heads" else parts[:-1]),  # a head is a leaf to ZeRO-3
                    parameter.numel(),
                    experts,
                    placement.world_size // max(experts, 1),
                    self._calls.of(name),
                    name in lower,
                    name not in idle and update_rule(name, self.recipe).adapted,
                )
            )
        heads = tuple(module for module in model.heads.children() if isinstance(module, TaskHead))
        buffers = sum(buffer.numel() for buffer in model.buffers())
        recomputed = self.recipe.model.recomputed_blocks
        return RankModel(placement.tasks_of[ep_rank], heads, tuple(held), buffers, recomputed)


class Calls:
    """How often the copies of a unit are called in training, which depends on the routes of all tasks."""

    def __init__(self, model: Supernet):
        self.routes = model.routes
        self.experts = model.recipe.model.experts
        self.shared_samples = model.recipe.model.shared_samples > 0

    def of(self, name: str) -> int:
        address = address_of(name)
        if address.unit == "router":
            return int(any(LEARNED in layers for of_task in self.routes.values() for layers in of_task.values()))
        if address.unit in ("head", "neck"):
            return 1
        kinds = {of_task[address.unit][address.layer] for of_task in self.routes.values()}
        copies = {SHARED: address.owner is None, OWN: address.owner is not None}
        if address.unit not in self.experts or kinds == {SHARED}:
            return int(copies[SHARED])
        if kinds == {OWN} and not self.shared_samples:
            return int(copies[OWN])
        return 1 + (LEARNED in kinds)  # once more for the probe


def whole_parameters(model: nn.Module) -> dict[str, int]:
    """Elements of a model that is not cut: in all, of the shared copies, and by owner."""
    counts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        address = address_of(name)
        kind = "heads" if address.unit in ("head", "neck") else "router" if address.unit == "router" else "own"
        key = "shared" if address.owner is None else f"{kind} {address.owner}"
        counts[key] = counts.get(key, 0) + parameter.numel()
    return counts
