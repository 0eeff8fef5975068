import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score

from ufo_ds.errors import UserError
from ufo_ds.evaluation import classification


def test_by_hand():
    scores = np.array(
        [
            [0.1, 0.9, 0.0],  # label 1: right
            [0.9, 0.1, 0.0],  # label 1: second, called 0
            [0.5, 0.5, 0.0],  # label 0: a tie, second, called 1
            [np.nan, 1.0, 0.0],  # label 1: NaN beside it, last
            [0.0, np.nan, 0.0],  # label 1: NaN in it, last
            [0.0, 0.0, 2.0],  # label 2: right
        ],
        dtype=np.float32,
    )
    labels = np.array([1, 1, 0, 1, 1, 2])
    found = classification.outcomes(scores, labels)
    assert found["right"].tolist() == [True, False, False, False, False, True]
    assert found["rank"].tolist() == [1, 2, 2, 3, 3, 1]
    assert found["predicted"].tolist() == [1, 0, 1, 0, 0, 2]
    assert found["classes"].tolist() == [3]
    # Class 0: 0 of 1, class 1: 1 of 4, class 2: 1 of 1.
    assert classification.metrics(found) == {"top1": pytest.approx(2 / 6), "mean_per_class": pytest.approx(1.25 / 3)}
    assert classification.chance(found) == {"top1": pytest.approx(1 / 3), "mean_per_class": pytest.approx(1 / 3)}


def test_top5_counts_ties_and_nan_as_wrong():
    # Of 8 classes the right one, 0, ties with 4 others: fifth; with 5: sixth.
    scores = np.array([[1, 1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 0, 0], [9, 0, 0, 0, 0, 0, 0, np.nan]])
    found = classification.outcomes(scores, np.zeros(3, dtype=np.int64))
    assert found["rank"].tolist() == [5, 6, 8]
    assert classification.metrics(found) == {"top1": 0, "top5": pytest.approx(1 / 3), "mean_per_class": 0}
    assert classification.chance(found) == {"top1": 1 / 8, "top5": 5 / 8, "mean_per_class": 1 / 8}


score = st.sampled_from([-np.inf, -1.0, 0.0, 0.5, 2.0, np.inf, np.nan])


@given(st.data())
def test_agrees_with_the_obvious_implementation(data):
    images, classes = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 7))
    rows = data.draw(st.lists(st.lists(score, min_size=classes, max_size=classes), min_size=images, max_size=images))
    labels = data.draw(st.lists(st.integers(0, classes - 1), min_size=images, max_size=images))
    found = classification.outcomes(np.array(rows, dtype=np.float32), np.array(labels))
    ranks, rights = [], []
    for row, label in zip(rows, labels, strict=True):
        bad = any(np.isnan(row))
        ranks.append(classes if bad else 1 + sum(s >= row[label] for c, s in enumerate(row) if c != label))
        rights.append(not bad and ranks[-1] == 1)
    assert found["rank"].tolist() == ranks
    assert found["right"].tolist() == rights
    if classes > 1:
        assert (found["predicted"] == labels).tolist() == rights
    for row, label, predicted, right in zip(rows, labels, found["predicted"], rights, strict=True):
        if not right and not any(np.isnan(row)):
            assert row[predicted] == max(s for c, s in enumerate(row) if c != label)


@pytest.mark.parametrize("seed", range(3))
def test_agrees_with_scikit_learn(seed, tmp_path, monkeypatch):
    """From a memory-mapped file and in blocks of a few rows."""
    generator = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(9), generator.integers(0, 9, 200) ** 2 // 9])  # all there, unbalanced
    scores = generator.normal(size=(209, 9)).astype(np.float32)
    scores[np.arange(209), labels] += 1
    np.save(tmp_path / "scores.npy", scores)
    monkeypatch.setattr(classification, "_BLOCK", 9 * 7)
    mapped = np.load(tmp_path / "scores.npy", mmap_mode="r")
    found = classification.outcomes(mapped, labels)
    assert (found["predicted"] == scores.argmax(axis=1)).all()
    assert classification.evaluate(mapped, labels) == {
        "top1": pytest.approx(top_k_accuracy_score(labels, scores, k=1)),
        "top5": pytest.approx(top_k_accuracy_score(labels, scores, k=5)),
        "mean_per_class": pytest.approx(balanced_accuracy_score(labels, scores.argmax(axis=1))),
    }


def test_classes_without_images_do_not_count():
    scores = np.eye(4)[[0, 0, 2]]
    labels = np.array([0, 2, 2])  # class 0: 1 of 1, class 2: 1 of 2
    assert classification.evaluate(scores, labels)["mean_per_class"] == 0.75


def test_items_make_the_main_metric():
    generator = np.random.default_rng(0)
    found = classification.outcomes(generator.normal(size=(50, 4)), generator.integers(0, 4, 50))
    scores, items = classification.items(found)
    assert scores.dtype == np.float64
    assert items.clusters == 50
    assert scores @ items.weight == pytest.approx(classification.metrics(found)[classification.MAIN_METRIC])


def test_chance_is_what_random_scores_get():
    generator = np.random.default_rng(0)
    found = classification.outcomes(generator.normal(size=(20000, 10)), generator.integers(0, 10, 20000) // 2)
    assert classification.metrics(found) == pytest.approx(classification.chance(found), abs=0.015)


def test_refusals_say_what_to_do():
    with pytest.raises(UserError, match=r"label 3 .* 3 classes"):
        classification.evaluate(np.zeros((2, 3)), np.array([0, 3]))
    with pytest.raises(UserError, match=r"label -1 .* 3 classes"):
        classification.evaluate(np.zeros((2, 3)), np.array([0, -1]))
    with pytest.raises(UserError, match="0 images"):
        classification.evaluate(np.zeros((0, 3)), np.zeros(0, dtype=np.int64))
