"""Orders of samples: properties on random sizes, and any place of them alone."""

import time
from collections import Counter

import numpy as np
import pytest

from ufo_ds.data.sampling import EpochOrder, PKOrder
from ufo_ds.errors import UserError


@pytest.mark.parametrize("seed", range(10))
def test_every_sample_once_per_epoch(seed: int) -> None:
    size = int(np.random.default_rng(seed).integers(1, 50))
    order = EpochOrder(size, seed, "task")
    epochs = [[order.index(epoch * size + n) for n in range(size)] for epoch in range(4)]
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
    if size > 10:
        assert len({tuple(epoch) for epoch in epochs}) == 4


def test_orders_differ_by_seed_and_task() -> None:
    orders = [EpochOrder(30, seed, task) for seed in (0, 1) for task in ("face", "person")]
    assert len({tuple(order.index(n) for n in range(30)) for order in orders}) == 4
    labels = np.repeat(np.arange(10), 4)
    pk_orders = [PKOrder(labels, 20, 10, seed, task) for seed in (0, 1) for task in ("face", "person")]
    assert len({tuple(order.index(n) for n in range(20)) for order in pk_orders}) == 4


def random_pk(seed: int) -> tuple[PKOrder, np.ndarray, int, int]:
    """An order over identities of 1 to 12 images with labels in random places; P and K."""
    generator = np.random.default_rng(seed)
    identities = int(generator.integers(3, 15))
    p, k = int(generator.integers(1, identities + 1)), int(generator.integers(2, 7))
    names = generator.choice(1000, identities, replace=False)
    labels = generator.permutation(np.repeat(names, generator.integers(1, 13, identities)))
    return PKOrder(labels, p * k, p, seed, "task"), labels, p, k


@pytest.mark.parametrize("seed", range(30))
def test_access_at_random_equals_access_in_order(seed: int) -> None:
    pk, labels, p, k = random_pk(seed)
    for order, make in (
        (pk, lambda: PKOrder(labels, p * k, p, seed, "task")),
        (EpochOrder(17, seed, "task"), lambda: EpochOrder(17, seed, "task")),
    ):
        in_order = [order.index(draw) for draw in range(120)]
        for draw in np.random.default_rng(seed).permutation(120):
            assert order.index(int(draw)) == in_order[draw]
        assert [make().index(draw) for draw in (119, 3, 60)] == [in_order[draw] for draw in (119, 3, 60)]


@pytest.mark.parametrize("seed", range(30))
def test_pk_properties(seed: int) -> None:
    order, labels, p, k = random_pk(seed)
    names, counts = np.unique(labels, return_counts=True)
    count_of = dict(zip(names.tolist(), counts.tolist(), strict=True))
    steps_per_epoch = len(names) // p
    seen: dict[int, list[int]] = {name: [] for name in names.tolist()}
    for epoch in range(30):
        met: list[int] = []
        for step in range(epoch * steps_per_epoch, (epoch + 1) * steps_per_epoch):
            drawn = [order.index(step * p * k + n) for n in range(p * k)]
            for slot in range(p):
                images = drawn[slot * k : (slot + 1) * k]
                (name,) = {int(labels[image]) for image in images}
                assert len(set(images)) == min(k, count_of[name])
                met.append(name)
                seen[name] += images
        assert len(set(met)) == len(met) == steps_per_epoch * p
    if len(names) % p == 0:  # no identity is ever left out, so its visits follow one another
        for name, images in seen.items():
            size = count_of[name]
            for start in range(0, len(images) - size + 1, size):
                assert len(set(images[start : start + size])) == size, "an image came again before all were used"
    balance = {name: Counter(images) for name, images in seen.items()}
    if p == len(names):  # every identity is met 30 times: its images come equally often
        for counter in balance.values():
            assert max(counter.values()) - min(counter.values()) <= 1


def test_left_out_identities_change_with_the_epoch() -> None:
    labels = np.repeat(np.arange(7), 2)
    order = PKOrder(labels, 10, 5, 0, "task")
    left_out = {
        frozenset(range(7)) - {int(labels[order.index(10 * epoch + n)]) for n in range(10)} for epoch in range(40)
    }
    assert all(len(two) == 2 for two in left_out)
    assert frozenset.union(*left_out) == frozenset(range(7))


def test_too_few_identities() -> None:
    with pytest.raises(UserError, match="task face: too few ids: 3 in its shards, but identities_per_step is 4"):
        PKOrder(np.array([5, 5, 6, 7]), 8, 4, 0, "face")


def test_a_hundred_thousand_identities_are_fast() -> None:
    labels = np.random.default_rng(0).integers(0, 100_000, 1_000_000)
    start = time.perf_counter()
    order = PKOrder(labels, 256, 64, 0, "face")
    for draw in range(256 * 8):
        order.index(draw)
    assert time.perf_counter() - start < 3  # about 0.3 s; a scan of the labels per identity takes minutes
