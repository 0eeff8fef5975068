"""An exported model is the model: its values and rank lists, in batches of any size, as a model for every verb. Its
certificate fails on what is not the same, and nothing else is opened."""

import io
import itertools
import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests import elastic_run
from tests.elastic_run import error_of, run_json
from tests.small_run import (
    CLASSES,
    encode,
    make_images,
    make_model,
    make_transparent_image,
    outputs_of,
    write_checkpoint,
)
from ufo_ds import evaluate, export, latency, predict
from ufo_ds.data.transforms import evaluation_transform
from ufo_ds.errors import UserError
from ufo_ds.model.heads import Outputs
from ufo_ds.model.loading import spec_of
from ufo_ds.subnets import agreement, extraction, onnx_export
from ufo_ds.subnets.certificate_images import with_one_to_resize
from ufo_ds.subnets.exporting import batches_of, export_int8, verify
from ufo_ds.subnets.exporting import export as write
from ufo_ds.subnets.quantization import layers
from ufo_ds.subnets.task_model import open_model

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

IMAGES = [*itertools.chain.from_iterable(make_images(seed) for seed in range(5)), make_transparent_image()]


@pytest.fixture(scope="module")
def elastic(tmp_path_factory):
    """A run with a stem, mean pooling and a neck before its linear head, its shards and a directory with a slice whose
    blocks are unequal."""
    root = elastic_run.write_shards(tmp_path_factory.mktemp("shards"))
    recipe = elastic_run.make_recipe(root, "stem")
    run = tmp_path_factory.mktemp("elastic")
    write_checkpoint(run / "checkpoints", make_model(recipe), licences={"digits": ["CC0"], "glyphs": ["MIT"]})
    reader = elastic_run.open_run(run)
    draws = (elastic_run.drawn(reader, "digits", "unequal", i) for i in range(50))
    spec = next(s for s in draws if len(set(s.architecture.heads)) > 1 and len(set(s.architecture.hidden)) > 1)
    extraction.extract(reader, spec, run / "slice")
    return run


@pytest.fixture(scope="module")
def sources(extracted, elastic):
    return {"digits": extracted / "digits", "glyphs": extracted / "glyphs", "slice": elastic / "slice"}


@pytest.fixture(scope="module")
def exported(tmp_path_factory, sources):
    """A stock classifier, a stock model with a margin head, and an unusual one: not to be changed."""
    directory = tmp_path_factory.mktemp("exported")
    for name, source in sources.items():
        write(open_model(source), (source / "spec.json").read_text(), directory / name)
    return directory


# --- the same ---------------------------------------------------------------------------------------------------------


def normalised(model, images):
    uint8 = torch.from_numpy(np.stack([evaluation_transform(image, model.input) for image in images]))
    mean, std = (torch.tensor(values)[:, None, None] for values in (model.recipe.data.mean, model.recipe.data.std))
    return uint8, ((uint8 / 255 - mean) / std).numpy()


@pytest.mark.parametrize("name", ["digits", "glyphs", "slice"])
def test_onnx_is_torch_in_batches_of_1_to_17(exported, sources, model, name):
    source = open_model(sources[name])
    uint8, pixels = normalised(source, IMAGES)
    wanted = outputs_of(model, name, IMAGES) if name in CLASSES else source.embed(uint8)
    session = onnxruntime.InferenceSession(exported / name / "model.onnx")
    names = ["embedding"] if name == "glyphs" else ["embedding", "logits"]
    assert [output.name for output in session.get_outputs()] == names
    for count in range(1, 18):
        found = session.run(names, {"pixel_values": pixels[:count]})
        for one, other in zip(found, wanted, strict=False):
            assert one.shape == other[:count].shape
            assert np.abs(one - other[:count].numpy()).max() <= 1e-5 * other.abs().max()


