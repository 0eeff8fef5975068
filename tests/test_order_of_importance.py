"""Heads and channels in another order compute the same, and what is dead comes last."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from tests.small_run import CLASSES, make_images, make_model, make_recipe, outputs_of, relative, write_checkpoint
from ufo_ds import checkpoint, order, recipe_file
from ufo_ds.checkpoint import Index, Parameter, Reader
from ufo_ds.data.layouts import read_folder
from ufo_ds.data.shard_writer import write
from ufo_ds.data.source import open_sets
from ufo_ds.data.transforms import evaluation_transform
from ufo_ds.errors import UserError
from ufo_ds.model.architecture import Architecture
from ufo_ds.model.loading import load_supernet, spec_of
from ufo_ds.recipe_task import TrainSet
from ufo_ds.subnets.importance import measure
from ufo_ds.subnets.ordering import DIM, axes_of, by_importance, permuted, rewrite

STEM = {"patch_size": 8, "stem": [8, 32, 32, 32], "pool": "mean"}  # one group of 8 channels; two of 16, and residuals
EVERYTHING = {"experts": ["embed", "norm", "attn", "ffn"]}
MODELS = {
    "plain": {},
    "layers that differ": {"backbone": {"heads": [3, 2], "head_dim": 4, "mlp_ratio": [2, 3.5]}},
    "stem": {"backbone": STEM},
    "everything own": {**EVERYTHING, "routes": dict.fromkeys(EVERYTHING["experts"], "own")},
    "mixed": {**EVERYTHING, "backbone": STEM, "routes": {"attn": ["own", "shared"], "norm": ["shared", "own", "own"]}},
    "learned": {**EVERYTHING, "routes": {"attn": "learned", "norm": "learned"}},
}


def build(name, neck=False):
    recipe = make_recipe(**MODELS[name])
    digits = dataclasses.replace(recipe.tasks[0], head=dataclasses.replace(recipe.tasks[0].head, neck=neck))
    return make_model(dataclasses.replace(recipe, tasks=[digits, *recipe.tasks[1:]]))


def groups_of_model(model):
    """Every group of a model, and the number of its members."""
    backbone = model.recipe.model.backbone
    axes = [axis for name, _ in model.named_parameters() for axis in axes_of(name, backbone)]
    return {axis.group: axis.size for axis in axes if axis.group is not None}


def random_orders(model, seed=0):
    """By random scores, so that the groups of group norms stay whole; nothing stays first."""
    generator = torch.Generator().manual_seed(seed)
    scores = {group: torch.rand(size, generator=generator) for group, size in groups_of_model(model).items()}
    for scores_G in scores.values():
        scores_G[0] = 0
    return by_importance(scores)


def published(reader, orders, directory):
    (directory / "unfinished").mkdir(parents=True)
    index = rewrite(reader, orders, directory / "unfinished")
    return Reader(checkpoint.publish(directory / "unfinished", index, index.files))


# --- the same function ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("neck", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_every_task_computes_the_same_in_any_order(tmp_path, name, neck):
    model = build(name, neck)
    reader = Reader(write_checkpoint(tmp_path / "run", model))
    orders = random_orders(model)
    again = published(reader, orders, tmp_path / "ordered")
    for task in CLASSES:
        before, after = (load_supernet(r, [spec_of(r, task)]) for r in (reader, again))
        wanted, found = (outputs_of(m, task, make_images()) for m in (before, after))
        assert relative(found.logits, wanted.logits) < 3e-6
        assert relative(found.embedding, wanted.embedding[:, orders[DIM]]) < 3e-6
        # Only rounding differs: with a backbone in fp64 (heads compute in fp32) nearly nothing does.
        wanted, found = (outputs_of(m.double(), task, make_images()) for m in (before, after))
        assert relative(found.logits, wanted.logits) < 1e-6
        assert relative(found.embedding, wanted.embedding[:, orders[DIM]]) < 1e-6
        images = torch.randint(0, 256, (5, 3, *before.tasks[task].input), dtype=torch.uint8)
        with torch.no_grad():
            wanted, found = (m.backbone({task: images}).pooled_BD for m in (before, after))
        assert relative(found, wanted[:, orders[DIM]]) < 1e-13


def test_every_group_is_another_order_of_itself(tmp_path):
    model = build("mixed")
    backbone, orders = model.recipe.model.backbone, random_orders(model)
    stems = {f"embed.{copy}.stem.{i}" for copy in ("shared", "own.digits", "own.glyphs") for i in (0, 1)}
    assert {group for group in orders if ".stem." in group} == stems
    for group, size in groups_of_model(model).items():
        assert sorted(orders[group].tolist()) == list(range(size))
        assert orders[group].tolist() != list(range(size))
    for name, value in model.named_parameters():
        other = permuted(name, value.detach(), orders, backbone)
        assert other.shape == value.shape
        assert torch.equal(other.flatten().sort().values, value.detach().flatten().sort().values)
        moves = any(axis.group for axis in axes_of(name, backbone)) and "cls" not in name
        assert torch.equal(other, value) != moves, name


def test_a_permutation_by_hand():
    """4 channels, 2 heads of 2: the qkv matrix has rows q00 q01 q10 q11 k00 ... v11."""
    recipe = make_recipe(backbone={"dim": 4, "heads": 2})
    backbone = recipe.model.backbone
    orders = {DIM: torch.tensor([2, 0, 3, 1]), "blocks.0.attn.shared": torch.tensor([1, 0])}
    matrix = torch.arange(48).view(12, 4)
    rows = [2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9]
    found = permuted("blocks.0.attn.shared.qkv.weight", matrix, orders, backbone)
    assert torch.equal(found, matrix[rows][:, [2, 0, 3, 1]])
    # Another copy keeps the order of its heads.
    found = permuted("blocks.0.attn.own.digits.qkv.weight", matrix, orders, backbone)
    assert torch.equal(found, matrix[:, [2, 0, 3, 1]])
    found = permuted("blocks.0.attn.shared.proj.weight", matrix[:4], orders, backbone)
    assert torch.equal(found, matrix[:4][[2, 0, 3, 1]][:, [2, 3, 0, 1]])
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.shared\.gate\.weight"):
        permuted("blocks.0.attn.shared.gate.weight", matrix, orders, backbone)


def test_groups_of_a_group_norm_stay_whole():
    scores = torch.zeros(48)
    scores[[5, 20, 33, 34]] = torch.tensor([3.0, 5.0, 2.0, 2.5])  # sums of the three groups: 3, 5, 4.5
    found = by_importance({"embed.shared.stem.0": scores, DIM: scores})
    assert found["embed.shared.stem.0"].view(3, 16)[:, :3].tolist() == [[20, 16, 17], [34, 33, 32], [5, 0, 1]]
    assert found[DIM][:6].tolist() == [20, 5, 34, 33, 0, 1]


def test_averages_take_the_place_of_weights_and_the_optimizer_is_left_out(tmp_path):
    model = build("plain")
    orders, tensors, parameters, buffers = random_orders(model), {}, {}, {}
    for name, value in model.named_parameters():
        for kind, factor in (("weight", 1), ("average", 2), ("exp_avg", 3)):
            tensors[f"{name}|{kind}"] = factor * value.detach().flatten()
        parameters[name] = Parameter(
            list(value.shape), ["weight", "average", "exp_avg"], [(0, 0, value.numel())], {"step": 7.0}
        )
    for name, value in model.named_buffers():
        if name.startswith("heads."):
            tensors |= {name: value, f"{name}|average": 2 * value}
            buffers |= {name: 0, f"{name}|average": 0}
    (tmp_path / "tmp").mkdir()
    shapes = {key: value.shape for key, value in tensors.items()}
    entry = checkpoint.write_tensors(tmp_path / "tmp" / "rank-0.safetensors", shapes, tensors.values())
    routes = {task: {unit: list(layers) for unit, layers in of.items()} for task, of in model.routes.items()}
    index = Index(10, recipe_file.dump(model.recipe), CLASSES, routes, metrics={"top1": 0.5}, parameters=parameters,
                  licences={"digits": ["CC0"]}, buffers=buffers)  # fmt: skip
    reader = Reader(checkpoint.publish(tmp_path / "tmp", index, [entry]))
    again = published(reader, orders, tmp_path / "ordered")
    again.verify()
    assert {kind for parameter in again.index.parameters.values() for kind in parameter.kinds} == {"weight"}
    assert not any(parameter.scalars for parameter in again.index.parameters.values())
    backbone = model.recipe.model.backbone
    for name, value in model.named_parameters():
        assert torch.equal(again.parameter(name), 2 * permuted(name, value.detach(), orders, backbone))
    for name in again.index.buffers:
        assert torch.equal(again.buffer(name), 2 * model.get_buffer(name)[orders[DIM]])
    assert set(again.index.buffers) == {name for name in buffers if "|" not in name}
    for key in ("step", "recipe", "classes", "routes", "licences", "metrics"):
        assert getattr(again.index, key) == getattr(reader.index, key)


# --- the verb ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Random images of both tasks; one of them is no image."""
    root, draw = tmp_path_factory.mktemp("shards"), np.random.default_rng(0)
    for task, names in CLASSES.items():
        for name in names:
            (root / "images" / task / name).mkdir(parents=True)
            for i in range(6):
                pixels = draw.integers(0, 256, (20, 20, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / "images" / task / name / f"{i}.png")
        write(read_folder(root / "images" / task), root / task, source="test", licence="none")
    return root


def with_shards(recipe, shards):
    tasks = [dataclasses.replace(task, train=[TrainSet(shards=str(shards / task.name))]) for task in recipe.tasks]
    return dataclasses.replace(recipe, tasks=tasks)


def subnet_outputs(model, task, architecture):
    model.architectures[task] = architecture
    return outputs_of(model, task, make_images())


def test_what_is_dead_comes_last(tmp_path, shards):
    """Half of all heads and hidden channels contribute the same to every token: the other half does what the whole
    does. So does a channel that no norm lets through, and one of a stem that is constant."""
    model = make_model(with_shards(make_recipe(backbone={**STEM, "heads": 4}), shards))
    dead, draw = {}, np.random.default_rng(3)
    with torch.no_grad():
        dead[DIM] = draw.choice(16, 3, replace=False)
        for name, module in model.named_modules():
            last = name.rpartition(".")[2]
            if hasattr(module, "fc1"):
                dead[name] = draw.choice(64, 32, replace=False)
                module.fc2.weight[:, dead[name]] = 0
            elif hasattr(module, "qkv"):
                dead[name] = draw.choice(4, 2, replace=False)
                for head in dead[name]:
                    module.qkv.weight.view(3, 4, 4, 16)[2, head] = 0  # values are alike everywhere, and not zero
            elif last == "1" and hasattr(module, "conv"):
                dead[name] = draw.choice(32, 5, replace=False)
                copy = model.get_submodule(name.rpartition(".")[0])
                for layer in list(copy)[1:]:
                    layer.norm.weight[dead[name]] = 0
            elif isinstance(module, torch.nn.LayerNorm):
                module.weight[dead[DIM]] = 0
    write_checkpoint(tmp_path / "checkpoints", model)
    order.main([str(tmp_path), "--out", str(tmp_path / "ordered"), "--images", "9"])
    reader, again = (Reader(checkpoint.of_run(path)) for path in (tmp_path, tmp_path / "ordered"))
    whole = Architecture.of(model.recipe.model.backbone)
    half = dataclasses.replace(whole, heads=(2, 2), hidden=(32, 32))
    for task in CLASSES:
        before, after = (load_supernet(r, [spec_of(r, task)]) for r in (reader, again))
        wanted = subnet_outputs(before, task, whole)
        assert relative(subnet_outputs(after, task, whole).logits, wanted.logits) < 1e-6
        # Values that are alike everywhere are a bias, which the half lacks: add it.
        with torch.no_grad():
            for block in after.blocks:
                attention = block.attn.shared
                attention.proj.bias += attention.proj.weight[:, 8:] @ attention.qkv.bias[2 * 16 + 8 :]
        assert relative(subnet_outputs(after, task, half).logits, wanted.logits) < 1e-6
        assert relative(subnet_outputs(before, task, half).logits, wanted.logits) > 1e-2
    found = {g["group"]: g for g in json.loads((tmp_path / "ordered" / "importance.json").read_text())["groups"]}
    scores = order.importance(reader, 9, "cpu")[1]
    for group, orders in by_importance(scores).items():
        if group in dead and ".stem." not in group:
            assert set(orders[-len(dead[group]) :].tolist()) == set(dead[group].tolist()), group
            assert found[group]["members"] == len(orders)
        elif group in dead:  # those of each group norm
            for part in orders.view(2, 16):
                mine = [channel for channel in dead[group] if channel in part]
                assert set(part[16 - len(mine) :].tolist()) == set(mine)
    assert set(scores) >= {DIM, "embed.own.digits.stem.1", "embed.shared.stem.1", "blocks.0.ffn.own.digits"}


def test_a_copy_counts_all_tasks_that_use_it_and_an_unused_one_stays(tmp_path, shards):
    model = make_model(with_shards(make_recipe(), shards))
    with torch.no_grad():
        model.blocks[1].ffn.shared.fc1.weight[:] = 0  # of digits: all its hidden channels are dead
    reader = Reader(write_checkpoint(tmp_path / "checkpoints", model))
    counts, scores = order.importance(reader, 5, "cpu")
    assert counts == {"digits": 5, "glyphs": 5}
    # Digits go through their own FFN first and then the shared one, glyphs the other way round.
    assert {group for group in scores if ".ffn." in group} == {
        "blocks.0.ffn.own.digits", "blocks.0.ffn.shared", "blocks.1.ffn.shared", "blocks.1.ffn.own.glyphs",
    }  # fmt: skip
    assert scores["blocks.1.ffn.shared"].max() == 0
    alone = {}
    for task in model.recipe.tasks:
        [images] = open_sets(task)
        some = [evaluation_transform(images.read(n * len(images) // 5), task.input) for n in range(5)]
        network = load_supernet(reader, [spec_of(reader, task.name)])
        alone[task.name] = measure(network, torch.from_numpy(np.stack(some))[None])[1]
    for group in (DIM, "blocks.0.attn.shared", "blocks.1.attn.shared"):
        torch.testing.assert_close(scores[group], alone["digits"][group] + alone["glyphs"][group])


def test_the_command(tmp_path, shards, capsys):
    model = make_model(with_shards(make_recipe(), shards))
    write_checkpoint(tmp_path / "run" / "checkpoints", model, step=30, metrics={"digits/digits/top1": 0.9})
    for name in ("one", "other"):
        order.main([str(tmp_path / "run"), "--out", str(tmp_path / name), "--images", "8", "--json"])
        printed = json.loads(capsys.readouterr().out)
        assert printed == json.loads((tmp_path / name / "importance.json").read_text())
    assert printed["images"] == {"digits": 8, "glyphs": 8}
    assert len(printed["groups"]) == 7
    for entry in printed["groups"]:
        assert (entry["kind"], entry["layer"]) in {
            ("dim", None), ("heads", 0), ("heads", 1), ("hidden", 0), ("hidden", 1)
        }  # fmt: skip
        for share, before in entry["before"].items():
            assert before <= entry["after"][share] <= 1
    assert any(entry["after"]["50%"] > entry["before"]["50%"] + 0.05 for entry in printed["groups"])
    files = [(tmp_path / name / "rank-00000.safetensors").read_bytes() for name in ("one", "other")]
    assert files[0] == files[1]
    again = Reader(tmp_path / "one")
    again.verify()
    assert (again.index.step, again.index.metrics) == (30, {"digits/digits/top1": 0.9})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "other", "run"]
    order.main([str(tmp_path / "one"), "--out", str(tmp_path / "two"), "--images", "8"])
    lines = capsys.readouterr().out.splitlines()
    assert "50%" in lines[1]
    assert lines[2].startswith("dim ")
    # What is in order stays so.
    for entry in json.loads((tmp_path / "two" / "importance.json").read_text())["groups"]:
        assert entry["before"] == pytest.approx(entry["after"], abs=2e-4)


def test_an_image_that_cannot_be_read_is_left_out(tmp_path, shards):
    copied = shutil.copytree(shards, tmp_path / "shards")
    tar = next((copied / "digits").glob("*.tar"))
    data = bytearray(tar.read_bytes())
    start = data.index(b"IHDR")
    data[start : start + 4] = b"XXXX"
    tar.write_bytes(data)
    model = make_model(with_shards(make_recipe(), copied))
    reader = Reader(write_checkpoint(tmp_path / "checkpoints", model))
    assert order.importance(reader, 100, "cpu")[0] == {"digits": 17, "glyphs": 24}


def damage(run):
    file = next(run.glob("checkpoints/*/rank-1.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "{tmp}/exists"], "exists exists: choose another"),
        (["--out", "{tmp}/file/new"], "--out .*file/new: "),
        (["--out", "{tmp}/new", "--images", "0"], "--images 0: "),
        (["--out", "{tmp}/new", "--device", "toaster"], "--device 'toaster' cannot be used"),
        (["--out", "{tmp}/damaged"], "changed since it was written"),
        (["--out", "{tmp}/nothing"], "no shards|cannot|is no|missing|manifest"),
    ],
)
def test_wrong_input_is_one_line_and_leaves_nothing(tmp_path, shards, arguments, message):
    root = tmp_path / "no" if "nothing" in arguments[1] else shards
    model = make_model(with_shards(make_recipe(), root))
    write_checkpoint(tmp_path / "run" / "checkpoints", model)
    (tmp_path / "exists").mkdir()
    (tmp_path / "file").write_text("")
    if "damaged" in arguments[1]:
        damage(tmp_path / "run")
    with pytest.raises(UserError, match=rf"^[^\n]*({message})[^\n]*$"):
        order.main([str(tmp_path / "run"), *(argument.format(tmp=tmp_path) for argument in arguments)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["exists", "file", "run"]
