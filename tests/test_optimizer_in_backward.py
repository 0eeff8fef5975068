"""SGD in the backward pass against torch.optim.SGD on fp32 masters, bit for bit."""

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks.gpu_throughput import recompute
from tests.small_run import make_recipe
from ufo_ds.data.mixing import Batch, TaskBatch
from ufo_ds.model.parameters import UpdateRule
from ufo_ds.model.supernet import Supernet, init_weights
from ufo_ds.training import optimizer_in_backward as in_backward
from ufo_ds.training.optimizer_in_backward import SGDInBackward, join_master, split_master

RATES = (0.1, 0.07, 0.2, 0.03, 0.5)


def rounded(masters: np.ndarray) -> np.ndarray:
    """The nearest bf16, halfway cases away from zero, by exact arithmetic on neighbours."""
    bits = masters.view(np.uint32)
    below = (bits & 0xFFFF0000).view(np.float32).astype(np.float64)
    above = ((bits & 0xFFFF0000) + np.uint32(0x10000)).view(np.float32).astype(np.float64)
    exact = masters.astype(np.float64)
    return np.where(np.abs(exact - below) < np.abs(above - exact), below, above)


def bits_of(x: Tensor) -> Tensor:
    return x.detach().view(torch.int32 if x.dtype == torch.float32 else torch.int16)


@pytest.mark.parametrize("seed", range(5))
def test_a_master_survives_its_split(seed):
    random = np.random.default_rng(seed)
    bits = random.integers(0, 2**32, 20000, dtype=np.uint32)  # of any float: subnormal, infinite, NaN
    bits[:4000] = bits[:4000] & 0xFFFF0000 | 0x8000  # halfway between two bf16
    bits[4000:6000] |= 0x007F8000  # the mantissa carries into the exponent
    bits[:8] = [0, 0x80000000, 0x7F800000, 0xFF800000, 0x7FC00000, 0x7F7FFFFF, 0x00000001, 0x80008000]
    masters = torch.from_numpy(bits.view(np.float32))
    weights, residuals = split_master(masters)
    assert weights.dtype == torch.bfloat16
    assert residuals.dtype == torch.int16
    assert torch.equal(bits_of(join_master(weights, residuals)), bits_of(masters))
    usual = np.abs(masters.numpy()) < 3e38  # what rounds to a number
    with np.errstate(invalid="ignore"):
        assert np.array_equal(weights.double().numpy()[usual], rounded(masters.numpy()[usual]))


def test_weights_are_torchs_roundings_but_for_halfway_cases():
    masters = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    weights, _ = split_master(masters)
    halfway = bits_of(masters) & 0xFFFF == 0x8000
    assert torch.equal(weights[~halfway], masters.bfloat16()[~halfway])