@pytest.mark.parametrize("name", ["digits", "glyphs", "slice"])
def test_an_export_is_certified_on_image_files(tmp_path, exported, sources, name):
    copied = shutil.copytree(exported / name, tmp_path / name)
    certificate = verify(open_model(sources[name]), copied, IMAGES)
    assert json.loads((copied / "certificate.json").read_text()) == certificate
    assert certificate["passed"] is True
    assert certificate["max_difference"] <= 1e-5
    assert certificate["rank_lists"] == 153 * (1 if name == "glyphs" else 2)
    assert certificate["fingerprint"] == open_model(sources[name]).fingerprint


@pytest.mark.parametrize("name", ["digits", "glyphs", "slice"])
def test_an_exported_directory_opens_as_a_model(exported, sources, name):
    source, opened = open_model(sources[name]), open_model(exported / name)
    assert (opened.task, opened.classes, opened.input) == (source.task, source.classes, source.input)
    assert opened.recipe == source.recipe
    uint8, _ = normalised(source, IMAGES)
    for flip in (False, True):
        for one, other in zip(opened.embed(uint8, flip), source.embed(uint8, flip), strict=True):
            assert one.shape == other.shape
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * float(other.abs().max()) if other.numel() else 0)
    assert (
        opened.fingerprint not in (source.fingerprint, open_model(exported / "digits").fingerprint) or name == "digits"
    )


def test_batches_are_of_all_sizes_and_have_all_images():
    for count in (1, 2, 16, 153, 154, 400):
        batches = batches_of(count)
        assert {len(batch) for batch in batches} == set(range(1, 18))
        assert {i for batch in batches for i in batch} == set(range(count))


def test_weights_beside_the_graph(tmp_path, monkeypatch, sources):
    monkeypatch.setattr(onnx_export, "WITHIN", 1000)
    source = open_model(sources["glyphs"])
    write(source, None, tmp_path / "out")
    assert (tmp_path / "out" / "model.onnx.data").stat().st_size > 10_000
    assert verify(source, tmp_path / "out", IMAGES)["passed"] is True
    first = open_model(tmp_path / "out").fingerprint
    data = bytearray((tmp_path / "out" / "model.onnx.data").read_bytes())
    data[1000] ^= 1
    (tmp_path / "out" / "model.onnx.data").write_bytes(data)
    assert open_model(tmp_path / "out").fingerprint != first


def test_int8_of_weights_beside_the_graph(tmp_path, monkeypatch, sources):
    monkeypatch.setattr(onnx_export, "WITHIN", 1000)
    source = open_model(sources["glyphs"])
    uint8, pixels = normalised(source, IMAGES)
    write(source, None, tmp_path / "out")
    export_int8(tmp_path / "out", torch.from_numpy(pixels))
    assert (tmp_path / "out" / "int8" / "model.onnx.data").is_file()
    found, wanted = open_model(tmp_path / "out" / "int8").embed(uint8), source.embed(uint8)
    assert torch.nn.functional.cosine_similarity(found.embedding, wanted.embedding).min() > 0.99


# --- not the same -----------------------------------------------------------------------------------------------------


def edit_processor(directory, **values):
    file = directory / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def normalise_twice_in_the_processor(directory):
    """((x - m) / s - m) / s is (x - m (1 + s)) / s^2."""
    stated = json.loads((directory / "preprocessor_config.json").read_text())
    pairs = list(zip(stated["image_mean"], stated["image_std"], strict=True))
    edit_processor(directory, image_mean=[m * (1 + s) for m, s in pairs], image_std=[s * s for _, s in pairs])


def normalise_again_in_the_graph(directory):
    graph = onnx.load(directory / "model.onnx")
    stated = json.loads((directory / "preprocessor_config.json").read_text())
    for name in ("image_mean", "image_std"):
        values = np.array(stated[name], dtype=np.float32)[:, None, None]
        graph.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    for node in graph.graph.node:
        node.input[:] = ["again" if name == "pixel_values" else name for name in node.input]
    graph.graph.node.insert(0, onnx.helper.make_node("Div", ["centred", "image_std"], ["again"]))
    graph.graph.node.insert(0, onnx.helper.make_node("Sub", ["pixel_values", "image_mean"], ["centred"]))
    onnx.save(graph, directory / "model.onnx")


