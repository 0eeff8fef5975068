"""Where tasks go: planned load, memory and time of a step of our placement, of EP = 2, and of the published layout.

    python benchmarks/plan.py [--quick]

Of 24 tasks with experts for the FFN and the embedding, as published, and of 26 with experts for all units (recipe
``ufo2_17b``), on 48, 64 and 128 H100 of 80 GB. Nothing is run. Ours are plans of ``ufo plan``; the published layout, in
which every rank is one task's, is counted here, to its favour where there is doubt:

- Every task has ranks in proportion to its samples, at least one; consecutive ones. With 24 tasks on 48 ranks these are
  the published ones: face and ImageNet 8, person, vehicle and products 4, the next largest 2, all others 1.
- Every rank reads an equal share of every task. In every block an all-to-all brings each image's tokens to a rank of
  its task and another one back, in the backward pass their gradients; before and behind are the units without experts,
  data parallel. Where all units are experts they are computed between the two.
- Only the copy on a task's path is computed (published: both), in bf16 (published: fp32).
- Parameters, gradients, fp32 weights and the optimizer's state are whole on each rank: what is shared, embeddings and
  heads of all tasks, and the one task's own units. Gradients of what is on a path are all-reduced once a step in bf16,
  shared ones over all ranks, the task's over its ranks.
- Communication does not overlap with computation, each all-to-all being waited for; for ours it does, as the plan says,
  ideally. ``exposed`` is the step where for none of them anything overlaps.
- Rates of GPUs and links, activations and rings as in ``ufo plan``; every layout with the fewest micro-batches that
  fit.
"""

import argparse
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from ufo_ds import recipe_file
from ufo_ds.errors import UserError
from ufo_ds.model.architecture import Architecture
from ufo_ds.model.cost import head_cost, path_cost
from ufo_ds.model.parameters import address_of
from ufo_ds.model.supernet import Supernet
from ufo_ds.parallel import config as configs
from ufo_ds.parallel.machines import GPUS, SHARE_OF_LINK, usable_bytes
from ufo_ds.parallel.planning import BACKWARD, Planner
from ufo_ds.parallel.zero_memory import state_tensors
from ufo_ds.recipe import Recipe, only
from ufo_ds.subnets.activations import FP32, PRECISIONS, kept_by_head, kept_per_image

GPU, GPUS_PER_NODE = GPUS["h100"], 8
WORLD_SIZES = (48, 64, 128)
MICRO_BATCHES = (1, 2, 4, 8)
NOT_PUBLISHED = ("retinopathy", "dmlab")  # in the results, not in the configuration
LOAD_BAR = 1.02
# Where all communication hides behind computation our placements differ by their loads alone, both of them even.
PEER_BARS = {"ep2": LOAD_BAR, "published": 1.0}


@dataclass(frozen=True)
class Row:
    load: float  # of the busiest rank over the mean
    slots: int
    micro_batches: int
    memory: int
    compute: float  # seconds
    communication: float
    step: float
    exposed: float  # a step in which no communication hides behind computation


def recipes() -> dict[str, Recipe]:
    ffn = recipe_file.load("ufo2_17b", [("model.experts", "[embed, ffn]")])
    published = [task.name for task in ffn.tasks if task.name not in NOT_PUBLISHED]
    return {"24 tasks, FFN": only(ffn, published), "26 tasks, all units": recipe_file.load("ufo2_17b")}


# --- ours -------------------------------------------------------------------------------------------------------------


def ours(planner: Planner, world_size: int, ep_size: int | str) -> Row:
    base = {**planner.values, "expert_parallel": {"autoep_size": ep_size, "exchange": "aligned"}}
    for micro_batches in MICRO_BATCHES:
        planner.values = {**base, "gradient_accumulation_steps": micro_batches}
        plan = planner.plan(world_size)
        if plan.fits:
            communication = plan.inside_seconds + plan.between_seconds
            return Row(plan.imbalance, plan.placement.slots, micro_batches, plan.peak, plan.compute_seconds,
                       communication, plan.step_seconds, plan.compute_seconds + communication)  # fmt: skip
    raise UserError(f"EP {ep_size} on {world_size} ranks does not fit")


# --- the published layout ---------------------------------------------------------------------------------------------


