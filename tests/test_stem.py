"""The convolutional stem and mean pooling, against networks put together from torch.nn's layers."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.test_model import CLASSES, MARGIN, TASKS, build, make_batch, make_images, make_recipe, relative, scrambled
from ufo_ds import recipe_file
from ufo_ds.errors import UserError
from ufo_ds.model.layers import Embedding
from ufo_ds.model.packing import Segment, patchify, split
from ufo_ds.model.spec import UNITS

PLAIN = {"dim": 16, "depth": 3, "heads": 2, "patch_size": 8, "mlp_ratio": 3}


class Residual(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return x + self.inner(x)


def conv_net(unit, groups):
    """A stem and the patch projection as one sequential network of images, with the values of ``unit``."""
    layers, channels = [], 3
    side = unit.stem.patch_size if unit.stem is not None else int((unit.patch.in_features / 3) ** 0.5)
    for layer, number in zip(unit.stem or [], groups, strict=True):
        before, after = layer.conv.in_channels, layer.conv.out_channels
        conv = nn.Conv2d(before, after, 3, stride=1 if before == after else 2, padding=1, bias=False)
        norm = nn.GroupNorm(number, after)
        conv.weight.data, norm.weight.data, norm.bias.data = layer.conv.weight.data, layer.norm.weight, layer.norm.bias
        plain = nn.Sequential(conv, norm, nn.ReLU())
        layers.append(Residual(plain) if before == after else plain)
        channels, side = after, side // (1 if before == after else 2)
    last = nn.Conv2d(channels, unit.position.shape[1], side, stride=side)
    last.weight.data, last.bias.data = unit.patch.weight.data.view(last.weight.shape), unit.patch.bias.data
    return nn.Sequential(*layers, last)


def conv_gradients(net):
    """Of every parameter, in the order of the unit's own."""
    return [parameter.grad.flatten() for parameter in net.parameters()]


def scrambled_embedding(*args, **kwargs):
    unit = Embedding(*args, **kwargs).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in unit.named_parameters():
            parameter.normal_(std=0.3, generator=generator)
            if "norm.weight" in name:
                parameter.add_(1.0)
    return unit


@pytest.mark.parametrize(
    ("patch", "stem", "groups", "prefix"),  # 16 channels to a group
    [
        (8, [16, 32, 48], [1, 2, 3], 1),
        (8, [16, 32, 32, 48, 48, 48], [1, 2, 2, 3, 3, 3], 0),
        (8, [32], [2], 1),  # leaves 4 x 4 of a patch
        (16, [24, 32], [1, 2], 0),  # 24 is no multiple of 16
        (6, [5], [1], 1),  # leaves 3 x 3
        (4, [], [], 1),
    ],
)
def test_a_stem_is_a_plain_convolutional_network(patch, stem, groups, prefix):
    unit = scrambled_embedding(patch, 12, (2, 3), prefix, stem)
    net = conv_net(unit, groups)
    torch.manual_seed(1)
    # Two grids, one of them twice and not side by side, none of some, and pixels beyond the last whole patch.
    counts, grids = [2, 0, 1, 3, 0], [(2, 3), (2, 3), (1, 4), (2, 3), (3, 1)]
    images = [
        torch.randn(n, 3, h * patch + 1, w * patch + 3, dtype=torch.float64)
        for n, (h, w) in zip(counts, grids, strict=True)
    ]
    segments = [
        Segment(task, n, prefix + h * w, (h, w), prefix) for task, n, (h, w) in zip("abcde", counts, grids, strict=True)
    ]
    found = unit(torch.cat([patchify(image, patch, prefix) for image in images]), segments)

    position = unit.position.detach().clone().requires_grad_()
    cls = torch.zeros(0, 12, dtype=torch.float64)
    if prefix:
        cls = unit.cls.detach().clone().requires_grad_()
    wanted = []
    for image, (h, w) in zip(images, grids, strict=True):
        grid = position[prefix:].T.view(1, 12, 2, 3)
        if (h, w) != (2, 3):
            grid = F.interpolate(grid.float(), size=(h, w), mode="bicubic", align_corners=False).double()
        for one in image:
            patches = net(one[None, :, : h * patch, : w * patch]) + grid
            wanted += [cls + position[:prefix], patches[0].flatten(1).T]
    wanted = torch.cat(wanted)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)

    weight = torch.randn(wanted.shape, dtype=torch.float64)
    (found * weight).sum().backward()
    (wanted * weight).sum().backward()
    parameters = dict(unit.named_parameters())
    convolutional = [p for name, p in parameters.items() if name.startswith(("stem", "patch"))]
    for parameter, gradient in zip(convolutional, conv_gradients(net), strict=True):
        assert gradient.any()
        torch.testing.assert_close(parameter.grad.flatten(), gradient, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(unit.position.grad, position.grad, rtol=1e-5, atol=1e-7)
    if prefix:
        torch.testing.assert_close(unit.cls.grad, cls.grad, rtol=1e-9, atol=1e-9)
    assert {name.split(".")[0] for name in parameters} <= {"stem", "patch", "position", "cls"}
    assert ("cls" in parameters) == bool(prefix)


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("segments", [False, True])
def test_without_images_a_stem_gets_zero_gradients(segments, prefix):
    unit = scrambled_embedding(8, 12, (2, 3), prefix, [8, 16])
    empty = [Segment(task, 0, prefix + h * w, (h, w), prefix) for task, h, w in (("a", 2, 3), ("b", 1, 2))]
    y_ND = unit(torch.zeros(0, 3 * 64, dtype=torch.float64), empty if segments else [])
    assert y_ND.shape == (0, 12)
    y_ND.sum().backward()
    for name, parameter in unit.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


def test_images_do_not_mix_in_the_stem():
    unit = scrambled_embedding(8, 12, (2, 3), 0, [8, 16])
    images = torch.randn(4, 3, 16, 24, dtype=torch.float64)
    together = unit(patchify(images, 8, 0), [Segment("a", 4, 6, (2, 3), 0)])
    alone = [unit(patchify(image[None], 8, 0), [Segment("a", 1, 6, (2, 3), 0)]) for image in images]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-9, atol=1e-9)


