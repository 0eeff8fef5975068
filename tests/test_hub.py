"""A path with a stem or mean pooling, cut out, is a model of our registered class with the supernet's outputs."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForImageClassification

from tests.small_run import (
    CLASSES,
    make_images,
    make_model,
    make_recipe,
    make_transparent_image,
    outputs_of,
    relative,
    write_checkpoint,
)
from ufo_ds.checkpoint import Reader
from ufo_ds.errors import UserError
from ufo_ds.model.loading import load_supernet, spec_of
from ufo_ds.model.spec import SubnetSpec
from ufo_ds.subnets import extraction

BACKBONES = {
    "stem and mean": {"stem": [8, 12], "pool": "mean"},
    "stem": {"stem": [8, 12, 16]},
    "mean": {"pool": "mean"},
}
SIZES = ((19, 27), (26, 17))  # no multiples of a patch; grids of 2 x 3 and 3 x 2


@pytest.fixture(scope="module")
def unusual(tmp_path_factory):
    """For every backbone its model, its reader, and a directory with both tasks cut out."""
    made = {}
    for name, backbone in BACKBONES.items():
        directory = tmp_path_factory.mktemp("unusual")
        model = make_model(make_recipe(SIZES, backbone))
        reader = Reader(write_checkpoint(directory / "checkpoints", model))
        for task in CLASSES:
            extraction.extract(reader, spec_of(reader, task), directory / task)
        made[name] = model, reader, directory
    return made


def shared_path(reader, task):
    spec = spec_of(reader, task)
    routes = {unit: ("shared",) * len(layers) for unit, layers in spec.routes.items()}
    return SubnetSpec(task, routes, spec.architecture)


# Runs the code of model cards, as someone would who has nothing but the directories.
CARDS = """
import pathlib, re, sys
import torch
from safetensors.torch import save_file

images, out, *directories = map(pathlib.Path, sys.argv[1:])
found, imported = {}, {}
with torch.no_grad():
    for path in directories:
        *lines, last = re.search("```python\\n(.*?)\\n```", (path / "README.md").read_text(), re.S)[1].split("\\n")
        outputs = []
        for file in sorted(images.iterdir()):
            exec("\\n".join(lines))
            outputs.append(eval(last))
        found[str(path)] = torch.cat(outputs)
        imported[str(path)] = torch.tensor("ufo_ds" in sys.modules)
        assert "deepspeed" not in sys.modules
