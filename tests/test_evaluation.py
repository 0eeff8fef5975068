"""The protocols against hand-computed answers and against slow, obvious implementations."""

import json

import numpy as np
import pytest
import torch

from tests import tiny
from tests.evaluation.vectors import on_circle
from ufo_ds import recipe_file
from ufo_ds.data.evaluation_set import EvaluationSet
from ufo_ds.errors import UserError
from ufo_ds.evaluation import benchmarks, classification, outcomes, pixels, retrieval, verification
from ufo_ds.evaluation.features import FeatureFiles, open_images, predict
from ufo_ds.model.heads import Outputs
from ufo_ds.recipe import only


def slow_verification(features, pairs):
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    fold, first, second, same = pairs.T
    distance = np.array([np.sum((unit[a] - unit[b]) ** 2) for a, b in zip(first, second, strict=True)])
    thresholds = np.arange(0, 4, 0.01)
    accuracies, chosen = [], []
    for held_out in np.unique(fold):
        train = fold != held_out
        best = np.argmax([np.mean((distance[train] < t) == same[train]) for t in thresholds])
        accuracies.append(np.mean((distance[~train] < thresholds[best]) == same[~train]))
        chosen.append(thresholds[best])
    return {"accuracy": np.mean(accuracies), "accuracy_std": np.std(accuracies), "threshold": np.mean(chosen)}


