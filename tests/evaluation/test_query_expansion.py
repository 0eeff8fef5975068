import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ufo_ds.errors import UserError
from ufo_ds.evaluation import neighbours
from ufo_ds.evaluation.query_expansion import expand


def unit(features):
    return features / np.linalg.norm(features, axis=-1, keepdims=True)


def test_by_hand():
    # Query (1, 0); gallery (.6, .8), (.8, .6), (-1, 0), any length. The two nearest have cosines .8 and .6.
    query, gallery = np.array([[3.0, 0.0]]), np.array([[1.2, 1.6], [0.8, 0.6], [-5.0, 0.0]])
    # alpha 0: (1, 0) + (.8, .6) + (.6, .8) = (2.4, 1.4), of length sqrt(7.72)
    np.testing.assert_allclose(expand(query, gallery, 2, 0), [np.array([2.4, 1.4]) / np.sqrt(7.72)], rtol=1e-6)
    # alpha 2: (1, 0) + .64 (.8, .6) + .36 (.6, .8) = (1.728, .672)
    np.testing.assert_allclose(expand(query, gallery, 2, 2), [unit(np.array([1.728, 0.672]))], rtol=1e-6)
    # The third has the cosine -1, which counts as 0, unless all count the same.
    np.testing.assert_array_equal(expand(query, gallery, 3, 1.5), expand(query, gallery, 2, 1.5))
    np.testing.assert_allclose(expand(query, gallery, 3, 0), [unit(np.array([1.4, 1.4]))], rtol=1e-6)


@given(st.data())
def test_agrees_with_the_obvious_implementation(data):
    """Signs in 4 dimensions: cosines are exact multiples of 1/2, so there are many ties."""
    signs = st.lists(st.sampled_from([-1.0, 1.0]), min_size=4, max_size=4)
    query = np.array(data.draw(st.lists(signs, min_size=1, max_size=5)), dtype=np.float32)
    gallery = np.array(data.draw(st.lists(signs, min_size=1, max_size=30)), dtype=np.float32)
    k, alpha = data.draw(st.integers(1, len(gallery))), data.draw(st.sampled_from([0, 0.5, 3]))
    expected = []
    for q in unit(query):
        cosines = [q @ g for g in unit(gallery)]
        nearest = sorted(range(len(gallery)), key=lambda n: (-cosines[n], n))[:k]
        total = q + sum(max(0, cosines[n]) ** alpha * unit(gallery[n]) for n in nearest)
        expected.append(total / max(np.linalg.norm(total), 1e-12))
    found = expand(query, gallery, k, alpha)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_the_same_whatever_the_blocks(monkeypatch):
    generator = np.random.default_rng(0)
    query, gallery = (generator.normal(size=(n, 65)).astype(np.float32) for n in (50, 300))
    expected = expand(query, gallery, 7, 3)
    monkeypatch.setattr(neighbours, "BLOCK", 1)
    np.testing.assert_array_equal(expand(query, gallery, 7, 3), expected)


def test_refusals_say_what_to_do():
    features = np.eye(3, dtype=np.float32)
    for k in (0, 4):
        with pytest.raises(UserError, match=rf"k {k} with 3 gallery images: use one of 1 .. 3"):
            expand(features, features, k, 1)
    for alpha in (-1, np.nan, np.inf):
        with pytest.raises(UserError, match=f"alpha {alpha}"):
            expand(features, features, 1, alpha)
    with pytest.raises(UserError, match="0 gallery images"):
        expand(features, features[:0], 1, 1)
    with pytest.raises(UserError, match="1 of 3 query images"):
        expand(np.where(np.eye(3) * [0, 1, 0] == 1, np.inf, features), features, 1, 1)
