"""The expert-parallel layers that replace the single-device ones, and the marks by which DeepSpeed knows them.

Deriving from ``AutoEPMoELayer`` is what makes DeepSpeed (0.19.8) create expert gradients' groups at every ZeRO stage;
nothing else of that class is used. All ranks must have the same modules and parameters in the same order, so a rank
with fewer tasks than another has empty slots: modules like those in the same slot of the fullest rank, called on no
rows. They cost what the fullest rank's cost, and it sets the memory of the job anyhow.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.utils import groups
from torch import Tensor, nn

from ufo_ds.model.classifiers import HolderGroup, spread
from ufo_ds.model.experts import RoutedUnit, TaskExperts, by_task
from ufo_ds.model.heads import Mix, Moment, Outputs, TaskHead, TaskHeads, widths
from ufo_ds.model.packing import Segment, concatenate, overlap, split
from ufo_ds.model.supernet import Supernet
from ufo_ds.parallel.collectives import RankGroup, all_to_all
from ufo_ds.parallel.placement import Placement

EMPTY = "EMPTY"  # prefix of an empty slot's module name; no task can have it


@dataclass
class LayerExchange:
    """Sends rows to the ranks that own their task and results back, at every expert layer (``exchange: layer``).

    ``positions[e][task]`` are the samples of the task's global micro-batch that expert-parallel rank e of this group
    reads, constant over the run, so no counts are ever sent.
    """

    placement: Placement
    positions: list[dict[str, range]]
    ep_rank: int
    group: dist.ProcessGroup

    def dispatch(self, x_ND: Tensor, segments: Sequence[Segment]) -> tuple[Tensor, list[Segment]]:
        """Rows of all tasks read here -> rows of the own tasks read anywhere in the group."""
        mine, send, receive = self._plan(segments)
        y_ND = all_to_all(x_ND, send, receive, self.group)
        by_reader = self._sizes(mine)  # [reader][task]
        pieces = torch.split(y_ND, [rows for reader in by_reader for rows in reader])
        order = [pieces[reader * len(mine) + i] for i in range(len(mine)) for reader in range(self.placement.ep_size)]
        local = [replace(s, images=sum(len(overlap(read[s.task], s.span)) for read in self.positions)) for s in mine]
        return concatenate(order, y_ND), local

    def combine(self, y_ND: Tensor, segments: Sequence[Segment]) -> Tensor:
        """The way back of :meth:`dispatch`."""
        mine, send, receive = self._plan(segments)
        by_reader = self._sizes(mine)
        pieces = torch.split(y_ND, [reader[i] for i in range(len(mine)) for reader in by_reader])
        size = self.placement.ep_size
        order = [pieces[i * size + reader] for reader in range(size) for i in range(len(mine))]
        return all_to_all(concatenate(order, y_ND), receive, send, self.group)

    def _plan(self, segments: Sequence[Segment]) -> tuple[list[Segment], list[int], list[int]]:
        owners = self.placement.tasks_of
        mine = [s for s in segments if s.task in owners[self.ep_rank]]
        send = [sum(s.rows for s in segments if s.task in tasks) for tasks in owners]
        return mine, send, [sum(rows) for rows in self._sizes(mine)]

    def _sizes(self, mine: Sequence[Segment]) -> list[list[int]]:
        return [[len(overlap(read[s.task], s.span)) * s.tokens for s in mine] for read in self.positions]


class _ExpertParallel(AutoEPMoELayer):
    """Slots of this rank: a module per owned task, and empty ones up to the number of the fullest rank."""

    def __init__(self, modules: nn.ModuleDict, placement: Placement, rank: int, exchange: LayerExchange | None):
        nn.Module.__init__(self)  # not AutoEP's, which would convert a Hugging Face MoE block
        self.exchange = exchange
        self.ep_size = placement.ep_size
        self.ep_rank = placement.ep_rank(rank)
        self.ep_group_name = f"ep_size_{placement.ep_size}"
        self.num_experts = len(modules)
        self.num_local_experts = placement.slots
        owned = placement.tasks_of[self.ep_rank]
        self.slots = [*owned, *(f"{EMPTY}{i}" for i in range(len(owned), placement.slots))]
        for i, name in enumerate(self.slots):
            module = modules[name] if name in owned else copy.deepcopy(modules[placement.template(i)])
            self.add_module(name, module)

    def set_deepspeed_parallelism(self, *args, **kwargs) -> None:
        """The groups exist before the model is built."""


class ExpertParallelUnits(_ExpertParallel):
    """The own copies of a unit that live on this rank; stands in for :class:`TaskExperts`."""

    def forward(self, x_ND: Tensor, segments: Sequence[Segment]) -> Tensor:
        exchange = self.exchange if self.training else None
        rows_ND, local = (x_ND, segments) if exchange is None else exchange.dispatch(x_ND, segments)
        rows = {task: (x, of_task) for task, x, of_task in by_task(rows_ND, local)}
        # Every slot is called, in its order and even without rows: ranks must not differ in what they call.
        results = {slot: getattr(self, slot)(*rows.get(slot, (rows_ND[:0], []))) for slot in self.slots}
        unused = [y for slot, y in results.items() if slot not in rows]
        y_ND = torch.cat([*(results[task] for task in rows), *unused])
        return y_ND if exchange is None else exchange.combine(y_ND, segments)


class ExpertParallelHeads(_ExpertParallel):
    """The heads of this rank's tasks; stands in for :class:`TaskHeads`.

    Where one expert-parallel rank has a sharded head, all have one in that slot, wanted or not: DeepSpeed's collectives
    over parameters that are spread differently would not meet. And all heads of a slot, empty ones too, are padded to
    the sizes of the largest: where ranks have parameters of the same sizes ZeRO may decide by them. What a head
    computes depends on neither.
    """

    def __init__(
        self, modules: nn.ModuleDict, placement: Placement, rank: int, exchange: LayerExchange | None,
        holders: Callable[[int], HolderGroup],
    ):  # fmt: skip
        super().__init__(modules, placement, rank, exchange)
        wanted = {name for name, head in modules.items() if isinstance(head, TaskHead) and head.options.sharded}
        sharded = sharded_slots(placement, wanted)
        for i, slot in enumerate(self.slots):
            head = getattr(self, slot)
            assert isinstance(head, TaskHead)
            head.set_group(holders(placement.first.get(slot, 0)), sharded=i in sharded)
            rows, entries = slot_sizes(modules, placement, i)
            head.pad(-(-rows // placement.replicas) if i in sharded else rows, entries)

    def forward(
        self,
        features_BD: Tensor,
        segments: Sequence[Segment],
        labels: Mapping[str, Tensor] | None = None,
        global_counts: Mapping[str, int] | None = None,
        moment: Moment = (0, 0),
        mixes: Mapping[str, Mix] | None = None,
    ) -> Tensor | dict[str, Outputs]:
        """As :class:`TaskHeads`, for every slot: an empty one's losses are zero and keep its parameters in the
        graph."""
        local, mixes = list(segments), mixes or {}
        if self.exchange is not None and labels is not None:
            features_BD, local = self.exchange.dispatch(features_BD, segments)
            if mixes:  # all ranks have the same tasks here, so all are here or none
                mixes = self._dispatch_mixes(mixes, labels, [s for s in segments if not s.subnet])
            samples = [s for s in segments if not s.subnet]  # all subnets see the same ones
            labels_B, owned = self.exchange.dispatch(torch.cat([labels[s.task] for s in samples]), samples)
            labels = dict(zip([s.task for s in owned], split(labels_B, owned), strict=True))
        rows = {task: (x_BD, widths(x_BD, of_task)) for task, x_BD, of_task in by_task(features_BD, local)}
        nothing = features_BD[:0], [features_BD.shape[1]]
        if labels is None or global_counts is None:
            of_slots = {slot: rows.get(slot, nothing) for slot in self.slots}
            return {slot: getattr(self, slot)(x_BD, widths=columns) for slot, (x_BD, columns) in of_slots.items()}
        no_labels = torch.empty(0, dtype=torch.int64, device=features_BD.device)
        return torch.stack([
            getattr(self, slot)(
                x_BD, labels.get(slot, no_labels), global_counts.get(slot, 0), moment, mixes.get(slot), columns
            ) for slot in self.slots for x_BD, columns in [rows.get(slot, nothing)]
        ])  # fmt: skip

    def _dispatch_mixes(
        self, mixes: Mapping[str, Mix], labels: Mapping[str, Tensor], segments: Sequence[Segment]
    ) -> dict[str, Mix]:
        """To the ranks of the heads; tasks that do not mix send their labels and weights of one, which are dropped."""
        assert self.exchange is not None
        pairs = [mixes.get(s.task, (labels[s.task], torch.ones_like(labels[s.task], dtype=torch.float32)))
                 for s in segments]  # fmt: skip
        labels_B, local = self.exchange.dispatch(torch.cat([pair[0] for pair in pairs]), segments)
        weight_B, _ = self.exchange.dispatch(torch.cat([pair[1] for pair in pairs]), segments)
        both = zip(local, split(labels_B, local), split(weight_B, local), strict=True) if local else []
        return {s.task: (of_labels, of_weight) for s, of_labels, of_weight in both if s.task in mixes}


def slot_sizes(heads: nn.ModuleDict, placement: Placement, slot: int) -> tuple[int, int]:
    """Classes, and entries of the vector, of the largest heads in a slot of any expert-parallel rank."""
    sizes = []
    for tasks in placement.tasks_of:
        if slot < len(tasks):
            head = heads[tasks[slot]]
            assert isinstance(head, TaskHead)
            sizes.append((head.classifier.num_classes, head.entries))
    return max(rows for rows, _ in sizes), max(entries for _, entries in sizes)


def sharded_slots(placement: Placement, sharded: set[str]) -> set[int]:
    """The slots of heads whose rows are spread over their holders; none where a task has a single holder."""
    if placement.replicas == 1:
        return set()
    return {i for tasks in placement.tasks_of for i, task in enumerate(tasks) if task in sharded}


def parallelize(
    model: Supernet,
    placement: Placement,
    rank: int,
    samples: dict[str, int],
    exchange: str,
    holders: Callable[[int], HolderGroup] | None = None,
) -> Supernet:
    """Replace the expert layers of a model (on the meta device) by this rank's part of them.

    Args:
        samples: size of each task's global micro-batch.
        exchange: ``aligned`` or ``input`` (rows are where their experts are), or ``layer``.
        holders: the ranks that hold a task of this rank, by :attr:`Placement.first` of it; default: those of the job
            that this process is in.
    """
    if holders is None:
        holders = partial(RankGroup, groups._get_expert_data_parallel_group(f"ep_size_{placement.ep_size}"))
    layer_exchange = None
    if exchange == "layer" and placement.ep_size > 1:
        positions = [placement.read_evenly(other, samples) for other in placement.group(rank)]
        group = groups._get_expert_parallel_group(f"ep_size_{placement.ep_size}")
        layer_exchange = LayerExchange(placement, positions, placement.ep_rank(rank), group)
    for module in list(model.modules()):
        if isinstance(module, RoutedUnit) and isinstance(module.own, TaskExperts):
            module.own = ExpertParallelUnits(module.own, placement, rank, layer_exchange)
    assert isinstance(model.heads, TaskHeads)
    model.heads = ExpertParallelHeads(model.heads, placement, rank, layer_exchange, holders)
    return model


def expert_sizes(model: nn.Module, world_size: int) -> dict[str, int]:
    """The experts among the parameters, by name, and over how many ranks different ones are spread; ``world_size`` /
    that many ranks share each."""
    sizes = {}
    for prefix, module in model.named_modules():
        if isinstance(module, _ExpertParallel):
            of_this_rank = spread(module)
            for name, _ in module.named_parameters():
                # A part of a classifier is on this rank alone, like an expert of as many ranks as there are.
                sizes[f"{prefix}.{name}"] = world_size if name in of_this_rank else module.ep_size
    return sizes


def mark_expert(parameter: Any, size: int | None) -> None:
    """Tell DeepSpeed that a parameter is an expert, and over which ranks it is partitioned and reduced; None: shared.

    To be called on real parameters: they replace those on the meta device.
    """
    if size is not None:
        group_name = f"ep_size_{size}"
        parameter.allreduce = False
        parameter.group_name = group_name
        parameter.ds_zero_placement_family = "autoep_expert"
        parameter.ds_zero_partition_group_name = group_name
        parameter.ds_zero_partition_process_group = groups._get_expert_data_parallel_group(group_name)