# --- in the supernet --------------------------------------------------------------------------------------------------


def reference(model, task, pixels, groups):
    """The path of own copies of a model with mean pooling out of torch.nn's layers: tokens [B, L, D]."""
    embed = model.embed.own[task]
    net = conv_net(embed, groups)
    x_BDhw = net(pixels)
    position = embed.position.T.unflatten(1, embed.grid_hw)[None]
    if embed.grid_hw != x_BDhw.shape[2:]:
        position = F.interpolate(position, size=x_BDhw.shape[2:], mode="bicubic", align_corners=False)
    x_BLD = (x_BDhw + position).flatten(2).transpose(1, 2)
    for block in model.blocks:
        norm1, attn, norm2, ffn = (u.own[task] for u in (block.norm1, block.attn, block.norm2, block.ffn))
        layer = nn.TransformerEncoderLayer(16, 2, 48, 0.0, "gelu", 1e-6, batch_first=True, norm_first=True)
        layer.load_state_dict({
            "self_attn.in_proj_weight": attn.qkv.weight, "self_attn.in_proj_bias": attn.qkv.bias,
            "self_attn.out_proj.weight": attn.proj.weight, "self_attn.out_proj.bias": attn.proj.bias,
            "linear1.weight": ffn.fc1.weight, "linear1.bias": ffn.fc1.bias,
            "linear2.weight": ffn.fc2.weight, "linear2.bias": ffn.fc2.bias,
            "norm1.weight": norm1.weight, "norm1.bias": norm1.bias,
            "norm2.weight": norm2.weight, "norm2.bias": norm2.bias,
        })  # fmt: skip
        x_BLD = layer(x_BLD)
    norm = model.norm.own[task]
    return F.layer_norm(x_BLD, (16,), norm.weight, norm.bias, 1e-6)


@pytest.mark.parametrize(("stem", "groups"), [([], []), ([16, 32, 32], [1, 2, 2])])
def test_with_mean_pooling_the_feature_is_the_mean_of_the_patches_tokens(stem, groups):
    recipe = make_recipe("own", backbone={**PLAIN, "pool": "mean", "stem": stem})
    model = scrambled(recipe).eval()
    images = make_images(recipe)
    generator = torch.Generator().manual_seed(5)
    for name, size in {"b": (24, 16), "c": (16, 40)}.items():  # of other grids than their position embeddings'
        images[name] = torch.randint(0, 256, (2, 3, *size), generator=generator).to(torch.uint8)
    with torch.no_grad():
        features = model.backbone(images)
        pooled = split(features.pooled_BD, [s.per_image() for s in features.segments])
        for i, (name, image) in enumerate(images.items()):
            h, w = image.shape[2] // 8, image.shape[3] // 8
            pixels = (image / 255 - torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)) / torch.tensor([0.2, 0.3, 0.25]).view(
                3, 1, 1
            )
            wanted = reference(model, name, pixels[:, :, : 8 * h, : 8 * w], groups)
            assert wanted.shape == (len(image), h * w, 16)
            tokens = split(features.tokens_ND, features.segments)[i].view(wanted.shape)
            assert relative(tokens, wanted) < 1e-5
            assert relative(pooled[i], wanted.mean(1)) < 1e-5
            assert relative(features.grid(i), wanted.transpose(1, 2).unflatten(2, (h, w))) < 1e-5


def test_with_mean_pooling_there_is_no_class_token():
    plain = dict(build(make_recipe()).named_parameters())
    mean = dict(build(make_recipe(backbone={**PLAIN, "pool": "mean"})).named_parameters())
    assert set(plain) - set(mean) == {f"embed.{copy}.cls" for copy in ("shared", "own.a", "own.b", "own.c", "own.d")}
    assert not set(mean) - set(plain)
    for name, parameter in plain.items():  # patches: 2 x 2, 1 x 4, 3 x 2, 2 x 3
        if name.endswith("position"):
            assert mean[name].shape == (parameter.shape[0] - 1, 16)
    assert mean["embed.own.c.position"].shape == (6, 16)


