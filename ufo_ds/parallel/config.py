"""The DeepSpeed JSON: values of ``"auto"`` are filled in, explicit ones that contradict the recipe are refused.

Two keys are read here and not by DeepSpeed: ``expert_parallel.autoep_size`` (a number or "auto") and
``expert_parallel.exchange`` (how samples come to the ranks that own their experts: "aligned", "input" or "layer").
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ufo_ds.errors import UserError
from ufo_ds.recipe import Recipe

EXCHANGES = ("aligned", "input", "layer")

# With parameters of different sizes at the same position of different ranks, whatever ZeRO-3 decides by size must be
# off, or ranks decide differently and hang.
_SIZE_BLIND = {
    "overlap_comm": False,
    "sub_group_size": 10**15,
    "stage3_prefetch_bucket_size": 0,
    "stage3_param_persistence_threshold": 0,
    "stage3_model_persistence_threshold": 10**15,
    "stage3_max_live_parameters": 10**15,
    "stage3_max_reuse_distance": 10**15,
}

# Elements where all sizes agree. A reduction of 2e8 keeps links busy and is a small part of a large model, so that
# reductions start early; DeepSpeed's own prefetch is several layers ahead; a step of 1e8 takes little room for its fp32
# copy of the gradients.
REDUCED_AT_ONCE, PREFETCHED, STEPPED_AT_ONCE = 2 * 10**8, 5 * 10**7, 10**8
SHARE_FOR_WHOLE = 0.25  # of a GPU's memory, for parameters that stay whole from the forward to the backward pass


@dataclass(frozen=True)
class DistributedConfig:
    """``deepspeed`` is what ``deepspeed.initialize`` gets, after :meth:`sized`."""

    deepspeed: dict[str, Any]
    ep_size: int | None  # None: by load, once samples and classes of all tasks are known
    exchange: str
    accumulation: int
    stage: int
    precision: str  # in words
    world_size: int

    def sized(self, alike: bool, elements: int, memory: int | None) -> "DistributedConfig":
        """With every "auto" of ``zero_optimization`` that goes by the sizes of parameters; all ranks must give the
        same.

        Where ranks have parameters of the same sizes, communication hides behind computation: gradients are reduced in
        buckets, parameters gathered ahead of their use. Under ZeRO-3 those are kept whole for the backward pass that
        need at most ``SHARE_FOR_WHOLE`` of the memory; others are gathered anew, half as much again to send.

        Args:
            alike: whether at every position all ranks have parameters of the same size.
            elements: of all parameters of the rank with most.
            memory: bytes of the smallest GPU; None: unknown, and all parameters are kept whole.
        """
        chosen = dict(_SIZE_BLIND, reduce_bucket_size=elements)
        if alike and self.world_size > 1:
            chosen |= {
                "overlap_comm": True,
                "reduce_bucket_size": min(REDUCED_AT_ONCE, elements),
                "sub_group_size": STEPPED_AT_ONCE,
                "stage3_prefetch_bucket_size": min(PREFETCHED, elements),
            }
            element = 2 if self.precision == "bf16" else 4  # bytes
            room = elements if memory is None else int(SHARE_FOR_WHOLE * memory) // element
            if room < elements:
                # Reuse counts what is passed on the way to the loss and back.
                chosen |= {"stage3_max_live_parameters": room, "stage3_max_reuse_distance": 2 * room}
        zero = self.deepspeed["zero_optimization"]
        keys = [key for key in chosen if key in zero or self.stage == 3 or not key.startswith(("stage3_", "sub_"))]
        zero = zero | {key: chosen[key] for key in keys if zero.get(key, "auto") == "auto"}
        return replace(self, deepspeed={**self.deepspeed, "zero_optimization": zero})


def decides_by_size(zero: dict[str, Any], largest: int) -> list[str]:
    """The keys of ``zero_optimization`` whose values have ZeRO decide by the sizes of parameters; ``largest``: elements
    of all parameters of a rank. (``sub_group_size`` matters only by the number of sub-groups.)"""
    keys = [key for key in _SIZE_BLIND if key.startswith("stage3_") and zero["stage"] == 3]
    released = ("stage3_max_reuse_distance", 0)  # nothing stays whole, however small
    found = [key for key in keys if zero[key] != _SIZE_BLIND[key] and (key, zero[key]) != released]
    return found + (["reduce_bucket_size"] if zero["reduce_bucket_size"] < largest else [])


def load(path: str) -> dict[str, Any]:
    """Read a DeepSpeed JSON.

    Raises:
        UserError: no such file, or not a JSON object.
    """
    try:
        values = json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise UserError(f"--deepspeed {path}: no such file; ds_configs/moe.json is a start") from None
    except (OSError, ValueError) as error:
        raise UserError(f"--deepspeed {path} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"--deepspeed {path}: expected a JSON object, found {type(values).__name__}")
    return values


def resolve(values: dict[str, Any], source: str, recipe: Recipe, world_size: int) -> DistributedConfig:
    """Fill in what is "auto" and check the rest against the recipe.

    Raises:
        UserError: two explicit values that disagree (both are named), or a value out of range.
    """

    def take(section: dict[str, Any], key: str, auto: Any) -> Any:
        value = section.get(key, "auto")
        return auto if value == "auto" else value

    def agree(name: str, found: Any, wanted: Any, meaning: str) -> None:
        if found != wanted:
            raise UserError(f'{source}: {name} is {found}, but {meaning} is {wanted}: make them equal, or say "auto"')

    values = json.loads(json.dumps(values))  # a copy of its own
    accumulation = _positive(take(values, "gradient_accumulation_steps", 1), "gradient_accumulation_steps", source)
    for task in recipe.tasks:
        for key in ("samples_per_step", "identities_per_step"):
            if (getattr(task, key) or 0) % accumulation:
                raise UserError(
                    f"{source}: gradient_accumulation_steps {accumulation} does not divide {key} "
                    f"{getattr(task, key)} of task {task.name}: change one of them"
                )
    samples = recipe.data.samples_per_step or sum(task.samples_per_step for task in recipe.tasks)
    agree("train_batch_size", take(values, "train_batch_size", samples), samples, "the recipe's samples per step")
    per_rank = samples / (accumulation * world_size)
    agree(
        "train_micro_batch_size_per_gpu",
        take(values, "train_micro_batch_size_per_gpu", per_rank),
        per_rank,
        f"{samples} samples per step / {accumulation} micro-batches / {world_size} ranks",
    )
    clipping = recipe.optimizer.gradient_clipping
    agree("gradient_clipping", take(values, "gradient_clipping", clipping), clipping, "optimizer.gradient_clipping")
    _check_optimizer(values.pop("optimizer", None), source, recipe, agree)
    if "scheduler" in values:
        raise UserError(f"{source}: remove the key scheduler: the recipe's schedule is used")
    if take(values.get("fp16", {}), "enabled", False):
        raise UserError(f"{source}: fp16.enabled is true: use bf16, loss scaling is not supported")

    experts = values.pop("expert_parallel", {})
    # Where a step trains one task alone only ranks that all have it share its work.
    ep_size = take(experts, "autoep_size", 1 if recipe.data.batches == "isomorphic" else None)
    if ep_size is not None and world_size % _positive(ep_size, "autoep_size", source):
        raise UserError(
            f"{source}: expert_parallel.autoep_size {ep_size} does not divide the {world_size} ranks: "
            'use a divisor, or "auto"'
        )
    exchange = take(experts, "exchange", "aligned")
    if exchange not in EXCHANGES:
        raise UserError(f"{source}: expert_parallel.exchange {exchange!r}: use one of {', '.join(EXCHANGES)}")
    varying = {
        'data.batches is "isomorphic"': recipe.data.batches == "isomorphic",
        "data.balance is given": recipe.data.balance is not None,
    }
    for setting, is_on in varying.items():
        if is_on and exchange != "aligned":
            raise UserError(
                f'{source}: expert_parallel.exchange "{exchange}" moves as many samples in every step, but {setting}: '
                f'use "aligned"'
            )

    zero = dict(values.get("zero_optimization", {}))
    stage = take(zero, "stage", 3)
    if stage not in (1, 2, 3):
        raise UserError(f"{source}: zero_optimization.stage {stage!r}: use 1, 2 or 3")
    for section, key in (("zero_optimization", "compute_grad_norm"), ("bf16", "check_grad_overflow")):
        if values.get(section, {}).get(key) is False:
            raise UserError(
                f"{source}: {section}.{key} is false, but by it steps are left out that are not finite: remove it"
            )
    zero["stage"] = stage
    autocast = bool(take(values.get("torch_autocast", {}), "enabled", False))
    bf16 = bool(take(values.get("bf16", {}), "enabled", torch.cuda.is_available() and not autocast))
    if autocast and bf16:
        raise UserError(f"{source}: both bf16 and torch_autocast are enabled: choose one")
    precision = "bf16" if bf16 else "fp32 with autocast to bf16" if autocast else "fp32"
    values |= {
        # DeepSpeed wants equal batches on all ranks; ours differ, so it is told about one item per rank. The losses
        # carry their own normalisation.
        "train_batch_size": accumulation * world_size,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": clipping,
        "bf16": {**values.get("bf16", {}), "enabled": bf16},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": values.get("steps_per_print", 10**9),
    }
    return DistributedConfig(values, ep_size, exchange, accumulation, stage, precision, world_size)


def _positive(value: Any, name: str, source: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{source}: {name} is {value!r}: use a positive whole number")
    return value


def _check_optimizer(section: Any, source: str, recipe: Recipe, agree: Any) -> None:
    """The recipe's optimizer is used; a section in the JSON may repeat it but not contradict it."""
    if section is None:
        return
    optimizer = recipe.optimizer
    known = {
        "lr": optimizer.lr,
        "weight_decay": optimizer.weight_decay,
        "betas": list(optimizer.betas),
        "momentum": optimizer.momentum,
    }
    name = str(section.get("type", "auto")).lower()
    if name != "auto":
        agree("optimizer.type", name, optimizer.type, "optimizer.type of the recipe")
    for key, value in section.get("params", {}).items():
        if value != "auto" and key in known:
            agree(f"optimizer.params.{key}", value, known[key], f"optimizer.{key} of the recipe")
