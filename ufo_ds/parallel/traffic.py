"""Bytes that a rank sends in a step, by what they are and by the link they take.

Collectives are counted as rings in the order of ranks: of a result of S bytes over p ranks, an all-gather or
reduce-scatter sends S (p - 1) / p from every rank to its neighbour, an all-reduce twice that. What is sent over a ring
goes between nodes in the share of its neighbours that are on different ones. An all-to-all sends directly. Not counted
are single numbers, such as norms of gradients, and the first steps, in which DeepSpeed records the order of modules.
With ``exchange: layer`` learned routes count as if all were own. Of an elastic model every subnet of a step counts as
the whole.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ufo_ds.model.experts import SHARED
from ufo_ds.model.heads import BatchNormNeck
from ufo_ds.model.spec import routes_of
from ufo_ds.parallel.config import DistributedConfig
from ufo_ds.parallel.placement import Placement, share
from ufo_ds.parallel.rank_model import RankModel
from ufo_ds.parallel.zero_memory import aligned, gathers, partition_groups, wire_bytes
from ufo_ds.recipe import Recipe
from ufo_ds.subnets.activations import FP32, PRECISIONS

LABEL = 8  # bytes of a class, int64
KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all")


@dataclass
class Traffic:
    """Bytes by collective, inside and between nodes."""

    inside: dict[str, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 0.0))
    between: dict[str, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 0.0))

    def of(self, kind: str) -> float:
        return self.inside[kind] + self.between[kind]


def rank_traffic(
    recipe: Recipe, config: DistributedConfig, placement: Placement, model: RankModel, rank: int, gpus_per_node: int
) -> Traffic:
    """Of one step of a rank with this model, in every step but the first ones."""
    links = _Links(rank, placement, gpus_per_node)
    _zero(links, model, config)
    if recipe.optimizer.type in ("lars", "lamb"):
        for group in partition_groups(model.parameters):
            # Norms of weights and updates; those of a spread classifier are put together from its parts.
            experts = placement.ep_size if group[0].experts == placement.world_size else group[0].experts
            norms = 2 * FP32 * sum(p.adapted for p in group)
            links.ring("all-reduce", links.holders(experts), norms)
    samples = {task.name: task.samples_per_step // config.accumulation for task in recipe.tasks}
    if placement.ep_size > 1 and config.exchange != "aligned":
        _exchange(links, recipe, config, samples)
    _heads(links, model, config, samples, recipe.model.backbone.dim, recipe.model.subnets)
    return links.traffic


class _Links:
    """Adds up what one rank sends, and knows who is on its node."""

    def __init__(self, rank: int, placement: Placement, gpus_per_node: int):
        self.rank, self.placement, self.gpus_per_node = rank, placement, gpus_per_node
        self.traffic = Traffic()

    def holders(self, experts: int) -> range:
        """The ranks that share an expert of ``experts`` different ones, or what is shared (0)."""
        size = self.placement.world_size // max(experts, 1)
        return range(self.rank // size * size, (self.rank // size + 1) * size)

    def ring(self, kind: str, ranks: Sequence[int], nbytes: float) -> None:
        """A collective whose result is of ``nbytes``."""
        size = len(ranks)
        sent = nbytes * (size - 1) / size * (2 if kind == "all-reduce" else 1)
        following = [*ranks[1:], ranks[0]]
        between = sum(self._node(a) != self._node(b) for a, b in zip(ranks, following, strict=True)) / size
        self.traffic.inside[kind] += sent * (1 - between)
        self.traffic.between[kind] += sent * between

    def send(self, to: int, nbytes: float) -> None:
        """A part of an all-to-all."""
        if to != self.rank:
            side = self.traffic.inside if self._node(to) == self._node(self.rank) else self.traffic.between
            side["all-to-all"] += nbytes

    def _node(self, rank: int) -> int:
        return rank // self.gpus_per_node


def _zero(links: _Links, model: RankModel, config: DistributedConfig) -> None:
    """Parameters and gradients."""
    if config.stage < 3:
        element = PRECISIONS[config.precision].parameter
        reductions = config.accumulation if config.stage == 2 else 1
        for group in partition_groups(model.parameters):
            ranks = links.holders(group[0].experts)
            used = sum(p.numel * wire_bytes(p, config) for p in group if p.calls)
            links.ring("all-reduce", ranks, used * reductions)
            links.ring("all-gather", ranks, aligned(group) * element)
        return
    found = gathers(model, config)
    for group in partition_groups(p for p in model.parameters if p.calls):
        ranks = links.holders(group[0].experts)
        gathered = sum(p.padded * wire_bytes(p, config) * found.times(p) for p in group)
        reduced = sum(p.padded * wire_bytes(p, config) for p in group)
        links.ring("all-gather", ranks, gathered * config.accumulation)
        links.ring("reduce-scatter", ranks, reduced * config.accumulation)


def _exchange(links: _Links, recipe: Recipe, config: DistributedConfig, samples: dict[str, int]) -> None:
    """Samples on their way to the ranks of their tasks, once or at every expert layer."""
    placement = links.placement
    group, me = placement.group(links.rank), placement.ep_rank(links.rank)
    read = [placement.read_evenly(rank, samples) for rank in group]
    per_image = {t.name: _bytes_per_image(recipe, t.name, config) for t in recipe.tasks}
    for other, rank in enumerate(group):
        there = sum(len(read[me][name]) * per_image[name][0] for name in placement.tasks_of[other])
        back = sum(len(read[other][name]) * per_image[name][1] for name in placement.tasks_of[me])
        links.send(rank, (there + back) * config.accumulation)


def _bytes_per_image(recipe: Recipe, name: str, config: DistributedConfig) -> tuple[int, int]:
    """What an image makes travel from its reader to its owner, and back."""
    task = next(t for t in recipe.tasks if t.name == name)
    mix = LABEL + FP32 if task.augment.mixes else 0
    pixels = 3 * task.input[0] * task.input[1]
    if config.exchange == "input":
        return pixels + LABEL + mix, 0
    backbone, precision = recipe.model.backbone, PRECISIONS[config.precision]
    patch = backbone.patch_size
    tokens = backbone.prefix + (task.input[0] // patch) * (task.input[1] // patch)
    routes = routes_of(recipe, name)
    own = {unit: sum(route != SHARED for route in layers) for unit, layers in routes.items()}
    blocks_norm = sum(route != SHARED for route in routes["norm"][:-1])  # two norms each
    calls = own["attn"] + own["ffn"] + own["norm"] + blocks_norm
    again = sum(
        (routes["attn"][i] != SHARED) + (routes["ffn"][i] != SHARED) + 2 * (routes["norm"][i] != SHARED)
        for i in recipe.model.recomputed_blocks
    )
    row = backbone.dim * precision.residual
    # Forward, again in recomputation, and backward, each way; pixels have no gradient. The head's rows are one an image
    # and stay there.
    embed = own["embed"]
    there = tokens * ((2 * calls + again) * row + embed * (3 * patch**2 * precision.parameter + row)) + row
    back = tokens * ((2 * calls + again) * row + embed * row) + row
    labels = LABEL + (LABEL + FP32 if any(t.augment.mixes for t in recipe.tasks) else 0)
    return there * recipe.model.subnets + labels, back * recipe.model.subnets


def _heads(
    links: _Links, model: RankModel, config: DistributedConfig, samples: dict[str, int], dim: int, subnets: int
) -> None:
    """Statistics of necks, features for triplet losses, and what spread classifiers exchange."""
    placement, times = links.placement, config.accumulation * subnets
    ranks, part = links.holders(placement.ep_size), placement.replica(links.rank)
    for slot, head in enumerate(model.heads):
        if isinstance(head.neck, BatchNormNeck):
            # Sums, then squares; forward and backward.
            links.ring("all-reduce", ranks, 2 * (2 * dim + 1) * FP32 * times)
        if slot >= len(model.tasks):
            continue
        total = samples[model.tasks[slot]]
        first = placement.first[model.tasks[slot]]
        counts = [len(share(range(total), placement.replicas, i, first)) for i in range(placement.replicas)]
        sharded = head.classifier.is_spread
        if head.loss.triplet is not None:
            _gather_rows(links, ranks, counts, part, dim * FP32, times)
            _gather_rows(links, ranks, counts, part, LABEL, times, backward=False)
        if sharded:
            element = FP32 if isinstance(head.neck, BatchNormNeck) else PRECISIONS[config.precision].parameter
            _gather_rows(links, ranks, counts, part, dim * element, times)
            # Of each sample and loss the right class's logit and of all logits maximum and sum; backward of the first
            # and last. With label smoothing the sum of the logits, and backward.
            numbers = sum(5 for name in head.loss.given if name != "triplet")
            if head.loss.cross_entropy is not None and head.loss.cross_entropy.label_smoothing:
                numbers += 2
            links.ring("all-reduce", ranks, numbers * total * FP32 * times)
        if sharded or head.options.sampled_negatives < 1:
            _gather_rows(links, ranks, counts, part, LABEL, times, backward=False)


def _gather_rows(
    links: _Links, ranks: Iterable[int], counts: list[int], part: int, row: int, times: int, backward: bool = True
) -> None:
    """Every rank sends its rows to all, and in the backward pass the gradients of the others' rows back to them."""
    for to, count in zip(ranks, counts, strict=True):
        links.send(to, (counts[part] + (count if backward else 0)) * row * times)
