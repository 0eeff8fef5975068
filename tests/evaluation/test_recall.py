"""Recall@k, with one set and with two."""

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.evaluation.vectors import cosine, on_circle, signs
from ufo_ds.errors import UserError
from ufo_ds.evaluation import ranking, recall, retrieval


def test_known_answer_of_one_set():
    # Angles 0, 10, 25, 45 of identities 1, 2, 1, 2. Nearest first, without the image itself:
    # 0: 10 wrong, 25 right -> 2;  10: 0 wrong, 25 wrong, 45 right -> 3;  25: 10 wrong, 45 wrong, 0 right -> 3 (15, 20,
    # 25 degrees away);  45: 25 wrong, 10 right -> 2.
    found = recall.outcomes(on_circle(0, 10, 25, 45), np.array([1, 2, 1, 2]), at=(1, 2, 3))
    assert found["first_rank"].tolist() == [2, 3, 3, 2]
    assert found["relevant"].tolist() == 4 * [1]
    assert found["candidates"].tolist() == 4 * [3]
    assert recall.metrics(found) == {"recall@1": 0.0, "recall@2": 0.5, "recall@3": 1.0}
    assert recall.chance(found) == pytest.approx({"recall@1": 1 / 3, "recall@2": 2 / 3, "recall@3": 1})
    assert found["shown"].tolist() == [1, 2, 0, 3]  # the worst first
    assert found["shown_top"][:, :4].tolist() == [[0, 2, 3, -1], [1, 3, 0, -1], [1, 2, 3, -1], [2, 1, 0, -1]]


def test_a_copy_of_the_query_is_found_but_not_the_query_itself():
    copies = on_circle(0, 0, 50, 90)
    assert recall.outcomes(copies, np.array([1, 1, 2, 2]))["first_rank"].tolist() == [1, 1, 1, 1]
    assert recall.outcomes(copies, np.array([1, 2, 1, 2]))["first_rank"].tolist() == [2, 3, 3, 3]


def test_known_answer_of_query_and_gallery():
    # From 0 degrees the gallery is right (1) at rank 2; from 60: 20 away right, rank 1; identity 5 has no match.
    found = recall.outcomes(
        on_circle(0, 60, 90), np.array([1, 2, 5]), on_circle(10, 20, 80, 0), np.array([3, 1, 2, -1]), at=(2,)
    )
    assert found["first_rank"].tolist() == [2, 1, 4]
    assert found["relevant"].tolist() == [1, 1, 0]
    assert recall.metrics(found) == pytest.approx({"recall@1": 1 / 3, "recall@2": 2 / 3})
    assert recall.metrics({**found, "at": np.array([1, 100])})["recall@100"] == pytest.approx(2 / 3)
    assert recall.chance(found) == pytest.approx({"recall@1": 2 / 9, "recall@2": 4 / 9})
    scores, items = recall.items(found)
    assert scores @ items.weight == pytest.approx(1 / 3)
    np.testing.assert_array_equal(items.cluster, [[1], [2], [5]])


def slow(query, query_ids, gallery, gallery_ids, one_set, at):
    hits = {k: [] for k in at}
    for index, identity in enumerate(query_ids):
        if identity == -1:
            continue
        order = sorted(
            (-cosine(query[index], gallery[j]), bool(gallery_ids[j] == identity))
            for j in range(len(gallery)) if gallery_ids[j] != -1 and not (one_set and j == index)
        )  # fmt: skip
        for k in at:
            hits[k].append(any(right for _, right in order[:k]))
    return {f"recall@{k}": np.mean(values) for k, values in hits.items()}


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), one_set=st.booleans(), block=st.sampled_from([128, 2**24]))
def test_agrees_with_the_obvious_implementation(seed, one_set, block):
    generator = np.random.default_rng(seed)
    query, gallery = signs(generator, 30), signs(generator, 45)
    query_ids, gallery_ids = generator.integers(-1, 6, 30), generator.integers(-1, 6, 45)
    two = (query, query_ids) if one_set else (gallery, gallery_ids)
    at = (1, 2, 5, 40)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranking, "_BLOCK", block)
        result = recall.evaluate(query, query_ids, *(() if one_set else two), at=at)
    assert result == pytest.approx(slow(query, query_ids, *two, one_set, at))


def test_agrees_with_faiss():
    generator = np.random.default_rng(2)
    features, ids = generator.normal(size=(300, 24)).astype(np.float32), generator.integers(0, 40, 300)
    index = faiss.IndexFlatIP(24)
    unit = retrieval.normalise(features)
    index.add(unit)
    _, top_QK = index.search(unit, 11)
    top_QK = np.array([row[row != i] for i, row in enumerate(top_QK)])  # each finds itself
    hit_QK = ids[top_QK] == ids[:, None]
    found = recall.outcomes(features, ids, at=(1, 5, 10))
    assert recall.metrics(found) == pytest.approx({f"recall@{k}": hit_QK[:, :k].any(1).mean() for k in (1, 5, 10)})
    np.testing.assert_array_equal(found["shown_top"], top_QK[found["shown"]])


def test_similarities_given_take_the_place_of_cosines():
    features, ids = signs(np.random.default_rng(5), 20), np.arange(20) % 4
    given_QG = features @ features.T
    found = recall.outcomes(np.zeros((20, 1)), ids, similarities=[given_QG[:8], given_QG[8:]])
    for name, array in recall.outcomes(features, ids).items():
        np.testing.assert_array_equal(found[name], array)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((on_circle(), np.array([], int)), "0 query images"),
        ((on_circle(0), np.array([1]), on_circle(), np.array([], int)), "0 gallery images"),
        ((on_circle(0, 1), np.array([1, 2])), "none of the 2 queries has a match among the 2 gallery images"),
        ((on_circle(0, 1), np.array([-1, -1])), "none of the 2 queries"),
        ((on_circle(0), np.array([1]), on_circle(1), np.array([2])), "none of the 1 queries"),
        ((on_circle(0, np.nan), np.array([1, 1])), "1 of 2 query features are NaN"),
        ((on_circle(0, 1), np.array([1, 1]), None, None, (1, 0)), r"at \[1, 0\]"),
    ],
)
def test_refuses(arguments, message):
    with pytest.raises(UserError, match=message) as error:
        recall.outcomes(*arguments)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("recall: ")
