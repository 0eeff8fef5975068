"""A path cut out of a checkpoint is a stock model with the supernet's outputs; what was tampered with is found out."""

import dataclasses
import io
import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification, ViTModel

from tests.small_run import (
    CLASSES,
    PATHS,
    make_images,
    make_transparent_image,
    outputs_of,
    relative,
    write_checkpoint,
)
from ufo_ds import checkpoint, extract, recipe_file
from ufo_ds.checkpoint import Reader
from ufo_ds.errors import UserError
from ufo_ds.model.loading import spec_of
from ufo_ds.recipe import only
from ufo_ds.subnets import extraction
from ufo_ds.subnets.task_model import open_model

# --- extraction -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", CLASSES)
def test_an_extracted_model_is_certified_on_image_files(tmp_path, reader, extracted, task):
    copied = shutil.copytree(extracted / task, tmp_path / task)
    certificate = extraction.verify(reader, spec_of(reader, task), copied, make_images())
    assert json.loads((copied / "certificate.json").read_text()) == certificate
    assert certificate["passed"] is True
    assert certificate["loaded_by"] == "transformers"
    assert certificate["max_difference"] <= 1e-5
    assert (certificate["task"], certificate["step"], certificate["images"]) == (task, 10, 8)


@pytest.mark.parametrize("task", CLASSES)
def test_transparent_images_are_certified_too(tmp_path, reader, extracted, task):
    copied = shutil.copytree(extracted / task, tmp_path / task)
    images = [*make_images(), make_transparent_image()]
    assert extraction.verify(reader, spec_of(reader, task), copied, images)["passed"] is True


def test_stock_transformers_loads_an_embedding_model(model, extracted):
    directory = extracted / "glyphs"
    for stock in (AutoModel, ViTModel):
        vit, info = stock.from_pretrained(directory, output_loading_info=True)
        assert not any(info.values()), info
    assert type(vit) is ViTModel
    images = [Image.open(io.BytesIO(image)).convert("RGB") for image in make_images()]
    pixels = AutoImageProcessor.from_pretrained(directory)(images=images, return_tensors="pt").pixel_values
    with torch.no_grad():
        found = vit.eval()(pixels).pooler_output
    assert relative(found, outputs_of(model, "glyphs", make_images()).embedding) < 1e-5


