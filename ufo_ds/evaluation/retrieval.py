"""Retrieval as person and vehicle re-identification report it: CMC, mAP and mINP.

The protocol is that of Market-1501 (Zheng et al., 2015): for each query the gallery images of the same identity seen by
the same camera are removed, and so are junk images. AP is the mean over the hits of the precision at each hit, as the
re-identification toolboxes report it (not the trapezoid under the precision-recall curve); INP is Ye et al., 2021.
A query without any match left is left out. Ties are broken pessimistically.
"""

from collections.abc import Iterable, Mapping

import numpy as np

from ufo_ds.errors import UserError
from ufo_ds.evaluation import ranking
from ufo_ds.evaluation.ranking import JUNK
from ufo_ds.evaluation.statistics import Items

MAIN_METRIC = "mAP"
UNKNOWN_CAMERA = -1


def evaluate(
    query: np.ndarray,
    query_ids: np.ndarray,
    query_cameras: np.ndarray,
    gallery: np.ndarray,
    gallery_ids: np.ndarray,
    gallery_cameras: np.ndarray,
    similarities: Iterable[np.ndarray] | None = None,
) -> dict[str, float]:
    """Rank the gallery for each query and average: :func:`metrics` of :func:`outcomes`."""
    return metrics(outcomes(query, query_ids, query_cameras, gallery, gallery_ids, gallery_cameras, similarities))


def outcomes(
    query: np.ndarray,
    query_ids: np.ndarray,
    query_cameras: np.ndarray,
    gallery: np.ndarray,
    gallery_ids: np.ndarray,
    gallery_cameras: np.ndarray,
    similarities: Iterable[np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """Rank the gallery by cosine similarity for each query.

    Images of unknown camera are never removed as "same camera". Gallery identities without a query are distractors.
    Pessimistic: a wrong image that ties with a right one ranks before it.

    Args:
        query: float32 [Q, D], normalised here.
        query_ids: int [Q].
        query_cameras: int [Q]; -1 is unknown.
        gallery: float32 [G, D], normalised here.
        gallery_ids: int [G]; -1 is junk.
        gallery_cameras: int [G]; -1 is unknown.
        similarities: to rank by in place of cosines, such as re-ranked ones: blocks [B, G] of consecutive queries.

    Returns:
        Of the Q' queries with a match: ``query``, int [Q'], which they are; ``identity``, int [Q'];
        ``average_precision`` and ``inverse_penalty`` (hits / rank of the last hit), float [Q']; ``first_rank``, int
        [Q'], from 1; ``relevant`` and ``candidates``, int [Q'], the right and all gallery images left for it. For rank
        lists ``shown``, ``shown_top`` and ``shown_right`` as :meth:`ranking.RankLists.arrays` says.

    Raises:
        UserError: no images, features that are not finite, or no query has a match in the gallery.
    """
    ranking.check_not_empty("retrieval", query, gallery)
    same = ranking.SameIdentity(query_ids, gallery_ids)
    removed = _same_camera(query_ids, query_cameras, gallery_ids, gallery_cameras)
    relevant = same.count - removed
    matched = np.flatnonzero(relevant)
    if len(matched) == 0:
        raise UserError(
            f"retrieval: none of the {len(query)} queries has a match among the {len(gallery)} gallery images; check "
            f"that the benchmark's query and gallery name identities alike and see them by different cameras"
        )
    junk = np.flatnonzero(gallery_ids == JUNK)
    average_precisions, inverse_penalties, first_ranks = [], [], []
    lists = ranking.RankLists(matched)
    for index, row in enumerate(ranking.similarity_rows("retrieval", query, gallery, similarities)):
        if not relevant[index]:
            continue
        own = same[index]
        cameras = gallery_cameras[own]
        right = own[(cameras != query_cameras[index]) | (cameras == UNKNOWN_CAMERA)]
        similarity = row[right]
        row[own] = -np.inf
        if len(junk):
            row[junk] = -np.inf
        ranks = ranking.ranks(similarity, row)
        precision = float((np.arange(1, len(ranks) + 1) / ranks).sum()) / len(ranks)
        average_precisions.append(precision)
        inverse_penalties.append(len(ranks) / ranks[-1])
        first_ranks.append(ranks[0])
        lists.offer(index, precision, row, right, similarity)
    return {
        "query": matched,
        "identity": query_ids[matched],
        "average_precision": np.array(average_precisions),
        "inverse_penalty": np.array(inverse_penalties),
        "first_rank": np.array(first_ranks),
        "relevant": relevant[matched],
        "candidates": (len(gallery) - len(junk) - removed)[matched],
        **lists.arrays(),
    }


def metrics(outcomes: Mapping[str, np.ndarray]) -> dict[str, float]:
    """``mAP``, ``rank1``, ``rank5``, ``rank10`` and ``mINP``, in 0..1."""
    first = outcomes["first_rank"]
    return {
        "mAP": float(np.mean(outcomes["average_precision"])),
        "rank1": float(np.mean(first <= 1)),
        "rank5": float(np.mean(first <= 5)),
        "rank10": float(np.mean(first <= 10)),
        "mINP": float(np.mean(outcomes["inverse_penalty"])),
    }


def items(outcomes: Mapping[str, np.ndarray]) -> tuple[np.ndarray, Items]:
    """The AP of every query; clusters are identities."""
    return ranking.items_by_identity(outcomes["average_precision"], outcomes)


def chance(outcomes: Mapping[str, np.ndarray]) -> dict[str, float]:
    """What a random order of the gallery gets on average; of mINP no closed form is known."""
    relevant, candidates = (outcomes[name].astype(np.int64) for name in ("relevant", "candidates"))
    return {
        "mAP": ranking.chance_of_precision(relevant, candidates),
        **{f"rank{k}": ranking.chance_of_hit(relevant, candidates, k) for k in (1, 5, 10)},
    }


def _same_camera(
    query_ids: np.ndarray, query_cameras: np.ndarray, gallery_ids: np.ndarray, gallery_cameras: np.ndarray
) -> np.ndarray:
    """Of each query, how many gallery images have its identity and camera, both known."""
    cameras = max(query_cameras.max(), gallery_cameras.max()) + 1
    known = (gallery_ids != JUNK) & (gallery_cameras != UNKNOWN_CAMERA)
    in_gallery = np.sort(gallery_ids[known].astype(np.int64) * cameras + gallery_cameras[known])
    of_query = query_ids.astype(np.int64) * cameras + query_cameras
    count = np.searchsorted(in_gallery, of_query, side="right") - np.searchsorted(in_gallery, of_query, side="left")
    return np.where((query_ids != JUNK) & (query_cameras != UNKNOWN_CAMERA), count, 0)


def normalise(features: np.ndarray) -> np.ndarray:
    """Rows [N, D] of unit length; a row of zeros stays as it is."""
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
