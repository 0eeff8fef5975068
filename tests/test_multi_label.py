"""Attributes from a CSV to a model in use: labels as sets, a real training, its evaluation, extraction and answers."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

from tests.distributed.test_training import train
from ufo_ds import data_report, evaluate, extract, predict, recipe_file, report
from ufo_ds.data import attributes
from ufo_ds.data.evaluation_set import EvaluationSet
from ufo_ds.data.layouts import read_csv
from ufo_ds.data.shard_writer import write
from ufo_ds.data.source import TrainSource
from ufo_ds.errors import UserError, run
from ufo_ds.evaluation import benchmarks, pixels

NAMES = ["red", "upright", "wide"]

RECIPE = """
name: stripes
model: {{backbone: {{dim: 32, depth: 2, heads: 2, patch_size: 4, mlp_ratio: 2}}, experts: []}}
tasks:
  - name: stripes
    head: {{type: linear}}
    loss: {{binary_cross_entropy: {{}}}}
    input: [16, 16]
    samples_per_step: 32
    augment: {{mixup: {{probability: 0.1}}}}
    train: [{{shards: {root}/train}}]
    benchmarks: [{{name: test, protocol: attributes, shards: {root}/test}}]
optimizer: {{type: adamw, lr: 0.002, gradient_clipping: 1.0}}
schedule: {{steps: 110, warmup_steps: 10}}
evaluation: {{every: 110, best: stripes/test/mA}}
checkpoint: {{every: 110}}
logging: {{tensorboard: false}}
data: {{workers: 0}}
"""


def stripes(names: set[str], random: np.random.Generator) -> Image.Image:
    """Noisy stripes, red or blue, upright or level, wide or narrow."""
    wave = np.sin(np.arange(16) * (0.6 if "wide" in names else 1.8) + random.uniform(0, 6))
    pixels = np.zeros((16, 16, 3))
    pixels[..., 0 if "red" in names else 2] = 128 + 90 * wave
    if "upright" not in names:
        pixels = pixels.transpose(1, 0, 2)
    return Image.fromarray((pixels + random.integers(0, 37, pixels.shape)).astype(np.uint8))


def make_shards(root: Path, part: str, count: int, seed: int) -> list[set[str]]:
    """Shards of stripes, in equal numbers of each set of attributes; the sets, image by image."""
    random = np.random.default_rng(seed)
    folder = root / f"{part}-images"
    folder.mkdir(parents=True)
    found, rows = [], ["path,class"]
    for n in range(count):
        names = {name for i, name in enumerate(NAMES) if n >> i & 1}
        stripes(names, random).save(folder / f"{n}.png")
        rows.append(f"{n}.png,{'+'.join(random.permutation(sorted(names))) or '+'}")
        found.append(names)
    (folder / "list.csv").write_text("\n".join(rows) + "\n")
    write(read_csv(folder / "list.csv"), root / part, source="test", licence="CC0-1.0")
    return found


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("stripes")
    make_shards(root, "train", 320, seed=0)
    make_shards(root, "test", 80, seed=1)
    (root / "stripes.yaml").write_text(RECIPE.format(root=root))
    return root


@pytest.fixture
def task(root):
    return recipe_file.load(str(root / "stripes.yaml")).tasks[0]


# --- labels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("label", "names"),
    [
        ("a+b", {"a", "b"}),
        ("b+a+b", {"a", "b"}),
        ("a", {"a"}),
        ("+", set()),
        ("+a+", {"a"}),
        (" a + b c ", {"a", "b c"}),
    ],
)
def test_labels_by_hand(label, names):
    assert attributes.names_in(label) == names


@given(
    st.integers(1, attributes.MOST).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.sets(st.integers(0, n - 1)))))
)
def test_bits_are_sets(drawn):
    count, sets = drawn
    names = [f"name {i}" for i in range(count)]
    labels = [attributes.joined(names[i] for i in of_image) for of_image in sets]
    bits = attributes.to_bits(labels, names)
    assert bits.dtype == np.int64
    assert (bits >= 0).all()
    has_NA = attributes.from_bits(bits, count)
    assert has_NA.shape == (len(sets), count)
    assert [set(np.flatnonzero(has_A)) for has_A in has_NA] == sets


# --- training data ----------------------------------------------------------------------------------------------------


def test_a_source_gives_the_attributes_of_each_image(tmp_path, task):
    """Two sets, of which one lacks an attribute."""
    sets = make_shards(tmp_path / "a", "train", 16, seed=3) + make_shards(tmp_path / "b", "train", 4, seed=4)
    train = [dataclasses.replace(task.train[0], shards=str(tmp_path / name / "train")) for name in "ab"]
    source = TrainSource.open(dataclasses.replace(task, train=train, augment=type(task.augment)()), seed=0)
    assert (source.classes, source.num_classes, len(source)) == (NAMES, 3, 20)
    assert source.labels.dtype == np.int64
    assert [attributes.names_in(source.name_of(label)) for label in source.labels] == sets
    for draw in range(40):
        image, label, _ = source.load(draw)
        index = source.index(draw)
        assert attributes.names_in(source.name_of(label)) == sets[index]
        np.testing.assert_array_equal(image, source.pixels(index))


def test_images_with_all_of_63_attributes_have_replacements(tmp_path, task):
    """The largest label that there is; its neighbour by number would not fit int64."""
    everything = attributes.joined(f"a{i:02d}" for i in range(63))
    Image.new("RGB", (16, 16)).save(tmp_path / "i.png")
    rows = ["path,class", *(f"i.png,{label}" for label in (everything, "a00", everything))]
    (tmp_path / "list.csv").write_text("\n".join(rows) + "\n")
    write(read_csv(tmp_path / "list.csv"), tmp_path / "shards", source="test")
    train = [dataclasses.replace(task.train[0], shards=str(tmp_path / "shards"))]
    source = TrainSource.open(dataclasses.replace(task, train=train, samples_per_step=2), seed=0)
    assert source.labels.tolist() == [2**63 - 1, 1, 2**63 - 1]
    assert source.name_of(2**63 - 1) == everything
    assert list(source._candidates(0)) == [0, 2, 1]


@pytest.mark.parametrize(
    ("labels", "changes", "words"),
    [
        (["+".join(f"a{i}" for i in range(64))], {}, "64 attributes"),
        (["+", "++"], {}, "0 attributes"),
        (["hat", "bag+hat"], {"num_classes": 3}, "2 attributes, but num_classes is 3"),
    ],
)
def test_attributes_that_cannot_be_trained(tmp_path, task, labels, changes, words):
    Image.new("RGB", (16, 16)).save(tmp_path / "i.png")
    (tmp_path / "list.csv").write_text("\n".join(["path,class", *(f"i.png,{label}" for label in labels)]) + "\n")
    write(read_csv(tmp_path / "list.csv"), tmp_path / "shards", source="test")
    train = [dataclasses.replace(task.train[0], shards=str(tmp_path / "shards"))]
    with pytest.raises(UserError, match=words) as caught:
        TrainSource.open(dataclasses.replace(task, train=train, **changes), seed=0)
    assert "\n" not in str(caught.value)


def test_figures_count_attributes(root, tmp_path, capsys):
    """And the picture names them."""
    assert run(data_report.main, [str(root / "stripes.yaml"), "--json", "--out", str(tmp_path)]) == 0
    values = json.loads(capsys.readouterr().out)
    assert (values["tasks"][0]["samples"], values["tasks"][0]["classes"]) == (320, 3)
    assert (values["benchmarks"][0]["samples"], values["benchmarks"][0]["ids"]) == (80, 3)
    assert Image.open(values["picture"]).size[0] > 1000


# --- evaluation -------------------------------------------------------------------------------------------------------


def test_targets_are_in_the_heads_order(tmp_path):
    sets = make_shards(tmp_path, "test", 8, seed=0)
    names = ["upright", "other", "red", "wide"]
    found = benchmarks.attribute_targets(EvaluationSet.open(tmp_path / "test"), names, "test")
    assert found.tolist() == [[name in of_image for name in names] for of_image in sets]


def test_an_attribute_that_the_head_lacks_is_named(tmp_path):
    make_shards(tmp_path, "test", 8, seed=0)
    with pytest.raises(UserError, match=r"benchmark test: attribute 'wide' of label '.*' is not among the 2"):
        benchmarks.attribute_targets(EvaluationSet.open(tmp_path / "test"), ["red", "upright"], "test")


@pytest.mark.parametrize(
    ("loss", "protocol", "wanted"),
    [
        ("{binary_cross_entropy: {}}", "classification", "attributes"),
        ("{cross_entropy: {}}", "attributes", "classification"),
    ],
)
def test_protocol_and_loss_must_go_together(root, loss, protocol, wanted):
    one = f"[{{name: test, protocol: {protocol}, shards: {root}/test}}]"
    recipe = recipe_file.load(
        str(root / "stripes.yaml"), [("tasks.stripes.loss", loss), ("tasks.stripes.benchmarks", one)]
    )
    with pytest.raises(UserError, match=f"stripes/test: protocol {protocol} .* use {wanted}"):
        benchmarks.check(recipe, {}, {"stripes": NAMES})


def test_the_nearest_image_has_the_attributes_that_score_above_zero():
    random = np.random.default_rng(0)
    query, train = random.normal(size=(30, 5)).astype(np.float32), random.normal(size=(20, 5)).astype(np.float32)
    targets = random.random((20, 4)) < 0.4
    targets[0] = True
    targets[:, 3] = True
    found = pixels.nearest_neighbour_attributes(query, train, targets)
    unit = train / np.linalg.norm(train, axis=1, keepdims=True)
    nearest = np.argmax(query @ unit.T, axis=1)
    assert ((found > 0) == targets[nearest]).all()


# --- from a recipe to a model in use ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(root) -> Path:
    train(1, root / "stripes.yaml", root / "run")
    return root / "run"


@pytest.fixture(scope="module")
def model(trained) -> Path:
    assert run(extract.main, [str(trained), "--task", "stripes", "--out", str(trained / "vit"), "--verify"]) == 0
    return trained / "vit"


def metrics_of(capsys, *arguments: str) -> dict[str, float]:
    capsys.readouterr()
    assert run(evaluate.main, [*arguments, "--device", "cpu", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_training_learns_attributes(trained, model, capsys):
    """Nearly all of what a fair coin gets half of; the model cut out of it the same."""
    found = metrics_of(capsys, str(trained))
    assert set(found) == {f"stripes/test/{name}" for name in ("mA", "accuracy", "precision", "recall", "f1", "mAP")}
    assert found["stripes/test/mA"] > 0.9
    assert found["stripes/test/f1"] > 0.85
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    (logged,) = [line for line in lines if line["kind"] == "evaluation"]
    assert {name: logged[name] for name in found} == found
    losses = [line["stripes/binary_cross_entropy"] for line in lines if line["kind"] == "train"]
    assert losses[-1] < 0.7 * losses[0]
    assert metrics_of(capsys, str(model)) == pytest.approx(found)


def test_the_floor_is_above_a_coin(trained, capsys):
    assert 0.5 < metrics_of(capsys, str(trained), "--pixels")["stripes/test/mA"] < 1


def test_the_extracted_model_knows_its_attributes(model):
    config = json.loads((model / "config.json").read_text())
    assert config["problem_type"] == "multi_label_classification"
    assert config["id2label"] == {"0": "red", "1": "upright", "2": "wide"}
    assert "(**inputs).logits.sigmoid()" in (model / "README.md").read_text()
    assert json.loads((model / "certificate.json").read_text())["passed"] is True


@pytest.mark.parametrize("names", [{"red", "upright", "wide"}, {"upright"}, set()])
def test_predictions_are_sigmoids_of_the_stock_model(names, model, tmp_path, capsys):
    file = tmp_path / "a.png"
    stripes(names, np.random.default_rng(5)).save(file)
    inputs = AutoImageProcessor.from_pretrained(model)(Image.open(file), return_tensors="pt")
    with torch.no_grad():
        wanted = AutoModelForImageClassification.from_pretrained(model)(**inputs).logits[0].sigmoid()
    capsys.readouterr()
    for top in (1, 5):
        assert run(predict.main, [str(model), str(file), "--json", "--top", str(top), "--device", "cpu"]) == 0
        found = json.loads(capsys.readouterr().out)["attributes"]
        assert len(found) == min(3, max(top, int((wanted > 0.5).sum())))
        order = wanted.argsort(descending=True)[: len(found)]
        assert [entry["attribute"] for entry in found] == [NAMES[i] for i in order]
        np.testing.assert_allclose([entry["probability"] for entry in found], wanted[order], atol=1e-5)
    assert run(predict.main, [str(model), str(file), "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{file}, stripes:"
    assert [line.split()[0] for line in lines[1:]] == [entry["attribute"] for entry in found]


def test_the_report_shows_each_attribute(trained, tmp_path, capsys):
    assert run(report.main, [str(trained), "--out", str(tmp_path / "r.html"), "--json"]) == 0
    (values,) = json.loads(capsys.readouterr().out)["benchmarks"].values()
    found = values["runs"][0]["attributes"]
    assert [(entry["attribute"], entry["positive"], entry["negative"]) for entry in found] == [
        (name, 40, 40) for name in NAMES
    ]
    right = np.mean([entry[f"right_of_{kind}"] for entry in found for kind in ("positive", "negative")])
    assert right == pytest.approx(values["runs"][0]["metrics"]["mA"])
