"""Properties of the order of samples, over any shards, ranks, loader processes, exchanges and gradient accumulation."""

import dataclasses
import json
from collections import Counter
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.test_mixing import linear_task, make_shards, margin_task
from ufo_ds.data.mixing import Batch, Batches, TaskSteps, in_turn, loader, one_of_each
from ufo_ds.data.sampling import WindowOrder
from ufo_ds.data.shards import ShardSet
from ufo_ds.data.source import TrainSource
from ufo_ds.parallel.placement import Work, place
from ufo_ds.recipe_task import Augment
from ufo_ds.training.balance import Phases

# Images of each identity; a line is a shard.
SHARDS = [[1, 1], [2], [3, 2], [1], [4], [1, 2, 2], [3], [1], [2, 2], [5], [1, 4], [2, 1]]
SEED = 5


def check(examples: int):
    """The same examples every time."""
    return settings(max_examples=examples, derandomize=True, deadline=None, database=None)


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> list[ShardSet]:
    """Twelve sets of one shard each."""
    root = tmp_path_factory.mktemp("sets")
    found = []
    for i, counts in enumerate(SHARDS):
        directory = make_shards(root / str(i), {f"id{j}": count for j, count in enumerate(counts)}, seed=i)
        found.append(ShardSet.open(directory))
        assert found[-1].shard_sizes == [sum(counts)]
    return found


@dataclasses.dataclass
class Split:
    """How a run is spread."""

    ranks: int
    ep_size: int
    exchange: str
    workers: int
    accumulation: int

    def batches(self, sources: dict[str, TrainSource], task_steps: TaskSteps = one_of_each) -> list[Batches]:
        """Of every rank."""
        work = {name: Work(source.task.samples_per_step, 1) for name, source in sources.items()}
        placement = place(work, self.ranks, self.ep_size)
        reads = placement.owned if self.exchange == "aligned" else placement.read_evenly
        return [Batches(sources, partial(reads, rank), self.accumulation, task_steps) for rank in range(self.ranks)]


@st.composite
def splits(draw: st.DrawFn) -> Split:
    ranks = draw(st.integers(1, 8))
    return Split(
        ranks,
        draw(st.sampled_from([size for size in range(1, ranks + 1) if ranks % size == 0])),
        draw(st.sampled_from(["aligned", "input"])),
        draw(st.integers(1, 4)),
        draw(st.integers(1, 3)),
    )


