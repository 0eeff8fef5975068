"""Bytes that DeepSpeed 0.19.8 holds on a rank, by its own rules (``runtime/zero/stage3.py``, ``stage_1_and_2.py``).

ZeRO-3 partitions every parameter over its holders, each part rounded up. ZeRO-1 and 2 lay the parameters of a group one
behind the other, pad the whole to twice the number of holders, and partition that. fp32 partitions are copies in every
precision.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ufo_ds.errors import UserError
from ufo_ds.parallel.config import DistributedConfig
from ufo_ds.parallel.optimizers import OPTIMIZERS
from ufo_ds.parallel.rank_model import Held, RankModel
from ufo_ds.recipe import Optimizer
from ufo_ds.subnets.activations import FP32, PRECISIONS

ALIGNMENT = 2  # elements, times the number of holders: DeepSpeed's nccl_start_alignment_factor
# What would change the figures and is not modelled, with the values that change nothing.
UNCOUNTED: dict[str, tuple[Any, ...]] = {
    "offload_optimizer": (None,),
    "offload_param": (None,),
    "contiguous_gradients": (True,),
    "reduce_scatter": (True,),
    "round_robin_gradients": (False,),
    "parameter_alignment": (False,),
    "use_multi_rank_bucket_allreduce": (True,),
    "zero_hpz_partition_size": (1,),
    "zero_quantized_weights": (False,),
    "zero_quantized_gradients": (False,),
    "stage3_param_persistence_threshold": (0,),
    "zenflow": (None,),
}


@dataclass(frozen=True)
class Memory:
    """Bytes on a rank. The first seven are there throughout; of the others those of one phase at a time."""

    parameters: int  # as the forward pass sees them
    master: int  # fp32 partitions
    gradients: int  # partitions, from the backward pass to the step
    reduction_buffer: int  # in which gradients are collected before they are reduced
    optimizer_state: int
    averages: int
    buffers: int
    activations: int  # kept for the backward pass, at its beginning
    gathered: int  # ZeRO-3: parameters that are whole then, the largest module's included
    largest_gather: int  # ZeRO-3: of one module
    whole_gradients: int  # ZeRO-1: of all parameters, before they are reduced
    reduction_copy: int  # of the gradients that one collective reduces
    step_copy: int  # of the gradients of one group, in fp32

    @property
    def resident(self) -> int:
        return (
            self.parameters + self.master + self.gradients + self.reduction_buffer + self.optimizer_state
            + self.averages + self.buffers
        )  # fmt: skip

    @property
    def phases(self) -> dict[str, int]:
        """What comes on top, by phase. In ZeRO-1's backward pass gradients grow while activations go."""
        return {
            "forward and backward": max(self.activations + self.gathered, self.whole_gradients),
            "reduction": self.reduction_copy,
            "step": self.step_copy,
        }

    @property
    def peak(self) -> int:
        return self.resident + max(self.phases.values())


def refuse_uncounted(config: DistributedConfig, source: str, elements: int) -> None:
    """
    Args:
        config: :func:`sized`; ``elements``: of all parameters of a rank.

    Raises:
        UserError: a key of the DeepSpeed JSON whose effect is not modelled.
    """
    zero = config.deepspeed["zero_optimization"]
    found = {f"zero_optimization.{k}": zero[k] for k, same in UNCOUNTED.items() if k in zero and zero[k] not in same}
    found |= {
        key: config.deepspeed[key] for key in ("data_types", "communication_data_type") if key in config.deepspeed
    }
    for key, value in found.items():
        raise UserError(f"{source}: a plan does not count {key} {value!r}: remove it for the plan")
    if config.stage == 3 and zero["stage3_prefetch_bucket_size"]:
        distance, live = zero["stage3_max_reuse_distance"], zero["stage3_max_live_parameters"]
        if distance < 2 * min(live, elements):
            raise UserError(
                f"{source}: a plan does not count what stays whole where zero_optimization.stage3_max_reuse_distance, "
                f'{distance}, is less than twice stage3_max_live_parameters, {live}: change one, or say "auto"'
            )


def sized(config: DistributedConfig, models: Sequence[RankModel], gpu_memory: int | None) -> DistributedConfig:
    """With the values that an engine of these models, of all expert-parallel ranks, would choose; ``gpu_memory`` in
    bytes."""
    sizes = [tuple(p.numel for p in model.parameters) for model in models]
    return config.sized(len(set(sizes)) == 1, max(map(sum, sizes)), gpu_memory)


