"""The protocols against hand-computed answers and against slow, obvious implementations."""

import numpy as np
import pytest

from ufo_ds.errors import UserError
from ufo_ds.evaluation import classification, pixels, retrieval, verification


def test_top1_counts_ties_and_nan_as_wrong():
    scores = np.array(
        [
            [0.1, 0.9, 0.0],  # right
            [0.9, 0.1, 0.0],  # wrong
            [0.5, 0.5, 0.0],  # tie
            [np.nan, 1.0, 0.0],  # NaN beside the right class
            [0.0, np.nan, 0.0],  # NaN in it
        ],
        dtype=np.float32,
    )
    assert classification.top1(scores, np.ones(5, dtype=np.int64)) == {"top1": 0.2}


def test_top1_refuses_labels_that_the_model_lacks():
    with pytest.raises(UserError, match=r"label 3 .* 3 classes"):
        classification.top1(np.zeros((2, 3)), np.array([0, 3]))
    with pytest.raises(UserError, match="0 images"):
        classification.top1(np.zeros((0, 3)), np.zeros(0, dtype=np.int64))


def on_circle(*degrees: float) -> np.ndarray:
    """Unit vectors whose cosine with that at 0 falls with the angle."""
    angles = np.radians(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def test_retrieval_known_answer():
    # Without the same-camera image and the junk the ranking is wrong, right, wrong, right:
    # AP = (1/2 + 2/4) / 2, INP = 2/4.
    result = retrieval.evaluate(
        on_circle(0) * 7, np.array([1]), np.array([1]),
        on_circle(0, 10, 20, 30, 40, 50), np.array([1, 2, 1, 3, 1, -1]), np.array([1, 2, 2, 1, 3, 1]),
    )  # fmt: skip
    assert result == {"mAP": 0.5, "rank1": 0.0, "rank5": 1.0, "rank10": 1.0, "mINP": 0.5}


def test_retrieval_keeps_images_of_unknown_camera():
    arguments = on_circle(0), np.array([1]), np.array([-1]), on_circle(0, 10), np.array([1, 2]), np.array([-1, 0])
    assert retrieval.evaluate(*arguments)["mAP"] == 1.0


def test_retrieval_counts_nan_against_the_model():
    query, ids, cameras = on_circle(0), np.array([1]), np.array([0])
    gallery = on_circle(0, 10, 20)
    gallery_ids, gallery_cameras = np.array([1, 2, 1]), np.ones(3, dtype=np.int64)
    gallery[1] = np.nan  # wrong, goes first: ranks 2 and 3
    wrong_nan = retrieval.evaluate(query, ids, cameras, gallery, gallery_ids, gallery_cameras)
    assert wrong_nan["mAP"] == pytest.approx((1 / 2 + 2 / 3) / 2)
    gallery = on_circle(0, 10, 20)
    gallery[0] = np.nan  # right, goes last: ranks 2 and 3
    right_nan = retrieval.evaluate(query, ids, cameras, gallery, gallery_ids, gallery_cameras)
    assert right_nan["mAP"] == pytest.approx((1 / 2 + 2 / 3) / 2)


def test_retrieval_refuses_queries_without_any_match():
    with pytest.raises(UserError, match="none of the 1 queries"):
        retrieval.evaluate(on_circle(0), np.array([1]), np.array([1]), on_circle(0), np.array([1]), np.array([1]))


def slow_retrieval(query, query_ids, query_cameras, gallery, gallery_ids, gallery_cameras):
    precisions, penalties, firsts = [], [], []
    for feature, identity, camera in zip(query, query_ids, query_cameras, strict=True):
        ranking = []
        for other, other_id, other_camera in zip(gallery, gallery_ids, gallery_cameras, strict=True):
            removed = other_id == -1 or (other_id == identity and other_camera == camera and camera != -1)
            if not removed:
                cosine = feature @ other / np.sqrt((feature @ feature) * (other @ other))
                ranking.append((-cosine, bool(other_id == identity)))  # False sorts first
        ranks = [rank for rank, (_, right) in enumerate(sorted(ranking), start=1) if right]
        if ranks:
            precisions.append(sum((hit + 1) / rank for hit, rank in enumerate(ranks)) / len(ranks))
            penalties.append(len(ranks) / ranks[-1])
            firsts.append(ranks[0])
    cmc = {f"rank{k}": sum(first <= k for first in firsts) / len(firsts) for k in (1, 5, 10)}
    return {"mAP": np.mean(precisions), **cmc, "mINP": np.mean(penalties)}


@pytest.mark.parametrize("seed", range(10))
def test_retrieval_agrees_with_the_obvious_implementation(seed, monkeypatch):
    generator = np.random.default_rng(seed)

    def draw(number):
        # Signs in 4 dimensions: cosines are exact multiples of 1/2, so there are many ties and no rounding.
        features = generator.choice([-1.0, 1.0], (number, 4)).astype(np.float32)
        return features, generator.integers(-1, 6, number), generator.integers(-1, 3, number)

    arguments = *draw(17), *draw(60)
    expected = pytest.approx(slow_retrieval(*arguments))
    assert retrieval.evaluate(*arguments) == expected
    monkeypatch.setattr(retrieval, "_BLOCK", 128)  # of two or three queries
    assert retrieval.evaluate(*arguments) == expected


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
    assert verification.evaluate(features, pairs) == pytest.approx(slow_verification(features, pairs))


def test_verification_takes_the_smallest_of_equal_thresholds():
    pairs = np.array([[fold, 0, other, other == 1] for fold in (0, 1) for other in (1, 2)])
    result = verification.evaluate(on_circle(0, 0, 180), pairs)  # distances 0 and 4: all from .01 separate them
    assert result == {"accuracy": 1.0, "accuracy_std": 0.0, "threshold": pytest.approx(0.01)}


def test_verification_counts_nan_as_wrong():
    features = on_circle(0, 0, 180, 0)
    features[3] = np.nan
    pairs = np.array([[fold, 0, other, same] for fold in (0, 1) for other, same in ((1, 1), (2, 0), (3, 0), (3, 1))])
    assert verification.evaluate(features, pairs)["accuracy"] == 0.5


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
