"""k-reciprocal re-ranking (Zhong et al., 2017, "Re-ranking person re-identification with k-reciprocal encoding").

Images that are among each other's nearest are a better match than distance alone tells. Over the N = Q + G images of
query and gallery together, with N(p, k) the image p itself and its k nearest:

- R(p, k), the k-reciprocal neighbours: all g in N(p, k) with p in N(g, k).
- R*(p, k1): R(p, k1) and each R(q, k1/2), q in R(p, k1), of which more than 2/3 is in R(p, k1). (The paper says "at
  least 2/3", the authors' code and all that descend from it "more than"; k1/2 is rounded half to even.)
- V_p: over g in R*(p, k1) the weights exp(-d(p, g)), scaled to the sum 1. d(p, .) is the squared Euclidean distance
  divided by its maximum over all N images, as in the authors' code.
- Local query expansion: V_p becomes the mean of V over the first k2 of N(p, .), p itself being one.
- Jaccard distance: 1 - sum(min(V_p, V_g)) / sum(max(V_p, V_g)); the final one is (1 - lambda) * Jaccard + lambda * d.

Equally near images are neighbours in the order query, gallery as given. No matrix of N x N or Q x G is ever held: the
sets and V are sparse, and distances come in blocks (:mod:`ufo_ds.evaluation.neighbours`). Most of the time goes into
N * N scalar products in float64: with 512 dimensions the size of Market-1501 (N = 19,281) takes 11 s of one core and
0.4 GiB, that of MSMT17 (93,820) about 7 min and 2 GiB.
"""

from collections.abc import Iterator

import numpy as np
from scipy.sparse import csr_array, vstack

from ufo_ds.errors import UserError
from ufo_ds.evaluation import neighbours
from ufo_ds.evaluation.retrieval import normalise

_ROWS = 1024  # whose sets are expanded at a time


def similarities(
    query: np.ndarray, gallery: np.ndarray, k1: int = 20, k2: int = 6, lambda_: float = 0.3
) -> Iterator[np.ndarray]:
    """Similarities by which to rank a gallery: negative :func:`distances` between normalised features.

    Args: those of :func:`distances`.

    Yields:
        Of consecutive queries the similarities float32 [B, G], columns in the order of the gallery.

    Raises:
        UserError: as :func:`distances`.
    """
    query, gallery = normalise(query.astype(np.float64)), normalise(gallery.astype(np.float64))
    return (-block for block in distances(query, gallery, k1, k2, lambda_))


def distances(
    query: np.ndarray, gallery: np.ndarray, k1: int = 20, k2: int = 6, lambda_: float = 0.3
) -> Iterator[np.ndarray]:
    """Re-ranked distances; what does not depend on the query is done before the first block is asked for.

    Args:
        query: float [Q, D].
        gallery: float [G, D]; all of it takes part, so leave junk images out beforehand.
        k1: neighbours in whose sets an image must be, and it in theirs.
        k2: images over which V is averaged; 1 for no local query expansion.
        lambda_: share of the original distance.

    Yields:
        Of consecutive queries the distances float32 [B, G], in 0..1. (They are summed up in float64 and rounded, so
        that what is equal but for the order of summation ties.)

    Raises:
        UserError: no query or no gallery, features that are not finite, k1 or k2 that do not fit the number of
            images, lambda_ outside 0..1.
    """
    count = len(query) + len(gallery)
    neighbours.check(query, gallery, "re-ranking")
    for name, value, most in (("k1", k1, count - 1), ("k2", k2, count)):
        if not 1 <= value <= most:
            raise UserError(
                f"re-ranking: {name} {value} with {count} images in query and gallery: use one of 1 .. {most}"
            )
    if not 0 <= lambda_ <= 1:
        raise UserError(f"re-ranking: lambda {lambda_}: use a share of the original distance, 0 .. 1")

    features_ND = neighbours.whole(np.concatenate([query, gallery]))
    near_NK, farthest_N = _search(features_ND, max(k1 + 1, k2))
    full_NN, half_NN = (_reciprocal(near_NK[:, : k + 1]) for k in (k1, round(k1 / 2)))
    weights_NN = _rows_of(near_NK[:, :k2], 1 / k2) @ _weights(features_ND, farthest_N, full_NN, half_NN)
    return _blocks(features_ND, farthest_N, weights_NN, len(query), lambda_)


