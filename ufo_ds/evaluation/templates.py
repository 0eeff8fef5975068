"""Sets of images compared as one: 1:1 verification of IJB-B and IJB-C (Whitelam et al., 2017; Maze et al., 2018).

The feature of a template is that of eval_ijbc.py in insightface's arcface_torch with its default settings: features as
the model gives them, not normalised, times the score of the face detector; the mean over the images of one medium; the
sum over media; normalised at last. Two templates are compared by the dot product.

TAR at a FAR is pessimistic with ties and never of a threshold with a higher FAR (``roc.py``); insightface takes the
point of the curve whose FAR is nearest, be it higher: with IJB's millions of pairs the two differ in the last digit.
"""

from collections.abc import Mapping

import numpy as np
from scipy.sparse import csr_array

from ufo_ds.data.layouts.layout import Templates
from ufo_ds.errors import UserError
from ufo_ds.evaluation import roc
from ufo_ds.evaluation.retrieval import normalise
from ufo_ds.evaluation.statistics import Items, joined
from ufo_ds.evaluation.verification import check_finite, similarities

MAIN_FAR = 1e-4
MAIN_METRIC = roc.name_of(MAIN_FAR)


def evaluate(features: np.ndarray, templates: Templates) -> dict[str, float]:
    """TAR at each FAR: :func:`metrics` of :func:`outcomes`."""
    return metrics(outcomes(features, templates))


def outcomes(features: np.ndarray, templates: Templates) -> dict[str, np.ndarray]:
    """How many impostor pairs score as high as each genuine pair.

    Args:
        features: float32 [N, D] of the images, as the model gives them; with flip, averaged with their mirror images'.
        templates: of the same images.

    Returns:
        Of the G genuine pairs: ``impostors_above``, int [G], impostor pairs that score as high or higher;
        ``template``, int [G, 2], the two templates' numbers. ``impostors``: int [1], how many there are.

    Raises:
        UserError: a template of a pair without any image, pairs of only one kind, or a feature that is NaN or infinite.
    """
    first, second, same = templates.pairs[:, 0], templates.pairs[:, 1], templates.pairs[:, 2] == 1
    if same.all() or not same.any():
        raise UserError(
            f"templates: {int(same.sum())} genuine and {int((~same).sum())} impostor pairs; a rate of true accepts at "
            f"one of false accepts needs both: check the benchmark's pairs of templates"
        )
    numbers, features_TD = template_features(features, templates)
    rows_M2 = np.minimum(np.searchsorted(numbers, templates.pairs[:, :2]), len(numbers) - 1)
    missing = templates.pairs[:, :2][numbers[rows_M2] != templates.pairs[:, :2]]
    if missing.size:
        raise UserError(f"templates: template {missing[0]} of the pairs has no image: make the shards again")
    similarity = similarities(features_TD, features_TD, *rows_M2.T)
    return {
        "impostors_above": roc.impostors_above(similarity, same),
        "template": np.stack([first[same], second[same]], axis=1),
        "impostors": np.array([len(same) - int(same.sum())]),
    }


def template_features(features: np.ndarray, templates: Templates) -> tuple[np.ndarray, np.ndarray]:
    """The templates' numbers, ascending, int [T], and their features of unit length, float32 [T, D].

    Raises:
        UserError: a feature that is NaN or infinite.
    """
    check_finite(features, np.arange(len(features)), "templates")
    numbers, template_N = np.unique(templates.template, return_inverse=True)
    # Media are numbered anew for each template: the same video may be in several.
    media = np.stack([template_N, templates.media], axis=1)
    _, media_N, sizes = np.unique(media, axis=0, return_inverse=True, return_counts=True)
    weight_N = templates.score / sizes[media_N.ravel()]
    # One row a template, one column an image: the sum over media of the means over their images.
    mixing = csr_array((weight_N, (template_N, np.arange(len(features)))), shape=(len(numbers), len(features)))
    return numbers, normalise(mixing @ features.astype(np.float32, copy=False)).astype(np.float32)


def metrics(outcomes: Mapping[str, np.ndarray]) -> dict[str, float]:
    """``tar@far=1e-1`` to ``tar@far=1e-6``, in 0..1, at the FARs that the impostor pairs can resolve; ``tar@far=1e-4``,
    by which models are compared, always: of few impostor pairs it allows no false accept."""
    above, impostors = outcomes["impostors_above"], int(outcomes["impostors"][0])
    return {roc.name_of(far): roc.tar_at(above, impostors, far) for far in _fars(impostors)}


def items(outcomes: Mapping[str, np.ndarray]) -> tuple[np.ndarray, Items]:
    """Whether each genuine pair is accepted at the main FAR, float64 [G], all with the same weight.

    IJB tells no identities, but genuine pairs join the templates of one: its pairs are a cluster.
    """
    above, impostors = outcomes["impostors_above"], int(outcomes["impostors"][0])
    accepted = roc.accepted_at(above, impostors, MAIN_FAR).astype(np.float64)
    identity = joined(outcomes["template"], np.ones(len(above), dtype=bool))[:, :1]
    return accepted, Items(np.full(len(above), 1 / len(above)), identity)


def chance(outcomes: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The TAR at each FAR of similarities that know nothing."""
    impostors = int(outcomes["impostors"][0])
    return {roc.name_of(far): roc.false_accepts(impostors, far) / impostors for far in _fars(impostors)}


def _fars(impostors: int) -> list[float]:
    resolved = roc.resolved(impostors)
    return [far for far in roc.FARS if far in resolved or far == MAIN_FAR]
