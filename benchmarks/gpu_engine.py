"""Part of gpu.py: training through the engine, DeepSpeed with ZeRO-3 and one rank, against the plain model.

The model, batches and start values of gpu_equality.py, both on the GPU. In fp32 against torch.optim.SGD, in bf16
against SGD in the backward pass, which has the same fp32 masters. Needs deepspeed.
"""

import dataclasses
from collections.abc import Callable

import torch
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor

from benchmarks.gpu_equality import CLASSES, STEPS, difference, make_batch, make_model, make_recipe, parameter_groups
from benchmarks.gpu_equality import start_value as value_of
from ufo_ds.model.parameters import unused
from ufo_ds.parallel import config as configs
from ufo_ds.parallel.engine import Engine
from ufo_ds.parallel.launch import finish_distributed, init_distributed
from ufo_ds.recipe import Recipe
from ufo_ds.training import optimizer_in_backward as in_backward
from ufo_ds.training.optimizer_in_backward import SGDInBackward

BARS = {"fp32": {"loss": 1e-5, "weight": 1e-5}, "bf16": {"loss": 1e-2, "weight": 1e-2}}


def measure(device: torch.device, small: bool, limit_s: float, report: Callable[..., None]) -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    init_distributed()
    recipe = make_recipe()
    # Momentum in bf16, as SGD in the backward pass has it, would be another algorithm than the engine's.
    recipe = dataclasses.replace(recipe, optimizer=dataclasses.replace(recipe.optimizer, momentum=0.0))
    for kind, single in (("fp32", train_fp32), ("bf16", train_bf16)):
        expected = single(recipe, device)
        found = through_engine(recipe, kind)
        worst = dict.fromkeys(BARS[kind], 0.0)
        for key, wanted in expected.items():
            of_kind = key.partition(" ")[0]
            worst[of_kind] = max(worst[of_kind], difference(found[key], wanted))
        report(bars={f"engine_{kind}_{key}": (worst[key], bar) for key, bar in BARS[kind].items()})
    finish_distributed()


def through_engine(recipe: Recipe, kind: str) -> dict[str, Tensor]:
    values = {
        "zero_optimization": {"stage": 3},
        "expert_parallel": {"autoep_size": 1},
        "bf16": {"enabled": kind == "bf16"},
    }
    config = configs.resolve(values, "gpu_engine.py", recipe, world_size=1)
    engine = Engine(recipe, config, CLASSES, pretrained=value_of)
    notes = {
        f"loss {step}": engine.step([make_batch(recipe, step)], recipe.optimizer.lr).clone() for step in range(STEPS)
    }
    notes |= {f"weight {name}": safe_get_full_fp32_param(p).clone() for name, p in engine.model.named_parameters()}
    engine.deepspeed.destroy()
    return notes


def train_fp32(recipe: Recipe, device: torch.device) -> dict[str, Tensor]:
    model, notes = make_model(recipe, device), {}
    optimizer = torch.optim.SGD(parameter_groups(model, recipe))
    never = unused(dict(model.named_parameters()), model.routes)
    for step in range(STEPS):
        optimizer.zero_grad()
        losses_TK = model(make_batch(recipe, step).to(device))
        losses_TK.sum().backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is None and name not in never:  # it decays what a learned route left out in this step
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        notes[f"loss {step}"] = losses_TK.detach()
    return notes | {f"weight {name}": parameter.detach() for name, parameter in model.named_parameters()}


def train_bf16(recipe: Recipe, device: torch.device) -> dict[str, Tensor]:
    model, notes = make_model(recipe, device), {}
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()  # and these are the masters, as DeepSpeed has it
    optimizer = SGDInBackward(dict(model.named_parameters()), in_backward.rules_of(model))
    optimizer.learning_rate = recipe.optimizer.lr
    for step in range(STEPS):
        losses_TK = model(make_batch(recipe, step).to(device))
        losses_TK.sum().backward()
        notes[f"loss {step}"] = losses_TK.detach()
    return notes | {f"weight {name}": optimizer.master(name) for name in optimizer.parameters}
