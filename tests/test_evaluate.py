"""`ufo evaluate`: every protocol gets the embeddings and names of its shards, of a run as of an extracted model."""

import dataclasses
import io
import json
import math

import numpy as np
import pytest
import yaml
from PIL import Image, ImageOps

from tests.pictures import Bytes, encode, texture
from tests.small_run import make_model, make_recipe, outputs_of, write_checkpoint
from ufo_ds import evaluate, extract, predict, recipe_file
from ufo_ds.data.layouts import Layout, Pair, Sample, Templates
from ufo_ds.data.shard_writer import write
from ufo_ds.data.shards import ShardSet
from ufo_ds.errors import UserError
from ufo_ds.errors import run as entry
from ufo_ds.evaluation import (
    identification,
    one_shot,
    query_expansion,
    random_gallery,
    recall,
    reranking,
    retrieval,
    templates,
    verification,
)

# Two images of each identity for queries, three for the gallery, where there is junk too; and pairs of queries.
IDENTITIES, QUERIES, GALLERY = 12, 2, 3


def samples(generator, per_identity, cameras=2, first_camera=0):
    found = []
    for identity in range(IDENTITIES):
        base = np.asarray(texture(np.random.default_rng(identity)), dtype=float)
        for n in range(per_identity):
            noisy = base + generator.normal(0, 60, base.shape)
            image = texture(generator).copy()
            image.frombytes(noisy.clip(0, 255).astype(np.uint8).tobytes())
            camera = f"c{first_camera + n % cameras}" if cameras else None
            found.append(Sample(Bytes(encode(image)), f"id{identity:02d}", camera))
    return found


