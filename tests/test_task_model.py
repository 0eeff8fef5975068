"""A model as it is used: the supernet's outputs by either way, one fingerprint for one model, and nothing of it loads
that says something else than its recipe."""

import copy
import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.small_run import CLASSES, make_images, make_model, make_recipe, outputs_of, relative, write_checkpoint
from ufo_ds.checkpoint import Reader
from ufo_ds.data.mixing import Batch, TaskBatch
from ufo_ds.data.transforms import evaluation_transform
from ufo_ds.errors import UserError
from ufo_ds.evaluation.thresholds import Probability, Threshold
from ufo_ds.model.loading import spec_of
from ufo_ds.subnets import calibration, extraction
from ufo_ds.subnets.calibration import Calibration
from ufo_ds.subnets.task_model import open_model


def pixels_of(model, images):
    return torch.from_numpy(np.stack([evaluation_transform(image, model.input) for image in images]))


# --- outputs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", CLASSES)
@pytest.mark.parametrize("kind", ["model", "run"])
def test_outputs_are_the_supernets(run, extracted, model, kind, task):
    opened = open_model(extracted / task) if kind == "model" else open_model(run, task)
    wanted = outputs_of(model, task, make_images())
    found = opened.embed(pixels_of(opened, make_images()))
    assert relative(found.embedding, wanted.embedding) < 1e-5
    if task == "digits" or kind == "run":
        assert relative(found.logits, wanted.logits) < 1e-5
    else:
        assert found.logits.shape == (8, 0)
    assert opened.classes == (CLASSES[task] if task == "digits" else [])
    assert (opened.task, opened.input) == (task, {"digits": (16, 16), "glyphs": (24, 16)}[task])


@pytest.mark.parametrize("backbone", [{"stem": [8, 12], "pool": "mean"}, {"stem": [8, 12, 16]}, {"pool": "mean"}])
def test_outputs_of_what_is_not_stock_are_the_supernets(tmp_path, backbone):
    model = make_model(make_recipe(((19, 27), (26, 17)), backbone))
    reader = Reader(write_checkpoint(tmp_path / "checkpoints", model))
    for task in CLASSES:
        extraction.extract(reader, spec_of(reader, task), tmp_path / task)
        opened = open_model(tmp_path / task)
        found, wanted = opened.embed(pixels_of(opened, make_images())), outputs_of(model, task, make_images())
        assert relative(found.embedding, wanted.embedding) < 1e-5
        if task == "digits":
            assert relative(found.logits, wanted.logits) < 1e-5
        assert opened.fingerprint == open_model(tmp_path, task).fingerprint


def test_it_runs_batches_as_evaluation_has_them(extracted, model):
    opened = open_model(extracted / "glyphs")
    pixels = pixels_of(opened, make_images())
    batch = Batch(0, 0, {"glyphs": TaskBatch(pixels, torch.zeros(8, dtype=torch.int64), range(8), 8)}, {})
    assert torch.equal(opened.forward(batch)["glyphs"].embedding, opened.embed(pixels).embedding)


def test_flipped_outputs_are_the_mean_with_the_mirror_images(extracted):
    opened = open_model(extracted / "digits")
    pixels = pixels_of(opened, make_images())
    mirrored = torch.from_numpy(pixels.numpy()[:, :, :, ::-1].copy())
    for flipped, one, other in zip(
        opened.embed(pixels, flip=True), opened.embed(pixels), opened.embed(mirrored), strict=True
    ):
        assert torch.equal(flipped, (one + other) / 2)


# --- fingerprint ------------------------------------------------------------------------------------------------------


def test_a_run_and_what_was_cut_out_of_it_are_one_model(run, extracted):
    found = {task: open_model(extracted / task).fingerprint for task in CLASSES}
    assert found == {task: open_model(run, task).fingerprint for task in CLASSES}
    assert len(set(found.values())) == 2
    assert all(len(value) == 64 for value in found.values())


def test_a_weight_by_one_bit_is_another_model(tmp_path, extracted):
    for name in ("vit.pooler.dense.bias", "vit.embeddings.cls_token", "classifier.weight"):
        copied = shutil.copytree(extracted / "digits", tmp_path / name)
        state = load_file(copied / "model.safetensors")
        value = state[name].flatten()
        value[3] = torch.nextafter(value[3], torch.tensor(9.0))
        save_file(state, copied / "model.safetensors", {"format": "pt"})
        assert open_model(copied).fingerprint != open_model(extracted / "digits").fingerprint


def test_another_preprocessing_is_another_model(tmp_path, model, extracted):
    data = dataclasses.replace(model.recipe.data, mean=(0.4, 0.5, 0.5))
    other = copy.copy(model)
    other.recipe = dataclasses.replace(model.recipe, data=data)
    write_checkpoint(tmp_path / "checkpoints", other)
    assert open_model(tmp_path, "digits").fingerprint != open_model(extracted / "digits").fingerprint


# --- refusals ---------------------------------------------------------------------------------------------------------


