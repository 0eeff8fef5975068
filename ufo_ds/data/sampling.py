"""The order of a task's samples: pure functions of (seed, task, draw index), with random access and no state.

A draw index counts the samples a task has drawn since the start of training, over all ranks. Only permutations are
cached, for speed.
"""

from collections.abc import Callable, Hashable

import numpy as np

from ufo_ds.errors import UserError
from ufo_ds.seeding import numpy_generator


class EpochOrder:
    """Every sample exactly once per epoch, in a new order each time."""

    def __init__(self, size: int, seed: int, task: str):
        self.size, self.seed, self.task = size, seed, task
        self._permutations: dict[Hashable, np.ndarray] = {}

    def index(self, draw: int) -> int:
        """The sample of this draw, 0..size-1."""
        epoch, position = divmod(draw, self.size)
        return int(_recent(self._permutations, epoch, lambda: self._permutation(epoch))[position])

    def _permutation(self, epoch: int) -> np.ndarray:
        return numpy_generator(self.seed, "order", self.task, epoch).permutation(self.size)


class PKOrder:
    """Steps of P identities with K images each (Hermans et al., 2017).

    An epoch is ``identities // P`` steps over permuted identities, the remainder left out; so an identity is met at
    most once per epoch, P distinct ones in each step. Its images are used up before one comes again, but K distinct
    ones are in a step whenever it has as many.

    Raises:
        UserError: fewer identities than P.
    """

    def __init__(self, labels: np.ndarray, samples_per_step: int, identities_per_step: int, seed: int, task: str):
        self.samples_per_step, self.identities_per_step = samples_per_step, identities_per_step
        self.images_per_identity = samples_per_step // identities_per_step
        self.seed, self.task = seed, task
        self._by_label = np.argsort(labels, kind="stable")
        _, starts = np.unique(labels[self._by_label], return_index=True)
        self._bounds = np.append(starts, len(labels))  # identity i has samples by_label[bounds[i]:bounds[i + 1]]
        self.num_identities = len(starts)
        if self.num_identities < identities_per_step:
            raise UserError(
                f"task {task}: too few ids: {self.num_identities} in its shards, but identities_per_step is "
                f"{identities_per_step}: lower it or add shards"
            )
        self._identities: dict[Hashable, np.ndarray] = {}
        self._images: dict[Hashable, np.ndarray] = {}

    def index(self, draw: int) -> int:
        """The sample of this draw, 0..len(labels)-1."""
        step, place = divmod(draw, self.samples_per_step)
        slot, k = divmod(place, self.images_per_identity)
        epoch, step_of_epoch = divmod(step, self.num_identities // self.identities_per_step)
        permutation = _recent(self._identities, epoch, lambda: self._permuted_identities(epoch))
        identity = int(permutation[step_of_epoch * self.identities_per_step + slot])

        start, stop = int(self._bounds[identity]), int(self._bounds[identity + 1])
        # One visit an epoch, so the epoch counts the visits: after as many as there are images, each has come K times.
        round_, visit = divmod(epoch, stop - start)
        images = _recent(
            self._images, (identity, round_), lambda: self._image_order(identity, round_, size=stop - start)
        )
        return int(self._by_label[start + images[visit, k]])

    def _permuted_identities(self, epoch: int) -> np.ndarray:
        return numpy_generator(self.seed, "identities", self.task, epoch).permutation(self.num_identities)

    def _image_order(self, identity: int, round_: int, size: int) -> np.ndarray:
        """Images [size, K] of ``size`` visits to an identity of ``size`` images: K permutations, one after another.

        Where a permutation begins inside a visit, the images that the visit already holds are moved to its end.
        """
        k = self.images_per_identity
        generator = numpy_generator(self.seed, "images", self.task, identity, round_)
        order = np.empty(0, dtype=np.int64)
        for _ in range(k):
            permutation = generator.permutation(size)
            begun = order[len(order) - len(order) % k :]
            order = np.append(order, permutation[np.argsort(np.isin(permutation, begun), kind="stable")])
        return order.reshape(size, k)


def _recent(cache: dict[Hashable, np.ndarray], key: Hashable, make: Callable[[], np.ndarray]) -> np.ndarray:
    """Look up or make; the last two are kept, as an epoch may end inside a batch."""
    if key not in cache:
        if len(cache) == 2:
            cache.pop(next(iter(cache)))
        cache[key] = make()
    return cache[key]
