"""Several tasks' subnets in one directory over one shared copy: each is the run's to the bit, what they share is there
once, and all commands that read a checkpoint read it."""

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors import safe_open

from tests.elastic_run import SPACES, drawn, error_of, make_recipe, open_run, run_json, write_shards, write_spec
from tests.small_run import CLASSES, make_images, make_model, write_checkpoint
from ufo_ds import evaluate, extract, order, predict
from ufo_ds.checkpoint import Reader
from ufo_ds.errors import UserError
from ufo_ds.model.architecture import Architecture
from ufo_ds.model.loading import spec_of
from ufo_ds.subnets import extraction, joint, recalibration
from ufo_ds.subnets.task_model import open_model
from ufo_ds.subnets.weights import state_of

LICENCES = {"digits": ["CC0"], "glyphs": ["CC BY-NC 4.0"], "gone": ["secret"]}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("joint"))


@pytest.fixture(scope="module")
def runs(root, tmp_path_factory):
    """A run directory of each space."""
    found = {space: tmp_path_factory.mktemp("run") for space in SPACES}
    for space, directory in found.items():
        write_checkpoint(directory / "checkpoints", make_model(make_recipe(root, space)), licences=LICENCES)
    return found


def joined(reader, specs, out):
    statistics = {}
    for spec in specs:
        statistics |= recalibration.statistics(reader, spec)
    return joint.extract(reader, specs, out, statistics), statistics


def same(found, wanted):
    return found.keys() == wanted.keys() and all(torch.equal(found[name], value) for name, value in wanted.items())


@pytest.mark.parametrize("space", SPACES)
def test_every_task_is_the_runs_to_the_bit(tmp_path, runs, space):
    reader = open_run(runs[space])
    for n in range(5):
        specs = [drawn(reader, task, "joint", n) if n else spec_of(reader, task) for task in CLASSES]
        out = tmp_path / str(n)
        _, statistics = joined(reader, specs, out)
        joint.verify(reader, specs, out, statistics)
        there = Reader(out)
        there.verify()  # checksums of whole files
        for spec in specs:
            assert spec_of(there, spec.task) == spec
            assert recalibration.statistics(there, spec) == {}
            assert same(state_of(there, spec), state_of(reader, spec, statistics))
            extraction.extract(reader, spec, out / "from-run" / spec.task, statistics)
            extraction.extract(there, spec, out / "from-there" / spec.task)
            one, other = (out / name / spec.task for name in ("from-run", "from-there"))
            for file in ("config.json", "spec.json", "preprocessor_config.json", "model.safetensors"):
                assert (one / file).read_bytes() == (other / file).read_bytes(), file
            assert open_model(out, spec.task).fingerprint == open_model(one).fingerprint
            assert extraction.verify(there, spec, other, make_images())["passed"] is True


