import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from sklearn import metrics as sklearn_metrics

from ufo_ds.errors import UserError
from ufo_ds.evaluation import attributes

N, Y = False, True


def test_by_hand():
    targets = np.array([[Y, Y, N], [Y, N, N], [N, Y, N], [N, N, N]])
    scores = np.array([[2.0, -1, -1], [1, 1, -3], [-1, 3, 0], [-2, -1, np.nan]])
    found = attributes.outcomes(scores, targets)
    assert found["right"].tolist() == [[Y, N, Y], [Y, N, Y], [Y, Y, N], [Y, Y, N]]
    assert attributes.metrics(found) == pytest.approx(
        {
            # Positive and negative images judged rightly: 2/2 and 2/2; 1/2 and 1/2; none and 2/4.
            "mA": (1 + 0.5 + 0.5) / 3,
            # The images that have attributes: {0, 1}, {0}, {1}; predicted {0}, {0, 1}, {1, 2} (0 counts against).
            "accuracy": 0.5,
            "precision": (1 + 0.5 + 0.5) / 3,
            "recall": (0.5 + 1 + 1) / 3,
            "f1": 2 * (2 / 3) * (5 / 6) / (2 / 3 + 5 / 6),
            # 0: both first. 1: scores 3, then a wrong 1, then -1 in a tie with a wrong -1: (1/1 + 2/4) / 2.
            "mAP": (1 + 0.75) / 2,
        }
    )
    assert found["average_precision"].tolist() == [1, 0.75, 0]


def test_nan_and_ties_count_against_the_model():
    targets = np.array([[Y, N], [N, Y], [Y, Y]])
    for value in (0.0, np.nan):
        found = attributes.evaluate(np.full((3, 2), value), targets)
        assert [found[name] for name in ("mA", "accuracy", "precision", "recall", "f1")] == [0] * 5
        # Each attribute has one negative image and two positive: 2nd and 3rd.
        assert found["mAP"] == pytest.approx((1 / 2 + 2 / 3) / 2)


def test_the_right_model_is_perfect():
    """With an image that has nothing, an attribute that none has and one that all but have."""
    targets = np.array([[Y, N, Y], [N, N, Y], [Y, N, Y], [N, N, N]])
    assert set(attributes.evaluate(np.where(targets, 1.0, -1.0), targets).values()) == {1.0}


@pytest.mark.parametrize("seed", range(5))
def test_agrees_with_scikit_learn(seed):
    generator = np.random.default_rng(seed)
    targets = generator.random((60, 7)) < generator.uniform(0.05, 0.9, 7)
    targets[~targets.any(axis=1), 0] = True  # scikit-learn would count images without any
    scores = generator.normal(size=(60, 7)) + 2 * targets - 1
    scores[:5] = -1  # nothing is predicted
    predicted = scores > 0
    precision, recall, _, _ = sklearn_metrics.precision_recall_fscore_support(
        targets, predicted, average="samples", zero_division=0
    )
    scores += generator.uniform(0, 1e-6, scores.shape)  # scikit-learn takes what ties together
    per_attribute = [sklearn_metrics.balanced_accuracy_score(targets[:, a], predicted[:, a]) for a in range(7)]
    found = attributes.evaluate(scores, targets)
    assert found == pytest.approx(
        {
            "mA": np.mean(per_attribute),
            "accuracy": sklearn_metrics.jaccard_score(targets, predicted, average="samples", zero_division=0),
            "precision": precision,
            "recall": recall,
            "f1": 2 * precision * recall / (precision + recall),
            "mAP": np.mean([sklearn_metrics.average_precision_score(targets[:, a], scores[:, a]) for a in range(7)]),
        }
    )


@given(st.data())
def test_agrees_with_the_obvious_implementation(data):
    images, count = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 4))

    def table(value):
        return data.draw(st.lists(st.lists(value, min_size=count, max_size=count), min_size=images, max_size=images))

    scores, targets = table(st.sampled_from([-2.0, -1.0, 0.0, 1.0, 2.0, np.nan])), table(st.booleans())
    assume(any(map(any, targets)))
    halves, precisions = [], []
    for column, truth in zip(zip(*scores, strict=True), zip(*targets, strict=True), strict=True):
        judged = [s > 0 if t else s < 0 for s, t in zip(column, truth, strict=True)]
        shares = [[j for j, t in zip(judged, truth, strict=True) if t == answer] for answer in (True, False)]
        halves.append(np.mean([np.mean(share) for share in shares if share]))
        # NaN first if wrong and last if right; of equals the wrong ones (False) first
        keyed = [(-s if s == s else (np.inf if t else -np.inf), t) for s, t in zip(column, truth, strict=True)]
        ranks = [rank for rank, (_, t) in enumerate(sorted(keyed), start=1) if t]
        if ranks:
            precisions.append(np.mean([(hit + 1) / rank for hit, rank in enumerate(ranks)]))
    found = attributes.outcomes(np.array(scores), np.array(targets))
    result = attributes.metrics(found)
    assert result["mA"] == pytest.approx(np.mean(halves))
    assert result["mAP"] == pytest.approx(np.mean(precisions))
    assert all(0 <= value <= 1 + 1e-12 for value in result.values())

    item_scores, items = attributes.items(found)
    assert items.weight.sum() == pytest.approx(1)
    assert item_scores @ items.weight == pytest.approx(result[attributes.MAIN_METRIC])
    assert items.clusters == images


def test_chance_is_what_random_scores_get():
    generator = np.random.default_rng(0)
    targets = generator.random((5000, 3)) < [0.02, 0.5, 1]
    found = attributes.outcomes(generator.normal(size=(5000, 3)), targets)
    assert attributes.chance(found)["mA"] == pytest.approx(attributes.metrics(found)["mA"], abs=0.05)


def test_refusals_say_what_to_do():
    with pytest.raises(UserError, match="0 images"):
        attributes.outcomes(np.zeros((0, 3)), np.zeros((0, 3), dtype=bool))
    with pytest.raises(UserError, match=r"3 attributes, the model has 4"):
        attributes.outcomes(np.zeros((2, 4)), np.zeros((2, 3), dtype=bool))
    with pytest.raises(UserError, match=r"none of the 2 images has any of the 3"):
        attributes.outcomes(np.zeros((2, 3)), np.zeros((2, 3), dtype=bool))