def test_mean_pooling_is_over_all_parts_of_a_tasks_samples():
    routes = dict.fromkeys(UNITS, "own")
    parts = {"shared_samples": 0.4, "router": {"probe": 0.5}}
    backbone = {**PLAIN, "pool": "mean", "stem": [8]}
    tasks = [{**TASKS[0], "routes": {**routes, "ffn": "learned"}}, TASKS[1]]
    model = scrambled(make_recipe(routes, tasks, backbone=backbone, **parts)).train()
    images = make_images(model.recipe, count=5)
    segments = [s for name, task in make_batch(images).tasks.items() for s in model._cut(name, task, 0)]
    assert len(segments) > 3
    features = model.backbone(images, segments, 0, model.router(0))
    tokens = split(features.tokens_ND, segments)
    wanted = [image.mean(0) for x, s in zip(tokens, segments, strict=True) for image in x.split(s.tokens)]
    assert features.pooled_BD.shape == (5 + 6, 16)
    assert relative(features.pooled_BD, torch.stack(wanted)) < 1e-6


def test_gradients_reach_everything_through_the_stem():
    recipe = make_recipe("own", backbone={**PLAIN, "pool": "mean", "stem": [8, 16]}, shared_samples=0.3)
    model = scrambled(recipe).train()
    model(make_batch(make_images(recipe))).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.any(), name


def test_a_stem_starts_by_he_and_its_norms_at_one():
    recipe = make_recipe("own", backbone={**PLAIN, "stem": [32, 64]})
    values = build(recipe).state_dict()
    for copy in ("shared", "own.a", "own.d"):
        for layer, channels in enumerate([32, 64]):
            stem = f"embed.{copy}.stem.{layer}"
            weight = values[f"{stem}.conv.weight"]
            assert weight.shape == (channels, [3, 32][layer], 3, 3)
            # sqrt(2 / fan out), to within four times the deviation of a standard deviation over so many values.
            wanted = (2 / (channels * 9)) ** 0.5
            assert weight.std().item() == pytest.approx(wanted, rel=4 / (2 * weight.numel()) ** 0.5)
            assert abs(weight.mean().item()) < 4 * wanted / weight.numel() ** 0.5
            assert torch.equal(weight, values[f"embed.shared.stem.{layer}.conv.weight"])
            assert values[f"{stem}.norm.weight"].eq(1).all()
            assert not values[f"{stem}.norm.bias"].any()
        # Glorot: of 2 x 2 positions with 64 channels each to 16.
        bound = (6 / (64 * 4 + 16)) ** 0.5
        assert 0.95 * bound < values[f"embed.{copy}.patch.weight"].abs().max() <= bound
    assert not torch.equal(values["embed.shared.stem.0.conv.weight"].flatten()[:800],
                           values["embed.shared.stem.1.conv.weight"].flatten()[:800])  # fmt: skip


@pytest.mark.parametrize("name", ["norm", "conv", "stem", "patch", "position"])
def test_initial_values_do_not_depend_on_a_tasks_name(monkeypatch, name):
    backbone = {**PLAIN, "stem": [8]}
    plain = build(make_recipe(tasks=[TASKS[0]], backbone=backbone)).state_dict()
    monkeypatch.setitem(CLASSES, name, CLASSES["a"])
    other = build(make_recipe(tasks=[{**TASKS[0], "name": name}], backbone=backbone)).state_dict()
    for key, value in plain.items():
        if not key.startswith("heads."):
            assert torch.equal(other[key.replace(".own.a.", f".own.{name}.")], value), key


# --- recipes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        ({**PLAIN, "stem": [8, 16, 24, 32]}, "patch_size 8 is not a multiple of the stem's stride 16: drop a layer"),
        ({**PLAIN, "patch_size": 14, "stem": [8, 16]}, "patch_size 14 is not a multiple of the stem's stride 4"),
        ({"name": "vit_huge", "stem": [8, 16]}, "patch_size 14 is not a multiple of the stem's stride 4"),
        ({**PLAIN, "stem": [8, 0]}, "stem"),
        ({**PLAIN, "stem": 8}, "stem"),
        ({**PLAIN, "pool": "max"}, "pool"),
    ],
)
def test_a_stem_that_does_not_fit_is_refused(backbone, message):
    with pytest.raises(UserError) as caught:
        make_recipe(backbone=backbone)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_stem_may_leave_nothing_of_a_patch_or_more():
    for stem in ([], [4], [4, 8], [4, 8, 16]):
        recipe = make_recipe(backbone={**PLAIN, "stem": stem, "pool": "mean"}, tasks=[{**TASKS[1], **MARGIN}])
        assert recipe_file.dump(recipe)["model"]["backbone"]["stem"] == stem
        rest = 8 // 2 ** len(stem)
        assert build(recipe).embed.shared.patch.in_features == [3, *stem][-1] * rest**2
