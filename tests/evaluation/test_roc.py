"""TAR, AUC and EER by hand, against scikit-learn and against slow, obvious implementations."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from sklearn.metrics import roc_auc_score, roc_curve

from ufo_ds.evaluation import roc

# Few different values: most of them tie.
SCORES = arrays.arrays(np.float32, st.integers(1, 30), elements=st.sampled_from([-1.0, -0.5, 0.0, 0.25, 0.5, 1.0]))


def joined(genuine, impostor):
    similarity = np.concatenate([np.asarray(genuine, np.float32), np.asarray(impostor, np.float32)])
    return similarity, np.arange(len(similarity)) < len(genuine)


def test_by_hand():
    similarity, same = joined([0.9, 0.6, 0.5, 0.1], [0.6, 0.5, 0.4, 0.3, 0.2])
    above = roc.impostors_above(similarity, same)
    assert above.tolist() == [0, 1, 2, 5]  # ties count against the genuine pair
    # Of 5 impostors 1 may be accepted at FAR .2 to .39, none at .19: genuine pairs with 1 or 0 above.
    assert [roc.tar_at(above, 5, far) for far in (0.19, 0.2, 0.39, 0.4, 0.99, 1.0)] == [0.25, 0.5, 0.5, 0.75, 0.75, 1]
    # Beaten are of .9 all 5; of .6 four and a tie; of .5 three and a tie; of .1 none: (5 + 4.5 + 3.5) / 20.
    assert roc.auc(similarity, same) == pytest.approx(13 / 20)
    # Thresholds .9, .6, .5 have (FAR, FRR) of (0, 3/4), (1/5, 2/4), (2/5, 1/4). Between the last two, at a share s
    # of the way, 1/5 + s/5 = 1/2 - s/4, so s = 2/3: 1/5 + 2/15.
    assert roc.eer(similarity, same) == pytest.approx(1 / 3)


@settings(derandomize=True, deadline=None, database=None)
@given(SCORES, SCORES, st.sampled_from([0.0, 0.05, 0.1, 0.25, 1 / 3, 0.5, 1.0]))
def test_tar_is_the_best_of_all_thresholds(genuine, impostor, far):
    """A threshold at every score there is and above all."""
    above = roc.impostors_above(*joined(genuine, impostor))
    thresholds = [*genuine, *impostor, 2.0]
    tars = [np.mean(genuine >= t) for t in thresholds if np.mean(impostor >= t) <= far]
    assert roc.tar_at(above, len(impostor), far) == pytest.approx(max(tars))


@settings(derandomize=True, deadline=None, database=None)
@given(SCORES, SCORES)
def test_curve_auc_and_eer_are_scikit_learns(genuine, impostor):
    similarity, same = joined(genuine, impostor)
    expected_far, expected_tar, _ = roc_curve(same, similarity, drop_intermediate=False)
    far, tar = roc.curve(similarity, same)
    np.testing.assert_allclose(far, expected_far)
    np.testing.assert_allclose(tar, expected_tar)
    assert roc.auc(similarity, same) == pytest.approx(roc_auc_score(same, similarity))
    # On the polyline of the curve, refined: where FAR and FRR are closest.
    steps = np.linspace(0, len(far) - 1, 20_001)
    fine_far, fine_tar = (np.interp(steps, np.arange(len(far)), rate) for rate in (expected_far, expected_tar))
    closest = np.argmin(np.abs(fine_far + fine_tar - 1))
    assert roc.eer(similarity, same) == pytest.approx(fine_far[closest], abs=0.01)


@settings(derandomize=True, deadline=None, database=None)
@given(SCORES, SCORES)
def test_points_of_the_plot_are_on_the_pessimistic_curve(genuine, impostor):
    above = roc.impostors_above(*joined(genuine, impostor))
    far, tar = roc.points(above, len(impostor))
    assert far[0] == 0
    assert far[-1] == tar[-1] == 1
    for one_far, one_tar in zip(far, tar, strict=True):
        assert one_tar == roc.tar_at(above, len(impostor), one_far)


def test_points_are_thinned():
    similarity, same = np.random.default_rng(0).normal(size=100_000), np.arange(100_000) % 2 == 0
    far, tar = roc.points(roc.impostors_above(similarity, same), 50_000)
    assert len(far) == len(tar) <= 256
    np.testing.assert_allclose(tar, far, atol=0.01)  # pure chance


def test_nan_counts_against_the_model():
    similarity, same = joined([np.nan, 0.5], [np.nan, 0.1])
    assert roc.impostors_above(similarity, same).tolist() == [2, 1]


def test_which_fars_can_be_measured():
    assert roc.resolved(99) == []
    assert roc.resolved(100) == [1e-1]
    assert roc.resolved(10_000) == [1e-1, 1e-2, 1e-3]
    assert roc.resolved(10_000_000) == [1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6]
    assert [roc.name_of(far) for far in roc.FARS[:2]] == ["tar@far=1e-1", "tar@far=1e-2"]


@pytest.mark.parametrize(("impostors", "far", "count"), [(15_000_000, 1e-6, 15), (3000, 1e-3, 3), (999, 1e-2, 9)])
def test_false_accepts_are_not_lost_to_rounding(impostors, far, count):
    assert roc.false_accepts(impostors, far) == count
