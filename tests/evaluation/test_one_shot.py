"""N-way one-shot classification."""

import numpy as np
import pytest

from tests.evaluation.vectors import on_circle
from ufo_ds.errors import UserError
from ufo_ds.evaluation import one_shot


def test_known_answer():
    # Identity 1 at 0 and 10 degrees, 2 at 90 and 100, 3 alone at 7: the query at 0 of 1 with its support at 10 loses
    # to 3 where 3 is drawn (7 < 10), and the query at 10 with its support at 0 too (3 < 10); those of 2 win.
    features, ids = on_circle(0, 10, 90, 100, 7), np.array([1, 1, 2, 2, 3])
    found = one_shot.outcomes(features, ids, ways=3, episodes=200)
    assert found["episode"].tolist() == list(range(200))
    assert set(found["identity"].tolist()) == {1, 2}
    np.testing.assert_array_equal(found["right"], found["identity"] == 2)
    assert one_shot.metrics(found) == {"accuracy": np.mean(found["identity"] == 2)}
    assert one_shot.chance(found) == {"accuracy": pytest.approx(1 / 3)}
    # The identity and its image are drawn evenly: 50 +- 6.1 of 200 each.
    assert (np.abs(np.bincount(found["query"], minlength=5)[:4] - 50) < 31).all()
    # Of two ways the other identity of 1 is 3 one time in two.
    won = one_shot.outcomes(features, ids, ways=2, episodes=400)
    assert abs(won["right"][won["identity"] == 1].mean() - 0.5) < 0.18
    scores, items = one_shot.items(won)
    assert scores @ items.weight == pytest.approx(one_shot.metrics(won)["accuracy"])
    np.testing.assert_array_equal(items.cluster, won["identity"][:, None])


def test_ties_are_wrong_and_perfect_features_right():
    generator = np.random.default_rng(0)
    ids = generator.integers(-1, 30, 300)
    same = np.tile(generator.normal(size=512).astype(np.float32), (300, 1))
    assert one_shot.evaluate(same, ids, episodes=50) == {"accuracy": 0.0}
    assert one_shot.evaluate(np.eye(31, dtype=np.float32)[ids], ids, episodes=50) == {"accuracy": 1.0}


def test_noise_is_at_chance():
    generator = np.random.default_rng(1)
    features, ids = generator.normal(size=(3000, 8)), generator.integers(0, 1000, 3000)
    assert abs(one_shot.evaluate(features, ids, ways=4, episodes=1000)["accuracy"] - 0.25) < 0.07  # 5 deviations


def test_episodes_are_alike_for_a_seed():
    generator = np.random.default_rng(2)
    features, ids = generator.normal(size=(200, 8)), generator.integers(0, 40, 200)
    few, more, other = (one_shot.outcomes(features, ids, 20, n, seed) for n, seed in ((20, 0), (50, 0), (20, 1)))
    np.testing.assert_array_equal(few["query"], more["query"][:20])
    np.testing.assert_array_equal(few["right"], more["right"][:20])
    assert (few["query"] != other["query"]).any()


@pytest.mark.parametrize(
    ("features", "ids", "ways", "message"),
    [
        (on_circle(), [], 2, "0 query images"),
        (on_circle(0, 1, 2), [1, 1, 1], 20, "20 ways with 1 identities"),
        (on_circle(0, 1, 2), [1, 1, 2], 1, "1 ways with 2 identities"),
        (on_circle(0, 1, 2), [1, 2, -1], 2, "none of the 2 identities has two images"),
        (on_circle(0, np.nan, 2), [1, 1, 2], 2, "1 of 3 image features are NaN"),
    ],
)
def test_refuses(features, ids, ways, message):
    with pytest.raises(UserError, match=message) as error:
        one_shot.outcomes(features, np.array(ids, dtype=int), ways)
    assert "\n" not in str(error.value)
