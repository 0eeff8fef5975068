"""Identification, "who is it?": one probe against all identities of a gallery, as IJB's 1:N protocol.

A gallery identity is one template: the mean of its images' normalised features, normalised again (Whitelam et al.,
2017, IARPA Janus Benchmark-B; Maze et al., 2018, IJB-C). A probe whose identity is in the gallery has a mate. Closed
set: rank-k is the share of mated probes whose mate is among the k most similar templates. Open set, where there are
probes without a mate: a threshold on similarity lets through at most the share FPIR of those, by their most similar
template; TPIR is the share of mated probes whose mate is the most similar template and gets through (Grother and
Ngan, NISTIR 8009). Ties are broken pessimistically.
"""

from collections.abc import Mapping

import numpy as np

from ufo_ds.errors import UserError
from ufo_ds.evaluation import ranking
from ufo_ds.evaluation.ranking import JUNK
from ufo_ds.evaluation.retrieval import normalise
from ufo_ds.evaluation.statistics import Items

MAIN_METRIC = "rank1"
_FPIR = (0.01, 0.1)
_FEWEST_FALSE = 10  # an FPIR that lets fewer probes through is a matter of single images


def evaluate(
    probe: np.ndarray, probe_ids: np.ndarray, gallery: np.ndarray, gallery_ids: np.ndarray
) -> dict[str, float]:
    """Rank the templates for each probe: :func:`metrics` of :func:`outcomes`."""
    return metrics(outcomes(probe, probe_ids, gallery, gallery_ids))


def outcomes(
    probe: np.ndarray, probe_ids: np.ndarray, gallery: np.ndarray, gallery_ids: np.ndarray
) -> dict[str, np.ndarray]:
    """Rank the templates by cosine similarity for each probe.

    Args:
        probe: float32 [P, D], normalised here; an image or a template each.
        probe_ids: int [P]; one that the gallery lacks, or -1, has no mate.
        gallery: float32 [G, D], normalised here.
        gallery_ids: int [G]; -1 is junk, which is left out.

    Returns:
        Of the M mated probes: ``probe``, int [M], which they are; ``identity``, int [M]; ``first_rank``, int [M], from
        1, of the mate; ``unmated_above``, int [M], how many probes without a mate have a template at least as similar
        to them as this probe's mate to it. ``unmated``, int [1]: probes without a mate; ``gallery``, int [1]:
        templates.

    Raises:
        UserError: no images, features that are not finite, or no probe has a mate.
    """
    ranking.check_not_empty("identification", probe, gallery)
    ranking.norms(gallery, "identification", "gallery")
    identities = np.unique(gallery_ids[gallery_ids != JUNK])
    mated = np.isin(probe_ids, identities)
    if not mated.any():
        raise UserError(
            f"identification: none of the {len(probe)} probes is of one of the gallery's {len(identities)} identities; "
            f"check that the benchmark's query and gallery name identities alike"
        )
    same = ranking.SameIdentity(identities, gallery_ids)
    templates = np.stack([normalise(gallery[same[i]]).mean(axis=0) for i in range(len(identities))])
    mate = np.searchsorted(identities, probe_ids)
    first_ranks, similarities, best_unmated = [], [], []
    for index, row in enumerate(ranking.similarity_rows("identification", probe, templates)):
        if mated[index]:
            similarity = row[mate[index]]
            first_ranks.append(np.count_nonzero(row >= similarity))  # itself as well
            similarities.append(similarity)
        else:
            best_unmated.append(row.max())
    unmated = np.sort(np.array(best_unmated, dtype=templates.dtype))
    return {
        "probe": np.flatnonzero(mated),
        "identity": probe_ids[mated],
        "first_rank": np.array(first_ranks),
        "unmated_above": len(unmated) - np.searchsorted(unmated, np.array(similarities), side="left"),
        "unmated": np.array([len(unmated)]),
        "gallery": np.array([len(identities)]),
    }


def metrics(outcomes: Mapping[str, np.ndarray]) -> dict[str, float]:
    """``rank1``, ``rank5`` and ``rank10``, and ``tpir@fpir=0.01`` and ``tpir@fpir=0.1`` where that lets at least ten
    probes without a mate through; in 0..1."""
    first, unmated = outcomes["first_rank"], int(outcomes["unmated"][0])
    values = {f"rank{k}": float(np.mean(first <= k)) for k in (1, 5, 10)}
    for rate in _FPIR:
        passed = int(rate * unmated + 1e-9)  # 0.1 x 30 is 3, whatever its binary digits
        if passed >= _FEWEST_FALSE:
            values[f"tpir@fpir={rate}"] = float(np.mean((first == 1) & (outcomes["unmated_above"] <= passed)))
    return values


def items(outcomes: Mapping[str, np.ndarray]) -> tuple[np.ndarray, Items]:
    """Whether the mate comes first, of every mated probe; clusters are identities."""
    return ranking.items_by_identity(outcomes["first_rank"] == 1, outcomes)


def chance(outcomes: Mapping[str, np.ndarray]) -> dict[str, float]:
    """What a random order of the templates gets on average, of the closed set."""
    gallery = int(outcomes["gallery"][0])
    return {f"rank{k}": min(1.0, k / gallery) for k in (1, 5, 10)}
