"""Tasks over ranks: against brute force and the plain greedy rule, of published sizes; samples over replicas."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ufo_ds import recipe_file
from ufo_ds.parallel import config as configs
from ufo_ds.parallel.partition import longest_first, partition, sums
from ufo_ds.parallel.placement import Placement, Work, imbalance, place, share, work_of
from ufo_ds.recipe import Recipe

# --- partition --------------------------------------------------------------------------------------------------------


def by_brute_force(loads: list[int], parts: int) -> tuple[int, int]:
    """Items in the fullest part and largest load of the best way, by the words of the objective."""
    chosen = np.array(list(itertools.product(range(parts), repeat=len(loads))))
    counts = np.stack([(chosen == part).sum(1) for part in range(parts)]).max(0)
    largest = np.stack([((chosen == part) * loads).sum(1) for part in range(parts)]).max(0)
    total = sum(loads)
    # Of the mean: 102%, or 1% above the smallest possible.
    good = (100 * parts * largest <= 102 * total) | (100 * parts * (largest - largest.min()) <= total)
    return min((int(count), int(load)) for count, load in zip(counts[good], largest[good], strict=True))


def found(loads: list[int], parts: int) -> tuple[int, int]:
    chosen = partition(loads, parts)
    assert len(chosen) == parts
    assert sorted(i for part in chosen for i in part) == list(range(len(loads)))
    assert chosen == partition(loads, parts)
    for part in chosen:
        assert part == sorted(part, key=lambda i: (-loads[i], i))
    firsts = [min(part) for part in chosen if part]
    assert firsts == sorted(firsts)
    assert all(chosen[: len(firsts)])
    return max(map(len, chosen)), max(sum(loads[i] for i in part) for part in chosen)


# Equal loads, as those of tasks with equally many samples, and loads of all sizes.
LOADS = st.one_of(st.integers(1, 8), st.integers(1, 1000), st.integers(1, 10**6))


@settings(max_examples=60, deadline=None)
@given(st.lists(LOADS, min_size=1, max_size=8), st.integers(1, 3))
def test_partition_is_that_of_brute_force(loads, parts):
    assert found(loads, parts) == by_brute_force(loads, parts)


@settings(max_examples=40, deadline=None)
@given(st.lists(LOADS, min_size=1, max_size=40), st.integers(1, 12))
def test_partition_is_never_worse_than_the_greedy_rule(loads, parts):
    """Longest first, written down anew. It may be undercut in the largest load or, if that is even, in the slots."""
    heaps: list[list[int]] = [[] for _ in range(parts)]
    for load in sorted(loads, reverse=True):
        min(heaps, key=sum).append(load)
    fullest, largest = max(map(len, heaps)), max(map(sum, heaps))
    slots, load = found(loads, parts)
    mean = Fraction(sum(loads), parts)
    assert load <= max(largest + mean / 100, mean * 102 / 100)
    if load > largest:
        assert slots < fullest


def test_longest_first_by_hand():
    """Graham's own kind of example: 5, 5, 4, 4, 3, 3, 3 on three ranks come to 11, not 9."""
    loads = [5, 5, 4, 4, 3, 3, 3]
    assert sums(loads, longest_first(loads, 3), 3) == [11, 8, 8]
    assert partition(loads, 3) == [[0, 2], [1, 3], [4, 5, 6]]


def test_slots_come_after_evenness():
    """12 + 2 + 2, 12 + 4, 4 + 4 + 4 + 4; as even is 12 + 4, 12 + 4, 4 + 4 + 4 + 2 + 2, with five in a part."""
    assert found([4, 4, 4, 4, 4, 12, 12, 2, 2], 3) == (4, 16)
    assert found([100, 50, 50, 1], 2) == (2, 101)  # within 2% and two a rank
    assert found([100, 30, 30, 40], 2) == (3, 100)  # two a rank would be far from even


# --- samples over replicas --------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_shares_tile_and_the_longer_ones_are_in_a_row(data):
    count, parts = data.draw(st.integers(0, 50)), data.draw(st.integers(1, 12))
    first = data.draw(st.integers(0, parts - 1))
    shares = [share(range(count), parts, part, first) for part in range(parts)]
    assert [i for positions in shares for i in positions] == list(range(count))
    longer = {(first + i) % parts for i in range(count % parts)}
    assert [len(positions) - count // parts for positions in shares] == [int(part in longer) for part in range(parts)]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_sample_is_read_and_trained_on_once_and_ranks_have_equally_many(data):
    samples = {f"t{i}": n for i, n in enumerate(data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=12)))}
    world_size = data.draw(st.integers(1, 24))
    ep_size = data.draw(st.sampled_from([size for size in range(1, world_size + 1) if world_size % size == 0]))
    placement = place({task: Work(n, 1) for task, n in samples.items()}, world_size, ep_size)
    for reads in (placement.owned, placement.read_evenly):
        seen: dict[str, list[int]] = {task: [] for task in samples}
        for rank in range(world_size):
            for task, positions in reads(rank, samples).items():
                seen[task] += positions
        assert {task: sorted(positions) for task, positions in seen.items()} == {
            task: list(range(n)) for task, n in samples.items()
        }
    for e in range(ep_size):  # the ranks that share their tasks
        ranks = [rank for rank in range(world_size) if placement.ep_rank(rank) == e]
        assert ranks == list(placement.holders(e)) == list(range(ranks[0], ranks[-1] + 1))  # neighbours
        numbers = [sum(map(len, placement.owned(rank, samples).values())) for rank in ranks]
        assert max(numbers) - min(numbers) <= 1
    for replica in range(placement.replicas):  # the ranks of a group read the same tasks
        ranks = [rank for rank in range(world_size) if placement.replica(rank) == replica]
        assert all(list(placement.group(rank)) == ranks for rank in ranks)
        assert [placement.ep_rank(rank) for rank in ranks] == list(range(ep_size))
        numbers = [sum(map(len, placement.read_evenly(rank, samples).values())) for rank in ranks]
        assert max(numbers) - min(numbers) <= 1