def drawn(ranks: list[Batches], workers: int, start: int, stop: int) -> list[dict[str, list[int]]]:
    """Draw indices of every step from ``start`` on, over all ranks and their loader processes, which take turns."""
    found: list[dict[str, list[int]]] = [{name: [] for name in ranks[0].sources} for _ in range(start, stop)]
    for batches in ranks:
        gas = batches.accumulation
        for worker in range(workers):
            for i in range(start * gas + worker, stop * gas, workers):
                for name, (positions, draws, _) in batches.draws(i).items():
                    assert len(positions) == len(draws)
                    found[i // gas - start][name] += draws
    return found


def plain_source(name: str, sets: list[ShardSet], samples: int, shuffle_shards: int | None = None) -> TrainSource:
    return TrainSource(linear_task(name, "", samples_per_step=samples), SEED, sets, shuffle_shards=shuffle_shards)


# 6, 12 and 18 can be divided by every accumulation.
TASKS = st.fixed_dictionaries({
    name: st.tuples(st.integers(1, 12), st.sampled_from([6, 12, 18]), st.none() | st.integers(1, 13)) for name in "abc"
})  # fmt: skip


@check(60)
@given(tasks=TASKS, split=splits())
def test_every_sample_once_in_each_epoch(sets: list[ShardSet], tasks: dict, split: Split) -> None:
    sources = {name: plain_source(name, sets[:shards], n, window) for name, (shards, n, window) in tasks.items()}
    steps = max(-(-2 * len(source) // source.task.samples_per_step) for source in sources.values())
    of_step = drawn(split.batches(sources), split.workers, 0, steps)
    for name, source in sources.items():
        samples = [source.index(draw) for step in of_step for draw in sorted(step[name])]
        for epoch in range(2):
            assert sorted(samples[epoch * len(source) : (epoch + 1) * len(source)]) == list(range(len(source)))


@check(6)
@given(tasks=TASKS, split=splits())
def test_every_one_of_a_thousand_steps_holds_the_counts(sets: list[ShardSet], tasks: dict, split: Split) -> None:
    sources = {name: plain_source(name, sets[:shards], n, window) for name, (shards, n, window) in tasks.items()}
    counts = {name: source.task.samples_per_step for name, source in sources.items()}
    for step in drawn(split.batches(sources), split.workers, 0, 1000):
        assert {name: len(set(draws)) for name, draws in step.items()} == counts
        assert {name: len(draws) for name, draws in step.items()} == counts


@check(60)
@given(first=splits(), second=splits(), cut=st.integers(0, 12), kind=st.sampled_from(["each", "turn", "rates"]),
       rates=st.lists(st.tuples(*[st.integers(1, 8)] * 3), min_size=2, max_size=2))  # fmt: skip
def test_a_resumed_run_goes_on_in_the_same_sequence(
    sets: list[ShardSet], first: Split, second: Split, cut: int, kind: str, rates: list[tuple[int, ...]]
) -> None:
    """After any step, with any other split. The cursor of every task is the step, and with rates also the counts of
    the phases; a checkpoint keeps them as JSON."""
    if kind == "rates":
        second.exchange = first.exchange = "aligned"  # the only one with which counts may vary
    sources = {name: plain_source(name, sets[: 4 * i], 6 * i) for i, name in enumerate("abc", start=1)}
    phases = Phases(4, [dict.fromkeys("abc", 4), *(dict(zip("abc", counts, strict=True)) for counts in rates)])
    saved = Phases(4, json.loads(json.dumps(phases.counts)))
    before, after = {
        "each": (one_of_each, one_of_each),
        "turn": (partial(in_turn, list("abc")), partial(in_turn, list("abc"))),
        "rates": (phases.task_steps, saved.task_steps),
    }[kind]
    of_step = drawn(first.batches(sources, before), first.workers, 0, cut)
    of_step += drawn(second.batches(sources, after), second.workers, cut, 12)
    done = dict.fromkeys("abc", 0)
    for step in of_step:
        for name, draws in step.items():
            assert sorted(draws) == list(range(done[name], done[name] + len(draws)))
            done[name] += len(draws)
    own_steps = {
        "each": dict.fromkeys("abc", 12),
        "turn": dict.fromkeys("abc", 4),
        "rates": {name: 4 + sum(counts[i] for counts in rates) for i, name in enumerate("abc")},
    }[kind]
    assert done == {name: own_steps[name] * source.task.samples_per_step for name, source in sources.items()}


@check(40)
@given(p_per_micro=st.integers(1, 4), k=st.integers(2, 6), shards=st.integers(8, 12), split=splits())
def test_pk_steps(sets: list[ShardSet], p_per_micro: int, k: int, shards: int, split: Split) -> None:
    """P distinct identities in a step, with K distinct images of each that has as many and all of each other one; every
    epoch as many distinct identities as fit."""
    p = min(p_per_micro * split.accumulation, 12 // split.accumulation * split.accumulation)
    task = margin_task("person", "", samples_per_step=p * k, identities_per_step=p)
    source = TrainSource(task, SEED, sets[:shards])
    images = Counter(source.labels.tolist())
    per_epoch = source.num_classes // p
    assert source.steps_per_epoch == per_epoch
    of_step = drawn(split.batches({"person": source}), split.workers, 0, 3 * per_epoch)
    met: list[int] = []
    for step in of_step:
        samples = [source.index(draw) for draw in sorted(step["person"])]
        labels = source.labels[samples]
        assert sorted(Counter(labels.tolist()).values()) == [k] * p
        for label in set(labels.tolist()):
            own = {sample for sample in samples if source.labels[sample] == label}
            assert len(own) == min(k, images[label])
            met.append(label)
    for epoch in range(3):
        assert len(set(met[epoch * per_epoch * p : (epoch + 1) * per_epoch * p])) == per_epoch * p


@check(150)
@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any),
    window=st.integers(1, 13),
    seed=st.integers(0, 1000),
)
def test_windows(sizes: list[int], window: int, seed: int) -> None:
    """Each sample once per epoch, no more than W shards begun and not finished, and any draw alone is the same."""
    order = WindowOrder(sizes, window, seed, "task")
    shard_of = np.repeat(np.arange(len(sizes)), sizes)
    samples = [order.index(draw) for draw in range(3 * sum(sizes))]
    for epoch in range(3):
        of_epoch = samples[epoch * sum(sizes) : (epoch + 1) * sum(sizes)]
        assert sorted(of_epoch) == list(range(sum(sizes)))
        left = dict(enumerate(sizes))
        begun: set[int] = set()
        for sample in of_epoch:
            shard = int(shard_of[sample])
            begun.add(shard)
            assert len(begun) <= window
            left[shard] -= 1
            if not left[shard]:
                begun.remove(shard)
        assert not begun
    for draw in np.random.default_rng(seed).integers(0, len(samples), 10).tolist():
        assert WindowOrder(sizes, window, seed, "task").index(draw) == samples[draw]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (Split(1, 1, "aligned", 0, 1), Split(2, 2, "aligned", 3, 2)),
        (Split(2, 2, "input", 2, 2), Split(1, 1, "aligned", 1, 1)),
        (Split(3, 1, "aligned", 4, 1), Split(2, 1, "aligned", 1, 1)),
    ],
)
@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more processes than cores here
def test_images_of_an_epoch_from_real_loaders(sets: list[ShardSet], before: Split, after: Split) -> None:
    """Every image of ten shards once, and once more, whoever reads it, with a change of the split in between; more
    loader processes than shards in the case of task b."""
    sources = {}
    for name, own_sets in (("a", sets[:10]), ("b", sets[10:])):
        source = plain_source(name, own_sets, 4, shuffle_shards=3)
        sources[name] = TrainSource(
            dataclasses.replace(source.task, augment=Augment(), input=(11, 9)), SEED, own_sets, shuffle_shards=3
        )
    found: dict[str, list[bytes]] = {"a": [], "b": []}
    steps = -(-2 * len(sources["a"]) // 4)
    cut = steps // 3
    for split, start, stop in ((before, 0, cut), (after, cut, steps)):
        gas = split.accumulation
        streams = [loader(batches, start * gas, stop * gas, split.workers, pin=False)
                   for batches in split.batches(sources)]  # fmt: skip
        for of_ranks in zip(*streams, strict=True):
            for name in found:
                found[name] += images_in_order(of_ranks, name)
    for name, source in sources.items():
        size = len(source)
        every = Counter(source.pixels(index).tobytes() for index in range(size))
        assert len(every) == size
        for epoch in range(len(found[name]) // size):
            assert Counter(found[name][epoch * size : (epoch + 1) * size]) == every
        assert found[name] == [source.load(draw)[0].tobytes() for draw in range(4 * steps)]


def images_in_order(of_ranks: tuple[Batch, ...], name: str) -> list[bytes]:
    """A task's global micro-batch, put together by the positions."""
    parts = [batch.tasks[name] for batch in of_ranks if name in batch.tasks]
    rows = [row for part in parts for row in zip(part.positions, part.images, strict=True)]
    return [image.numpy().tobytes() for _, image in sorted(rows, key=lambda row: row[0])]


def test_windows_mix_their_shards_and_change_with_the_epoch() -> None:
    """40 shards of 25 in windows of 4: a window's shards come mixed, and other ones together in the next epoch."""
    order = WindowOrder([25] * 40, 4, SEED, "task")
    shards = np.array([order.index(draw) // 25 for draw in range(2000)]).reshape(2, 10, 100)
    together = [{frozenset(window.tolist()) for window in epoch} for epoch in shards]
    assert all(len(group) == 4 for epoch in together for group in epoch)
    assert not together[0] & together[1]
    changes = (np.diff(shards, axis=2) != 0).mean()
    assert 0.7 < changes < 0.8  # 75 of 99 on average if mixed evenly