@pytest.mark.parametrize("seed", range(5))
def test_verification_agrees_with_the_obvious_implementation(seed):
    generator = np.random.default_rng(seed)
    ids = generator.integers(0, 8, 80)
    features = generator.normal(size=(8, 5))[ids] + 0.7 * generator.normal(size=(80, 5))
    first, second = generator.integers(0, 80, (2, 300))
    pairs = np.stack([np.arange(300) // 60, first, second, ids[first] == ids[second]], axis=1)
    result, expected = verification.evaluate(features, pairs), slow_verification(features, pairs)
    assert {name: result[name] for name in expected} == pytest.approx(expected)


def test_verification_takes_the_smallest_of_equal_thresholds():
    pairs = np.array([[fold, 0, other, other == 1] for fold in (0, 1) for other in (1, 2)])
    result = verification.evaluate(on_circle(0, 0, 180), pairs)  # distances 0 and 4: all from .01 separate them
    assert result == {"accuracy": 1.0, "accuracy_std": 0.0, "threshold": pytest.approx(0.01), "auc": 1.0, "eer": 0.0}


def test_verification_refuses_nan():
    features = on_circle(0, 0, 180, 0)
    features[3] = np.nan
    pairs = np.array([[fold, 0, other, same] for fold in (0, 1) for other, same in ((1, 1), (2, 0), (3, 0), (3, 1))])
    with pytest.raises(UserError, match="1 of 4 images are NaN or infinite, the first of image 3"):
        verification.evaluate(features, pairs)


def test_verification_refuses_a_single_fold():
    with pytest.raises(UserError, match="at least 2 folds"):
        verification.evaluate(on_circle(0, 10), np.array([[0, 0, 1, 1], [0, 1, 0, 1]]))


def test_pixel_features_ignore_brightness_and_contrast_and_keep_the_picture():
    generator = np.random.default_rng(0)
    images = generator.integers(0, 50, (2, 3, 32, 32), dtype=np.uint8)
    features = pixels.pixel_features(np.concatenate([images, 3 * images + 40]))
    assert features.shape == (4, 1024)
    assert features.dtype == np.float32
    unit = retrieval.normalise(features)
    np.testing.assert_allclose(unit[:2], unit[2:], atol=1e-5)
    grey = (0.299 * images[0, 0] + 0.587 * images[0, 1] + 0.114 * images[0, 2]).ravel()
    np.testing.assert_allclose(features[0], grey - grey.mean(), atol=1e-3)  # already 32 x 32


def test_pixel_features_resize_other_shapes():
    image = np.zeros((1, 3, 64, 16), dtype=np.uint8)
    image[:, :, :32] = 200
    feature = pixels.pixel_features(image).reshape(32, 32)
    np.testing.assert_allclose(feature[:15], 100, atol=1e-3)
    np.testing.assert_allclose(feature[17:], -100, atol=1e-3)


def test_nearest_neighbour_scores():
    train, labels = on_circle(0, 60, 90), np.array([0, 0, 2])
    scores = pixels.nearest_neighbour_scores(3 * on_circle(30, 90), train, labels, num_classes=4)
    # Cosines 30 and 30 degrees away from class 0, 60 from class 2; then 30 and 0.
    expected = [[np.sqrt(3) / 2, -np.inf, 0.5, -np.inf], [np.sqrt(3) / 2, -np.inf, 1.0, -np.inf]]
    np.testing.assert_allclose(scores, expected, rtol=1e-6)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiny")
    tiny.make(root)
    return root


def test_flip_is_the_average_with_the_mirror_image(shards, tmp_path):
    """A set that one benchmark reads with flip and another without gives each its own; a model of pixels alone."""
    stripes = f"{shards}/stripes"
    entry = f"{{name: %s, protocol: retrieval, query: {stripes}, gallery: {stripes}, flip: %s}}"
    more = f"[{entry % ('plain', 'false')}, {entry % ('mirrored', 'true')}]"
    recipe = recipe_file.load(str(shards / "tiny.yaml"), [("tasks.stripes.benchmarks", more)])
    images = open_images(recipe)
    size = images["stripes"].input

    projection = np.random.default_rng(0).normal(size=(3 * size[0] * size[1], 3)).astype(np.float32)

    def features(pixels):  # so few that there are errors
        return np.tanh((pixels.reshape(len(pixels), len(projection)) / 127.5 - 1).astype(np.float32) @ projection)

    def forward(batch):
        outputs = {"stripes": features(batch.tasks["stripes"].images.numpy())}
        return {name: Outputs(torch.from_numpy(x), torch.from_numpy(x)) for name, x in outputs.items()}

    images = {"stripes": images["stripes"]}
    ranges = {"stripes": range(len(images["stripes"]))}
    files = FeatureFiles(tmp_path / "features")
    files.create()
    predict(forward, images, ranges, 7, 0, files)
    predictions = files.read(images)
    found = benchmarks.score(only(recipe, ["stripes"]), images, predictions, {"stripes": []})

    data = EvaluationSet.open(stripes)
    pixel_values = np.stack([data.load(i, size) for i in range(len(data))])
    ids = np.unique(data.label_names, return_inverse=True)[1]
    cameras = np.unique(data.camera_names, return_inverse=True)[1]
    plain = features(pixel_values)
    mirrored = plain + features(pixel_values[..., ::-1].copy())
    assert len(images["stripes"]) == 2 * len(data)
    for name, expected in (("plain", plain), ("mirrored", mirrored)):
        metrics = retrieval.evaluate(expected, ids, cameras, expected, ids, cameras)
        assert found[f"stripes/{name}"].metrics() == pytest.approx(metrics)
        assert found[f"stripes/{name}"].settings == ({"flip": True} if name == "mirrored" else {})
    assert found["stripes/plain"].metrics() != found["stripes/mirrored"].metrics()


def test_outcomes_name_what_they_are_of(shards):
    """Scores, weights and clusters of each protocol, from the shards' own names."""
    recipe = recipe_file.load(str(shards / "tiny.yaml"))
    images = open_images(recipe)
    generator = np.random.default_rng(0)
    predictions = {
        name: {
            "embedding": generator.normal(size=(len(of_task), 8)),
            "logits": generator.normal(size=(len(of_task), 3)),
        }
        for name, of_task in images.items()
    }
    found = benchmarks.score(recipe, images, predictions, {"colours": ["colour0", "colour1", "colour2"], "stripes": []})
    for key, metric in (
        ("colours/colours", "top1"), ("stripes/stripes", "mAP"), ("stripes/stripe_pairs", "accuracy"),
    ):  # fmt: skip
        assert found[key].scores @ found[key].items.weight == pytest.approx(found[key].metrics()[metric])
    names = EvaluationSet.open(f"{shards}/stripes").label_names
    of_query = found["stripes/stripes"].arrays
    assert [names[query] for query in of_query["query"]] == [f"id{i}" for i in of_query["identity"]]
    data = EvaluationSet.open(f"{shards}/pairs")
    identity = found["stripes/stripe_pairs"].arrays["identity"]
    assert [[sorted(data.label_names)[i] for i in pair] for pair in identity] == [
        [data.label_names[i] for i in pair] for pair in data.pairs[:, 1:3]
    ]
    assert len({one.data for one in found.values()}) == 3


def test_outcomes_come_back_as_they_were_kept(tmp_path):
    arrays = classification.outcomes(np.eye(3)[[2, 1, 1]], np.array([2, 0, 1]))
    kept = outcomes.Outcomes("classification", {"flip": True}, "digest", arrays)
    outcomes.store(tmp_path, 5, {"task/a name/with:odd characters": kept})
    metrics, file = sorted((tmp_path / "evaluations" / "step-00000005").iterdir())  # and no temporary file
    assert file.name.startswith("task.")
    assert json.loads(metrics.read_text()).keys() == {f"task/a name/with:odd characters/{m}" for m in kept.metrics()}
    found = outcomes.load(tmp_path, 5, "task/a name/with:odd characters")
    assert (found.protocol, found.settings, found.data) == ("classification", {"flip": True}, "digest")
    for name, array in arrays.items():
        np.testing.assert_array_equal(found.arrays[name], array)
    assert found.metrics() == {"top1": 2 / 3, "mean_per_class": 2 / 3}
    with pytest.raises(UserError, match="is missing"):
        outcomes.load(tmp_path, 6, "task/a name/with:odd characters")