def published_ranks(samples: Mapping[str, int], world_size: int) -> dict[str, range]:
    """A rank for each task, every further one where a rank has most samples; the largest tasks first."""
    numbers = dict.fromkeys(samples, 1)
    for _ in range(world_size - len(samples)):
        fullest = max(numbers, key=lambda name: samples[name] / numbers[name])
        numbers[fullest] += 1
    ranks, first = {}, 0
    for name in sorted(numbers, key=lambda name: -numbers[name]):
        ranks[name] = range(first, first + numbers[name])
        first += numbers[name]
    return ranks


class Published:
    def __init__(self, recipe: Recipe, num_classes: Mapping[str, int]):
        self.recipe, self.num_classes = recipe, num_classes
        self.samples = {task.name: task.samples_per_step for task in recipe.tasks}
        backbone, size = recipe.model.backbone, recipe.tasks[0].input
        assert all(task.input == size for task in recipe.tasks)
        self.tokens = backbone.prefix + (size[0] // backbone.patch_size) * (size[1] // backbone.patch_size)
        path = path_cost(backbone, Architecture.of(backbone), size).flops
        ffn = backbone.depth * 2 * 2 * self.tokens * backbone.dim * round(backbone.dim * backbone.mlp_ratio)
        assert 0.5 * path < ffn < path
        self.moved_flops = path if "attn" in recipe.model.experts else ffn  # where a task's ranks are
        self.read_flops = path - self.moved_flops
        with torch.device("meta"):
            model = Supernet(recipe, num_classes)
        self.everywhere, self.unused, self.own = 0, 0, dict.fromkeys(self.samples, 0)
        for name, parameter in model.named_parameters():
            address = address_of(name)
            if address.owner is None or address.unit in ("embed", "head", "neck"):
                self.everywhere += parameter.numel()
                if address.owner is None and address.unit in recipe.model.experts:
                    self.unused += parameter.numel()
            else:
                self.own[address.owner] += parameter.numel()

    def row(self, world_size: int) -> Row:
        ranks = published_ranks(self.samples, world_size)
        flops = [self._flops(name, len(of_task), world_size) for name, of_task in ranks.items() for _ in of_task]
        traffic = [self._traffic(rank, ranks, world_size) for of_task in ranks.values() for rank in of_task]
        compute = max(flops) / GPU.rate("bf16")
        inside, between = (max(of_rank[i] for of_rank in traffic) for i in (0, 1))
        communication = (inside / GPU.inside + between / GPU.between) / 1e9 / SHARE_OF_LINK
        for micro_batches in MICRO_BATCHES:
            memory = max(self._memory(name, len(of_task), world_size, micro_batches) for name, of_task in ranks.items())
            if memory <= usable_bytes(GPU):
                load = max(flops) * len(flops) / sum(flops)
                step = compute + communication
                return Row(load, 1, micro_batches, memory, compute, communication, step, step)
        raise UserError(f"the published layout on {world_size} ranks does not fit")

    def _flops(self, name: str, ranks: int, world_size: int) -> float:
        dim = self.recipe.model.backbone.dim
        read = sum(
            self.samples[task.name] * (self.read_flops + head_cost(task, dim, self.num_classes[task.name]).flops)
            for task in self.recipe.tasks
        )
        return (1 + BACKWARD) * (read / world_size + self.samples[name] / ranks * self.moved_flops)

    def _memory(self, name: str, ranks: int, world_size: int, micro_batches: int) -> float:
        options, backbone, precision = self.recipe.optimizer, self.recipe.model.backbone, PRECISIONS["bf16"]
        tensors = 1 + state_tensors(options) + (options.average is not None)  # in fp32
        parameters = (self.everywhere + self.own[name]) * (2 * precision.parameter + tensors * FP32)
        kept = {unit: sum(of_unit) for unit, of_unit in
                kept_per_image(self.recipe, self.recipe.tasks[0].input, precision).items()}  # fmt: skip
        moved = sum(kept[unit] for unit in self.recipe.model.experts if unit != "embed")
        activations = sum(self.samples.values()) / world_size * (sum(kept.values()) - moved)
        activations += self.samples[name] / ranks * moved
        heads = sum(
            kept_by_head(task, backbone.dim, -(-self.samples[task.name] // (world_size * micro_batches)),
                         self.num_classes[task.name], precision)
            for task in self.recipe.tasks
        )  # fmt: skip
        return parameters + activations / micro_batches + heads

    def _traffic(self, rank: int, ranks: Mapping[str, range], world_size: int) -> tuple[float, float]:
        """Bytes of a step that a rank sends inside its node and to others."""
        backbone, precision = self.recipe.model.backbone, PRECISIONS["bf16"]
        sent = [0.0, 0.0]
        # There forward, and the gradient of what came back; an image's tokens of every block.
        image = 2 * backbone.depth * self.tokens * backbone.dim * precision.residual
        for name, owners in ranks.items():
            share = self.samples[name] / world_size / len(owners)  # images of a reader for an owner
            for owner in owners:
                _send(sent, rank, owner, share * image)
            if rank in owners:
                for reader in range(world_size):
                    _send(sent, rank, reader, share * image)
                _ring(sent, owners, self.own[name] * precision.parameter)
        _ring(sent, range(world_size), (self.everywhere - self.unused) * precision.parameter)
        return sent[0], sent[1]


def _send(sent: list[float], rank: int, to: int, nbytes: float) -> None:
    if to != rank:
        sent[rank // GPUS_PER_NODE != to // GPUS_PER_NODE] += nbytes


def _ring(sent: list[float], ranks: range, nbytes: float) -> None:
    """An all-reduce, as :mod:`ufo_ds.parallel.traffic` counts it."""
    following = [*ranks[1:], ranks[0]]
    between = sum(a // GPUS_PER_NODE != b // GPUS_PER_NODE for a, b in zip(ranks, following, strict=True)) / len(ranks)
    total = 2 * nbytes * (len(ranks) - 1) / len(ranks)
    sent[0] += total * (1 - between)
    sent[1] += total * between


# --- the table --------------------------------------------------------------------------------------------------------


def rows(world_sizes: tuple[int, ...]) -> Iterator[tuple[str, int, str, Row]]:
    values = configs.load("ds_configs/moe_17b.json")
    for case, recipe in recipes().items():
        num_classes = {task.name: task.num_classes or 0 for task in recipe.tasks}
        planner = Planner(recipe, num_classes, values, "ds_configs/moe_17b.json", GPU, GPUS_PER_NODE)
        peer = Published(recipe, num_classes)
        for world_size in world_sizes:
            yield case, world_size, "ours", ours(planner, world_size, "auto")
            yield case, world_size, "EP = 2", ours(planner, world_size, 2)
            yield case, world_size, "published", peer.row(world_size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="48 ranks alone")
    world_sizes = WORLD_SIZES[:1] if parser.parse_args().quick else WORLD_SIZES
    print(__doc__.split("\n\n", 2)[2])
    print(f"{'':32}{'load':>7}{'slots':>7}{'micro':>7}{'GiB':>7}{'compute':>9}{'sends':>8}{'step s':>8}{'exposed':>9}")
    figures: dict[str, float] = {}
    bars: dict[str, dict[str, float | bool]] = {}
    own: Row | None = None
    for case, world_size, layout, row in rows(world_sizes):
        print(
            f"{case + f', {world_size}: ' + layout:32}{row.load:7.3f}{row.slots:7}{row.micro_batches:7}"
            f"{row.memory / 2**30:7.1f}{row.compute:9.3f}{row.communication:8.3f}{row.step:8.3f}{row.exposed:9.3f}",
            flush=True,
        )
        key = f"{case.split()[0]}_tasks_{world_size}_ranks"
        name = {"ours": "ours", "EP = 2": "ep2", "published": "published"}[layout]
        figures |= {f"{key}_{name}_{part}": round(float(value), 4) for part, value in vars(row).items()}
        if layout == "ours":
            own = row
            bars[f"{key}_load"] = {"value": round(row.load, 4), "bar": LOAD_BAR, "ok": row.load <= LOAD_BAR}
        elif own is not None:
            for part, bar in (("step", PEER_BARS[name]), ("exposed", 1.0)):
                ratio = getattr(own, part) / getattr(row, part)
                bars[f"{key}_{part}_to_{name}"] = {"value": round(ratio, 4), "bar": bar, "ok": ratio <= bar}
    print(json.dumps({"benchmark": "plan", "figures": figures, "bars": bars}))


if __name__ == "__main__":
    main()