def _search(features_ND: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Of each image itself and its k - 1 nearest others, int32 [N, k], and the squared distance of the farthest [N]."""
    count = len(features_ND)
    near_Nk = np.empty((count, k), dtype=np.int32)
    farthest_N = np.empty(count)
    for rows in neighbours.blocks(count, count):
        distance_BN = neighbours.squared_distances(features_ND[rows], features_ND)
        farthest_N[rows] = distance_BN.max(axis=1)
        distance_BN[np.arange(len(distance_BN)), np.arange(count)[rows]] = -1  # itself before its duplicates
        near_Nk[rows] = neighbours.lowest(distance_BN, k)
    return near_Nk, np.maximum(farthest_N, 1)  # whole numbers; 0 if all images are the same


def _rows_of(columns_Nk: np.ndarray, value: float) -> csr_array:
    """The sparse [N, N] that holds ``value`` in the k given columns of each row."""
    count, k = columns_Nk.shape
    data = np.full(columns_Nk.size, value)
    return csr_array((data, columns_Nk.ravel(), np.arange(count + 1) * k), shape=(count, count))


def _reciprocal(near_Nk: np.ndarray) -> csr_array:
    """1 where both images are among each other's nearest: a symmetric sparse [N, N]."""
    forward_NN = _rows_of(near_Nk, 1)
    return csr_array(forward_NN.multiply(forward_NN.T.tocsr()))


def _weights(features_ND: np.ndarray, farthest_N: np.ndarray, full_NN: csr_array, half_NN: csr_array) -> csr_array:
    """V before local query expansion, from R(., k1) and R(., k1/2)."""
    sizes_N = np.diff(half_NN.indptr)
    parts = []
    for begin in range(0, len(features_ND), _ROWS):
        full_BN = full_NN[begin : begin + _ROWS]
        # half_NN is symmetric, so at (p, q) the product counts what R(p, k1) and R(q, k1/2) share.
        joins_BN = csr_array((full_BN @ half_NN).multiply(full_BN))
        joins_BN.data = (3 * joins_BN.data > 2 * sizes_N[joins_BN.indices]).astype(np.float64)
        joins_BN.eliminate_zeros()
        expanded_BN = csr_array(full_BN + joins_BN @ half_NN)
        expanded_BN.sort_indices()
        for row, p in enumerate(range(begin, begin + expanded_BN.shape[0])):
            own = slice(expanded_BN.indptr[row], expanded_BN.indptr[row + 1])
            members = expanded_BN.indices[own]
            distance = neighbours.squared_distances(features_ND[p : p + 1], features_ND[members])[0]
            weight = np.exp(-distance / farthest_N[p])
            expanded_BN.data[own] = weight / weight.sum()
        parts.append(expanded_BN)
    return csr_array(vstack(parts))


def _blocks(
    features_ND: np.ndarray, farthest_N: np.ndarray, weights_NN: csr_array, queries: int, lambda_: float
) -> Iterator[np.ndarray]:
    gallery_GD = features_ND[queries:]
    holders_NG = weights_NN[queries:].T.tocsr()  # of each image the gallery images with a weight for it
    for rows in neighbours.blocks(queries, len(gallery_GD)):
        final_BG = neighbours.squared_distances(features_ND[rows], gallery_GD)
        final_BG *= lambda_ / farthest_N[rows, None]
        for row, q in enumerate(range(rows.start, rows.stop)):
            own = slice(weights_NN.indptr[q], weights_NN.indptr[q + 1])
            shared_nG = holders_NG[weights_NN.indices[own]]
            lower = np.minimum(shared_nG.data, np.repeat(weights_NN.data[own], np.diff(shared_nG.indptr)))
            # sum(min) + sum(max) is 2, because every V has the sum 1.
            minimum_G = np.bincount(shared_nG.indices, lower, minlength=len(gallery_GD))
            final_BG[row] += (1 - lambda_) * (1 - minimum_G / (2 - minimum_G))
        yield final_BG.astype(np.float32)
