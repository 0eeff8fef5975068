"""A recipe whose blocks differ in heads and FFN width: trained, resumed, planned, evaluated, and computed right."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests import tiny
from tests.distributed.test_training import REPOSITORY, train, weights
from tests.small_run import make_images, outputs_of, relative
from ufo_ds import checkpoint, evaluate, plan
from ufo_ds.data.transforms import evaluation_transform
from ufo_ds.errors import run as entry
from ufo_ds.model.loading import load_supernet, spec_of

HEADS, WIDTH, HIDDEN, DIM, PATCH, EPS = (3, 1), 5, (20, 48), 16, 4, 1e-5
BACKBONE = (
    f"{{dim: {DIM}, depth: 2, heads: {list(HEADS)}, head_dim: {WIDTH}, patch_size: {PATCH}, mlp_ratio: [1.25, 3], "
    f"layer_norm_eps: {EPS}}}"
)
WORDS = ["--model.backbone", BACKBONE, "--model.experts", "[]", "--model.routes", "{}"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("tiny"))


def norm(x: Tensor, value: dict[str, Tensor], name: str) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt()
    return scaled * value[f"{name}.weight"] + value[f"{name}.bias"]


def linear(x: Tensor, value: dict[str, Tensor], name: str) -> Tensor:
    return x @ value[f"{name}.weight"].T + value[f"{name}.bias"]


def plain_vit(value: dict[str, Tensor], pixels: Tensor) -> Tensor:
    """The class token of each image ``[B, 3, H, W]``, head by head (Dosovitskiy et al., 2021, equations 1 to 4)."""
    images = []
    for image in pixels:
        patches = [
            image[:, y : y + PATCH, x : x + PATCH].flatten()
            for y in range(0, image.shape[1], PATCH) for x in range(0, image.shape[2], PATCH)
        ]  # fmt: skip
        tokens = linear(torch.stack(patches), value, "embed.shared.patch")
        x = torch.cat([value["embed.shared.cls"], tokens]) + value["embed.shared.position"]
        for i, (heads, hidden) in enumerate(zip(HEADS, HIDDEN, strict=True)):
            qkv = linear(norm(x, value, f"blocks.{i}.norm1.shared"), value, f"blocks.{i}.attn.shared.qkv")
            assert qkv.shape[1] == 3 * heads * WIDTH
            queries, keys, values = (part.split(WIDTH, 1) for part in qkv.split(heads * WIDTH, 1))
            seen = [
                (q @ k.T / math.sqrt(WIDTH)).exp() @ v / (q @ k.T / math.sqrt(WIDTH)).exp().sum(1, keepdim=True)
                for q, k, v in zip(queries, keys, values, strict=True)
            ]
            x = x + linear(torch.cat(seen, 1), value, f"blocks.{i}.attn.shared.proj")
            y = linear(norm(x, value, f"blocks.{i}.norm2.shared"), value, f"blocks.{i}.ffn.shared.fc1")
            assert y.shape[1] == hidden
            y = y * (1 + torch.erf(y / math.sqrt(2))) / 2
            x = x + linear(y, value, f"blocks.{i}.ffn.shared.fc2")
        images.append(norm(x, value, "norm.shared")[0])
    return torch.stack(images)


def test_trained_alone(recipe, tmp_path, capsys):
    run = tmp_path / "run"
    words = [*WORDS, "--task", "colours", "--schedule.steps", "4", "--checkpoint.every", "2", "--evaluation.every", "2"]
    train(1, recipe, run, *words)
    first, last = (run / "checkpoints" / checkpoint.name_of(step) for step in (2, 4))
    wanted = weights(run, 4)
    assert wanted["blocks.0.ffn.shared.fc1.weight weight"] != weights(run, 2)["blocks.0.ffn.shared.fc1.weight weight"]
    shutil.rmtree(last)
    assert "going on from step 2" in train(1, recipe, run, *words)
    assert weights(run, 4) == wanted
    assert first.exists()

    reader = checkpoint.Reader(last)
    value = {name: reader.parameter(name) for name in reader.index.parameters}
    pixels = torch.stack([torch.from_numpy(evaluation_transform(image, (8, 8))) for image in make_images()]) / 255
    logits = linear(plain_vit(value, (pixels - 0.5) / 0.5), value, "heads.colours.classifier")
    model = load_supernet(reader, [spec_of(reader, "colours")])
    assert relative(outputs_of(model, "colours", make_images()).logits, logits) < 1e-5

    assert entry(evaluate.main, [str(last), "--device", "cpu", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert found.items() <= next(line for line in logged if line["step"] == 4 and line["kind"] == "evaluation").items()

    config = str(REPOSITORY / "ds_configs" / "moe.json")
    plan.main(["--recipe", str(run / "recipe.yaml"), "--deepspeed", config, "--json"])
    planned = json.loads(capsys.readouterr().out)
    assert planned["parameters"]["all"] == sum(parameter.numel() for parameter in value.values())
    assert planned["tasks"]["colours"]["path_parameters"] == planned["parameters"]["without_heads"]
    assert planned["fits"]


def test_on_two_ranks_with_experts(recipe, tmp_path):
    """Own copies of units, EP 2 and ZeRO-3: the losses are those of one process."""
    words = ["--model.backbone", BACKBONE, "--model.experts", "[embed, attn, ffn]", "--schedule.steps", "3"]
    losses = {}
    for ranks in (1, 2):
        train(ranks, recipe, tmp_path / str(ranks), *words, "--model.routes", "{attn: [own, shared], ffn: own}")
        lines = [json.loads(line) for line in (tmp_path / str(ranks) / "metrics.jsonl").read_text().splitlines()]
        losses[ranks] = [line["loss"] for line in lines if line["kind"] == "train"]
    assert losses[2] == pytest.approx(losses[1], rel=1e-4)
    assert len(losses[2]) == 3
