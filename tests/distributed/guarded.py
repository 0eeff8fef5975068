"""A step with a NaN on one rank, and steps with spikes, in an engine of two ranks; run on every rank."""

import dataclasses
import json

import torch

from tests.distributed.equality import CLASSES, global_batch, make_recipe, part_of
from tests.distributed.test_equality import case
from ufo_ds.data.mixing import Batch
from ufo_ds.parallel import config as configs
from ufo_ds.parallel import guard
from ufo_ds.parallel.averages import head_buffers
from ufo_ds.parallel.conflict import gradient_conflict
from ufo_ds.parallel.engine import Engine
from ufo_ds.parallel.launch import finish_distributed, init_distributed

POISONED, STEPS = 2, 5


def state_of(engine: Engine) -> dict[str, torch.Tensor | float]:
    """All that a step changes on this rank, the parameters that the forward pass sees apart."""
    found: dict[str, torch.Tensor | float] = {}
    for i, (flat, state) in enumerate(engine.optimizer.state.items()):
        found[f"{i} weight"] = flat.detach().clone()
        found |= {f"{i} {key}": v.clone() if torch.is_tensor(v) else v for key, v in state.items()}
    found |= {name: buffer.clone() for name, buffer in head_buffers(engine).items()}
    found |= {f"{name} average": value.clone() for name, value in engine.buffer_averages.values.items()}
    return found


def assert_same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for key, value in a.items():
        assert torch.equal(value, b[key]) if torch.is_tensor(value) else value == b[key], key


def batches_of(engine: Engine, number: int, poisoned: bool = False) -> list[Batch]:
    batches = []
    for micro_step in range(2):
        batch = global_batch(engine.recipe, number, micro_step, engine.samples, CLASSES)
        batch = part_of(batch, engine.reads(engine.samples))
        if poisoned and engine.rank == 1 and micro_step == 1:
            task = next(task for task in batch.tasks.values() if len(task.images))
            task.images = task.images.float()
            task.images[0, 0, 0, 0] = float("nan")
        batches.append(batch)
    return batches


def step(engine: Engine, number: int, poisoned: bool = False, rate: float = 0.01) -> None:
    engine.step(batches_of(engine, number, poisoned), rate)


def check_spikes(engine: Engine) -> None:
    """With a past that is known: what is more than ten times its median is left out."""
    step(engine, STEPS, rate=1e-9)
    (loss, norm) = engine.guard.memory()["usual"][-1]
    assert norm > 0
    for usual, fine in [
        ([loss, norm], True),
        ([loss / 20, norm], False),
        ([loss, norm / 20], False),
        ([loss / 5, norm / 5], True),
    ]:
        # As a checkpoint has it; half of the past is far off, as a median does not mind.
        past = [[value * 1.01 for value in usual]] * 51 + [[1e9, 1e9]] * 49
        memory = json.loads(json.dumps({"taken": guard.WINDOW, "count": 7, "in_a_row": 0, "usual": past}))
        engine.guard.remember(memory)
        assert engine.guard.memory()["usual"] == [torch.tensor(row).tolist() for row in past]
        before = state_of(engine)
        step(engine, STEPS, rate=1e-9)  # much the same step again
        left_out = engine.guard.left_out
        assert (left_out is None) == fine, (usual, loss, norm, left_out)
        assert engine.guard.count == 7 + (not fine)
        if not fine:
            assert_same(state_of(engine), before)
    assert engine.guard.in_a_row == 0
    # A rank that cannot go on: no rank takes the step, and all know why.
    before = state_of(engine)
    engine.step(batches_of(engine, 0), 0.01, stop=engine.rank == 1)
    assert engine.guard.left_out is not None
    assert engine.guard.left_out.asked
    assert_same(state_of(engine), before)


def main(stage: int, bf16: bool) -> int:
    init_distributed()
    recipe = make_recipe(case(2, stage, optimizer="adamw"))
    values = {
        "gradient_accumulation_steps": 2,
        "zero_optimization": {"stage": stage},
        "expert_parallel": {"autoep_size": 2},
        "bf16": {"enabled": bf16},
    }
    config = configs.resolve(values, "guarded.py", recipe, 2)
    engine = Engine(recipe, config, CLASSES)
    for number in range(STEPS):
        before = state_of(engine)
        step(engine, number, poisoned=number == POISONED)
        left_out = engine.guard.left_out
        assert (left_out is None) == (number != POISONED)
        if left_out is not None:
            assert left_out.loss != left_out.loss
            assert not left_out.asked
            assert engine.guard.count == engine.guard.in_a_row == 1
            assert_same(state_of(engine), before)
            if not bf16:  # what is only looked at is no step, and nothing can be said of its gradient
                assert gradient_conflict(engine, batches_of(engine, number)).keys() == engine.samples.keys()
                assert gradient_conflict(engine, batches_of(engine, number, poisoned=True)) == {}
                assert engine.guard.count == 1
                assert_same(state_of(engine), before)
        else:
            assert engine.guard.in_a_row == 0
    found = state_of(engine)
    engine.deepspeed.destroy()
    engine = Engine(recipe, config, CLASSES)
    for number in range(STEPS):
        if number != POISONED:
            step(engine, number)
    assert_same(state_of(engine), found)
    engine.deepspeed.destroy()
    if stage == 3 and not bf16:
        recipe = dataclasses.replace(recipe, guard=dataclasses.replace(recipe.guard, spike=10.0))
        check_spikes(Engine(recipe, config, CLASSES))
    finish_distributed()
    return 0
