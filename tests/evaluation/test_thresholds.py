"""Thresholds and their intervals by hand and by simulation, calibration against known log odds, pairs against loops."""

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats

from benchmarks.threshold_intervals import Design, coverage
from ufo_ds.errors import UserError
from ufo_ds.evaluation import thresholds
from ufo_ds.evaluation.thresholds import Probability


def independent(genuine, impostor):
    """Pairs that share no identity."""
    similarity = np.concatenate([np.asarray(genuine, np.float32), np.asarray(impostor, np.float32)])
    count = len(similarity)
    same = np.arange(count) < len(genuine)
    return similarity, same, np.stack([np.arange(count), np.where(same, 0, count) + np.arange(count)], axis=1)


def test_threshold_by_hand():
    # Of 200 impostors, at 0, .005, ..., .995, FAR .05 accepts the 10 highest: from .95 on.
    genuine = [0.2, 0.94, 0.95, 0.96, 0.97, 0.98, 0.99, 1, 1, 1]
    found = thresholds.choose(*independent(genuine, np.arange(200) / 200), far=0.05)
    assert (found.far, found.expected_far, found.tar) == (0.05, 0.05, 0.8)
    assert found.threshold == np.float32(0.95)  # to the last bit: that pair is among the accepted
    assert (found.impostors, found.genuine, found.identities) == (200, 10, 410)
    # Nearly Jeffreys' for 10 of 200 and 8 of 10, a little wider.
    exact = stats.beta.ppf([0.025, 0.975], 10.5, 190.5)
    assert exact[0] * 0.8 < found.far_interval[0] < exact[0]
    assert exact[1] < found.far_interval[1] < exact[1] * 1.2
    assert found.tar_interval == pytest.approx(stats.beta.ppf([0.025, 0.975], 8.5, 2.5), abs=0.08)


def test_interval_by_hand():
    """Four identities with two pairs each; of one identity both are wrong."""
    wrong, identity = np.array([1, 1, 0, 0, 0, 0, 0, 0], bool), np.array([[0], [0], [1], [1], [2], [2], [3], [3]])
    # p = 1/4. Without the first identity it is 0, without another 1/3: changes of 1/4 and three times 1/12.
    # V = 3/4 (1/16 + 3/144) = 1/16; p (1 - p) / V = 3.
    # q = 1/16, 1/144 (three times): sum 1/12, of squares 7/1728; f = 2 / 144 / (7/1728 - 1/576) = 6, but at most 3.
    found = thresholds.rate(wrong, identity)
    assert (found.value, found.effective) == (0.25, pytest.approx(3))
    m = 3 * (1.959964 / 3.182446) ** 2
    assert found.interval == pytest.approx(stats.beta.ppf([0.025, 0.975], m / 4 + 0.5, 3 * m / 4 + 0.5), rel=1e-5)
    # A rate that was chosen has half of the 6.
    assert thresholds.rate(wrong, identity, chosen=True) == found


def test_a_chosen_rate_has_half_the_degrees_of_freedom():
    """Five identities with one pair each, one of them wrong."""
    wrong, identity = np.array([1, 0, 0, 0, 0], bool), np.arange(5)[:, None]
    # p = 1/5; changes 1/5 and four times 1/20; V = 4/5 (1/25 + 4/400) = 1/25; p (1 - p) / V = 4.
    # q = 1/25, 1/400 (four times): sum 1/20, of squares 13/8000; f = 2/400 / (13/8000 - 1/2000) = 40/9, but at most 4.
    assert thresholds.rate(wrong, identity).effective == pytest.approx(4)
    for chosen, t in ((False, 2.776445), (True, stats.t.ppf(0.975, 20 / 9))):
        m = 4 * (1.959964 / t) ** 2
        expected = stats.beta.ppf([0.025, 0.975], m / 5 + 0.5, 4 * m / 5 + 0.5)
        assert thresholds.rate(wrong, identity, chosen).interval == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("wrong", [False, True])
