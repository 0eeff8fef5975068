"""A supernet that starts from a Hugging Face ViT is that ViT on every path."""

import dataclasses
import random

import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification, ViTModel

from tests.small_run import CLASSES, make_recipe, relative
from ufo_ds.errors import UserError
from ufo_ds.model.initialization import Start
from ufo_ds.model.pretrained import vit_start
from ufo_ds.model.supernet import Supernet, init_weights


def save_vit(directory, **changes):
    torch.manual_seed(0)
    values = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
              "image_size": 16, "patch_size": 8, "layer_norm_eps": 1e-6, "initializer_range": 0.3}  # fmt: skip
    vit = ViTModel(ViTConfig(**{**values, **changes}), add_pooling_layer=False)
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    vit.save_pretrained(directory)
    return vit.eval()


def start_of(recipe) -> Start:
    return vit_start(recipe, {name: len(names) for name, names in CLASSES.items()})


@pytest.mark.parametrize("route", ["shared", "own"])
def test_a_model_starts_as_the_pretrained_vit(tmp_path, route):
    vit = save_vit(tmp_path)
    recipe = make_recipe(init=str(tmp_path))
    tasks = [dataclasses.replace(task, routes={"embed": route, "ffn": route}) for task in recipe.tasks]
    recipe = dataclasses.replace(recipe, tasks=tasks)
    with torch.device("meta"):
        model = Supernet(recipe, {"digits": 3})
    init_weights(model, pretrained=start_of(recipe).values)
    generator = torch.Generator().manual_seed(0)
    for task in recipe.tasks:
        images = torch.randint(0, 256, (3, 3, *task.input), generator=generator).to(torch.uint8)
        mean, std = torch.tensor(recipe.data.mean), torch.tensor(recipe.data.std)
        pixels = (images / 255 - mean[:, None, None]) / std[:, None, None]
        with torch.no_grad():
            wanted = vit(pixels, interpolate_pos_encoding=True).last_hidden_state[:, 0]
            assert relative(model.eval().backbone({task.name: images}).pooled_BD, wanted) < 1e-5
    heads = {name for name, _ in model.named_parameters() if name.startswith("heads.")}
    assert heads == {"heads.digits.classifier.weight", "heads.digits.classifier.bias"}
    assert model.heads["digits"].classifier.weight.std().item() == pytest.approx(0.01, rel=0.5)  # drawn


def test_a_task_named_shared_has_a_grid_of_its_own(tmp_path):
    vit = save_vit(tmp_path)
    recipe = make_recipe(init=str(tmp_path))
    recipe = dataclasses.replace(recipe, tasks=[recipe.tasks[0], dataclasses.replace(recipe.tasks[1], name="shared")])
    value = start_of(recipe).values
    shared = value("embed.shared.position", torch.Size([5, 16]), range(80))
    assert torch.equal(shared.view(5, 16), vit.embeddings.position_embeddings[0])
    assert value("embed.own.shared.position", torch.Size([7, 16]), range(112)).shape == (112,)


@pytest.mark.parametrize("layout", ["one file", "several files", "with a head", "bf16"])
def test_any_elements_are_those_of_the_vit(tmp_path, layout):
    """Joined matrices (q, k and v), flat ranges across rows, and files as ViTs are published in."""
    vit = save_vit(tmp_path)
    if layout == "several files":
        (tmp_path / "model.safetensors").unlink()
        vit.save_pretrained(tmp_path, max_shard_size="4KB")
        assert len(list(tmp_path.glob("*.safetensors"))) > 2
    if layout == "with a head":
        classifier = ViTForImageClassification(vit.config)
        classifier.vit.load_state_dict(vit.state_dict())
        classifier.save_pretrained(tmp_path)
    if layout == "bf16":
        vit = vit.to(torch.bfloat16)
        vit.save_pretrained(tmp_path)
    recipe = make_recipe(init=str(tmp_path))
    value = start_of(recipe).values
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in Supernet(recipe, {}).named_parameters() if "router" not in name}
    state = {name: x.float() for name, x in vit.state_dict().items()}
    draw, seen = random.Random(0), 0
    for name, shape in shapes.items():
        whole = value(name, shape, range(shape.numel()))
        if ".qkv." in name:
            layer = name.split(".")[1]
            pieces = [state[f"layers.{layer}.attention.{p}_proj.{name.split('.')[-1]}"] for p in "qkv"]
            assert torch.equal(whole.view(shape), torch.cat(pieces))
            seen += 1
        for _ in range(5):
            start, stop = sorted(draw.sample(range(shape.numel() + 1), 2))
            assert torch.equal(value(name, shape, range(start, stop)), whole[start:stop]), name
    assert seen


def test_a_checkpoint_that_lacks_something_is_refused(tmp_path):
    save_vit(tmp_path, qkv_bias=False)
    with pytest.raises(
        UserError, match=r"^model.init [^\n]* has no elements of layers.0.attention.q_proj.bias, [^\n]*16$"
    ):
        start_of(make_recipe(init=str(tmp_path)))
    save_vit(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"^model.init [^\n]*: damaged file: [^\n]*$"):
        start_of(make_recipe(init=str(tmp_path)))
    weights.rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"^model.init [^\n]* lacks model.safetensors[^\n]*save_pretrained[^\n]*$"):
        start_of(make_recipe(init=str(tmp_path)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 32}, "has dim 32, model.backbone 16"),
        ({"num_hidden_layers": 3}, "has depth 3, model.backbone 2"),
        ({"num_attention_heads": 4}, "has heads 4, model.backbone 2"),
        ({"intermediate_size": 48}, "has dim x mlp_ratio 48, model.backbone 64"),
        ({"patch_size": 4}, "has patch_size 4, model.backbone 8"),
    ],
)
def test_a_vit_of_another_size_is_refused(tmp_path, changes, message):
    save_vit(tmp_path, **changes)
    with pytest.raises(UserError, match=f"^model.init [^\n]* {message}[^\n]*$"):
        start_of(make_recipe(init=str(tmp_path)))


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        ({"stem": [8, 16]}, r"has stem \[\], model.backbone \[8, 16\]"),
        ({"pool": "mean"}, "has pool cls, model.backbone mean"),
        ({"heads": 1, "head_dim": 4}, "has heads 2, model.backbone 1"),
        ({"head_dim": 4}, "has head_dim 8, model.backbone 4"),
        ({"heads": [2, 1], "head_dim": 8}, r"has heads 2, model.backbone \[2, 1\]"),
        ({"mlp_ratio": [4.0, 2.0]}, r"has dim x mlp_ratio 64, model.backbone \[64, 32\]"),
    ],
)
def test_a_backbone_that_is_no_stock_vit_starts_from_none(tmp_path, backbone, message):
    save_vit(tmp_path)
    with pytest.raises(UserError, match=f"^model.init [^\n]* {message}: make them equal$"):
        start_of(make_recipe(init=str(tmp_path), backbone=backbone))


def test_what_is_no_vit_checkpoint_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"^model.init [^\n]* is neither a run nor a ViT: [^\n]*$"):
        start_of(make_recipe(init=str(tmp_path)))
