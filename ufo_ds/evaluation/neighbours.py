"""Nearest neighbours in blocks, the same whatever the blocks, the BLAS and its threads.

A BLAS adds up in an order that depends on shapes and threads, so its rounding decides between images that are equally
near, and with them who is whose neighbour. Here sums are not rounded: features become vectors of whole numbers, of
length 2^25 at most (steps of 2^-24 of the longest or finer, as float32's are), so every partial sum of a scalar product
or of a squared distance is a whole number below 2^53 (Cauchy-Schwarz), and those float64 holds exactly.
"""

from collections.abc import Iterator

import numpy as np

from ufo_ds.errors import UserError

BLOCK = 2**24  # distances held at a time (128 MiB), whatever the number of images

_BITS = 25


def check(query_QD: np.ndarray, gallery_GD: np.ndarray, what: str) -> None:
    """Whether there is something to search for and in.

    Raises:
        UserError: query or gallery is empty, or a feature is not finite.
    """
    for name, features in (("query", query_QD), ("gallery", gallery_GD)):
        if len(features) == 0:
            raise UserError(f"{what}: 0 {name} images; check the benchmark's {name} shards")
        finite = np.isfinite(features).all(axis=1)
        if not finite.all():
            raise UserError(
                f"{what}: the features of {np.sum(~finite)} of {len(features)} {name} images (first: image "
                f"{np.argmin(finite)}) are not finite; evaluate a checkpoint from before the training diverged"
            )


def whole(features_ND: np.ndarray) -> np.ndarray:
    """Features scaled by a power of two and rounded to whole numbers, float64 [N, D]; only those rounded together have
    the same scale."""
    whole_ND = features_ND.astype(np.float64)
    _, exponent = np.frexp(np.sqrt(np.einsum("nd,nd->n", whole_ND, whole_ND).max()))
    np.ldexp(whole_ND, _BITS - exponent, out=whole_ND)
    return np.rint(whole_ND, out=whole_ND)


def squared_distances(x_MD: np.ndarray, y_ND: np.ndarray) -> np.ndarray:
    """Squared Euclidean distances [M, N] between features from :func:`whole`, without rounding."""
    distance_MN = x_MD @ y_ND.T
    distance_MN *= -2
    distance_MN += np.einsum("md,md->m", x_MD, x_MD)[:, None]
    distance_MN += np.einsum("nd,nd->n", y_ND, y_ND)
    return distance_MN


def lowest(values_MN: np.ndarray, k: int) -> np.ndarray:
    """Of each row the positions of its ``k`` lowest values, lowest first and of equals the first, int64 [M, k].

    Args:
        k: at most N.
    """
    # The k-th lowest of the minima of several chunks bounds the k-th lowest value: little is left to sort.
    starts = np.arange(0, values_MN.shape[1], max(1, values_MN.shape[1] // (16 * k)))
    found_Mk = np.empty((len(values_MN), k), dtype=np.int64)
    for row, values_N in enumerate(values_MN):
        bound = np.partition(np.minimum.reduceat(values_N, starts), k - 1)[k - 1]
        near = np.flatnonzero(values_N <= bound)
        found_Mk[row] = near[np.argsort(values_N[near], kind="stable")[:k]]
    return found_Mk


def blocks(rows: int, columns: int) -> Iterator[slice]:
    """Slices of consecutive rows of a matrix, each of :data:`BLOCK` values at most or of one row."""
    step = max(1, BLOCK // columns)
    for begin in range(0, rows, step):
        yield slice(begin, min(begin + step, rows))
