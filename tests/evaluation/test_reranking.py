"""k-reciprocal re-ranking against the authors' numbers and against its definition, set by set."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from threadpoolctl import threadpool_limits

from ufo_ds.errors import UserError
from ufo_ds.evaluation import neighbours, reranking


def distances(*arguments) -> np.ndarray:
    return np.concatenate(list(reranking.distances(*arguments)))


def test_known_answer():
    """Run with the authors' code, which squares the Euclidean distances."""
    features = np.random.RandomState(0).rand(8, 4).astype(np.float32)
    expected = [
        [0.63651, 0.75332, 0.69606, 0.53025, 0.59826, 0.33329],
        [0.73738, 0.82705, 0.50088, 0.61122, 0.23682, 0.03639],
    ]
    np.testing.assert_allclose(distances(features[:2], features[2:], 3, 2, 0.3), expected, atol=6e-6)


def test_by_hand():
    """Query 0; gallery 1, 3, 10 on a line; k1 = 1, k2 = 1, so k1/2 is 0 (half to even).

    Nearest, itself first: 0: {0, 1}; 1: {1, 0}; 3: {3, 1}; 10: {10, 3}. Mutual: 0 and 1; R(., 0) is the image itself
    and adds nothing. V_0: exp(-0/100) to 0, exp(-1/100) to 1; V_1: exp(-1/81) to 0, exp(0) to 1; V_3, V_10: themselves.
    With a = e^-.01 / (1 + e^-.01) = .4975 and b = e^(-1/81) / (1 + e^(-1/81)) = .49691: min = b + a = .99441 and
    Jaccard = 1 - .99441 / (2 - .99441) = .01111; for 3 and 10 it is 1. d(0, .) = .01, .09, 1.
    """
    line = np.array([[0.0], [1.0], [3.0], [10.0]])
    found = distances(line[:1], line[1:], 1, 1, 0.3)
    np.testing.assert_allclose(found, [[0.7 * 0.01111 + 0.003, 0.7 + 0.027, 1.0]], atol=1e-5)


def slow(features, queries, k1, k2, lambda_):
    """The definition with sets and dictionaries; whole numbers as features make for exact distances and ties."""
    images = range(len(features))
    squared = [
        [sum((a - b) ** 2 for a, b in zip(features[p], features[g], strict=True)) for g in images] for p in images
    ]
    nearest = [sorted(images, key=lambda g, p=p: (g != p, squared[p][g], g)) for p in images]

    def reciprocal(p, k):
        return {g for g in nearest[p][: k + 1] if p in nearest[g][: k + 1]}

    def normalised(p, g):
        return squared[p][g] / (max(squared[p]) or 1)

    encoded = []
    for p in images:
        core = reciprocal(p, k1)
        members = set(core)
        for q in core:
            candidates = reciprocal(q, round(k1 / 2))
            if 3 * len(candidates & core) > 2 * len(candidates):
                members |= candidates
        total = sum(math.exp(-normalised(p, g)) for g in members)
        encoded.append([math.exp(-normalised(p, g)) / total if g in members else 0 for g in images])
    encoded = [[sum(encoded[n][g] for n in nearest[p][:k2]) / k2 for g in images] for p in images]

    def jaccard(p, g):
        lower = sum(map(min, encoded[p], encoded[g]))
        return 1 - lower / sum(map(max, encoded[p], encoded[g]))

    return [
        [(1 - lambda_) * jaccard(q, g) + lambda_ * normalised(q, g) for g in images[queries:]] for q in images[:queries]
    ]


@st.composite
def cases(draw):
    """Few different points, so that many images tie or are the same."""
    count, size = draw(st.integers(2, 14)), draw(st.integers(1, 3))
    features = draw(
        st.lists(st.lists(st.integers(-2, 3), min_size=size, max_size=size), min_size=count, max_size=count)
    )
    queries, k1, k2 = (draw(st.integers(1, most)) for most in (count - 1, count - 1, count))
    return features, queries, k1, k2, draw(st.sampled_from([0.0, 0.3, 1.0]))


@given(cases())
def test_agrees_with_the_definition(case):
    features, queries, k1, k2, lambda_ = case
    array = np.array(features, dtype=np.float32)
    found = distances(array[:queries], array[queries:], k1, k2, lambda_)
    np.testing.assert_allclose(found, slow(*case), atol=1e-6)