def state_tensors(options: Optimizer) -> int:
    """Tensors as large as the fp32 partition that the optimizer keeps, without the moving average."""
    nothing = [{"params": [torch.nn.Parameter(torch.empty(0))]}]
    return len(OPTIMIZERS[options.type](nothing, options).state_keys())


def partition_groups(parameters: Iterable[Held]) -> list[list[Held]]:
    """DeepSpeed's parameter groups: experts and shared ones, by the ranks they are partitioned over."""
    found: dict[int, list[Held]] = {}
    for parameter in parameters:
        found.setdefault(parameter.experts, []).append(parameter)
    return list(found.values())


def aligned(group: Sequence[Held]) -> int:
    """Elements of a group laid out flat, under ZeRO-1 and 2."""
    unit = ALIGNMENT * group[0].holders
    return -(-sum(p.numel for p in group) // unit) * unit


@dataclass(frozen=True)
class Gathers:
    """What ZeRO-3 gathers: elements of every module, in the order of the forward pass; those that stay whole from there
    to their next use; those of recomputed blocks that stay whole from there to the backward pass."""

    padded: dict[str, int]
    kept: set[str]
    kept_again: set[str]
    block: dict[str, int]  # of the modules of recomputed blocks, which block that is
    stay: set[str]  # units whose copies stay whole while others of the unit are called

    def times(self, parameter: Held) -> int:
        """How often a parameter is gathered in a forward and backward pass."""
        if parameter.module in self.kept:
            return 1
        calls = 1 if _unit(parameter) in self.stay else parameter.calls
        if parameter.module not in self.block:
            return calls + 1
        return 2 * calls + (parameter.module not in self.kept_again)


def gathers(model: RankModel, config: DistributedConfig) -> Gathers:
    """What a rank with this model gathers.

    DeepSpeed keeps a module if fewer than ``stage3_max_reuse_distance`` elements are used until it comes again. What it
    fetches ahead while that is there already would be kept too: with ``stage3_max_live_parameters`` of at most half the
    distance there is none such.
    """
    distance = config.deepspeed["zero_optimization"]["stage3_max_reuse_distance"]
    padded: dict[str, int] = {}
    passed: dict[str, int] = {}
    block: dict[str, int] = {}
    of_block = dict.fromkeys(model.recomputed, 0)
    for parameter in model.parameters:
        if parameter.calls:
            shared = parameter.padded if parameter.holders > 1 else 0
            padded[parameter.module] = padded.get(parameter.module, 0) + shared
            passed[parameter.module] = passed.get(parameter.module, 0) + parameter.numel
            if parameter.block is not None and parameter.block in model.recomputed:
                block[parameter.module] = parameter.block
                of_block[parameter.block] += parameter.numel
    kept, kept_again, between = set(), set(), 0
    behind: dict[int, int] = {}  # elements used between a recomputed block's forward pass and its recomputation
    for module in reversed(padded):
        number = block.get(module)
        if number is None:
            until_next = between
        else:
            until_next = behind.setdefault(number, between) + of_block[number] - passed[module]
            if (between - behind[number]) * 2 // 3 < distance:
                kept_again.add(module)
        if until_next < distance:
            kept.add(module)
        if not module.startswith("heads."):  # leaves are not looked into on the way
            between += (3 if module in block else 2) * passed[module]
    units = Counter[str]()
    for p in model.parameters:
        units[_unit(p)] += p.numel if p.calls else 0
    return Gathers(padded, kept, kept_again, block, {unit for unit, size in units.items() if size < distance})


def _unit(parameter: Held) -> str:
    return re.split(r"\.(?:own|shared)\.", parameter.name)[0]


def largest_reduction(model: RankModel, config: DistributedConfig) -> int:
    """Elements, padding included, of the largest collective that reduces gradients.

    They fill a bucket in reverse order, one for each type, until it has no room for the next. At stage 3 those of
    another group of ranks begin a new one; at 1 and 2 the groups of a bucket are reduced one after the other.
    """
    bucket, largest = config.deepspeed["zero_optimization"]["reduce_bucket_size"], 0
    used = [p for p in reversed(model.parameters) if p.calls]
    for wire in {wire_bytes(p, config) for p in used}:
        filled, by_group = 0, dict[int, int]()
        for p in (p for p in used if wire_bytes(p, config) == wire):
            if filled + p.numel > bucket or (config.stage == 3 and p.experts not in by_group):
                filled, by_group = 0, {}
            filled += p.numel
            by_group[p.experts] = by_group.get(p.experts, 0) + (p.padded if config.stage == 3 else p.numel)
            largest = max(largest, by_group[p.experts])
    return largest


def largest_step(groups: Iterable[Sequence[Held]], sub_group_size: int) -> int:
    """Elements that the optimizer steps at once at stage 3: parameters of a group until they are as many."""
    largest = 0
    for group in groups:
        elements = 0
        for p in group:
            elements = p.part if elements >= sub_group_size else elements + p.part
            largest = max(largest, elements)
    return largest


def memory(model: RankModel, config: DistributedConfig, options: Optimizer, activations: int) -> Memory:
    """What a rank with this model holds; ``config``: :func:`sized`, ``activations`` in bytes."""
    zero, precision = config.deepspeed["zero_optimization"], PRECISIONS[config.precision]
    element, groups = precision.parameter, partition_groups(model.parameters)
    if config.stage == 3:
        parts = [sum(p.part for p in group) for group in groups]
        whole = sum(parts)
        found = gathers(model, config)
        largest_gather = max(found.padded.values()) * element
        gathered = sum(size for name, size in found.padded.items() if name in found.kept) * element
        if len(found.kept) < len(found.padded):
            gathered += largest_gather
            if zero["stage3_prefetch_bucket_size"]:  # which goes on until as many are live, the last one on top
                live = zero["stage3_max_live_parameters"] + max(p.padded for p in model.parameters)
                gathered = min(max(gathered, live * element), sum(found.padded.values()) * element)
        # What a block computes again holds its parameters until its backward pass.
        again = dict.fromkeys(model.recomputed, 0)
        for name, number in found.block.items():
            again[number] += 0 if name in found.kept else found.padded[name] * element
        gathered += max(again.values(), default=0)
    else:
        parts = [aligned(group) // group[0].holders for group in groups]
        whole = sum(aligned(group) for group in groups)
        largest_gather = gathered = 0
    wire = {wire_bytes(p, config) for p in model.parameters}  # one bucket for each; ZeRO-1 and 2 keep both in fp32
    buffers = sum(wire) if config.stage == 3 else len(wire) * element
    double = 2 if config.stage < 3 and zero.get("overlap_comm") else 1
    step = largest_step(groups, zero["sub_group_size"]) if config.stage == 3 else max(parts)
    return Memory(
        parameters=whole * element,
        master=sum(parts) * FP32,
        gradients=sum(parts) * element,
        reduction_buffer=zero["reduce_bucket_size"] * buffers * double,
        optimizer_state=sum(parts) * FP32 * state_tensors(options),
        averages=sum(parts) * FP32 if options.average is not None else 0,
        buffers=model.buffers * FP32,
        activations=activations + (_cast_copies(model) if precision.autocast else 0),
        gathered=gathered,
        largest_gather=largest_gather,
        whole_gradients=sum(p.numel for p in model.parameters if p.calls) * element if config.stage == 1 else 0,
        reduction_copy=largest_reduction(model, config) * element,
        step_copy=step * (FP32 if element == FP32 else FP32 + element),
    )  # fmt: skip


def _cast_copies(model: RankModel) -> int:
    """Bytes of the weights' copies in bf16 that autocast makes and the backward pass needs: of one of the recomputed
    blocks at a time."""
    sizes: dict[int | None, int] = {}
    for parameter in model.parameters:
        if parameter.calls and parameter.lower:
            block = parameter.block if parameter.block in model.recomputed else None
            sizes[block] = sizes.get(block, 0) + 2 * parameter.numel
    return sizes.pop(None, 0) + max(sizes.values(), default=0)


def wire_bytes(parameter: Held, config: DistributedConfig) -> int:
    """Bytes of an element of a parameter's gradient when it is reduced."""
    precision = PRECISIONS[config.precision]
    return precision.rows if parameter.lower and precision.autocast else precision.parameter