class Small(nn.Module):
    """``idle`` gets no gradient; ``twice`` one from two places."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(12, 20), nn.Linear(20, 3)
        self.twice, self.idle = nn.Linear(20, 20), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.twice(torch.tanh(self.twice(self.first(x)))))


@pytest.mark.parametrize(("momentum", "max_norm"), [(0.0, None), (0.9, None), (0.9, 0.05)])
def test_equals_torch_sgd_on_fp32_masters_bit_for_bit(momentum, max_norm):
    torch.manual_seed(1)
    model = Small()
    masters = {name: nn.Parameter(p.detach().clone()) for name, p in model.named_parameters()}
    rules = {
        name: UpdateRule(2.0 if name.endswith("bias") else 0.5, 0.0 if name.endswith("bias") else 0.01, False)
        for name in masters
    }
    groups = [{"params": [p], "weight_decay": rules[name].weight_decay} for name, p in masters.items()]
    expected = torch.optim.SGD(groups, lr=0.1, momentum=momentum, foreach=False)
    plain = copy.deepcopy(model).bfloat16()

    model.bfloat16()
    optimizer = SGDInBackward(dict(model.named_parameters()), rules, momentum, max_norm)
    for name, master in masters.items():
        optimizer.assign(name, master.detach())
    start = {name: optimizer.master(name) for name in masters}

    for rate in RATES:
        x = torch.randn(7, 12).bfloat16()
        optimizer.learning_rate = rate
        model(x).float().square().mean().backward()
        assert all(p.grad is None for p in model.parameters())

        for name, parameter in plain.named_parameters():  # forward and backward with the rounded masters
            parameter.data, parameter.grad = split_master(masters[name].detach())[0], None
        plain(x).float().square().mean().backward()
        for (name, parameter), group in zip(plain.named_parameters(), expected.param_groups, strict=True):
            masters[name].grad = None if parameter.grad is None else parameter.grad.float()
            group["lr"] = rate * rules[name].lr_scale
            if max_norm is not None:
                torch.nn.utils.clip_grad_norm_(masters[name], max_norm)
        expected.step()
        for state in expected.state.values():
            if momentum:
                state["momentum_buffer"] = state["momentum_buffer"].bfloat16().float()
        for name, master in masters.items():
            assert torch.equal(bits_of(optimizer.master(name)), bits_of(master)), name

    for name in masters:
        assert torch.equal(start[name], optimizer.master(name)) == name.startswith("idle")

    n = sum(p.numel() for p in masters.values())
    assert optimizer.state_bytes() == {"weights": 2 * n, "residuals": 2 * n, "momentum": 2 * n * bool(momentum)}
    optimizer.remove()
    model(x).sum().backward()
    assert model.first.weight.grad is not None


def test_refuses_other_weights():
    with pytest.raises(ValueError, match=r"weight is torch\.float32: convert"):
        SGDInBackward(dict(nn.Linear(2, 2).named_parameters()), {})


def test_a_supernet_starts_as_everywhere_else():
    recipe, classes = make_recipe(), {"digits": 10, "glyphs": 7}
    with torch.device("meta"):
        expected, model = Supernet(recipe, classes), Supernet(recipe, classes)
    init_weights(expected)
    in_backward.to_device(model, "cpu")
    optimizer = SGDInBackward(dict(model.named_parameters()), in_backward.rules_of(model))
    in_backward.assign_initial_values(optimizer, model)
    for name, wanted in expected.named_parameters():
        assert torch.equal(optimizer.master(name), wanted), name
    for name, wanted in expected.named_buffers():
        found = model.get_buffer(name)
        assert found.dtype == wanted.dtype
        assert torch.equal(found, wanted), name


@pytest.mark.parametrize("route", ["own", "learned"])
def test_recomputed_blocks_take_the_same_steps(route):
    """A block is computed again before any of its own weights has changed, whatever changed behind it."""
    recipe = make_recipe(experts=["embed", "attn", "ffn"], routes={"attn": route})
    classes, ends, start = {"digits": 10, "glyphs": 7}, [], {}
    for on in (False, True):
        with torch.device("meta"):
            model = Supernet(recipe, classes)
        in_backward.to_device(model, "cpu")
        optimizer = SGDInBackward(dict(model.named_parameters()), in_backward.rules_of(model))
        in_backward.assign_initial_values(optimizer, model)
        start = {name: optimizer.master(name) for name in optimizer.parameters}
        recompute(model.train(), on)
        optimizer.learning_rate = 0.1
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            tasks = {
                task.name: TaskBatch(
                    torch.randint(0, 256, (8, 3, *task.input), generator=generator).to(torch.uint8),
                    torch.arange(8) // 2, range(8), 8,
                )
                for task in recipe.tasks
            }  # fmt: skip
            model(Batch(step, 0, tasks, {})).sum().backward()
        ends.append({name: optimizer.master(name) for name in optimizer.parameters})
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
    assert sum(not torch.equal(value, ends[0][name]) for name, value in start.items()) > len(start) / 2