save_file(found, out / "found")
save_file(imported, out / "imported")
"""


def test_the_code_on_the_model_cards_gives_the_supernets_outputs(tmp_path, reader, model, extracted, unusual):
    images = make_images()
    (tmp_path / "images").mkdir()
    for i, image in enumerate(images):
        (tmp_path / "images" / str(i)).write_bytes(image)
    wanted = {str(extracted / task): outputs_of(model, task, images) for task in CLASSES}
    for name, (supernet, its_reader, directory) in unusual.items():
        for task in CLASSES:
            wanted[str(directory / task)] = outputs_of(supernet, task, images)
            shared = tmp_path / name / task
            extraction.extract(its_reader, shared_path(its_reader, task), shared)
            wanted[str(shared)] = outputs_of(load_supernet(its_reader, [shared_path(its_reader, task)]), task, images)
    subprocess.run([sys.executable, "-c", CARDS, tmp_path / "images", tmp_path, *wanted], check=True, timeout=300)
    imported = load_file(tmp_path / "imported")
    for path, found in load_file(tmp_path / "found").items():
        outputs = wanted[path]
        assert relative(found, outputs.logits if path.endswith("digits") else outputs.embedding) < 1e-5, path
        assert imported[path] == (not path.startswith(str(extracted)))  # the stock ones, run first, need no ufo_ds


def by_hand(state, pixels_BCHW):
    """A stem of two layers, attention and mean pooling written out, from the names in the file."""

    def linear(x, name):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(x, name):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()
        return x * state[f"{name}.weight"] + state[f"{name}.bias"]

    def heads(x_BLD):
        return x_BLD.unflatten(2, (2, 8)).transpose(1, 2)

    state = {name: value.double() for name, value in state.items()}
    x = pixels_BCHW.double()[:, :, :16, :24]
    embeddings = "embeddings.patch_embeddings"
    for i in range(2):
        layer = f"{embeddings}.stem.{i}"
        x = F.conv2d(x, state[f"{layer}.conv.weight"], stride=2, padding=1)
        mean, var = x.mean((1, 2, 3), keepdim=True), x.var((1, 2, 3), keepdim=True, unbiased=False)  # one group
        x = (x - mean) / (var + 1e-5).sqrt()
        x = (x * state[f"{layer}.norm.weight"][:, None, None] + state[f"{layer}.norm.bias"][:, None, None]).relu()
    patches = [x[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].flatten(1) for i in range(2) for j in range(3)]
    projection = state[f"{embeddings}.projection.weight"].flatten(1)
    x = torch.stack(patches, 1) @ projection.T + state[f"{embeddings}.projection.bias"]
    x = x + state["embeddings.position_embeddings"]
    for i in range(2):
        block = f"layers.{i}"
        y = norm(x, f"{block}.layernorm_before")
        q, k, v = (heads(linear(y, f"{block}.attention.{p}_proj")) for p in "qkv")
        y = (q @ k.transpose(2, 3) / 8**0.5).softmax(-1) @ v
        x = x + linear(y.transpose(1, 2).flatten(2), f"{block}.attention.o_proj")
        y = linear(norm(x, f"{block}.layernorm_after"), f"{block}.mlp.fc1")
        y = y * (1 + torch.erf(y / 2**0.5)) / 2
        x = x + linear(y, f"{block}.mlp.fc2")
    return norm(x, "layernorm").mean(1)


def test_a_model_with_a_stem_is_what_is_written_out_by_hand(unusual):
    directory = unusual["stem and mean"][2] / "digits"
    state = {name.removeprefix("vit."): value for name, value in load_file(directory / "model.safetensors").items()}
    pixels = torch.randn(3, 3, *SIZES[0], generator=torch.Generator().manual_seed(0))
    feature = by_hand(state, pixels)
    with torch.no_grad():
        assert relative(AutoModel.from_pretrained(directory)(pixels).pooler_output, feature) < 1e-5
        logits = AutoModelForImageClassification.from_pretrained(directory)(pixels).logits
    assert relative(logits, feature @ state["classifier.weight"].double().T + state["classifier.bias"]) < 1e-5


@pytest.mark.parametrize("task", CLASSES)
@pytest.mark.parametrize("name", BACKBONES)
def test_an_unusual_model_is_certified(tmp_path, unusual, name, task):
    _, reader, directory = unusual[name]
    copied = shutil.copytree(directory / task, tmp_path / task)
    certificate = extraction.verify(reader, spec_of(reader, task), copied, [*make_images(), make_transparent_image()])
    assert certificate["passed"] is True
    assert certificate["loaded_by"] == "transformers and ufo_ds.model.hub"
    assert not list(copied.rglob("*.py"))


@pytest.mark.parametrize("task", CLASSES)
@pytest.mark.parametrize("name", BACKBONES)
def test_an_unusual_model_is_saved_and_loaded_bit_for_bit(tmp_path, unusual, name, task):
    pixels = torch.randn(3, 3, *SIZES[list(CLASSES).index(task)], generator=torch.Generator().manual_seed(0))
    for auto in (AutoModel, AutoModelForImageClassification)[: 2 if task == "digits" else 1]:
        first, info = auto.from_pretrained(unusual[name][2] / task, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["mismatched_keys"]
        first.save_pretrained(tmp_path / auto.__name__)
        again, info = auto.from_pretrained(tmp_path / auto.__name__, output_loading_info=True)
        assert not any(info.values()), info
        assert again.config.to_dict() == first.config.to_dict() | {"_name_or_path": again.config.name_or_path}
        state = again.state_dict()
        assert state.keys() == first.state_dict().keys()
        assert all(torch.equal(value, state[key]) for key, value in first.state_dict().items())
        with torch.no_grad():
            for one, other in zip(first(pixels).values(), again(pixels).values(), strict=True):
                assert torch.equal(one, other)


@pytest.mark.parametrize("name", BACKBONES)
def test_an_unusual_model_takes_other_sizes_when_asked(unusual, name):
    supernet, _, directory = unusual[name]
    images = torch.randint(0, 256, (2, 3, 33, 47), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    mean, std = torch.tensor(supernet.recipe.data.mean), torch.tensor(supernet.recipe.data.std)
    pixels = (images / 255 - mean[:, None, None]) / std[:, None, None]
    dense = AutoModel.from_pretrained(directory / "digits")
    with torch.no_grad():
        found = dense(pixels, interpolate_pos_encoding=True).pooler_output
        assert relative(found, supernet.backbone({"digits": images}).pooled_BD) < 1e-5
        with pytest.raises(ValueError, match="images of 33x47 pixels, this model takes 19x27"):
            dense(pixels)


def test_an_unusual_classifier_can_be_trained_on(unusual):
    classifier = AutoModelForImageClassification.from_pretrained(unusual["stem and mean"][2] / "digits")
    pixels, labels = torch.randn(4, 3, *SIZES[0]), torch.tensor([0, 2, 1, 2])
    outputs = classifier(pixels, labels=labels, output_hidden_states=True)
    torch.testing.assert_close(outputs.loss, F.cross_entropy(outputs.logits, labels))
    assert [x.shape for x in outputs.hidden_states] == [(4, 6, 16)] * 3
    outputs.loss.backward()
    assert all(parameter.grad.any() for name, parameter in classifier.named_parameters() if "k_proj.bias" not in name)


def test_the_number_of_parameters_of_an_unusual_model(unusual):
    # Stem 3 x 9 x 8 + 16 + 8 x 9 x 12 + 24 = 1,120; projection 12 x 4 x 16 + 16; 2 x 3 positions x 16; a block
    # 4 x (256 + 16) + 2 x 16 x 64 + 64 + 16 + 4 x 16 = 3,280; last norm 32; pooler 272; classifier 3 x 16 + 3 = 51.
    count = 1120 + 784 + 96 + 2 * 3280 + 32 + 272 + 51
    state = load_file(unusual["stem and mean"][2] / "digits" / "model.safetensors")
    assert sum(value.numel() for value in state.values()) == count


def test_only_the_card_of_an_unusual_model_asks_for_ufo_ds(extracted, unusual):
    for task in CLASSES:
        assert "import ufo_ds.model.hub" in (unusual["mean"][2] / task / "README.md").read_text()
        assert "ufo_ds.model" not in (extracted / task / "README.md").read_text()
        assert json.loads((extracted / task / "config.json").read_text())["model_type"] == "vit"


@pytest.mark.parametrize("what", ["a filter of the stem by 1%", "another pool", "a pool that is none"])
def test_tampering_with_an_unusual_model_is_found_out(tmp_path, unusual, what):
    _, reader, directory = unusual["stem and mean"]
    copied = shutil.copytree(directory / "glyphs", tmp_path / "glyphs")
    if what == "a filter of the stem by 1%":
        state = load_file(copied / "model.safetensors")
        state["embeddings.patch_embeddings.stem.0.conv.weight"][0, 0] *= 1.01
        save_file(state, copied / "model.safetensors", {"format": "pt"})
    else:
        config = json.loads((copied / "config.json").read_text())
        config["pool"] = "cls" if what == "another pool" else "max"
        (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"^[^\n]* (differs from the supernet by|does not run:) [^\n]*$"):
        extraction.verify(reader, spec_of(reader, "glyphs"), copied, make_images())
    certificate = copied / "certificate.json"
    assert not certificate.exists() or json.loads(certificate.read_text())["passed"] is False