def no_numbers(directory):
    edit_weight(directory, "pooler.dense.bias", lambda value: value * np.nan)


def edit_weight(directory, name, change):
    graph = onnx.load(directory / "model.onnx")
    (tensor,) = [tensor for tensor in graph.graph.initializer if tensor.name.endswith(name)]
    value = change(onnx.numpy_helper.to_array(tensor)).astype(np.float32)
    tensor.CopyFrom(onnx.numpy_helper.from_array(value, tensor.name))
    onnx.save(graph, directory / "model.onnx")


@pytest.mark.parametrize(
    "damage",
    [
        normalise_twice_in_the_processor,
        normalise_again_in_the_graph,
        lambda directory: edit_processor(directory, resample=3),
        lambda directory: edit_processor(directory, do_convert_rgb=False, do_rescale=False),
        lambda directory: edit_weight(directory, "pooler.dense.bias", lambda value: value + 1e-3 * abs(value).max()),
        no_numbers,
    ],
)
@pytest.mark.parametrize("of_input_size", [False, True])
def test_the_certificate_fails_on_another_model_or_preprocessing(tmp_path, exported, sources, damage, of_input_size):
    copied = shutil.copytree(exported / "glyphs", tmp_path / "glyphs")
    damage(copied)
    images = make_images()
    if of_input_size:  # which are not resized
        opened = [Image.open(io.BytesIO(image)).convert("RGB").resize((16, 24)) for image in images]
        images = with_one_to_resize([encode(image, "PNG") for image in opened], (24, 16))
    with pytest.raises(UserError, match=r"^[^\n]* (differs from [^\n]* by|does not run:) [^\n]*$"):
        verify(open_model(sources["glyphs"]), copied, images)
    certificate = copied / "certificate.json"
    assert not certificate.exists() or json.loads(certificate.read_text())["passed"] is False


def shift_by_which_images_change_places(source, images):
    """Of the embedding, by less than the tolerance of values: all its entries in the directions that bring two images
    nearest to changing places in the list of a third."""
    uint8, _ = normalised(source, images)
    plain = source.embed(uint8)
    step = 0.8 * agreement.TOLERANCE * float(plain.embedding.abs().max())
    exact = Outputs(source.network.double()(uint8).embedding.detach().double(), plain.logits.double())
    tie = agreement.compare(plain, range(len(uint8)), plain, exact).tie
    shift = torch.zeros(exact.embedding.shape[1], dtype=torch.float64, requires_grad=True)
    embedding = torch.nn.functional.normalize(exact.embedding + shift, dim=1)
    cosines = embedding @ embedding.T
    best = None
    for query in range(len(uint8)):
        order = cosines[query].argsort(descending=True).tolist()
        order.remove(query)
        for first, second in itertools.pairwise(order):
            gap = cosines[query, first] - cosines[query, second]
            if 1.5 * tie < gap.item() < 50 * tie:
                (slope,) = torch.autograd.grad(gap, shift, retain_graph=True)
                ratio = gap.item() / (step * slope.abs().sum().item())
                best = min(best or (ratio, slope), (ratio, slope), key=lambda pair: pair[0])
    assert best is not None
    assert best[0] < 0.7  # they change places
    return -step * best[1].sign().numpy()


@pytest.mark.parametrize("kind", ["exported", "extracted"])
def test_the_certificate_fails_on_another_rank_list_of_the_same_values(
    tmp_path, exported, extracted, reader, sources, kind
):
    images = list(itertools.chain.from_iterable(make_images(seed) for seed in range(15)))
    shift = shift_by_which_images_change_places(open_model(sources["glyphs"]), images)
    copied = shutil.copytree((exported if kind == "exported" else extracted) / "glyphs", tmp_path / "glyphs")
    if kind == "exported":
        edit_weight(copied, "pooler.dense.bias", lambda value: value + shift)
        certify = partial(verify, open_model(sources["glyphs"]), copied, images)
    else:
        state = load_file(copied / "model.safetensors")
        state["pooler.dense.bias"] += torch.from_numpy(shift)
        save_file(state, copied / "model.safetensors", {"format": "pt"})
        certify = partial(extraction.verify, reader, spec_of(reader, "glyphs"), copied, images)
    with pytest.raises(UserError, match=r"differs from .* by another rank list"):
        certify()
    certificate = json.loads((copied / "certificate.json").read_text())
    assert certificate["max_difference"] <= 1e-5
    assert certificate["rank_inversion"] > 1
    assert certificate["passed"] is False


