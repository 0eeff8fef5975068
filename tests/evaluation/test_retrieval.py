"""Re-identification's retrieval: known answers, a slow obvious implementation, faiss, and what cannot be scored."""

import itertools

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.evaluation.vectors import cosine, on_circle, signs
from ufo_ds.errors import UserError
from ufo_ds.evaluation import ranking, retrieval

ARRAYS = ("query", "query_ids", "query_cameras", "gallery", "gallery_ids", "gallery_cameras")


def known_case():
    """One query, identity 1 and camera 1; the gallery in the order of similarity."""
    return (
        on_circle(0) * 7, np.array([1]), np.array([1]),
        on_circle(0, 10, 20, 30, 40, 50), np.array([1, 2, 1, 3, 1, -1]), np.array([1, 2, 2, 1, 3, 1]),
    )  # fmt: skip


def test_known_answer():
    # Without the same-camera image and the junk the ranking is wrong, right, wrong, right:
    # AP = (1/2 + 2/4) / 2, INP = 2/4.
    found = retrieval.outcomes(*known_case())
    assert retrieval.metrics(found) == {"mAP": 0.5, "rank1": 0.0, "rank5": 1.0, "rank10": 1.0, "mINP": 0.5}
    assert {name: found[name].tolist() for name in ("query", "identity", "first_rank", "relevant", "candidates")} == {
        "query": [0], "identity": [1], "first_rank": [2], "relevant": [2], "candidates": [4],
    }  # fmt: skip
    # One of 4 is first with 2/4; H_4 = 25/12, E[AP] = (1/3 x (4 - 25/12) + 25/12) / 4 = 49/72.
    assert retrieval.chance(found) == pytest.approx({"mAP": 49 / 72, "rank1": 0.5, "rank5": 1, "rank10": 1})
    np.testing.assert_array_equal(found["shown"], [0])
    np.testing.assert_array_equal(found["shown_top"], [[1, 2, 3, 4, -1, -1, -1, -1, -1, -1]])
    np.testing.assert_array_equal(found["shown_right"], [[False, True, False, True] + 6 * [False]])


def test_items_average_to_the_main_metric():
    generator = np.random.default_rng(0)
    ids, cameras = generator.integers(0, 5, (2, 40))
    features = generator.normal(size=(40, 6)).astype(np.float32)
    found = retrieval.outcomes(features, ids, cameras, features, ids, cameras)
    scores, items = retrieval.items(found)
    assert scores @ items.weight == pytest.approx(retrieval.metrics(found)[retrieval.MAIN_METRIC])
    np.testing.assert_array_equal(items.cluster[:, 0], ids[found["query"]])


def test_images_of_unknown_camera_are_kept():
    arguments = on_circle(0), np.array([1]), np.array([-1]), on_circle(0, 10), np.array([1, 2]), np.array([-1, 0])
    assert retrieval.evaluate(*arguments)["mAP"] == 1.0


def slow(query, query_ids, query_cameras, gallery, gallery_ids, gallery_cameras):
    """Metrics, and of every query with a match its ranking as (position, right)."""
    precisions, penalties, firsts, rankings = [], [], [], {}
    for index, (feature, identity, camera) in enumerate(zip(query, query_ids, query_cameras, strict=True)):
        ranking = []
        for position in range(len(gallery)):
            other_id, other_camera = gallery_ids[position], gallery_cameras[position]
            removed = other_id == -1 or (other_id == identity and other_camera == camera and camera != -1)
            if not removed:
                # False sorts first
                ranking.append((-cosine(feature, gallery[position]), bool(other_id == identity), position))
        ranking.sort()
        ranks = [rank for rank, (_, right, _) in enumerate(ranking, start=1) if right]
        if ranks:
            precisions.append(sum((hit + 1) / rank for hit, rank in enumerate(ranks)) / len(ranks))
            penalties.append(len(ranks) / ranks[-1])
            firsts.append(ranks[0])
            rankings[index] = [(position, right) for _, right, position in ranking]
    cmc = {f"rank{k}": sum(first <= k for first in firsts) / len(firsts) for k in (1, 5, 10)}
    return {"mAP": np.mean(precisions), **cmc, "mINP": np.mean(penalties)}, rankings


def draw(seed, queries=17, images=60):
    generator = np.random.default_rng(seed)

    def one(number):
        return signs(generator, number), generator.integers(-1, 6, number), generator.integers(-1, 3, number)

    return *one(queries), *one(images)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), block=st.sampled_from([32, 128, 2**24]), few=st.sampled_from([0, 5, 24]))
def test_agrees_with_the_obvious_implementation(seed, block, few):
    arguments = draw(seed)
    expected, rankings = slow(*arguments)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranking, "_BLOCK", block)  # of one query, two, or all
        patch.setattr(ranking, "_FEW", few)
        found = retrieval.outcomes(*arguments)
    assert retrieval.metrics(found) == pytest.approx(expected)
    assert found["query"].tolist() == list(rankings)
    assert found["relevant"].tolist() == [sum(right for _, right in r) for r in rankings.values()]
    assert found["candidates"].tolist() == [len(r) for r in rankings.values()]

    shown = found["shown"].tolist()
    assert len(set(shown)) == len(shown) <= 16
    precision = dict(zip(found["query"].tolist(), found["average_precision"], strict=True))
    others = [value for query, value in precision.items() if query not in shown[:8]]
    assert all(precision[query] <= min(others, default=1) for query in shown[:8])
    assert {found["query"][0], found["query"][-1]} <= set(shown)
    for query, top, right in zip(shown, found["shown_top"], found["shown_right"], strict=True):
        first = rankings[query][:10]
        assert [(p, r) for p, r in zip(top.tolist(), right.tolist(), strict=True) if p >= 0] == first
        assert (top[len(first) :] == -1).all()
        assert not right[len(first) :].any()


