"""Query expansion: search again with what was found (Chum et al., 2007; alpha-QE: Radenovic et al., 2018).

The new query is q + the sum over its k nearest gallery images g of cos(q, g)^alpha g, normalised; all features are of
unit length. With alpha = 0 it is the average query expansion of Chum et al. Cosines below 0 count as 0. (Toolboxes such
as fast-reid expand the gallery as well, with query and gallery searched together; here the gallery stays.)
"""

import numpy as np

from ufo_ds.errors import UserError
from ufo_ds.evaluation import neighbours
from ufo_ds.evaluation.retrieval import normalise


def expand(query: np.ndarray, gallery: np.ndarray, k: int, alpha: float) -> np.ndarray:
    """New features of the queries, float32 [Q, D] of unit length; of equally near images the first are taken.

    Args:
        query: float [Q, D], normalised here.
        gallery: float [G, D], normalised here.
        k: gallery images to add.
        alpha: how fast their weight falls with the cosine, 0 or more.

    Raises:
        UserError: no query or no gallery, features that are not finite, k outside 1..G, alpha below 0.
    """
    neighbours.check(query, gallery, "query expansion")
    if not 1 <= k <= len(gallery):
        raise UserError(f"query expansion: k {k} with {len(gallery)} gallery images: use one of 1 .. {len(gallery)}")
    if not 0 <= alpha < np.inf:
        raise UserError(f"query expansion: alpha {alpha}: use 0 (plain average) or more, such as 3")
    query, gallery = normalise(query.astype(np.float64)), normalise(gallery.astype(np.float64))
    whole_ND = neighbours.whole(np.concatenate([query, gallery]))
    whole_QD, whole_GD = whole_ND[: len(query)], whole_ND[len(query) :]
    expanded = query.copy()
    for rows in neighbours.blocks(len(query), len(gallery)):
        near_Bk = neighbours.lowest(neighbours.squared_distances(whole_QD[rows], whole_GD), k)
        for nth in range(k):
            found_BD = gallery[near_Bk[:, nth]]
            cosine_B = (query[rows] * found_BD).sum(axis=1)
            expanded[rows] += np.maximum(cosine_B, 0)[:, None] ** alpha * found_BD
    return normalise(expanded).astype(np.float32)