# --- int8 and the verbs -----------------------------------------------------------------------------------------------


def test_int8_is_measured_and_the_verbs_take_both(tmp_path, elastic, capsys):
    out = tmp_path / "out"
    made = run_json(capsys, export, elastic / "slice", "--out", out, "--int8")
    assert made["max_difference"] <= 1e-5
    found = json.loads((out / "int8" / "quantization.json").read_text())
    assert made["int8"] == found
    assert found["images"] == 31  # of 12 and 20 one is unreadable
    assert found["layers"] == len(layers(onnx.load(out / "model.onnx").graph))
    source = run_json(capsys, evaluate, elastic / "slice")
    assert source == pytest.approx(found["before"])
    assert run_json(capsys, evaluate, out) == pytest.approx(source)
    assert run_json(capsys, evaluate, out / "int8") == pytest.approx(found["after"])
    assert open_model(out).fingerprint != open_model(out / "int8").fingerprint
    (tmp_path / "a.png").write_bytes(make_images()[0])
    probabilities = [
        {c["class"]: c["probability"] for c in run_json(capsys, predict, path, tmp_path / "a.png")["classes"]}
        for path in (elastic / "slice", out, out / "int8")
    ]
    assert probabilities[1] == pytest.approx(probabilities[0], abs=1e-5)
    assert probabilities[2] == pytest.approx(probabilities[0], abs=0.2)
    assert probabilities[2] != pytest.approx(probabilities[0], abs=1e-7)
    assert run_json(capsys, latency, out)["ms"] > 0
    card, of_int8 = ((directory / "README.md").read_text() for directory in (out, out / "int8"))
    assert "| digits | CC0 |" in card
    for name, value in found["after"].items():
        assert f"| {name} | {found['before'][name]:.4f} | {value:.4f} |" in card
        assert f"| {name} | {found['before'][name]:.4f} | {value:.4f} |" in of_int8
    assert "Rounded to int8" in of_int8


def test_weights_come_out_in_int8_but_for_the_last_layers(tmp_path, elastic, exported):
    copied = shutil.copytree(exported / "slice", tmp_path / "slice")
    source = open_model(elastic / "slice")
    uint8, pixels = normalised(source, IMAGES)
    export_int8(copied, torch.from_numpy(pixels))
    state = source.network.backbone.state_dict()
    matrices = [name for name, value in state.items() if value.ndim > 1 and "position" not in name]
    graph = onnx.load(copied / "int8" / "model.onnx").graph
    int8 = [t for t in graph.initializer if t.data_type == onnx.TensorProto.INT8 and len(t.dims) > 1]
    assert sorted(int(np.prod(t.dims)) for t in int8) == sorted(
        state[name].numel() for name in matrices if "pooler" not in name
    )
    found, wanted = open_model(copied / "int8").embed(uint8), source.embed(uint8)
    cosines = torch.nn.functional.cosine_similarity(found.embedding, wanted.embedding)
    assert cosines.min() > 0.99
    assert not torch.equal(found.embedding, wanted.embedding)


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_bad_input_is_one_line(tmp_path, elastic, exported, capsys, monkeypatch):
    out, source = tmp_path / "out", elastic / "slice"
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.png").write_text("no image")
    for arguments, message in [
        ((source, "--out", tmp_path), "exists: choose another"),
        ((tmp_path / "nothing", "--out", out), "neither a model nor"),
        ((elastic, "--out", out), "has the tasks digits, glyphs: choose one with --task"),
        ((elastic, "--task", "letters", "--out", out), "no task 'letters'"),
        ((source, "--task", "glyphs", "--out", out), "is a model of task 'digits'"),
        ((source, "--out", out, "--int8", "--calibration", tmp_path / "empty"), "holds no image"),
        ((source, "--out", out, "--calibration", tmp_path / "empty"), "is for --int8"),
        ((source, "--out", out, "--images", tmp_path / "text.png"), "text.png cannot be read"),
        ((source, "--out", out, "--images", tmp_path / "none.png"), "none.png cannot be read"),
        ((source, "--out", out, "--images", "a.png", "--no-verify"), "leave one of them out"),
        ((exported / "digits", "--out", out), "is exported already"),
    ]:
        assert message in error_of(capsys, export, *arguments)
        assert not out.exists()
    assert "is for ONNX Runtime" in error_of(capsys, latency, exported / "digits", "--backend", "torch")
    monkeypatch.setattr(onnx_export, "find_spec", lambda name: None if name == "onnxscript" else object())
    assert "needs onnxscript: pip install 'ufo_ds[onnx]'" in error_of(capsys, export, source, "--out", out)
    assert "needs onnxscript: pip install" in error_of(capsys, evaluate, exported / "digits")