def test_stock_transformers_loads_a_classifier(model, extracted):
    directory = extracted / "digits"
    classifier, info = AutoModelForImageClassification.from_pretrained(directory, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    assert classifier.config.id2label == {0: "zero", 1: "one", 2: "two"}
    assert classifier.config.label2id == {"zero": 0, "one": 1, "two": 2}
    backbone, info = AutoModel.from_pretrained(directory, output_loading_info=True)
    assert not info["missing_keys"]
    images = [Image.open(io.BytesIO(image)).convert("RGB") for image in make_images()]
    pixels = AutoImageProcessor.from_pretrained(directory)(images=images, return_tensors="pt").pixel_values
    wanted = outputs_of(model, "digits", make_images())
    with torch.no_grad():
        assert relative(classifier.eval()(pixels).logits, wanted.logits) < 1e-5
        assert relative(backbone.eval()(pixels).pooler_output, wanted.embedding) < 1e-5


def test_the_model_says_what_it_is(extracted):
    card = (extracted / "digits" / "README.md").read_text()
    assert "pipeline_tag: image-classification" in card
    assert "| digits/digits/top1 | 0.9000 |" in card
    assert "| ffn | own shared |" in card
    assert "pipeline_tag: image-feature-extraction" in (extracted / "glyphs" / "README.md").read_text()
    for task, routes in PATHS.items():
        assert json.loads((extracted / task / "spec.json").read_text()) == {
                "task": task, "routes": routes,
                "architecture": {"dim": 16, "heads": [2, 2], "hidden": [64, 64], "stem": []},
            }  # fmt: skip


def test_the_model_knows_the_recipe_of_its_task(extracted, model):
    for task in CLASSES:
        recipe = recipe_file.load(str(extracted / task / "recipe.yaml"))
        assert recipe == only(model.recipe, [task])
        assert [t.name for t in recipe.tasks] == [task]


def test_the_number_of_parameters_is_that_of_the_path(tmp_path, reader):
    # Embedding 192 x 16 + 16 + 16 + 5 x 16 = 3,184; a block 4 x (256 + 16) + 2 x 16 x 64 + 64 + 16 + 4 x 16 = 3,280;
    # last norm 32; pooler 272; classifier 3 x 16 + 3 = 51.
    assert extraction.extract(reader, spec_of(reader, "digits"), tmp_path / "out") == 3184 + 2 * 3280 + 32 + 272 + 51
    assert sum(value.numel() for value in load_file(tmp_path / "out" / "model.safetensors").values()) == 10_099


def test_only_the_paths_units_are_read(tmp_path, run):
    names = set()

    class Recording(Reader):
        def read(self, name, kind, start, stop):
            names.add(name.rsplit(".", 2 if name.split(".")[-2] in ("qkv", "proj", "fc1", "fc2", "patch") else 1)[0])
            return super().read(name, kind, start, stop)

        def buffer(self, name):
            names.add(name)
            return super().buffer(name)

    reader = Recording(checkpoint.of_run(run))
    extraction.extract(reader, spec_of(reader, "glyphs"), tmp_path / "out")
    assert names == {
        "embed.shared", "norm.shared", "heads.glyphs.neck",
        "heads.glyphs.neck.running_mean", "heads.glyphs.neck.running_var",
        "blocks.0.norm1.shared", "blocks.0.attn.shared", "blocks.0.norm2.shared", "blocks.0.ffn.shared",
        "blocks.1.norm1.shared", "blocks.1.attn.shared", "blocks.1.norm2.shared", "blocks.1.ffn.own.glyphs",
    }  # fmt: skip


def test_a_task_is_extracted_though_the_file_of_another_is_gone(tmp_path, model):
    reader = Reader(write_checkpoint(tmp_path / "checkpoints", model, apart="digits"))
    (reader.directory / "rank-2.safetensors").unlink()
    extraction.extract(reader, spec_of(reader, "glyphs"), tmp_path / "glyphs")
    assert extraction.verify(reader, spec_of(reader, "glyphs"), tmp_path / "glyphs", make_images())["passed"] is True


def test_damage_is_found_in_what_is_read_and_nothing_is_left(tmp_path, model):
    """What is not read is not looked at either: an extraction costs as much as its model is large."""
    reader = Reader(write_checkpoint(tmp_path / "checkpoints", model))
    key = "heads.digits.classifier.weight|weight"
    number, *_ = reader.index.parameters["heads.digits.classifier.weight"].pieces[0]
    file = reader.directory / f"rank-{number}.safetensors"
    content = bytearray(file.read_bytes())
    size = int.from_bytes(content[:8], "little")
    content[8 + size + json.loads(content[8 : 8 + size])[key]["data_offsets"][0]] ^= 1
    file.write_bytes(content)
    (tmp_path / "models").mkdir()
    with pytest.raises(UserError, match=r"rank-\d\.safetensors: heads\.digits\.classifier\.weight\|weight changed"):
        extraction.extract(reader, spec_of(reader, "digits"), tmp_path / "models" / "digits")
    assert list((tmp_path / "models").iterdir()) == []
    extraction.extract(reader, spec_of(reader, "glyphs"), tmp_path / "models" / "glyphs")
    with pytest.raises(UserError, match=r"classifier\.weight\|weight changed"):
        open_model(tmp_path, "digits")
    assert open_model(tmp_path, "glyphs").fingerprint == open_model(tmp_path / "models" / "glyphs").fingerprint


def test_another_path_than_the_runs_can_be_cut(tmp_path, reader):
    routes = {"embed": ("own",), "norm": ("shared",) * 3, "attn": ("shared",) * 2, "ffn": ("own", "own")}
    spec = dataclasses.replace(spec_of(reader, "glyphs"), routes=routes)
    extraction.extract(reader, spec, tmp_path / "out")
    assert extraction.verify(reader, spec, tmp_path / "out", make_images())["passed"] is True
    with pytest.raises(UserError, match="differs from the supernet"):
        extraction.verify(reader, spec_of(reader, "glyphs"), tmp_path / "out", make_images())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ffn": ("own",)}, "1 routes of ffn for 2 blocks: give 2"),
        ({"norm": ("shared",) * 2}, "2 routes of norm for 2 blocks: give 3"),
        ({"attn": ("shared", "own")}, "attn is own, but this model has only a shared attn"),
    ],
)
def test_a_path_that_the_model_lacks_is_refused(tmp_path, reader, change, message):
    spec = spec_of(reader, "glyphs")
    with pytest.raises(UserError, match=message):
        extraction.extract(reader, dataclasses.replace(spec, routes={**spec.routes, **change}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_existing_directory_is_left_as_it_is(tmp_path, reader):
    (tmp_path / "config.json").write_text("mine")
    with pytest.raises(UserError, match=r"^--out [^\n]* exists[^\n]*$"):
        extraction.extract(reader, spec_of(reader, "digits"), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert (tmp_path / "config.json").read_text() == "mine"


def test_the_command_extracts_and_verifies(tmp_path, run, capsys):
    for i, image in enumerate(make_images()):
        (tmp_path / f"{i}.image").write_bytes(image)
    files = [str(path) for path in tmp_path.iterdir()]
    out = tmp_path / "out"
    extract.main([str(run), "--task", "glyphs", "--out", str(out), "--verify", "--json", "--images", *files])
    printed = json.loads(capsys.readouterr().out)
    # Embedding for 3 x 2 patches: 192 x 16 + 16 + 16 + 7 x 16 = 3,216; two blocks, last norm and pooler as above.
    assert printed["parameters"] == 3216 + 2 * 3280 + 32 + 272
    assert (printed["task"], printed["step"], printed["out"]) == ("glyphs", 10, str(out))
    assert printed["max_difference"] <= 1e-5
    assert json.loads((out / "certificate.json").read_text())["passed"] is True


# --- tampering --------------------------------------------------------------------------------------------------------


def change_json(name, **values):
    def change(directory):
        file = directory / name
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    return change


def change_weight(directory):
    """The second matrix of the last FFN."""
    file = directory / "model.safetensors"
    state = load_file(file)
    [key] = [key for key, value in state.items() if "1" in key.split(".") and value.shape == (16, 64)]
    state[key] *= 1.01
    save_file(state, file, {"format": "pt"})


processor = "preprocessor_config.json"
TAMPERED = {
    # ((x - mean) / std - mean) / std = (x - (mean + mean x std)) / std^2
    "normalised twice": change_json(processor, image_mean=[0.48, 0.65, 0.75], image_std=[0.04, 0.09, 0.0625]),
    "not normalised": change_json(processor, do_normalize=False),
    "another mean": change_json(processor, image_mean=[0.4, 0.5, 0.601]),
    "colours in reverse": change_json(processor, image_mean=[0.6, 0.5, 0.4], image_std=[0.25, 0.3, 0.2]),
    "nearest": change_json(processor, resample=0),
    "bicubic": change_json(processor, resample=3),
    "not rescaled": change_json(processor, do_rescale=False),
    "one weight matrix by 1%": change_weight,
    "another epsilon": change_json("config.json", layer_norm_eps=1e-3),
    "another activation": change_json("config.json", hidden_act="gelu_new"),
}


@pytest.mark.parametrize("task", CLASSES)
@pytest.mark.parametrize("what", TAMPERED)
def test_tampering_is_found_out(tmp_path, reader, extracted, what, task):
    copied = shutil.copytree(extracted / task, tmp_path / task)
    TAMPERED[what](copied)
    with pytest.raises(UserError, match=r"^[^\n]* differs from the supernet by [^\n]*$"):
        extraction.verify(reader, spec_of(reader, task), copied, make_images())
    certificate = json.loads((copied / "certificate.json").read_text())
    assert certificate["passed"] is False
    assert certificate["max_difference"] > 1e-5


@pytest.mark.parametrize("name", ["classifier.bias", "classifier.weight", "vit.layernorm.weight"])
def test_outputs_that_are_no_numbers_are_found_out(tmp_path, reader, extracted, name):
    copied = shutil.copytree(extracted / "digits", tmp_path / "digits")
    state = load_file(copied / "model.safetensors")
    state[name] = torch.full_like(state[name], torch.nan)
    save_file(state, copied / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="differs from the supernet"):
        extraction.verify(reader, spec_of(reader, "digits"), copied, make_images())
    assert json.loads((copied / "certificate.json").read_text())["passed"] is False


def test_a_model_that_does_not_run_loses_its_certificate(tmp_path, reader, extracted):
    copied = shutil.copytree(extracted / "glyphs", tmp_path / "glyphs")
    extraction.verify(reader, spec_of(reader, "glyphs"), copied, make_images())
    change_json(processor, size={"height": 16, "width": 16})(copied)
    with pytest.raises(UserError, match=r"^[^\n]* does not run: [^\n]*$"):
        extraction.verify(reader, spec_of(reader, "glyphs"), copied, make_images())
    certificate = copied / "certificate.json"
    assert not certificate.exists() or json.loads(certificate.read_text())["passed"] is False
