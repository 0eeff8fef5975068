"""What an audit finds in shards, and evaluation without it."""

import dataclasses
import json

import numpy as np
import pytest

from tests import tiny
from tests.pictures import encode, resized, shard_set, texture
from tests.small_run import CLASSES, make_model, make_recipe, outputs_of, write_checkpoint
from ufo_ds import data_report, evaluate, recipe_file
from ufo_ds.data import audit_page
from ufo_ds.data.audit import Audit, audit, counts_of
from ufo_ds.data.evaluation_set import EvaluationSet
from ufo_ds.data.shards import ShardSet
from ufo_ds.errors import UserError, run
from ufo_ds.evaluation import classification, overlap, retrieval, verification
from ufo_ds.evaluation.features import open_images
from ufo_ds.recipe import only
from ufo_ds.recipe_benchmark import Benchmark
from ufo_ds.recipe_task import TrainSet


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Shards of tiny.py, with textures instead for one task: 2 of 8 classified images and some of its queries, gallery
    images and pairs were seen in training."""
    root = tmp_path_factory.mktemp("audit")
    tiny.make(root)
    generator = np.random.default_rng(0)
    train = [texture(generator) for _ in range(12)]
    test = [texture(generator) for _ in range(24)]
    shard_set(root / "train", [encode(i) for i in train], [f"id{n // 2}" for n in range(12)])
    fresh = [encode(i) for i in test]
    labels = [f"id{n % 6}" for n in range(8)]
    shard_set(root / "query", [encode(train[3]), *fresh[1:5], encode(train[0], "JPEG"), *fresh[6:8]], labels)
    shard_set(root / "gallery", [*fresh[8:15], encode(resized(train[7], 0.5, 0.5)), *fresh[15:19]],
              [f"id{n % 6}" for n in range(12)])  # fmt: skip
    shard_set(root / "classes", [encode(train[5]), *fresh[19:24], encode(train[5], "JPEG"), fresh[0]],
              [f"colour{n % 3}" for n in range(8)])  # fmt: skip
    (root / "audit.yaml").write_text(
        tiny.RECIPE.format(root=root)
        .replace(
            f"protocol: classification, shards: {root}/colours", f"protocol: classification, shards: {root}/classes"
        )
        .replace(f"query: {root}/stripes, gallery: {root}/stripes", f"query: {root}/query, gallery: {root}/gallery")
        .replace(f"train: [{{shards: {root}/stripes}}]", f"train: [{{shards: {root}/train}}]")
    )
    return root


@pytest.fixture(scope="module")
def found(root):
    return audit(recipe_file.load(str(root / "audit.yaml")))


def test_every_training_set_is_compared_with_every_benchmark(found, root):
    counts = {
        (train.task, test.benchmark, test.part): counts_of(pairs) for train, test, pairs in found.overlaps() if pairs
    }
    assert counts == {
        ("stripes", "colours/colours", "shards"): (1, 1),  # another task's test
        ("stripes", "stripes/stripes", "query"): (1, 1),
        ("stripes", "stripes/stripes", "gallery"): (0, 1),
    }
    assert len(list(found.overlaps())) == 2 * 4
    pairs = {(p.benchmark, p.part, p.index): (p.task, p.shards, p.train_index, p.kind) for p in found.pairs}
    train = ("stripes", f"{root}/train")
    assert pairs["stripes/stripes", "query", 0] == (*train, 3, "bytes")
    assert pairs["stripes/stripes", "gallery", 7] == (*train, 7, "near")
    assert len(pairs) == len(found.pairs) == 5


def test_audit_comes_back_from_its_file(found, tmp_path):
    (tmp_path / "audit.json").write_text(found.to_json())
    assert Audit.load(tmp_path / "audit.json") == found
    (tmp_path / "other.json").write_text('{"pairs": []}')
    with pytest.raises(UserError, match="is not an audit"):
        Audit.load(tmp_path / "other.json")
    with pytest.raises(UserError, match="No such file"):
        Audit.load(tmp_path / "none.json")


def test_page_shows_each_pair(found):
    page = audit_page.page(found)
    assert page.count("<figure>") == 5
    assert page.count("data:image/jpeg;base64,") == 10
    assert "http" not in page  # nothing is loaded from elsewhere


def test_metrics_without_overlap_are_those_of_the_subset(found, root, tmp_path):
    """Against the protocols applied by hand to what is left; pairs lose those with an image that was seen."""
    recipe = recipe_file.load(str(root / "audit.yaml"))
    pairs = EvaluationSet.open(root / "pairs").pairs
    seen = sorted({int(pairs[0, 1]), int(pairs[5, 2])})
    entry = next(p for p in found.pairs if p.benchmark == "colours/colours")
    planted = [
        dict(vars(entry), benchmark="stripes/stripe_pairs", part="shards", index=index, train_index=0) for index in seen
    ]
    values = json.loads(found.to_json())
    values["pairs"] += [{k: v for k, v in p.items() if not k.startswith("__")} for p in planted]
    (tmp_path / "audit.json").write_text(json.dumps(values))
    left_out = overlap.left_out(tmp_path / "audit.json", recipe, recipe)
    assert left_out == {
        "colours/colours": {f"{root}/classes": {0, 6}},
        "stripes/stripes": {f"{root}/query": {0, 5}, f"{root}/gallery": {7}},
        "stripes/stripe_pairs": {f"{root}/pairs": set(seen)},
    }

    images = open_images(recipe)
    generator = np.random.default_rng(0)
    outputs = {name: generator.normal(size=(len(of_task), 6)).astype(np.float32) for name, of_task in images.items()}
    predictions = {name: {"embedding": values, "logits": values[:, :3]} for name, values in outputs.items()}
    classes = {"colours": ["colour0", "colour1", "colour2"], "stripes": []}
    without = overlap.score_without(recipe, images, predictions, classes, left_out)

    keep = [1, 2, 3, 4, 5, 7]
    labels = np.array([n % 3 for n in keep])
    scores = outputs["colours"][keep, :3]
    assert without["colours/colours"].metrics() == classification.evaluate(scores, labels)
    rows = outputs["stripes"]
    query, gallery, of_pairs = rows[:8], rows[8:20], rows[20:]
    q, g = [1, 2, 3, 4, 6, 7], [n for n in range(12) if n != 7]
    unknown = np.full(12, -1)
    expected = retrieval.evaluate(query[q], np.array(q) % 6, unknown[q], gallery[g], np.array(g) % 6, unknown[g])
    assert without["stripes/stripes"].metrics() == expected
    left = np.array([pair for pair in pairs if pair[1] not in seen and pair[2] not in seen])
    assert 0 < len(left) < len(pairs)
    assert without["stripes/stripe_pairs"].metrics() == verification.evaluate(of_pairs, left)

    alone = only(recipe, ["colours"])  # trained without the other task, whose training set holds all that was found
    assert overlap.left_out(tmp_path / "audit.json", alone, alone) == {"colours/colours": {f"{root}/classes": set()}}


def test_too_few_left_and_nothing_left_out(root):
    recipe = only(recipe_file.load(str(root / "audit.yaml")), ["colours"])
    images = {"colours": open_images(recipe)["colours"]}
    scores = np.eye(8, 3, dtype=np.float32)
    predictions, classes = {"colours": {"logits": scores}}, {"colours": ["colour0", "colour1", "colour2"]}
    everything = {"colours/colours": {f"{root}/classes": set(range(8))}}
    without = overlap.score_without(recipe, images, predictions, classes, everything)
    assert without == {"colours/colours": None}
    metrics = {"colours/colours/top1": 0.375}
    assert (
        list(overlap.table(metrics, without, everything))[1].split(maxsplit=2)[2] == "too few left  (8 images left out)"
    )
    assert overlap.as_values(metrics, without, everything)["without_overlap"] == {"colours/colours/top1": None}
    nothing = {"colours/colours": {f"{root}/classes": set()}}
    assert overlap.score_without(recipe, images, predictions, classes, nothing) == {}
    assert list(overlap.table(metrics, {}, nothing))[1].split() == ["colours/colours/top1", "0.3750", "0.3750"]


def test_an_audit_of_other_data_is_refused(found, root, tmp_path):
    recipe = recipe_file.load(str(root / "audit.yaml"))
    (tmp_path / "audit.json").write_text(found.to_json())
    more = recipe_file.load(str(root / "audit.yaml"), [("tasks.stripes.train", f"[{{shards: {root}/pairs}}]")])
    with pytest.raises(UserError, match=r"lacks the training set .*/pairs"):
        overlap.left_out(tmp_path / "audit.json", more, recipe)
    other = recipe_file.load(
        str(root / "audit.yaml"),
        [("tasks.colours.benchmarks", f"[{{name: colours, protocol: classification, shards: {root}/colours}}]")],
    )
    with pytest.raises(UserError, match="is of another colours/colours"):
        overlap.left_out(tmp_path / "audit.json", recipe, other)
    named = recipe_file.load(
        str(root / "audit.yaml"),
        [("tasks.colours.benchmarks", f"[{{name: hues, protocol: classification, shards: {root}/classes}}]")],
    )
    with pytest.raises(UserError, match="lacks colours/hues"):
        overlap.left_out(tmp_path / "audit.json", recipe, named)


def test_command(root, tmp_path, capsys):
    arguments = [str(root / "audit.yaml"), "--audit", "--out", str(tmp_path / "new" / "folder")]
    assert run(data_report.main, arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[2:] for line in lines[1:4]] == [
        ["colours/colours", "8", "1", "1"],
        ["stripes/stripes", "query", "8", "1", "1"],
        ["stripes/stripes", "gallery", "12", "0", "1"],
    ]
    assert lines[-1] == "5 of 8 combinations of a training set with test images share none."
    assert run(data_report.main, [*arguments, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert sum(entry["exact"] for entry in values["overlaps"]) == 2
    assert sum(entry["near"] for entry in values["overlaps"]) == 3
    Audit.load(tmp_path / "new" / "folder" / "audit.json")
    assert (tmp_path / "new" / "folder" / "audit.html").is_file()


def test_evaluate_command(root, tmp_path, capsys):
    """A run of which 2 of 6 test images are among another task's training images: both columns, by its own top-1."""
    generator = np.random.default_rng(1)
    images = [encode(texture(generator)) for _ in range(6)]
    names = CLASSES["digits"] * 2
    shard_set(tmp_path / "test", images, names)
    shard_set(tmp_path / "of_digits", [encode(texture(generator)) for _ in range(3)], CLASSES["digits"])
    shard_set(tmp_path / "of_glyphs", [images[1], encode(texture(generator)), images[4]], CLASSES["glyphs"][:3])
    plain = make_recipe()
    digits, glyphs = plain.tasks
    benchmark = Benchmark(name="numbers", protocol="classification", shards=str(tmp_path / "test"))
    tasks = [
        dataclasses.replace(digits, train=[TrainSet(shards=str(tmp_path / "of_digits"))], benchmarks=[benchmark]),
        dataclasses.replace(glyphs, train=[TrainSet(shards=str(tmp_path / "of_glyphs"))]),
    ]
    recipe = dataclasses.replace(plain, tasks=tasks, data=dataclasses.replace(plain.data, workers=0))
    model = make_model(recipe)
    write_checkpoint(tmp_path / "run" / "checkpoints", model)
    (tmp_path / "run" / "recipe.yaml").write_text(recipe_file.to_yaml(recipe))
    out, run_dir = str(tmp_path / "out"), str(tmp_path / "run")
    assert run(data_report.main, [f"{run_dir}/recipe.yaml", "--audit", "--out", out]) == 0
    capsys.readouterr()

    data = ShardSet.open(tmp_path / "test")
    logits = outputs_of(model, "digits", [data.read(index) for index in range(6)]).logits.numpy()
    right = logits.argmax(axis=1) == [CLASSES["digits"].index(data.classes[label]) for label in data.labels]
    kept = [index for index in range(6) if data.read(index) not in (images[1], images[4])]
    assert run(evaluate.main, [run_dir, "--last", "--device", "cpu", "--audit", f"{out}/audit.json", "--json"]) == 0
    names = "digits/numbers/top1", "digits/numbers/mean_per_class"  # alike: two images of each class that is left
    assert json.loads(capsys.readouterr().out) == {
        "metrics": dict.fromkeys(names, right.mean()),
        "without_overlap": dict.fromkeys(names, right[kept].mean()),
        "left_out": {"digits/numbers": 2},
    }
    arguments = [run_dir, "--last", "--device", "cpu", "--audit", f"{out}/audit.json", "--pixels", "--task", "digits"]
    assert run(evaluate.main, arguments) == 0  # the other task's training set counts all the same
    assert capsys.readouterr().out.splitlines()[1].endswith("(2 images left out)")
