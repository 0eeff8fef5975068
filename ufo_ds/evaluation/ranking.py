"""What the protocols that rank a gallery share: similarities of a block of queries at a time, and ranks by counting.

Neither all similarities nor a sorted gallery is ever held. Similarities are cosines; the features are read as they lie
(a read-only ``np.memmap`` does) and only the similarities are divided by their norms, so no normalised copy is made.

Ties are broken pessimistically: a wrong image as similar as a right one ranks before it. A matrix product rounds equal
sums differently from place to place, so gallery images with equal features are given the similarity of the first.
"""

from bisect import insort
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
from scipy.special import digamma, gammaln

from ufo_ds.errors import UserError
from ufo_ds.evaluation.statistics import Items

JUNK = -1  # id of images that are neither right nor wrong

_BLOCK = 2**24  # numbers held at a time (64 MiB), whatever the sizes of query and gallery
_FEW = 24  # right images that are sooner counted one by one than by sorting what is before the last
_PER_KIND, _TOP = 8, 10  # rank lists shown: of so many queries by score and so many evenly spread; their length


class SameIdentity:
    """For each query the positions of the gallery images of its identity; none for junk."""

    def __init__(self, query_ids: np.ndarray, gallery_ids: np.ndarray):
        order = np.argsort(gallery_ids, kind="stable")
        self._order = order[gallery_ids[order] != JUNK]
        self._starts, self._ends = (np.searchsorted(gallery_ids[self._order], query_ids, s) for s in ("left", "right"))

    def __getitem__(self, query: int) -> np.ndarray:
        return self._order[self._starts[query] : self._ends[query]]

    @property
    def count(self) -> np.ndarray:
        """How many each query has."""
        return self._ends - self._starts


def check_not_empty(protocol: str, query: np.ndarray, gallery: np.ndarray) -> None:
    """Raise a UserError if either has no images."""
    for side, features in (("query", query), ("gallery", gallery)):
        if len(features) == 0:
            raise UserError(f"{protocol}: 0 {side} images to evaluate; check the benchmark's {side} shards")


def similarity_rows(
    protocol: str, query: np.ndarray, gallery: np.ndarray, similarities: Iterable[np.ndarray] | None = None
) -> Iterator[np.ndarray]:
    """For one query after another its similarity to every gallery image, [G].

    Each row may be changed, and is only good until the next is asked for.

    Args:
        protocol: named in errors.
        query: float [Q, D].
        gallery: float [G, D].
        similarities: given ones to take the place of cosines: blocks [B, G] of consecutive queries.

    Raises:
        UserError: features that are not finite.
        ValueError: the given blocks are not of Q rows and G columns.
    """
    if similarities is None:
        yield from _cosines(np.asarray(query), np.asarray(gallery), protocol)
        return
    count = 0
    for block in similarities:
        count += len(block)
        if count > len(query) or block.shape[1] != len(gallery):
            raise ValueError(f"similarities {block.shape} up to query {count}: not those of {len(query), len(gallery)}")
        if not np.isfinite(block).all():
            raise UserError(f"{protocol}: similarities given for queries up to {count} are NaN or infinite")
        yield from np.array(block)
    if count < len(query):
        raise ValueError(f"similarities of {count} queries, not of {len(query)}")


def _cosines(query: np.ndarray, gallery: np.ndarray, protocol: str) -> Iterator[np.ndarray]:
    query_norms, gallery_norms = norms(query, protocol, "query"), norms(gallery, protocol, "gallery")
    scale = 1 / gallery_norms
    copies, originals = _equal_rows(gallery, gallery_norms)
    # One buffer for all blocks: fresh memory for each would cost the time to map its pages.
    step = block_rows(gallery.shape)
    buffer = np.empty((min(step, len(query)), len(gallery)), np.result_type(query, gallery))
    for begin in range(0, len(query), step):
        unit = query[begin : begin + step] / query_norms[begin : begin + step, None]
        for row in np.matmul(unit, gallery.T, out=buffer[: len(unit)]):
            row *= scale  # here and not for the whole block: the row comes into the cache anyway
            if len(copies):
                row[copies] = row[originals]
            yield row