BENCHMARKS = """
- {name: people, protocol: retrieval, query: $/query, gallery: $/gallery}
- {name: flipped, protocol: retrieval, query: $/query, gallery: $/gallery, flip: true}
- {name: expanded, protocol: retrieval, query: $/query, gallery: $/gallery, query_expansion: {k: 2, alpha: 1}}
- {name: reranked, protocol: retrieval, query: $/query, gallery: $/gallery, rerank: {k1: 4, k2: 2, weight: 0.4}}
- {name: products, protocol: recall, shards: $/query, at: [1, 3]}
- {name: shop, protocol: recall, query: $/query, gallery: $/gallery, at: [2]}
- {name: cars, protocol: random_gallery, shards: $/gallery, draws: 4}
- {name: letters, protocol: one_shot, shards: $/query, ways: 3, episodes: 40}
- {name: watchlist, protocol: identification, query: $/query, gallery: $/gallery}
- {name: twins, protocol: verification, shards: $/pairs}
- {name: sets, protocol: templates, shards: $/templates}
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("evaluate")
    generator = np.random.default_rng(0)
    query, gallery = samples(generator, QUERIES), samples(generator, GALLERY, first_camera=1)
    gallery.insert(4, Sample(Bytes(encode(texture(generator))), "-1", "c0"))
    count = len(query)
    chosen = generator.permutation(count * count)[:120]
    chosen = [(i // count, i % count) for i in chosen if i // count != i % count]
    chosen += [(2 * i, 2 * i + 1) for i in range(IDENTITIES)] * 2
    pairs = [Pair(n % 3, a, b, query[a].label == query[b].label) for n, (a, b) in enumerate(chosen)]
    sets = Templates(
        template=np.arange(count) // 2 * 2 + generator.integers(0, 2, count) // 2 + np.arange(count) % 2,
        media=generator.integers(0, 2, count),
        score=generator.random(count).astype(np.float32),
        pairs=np.array([[a, b, a // 2 == b // 2] for a in range(count) for b in range(a)]),
    )
    write(Layout(query), root / "query", source="test", licence="none")
    write(Layout(gallery), root / "gallery", source="test", licence="none")
    write(Layout(query, pairs=pairs), root / "pairs", source="test", licence="none")
    write(Layout(query, templates=sets), root / "templates", source="test", licence="none")
    plain = make_recipe()
    values = recipe_file.dump(plain)
    values["data"]["workers"] = 0
    values["tasks"][1]["benchmarks"] = yaml.safe_load(BENCHMARKS.replace("$", str(root)))
    recipe = recipe_file.parse(values, "test")
    write_checkpoint(root / "run" / "checkpoints", make_model(recipe))
    (root / "run" / "recipe.yaml").write_text(recipe_file.to_yaml(recipe))
    extract.main([str(root / "run"), "--task", "glyphs", "--out", str(root / "model")])
    return root


@pytest.fixture(scope="module")
def model(root):
    return make_model(recipe_file.load(str(root / "run" / "recipe.yaml")))


def found_by(capsys, *arguments):
    capsys.readouterr()
    assert entry(evaluate.main, [*map(str, arguments), "--device", "cpu", "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def error_of(capsys, *arguments):
    capsys.readouterr()
    assert entry(evaluate.main, [*map(str, arguments), "--device", "cpu"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    return error


def embedded(model, root, name, mirrored=False):
    """Embeddings, identities and cameras of shards, these numbered by their names: id3 is 3, c1 is 1, -1 is junk."""
    shards = ShardSet.open(root / name)
    files = [shards.read(i) for i in range(len(shards))]
    features = outputs_of(model, "glyphs", files).embedding
    if mirrored:
        height, width = next(task.input for task in model.recipe.tasks if task.name == "glyphs")
        turned = [
            ImageOps.mirror(
                Image.open(io.BytesIO(file)).convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
            )
            for file in files
        ]
        features = (features + outputs_of(model, "glyphs", [encode(image) for image in turned]).embedding) / 2
    names = [shards.classes[label] for label in shards.labels]
    ids = np.array([int(name.removeprefix("id")) for name in names])
    cameras = np.array([int(shards.cameras[camera][1:]) for camera in shards.camera_ids])
    return features.numpy(), ids, cameras


def test_every_protocol_gets_its_arrays(root, model, capsys):
    query, gallery = embedded(model, root, "query"), embedded(model, root, "gallery")
    kept = gallery[1] != -1
    people = [array[kept] for array in gallery]
    blocks = list(reranking.similarities(query[0], people[0], 4, 2, 0.4))
    wanted = {
        "people": retrieval.evaluate(*query, *gallery),
        "flipped": retrieval.evaluate(*embedded(model, root, "query", True), *embedded(model, root, "gallery", True)),
        "expanded": retrieval.evaluate(query_expansion.expand(query[0], people[0], 2, 1), *query[1:], *people),
        "reranked": retrieval.evaluate(*query, *people, blocks),
        "products": recall.evaluate(*query[:2], at=(1, 3)),
        "shop": recall.evaluate(*query[:2], *gallery[:2], at=(2,)),
        "cars": random_gallery.evaluate(*gallery[:2], draws=4),
        "letters": one_shot.evaluate(*query[:2], ways=3, episodes=40),
        "watchlist": identification.evaluate(*query[:2], *gallery[:2]),
        "twins": verification.evaluate(query[0], ShardSet.open(root / "pairs").pairs),
        "sets": templates.evaluate(query[0], ShardSet.open(root / "templates").templates),
    }
    found = found_by(capsys, root / "run")
    expected = {f"glyphs/{name}/{metric}": v for name, metrics in wanted.items() for metric, v in metrics.items()}
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, abs=1e-6), key
    plain = {key.rsplit("/", 1)[1]: value for key, value in found.items() if "/people/" in key}
    assert 0.2 < plain["mAP"] < 0.999  # not so easy that nothing could change it
    assert len({found[f"glyphs/{name}/mAP"] for name in ("people", "flipped", "expanded", "reranked")}) == 4
    kept_there = json.loads((root / "run" / "evaluations" / "step-00000010" / "metrics.json").read_text())
    assert kept_there == found


def test_an_extracted_model_is_evaluated_like_its_run(root, capsys):
    found = found_by(capsys, root / "model")
    assert found == pytest.approx(found_by(capsys, root / "run"), abs=1e-6)
    assert json.loads((root / "model" / "evaluations" / "metrics.json").read_text()) == found


def test_benchmarks_of_another_recipe_and_some_of_them(root, tmp_path, capsys):
    other = recipe_file.dump(recipe_file.load(str(root / "run" / "recipe.yaml")))
    other["tasks"][1]["benchmarks"] = [b | {"name": f"new_{b['name']}"} for b in other["tasks"][1]["benchmarks"][:2]]
    (tmp_path / "other.yaml").write_text(recipe_file.to_yaml(recipe_file.parse(other, "test")))
    found = found_by(capsys, root / "model", "--recipe", tmp_path / "other.yaml")
    of_run = found_by(capsys, root / "run", "--benchmark", "people", "--benchmark", "flipped")
    assert found == pytest.approx({key.replace("glyphs/", "glyphs/new_"): v for key, v in of_run.items()}, abs=1e-6)
    error = error_of(capsys, root / "model", "--benchmark", "cats")
    assert "'cats' is not there: choose of people, flipped" in error
    other["tasks"] = [task for task in other["tasks"] if task["name"] == "digits"]
    (tmp_path / "digits.yaml").write_text(recipe_file.to_yaml(recipe_file.parse(other, "test")))
    assert "none in common" in error_of(capsys, root / "model", "--recipe", tmp_path / "digits.yaml")


def test_a_threshold_is_kept_with_the_model_and_used(root, tmp_path, capsys):
    found = found_by(capsys, root / "model", "--benchmark", "people", "--far", "0.3")
    (calibration,) = found["calibration"]
    assert json.loads((root / "model" / "calibration.json").read_text()) == calibration
    (threshold,) = calibration["thresholds"]
    assert threshold["far_interval"][0] < threshold["expected_far"] <= 0.3 < threshold["far_interval"][1]
    assert threshold["impostors"] == (IDENTITIES * QUERIES) * ((IDENTITIES - 1) * GALLERY)
    shards = ShardSet.open(root / "query")
    for i in range(2):
        (tmp_path / f"{i}.png").write_bytes(shards.read(i))
    predict.main([str(root / "model"), *(str(tmp_path / f"{i}.png") for i in range(2)), "--json"])
    said = json.loads(capsys.readouterr().out)
    assert said["same"] == (said["cosine"] >= threshold["threshold"])
    slope, intercept = calibration["probability"]["slope"], calibration["probability"]["intercept"]
    assert said["probability"] == pytest.approx(1 / (1 + math.exp(-(slope * said["cosine"] + intercept))))


def test_a_rate_that_the_pairs_cannot_tell_is_refused_after_the_metrics(root, capsys):
    arguments = [str(root / "model"), "--benchmark", "people", "--far", "0.001", "--device", "cpu"]
    assert entry(evaluate.main, arguments) == 2
    said = capsys.readouterr()
    assert "mAP" in said.out
    assert "0.001 needs 10000 impostor pairs" in said.err
    assert "between 0 and 1" in error_of(capsys, root / "model", "--far", "2")


@pytest.fixture
def shop(root, tmp_path):
    """A run with one benchmark, whose shards are to be made."""
    recipe = recipe_file.load(str(root / "run" / "recipe.yaml"))
    benchmark = {"name": "b", "protocol": "retrieval", "query": f"{tmp_path}/q", "gallery": f"{tmp_path}/g"}

    def make(query, gallery, protocol="retrieval", change=None):
        write(Layout(query), tmp_path / "q", source="test", licence="none")
        write(Layout(gallery), tmp_path / "g", source="test", licence="none")
        values = recipe_file.dump(recipe)
        values["tasks"][1]["benchmarks"] = [benchmark | {"protocol": protocol}]
        loaded = recipe_file.parse(values, "test")
        model = make_model(loaded)
        if change is not None:
            change(model)
        write_checkpoint(tmp_path / "run" / "checkpoints", model)
        return tmp_path / "run"

    return make


def test_one_camera_alone_leaves_no_match(shop, capsys):
    generator = np.random.default_rng(1)
    run = shop(samples(generator, 2, cameras=1), samples(generator, 2, cameras=1))
    error = error_of(capsys, run)
    assert "benchmark glyphs/b: retrieval: none of the 24 queries has a match among the 24 gallery images" in error
    assert "different cameras" in error


def test_queries_without_any_match_are_counted(shop, capsys):
    generator = np.random.default_rng(1)
    run = shop(samples(generator, 2), [s for s in samples(generator, 2) if s.label not in ("id00", "id03")])
    assert entry(evaluate.main, [str(run), "--device", "cpu"]) == 0
    said = capsys.readouterr()
    assert "glyphs/b" in said.out
    assert "benchmark glyphs/b: 4 of 24 queries are left out: they have no match in the gallery" in said.err


def test_an_empty_split_is_refused(shop, capsys):
    with pytest.raises(UserError, match=r"^test: the set has no images: nothing to write$"):
        shop(samples(np.random.default_rng(1), 2), [])


def test_without_cameras_nothing_is_removed(shop, capsys):
    generator = np.random.default_rng(1)
    run = shop(samples(generator, 2, cameras=0), samples(generator, 2, cameras=0))
    assert found_by(capsys, run)["glyphs/b/rank10"] > 0


def test_a_diverged_model_is_named(shop, capsys):
    generator = np.random.default_rng(1)

    def diverge(model):
        model.norm.shared.weight.data[3] = math.nan

    error = error_of(capsys, shop(samples(generator, 2), samples(generator, 2), change=diverge))
    assert "benchmark glyphs/b: retrieval: " in error
    assert "NaN or infinite" in error


def test_a_model_of_another_task_is_refused(root, tmp_path, capsys):
    """Classes that the head lacks, and a task that compares asked to classify."""
    recipe = recipe_file.load(str(root / "run" / "recipe.yaml"))
    digits, glyphs = recipe.tasks
    values = recipe_file.dump(dataclasses.replace(recipe, tasks=[digits]))
    values["tasks"][0]["benchmarks"] = [{"name": "b", "protocol": "classification", "shards": f"{root}/query"}]
    (tmp_path / "digits.yaml").write_text(recipe_file.to_yaml(recipe_file.parse(values, "test")))
    error = error_of(capsys, root / "run", "--recipe", tmp_path / "digits.yaml")
    assert "label 'id00' out of range: not among the 3 classes" in error
    values = recipe_file.dump(dataclasses.replace(recipe, tasks=[glyphs]))
    values["tasks"][0]["benchmarks"] = [{"name": "b", "protocol": "classification", "shards": f"{root}/query"}]
    (tmp_path / "glyphs.yaml").write_text(recipe_file.to_yaml(recipe_file.parse(values, "test")))
    assert "out of range" in error_of(capsys, root / "model", "--recipe", tmp_path / "glyphs.yaml")
