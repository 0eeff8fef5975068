"""Importance of heads and channels is what a slow computation finds."""

import pytest
import torch
import torch.nn.functional as F

from tests.small_run import CLASSES, make_model, make_recipe
from ufo_ds.model.layers import resize_position
from ufo_ds.recipe import only
from ufo_ds.subnets.importance import kept, measure
from ufo_ds.subnets.ordering import DIM


def slow_importance(model, task, images):
    """A plain forward pass, image by image, that keeps all contributions: variances over all rows of all images."""
    recipe, backbone = model.recipe, model.recipe.model.backbone
    seen = {}

    def see(group, layer, contributions):
        """``[rows, members, outputs]``"""
        seen.setdefault((group, layer), []).append(contributions)

    def copy_of(unit, attribute, layer):
        route = model.routes[task][unit][layer]
        prefix = "" if attribute in ("embed", "norm") else f"blocks.{layer}."
        name = f"{prefix}{attribute}." + ("shared" if route == "shared" else f"own.{task}")
        return name, model.get_submodule(name)

    def norm(attribute, layer, x):
        _, copy = copy_of("norm", attribute, layer)
        y = F.layer_norm(x, x.shape[-1:], copy.weight, copy.bias, backbone.layer_norm_eps)
        see(DIM, f"{attribute}{layer}", y[:, :, None])
        return y

    for image in images:
        name, embed = copy_of("embed", "embed", 0)
        mean, std = (torch.tensor(values).double()[:, None, None] for values in (recipe.data.mean, recipe.data.std))
        x, group = ((image.double() / 255 - mean) / std)[None], None
        for i, layer in enumerate(embed.stem or []):
            residual = layer.conv.in_channels == layer.conv.out_channels
            y = F.conv2d(x, layer.conv.weight, stride=1 if residual else 2, padding=1)
            channels = y.shape[1]
            y = F.relu(F.group_norm(y, 2 if channels == 32 else 1, layer.norm.weight, layer.norm.bias))
            x = x + y if residual else y
            group = group if residual else f"{name}.stem.{i}"
            see(group, i, x[0].flatten(1).T[:, :, None])
        side = 8 // (4 if embed.stem is not None else 1)
        x = F.unfold(x, side, stride=side)[0].T @ embed.patch.weight.T + embed.patch.bias
        x = torch.cat([embed.cls, x]) if embed.cls is not None else x
        size = recipe.model.input if name == "embed.shared" else model.tasks[task].input
        to_hw = images.shape[2] // 8, images.shape[3] // 8
        x = x + resize_position(embed.position, (size[0] // 8, size[1] // 8), to_hw)
        for i in range(backbone.depth):
            y = norm("norm1", i, x)
            name, attn = copy_of("attn", "attn", i)
            heads = attn.heads
            q, k, v = (y @ attn.qkv.weight.T + attn.qkv.bias).view(len(y), 3, heads, -1).permute(1, 2, 0, 3)
            y = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v
            outputs = torch.einsum("hlc,dhc->lhd", y, attn.proj.weight.unflatten(1, (heads, -1)))
            see(name, i, outputs)
            x = x + outputs.sum(1) + attn.proj.bias
            y = norm("norm2", i, x)
            name, ffn = copy_of("ffn", "ffn", i)
            y = F.gelu(y @ ffn.fc1.weight.T + ffn.fc1.bias)
            see(name, i, y[:, :, None] * ffn.fc2.weight.T)
            x = x + y @ ffn.fc2.weight.T + ffn.fc2.bias
        norm("norm", backbone.depth, x)
    scores = {}
    for (group, _), pieces in seen.items():
        variance = torch.cat(pieces).var(0, unbiased=False).sum(1)
        scores[group] = scores.get(group, 0) + len(images) * variance
    return scores


STEM = {"stem": [8, 32, 32, 32], "pool": "mean"}  # of 32 channels two groups and residual sums
EVERYTHING = ["embed", "norm", "attn", "ffn"]
MODELS = {
    "plain": {},
    "layers that differ": {"backbone": {"heads": [3, 2], "head_dim": 4, "mlp_ratio": [2, 3.5]}},
    "stem": {"backbone": STEM},
    "mixed": {
        "backbone": STEM,
        "experts": EVERYTHING,
        "routes": {"attn": ["own", "shared"], "norm": ["shared", "own", "own"]},
    },
}


@pytest.mark.parametrize("name", MODELS)
def test_importance_is_what_a_slow_computation_finds(name):
    recipe = make_recipe(**MODELS[name])
    for task in CLASSES:
        model = make_model(only(recipe, [task]))  # as one task is measured
        size = model.tasks[task].input
        images = torch.randint(0, 256, (7, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
        count, found = measure(model, images.split(3))
        with torch.no_grad():
            wanted = slow_importance(model.double(), task, images)
        assert count == 7
        assert found.keys() == wanted.keys()
        for group, scores in wanted.items():
            torch.testing.assert_close(found[group], scores, rtol=1e-4, atol=1e-6 * scores.max().item())


def test_what_the_leading_members_keep():
    scores = torch.tensor([4.0, 3.0, 2.0, 1.0]).double()
    assert [kept(scores, share) for share in (0.25, 0.5, 0.75)] == [0.4, 0.7, 0.9]
    assert kept(torch.zeros(4), 0.5) == 0.5