def block_rows(gallery: tuple[int, ...]) -> int:
    """How many queries a block has for a gallery of shape [G, D]."""
    return max(1, _BLOCK // max(gallery))


def norms(features: np.ndarray, protocol: str, kind: str) -> np.ndarray:
    """Norms of the rows [N, D], at least 1e-12 so that a row of zeros is similar to nothing.

    Args:
        protocol: named in the error, and so is
        kind: "query", "gallery" or what else they are features of.

    Raises:
        UserError: some rows are not finite.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        parts = [np.linalg.norm(features[rows], axis=1) for rows in _blocks(features.shape)]
    found = np.concatenate(parts)
    bad = np.flatnonzero(~np.isfinite(found))
    if len(bad):
        raise UserError(
            f"{protocol}: {len(bad)} of {len(found)} {kind} features are NaN or infinite, first number {bad[0]}; "
            f"evaluate a checkpoint from before the training diverged"
        )
    return np.maximum(found, 1e-12)


def _equal_rows(features: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rows that repeat an earlier one, and the first of their kind: by norm and sum, then number by number."""
    sums = np.concatenate([features[rows].sum(axis=1) for rows in _blocks(features.shape)])
    _, first, kind = np.unique(lengths + 1j * sums, return_index=True, return_inverse=True)
    original = first[kind]
    copies = np.flatnonzero(original != np.arange(len(features)))
    equal = [
        (features[copies[rows]] == features[original[copies[rows]]]).all(axis=1)
        for rows in _blocks((len(copies), features.shape[1]))
    ]
    copies = copies[np.concatenate(equal)] if equal else copies
    return copies, original[copies]


def _blocks(shape: tuple[int, ...]) -> Iterator[slice]:
    """Rows of an array [N, D], a quarter of a block at a time: copies of them are made."""
    step = max(1, _BLOCK // (4 * shape[1]))
    return (slice(begin, begin + step) for begin in range(0, shape[0], step))


def ranks(right: np.ndarray, others: np.ndarray) -> np.ndarray:
    """The ranks (from 1, ascending) of right images by counting the others before each.

    Args:
        right: similarities [H].
        others: similarities of the wrong images, and -inf for whatever does not count.
    """
    right = np.sort(right)[::-1]
    if len(right) <= _FEW:
        wrong_before = np.array([np.count_nonzero(others >= similarity) for similarity in right])
    else:
        before_any = np.sort(others[others >= right[-1]])  # of a good model far fewer than all
        wrong_before = len(before_any) - np.searchsorted(before_any, right, side="left")
    return wrong_before + np.arange(1, len(right) + 1)


class RankLists:
    """What ranks first for some queries, for a report: those with the worst scores, and some evenly spread.

    Args:
        queries: positions of the queries that are scored, in the order in which they come.
    """

    def __init__(self, queries: np.ndarray):
        self._spread = set(queries[np.linspace(0, len(queries) - 1, _PER_KIND).round().astype(int)].tolist())
        self._worst: list[tuple[float, int]] = []
        self._lists: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def offer(self, query: int, score: float, others: np.ndarray, right: np.ndarray, similarity: np.ndarray) -> None:
        """Keep a query's list if it is to be shown.

        Args:
            score: higher is better.
            others: similarities of the wrong images, and -inf for whatever does not count; changed here.
            right: positions of the right images.
            similarity: theirs.
        """
        worse = len(self._worst) < _PER_KIND or score < self._worst[-1][0]
        if not worse and query not in self._spread:
            return
        others[right] = similarity
        self._lists[query] = _first(others, right)
        if worse:
            insort(self._worst, (score, query))
            for _, better in self._worst[_PER_KIND:]:
                if better not in self._spread:
                    del self._lists[better]
            del self._worst[_PER_KIND:]

    def arrays(self) -> dict[str, np.ndarray]:
        """``shown``: int [S], positions of queries, worst first and then the evenly spread ones; ``shown_top``: int
        [S, 10], positions in the gallery, best first, -1 where there are fewer; ``shown_right``: bool [S, 10]."""
        worst = [query for _, query in self._worst]
        shown = worst + sorted(self._spread.difference(worst))
        lists = [self._lists[query] for query in shown]
        return {
            "shown": np.array(shown),
            "shown_top": np.stack([top for top, _ in lists]),
            "shown_right": np.stack([hit for _, hit in lists]),
        }


def _first(similarities: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the most similar images, wrong ones first among equals, and whether each is right."""
    lowest = np.partition(similarities, -_TOP)[-_TOP] if len(similarities) > _TOP else -np.inf
    chosen = np.flatnonzero((similarities >= lowest) & (similarities > -np.inf))
    hit = np.isin(chosen, right)
    order = np.lexsort((hit, -similarities[chosen]))[:_TOP]
    top, of_top = np.full(_TOP, -1), np.zeros(_TOP, dtype=bool)
    top[: len(order)], of_top[: len(order)] = chosen[order], hit[order]
    return top, of_top


def items_by_identity(scores: np.ndarray, outcomes: Mapping[str, np.ndarray]) -> tuple[np.ndarray, Items]:
    """Scores whose plain mean is the metric, as items: clusters are the outcomes' identities."""
    return scores.astype(np.float64), Items(np.full(len(scores), 1 / len(scores)), outcomes["identity"][:, None])


def chance_of_hit(relevant: np.ndarray, candidates: np.ndarray, k: int) -> float:
    """How often a random order of N candidates has one of R right ones among its first k: 1 - C(N-R, k) / C(N, k).

    Args:
        relevant: R of each query; with none it never has.
        candidates: N of each query.
    """
    wrong, k_Q = candidates - relevant, np.minimum(k, candidates)
    certain = k_Q > wrong
    k_Q = np.where(certain, 0, k_Q)
    log_miss = gammaln(wrong + 1) - gammaln(wrong - k_Q + 1) - gammaln(candidates + 1) + gammaln(candidates - k_Q + 1)
    return float(np.mean(np.where(certain, 1.0, -np.expm1(log_miss)) * (relevant > 0)))


def chance_of_precision(relevant: np.ndarray, candidates: np.ndarray) -> float:
    """The expected average precision of a random order, averaged over queries.

    With N candidates of which R are right, and H_N the N-th harmonic number, the rank of a right image is uniform on
    1 .. N and each of the R - 1 others is before it with probability (rank - 1) / (N - 1), so

        E[AP] = ((R - 1) / (N - 1) * (N - H_N) + H_N) / N
    """
    harmonic = digamma(candidates + 1) + np.euler_gamma
    others_right = (relevant - 1) / np.maximum(candidates - 1, 1)
    return float(np.mean((others_right * (candidates - harmonic) + harmonic) / candidates))