@pytest.mark.parametrize("k1", [7, 8, 9])  # halves: 4, 4, 4
def test_similarities_are_of_normalised_features(k1, monkeypatch):
    generator = np.random.default_rng(k1)
    features = generator.normal(size=(60, 6)) + 2 * generator.normal(size=(12, 6))[generator.integers(0, 12, 60)]
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    monkeypatch.setattr(reranking, "_ROWS", 7)
    found = list(reranking.similarities(features[:15].astype(np.float32), features[15:].astype(np.float32), k1, 3))
    np.testing.assert_allclose(np.concatenate(found), -np.array(slow(unit, 15, k1, 3, 0.3)), atol=1e-5)


def test_the_same_whatever_the_blocks_and_threads(monkeypatch):
    """Bit for bit, with duplicates and images at equal distances."""
    generator = np.random.default_rng(0)
    prototypes = generator.normal(size=(40, 33)).astype(np.float32)
    features = np.concatenate([prototypes[generator.integers(0, 40, 150)], generator.choice([-1, 1], (150, 33))])
    features = generator.permutation(features).astype(np.float32)

    def found(block, rows, threads):
        monkeypatch.setattr(neighbours, "BLOCK", block)
        monkeypatch.setattr(reranking, "_ROWS", rows)
        with threadpool_limits(threads):
            return list(reranking.similarities(features[:70], features[70:], 10, 4))

    expected = found(2**24, 1024, 1)
    assert [block.shape for block in expected] == [(70, 230)]
    for block, rows, threads in ((1, 1, 1), (300 * 7, 13, 1), (2**24, 1024, 2)):
        again = found(block, rows, threads)
        np.testing.assert_array_equal(np.concatenate(again), expected[0])
    assert len(found(1, 1024, 1)) == 70


def test_a_model_that_says_the_same_of_everything_is_answered_in_ties():
    found = distances(np.ones((3, 4)), np.ones((30, 4)), 5, 3, 1.0)
    np.testing.assert_array_equal(found, np.zeros((3, 30)))
    assert np.isfinite(distances(np.ones((3, 4)), np.ones((30, 4)), 5, 3, 0.3)).all()


@pytest.mark.parametrize("seed", range(3))
def test_distances_are_not_rounded(seed):
    """float64 with a BLAS against whole numbers of Python, for the longest vectors there are."""
    generator = np.random.default_rng(seed)
    features = generator.normal(size=(6, 512)).astype(np.float32)
    features *= np.float32(10 ** generator.uniform(-3, 3))
    features[3] = -features[2]
    whole = neighbours.whole(features)
    scale = np.linalg.norm(whole[0]) / np.linalg.norm(features[0].astype(np.float64))
    np.testing.assert_allclose(whole / scale, features, atol=np.linalg.norm(features, axis=1).max() * 2.0**-24)
    exact = [[sum((int(a) - int(b)) ** 2 for a, b in zip(x, y, strict=True)) for y in whole] for x in whole]
    assert [[int(d) for d in row] for row in neighbours.squared_distances(whole, whole)] == exact
    assert max(map(max, exact)) > 2**49


@given(st.data())
def test_lowest_sorts_by_value_then_position(data):
    rows, count = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 200))
    k = data.draw(st.integers(1, count))
    most = data.draw(st.sampled_from([1, 5, 1000]))
    values = np.array(data.draw(st.lists(st.integers(0, most), min_size=rows * count, max_size=rows * count)), float)
    values = values.reshape(rows, count)
    expected = [sorted(range(count), key=lambda n, row=row: (row[n], n))[:k] for row in values]
    assert neighbours.lowest(values, k).tolist() == expected


def test_refusals_say_what_to_do():
    features = np.eye(4, dtype=np.float32)
    with pytest.raises(UserError, match=r"k1 4 with 4 images .* 1 .. 3"):
        reranking.similarities(features[:2], features[2:], 4, 1)
    with pytest.raises(UserError, match=r"k2 0 with 4 images .* 1 .. 4"):
        reranking.similarities(features[:2], features[2:], 2, 0)
    with pytest.raises(UserError, match=r"lambda 1.5"):
        reranking.similarities(features[:2], features[2:], 2, 1, 1.5)
    with pytest.raises(UserError, match="0 query images"):
        reranking.similarities(features[:0], features, 2, 1)
    with pytest.raises(UserError, match="0 gallery images"):
        reranking.similarities(features, features[:0], 2, 1)
    features[3, 1] = np.nan
    with pytest.raises(UserError, match=r"1 of 2 gallery images \(first: image 1\) are not finite"):
        reranking.similarities(features[:2], features[2:], 2, 1)
