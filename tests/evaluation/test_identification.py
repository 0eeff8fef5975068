"""Identification, closed and open set."""

import faiss
import numpy as np
import pytest

from tests.evaluation.vectors import cosine, on_circle
from ufo_ds.errors import UserError
from ufo_ds.evaluation import identification, retrieval


def test_known_answer():
    # Templates: identity 4 of images at 0 and 20 degrees, one of them three times as long: at 10; 5 at 50; 6 at 90.
    gallery, gallery_ids = on_circle(90, 0, 50, 20, 12), np.array([6, 4, 5, 4, -1])
    gallery[3] *= 3
    # Probes: 4 at 10: first. 5 at 75: 6 is 15 away, 5 is 25: second. Without a mate: 9 at 40, 10 from 5.
    found = identification.outcomes(on_circle(10, 75, 40), np.array([4, 5, 9]), gallery, gallery_ids)
    assert {name: array.tolist() for name, array in found.items()} == {
        "probe": [0, 1], "identity": [4, 5], "first_rank": [1, 2],
        "unmated_above": [0, 1],  # cos 10 of the probe without a mate is above cos 25 and below cos 0
        "unmated": [1], "gallery": [3],
    }  # fmt: skip
    assert identification.metrics(found) == {"rank1": 0.5, "rank5": 1.0, "rank10": 1.0}
    assert identification.chance(found) == pytest.approx({"rank1": 1 / 3, "rank5": 1, "rank10": 1})
    scores, items = identification.items(found)
    assert scores @ items.weight == 0.5
    np.testing.assert_array_equal(items.cluster, [[4], [5]])


def test_ties_are_wrong():
    same = np.tile(np.random.default_rng(0).normal(size=64).astype(np.float32), (40, 1))
    found = identification.outcomes(same, np.arange(40) % 25, same[:20], np.arange(20))
    assert (found["first_rank"] == 20).all()


def slow_tpir(similarity_PT, ids, identities, rate):
    mated = np.isin(ids, identities)
    best = similarity_PT.max(axis=1)
    rates = []
    for threshold in np.append(best, np.inf):  # the lowest threshold that lets few enough through is one of these
        if np.sum(best[~mated] >= threshold) <= rate * np.sum(~mated):
            right = identities[similarity_PT.argmax(axis=1)] == ids
            rates.append(np.mean((right & (best >= threshold))[mated]))
    return max(rates)


def test_open_set_agrees_with_trying_all_thresholds():
    generator = np.random.default_rng(3)
    centres = generator.normal(size=(60, 16))
    gallery_ids, ids = np.repeat(np.arange(30), 2), generator.integers(0, 60, 2200)
    gallery = (centres[gallery_ids] + generator.normal(size=(60, 16))).astype(np.float32)
    probe = (centres[ids] + generator.normal(size=(2200, 16))).astype(np.float32)
    unit = gallery / np.linalg.norm(gallery, axis=1, keepdims=True)
    templates = unit[0::2] + unit[1::2]
    similarity_PT = np.array([[cosine(p, t) for t in templates] for p in probe])
    result = identification.evaluate(probe, ids, gallery, gallery_ids)
    for rate in (0.01, 0.1):
        expected = slow_tpir(similarity_PT, ids, np.arange(30), rate)
        assert 0 < expected < 1
        assert result[f"tpir@fpir={rate}"] == pytest.approx(expected)
    few = identification.evaluate(probe[:300], ids[:300], gallery, gallery_ids)  # about 150 without a mate
    assert set(few) == {"rank1", "rank5", "rank10", "tpir@fpir=0.1"}


def test_closed_set_agrees_with_faiss():
    generator = np.random.default_rng(4)
    gallery, ids = generator.normal(size=(80, 16)).astype(np.float32), generator.permutation(80)
    probe, probe_ids = gallery + generator.normal(size=(80, 16)).astype(np.float32), ids
    index = faiss.IndexFlatIP(16)
    index.add(retrieval.normalise(gallery))
    _, top_PK = index.search(retrieval.normalise(probe), 10)
    hit_PK = ids[top_PK] == probe_ids[:, None]
    expected = {f"rank{k}": hit_PK[:, :k].any(axis=1).mean() for k in (1, 5, 10)}
    assert identification.evaluate(probe, probe_ids, gallery, ids) == pytest.approx(expected)
    assert expected["rank1"] < 1


@pytest.mark.parametrize(
    ("probe", "probe_ids", "gallery", "gallery_ids", "message"),
    [
        (on_circle(), [], on_circle(0), [1], "0 query images"),
        (on_circle(0), [1], on_circle(), [], "0 gallery images"),
        (on_circle(0, 1), [1, -1], on_circle(0, 1), [2, -1], "none of the 2 probes .* 1 identities"),
        (on_circle(0), [1], on_circle(0, np.nan, np.nan), [1, 1, 2], "2 of 3 gallery features are NaN"),
        (on_circle(np.nan), [1], on_circle(0), [1], "1 of 1 query features are NaN"),
    ],
)
def test_refuses(probe, probe_ids, gallery, gallery_ids, message):
    with pytest.raises(UserError, match=message) as error:
        identification.outcomes(probe, np.array(probe_ids, dtype=int), gallery, np.array(gallery_ids, dtype=int))
    assert "\n" not in str(error.value)
