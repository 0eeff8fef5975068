"""What a run will hold, compute and send, by rank, and whether it fits; from a recipe, a DeepSpeed JSON and numbers of
ranks, without a job."""

import copy
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ufo_ds.errors import UserError
from ufo_ds.model.architecture import Architecture, subnets_of_step
from ufo_ds.model.cost import block_cost, head_cost, path_cost
from ufo_ds.model.spec import UNITS, routes_of
from ufo_ds.parallel import config as configs
from ufo_ds.parallel.config import DistributedConfig
from ufo_ds.parallel.machines import GIB, SHARE_OF_LINK, Gpu, usable_bytes
from ufo_ds.parallel.placement import Placement
from ufo_ds.parallel.rank_model import RankModel, RankModels
from ufo_ds.parallel.traffic import Traffic, rank_traffic
from ufo_ds.parallel.zero_memory import Memory, memory, refuse_uncounted, sized
from ufo_ds.recipe import Recipe
from ufo_ds.subnets.activations import PRECISIONS, kept_by_head, kept_of_recomputed, kept_per_image

BACKWARD = 2  # times the FLOPs of the forward pass
STEPS = 100  # of an elastic model, whose subnets are averaged
MOST_MICRO_BATCHES, MOST_TIMES_THE_RANKS = 64, 32  # as far as settings that fit are looked for


@dataclass(frozen=True)
class RankPlan:
    """Of the busiest of the ranks that hold these tasks; per step if nothing else is said."""

    ep_rank: int
    tasks: tuple[str, ...]
    images: int
    flops: int
    memory: Memory
    traffic: Traffic


@dataclass(frozen=True)
class Plan:
    config: DistributedConfig
    placement: Placement
    images: int  # of a step, all ranks
    ranks: list[RankPlan]
    usable: int  # bytes of a GPU
    sizes_agree: bool  # of the parameters of all ranks
    compute_seconds: float  # of the busiest rank
    inside_seconds: float
    between_seconds: float

    @property
    def peak(self) -> int:
        return max(rank.memory.peak for rank in self.ranks)

    @property
    def fits(self) -> bool:
        return self.peak <= self.usable

    @property
    def imbalance(self) -> float:
        """FLOPs of the busiest rank over the mean."""
        flops = [rank.flops for rank in self.ranks]
        return max(flops) * len(flops) / sum(flops)

    @property
    def overlaps(self) -> bool:
        """Whether DeepSpeed communicates while it computes."""
        zero = self.config.deepspeed["zero_optimization"]
        return bool(zero.get("overlap_comm") or zero.get("stage3_prefetch_bucket_size"))

    @property
    def step_seconds(self) -> float:
        communication = self.inside_seconds + self.between_seconds
        return max(self.compute_seconds, communication) if self.overlaps else self.compute_seconds + communication

    @property
    def bound_by(self) -> str:
        seconds = {
            "compute": self.compute_seconds,
            "links inside nodes": self.inside_seconds,
            "links between nodes": self.between_seconds,
        }
        return max(seconds, key=lambda name: seconds[name]) if self.fits else "memory"


