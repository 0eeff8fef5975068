"""In bf16 and under autocast what needs fp32 is computed in fp32."""

import pytest
import torch

from tests.test_losses import randn, random_labels
from tests.test_model import make_batch, make_images, make_recipe, relative, scrambled
from ufo_ds.model.heads import TaskHead
from ufo_ds.recipe_task import ArcFace, Circle, CosFace, CrossEntropy, Head, Loss, Triplet

CLASSES, DIM = 3000, 96
HEADS = {
    "arcface": ("margin", {"arcface": ArcFace(scale=64, margin=0.5)}),
    "others": ("margin", {"cosface": CosFace(scale=64), "circle": Circle(scale=64), "triplet": Triplet(margin="soft")}),
    "linear": ("linear", {"cross_entropy": CrossEntropy(label_smoothing=0.1)}),
}


def step(name, features, labels, dtype=torch.float32, autocast=False):
    """Losses, the gradient of the features, and logits, with weights that bf16 holds exactly."""
    kind, loss = HEADS[name]
    head = TaskHead(Head(type=kind), DIM, CLASSES, Loss(**loss))
    with torch.no_grad():
        for i, parameter in enumerate(head.parameters()):
            parameter.copy_(randn(*parameter.shape, seed=i).bfloat16())
    for parameter in head.parameters():
        parameter.data = parameter.data.to(dtype)
    features = features.to(dtype, copy=True).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        losses = head(features, labels, len(features))
        logits = head.eval()(features).logits
    losses.sum().backward()
    return losses.detach(), features.grad.float(), logits.detach()


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("precision", ["bf16", "autocast"])
def test_heads_compute_in_fp32(name, precision):
    features, labels = randn(24, DIM).bfloat16().float(), random_labels(24, CLASSES)
    how = {"dtype": torch.bfloat16} if precision == "bf16" else {"autocast": True}
    wanted, found = step(name, features, labels), step(name, features, labels, **how)
    assert found[0].dtype == found[2].dtype == torch.float32
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(found[2], wanted[2], rtol=1e-6, atol=1e-6)
    # A gradient that is handed on in bf16 is rounded to its 8 bits.
    torch.testing.assert_close(found[1], wanted[1], rtol=2**-8 if precision == "bf16" else 1e-6, atol=1e-7)


@pytest.mark.parametrize("precision", ["bf16", "autocast"])
def test_the_backbone_is_within_the_error_of_bf16(precision):
    """Each of the few layers rounds to 8 bits, independently."""

    def losses(dtype, autocast):
        model = scrambled(make_recipe("mixed")).train()
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16().to(dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            features = model.backbone(make_images(model.recipe, count=6)).pooled_BD
            return features.float(), model(make_batch(make_images(model.recipe, count=6))).sum(1)

    wanted = losses(torch.float32, False)
    found = losses(torch.bfloat16 if precision == "bf16" else torch.float32, precision == "autocast")
    assert 1e-4 < relative(found[0], wanted[0]) < 3e-2
    torch.testing.assert_close(found[1], wanted[1], rtol=3e-2, atol=0)