def test_without_any_error_each_identity_counts_once(wrong):
    found = thresholds.rate(np.full(40, wrong), np.arange(40)[:, None] // 2)
    assert found.effective == 20
    low, high = found.interval if not wrong else (1 - found.interval[1], 1 - found.interval[0])
    assert low == 0
    m = 20 * (1.959964 / 2.093024) ** 2  # t of 19
    assert high == pytest.approx(stats.beta.ppf(0.975, 0.5, m + 0.5), rel=1e-5)


def test_pairs_that_share_identities_say_less():
    generator = np.random.default_rng(0)
    similarity, same, identity = Design("all", 100, 0.3, 0.01).draw(generator)
    found = thresholds.choose(similarity, same, identity, 0.01)
    apart = np.stack([np.arange(len(same)), np.where(same, 0, len(same)) + np.arange(len(same))], axis=1)
    blind = thresholds.choose(similarity, same, apart, 0.01)
    assert found.threshold == blind.threshold
    assert math.log(found.far_interval[1] / found.far_interval[0]) > 1.5 * math.log(
        blind.far_interval[1] / blind.far_interval[0]
    )


def test_images_of_a_genuine_pair_are_of_one_identity():
    """Every image its own number: with all genuine pairs listed it is as if identities were told."""
    generator = np.random.default_rng(1)
    design = Design("images", 40, 0.3, 0.05)
    similarity, same, identity = design.draw(generator)
    _, image, _ = design.pairs_of_identities(generator)
    told = thresholds.choose(similarity, same, identity, 0.05)
    assert thresholds.choose(similarity, same, image, 0.05) == told
    assert told.identities == 40


@pytest.mark.parametrize(
    "design", [Design("all", 60, 0.3, 0.05), Design("folds", 60, 0.3, 0.05), Design("images", 40, 0.3, 0.05)]
)
def test_intervals_hold_the_truth(design):
    """Wide bounds: 200 draws of an interval of 95% are 0.90 to 0.99 but once in a thousand."""
    found = coverage(design, 200, np.random.default_rng(0))
    assert found.refused < 0.1
    assert 0.9 <= found.far <= 0.99
    assert 0.9 <= found.tar <= 0.995
    assert found.independent < 0.9  # which they would not if pairs counted as independent


@settings(derandomize=True, deadline=None, database=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.05, 0.1, 1 / 3, 0.5]), st.sampled_from([10, 50, 1000]))
def test_threshold_is_the_lowest_that_keeps_the_far(seed, far, values):
    generator = np.random.default_rng(seed)
    similarity = generator.integers(0, values, 630).astype(np.float32) / values  # many tie
    same, identity = np.arange(630) < 30, generator.integers(0, 400, (630, 2))
    impostor = similarity[~same]
    lowest = min((t for t in np.unique(impostor) if np.mean(impostor >= t) <= far), default=2)
    assume(np.sum(impostor >= lowest) >= 10)
    found = thresholds.choose(similarity, same, identity, far)
    assert found.threshold == lowest
    assert found.expected_far == np.mean(impostor >= lowest)
    assert found.tar == pytest.approx(np.mean(similarity[same] >= lowest))
    assert found.far_interval[0] <= found.expected_far <= found.far_interval[1]
    assert found.tar_interval[0] <= found.tar <= found.tar_interval[1]


def test_refuses_what_the_pairs_cannot_support():
    similarity, same, identity = independent(np.ones(10), np.arange(500) / 500)
    with pytest.raises(UserError, match=r"0\.001 needs 10000 impostor pairs, .* there are 500"):
        thresholds.choose(similarity, same, identity, 0.001)
    # The same two identities again and again: their pairs are alike.
    lambs = np.where(same[:, None], identity, np.where(similarity[:, None] > 0.9, [0, 1], identity))
    with pytest.raises(UserError, match=r"500 impostor pairs share \d+ identities and count as \d+ independent"):
        thresholds.choose(similarity, same, lambs, 0.02)
    with pytest.raises(UserError, match="more than 50 of 500 impostor pairs share the highest"):
        thresholds.choose(np.where(same, 1, 0.3), same, identity, 0.1)
    with pytest.raises(UserError, match="all 10 pairs are of one identity"):
        thresholds.choose(similarity, same, np.where(same[:, None], 7, identity), 0.1)
    for far in (0, 1, -0.1, 5, math.nan):
        with pytest.raises(UserError, match="between 0 and 1"):
            thresholds.choose(similarity, same, identity, far)
    with pytest.raises(UserError, match="0 genuine and 500 impostor pairs"):
        thresholds.choose(similarity[~same], same[~same], identity[~same], 0.1)
    similarity[3] = math.nan
    with pytest.raises(UserError, match="1 of 510 pairs have the similarity NaN"):
        thresholds.choose(similarity, same, identity, 0.1)
    with pytest.raises(UserError, match="NaN"):
        thresholds.calibrate(similarity, same)


def normals(count, genuine_share, seed=0):
    """Normals of the same variance: the log odds are linear, here 2 s where both kinds are as frequent."""
    generator = np.random.default_rng(seed)
    same = generator.random(count) < genuine_share
    return np.where(same, 1, -1) + generator.normal(size=count), same


def test_calibration_finds_known_log_odds():
    """N(1, 1) against N(-1, 1): the log of the densities' ratio is ((s + 1)^2 - (s - 1)^2) / 2 = 2 s."""
    found = thresholds.calibrate(*normals(100_000, 0.1))
    assert found.slope == pytest.approx(2, abs=0.05)
    assert found.intercept == pytest.approx(0, abs=0.05)
    assert Probability(2, 0).of(0.5) == pytest.approx(1 / (1 + math.exp(-1)))
    # Odds of 1 to 9 before: e / 9 after.
    assert Probability(2, 0).of(0.5, prior=0.1) == pytest.approx(math.e / 9 / (1 + math.e / 9))