def test_without_images_it_says_how_to_do_without(tmp_path, extracted, capsys):
    """The recipe of these has neither benchmarks nor train sets."""
    arguments = extracted / "digits", "--out", tmp_path / "out"
    assert "give --images" in error_of(capsys, export, *arguments)
    assert "no train set is not here" in error_of(capsys, export, *arguments, "--no-verify", "--int8")
    assert "max_difference" not in run_json(capsys, export, *arguments, "--no-verify")
    assert "Not certified" in (tmp_path / "out" / "README.md").read_text()
    assert not (tmp_path / "out" / "certificate.json").exists()


def from_elsewhere(location):
    def damage(directory):
        graph = onnx.load(directory / "model.onnx")
        tensor = max(graph.graph.initializer, key=lambda t: len(t.raw_data))
        Path(directory / "model.onnx").unlink()
        (directory.parent / "secret").write_bytes(tensor.raw_data)
        onnx.external_data_helper.set_external_data(tensor, location.format(directory.parent))
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        (directory / "model.onnx").write_bytes(graph.SerializeToString())

    return damage


def cut(directory):
    file = directory / "model.onnx"
    file.write_bytes(file.read_bytes()[:5000])


def rename_output(directory):
    graph = onnx.load(directory / "model.onnx")
    for node in graph.graph.node:
        node.output[:] = ["scores" if name == "logits" else name for name in node.output]
    graph.graph.output[1].name = "scores"
    onnx.save(graph, directory / "model.onnx")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (from_elsewhere("../secret"), r"takes weights from '../secret'"),
        (from_elsewhere("{}/secret"), r"takes weights from '/[^']*secret'"),
        (from_elsewhere("missing"), r"takes weights from 'missing'"),
        (cut, "does not load"),
        (lambda directory: (directory / "model.onnx").write_text("import os"), "does not load"),
        (lambda directory: (directory / "model.onnx").write_bytes(b""), "does not load|has "),
        (rename_output, r"has .*scores.* a model of digits has .*logits tensor\(float\) \[B, 3\]"),
        (
            lambda directory: (directory / "classes.json").write_text('["zero", "one"]'),
            r"logits tensor\(float\) \[B, 2\]",
        ),
        (lambda directory: (directory / "classes.json").unlink(), "classes.json is missing"),
        (lambda directory: (directory / "classes.json").write_text("{"), "classes.json is missing or no list"),
        (lambda directory: (directory / "recipe.yaml").unlink(), "has no recipe.yaml"),
        (lambda directory: edit_processor(directory, resample=3), "preprocessor_config.json: resample is 3"),
        (lambda directory: edit_processor(directory, size={"height": 8, "width": 8}), "preprocessor_config.json: size"),
    ],
)
def test_a_damaged_export_is_refused(tmp_path, exported, damage, message):
    copied = shutil.copytree(exported / "digits", tmp_path / "digits")
    damage(copied)
    with pytest.raises(UserError, match=rf"^[^\n]*{message}[^\n]*$"):
        open_model(copied)
