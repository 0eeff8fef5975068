"""Recall@k: of how many queries is an image of the same identity among the first k?

As product retrieval reports it. Stanford Online Products (Song et al., 2016, "Deep Metric Learning via Lifted
Structured Feature Embedding") and CUB-200-2011 search one set for each of its images; the image itself is left out, by
its index, so that a copy of it still counts. In-shop Clothes (Liu et al., 2016, DeepFashion) has a query and a gallery.
No image is removed for its camera. As in their evaluation code all queries count, and one without any match is a miss;
the benchmarks themselves have none. Ties are broken pessimistically.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from ufo_ds.errors import UserError
from ufo_ds.evaluation import ranking
from ufo_ds.evaluation.ranking import JUNK
from ufo_ds.evaluation.statistics import Items

MAIN_METRIC = "recall@1"


def evaluate(
    query: np.ndarray,
    query_ids: np.ndarray,
    gallery: np.ndarray | None = None,
    gallery_ids: np.ndarray | None = None,
    at: Sequence[int] = (1, 10, 100, 1000),
    similarities: Iterable[np.ndarray] | None = None,
) -> dict[str, float]:
    """Rank the gallery for each query and count: :func:`metrics` of :func:`outcomes`."""
    return metrics(outcomes(query, query_ids, gallery, gallery_ids, at, similarities))


def outcomes(
    query: np.ndarray,
    query_ids: np.ndarray,
    gallery: np.ndarray | None = None,
    gallery_ids: np.ndarray | None = None,
    at: Sequence[int] = (1, 10, 100, 1000),
    similarities: Iterable[np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """Rank the gallery by cosine similarity for each query.

    Args:
        query: float32 [Q, D], normalised here.
        query_ids: int [Q]; -1 is junk, which neither searches nor is found.
        gallery: float32 [G, D], normalised here; without one each query searches the others.
        gallery_ids: int [G]; -1 is junk.
        at: the numbers k of images looked at; 1 always is one of them.
        similarities: to rank by in place of cosines: blocks [B, G] of consecutive queries.

    Returns:
        Of the Q' queries that are not junk: ``query``, int [Q'], which they are; ``identity``, int [Q'];
        ``first_rank``, int [Q'], from 1, and one more than the candidates without a match; ``relevant`` and
        ``candidates``, int [Q'], the right and all gallery images for it. ``at``: int [K], ascending. For rank lists
        ``shown``, ``shown_top`` and ``shown_right`` as :meth:`ranking.RankLists.arrays` says.

    Raises:
        UserError: no images, features that are not finite, a k below 1, or no query has a match.
    """
    one_set = gallery is None or gallery_ids is None
    if gallery is None or gallery_ids is None:
        gallery, gallery_ids = query, query_ids
    ranking.check_not_empty("recall", query, gallery)
    if min(at, default=1) < 1:
        raise UserError(f"recall: at {list(at)}: recall@k looks at the first k images; give numbers from 1 on")
    same = ranking.SameIdentity(query_ids, gallery_ids)
    searching = query_ids != JUNK
    relevant = same.count - (searching if one_set else 0)
    if not relevant.any():
        raise UserError(
            f"recall: none of the {len(query)} queries has a match among the {len(gallery)} gallery images; check that "
            f"the benchmark's query and gallery name identities alike, or that one set has several images of some"
        )
    junk = np.flatnonzero(gallery_ids == JUNK)
    candidates = len(gallery) - len(junk) - one_set
    first_ranks = []
    lists = ranking.RankLists(np.flatnonzero(searching))
    for index, row in enumerate(ranking.similarity_rows("recall", query, gallery, similarities)):
        if not searching[index]:
            continue
        own = same[index]
        right = own[own != index] if one_set else own
        similarity = row[right]
        row[own] = -np.inf
        if len(junk):
            row[junk] = -np.inf
        first = 1 + np.count_nonzero(row >= similarity.max()) if len(right) else 1 + candidates
        first_ranks.append(first)
        lists.offer(index, -float(first), row, right, similarity)
    return {
        "query": np.flatnonzero(searching),
        "identity": query_ids[searching],
        "first_rank": np.array(first_ranks),
        "relevant": relevant[searching],
        "candidates": np.full(len(first_ranks), candidates),
        "at": np.array(sorted({1, *at})),
        **lists.arrays(),
    }


def metrics(outcomes: Mapping[str, np.ndarray]) -> dict[str, float]:
    """``recall@k`` of each k, in 0..1."""
    return {f"recall@{k}": float(np.mean(_found(outcomes, k))) for k in outcomes["at"]}


def items(outcomes: Mapping[str, np.ndarray]) -> tuple[np.ndarray, Items]:
    """Whether the first image is right, of every query; clusters are identities."""
    return ranking.items_by_identity(_found(outcomes, 1), outcomes)


def chance(outcomes: Mapping[str, np.ndarray]) -> dict[str, float]:
    """What a random order of the gallery gets on average."""
    relevant, candidates = (outcomes[name].astype(np.int64) for name in ("relevant", "candidates"))
    return {f"recall@{k}": ranking.chance_of_hit(relevant, candidates, int(k)) for k in outcomes["at"]}


def _found(outcomes: Mapping[str, np.ndarray], k: int) -> np.ndarray:
    return (outcomes["relevant"] > 0) & (outcomes["first_rank"] <= k)
