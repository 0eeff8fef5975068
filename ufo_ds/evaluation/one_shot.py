"""One-shot classification: which of N images is of the same identity?

In each episode N identities are drawn with one image each, the support, and another image of one of them, the query;
it is classified by the most similar support (Vinyals et al., 2016, "Matching Networks for One Shot Learning"; 20 ways
as in Omniglot's one-shot task, Lake et al., 2015, there within an alphabet). Ties are broken pessimistically.
"""

from collections.abc import Mapping

import numpy as np

from ufo_ds.errors import UserError
from ufo_ds.evaluation import ranking
from ufo_ds.evaluation.ranking import JUNK
from ufo_ds.evaluation.statistics import Items
from ufo_ds.seeding import numpy_generator

MAIN_METRIC = "accuracy"


def evaluate(
    features: np.ndarray, ids: np.ndarray, ways: int = 20, episodes: int = 1000, seed: int = 0
) -> dict[str, float]:
    """The share of episodes won: :func:`metrics` of :func:`outcomes`."""
    return metrics(outcomes(features, ids, ways, episodes, seed))


def outcomes(
    features: np.ndarray, ids: np.ndarray, ways: int = 20, episodes: int = 1000, seed: int = 0
) -> dict[str, np.ndarray]:
    """Draw episodes and classify their queries by cosine similarity.

    The query's identity is drawn evenly from those with at least two images, the others from all that are left.

    Args:
        features: float32 [N, D], normalised here.
        ids: int [N]; -1 is junk, which is left out.
        ways: number of identities in an episode.
        episodes: number of episodes.
        seed: of the draws; an episode does not depend on how many there are.

    Returns:
        Of every episode: ``episode``, int [E], its number; ``query``, int [E], which image; ``identity``, int [E], the
        query's; ``right``, bool [E]. ``ways``: int [1].

    Raises:
        UserError: no images, features that are not finite, fewer identities than ways, or none with two images.
    """
    ranking.check_not_empty("one_shot", features, features)
    lengths = ranking.norms(features, "one_shot", "image")
    order = np.argsort(ids, kind="stable")
    order = order[ids[order] != JUNK]
    identities, starts, counts = np.unique(ids[order], return_index=True, return_counts=True)
    if not 2 <= ways <= len(identities):
        raise UserError(
            f"one_shot: {ways} ways with {len(identities)} identities in the benchmark's shards; set its ways to 2 or "
            f"more, and to no more than there are identities"
        )
    with_two = np.flatnonzero(counts >= 2)
    if len(with_two) == 0:
        raise UserError(
            f"one_shot: none of the {len(identities)} identities has two images, one as support and one as query; "
            f"check the labels of the benchmark's shards"
        )
    queries, right = np.empty(episodes, dtype=np.int64), np.empty(episodes, dtype=bool)
    for episode in range(episodes):
        generator = numpy_generator("one shot", seed, episode)
        target = generator.choice(with_two)
        others = generator.choice(len(identities) - 1, ways - 1, replace=False)
        drawn = np.append(target, others + (others >= target))  # the query's identity first
        images = order[starts[drawn] + generator.integers(counts[drawn])]
        own = order[starts[target] :][: counts[target]]
        queries[episode] = generator.choice(own[own != images[0]])
        # Not a matrix product, which rounds equal sums differently from row to row.
        similarity = np.einsum("nd,d->n", features[images], features[queries[episode]]) / lengths[images]
        right[episode] = similarity[0] > similarity[1:].max()
    identity = ids[queries]
    return {
        "episode": np.arange(episodes),
        "query": queries,
        "identity": identity,
        "right": right,
        "ways": np.array([ways]),
    }


def metrics(outcomes: Mapping[str, np.ndarray]) -> dict[str, float]:
    """``accuracy`` in 0..1."""
    return {"accuracy": float(np.mean(outcomes["right"]))}


def items(outcomes: Mapping[str, np.ndarray]) -> tuple[np.ndarray, Items]:
    """Right or wrong, of every episode; clusters are the queries' identities."""
    return ranking.items_by_identity(outcomes["right"], outcomes)


def chance(outcomes: Mapping[str, np.ndarray]) -> dict[str, float]:
    """What drawing one of the N images gets."""
    return {"accuracy": 1 / float(outcomes["ways"][0])}