def change_json(directory, name, **values):
    file = directory / name
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("preprocessor_config.json", {"resample": 3}),
        ("preprocessor_config.json", {"image_mean": [0.4, 0.5, 0.61]}),
        ("preprocessor_config.json", {"image_std": [0.2, 0.3, 0.2]}),
        ("preprocessor_config.json", {"size": {"height": 16, "width": 16}}),
        ("preprocessor_config.json", {"do_normalize": False}),
        ("preprocessor_config.json", {"do_center_crop": True}),
        ("preprocessor_config.json", {"image_processor_type": "CLIPImageProcessor"}),
        ("config.json", {"layer_norm_eps": 1e-3}),
        ("config.json", {"hidden_act": "gelu_new"}),
        ("config.json", {"num_attention_heads": 4}),
        ("config.json", {"image_size": [16, 16]}),
    ],
)
def test_a_model_that_says_something_else_than_its_recipe_is_refused(tmp_path, extracted, name, values):
    copied = shutil.copytree(extracted / "glyphs", tmp_path / "glyphs")
    change_json(copied, name, **values)
    with pytest.raises(UserError, match=rf"^[^\n]*{name}: {next(iter(values))} is [^\n]* recipe [^\n]*say[^\n]*$"):
        open_model(copied)


def drop_weight(directory):
    state = load_file(directory / "model.safetensors")
    del state["classifier.bias"]
    save_file(state, directory / "model.safetensors", {"format": "pt"})


def pickle_weights(directory):
    """As old models have them: a file that runs what it says when it is loaded."""
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()


def cut_weights(directory):
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop_weight, "no weights for classifier.bias"),
        (cut_weights, "does not load"),
        (pickle_weights, "does not load"),
        (lambda directory: (directory / "model.safetensors").unlink(), "does not load"),
        (lambda directory: (directory / "config.json").write_text("{"), "does not load"),
        (lambda directory: (directory / "config.json").write_text('{"model_type": "other"}'), "does not load"),
        (lambda directory: (directory / "recipe.yaml").unlink(), "has no recipe.yaml"),
        (lambda directory: (directory / "recipe.yaml").write_text("name: x\n"), "recipe.yaml"),
        (lambda directory: (directory / "preprocessor_config.json").unlink(), "preprocessor_config.json is missing"),
    ],
)
def test_a_damaged_model_is_refused(tmp_path, extracted, damage, message):
    copied = shutil.copytree(extracted / "digits", tmp_path / "digits")
    damage(copied)
    with pytest.raises(UserError, match=rf"^[^\n]*{message}[^\n]*$"):
        open_model(copied)


def test_the_wrong_task_place_or_device_is_refused(tmp_path, run, extracted):
    for arguments, message in [
        ((extracted / "digits", "glyphs"), "--task glyphs: .* is a model of task 'digits'"),
        ((run, None), "has the tasks digits, glyphs: choose one with --task"),
        ((run, "letters"), "no task 'letters'"),
        ((tmp_path, None), "neither a model nor a run directory"),
        ((tmp_path / "nothing", None), "neither a model nor a run directory"),
        ((run, "digits", "toaster"), "--device 'toaster' cannot be used"),
    ]:
        with pytest.raises(UserError, match=rf"^[^\n]*{message}[^\n]*$"):
            open_model(*arguments)


def test_a_checkpoint_that_changed_is_refused(tmp_path, run):
    copied = shutil.copytree(run, tmp_path / "run")
    file = next(copied.glob("checkpoints/*/rank-1.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match="changed since it was written"):
        open_model(copied, "digits")


# --- calibration ------------------------------------------------------------------------------------------------------

CALIBRATION = Calibration(
    model="a" * 64,
    task="glyphs",
    benchmark="pairs",
    flip=True,
    probability=Probability(slope=12.0, intercept=-6.0),
    thresholds=[Threshold(0.01, 0.4, 0.01, (0.005, 0.02), 0.9, (0.85, 0.95), 5000, 300, 80)],
)


def test_a_calibration_is_read_as_it_was_written(tmp_path):
    calibration.write(tmp_path / "calibration.json", CALIBRATION)
    assert calibration.read(tmp_path / "calibration.json", "a" * 64) == CALIBRATION
    assert calibration.read(tmp_path / "nothing.json", "a" * 64) is None
    with pytest.raises(UserError, match=r"^[^\n]* of model aaaaaaaaaaaa, this is model bbbbbbbbbbbb: [^\n]*$"):
        calibration.read(tmp_path / "calibration.json", "b" * 64)


def test_a_probability_is_the_logistic_function():
    cosines = np.linspace(-1, 1, 41)
    found = [CALIBRATION.probability.of(cosine) for cosine in cosines]
    np.testing.assert_allclose(found, 1 / (1 + np.exp(-(12 * cosines - 6))), rtol=1e-12, atol=1e-15)
    assert Probability(slope=1e6, intercept=0.0).of(1.0) == 1.0
    assert Probability(slope=1e6, intercept=0.0).of(-1.0) == 0.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"thresholds": []}, "thresholds"),
        ({"probability": {"slope": 1.0}}, "probability.intercept"),
        ({"extra": 1}, "extra"),
        ({"flip": None}, "flip"),
        ({"thresholds": [{"far": 0.1, "threshold": 0.5}]}, "expected_far"),
    ],
)
def test_a_calibration_of_another_form_is_refused(tmp_path, change, message):
    file = tmp_path / "calibration.json"
    calibration.write(file, CALIBRATION)
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(UserError, match=rf"^[^\n]* is no calibration: [^\n]*{message}[^\n]*$"):
        calibration.read(file, "a" * 64)
    file.write_text("cosine")
    with pytest.raises(UserError, match=r"^[^\n]* is no calibration: [^\n]*$"):
        calibration.read(file, "a" * 64)
