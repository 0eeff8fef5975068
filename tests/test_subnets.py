"""Subnets of an elastic checkpoint: the supernet's path, what is cut out and what is loaded again are one model, with
statistics of the neck that are the subnet's own."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from tests.elastic_run import SPACES, drawn, error_of, make_recipe, open_run, run_json, write_shards, write_spec
from tests.pictures import encode, texture
from tests.small_run import CLASSES, make_images, make_model, outputs_of, relative, write_checkpoint
from ufo_ds import checkpoint, evaluate, extract, recipe_file
from ufo_ds.checkpoint import Reader
from ufo_ds.data.shards import ShardSet
from ufo_ds.data.transforms import evaluation_transform
from ufo_ds.errors import UserError
from ufo_ds.model.architecture import Architecture
from ufo_ds.model.loading import load_supernet, spec_of
from ufo_ds.subnets import extraction, recalibration
from ufo_ds.subnets.dense_model import DenseModel
from ufo_ds.subnets.task_model import open_model, task_model


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("subnets"))


@pytest.fixture(scope="module")
def runs(root, tmp_path_factory):
    """A run directory of each space, and one trained on random subnets alone."""
    found = {}
    for space, sampling in [*((space, "sandwich") for space in SPACES), ("plain", "random")]:
        directory = tmp_path_factory.mktemp("run")
        model = make_model(make_recipe(root, space, sampling))
        write_checkpoint(directory / "checkpoints", model, licences={"digits": ["CC0"], "glyphs": ["MIT"]})
        found[space if sampling == "sandwich" else "random"] = directory
    return found


def with_statistics(reader, spec, statistics):
    """The supernet on the subnet's path."""
    supernet = load_supernet(reader, [spec])
    state = supernet.state_dict()
    for name, value in statistics.items():
        state[name][: len(value)] = value
    return supernet


def features_of(reader, spec, pixels):
    """What enters the neck, by the supernet."""
    supernet = load_supernet(reader, [spec])
    segment = dataclasses.replace(supernet.segment(spec.task, pixels), architecture=spec.architecture)
    with torch.no_grad():
        return supernet.backbone({spec.task: pixels}, [segment]).pooled_BD[:, : spec.architecture.dim].double().numpy()


# --- one model --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", SPACES)
def test_the_supernets_path_what_is_cut_out_and_what_is_loaded_again_are_one_model(tmp_path, runs, space):
    """Fifty-one subnets, by batches of 1 and 17 images."""
    reader = open_run(runs[space])
    images = (make_images(0) + make_images(1) + make_images(2))[:17]
    specs = [drawn(reader, ["digits", "glyphs"][n % 2], space, n) for n in range(30)]
    specs = list({spec.name: spec for spec in specs}.values())[:17]
    assert len(specs) == 17
    for spec in specs:
        task, out = spec.task, tmp_path / spec.name
        pixels = recalibration.training_pixels(reader.recipe, task)
        statistics = recalibration.statistics(reader, spec, pixels)
        extraction.extract(reader, spec, out, statistics)
        supernet = with_statistics(reader, spec, statistics)
        of_run, loaded = task_model(reader, runs[space], spec, pixels=pixels), open_model(out)
        assert loaded.fingerprint == of_run.fingerprint
        assert DenseModel.load(out).spec == spec
        for count in (1, 17):
            wanted = outputs_of(supernet, task, images[:count])
            uint8 = torch.from_numpy(np.stack([evaluation_transform(x, loaded.input) for x in images[:count]]))
            assert relative(of_run.embed(uint8).embedding, wanted.embedding) <= 1e-5
            assert relative(of_run.embed(uint8).logits, wanted.logits) <= 1e-5
            assert relative(loaded.embed(uint8).embedding, wanted.embedding) <= 1e-5
            if task == "digits":
                assert relative(loaded.embed(uint8).logits, wanted.logits) <= 1e-5
            found = extraction.verify(reader, spec, out, images[:count], statistics)
            assert json.loads((out / "certificate.json").read_text()) == found
            assert (found["passed"], found["images"], found["spec"]) == (True, count, spec.name)


def test_blocks_that_are_alike_are_a_stock_model(tmp_path, runs):
    reader = open_run(runs["plain"])
    for name, heads, kind in (("alike", (2, 2), "vit"), ("differ", (2, 1), "ufo_vit")):
        spec = spec_of(reader, "glyphs").sliced(Architecture(16, (), heads, (40, 40)))
        extraction.extract(reader, spec, tmp_path / name)
        assert json.loads((tmp_path / name / "config.json").read_text())["model_type"] == kind
        card = (tmp_path / name / "README.md").read_text()
        assert f"`{spec.name}`" in card
        assert f"| heads, by block | {heads[0]} {heads[1]} |" in card
        assert "statistics of its neck were found anew" in card
        assert ("import ufo_ds" in card) == (kind == "ufo_vit")