def test_what_is_shared_is_there_once_and_nothing_else(tmp_path, runs):
    """Digits keeps one block of 16 channels, glyphs two of 9; own FFNs in the second block alone."""
    reader = open_run(runs["plain"])
    specs = [
        spec_of(reader, "digits").sliced(Architecture(16, (), (3,), (16,))),
        spec_of(reader, "glyphs").sliced(Architecture(9, (), (1, 2), (22, 27))),
    ]
    parameters, _ = joined(reader, specs, tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        names = list(file.keys())
        sizes = {name.removesuffix("|weight"): file.get_tensor(name).numel() for name in names}
    # 16 channels wide, heads (3, 2) of 8 channels, FFNs (22, 27).
    wanted = {
        "embed.shared.patch.weight": 16 * 192, "embed.shared.patch.bias": 16, "embed.shared.cls": 16,
        "embed.shared.position": 16 * 7, "norm.shared.weight": 16, "norm.shared.bias": 16,
        "heads.digits.classifier.weight": 3 * 16, "heads.digits.classifier.bias": 3,
        "heads.digits.neck.running_mean": 16, "heads.digits.neck.running_var": 16,
        "heads.glyphs.classifier.weight": 4 * 16, "heads.glyphs.neck.weight": 16,
        "heads.glyphs.neck.running_mean": 9, "heads.glyphs.neck.running_var": 9,
    }  # fmt: skip
    for i, (heads, hidden, copy) in enumerate([(3, 22, "shared"), (2, 27, "own.glyphs")]):
        block, rows = f"blocks.{i}", heads * 8
        wanted |= {f"{block}.{norm}.shared.{kind}": 16 for norm in ("norm1", "norm2") for kind in ("weight", "bias")}
        wanted |= {
            f"{block}.attn.shared.qkv.weight": 3 * rows * 16, f"{block}.attn.shared.qkv.bias": 3 * rows,
            f"{block}.attn.shared.proj.weight": rows * 16, f"{block}.attn.shared.proj.bias": 16,
            f"{block}.ffn.{copy}.fc1.weight": hidden * 16, f"{block}.ffn.{copy}.fc1.bias": hidden,
            f"{block}.ffn.{copy}.fc2.weight": hidden * 16, f"{block}.ffn.{copy}.fc2.bias": 16,
        }  # fmt: skip
    assert sizes == wanted
    assert parameters == sum(count for name, count in wanted.items() if "running" not in name)


def test_the_card_names_all_licences(tmp_path, runs):
    """Also of a task that was cut off before: what it taught the shared copy stays there."""
    reader = open_run(runs["own"])
    specs = [drawn(reader, task, "card") for task in CLASSES]
    joined(reader, specs, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    for spec in specs:
        assert f"| {spec.task} | `{spec.name}` |" in card
    assert "| glyphs | CC BY-NC 4.0 |" in card
    there = Reader(tmp_path / "out")
    assert there.index.licences == LICENCES
    extraction.extract(there, specs[0], tmp_path / "digits")
    for card in (tmp_path / "out" / "README.md", tmp_path / "digits" / "README.md"):
        assert "| gone | secret |" in card.read_text()


def test_the_commands_work_with_it(tmp_path, runs, capsys):
    run, out = runs["stem"], tmp_path / "both"
    reader = open_run(run)
    spec = drawn(reader, "glyphs", "commands")
    arguments = ["--task", "digits", "--task", "glyphs", "--spec", write_spec(tmp_path, spec), "--out", out]
    made = run_json(capsys, extract, run, *arguments, "--verify")
    assert made["specs"] == {"digits": spec_of(reader, "digits").name, "glyphs": spec.name}
    assert {task.name for task in Reader(out).recipe.tasks} == set(CLASSES)
    found = run_json(capsys, evaluate, out, "--device", "cpu")
    of_run = run_json(capsys, evaluate, run, "--task", "digits", "--device", "cpu")
    of_run |= run_json(capsys, evaluate, run, "--spec", write_spec(tmp_path, spec), "--device", "cpu")
    assert found == of_run
    (tmp_path / "image.png").write_bytes(make_images()[0])
    said = run_json(capsys, predict, out, tmp_path / "image.png", "--task", "digits")
    of_run = run_json(capsys, predict, run, tmp_path / "image.png", "--task", "digits")
    assert said["classes"] == of_run["classes"]
    assert said["fingerprint"] == of_run["fingerprint"]
    one = run_json(capsys, extract, out, "--task", "glyphs", "--out", tmp_path / "glyphs", "--verify")
    assert one["spec"] == spec.name
    assert one["max_difference"] <= 1e-5
    again = run_json(capsys, extract, out, "--task", "digits", "--task", "glyphs", "--out", tmp_path / "again")
    assert again["parameters"] == made["parameters"]
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def test_a_smaller_subnet_of_it_is_one_of_the_run(tmp_path, runs):
    """With statistics found anew, from the same images."""
    reader = open_run(runs["own"])
    larger = [spec_of(reader, "digits"), drawn(reader, "glyphs", 7)]
    joined(reader, larger, tmp_path / "out")
    spec = spec_of(reader, "digits").sliced(Architecture(9, (), (1, 2), (22, 27)))
    there = Reader(tmp_path / "out")
    statistics = recalibration.statistics(reader, spec)
    assert same(recalibration.statistics(there, spec), statistics)
    assert same(state_of(there, spec, statistics), state_of(reader, spec, statistics))
    with pytest.raises(UserError, match="is no slice of this model"):
        state_of(Reader(tmp_path / "out"), dataclasses.replace(spec, architecture=Architecture(25, (), (1,), (9,))))


def test_bad_input_is_refused_and_nothing_is_left(tmp_path, runs, capsys):
    run = runs["plain"]
    reader = open_run(run)
    file, out = write_spec(tmp_path, drawn(reader, "glyphs", 0)), tmp_path / "models" / "out"
    both = [run, "--task", "digits", "--task", "glyphs", "--out", out]
    for arguments, message in [
        ([run, "--task", "digits", "--task", "letters", "--out", out], "no task 'letters'"),
        ([*both, "--spec", file, "--spec", file], "one more for task 'glyphs'"),
        ([run, "--task", "digits", "--out", out, "--spec", file], "is for task 'glyphs', --task is 'digits'"),
        ([*both, "--statistics", tmp_path], "is for the subnet of one task"),
        ([*both, "--allow", "commercial"], "'CC BY-NC 4.0' of the images of glyphs"),
    ]:
        assert message in error_of(capsys, extract, *arguments)
        assert not (tmp_path / "models").exists()
    specs = [spec_of(reader, task) for task in CLASSES]
    (tmp_path / "models").mkdir()
    joined(reader, specs, out)
    assert "exists" in error_of(capsys, extract, *both)
    assert "no whole model" in error_of(capsys, order, out, "--out", tmp_path / "ordered")
    damaged = shutil.copytree(out, tmp_path / "models" / "damaged")
    content = bytearray((damaged / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (damaged / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="changed since it was written"):
        Reader(damaged).verify()
    with pytest.raises(UserError, match="changed since it was written"):
        joined(Reader(damaged), specs, tmp_path / "models" / "again")
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == ["damaged", "out"]
    index = json.loads((damaged / "index.json").read_text())
    assert set(index["specs"]) == set(CLASSES)
