"""In a step the host does not wait for the device, but where it is said why (see waits.py)."""

import json

import pytest
import torch

from tests.distributed import waits
from tests.distributed.test_equality import case as of_equality
from tests.distributed.waits import noted_waits
from tests.ranks import results

# By place and operation: how often in a micro-batch, and why.
OURS = {
    ("model/router.py:choices", "tolist"): 1,  # which copies are called is decided on the host
    ("model/heads.py:_sample", "nonzero"): 2,  # of each task with sampled negatives: how many there are
    # Draws, which are made on the host.
    ("model/router.py:_noise", "lift_fresh"): None,
    ("model/router.py:probed_block", "_local_scalar_dense"): None,
}
# DeepSpeed 0.19.8, once a step: the norm for clipping, and whether it is finite.
DEEPSPEEDS = {
    "runtime/utils.py:is_invalid_grad_norm",
    "runtime/utils.py:mask_nan_or_inf_with_val_inplace",
    "runtime/zero/stage3.py:get_grad_norm_direct",
    "runtime/zero/stage_1_and_2.py:has_overflow",
}


def case(*arguments, bf16=False, **options):
    return {**of_equality(*arguments, **options), "bf16": bf16}


def test_a_step_does_not_wait():
    cases = [
        case(1, 3, sharded=["a"], sampled=["a", "b"], optimizer="lamb", mixing=True, recompute="full"),
        case(2, 1, "input", "frozen", optimizer="adamw", multi_label=True, bf16=True),
        case(2, 3, "layer", "frozen", optimizer="lars", bf16=True, shared_samples=0.2),
        case(1, 2, routes="frozen", clipping=0.0),
    ]
    seen = set()
    for result in results(2, waits.run, cases):
        for found in result["ranks"]:
            line = f"{found} of {json.dumps(result['case'])}"
            for who, where, what, times in found:
                if who == "deepspeed":
                    assert where in DEEPSPEEDS, line
                else:
                    most = OURS.get((where, what), 0)
                    assert most is None or times <= most * result["case"]["accumulation"], line
                seen.add((where, what))
    assert seen >= OURS.keys(), "what is allowed, but does not happen"


X, MASK = torch.ones(3, requires_grad=True), torch.tensor([True, False, True])


@pytest.mark.parametrize(
    "wait",
    [
        lambda: X.sum().item(),
        lambda: float(X.detach()[0]),
        lambda: bool((X > 0).all()),
        lambda: X.tolist(),
        lambda: X.detach().cpu(),
        lambda: X[MASK],
        lambda: X.detach().clone().masked_fill_(MASK, 0.0)[MASK.nonzero()],
        lambda: X.detach().clone().__setitem__(MASK, 0.0),
        lambda: X.new_tensor([1.0]),
        lambda: X[[0, 2]],
        lambda: torch.repeat_interleave(X, torch.tensor([1, 2, 3])),
        lambda: X.masked_select(MASK),
    ],
)
def test_what_waits_is_seen(wait):
    with noted_waits() as found:
        wait()
    assert found


def test_what_waits_in_the_backward_pass_is_seen():
    class Waiting(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, grad):
            return grad * grad.sum().item()

    y = Waiting.apply(X).sum()
    with noted_waits() as found:
        y.backward()
    assert found


def test_what_does_not_wait_is_not_seen():
    with noted_waits() as found:
        torch.where(MASK, X, 0.0).masked_fill(MASK, 1.0).index_select(0, torch.arange(2)).sum().backward()
    assert not found