class Planner:
    """Plans of one recipe.

    Args:
        recipe: with ``samples_per_step`` of every task.
        num_classes: outputs of every task's head.
        values: of the DeepSpeed JSON; ``source``: where they are from.
    """

    def __init__(
        self, recipe: Recipe, num_classes: Mapping[str, int], values: dict[str, Any], source: str, gpu: Gpu,
        gpus_per_node: int,
    ):  # fmt: skip
        self.recipe, self.num_classes, self.source = recipe, num_classes, source
        self.gpu, self.gpus_per_node = gpu, gpus_per_node
        self.values = on_gpus(values)
        self.models = RankModels(recipe, num_classes)
        backbone = recipe.model.backbone
        names = [task.name for task in recipe.tasks]
        steps = range(STEPS if recipe.model.elastic else 1)
        drawn = [subnets_of_step(recipe.model, names, recipe.seed, step) for step in steps]
        self.flops = dict.fromkeys(names, 0)  # of an image in a step
        for task, of_step in itertools.product(recipe.tasks, drawn):
            for of_tasks in of_step:
                path = of_tasks.get(task.name, Architecture.of(backbone))
                head = head_cost(task, path.dim, num_classes[task.name])
                once = (path_cost(backbone, path, task.input) + head).flops
                recomputed = [i for i in recipe.model.recomputed_blocks if i < path.depth]
                again = sum(block_cost(backbone, path, i, task.input).flops for i in recomputed)
                self.flops[task.name] += ((1 + BACKWARD) * once + again) // len(drawn)

    def plan(self, world_size: int) -> Plan:
        """
        Raises:
            UserError: values that disagree, or whose effect is not counted.
        """
        config, placement, models, memories = self._memories(world_size, self.values)
        samples = self._samples(config)
        ranks, inside, between = [], 0.0, 0.0
        for ep_rank, (model, held) in enumerate(zip(models, memories, strict=True)):
            copies = placement.holders(ep_rank)
            traffic = [rank_traffic(self.recipe, config, placement, model, rank, self.gpus_per_node) for rank in copies]
            inside = max(inside, *(sum(t.inside.values()) for t in traffic))
            between = max(between, *(sum(t.between.values()) for t in traffic))
            owned = [placement.owned(rank, samples) for rank in copies]
            flops = [sum(len(span) * self.flops[name] for name, span in spans.items()) for spans in owned]
            busiest = flops.index(max(flops))
            ranks.append(
                RankPlan(
                    ep_rank,
                    model.tasks,
                    sum(map(len, owned[busiest].values())) * config.accumulation,
                    flops[busiest] * config.accumulation,
                    held,
                    max(traffic, key=lambda t: sum(t.inside.values()) + sum(t.between.values())),
                )
            )
        return Plan(
            config,
            placement,
            sum(samples.values()) * config.accumulation,
            ranks,
            usable_bytes(self.gpu),
            len({tuple(p.numel for p in model.parameters) for model in models}) == 1,
            max(rank.flops for rank in ranks) / self.gpu.rate(config.precision),
            inside / (self.gpu.inside * 1e9 * SHARE_OF_LINK),
            between / (self.gpu.between * 1e9 * SHARE_OF_LINK),
        )

    def what_fits(self, world_size: int) -> list[str]:
        """Settings that differ from the given ones in as little as possible and fit, in words; none if none was
        found."""
        if found := list(self._single_changes(world_size)):
            return found
        for words, ranks, values in self._combined_changes(world_size):
            if self._fits(ranks, values):
                return [words]
        return []

    def _single_changes(self, world_size: int) -> Iterator[str]:
        """The first of each kind that fits, alone."""
        kinds: list[list[tuple[str, int, dict[str, Any]]]] = [
            [(f"gradient_accumulation_steps {n}", world_size, v) for n, v in self._accumulations(world_size)],
            [(f"zero_optimization.stage {s}", world_size, v) for s, v in self._stages()],
            [(f"--world_size {n}", n, self.values) for n in self._more_ranks(world_size)],
        ]
        for changes in kinds:
            fitting = (words for words, ranks, values in changes if self._fits(ranks, values))
            yield from itertools.islice(fitting, 1)
        for planner in self._recomputing():
            if planner._fits(world_size, self.values):
                yield f"--model.activation_checkpointing {planner.recipe.model.activation_checkpointing}"
                break

    def _combined_changes(self, world_size: int) -> Iterator[tuple[str, int, dict[str, Any]]]:
        """ZeRO-3 and as many micro-batches as there can be, on more and more ranks."""
        for ranks in (world_size, *self._more_ranks(world_size)):
            for accumulation, values in self._accumulations(ranks):
                values = _with_stage(values, 3)
                yield (
                    f"--world_size {ranks} with zero_optimization.stage 3 and gradient_accumulation_steps "
                    f"{accumulation}",
                    ranks,
                    values,
                )

    def _recomputing(self) -> Iterator["Planner"]:
        """The same with more and more blocks recomputed."""
        now, model = len(self.recipe.model.recomputed_blocks), self.recipe.model
        for chosen in (4, 3, 2, "full"):
            planner = copy.copy(self)
            planner.recipe = replace(self.recipe, model=replace(model, activation_checkpointing=chosen))
            if len(planner.recipe.model.recomputed_blocks) > now:
                yield planner

    def _accumulations(self, world_size: int) -> list[tuple[int, dict[str, Any]]]:
        now = self._config(world_size, self.values).accumulation
        changed = [
            (n, {**self.values, "gradient_accumulation_steps": n}) for n in range(now + 1, MOST_MICRO_BATCHES + 1)
        ]
        return [(n, values) for n, values in changed if self._possible(world_size, values)]

    def _stages(self) -> list[tuple[int, dict[str, Any]]]:
        now = self.values.get("zero_optimization", {}).get("stage", 3)
        return [(stage, _with_stage(self.values, stage)) for stage in (2, 3) if now != "auto" and stage > now]

    def _more_ranks(self, world_size: int) -> list[int]:
        sizes, ranks = [], world_size * 2
        while ranks <= world_size * MOST_TIMES_THE_RANKS:
            sizes.append(ranks)
            ranks *= 2
        return sizes

    def _possible(self, world_size: int, values: dict[str, Any]) -> bool:
        try:
            self._config(world_size, values)
        except UserError:
            return False
        return True

    def _fits(self, world_size: int, values: dict[str, Any]) -> bool:
        if not self._possible(world_size, values):
            return False
        *_, memories = self._memories(world_size, values)
        return max(held.peak for held in memories) <= usable_bytes(self.gpu)

    def _config(self, world_size: int, values: dict[str, Any]) -> DistributedConfig:
        return configs.resolve(values, self.source, self.recipe, world_size)

    def _samples(self, config: DistributedConfig) -> dict[str, int]:
        """Of every task in a micro-batch."""
        return {task.name: task.samples_per_step // config.accumulation for task in self.recipe.tasks}

    def _memories(
        self, world_size: int, values: dict[str, Any]
    ) -> tuple[DistributedConfig, Placement, list[RankModel], list[Memory]]:
        """Of every expert-parallel rank that of the fullest rank."""
        config = self._config(world_size, values)
        placement = self.models.placement(world_size, config.ep_size, config.accumulation)
        models = [replace(m, recomputed=self.recipe.model.recomputed_blocks) for m in self.models.of(placement)]
        config = sized(config, models, int(self.gpu.memory * GIB))
        refuse_uncounted(config, self.source, max(sum(p.numel for p in model.parameters) for model in models))
        held = []
        for ep_rank, model in enumerate(models):
            kept = max(self._activations(config, placement, model, rank) for rank in placement.holders(ep_rank))
            held.append(memory(model, config, self.recipe.optimizer, kept))
        return config, placement, models, held

    def _activations(self, config: DistributedConfig, placement: Placement, model: RankModel, rank: int) -> int:
        """Bytes that a rank keeps of a micro-batch for the backward pass, at its beginning: with all that the last
        block computes again, if it does. Every subnet of an elastic step counts as the whole, a bound."""
        precision, samples = PRECISIONS[config.precision], self._samples(config)
        owned = placement.owned(rank, samples)
        # Where rows move at every layer, the shared copies see what was read here.
        read = placement.read_evenly(rank, samples) if config.exchange == "layer" else owned
        last = self.recipe.model.backbone.depth - 1
        subnets = self.recipe.model.subnets
        total, inputs_alone = 0, [i for i in self.recipe.model.recomputed_blocks if i != last]
        for task in self.recipe.tasks:
            here, before = (len(of_rank.get(task.name, ())) * subnets for of_rank in (owned, read))
            if here or before:
                kept, routes = kept_per_image(self.recipe, task.input, precision), routes_of(self.recipe, task.name)
                for unit in UNITS:
                    for layer, (nbytes, route) in enumerate(zip(kept[unit], routes[unit], strict=True)):
                        if unit == "embed" or layer not in inputs_alone:
                            total += nbytes * (before if route == "shared" else here)
                total += before * len(inputs_alone) * kept_of_recomputed(self.recipe, task.input, precision)
        for name, head in zip(model.tasks, model.heads, strict=False):
            task = next(task for task in self.recipe.tasks if task.name == name)
            images = (samples[name] if head.classifier.is_spread else len(owned[name])) * subnets
            rows = len(head.classifier.rows)
            total += kept_by_head(task, self.recipe.model.backbone.dim, images, rows, precision)
        return total


def on_gpus(values: dict[str, Any]) -> dict[str, Any]:
    """The values with "auto" precision as it is on GPUs, wherever the plan is made."""
    values = copy.deepcopy(values)
    autocast = values.get("torch_autocast", {}).get("enabled", False) is True
    if values.get("bf16", {}).get("enabled", "auto") == "auto":
        values["bf16"] = {**values.get("bf16", {}), "enabled": not autocast}
    return values


def _with_stage(values: dict[str, Any], stage: int) -> dict[str, Any]:
    return {**values, "zero_optimization": {**values.get("zero_optimization", {}), "stage": stage}}
