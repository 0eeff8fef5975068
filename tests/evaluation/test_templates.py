"""Templates by hand and against a slow, obvious implementation."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ufo_ds.data.layouts.layout import Templates
from ufo_ds.errors import UserError
from ufo_ds.evaluation import roc, templates, verification


def test_by_hand():
    features = np.array([[2, 0], [0, 4], [0, 2], [3, 0], [0, 5], [1, 1]], dtype=np.float32)
    of_images = Templates(
        template=np.array([7, 7, 7, 9, 4, 4]),
        media=np.array([1, 1, 2, 1, 5, 6]),  # medium 1 of template 9 is not that of template 7
        score=np.array([1, 0.5, 0.5, 0.1, 1, 0], dtype=np.float32),
        pairs=np.array([[7, 9, 1], [7, 4, 0], [9, 4, 0], [7, 7, 1]]),
    )
    # Template 7: medium 1 has the mean of (2, 0) and (0, 2), which is (1, 1), medium 2 has (0, 1): the sum is (1, 2).
    # Template 9: (.3, 0). Template 4: (0, 5) and an image of score 0. All of unit length:
    numbers, found = templates.template_features(features, of_images)
    assert numbers.tolist() == [4, 7, 9]
    np.testing.assert_allclose(found, [[0, 1], [5**-0.5, 2 * 5**-0.5], [1, 0]], atol=1e-6)
    outcomes = templates.outcomes(features, of_images)
    # Genuine 1/sqrt 5 and 1, impostors 2/sqrt 5 and 0.
    assert outcomes["impostors_above"].tolist() == [1, 0]
    assert outcomes["template"].tolist() == [[7, 9], [7, 7]]
    assert outcomes["impostors"].tolist() == [2]
    assert templates.metrics(outcomes) == {"tar@far=1e-4": 0.5}  # of two impostors none may be accepted


def slow_similarities(features, of_images):
    def feature(number):
        total = np.zeros(features.shape[1])
        for medium in set(of_images.media[of_images.template == number].tolist()):
            chosen = (of_images.template == number) & (of_images.media == medium)
            total += np.mean([features[i] * of_images.score[i] for i in np.flatnonzero(chosen)], axis=0)
        length = np.linalg.norm(total)
        return total / length if length > 0 else total

    return np.array([feature(a) @ feature(b) for a, b, _ in of_images.pairs])


@settings(derandomize=True, deadline=None, database=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([2, 8, 10_000]))
def test_agrees_with_the_obvious_implementation(seed, block):
    generator = np.random.default_rng(seed)
    images, count, pairs = generator.integers(5, 40), generator.integers(2, 8), generator.integers(2, 60)
    template = np.concatenate([np.arange(count), generator.integers(0, count, images)]) * 3 + 1
    # Small whole numbers: many templates are alike, so that pairs tie.
    features = generator.integers(-1, 2, (len(template), 2)).astype(np.float32)
    media, score = generator.integers(0, 3, len(template)), generator.choice([0.5, 1.0], len(template))
    same = np.concatenate([[0, 1], generator.integers(0, 2, pairs)])
    chosen = np.column_stack([generator.choice(template, (len(same), 2)), same])
    of_images = Templates(template, media, score.astype(np.float32), chosen)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verification, "_BLOCK", block)
        found = templates.outcomes(features, of_images)
    similarity = slow_similarities(features, of_images)
    genuine, impostor = similarity[same == 1], similarity[same == 0]
    # Ties are exact in neither implementation.
    low, high = ((impostor >= genuine[:, None] + margin).sum(1) for margin in (1e-5, -1e-5))
    assert np.all((low <= found["impostors_above"]) & (found["impostors_above"] <= high))
    assert found["impostors"].tolist() == [len(impostor)]


def of_single_images(same, degrees_of_first, degrees_of_second):
    """A template for each image, and pairs of an image of the first with one of the second."""
    angles = np.radians(np.concatenate([degrees_of_first, degrees_of_second]))
    features, count = np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32), len(same)
    pairs = np.column_stack([np.arange(count), np.arange(count, 2 * count), same])
    return features, Templates(np.arange(2 * count), np.zeros(2 * count, int), np.ones(2 * count, np.float32), pairs)


def test_tar_at_every_far_that_can_be_measured():
    generator = np.random.default_rng(0)
    same = np.arange(20_200) < 200
    angles = np.where(same, generator.normal(0, 40, len(same)), generator.uniform(-180, 180, len(same)))
    outcomes = templates.outcomes(*of_single_images(same, np.zeros(len(same)), angles))
    metrics = templates.metrics(outcomes)
    assert list(metrics) == ["tar@far=1e-1", "tar@far=1e-2", "tar@far=1e-3", "tar@far=1e-4"]
    cosine = np.cos(np.radians(angles))
    for far in roc.FARS[:4]:
        threshold = np.sort(cosine[~same])[::-1][round(far * 20_000) - 1]
        assert metrics[roc.name_of(far)] == pytest.approx(np.mean(cosine[same] >= threshold), abs=0.011)
    scores, items = templates.items(outcomes)
    assert scores @ items.weight == pytest.approx(metrics[templates.MAIN_METRIC])
    assert templates.chance(outcomes) == pytest.approx({roc.name_of(far): far for far in roc.FARS[:4]})


def test_a_model_that_says_the_same_of_everything_accepts_nobody():
    same = np.arange(2000) < 1000
    features, of_images = of_single_images(same, np.zeros(2000), np.zeros(2000))
    assert set(templates.evaluate(features, of_images).values()) == {0.0}
    assert set(templates.evaluate(0 * features, of_images).values()) == {0.0}


def test_clusters_are_the_identities_that_genuine_pairs_tell():
    """Templates 1, 2 and 3 are one person, since 1 is 2 and 2 is 3; 5 and 6 are another."""
    outcomes = {
        "impostors_above": np.array([0, 3, 0, 1]),
        "template": np.array([[1, 2], [5, 6], [3, 2], [6, 6]]),
        "impostors": np.array([10]),
    }
    scores, items = templates.items(outcomes)
    assert scores.tolist() == [1, 0, 1, 0]
    cluster = items.cluster[:, 0]
    assert cluster[0] == cluster[2] != cluster[1] == cluster[3]


def test_refuses_bad_input():
    features, of_images = of_single_images(np.array([True, False]), np.zeros(2), np.ones(2))
    with pytest.raises(UserError, match="2 genuine and 0 impostor pairs"):
        templates.outcomes(*of_single_images(np.array([True, True]), np.zeros(2), np.ones(2)))
    bad = features.copy()
    bad[3] = np.nan
    with pytest.raises(UserError, match="1 of 4 images are NaN or infinite, the first of image 3"):
        templates.outcomes(bad, of_images)
    for unknown in (99, -1):
        of_images.pairs[1, 1] = unknown
        with pytest.raises(UserError, match=f"template {unknown} of the pairs has no image"):
            templates.outcomes(features, of_images)