# --- tasks over ranks -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ufo2() -> Recipe:
    return recipe_file.load("ufo2_17b")


def published(recipe: Recipe, tasks: int) -> dict[str, Work]:
    """26 are in the results, of which the published configuration has 24."""
    work = work_of(recipe, {task.name: task.num_classes or 0 for task in recipe.tasks}, 1)
    return work if tasks == 26 else {name: x for name, x in work.items() if name not in ("retinopathy", "dmlab")}


def show(placement: Placement, work: dict[str, Work]) -> None:
    print(
        f"{len(work)} tasks on {placement.world_size} ranks: EP {placement.ep_size}, {placement.slots} slots, "
        f"the busiest rank {imbalance(placement, work):.4f} of the mean"
    )
    for tasks in placement.tasks_of:
        print(f"  {sum(work[task].samples for task in tasks)} samples: {' '.join(tasks)}")


@pytest.mark.parametrize("world_size", [48, 64, 128])
@pytest.mark.parametrize(("tasks", "total"), [(24, 6880), (26, 7168)])
def test_published_tasks(ufo2, tasks, total, world_size):
    work = published(ufo2, tasks)
    assert sum(of_task.samples for of_task in work.values()) == total
    placement = place(work, world_size, None)
    show(placement, work)
    assert sorted(placement.tasks) == sorted(work)
    assert imbalance(placement, work) <= 1.02
    # No larger one is that even: brute force over divisors.
    for size in range(placement.ep_size + 1, world_size + 1):
        if world_size % size == 0:
            assert imbalance(place(work, world_size, size), work) > 1.02
    assert placement.ep_size == {24: {48: 6, 64: 4, 128: 4}, 26: {48: 2, 64: 2, 128: 2}}[tasks][world_size]


def test_24_published_tasks_on_six(ufo2):
    """Face and ImageNet alone, the other 22 on four ranks, within 1%; 1152 = 576 + 4 x 144, so seven slots."""
    placement = place(work := published(ufo2, 24), 48, 6)
    assert ("face",) in placement.tasks_of
    assert ("imagenet",) in placement.tasks_of
    assert placement.slots == 7
    assert imbalance(placement, work) <= 1.01


def test_heads_count_where_they_are_large(ufo2):
    """A tiny backbone under 93,431 classes: the head is a quarter of the work, unless its negatives are sampled."""
    overrides = [
        ("model.backbone", "{dim: 64, depth: 2, heads: 2, patch_size: 32}"),
        ("tasks.face.head.sampled_negatives", "0.1"),
    ]
    small = recipe_file.load("ufo2_17b", overrides[:1])
    sampled = recipe_file.load("ufo2_17b", overrides)
    classes = {task.name: task.num_classes or 0 for task in small.tasks}
    whole, partly = work_of(small, classes, 2)["face"], work_of(sampled, classes, 2)["face"]
    assert whole.samples == 576
    assert whole.flops - partly.flops == pytest.approx(0.9 * 2 * 93431 * 64, abs=1)
    assert whole.flops - work_of(small, classes, 2)["imagenet"].flops == 2 * (93431 - 1000) * 64


def test_auto_without_tasks_that_are_even():
    assert place({"a": Work(8, 1), "b": Work(1, 1)}, 2, None).ep_size == 1
    assert place({"a": Work(8, 1), "b": Work(4, 2)}, 2, None).tasks_of == (("a",), ("b",))
    assert place({name: Work(5, 7) for name in "abcd"}, 6, None).ep_size == 2


def test_auto_in_the_deepspeed_json(ufo2):
    for batches, wanted in (("heterogeneous", None), ("isomorphic", 1)):
        recipe = recipe_file.load("ufo2_17b", [("data.batches", batches)])
        for values in ({}, {"expert_parallel": {"autoep_size": "auto"}}):
            assert configs.resolve(values, "test", recipe, 12).ep_size == wanted
    assert configs.resolve({"expert_parallel": {"autoep_size": 3}}, "test", ufo2, 12).ep_size == 3
