"""Retrieval from a random gallery, as VehicleID reports it (Liu et al., 2016, "Deep Relative Distance Learning").

One random image of each identity is the gallery and all others are queries; that is drawn ten times, and the metrics
are means over the draws. A query has exactly one right image, so its AP is 1 / rank. An identity with a single image is
a distractor. No image is removed for its camera. Ties are broken pessimistically.
"""

from collections.abc import Mapping

import numpy as np

from ufo_ds.errors import UserError
from ufo_ds.evaluation import ranking
from ufo_ds.evaluation.ranking import JUNK
from ufo_ds.evaluation.statistics import Items
from ufo_ds.seeding import numpy_generator

MAIN_METRIC = "mAP"


def evaluate(features: np.ndarray, ids: np.ndarray, draws: int = 10, seed: int = 0) -> dict[str, float]:
    """Rank the galleries for their queries and average: :func:`metrics` of :func:`outcomes`."""
    return metrics(outcomes(features, ids, draws, seed))


def outcomes(features: np.ndarray, ids: np.ndarray, draws: int = 10, seed: int = 0) -> dict[str, np.ndarray]:
    """Rank each draw's gallery by cosine similarity for each of its queries.

    Args:
        features: float32 [N, D], normalised here.
        ids: int [N]; -1 is junk, which is left out.
        draws: number of galleries.
        seed: of the galleries; a draw does not depend on how many there are.

    Returns:
        Of the Q queries of all draws, one draw after another: ``draw``, int [Q]; ``query``, int [Q], which image it is;
        ``identity``, int [Q]; ``first_rank``, int [Q], from 1, of the right image. ``gallery``: int [1], the number of
        gallery images, which is that of identities.

    Raises:
        UserError: no images, features that are not finite, or no identity with two images.
    """
    ranking.check_not_empty("random_gallery", features, features)
    known = np.flatnonzero(ids != JUNK)
    identities, counts = np.unique(ids[known], return_counts=True)
    if counts.max(initial=0) < 2:
        raise UserError(
            f"random_gallery: none of the {len(identities)} identities has two images, one for the gallery and one to "
            f"search for it; check the labels of the benchmark's shards"
        )
    right = np.searchsorted(identities, ids)  # position in every gallery
    found: dict[str, list[np.ndarray]] = {"draw": [], "query": [], "first_rank": []}
    for draw in range(draws):
        shuffled = numpy_generator("random gallery", seed, draw).permutation(known)
        gallery = shuffled[np.unique(ids[shuffled], return_index=True)[1]]  # by identity
        query = np.setdiff1d(known, gallery)
        is_query = np.isin(np.arange(len(ids)), query)
        # All images search, as features of queries alone would be a copy of nearly all of them.
        rows = ranking.similarity_rows("random_gallery", features, features[gallery])
        first = [np.count_nonzero(row >= row[right[i]]) for i, row in enumerate(rows) if is_query[i]]  # itself as well
        found["draw"].append(np.full(len(query), draw))
        found["query"].append(query)
        found["first_rank"].append(np.array(first))
    arrays = {name: np.concatenate(parts) for name, parts in found.items()}
    return {**arrays, "identity": ids[arrays["query"]], "gallery": np.array([len(identities)])}


def metrics(outcomes: Mapping[str, np.ndarray]) -> dict[str, float]:
    """``mAP``, ``rank1`` and ``rank5``, means over draws in 0..1, and of the first two the standard deviation over
    draws: ``mAP_std`` and ``rank1_std``."""
    first = outcomes["first_rank"]
    values = {"mAP": 1 / first, "rank1": first <= 1, "rank5": first <= 5}
    by_draw = {name: _mean_by_draw(outcomes["draw"], value) for name, value in values.items()}
    means = {name: float(value.mean()) for name, value in by_draw.items()}
    return {**means, "mAP_std": float(by_draw["mAP"].std()), "rank1_std": float(by_draw["rank1"].std())}


def items(outcomes: Mapping[str, np.ndarray]) -> tuple[np.ndarray, Items]:
    """The AP of every query of every draw (all draws have as many); clusters are identities."""
    return ranking.items_by_identity(1 / outcomes["first_rank"], outcomes)


def chance(outcomes: Mapping[str, np.ndarray]) -> dict[str, float]:
    """What a random order of the gallery gets on average; the standard deviations are not known in closed form."""
    one, gallery = np.ones(1, dtype=np.int64), outcomes["gallery"].astype(np.int64)
    hits = {f"rank{k}": ranking.chance_of_hit(one, gallery, k) for k in (1, 5)}
    return {"mAP": ranking.chance_of_precision(one, gallery), **hits}


def _mean_by_draw(draw: np.ndarray, value: np.ndarray) -> np.ndarray:
    return np.bincount(draw, value) / np.bincount(draw)