@pytest.mark.parametrize("dimension", [33, 64, 512])
def test_a_model_that_says_the_same_of_everything_is_right_about_nothing(dimension):
    """Although a matrix product rounds equal sums differently from place to place."""
    feature = np.random.default_rng(dimension).normal(size=dimension).astype(np.float32)
    query, gallery = np.tile(feature, (5, 1)), np.tile(feature, (277, 1))
    ids, cameras = np.arange(277) % 5, np.full(277, -1)
    found = retrieval.outcomes(query, ids[:5], cameras[:5], gallery, ids, cameras)
    np.testing.assert_array_equal(found["first_rank"], found["candidates"] - found["relevant"] + 1)
    assert not found["shown_right"].any()


def test_similarities_given_take_the_place_of_cosines():
    arguments = dict(zip(ARRAYS, draw(3), strict=True))
    given_QG = arguments["query"] @ arguments["gallery"].T / 4
    given_QG.flags.writeable = False
    other = {**arguments, "query": np.zeros((17, 1)), "gallery": np.ones((60, 1))}
    found = retrieval.outcomes(**other, similarities=iter([given_QG[:5], given_QG[5:6], given_QG[6:]]))
    expected = retrieval.outcomes(**arguments)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)


def test_similarities_given_are_of_all_queries_and_images():
    arguments = dict(zip(ARRAYS, draw(3), strict=True))
    for blocks in ([np.zeros((16, 60))], [np.zeros((17, 60)), np.zeros((1, 60))], [np.zeros((17, 59))]):
        with pytest.raises(ValueError, match="similarities"):
            retrieval.outcomes(**arguments, similarities=blocks)
    with pytest.raises(UserError, match="NaN"):
        retrieval.outcomes(**arguments, similarities=[np.full((17, 60), np.nan)])


def test_agrees_with_faiss():
    generator = np.random.default_rng(1)
    query, gallery = (generator.normal(size=(n, 32)).astype(np.float32) for n in (50, 700))
    query_ids, gallery_ids = generator.integers(0, 20, 50), generator.integers(0, 20, 700)
    index = faiss.IndexFlatIP(32)
    index.add(retrieval.normalise(gallery))
    _, top_QK = index.search(retrieval.normalise(query), 10)
    hit_QK = gallery_ids[top_QK] == query_ids[:, None]
    found = retrieval.outcomes(query, query_ids, np.full(50, -1), gallery, gallery_ids, np.full(700, -1))
    metrics = retrieval.metrics(found)
    for k in (1, 5, 10):
        assert metrics[f"rank{k}"] == pytest.approx(hit_QK[:, :k].any(axis=1).mean())
    np.testing.assert_array_equal(found["shown_top"], top_QK[found["shown"]])
    np.testing.assert_array_equal(found["shown_right"], hit_QK[found["shown"]])


def test_features_in_a_read_only_file(tmp_path):
    arguments = dict(zip(ARRAYS, draw(4), strict=True))
    expected = retrieval.outcomes(**arguments)
    for side in ("query", "gallery"):
        np.save(tmp_path / f"{side}.npy", arguments[side])
        arguments[side] = np.load(tmp_path / f"{side}.npy", mmap_mode="r")
    for name, array in retrieval.outcomes(**arguments).items():
        np.testing.assert_array_equal(array, expected[name])


def test_chance_is_the_mean_over_all_orders():
    right = np.array([True, True, False, False, False, False])
    precisions, firsts = [], []
    for order in set(itertools.permutations(right)):
        ranks = np.flatnonzero(order) + 1
        precisions.append(np.mean([1 / ranks[0], 2 / ranks[1]]))
        firsts.append(ranks[0])
    found = {"relevant": np.array([2], dtype=np.int32), "candidates": np.array([6], dtype=np.int32)}
    expected = {f"rank{k}": np.mean(np.array(firsts) <= k) for k in (1, 5, 10)}
    assert retrieval.chance(found) == pytest.approx({"mAP": np.mean(precisions), **expected})
    alone = {"relevant": np.array([1]), "candidates": np.array([1])}
    assert retrieval.chance(alone) == pytest.approx({"mAP": 1, "rank1": 1, "rank5": 1, "rank10": 1})


def change(**changes):
    return {**dict(zip(ARRAYS, known_case(), strict=True)), **changes}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (change(query_ids=np.array([9])), "none of the 1 queries has a match among the 6 gallery images"),
        (change(query_ids=np.array([-1])), "none of the 1 queries"),
        (change(gallery_cameras=np.ones(6, dtype=int)), "none of the 1 queries .* different cameras"),
        (change(query=on_circle(), query_ids=np.array([], int), query_cameras=np.array([], int)), "0 query images"),
        (change(gallery=on_circle(), gallery_ids=np.array([], int), gallery_cameras=np.array([], int)), "0 gallery im"),
        (change(query=np.array([[np.inf, 0]], dtype=np.float32)), "1 of 1 query features are NaN or inf"),
        (change(gallery=on_circle(0, 0, np.nan, 0, np.nan, 0)), "2 of 6 gallery features are NaN .* first number 2"),
    ],
)  # fmt: skip
def test_refuses(arguments, message):
    with pytest.raises(UserError, match=message) as error:
        retrieval.outcomes(**arguments)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("retrieval: ")
