"""Activation checkpointing computes blocks again and changes nothing: losses and gradients are the same to the bit."""

import dataclasses
from collections import Counter

import pytest
import torch

from tests.small_run import make_recipe as recipe_of_run
from tests.test_model import make_batch, make_images, make_recipe, scrambled
from ufo_ds import checkpoint
from ufo_ds.errors import UserError
from ufo_ds.training.run_directory import check_resume


def step(recipe, dtype=torch.float32, autocast=False):
    """Losses and gradients of one step, and how often each block was computed in it."""
    model = scrambled(recipe).train()
    for parameter in model.parameters():  # as DeepSpeed does, which leaves the buffers
        parameter.data = parameter.data.to(dtype)
    calls = Counter()
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, i=i: calls.update([i]))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        losses = model(make_batch(make_images(recipe, count=5), step=3))
    losses.sum().backward()
    return losses, {name: p.grad for name, p in model.named_parameters()}, [calls[i] for i in range(3)]


@pytest.mark.parametrize(
    ("routes", "model"),
    [
        ("mixed", {"drop_path": 0.5}),
        ("learned", {"drop_path": 0.5, "router": {"probe": 0.25}, "shared_samples": 0.3}),
        ("shared", {"experts": []}),
    ],
)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "autocast"])
@pytest.mark.parametrize(("blocks", "calls"), [("full", [2, 2, 2]), (2, [2, 1, 2])])
def test_results_are_those_without(routes, model, precision, blocks, calls):
    how = {"dtype": torch.bfloat16 if precision == "bf16" else torch.float32, "autocast": precision == "autocast"}
    wanted_losses, wanted, once = step(make_recipe(routes, **model), **how)
    found_losses, found, repeated = step(make_recipe(routes, **model, activation_checkpointing=blocks), **how)
    assert once == [1, 1, 1]
    assert repeated == calls
    assert torch.equal(found_losses, wanted_losses)
    assert any(grad is not None and grad.any() for name, grad in wanted.items() if "blocks.0" in name)
    for name, grad in wanted.items():
        assert (found[name] is None) if grad is None else torch.equal(found[name], grad), name


def test_evaluation_computes_once():
    model = scrambled(make_recipe(activation_checkpointing="full")).eval()
    calls = Counter()
    model.blocks[0].register_forward_hook(lambda *_: calls.update([0]))
    outputs = model(make_batch(make_images(model.recipe)))
    sum(of_task.logits.sum() for of_task in outputs.values()).backward()
    assert calls[0] == 1


def test_a_run_may_go_on_with_it(run):
    recipe = recipe_of_run()
    changed = dataclasses.replace(recipe.model, activation_checkpointing="full")
    last = checkpoint.find(run / "checkpoints")[-1]
    slower = dataclasses.replace(recipe.optimizer, lr=recipe.optimizer.lr / 2)
    check_resume(run, dataclasses.replace(recipe, model=changed), last, {})
    with pytest.raises(UserError, match=r"optimizer\.lr"):
        check_resume(run, dataclasses.replace(recipe, optimizer=slower), last, {})


@pytest.mark.parametrize("value", ["half", 1, 0, True, None])
def test_wrong_values_are_refused(value):
    with pytest.raises(UserError, match="activation_checkpointing"):
        make_recipe(activation_checkpointing=value)