def test_a_smaller_subnet_with_the_statistics_of_the_whole_is_found_out(tmp_path, runs):
    reader = open_run(runs["plain"])
    spec = drawn(reader, "glyphs", 0)
    extraction.extract(reader, spec, tmp_path / "out", {})
    with pytest.raises(UserError, match="differs from the supernet"):
        extraction.verify(reader, spec, tmp_path / "out", make_images())


def test_blocks_left_out_are_not_read(tmp_path, runs):
    names = set()

    class Recording(Reader):
        def read(self, name, kind, start, stop):
            names.add(name)
            return super().read(name, kind, start, stop)

    reader = Recording(checkpoint.of_run(runs["plain"]))
    spec = spec_of(reader, "glyphs").sliced(Architecture(16, (), (2,), (40,)))
    extraction.extract(reader, spec, tmp_path / "out")
    assert {name.split(".")[1] for name in names if name.startswith("blocks.")} == {"0"}
    assert not any("digits" in name.split(".") for name in names)


# --- statistics -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", CLASSES)
@pytest.mark.parametrize("space", SPACES)
def test_statistics_are_those_of_the_supernets_features(root, runs, space, task):
    reader = open_run(runs[space])
    pixels = recalibration.training_pixels(reader.recipe, task)
    assert len(pixels) == 31
    for n in range(3):
        spec = drawn(reader, task, "statistics", n)
        found = recalibration.statistics(reader, spec, pixels)
        features_ND = features_of(reader, spec, pixels)
        mean, var = (found[f"heads.{task}.neck.running_{kind}"].double().numpy() for kind in ("mean", "var"))
        np.testing.assert_allclose(mean, features_ND.mean(0), atol=1e-5 * np.abs(features_ND).max())
        np.testing.assert_allclose(var, features_ND.var(0, ddof=1), rtol=1e-4, atol=1e-9)


def test_images_are_spread_evenly_over_all_train_sets(root, runs, monkeypatch):
    """Of 12 + 20 images every fourth; number 4 is damaged."""
    monkeypatch.setattr(recalibration, "IMAGES", 8)
    recipe = open_run(runs["plain"]).recipe
    one, two = (ShardSet.open(root / f"glyphs-{part}") for part in ("one", "two"))
    wanted = [one.read(i) for i in (0, 8)] + [two.read(i) for i in (0, 4, 8, 12, 16)]
    wanted = np.stack([evaluation_transform(image, (24, 16)) for image in wanted])
    np.testing.assert_array_equal(recalibration.training_pixels(recipe, "glyphs").numpy(), wanted)


def test_the_whole_path_keeps_what_training_found(tmp_path, root, runs):
    """Unless training had no statistics of it: random subnets alone."""
    reader = open_run(runs["plain"])
    assert recalibration.statistics(reader, spec_of(reader, "glyphs")) == {}
    reader = open_run(runs["random"])
    found = recalibration.statistics(reader, spec_of(reader, "glyphs"))
    assert set(found) == {"heads.glyphs.neck.running_mean", "heads.glyphs.neck.running_var"}


def test_without_a_neck_no_images_are_needed(tmp_path, root):
    recipe = make_recipe(tmp_path / "nowhere")
    task = dataclasses.replace(recipe.tasks[0], head=dataclasses.replace(recipe.tasks[0].head, neck=False))
    recipe = dataclasses.replace(recipe, tasks=[task, recipe.tasks[1]])
    write_checkpoint(tmp_path / "checkpoints", make_model(recipe))
    reader = open_run(tmp_path)
    spec = drawn(reader, "digits", 1)
    extraction.extract(reader, spec, tmp_path / "out")
    assert extraction.verify(reader, spec, tmp_path / "out", make_images())["passed"] is True


# --- commands ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", ["plain", "stem"])
def test_a_subnet_is_evaluated_like_what_is_cut_out_of_it(tmp_path, runs, capsys, space):
    reader = open_run(runs[space])
    specs = {task: drawn(reader, task, "command", space) for task in CLASSES}
    files = {task: write_spec(tmp_path, spec) for task, spec in specs.items()}
    for task, file in files.items():
        out = tmp_path / task
        made = run_json(capsys, extract, runs[space], "--task", task, "--spec", file, "--out", out, "--verify")
        assert made["spec"] == specs[task].name
        assert made["max_difference"] <= 1e-5
        assert sum(p.numel() for p in DenseModel.load(out).state.values()) == made["parameters"]
    found = run_json(
        capsys, evaluate, runs[space], "--spec", files["digits"], "--spec", files["glyphs"], "--device", "cpu"
    )
    assert set(found) == {f"{task}/which/{metric}" for task in CLASSES for metric in ("top1", "mean_per_class")}
    alone = run_json(capsys, evaluate, tmp_path / "digits", "--device", "cpu")
    assert alone == {name: value for name, value in found.items() if name.startswith("digits")}
    assert not (runs[space] / "evaluations").exists()
    whole = run_json(capsys, evaluate, runs[space], "--device", "cpu")
    assert set(whole) == set(found)


