"""Verification's curve, items and chance; its folds are in tests/test_evaluation.py."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score, roc_curve

from ufo_ds.errors import UserError
from ufo_ds.evaluation import verification


def on_circle(*degrees):
    angles = np.radians(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def drawn(seed, count=6000, identities=40):
    generator = np.random.default_rng(seed)
    ids = np.arange(5 * identities) % identities
    features = generator.normal(size=(identities, 8))[ids] + generator.normal(size=(len(ids), 8))
    first, second = generator.integers(0, len(ids), (2, count))
    second = np.where(np.arange(count) % 2, second, (first + identities) % len(ids))
    pairs = np.stack([np.arange(count) * 10 // count, first, second, ids[first] == ids[second]], axis=1)
    return features.astype(np.float32), pairs, ids


def test_by_hand():
    # Cosines with image 0: 1, 1/2, 0, -1/2 and -1; genuine are the pairs with images 1 and 3.
    features = on_circle(0, 0, 60, 90, 120, 180) * 3
    pairs = np.array([[n % 2, 0, n, n in (1, 3)] for n in range(1, 6)])
    found = verification.outcomes(features, pairs)
    np.testing.assert_allclose(found["similarity"], [1, 0.5, 0, -0.5, -1], atol=1e-6)
    assert found["similarity"].dtype == np.float32
    assert found["same"].tolist() == [True, False, True, False, False]
    assert (found["first"].tolist(), found["second"].tolist()) == ([0] * 5, [1, 2, 3, 4, 5])
    metrics = verification.metrics(found)
    assert metrics["auc"] == pytest.approx(5 / 6)  # of 2 x 3 comparisons one is lost: 0 against 1/2
    # (FAR, FRR): (0, 1/2) above 1/2, then (1/3, 1/2), then (1/3, 0): equal where FRR falls through 1/3.
    assert metrics["eer"] == pytest.approx(1 / 3)
    assert not any(name.startswith("tar") for name in metrics)  # three impostor pairs resolve no FAR


@pytest.mark.parametrize("seed", range(3))
def test_curve_agrees_with_scikit_learn(seed):
    features, pairs, _ = drawn(seed)
    found = verification.outcomes(features, pairs)
    metrics = verification.metrics(found)
    unit = features.astype(np.float64) / np.linalg.norm(features.astype(np.float64), axis=1, keepdims=True)
    cosine, same = (unit[pairs[:, 1]] * unit[pairs[:, 2]]).sum(1), pairs[:, 3] == 1
    assert metrics["auc"] == pytest.approx(roc_auc_score(same, cosine), abs=1e-6)
    far, tar, _ = roc_curve(same, cosine, drop_intermediate=False)
    assert [name for name in metrics if name.startswith("tar")] == ["tar@far=1e-2"]
    assert metrics["tar@far=1e-2"] == pytest.approx(tar[far <= 1e-2].max(), abs=1e-3)


def test_items_are_pairs_weighted_by_fold():
    features, pairs, ids = drawn(0)
    pairs = pairs[700:]  # folds of unequal size
    found = verification.outcomes(features, pairs) | {"identity": ids[pairs[:, 1:3]]}
    scores, items = verification.items(found)
    metrics = verification.metrics(found)
    assert scores.dtype == np.float64
    assert scores @ items.weight == pytest.approx(metrics[verification.MAIN_METRIC])
    assert items.cluster.shape == (len(pairs), 2)
    assert items.clusters == len(np.unique(ids[pairs[:, 1:3]]))
    images = found | {"identity": pairs[:, 1:3]}  # genuine pairs join the images of one identity
    assert verification.items(images)[1].clusters < 1.5 * items.clusters
    assert metrics == verification.evaluate(features, pairs)


def test_chance_is_what_features_without_meaning_get():
    _, pairs, _ = drawn(1)
    features = np.random.default_rng(2).normal(size=(1 + pairs[:, 1:3].max(), 8)).astype(np.float32)
    found = verification.outcomes(features, pairs)
    chance, metrics = verification.chance(found), verification.metrics(found)
    assert chance.keys() == metrics.keys() - {"accuracy_std", "threshold"}
    for name, value in chance.items():
        assert metrics[name] == pytest.approx(value, abs=0.02)


def test_pairs_of_one_kind_have_no_curve():
    pairs = np.array([[fold, 0, 1, 1] for fold in (0, 1)])
    found = verification.outcomes(on_circle(0, 10), pairs)
    assert verification.metrics(found).keys() == {"accuracy", "accuracy_std", "threshold"}
    assert verification.chance(found) == {"accuracy": 1.0}


def test_ties_count_against_the_model():
    """A model that says the same of everything: nothing is accepted at any FAR below 1."""
    pairs = np.array([[n % 2, 0, 1, n % 3 == 0] for n in range(3000)])
    metrics = verification.evaluate(on_circle(30, 30), pairs)
    assert metrics["tar@far=1e-2"] == 0
    assert metrics["auc"] == metrics["eer"] == 0.5


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_refuses_features_of_pairs_that_are_not_finite(value):
    features = on_circle(0, 10, 20, 30)
    features[3, 1] = value
    pairs = np.array([[fold, 0, other, 1] for fold in (0, 1) for other in (1, 2, 3)])
    with pytest.raises(UserError, match="verification: the features of 1 of 4 images"):
        verification.outcomes(features, pairs)


def test_an_image_in_no_pair_does_not_matter():
    features = on_circle(0, 10, 20)
    features[2] = np.nan
    pairs = np.array([[fold, 0, 1, 1] for fold in (0, 1)])
    assert verification.evaluate(features, pairs)["accuracy"] == 1


def test_outcomes_of_folds_alone_still_have_their_metrics():
    features, pairs, _ = drawn(0)
    found = verification.outcomes(features, pairs)
    of_folds = verification.metrics({name: found[name] for name in ("right", "fold", "threshold")})
    assert of_folds.items() <= verification.metrics(found).items()
    assert of_folds.keys() == {"accuracy", "accuracy_std", "threshold"}