@pytest.mark.parametrize("prior", [0.1, 0.5])
def test_probabilities_are_shares(prior):
    found = thresholds.calibrate(*normals(50_000, 0.3))
    similarity, same = normals(200_000, prior, seed=1)
    probability = found.of(similarity, prior)
    for low in np.arange(0, 1, 0.1):
        chosen = (probability >= low) & (probability < low + 0.1)
        assert np.mean(same[chosen]) == pytest.approx(np.mean(probability[chosen]), abs=0.03)


def test_calibration_of_pairs_none_of_which_is_in_doubt():
    similarity = np.linspace(-0.1, 0.9, 1000, dtype=np.float32)
    found = thresholds.calibrate(similarity, similarity > 0.4)
    assert np.isfinite([found.slope, found.intercept]).all()
    probability = found.of(similarity)
    assert np.all(np.diff(probability) > 0)
    assert found.of(0.4) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("sign", [-1, 0])
def test_refuses_to_calibrate_what_does_not_tell(sign):
    similarity, same = normals(1000, 0.5)
    with pytest.raises(UserError, match=r"genuine pairs are not more similar than the \d+ impostor pairs"):
        thresholds.calibrate(sign * similarity, same)


def images(generator, count):
    features = generator.normal(size=(count, 3)).astype(np.float32)
    return features, generator.integers(-1, 5, count), generator.integers(-1, 3, count)


def rows(pairs):
    similarity, same, identity = pairs
    table = zip(similarity.round(5).tolist(), same.tolist(), map(tuple, identity.tolist()), strict=True)
    return sorted(table)


def slow_pairs(query, query_ids, query_cameras, gallery, gallery_ids, gallery_cameras):
    found = []
    for a, one in enumerate(query):
        for b, other in enumerate(gallery):
            cosine = one @ other / np.linalg.norm(one) / np.linalg.norm(other)
            same = query_ids[a] == gallery_ids[b]
            camera = same and query_cameras[a] == gallery_cameras[b] != -1
            if -1 not in (query_ids[a], gallery_ids[b]) and not camera:
                found.append((cosine, same, (query_ids[a], gallery_ids[b])))
    similarity, same, identity = zip(*found, strict=True)
    return np.array(similarity, np.float32), np.array(same), np.array(identity)


@pytest.mark.parametrize("seed", range(5))
def test_pairs_of_retrieval_are_all_there_are(seed, monkeypatch):
    generator = np.random.default_rng(seed)
    arguments = *images(generator, 12), *images(generator, 40)
    expected = slow_pairs(*arguments)
    for block in (2**20, 7):
        monkeypatch.setattr(thresholds, "_BLOCK", block)
        found = thresholds.pairs_of(*arguments)
        np.testing.assert_allclose(
            np.array([row[0] for row in rows(found)]), np.array([row[0] for row in rows(expected)]), atol=2e-5
        )
        assert sorted(map(tuple, found[2].tolist())) == sorted(map(tuple, expected[2].tolist()))
        np.testing.assert_array_equal(found[1], found[2][:, 0] == found[2][:, 1])


def test_pairs_of_retrieval_are_drawn_by_seed(monkeypatch):
    monkeypatch.setattr(thresholds, "_BLOCK", 100)
    generator = np.random.default_rng(0)
    arguments = *images(generator, 50), *images(generator, 60)
    everything = set(rows(thresholds.pairs_of(*arguments)))
    found = thresholds.pairs_of(*arguments, limit=150)
    assert found[1].sum() == 150
    assert 80 < (~found[1]).sum() < 150  # pairs of one identity and of junk were drawn too, and left out
    assert len(set(rows(found))) == len(found[0])
    assert set(rows(found)) <= everything
    assert rows(found) == rows(thresholds.pairs_of(*arguments, limit=150))
    assert rows(found) != rows(thresholds.pairs_of(*arguments, limit=150, seed=1))


def test_each_genuine_pair_is_drawn_as_often(monkeypatch):
    """Over seeds: early blocks and late ones."""
    monkeypatch.setattr(thresholds, "_BLOCK", 8)
    features = np.ones((40, 1), np.float32) * np.arange(1, 41)[:, None]
    features = np.concatenate([features, np.ones((40, 1), np.float32)], axis=1).astype(np.float32)
    one, camera = np.zeros(1, int), np.zeros(40, int) - 1
    arguments = features[:1], one, camera[:1], features, np.zeros(40, int), camera
    cosines = thresholds.pairs_of(*arguments)[0]
    drawn = np.concatenate([thresholds.pairs_of(*arguments, limit=10, seed=seed)[0] for seed in range(400)])
    counts = np.array([np.sum(drawn == cosine) for cosine in cosines])
    assert counts.sum() == 4000
    assert stats.chisquare(counts).pvalue > 0.001


def test_pairs_refuse_nan():
    generator = np.random.default_rng(0)
    query, gallery = images(generator, 5), images(generator, 6)
    gallery[0][2] = np.nan
    with pytest.raises(UserError, match="gallery: the features of 1 of 6 images"):
        thresholds.pairs_of(*query, *gallery)