def test_other_images_stand_in_for_train_sets_that_are_not_here(tmp_path, root, runs, capsys):
    write_checkpoint(tmp_path / "checkpoints", make_model(make_recipe(tmp_path / "nowhere")))
    spec = drawn(open_run(tmp_path), "digits", 3)
    file = write_spec(tmp_path, spec)
    error = error_of(capsys, extract, tmp_path, "--task", "digits", "--out", tmp_path / "out", "--spec", file)
    assert f"{tmp_path}/nowhere/digits-one is not here" in error
    assert "--statistics" in error
    assert not (tmp_path / "out").exists()
    (tmp_path / "images").mkdir()
    generator = np.random.default_rng(5)
    for i in range(9):
        (tmp_path / "images" / f"{i}.png").write_bytes(encode(texture(generator)))
    for source in (tmp_path / "images", root / "digits-two"):
        out = tmp_path / source.name
        made = run_json(
            capsys, extract, tmp_path, "--task", "digits", "--spec", file, "--out", f"{out}-vit", "--statistics",
            source, "--verify", "--images", *(tmp_path / "images").iterdir(),
        )  # fmt: skip
        assert made["max_difference"] <= 1e-5
        (tmp_path / "other.yaml").write_text(recipe_file.to_yaml(make_recipe(root)))
        arguments = ["--recipe", tmp_path / "other.yaml", "--device", "cpu"]
        found = run_json(capsys, evaluate, f"{out}-vit", *arguments)
        subnet = ["--spec", file, "--statistics", source]
        assert run_json(capsys, evaluate, tmp_path, *subnet, *arguments) == found
    (tmp_path / "images" / "0.png").write_bytes(b"")
    for i in range(2, 9):
        (tmp_path / "images" / f"{i}.png").unlink()
    arguments = ["--task", "digits", "--spec", file, "--out", tmp_path / "x", "--statistics", tmp_path / "images"]
    assert "1 of 2 images can be read" in error_of(capsys, extract, tmp_path, *arguments)


def test_specs_that_do_not_go_with_the_run_are_refused(tmp_path, runs, capsys):
    reader = open_run(runs["plain"])
    spec = drawn(reader, "glyphs", 4)

    def change(**values):
        return dataclasses.replace(spec, **values)

    kept = spec.architecture
    deeper = dataclasses.replace(kept, heads=kept.heads * 4, hidden=kept.hidden * 4)
    for changed, message in [
        (change(task="letters"), "no task 'letters'"),
        (change(architecture=dataclasses.replace(kept, dim=15)), "dim 15 is none of 9, 16, 24"),
        (change(architecture=dataclasses.replace(kept, dim=48)), "is no slice of this model"),
        (change(architecture=deeper), "is no slice of this model"),
        (
            change(routes={**spec.routes, "attn": ("own",) * kept.depth}),
            "attn is own, but this model has only a shared",
        ),
    ]:
        file = write_spec(tmp_path, changed)
        assert message in error_of(capsys, evaluate, runs["plain"], "--spec", file)
        arguments = ["--task", changed.task, "--spec", file, "--out", tmp_path / "out", "--verify"]
        assert message in error_of(capsys, extract, runs["plain"], *arguments)
    for text in ("[" * 100_000, "{", "1", '{"task": "glyphs", "routes": {}, "architecture": {"dim": 1e999}}'):
        (tmp_path / "hostile.json").write_text(text)
        arguments = ["--task", "glyphs", "--spec", tmp_path / "hostile.json", "--out", tmp_path / "out"]
        assert "hostile.json" in error_of(capsys, extract, runs["plain"], *arguments)
    file = write_spec(tmp_path, spec)
    arguments = [runs["plain"], "--task", "digits", "--spec", file, "--out", tmp_path / "out"]
    assert f"--spec {file} is for task 'glyphs', --task is 'digits'" in error_of(capsys, extract, *arguments)
    assert "one more for task 'glyphs'" in error_of(capsys, evaluate, runs["plain"], "--spec", file, "--spec", file)
    extraction.extract(reader, spec, tmp_path / "model")
    assert "is for a run" in error_of(capsys, evaluate, tmp_path / "model", "--spec", file)
    assert "that has its own" in error_of(capsys, evaluate, tmp_path / "model", "--statistics", tmp_path)
    stem = open_run(runs["stem"])
    narrow = spec_of(stem, "glyphs").sliced(Architecture(16, (4, 6, 16), (2,), (40,)))
    assert not narrow.architecture.fits(Architecture.of(stem.recipe.model.backbone))
    assert not (tmp_path / "out").exists()
