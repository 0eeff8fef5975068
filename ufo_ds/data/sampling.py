"""The order of a task's samples: pure functions of (seed, task, draw index), with random access and no state.

A draw index counts the samples a task has drawn since the start of training, over all ranks. Only permutations are
cached, for speed.
"""

from collections.abc import Callable, Hashable, Sequence

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


class WindowOrder:
    """Every sample exactly once per epoch, from few shards at a time, for sets larger than the local cache.

    An epoch permutes the shards, cuts them into windows of at most W (their numbers as equal as can be), and permutes
    the samples inside each. A shard is read within its window alone, so at any draw no more than W shards are begun and
    not finished.

    Args:
        shard_sizes: samples of each shard; sample indices count through the shards in this order.
        shuffle_shards: W.
    """

    def __init__(self, shard_sizes: Sequence[int], shuffle_shards: int, seed: int, task: str):
        self.size, self.seed, self.task = sum(shard_sizes), seed, task
        self._shard_sizes = np.array(shard_sizes)
        self._shard_starts = np.cumsum(self._shard_sizes) - self._shard_sizes
        windows = -(-len(shard_sizes) // shuffle_shards)
        self._cuts = np.arange(windows + 1) * len(shard_sizes) // windows
        self._stops: dict[Hashable, np.ndarray] = {}
        self._windows: dict[Hashable, np.ndarray] = {}

    def index(self, draw: int) -> int:
        """The sample of this draw, 0..size-1."""
        epoch, position = divmod(draw, self.size)
        stops = _recent(self._stops, epoch, lambda: self._window_stops(epoch))
        window = int(np.searchsorted(stops, position, side="right"))
        samples = _recent(self._windows, (epoch, window), lambda: self._samples(epoch, window))
        return int(samples[position - int(stops[window])])  # counted from the window's end

    def _shard_order(self, epoch: int) -> np.ndarray:
        return numpy_generator(self.seed, "shards", self.task, epoch).permutation(len(self._shard_sizes))

    def _window_stops(self, epoch: int) -> np.ndarray:
        """The first position of the epoch after each window."""
        return np.cumsum(self._shard_sizes[self._shard_order(epoch)])[self._cuts[1:] - 1]

    def _samples(self, epoch: int, window: int) -> np.ndarray:
        shards = self._shard_order(epoch)[self._cuts[window] : self._cuts[window + 1]]
        samples = [np.arange(self._shard_sizes[s]) + self._shard_starts[s] for s in shards]
        return numpy_generator(self.seed, "window", self.task, epoch, window).permutation(np.concatenate(samples))


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
        self.size = self.num_identities // identities_per_step * samples_per_step  # draws of an epoch
        if self.num_identities < identities_per_step:
            raise UserError(
                f"task {task}: too few ids: {self.num_identities} in its shards, but identities_per_step is "
                f"{identities_per_step}: lower it, take more images of each, or add shards"
            )
        self._identities: dict[Hashable, np.ndarray] = {}
        self._visits: dict[Hashable, np.ndarray] = {}

    def index(self, draw: int) -> int:
        """The sample of this draw, 0..len(labels)-1."""
        step, place = divmod(draw, self.samples_per_step)
        slot, k = divmod(place, self.images_per_identity)
        epoch, step_of_epoch = divmod(step, self.num_identities // self.identities_per_step)
        permutation = _recent(self._identities, epoch, lambda: self._permuted_identities(epoch))
        identity = int(permutation[step_of_epoch * self.identities_per_step + slot])

        # One visit an epoch, so the epoch counts the visits.
        images = _recent(self._visits, (identity, epoch), lambda: self._visit(identity, epoch))
        return int(images[k])

    def _permuted_identities(self, epoch: int) -> np.ndarray:
        return numpy_generator(self.seed, "identities", self.task, epoch).permutation(self.num_identities)

    def _visit(self, identity: int, number: int) -> np.ndarray:
        """The K samples of a visit to an identity.

        As many visits as it has images make a round: K permutations of them, one after another. Where a permutation
        begins inside a visit, the images that the visit already holds are moved to its end.
        """
        k, start, stop = self.images_per_identity, int(self._bounds[identity]), int(self._bounds[identity + 1])
        size = stop - start
        round_, visit = divmod(number, size)
        generator = numpy_generator(self.seed, "images", self.task, identity, round_)
        order = generator.permutation(size)
        while len(order) < (visit + 1) * k:  # what comes later is not needed
            permutation = generator.permutation(size)
            if begun := len(order) % k:
                held = np.zeros(size, dtype=bool)
                held[order[-begun:]] = True
                is_held = held[permutation]
                permutation = np.concatenate((permutation[~is_held], permutation[is_held]))
            order = np.concatenate((order, permutation))
        return self._by_label[start + order[visit * k : (visit + 1) * k]]


def _recent(cache: dict[Hashable, np.ndarray], key: Hashable, make: Callable[[], np.ndarray]) -> np.ndarray:
    """Look up or make; the last two are kept, as an epoch may end inside a batch."""
    if key not in cache:
        if len(cache) == 2:
            cache.pop(next(iter(cache)))
        cache[key] = make()
    return cache[key]
