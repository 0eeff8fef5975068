"""Retrieval as person and vehicle re-identification report it: CMC, mAP and mINP.

The protocol is that of Market-1501 (Zheng et al., 2015): for each query the gallery images of the same identity seen by
the same camera are removed, and so are junk images. AP is the mean over the hits of the precision at each hit, as the
re-identification toolboxes report it (not the trapezoid under the precision-recall curve); INP is Ye et al., 2021.
"""

from collections.abc import Mapping

import numpy as np

from ufo_ds.errors import UserError

JUNK = -1  # id of gallery images that are neither right nor wrong
UNKNOWN_CAMERA = -1

_BLOCK = 2**24  # similarities held at a time (64 MiB), whatever the sizes of query and gallery


def evaluate(
    query: np.ndarray,
    query_ids: np.ndarray,
    query_cameras: np.ndarray,
    gallery: np.ndarray,
    gallery_ids: np.ndarray,
    gallery_cameras: np.ndarray,
) -> dict[str, float]:
    """Rank the gallery for each query and average: :func:`metrics` of :func:`outcomes`."""
    return metrics(outcomes(query, query_ids, query_cameras, gallery, gallery_ids, gallery_cameras))


def outcomes(
    query: np.ndarray,
    query_ids: np.ndarray,
    query_cameras: np.ndarray,
    gallery: np.ndarray,
    gallery_ids: np.ndarray,
    gallery_cameras: np.ndarray,
) -> dict[str, np.ndarray]:
    """Rank the gallery by cosine similarity for each query.

    Images of unknown camera are never removed as "same camera". Gallery identities without a query are distractors.
    A query without any match left is left out. Pessimistic: a wrong image that ties with a right one
    ranks before it, and so does one whose similarity is NaN.

    Args:
        query: float32 [Q, D], normalised here.
        query_ids: int [Q].
        query_cameras: int [Q]; -1 is unknown.
        gallery: float32 [G, D], normalised here.
        gallery_ids: int [G]; -1 is junk.
        gallery_cameras: int [G]; -1 is unknown.

    Returns:
        Of the Q' queries with a match: ``query``, int [Q'], which they are; ``identity``, int [Q'];
        ``average_precision`` and ``inverse_penalty`` (hits / rank of the last hit), float [Q']; ``first_rank``, int
        [Q'], from 1.

    Raises:
        UserError: no query has a match in the gallery.
    """
    # Sorted by identity, all that is right or removed for one query is one slice of the gallery.
    order = np.argsort(gallery_ids, kind="stable")
    order = order[gallery_ids[order] != JUNK]
    gallery, gallery_ids, gallery_cameras = normalise(gallery[order]), gallery_ids[order], gallery_cameras[order]
    query = normalise(query)
    starts = np.searchsorted(gallery_ids, query_ids, side="left")
    ends = np.searchsorted(gallery_ids, query_ids, side="right")

    matched, average_precisions, inverse_penalties, first_ranks = [], [], [], []
    block = max(1, _BLOCK // max(1, len(gallery)))
    for begin in range(0, len(query), block):
        similarities = query[begin : begin + block] @ gallery.T
        for index, similarity in enumerate(similarities, start=begin):
            own = slice(starts[index], ends[index])
            cameras = gallery_cameras[own]
            admissible = (cameras != query_cameras[index]) | (cameras == UNKNOWN_CAMERA)
            if not admissible.any():
                continue
            wrong = np.concatenate([similarity[: own.start], similarity[own.stop :]])
            ranks = _ranks(similarity[own][admissible], wrong)
            hits = np.arange(1, len(ranks) + 1)
            matched.append(index)
            average_precisions.append(np.mean(hits / ranks))
            inverse_penalties.append(len(ranks) / ranks[-1])
            first_ranks.append(ranks[0])
    if not first_ranks:
        raise UserError(
            f"retrieval: none of the {len(query)} queries has a match among the {len(gallery)} gallery images; check "
            f"that the benchmark's query and gallery name identities alike and see them by different cameras"
        )
    return {
        "query": np.array(matched),
        "identity": query_ids[matched],
        "average_precision": np.array(average_precisions),
        "inverse_penalty": np.array(inverse_penalties),
        "first_rank": np.array(first_ranks),
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


def _ranks(right: np.ndarray, wrong: np.ndarray) -> np.ndarray:
    """The ranks (from 1, ascending) of the right images [H], by counting the wrong ones [W] before each of them."""
    right = np.sort(np.where(np.isnan(right), -np.inf, right))
    before_any = wrong[~(wrong < right[0])]  # far fewer than W, and a NaN is among them
    # The k lowest hits come after a wrong image that is as similar as the k-th lowest or more; NaN sorts as highest.
    beaten = np.bincount(np.searchsorted(right, before_any, side="right"), minlength=len(right) + 1)
    wrong_before = np.cumsum(beaten[:0:-1])  # of the highest hit first
    return wrong_before + np.arange(1, len(right) + 1)


def normalise(features: np.ndarray) -> np.ndarray:
    """Rows [N, D] of unit length; a row of zeros stays as it is."""
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
