"""VehicleID's protocol: a random gallery of one image per identity."""

import numpy as np
import pytest

from tests.evaluation.vectors import cosine, on_circle, signs
from ufo_ds.errors import UserError
from ufo_ds.evaluation import random_gallery


def test_known_answer():
    # Identity 1 at 0 and 0 degrees, 2 at 90 and 90, 3 alone at 40, junk at 0. Whichever are drawn the gallery is
    # 0, 90, 40; the queries are at 0 and 90: 1 first both times. With 3 at 0 too it ties with 1: rank 2 and 1.
    ids = np.array([1, 2, 3, 1, 2, -1])
    found = random_gallery.outcomes(on_circle(0, 90, 40, 0, 90, 0), ids, draws=3)
    assert found["first_rank"].tolist() == 6 * [1]
    assert found["draw"].tolist() == [0, 0, 1, 1, 2, 2]
    assert found["gallery"].tolist() == [3]
    found = random_gallery.outcomes(on_circle(0, 90, 0, 0, 90, 0), ids, draws=3)
    assert found["first_rank"][found["identity"] == 1].tolist() == 3 * [2]
    assert random_gallery.metrics(found) == {"mAP": 0.75, "rank1": 0.5, "rank5": 1.0, "mAP_std": 0.0, "rank1_std": 0.0}
    # Three images: H_3 / 3 = 11/18.
    assert random_gallery.chance(found) == pytest.approx({"mAP": 11 / 18, "rank1": 1 / 3, "rank5": 1})


def test_agrees_with_the_obvious_implementation():
    """The galleries are read off the queries that are missing."""
    generator = np.random.default_rng(0)
    features, ids = signs(generator, 50), generator.integers(-1, 8, 50)
    ids[7] = 99  # alone
    found = random_gallery.outcomes(features, ids, draws=4)
    precision, first = [], []
    galleries = set()
    for draw in range(4):
        query = found["query"][found["draw"] == draw]
        gallery = [i for i in range(50) if ids[i] != -1 and i not in query]
        galleries.add(tuple(gallery))
        assert sorted(ids[gallery]) == sorted(set(ids.tolist()) - {-1})
        ranks = []
        for q in query:
            order = sorted((-cosine(features[q], features[g]), bool(ids[g] == ids[q])) for g in gallery)
            ranks.append([right for _, right in order].index(True) + 1)
        precision.append(np.mean([1 / rank for rank in ranks]))
        first.append([np.mean([rank <= k for rank in ranks]) for k in (1, 5)])
    assert len(galleries) == 4
    first = np.array(first)
    assert random_gallery.metrics(found) == pytest.approx(
        {
            "mAP": np.mean(precision), "rank1": first[:, 0].mean(), "rank5": first[:, 1].mean(),
            "mAP_std": np.std(precision), "rank1_std": first[:, 0].std(),
        }
    )  # fmt: skip
    scores, items = random_gallery.items(found)
    assert scores @ items.weight == pytest.approx(np.mean(precision))
    np.testing.assert_array_equal(items.cluster[:, 0], ids[found["query"]])


def test_draws_are_alike_for_a_seed_and_evenly_drawn():
    features, ids = signs(np.random.default_rng(1), 12), np.repeat([3, 5, 7], 4)
    one, more, other = (
        random_gallery.outcomes(features, ids, draws, seed) for draws, seed in ((2, 0), (400, 0), (2, 1))
    )
    np.testing.assert_array_equal(one["query"], more["query"][: len(one["query"])])
    assert (one["query"] != other["query"]).any()
    # Each image is in the gallery of one draw in four: 100 +- 8.7 of 400.
    in_gallery = 400 - np.bincount(more["query"])
    assert (np.abs(in_gallery - 100) < 45).all()


@pytest.mark.parametrize(
    ("features", "ids", "message"),
    [
        (on_circle(), [], "0 query images"),
        (on_circle(0, 1, 2), [1, 2, -1], "none of the 2 identities has two images"),
        (on_circle(0, 1), [-1, -1], "none of the 0 identities"),
        (on_circle(0, np.nan, 1), [1, 1, 2], "1 of 3 query features are NaN"),
    ],
)
def test_refuses(features, ids, message):
    with pytest.raises(UserError, match=message) as error:
        random_gallery.outcomes(features, np.array(ids, dtype=int))
    assert "\n" not in str(error.value)
