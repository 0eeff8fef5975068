"""Slow tasks sampled more often: rates, whole task steps, and the batches that are made of them."""

import pickle
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch

from tests.test_mixing import linear_task, make_shards, margin_task
from ufo_ds.data.mixing import Batches, loader, one_of_each
from ufo_ds.data.source import TrainSource
from ufo_ds.parallel.placement import Work, place
from ufo_ds.recipe import Balance
from ufo_ds.training.balance import Phases, counts_of, rates_of, slowness_of


def balance(every: int = 100, strength: float = 1.0, largest: float = 2.0) -> Balance:
    return Balance(every=every, strength=strength, largest=largest)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TrainSource]:
    root = tmp_path_factory.mktemp("sets")
    glyphs = make_shards(root / "glyphs", {"a": 4, "b": 5, "c": 6})
    person = make_shards(root / "person", dict.fromkeys([f"p{i}" for i in range(9)], 4), seed=1)
    return {
        "glyphs": TrainSource.open(linear_task("glyphs", glyphs), seed=3),
        "person": TrainSource.open(margin_task("person", person), seed=3),
    }


# --- rates ------------------------------------------------------------------------------------------------------------


def test_slowness_is_the_share_of_the_first_loss_that_is_left() -> None:
    assert slowness_of({"a": 4.0, "b": 0.5}, {"b": 0.4, "a": 1.0}) == pytest.approx({"a": 0.25, "b": 0.8})
    assert slowness_of({"a": 0.0}, {"a": 0.0}) == {"a": 1.0}


@pytest.mark.parametrize(
    ("slowness", "samples", "options", "wanted"),
    [
        # 0.8 : 0.4 with equal samples: 4/3 and 2/3.
        ({"a": 0.8, "b": 0.4}, {"a": 8, "b": 8}, balance(), {"a": 4 / 3, "b": 2 / 3}),
        # With 3 : 1 samples: 3 (2 c) + c = 4.
        ({"a": 0.8, "b": 0.4}, {"a": 24, "b": 8}, balance(), {"a": 8 / 7, "b": 4 / 7}),
        # The square of 2 : 1 is 4 : 1, so 8/5 and 2/5; below 1/2 is not allowed, which leaves 3/2 for the other.
        ({"a": 0.8, "b": 0.4}, {"a": 8, "b": 8}, balance(strength=2.0), {"a": 3 / 2, "b": 1 / 2}),
        ({"a": 0.8, "b": 0.4}, {"a": 8, "b": 8}, balance(strength=2.0, largest=3.0), {"a": 8 / 5, "b": 2 / 5}),
        # a is cut off at 2; of the 3 that remain of 5, four equal ones get 3/4 each.
        ({"a": 0.9, "b": 0.1, "c": 0.1, "d": 0.1, "e": 0.1}, dict.fromkeys("abcde", 5), balance(),
         {"a": 2.0, "b": 0.75, "c": 0.75, "d": 0.75, "e": 0.75}),
        # Cut off at both ends: a 2 and c 1/2; the one between takes what is left.
        ({"a": 1.0, "b": 0.05, "c": 0.001}, dict.fromkeys("abc", 1), balance(), {"a": 2.0, "b": 0.5, "c": 0.5}),
        ({"a": 1.0, "b": 0.3, "c": 0.001}, {"a": 1, "b": 4, "c": 1}, balance(), {"a": 2.0, "b": 0.875, "c": 0.5}),
        ({"a": 0.7, "b": 0.01}, {"a": 8, "b": 2}, balance(strength=0.0), {"a": 1.0, "b": 1.0}),
        ({"a": 0.3}, {"a": 8}, balance(), {"a": 1.0}),
        # Too steep for a float; the task that is sampled most has few samples, so the other gives up little.
        ({"a": 1.0, "b": 0.01}, {"a": 1, "b": 10}, balance(strength=400.0), {"a": 2.0, "b": 0.9}),
    ],
)  # fmt: skip
def test_rates_by_hand(slowness, samples, options, wanted) -> None:
    assert rates_of(slowness, samples, options) == pytest.approx(wanted, rel=1e-9)


def test_rates_keep_bounds_samples_and_order() -> None:
    random = np.random.default_rng(0)
    for _ in range(300):
        tasks = [f"t{i}" for i in range(random.integers(1, 9))]
        samples = {task: int(random.integers(1, 100)) for task in tasks}
        slowness = {task: float(random.lognormal(-1, 2)) for task in tasks}
        options = balance(int(random.integers(1, 300)), float(random.uniform(0, 4)), float(random.uniform(1.01, 9)))
        rates = rates_of(slowness, samples, options)
        assert all(1 / options.largest <= rate <= options.largest for rate in rates.values())
        assert sum(rates[t] * samples[t] for t in tasks) == pytest.approx(sum(samples.values()), rel=1e-9)
        between = [t for t in tasks if 1 / options.largest < rates[t] < options.largest]
        scales = [rates[t] / slowness[t] ** options.strength for t in between]
        assert scales == pytest.approx(scales[:1] * len(scales), rel=1e-9)  # proportional
        ordered = [rates[t] for t in sorted(tasks, key=slowness.__getitem__)]
        assert ordered == sorted(ordered)

        counts = counts_of(rates, options)
        for task, count in counts.items():
            assert abs(count - rates[task] * options.every) < 1
            assert 1 / Fraction(options.largest) <= Fraction(count, options.every) <= Fraction(options.largest)
        assert any(count >= options.every for count in counts.values())  # so that no step is without samples


def test_equal_slowness_is_one_of_each() -> None:
    rates = rates_of(dict.fromkeys("abc", 0.37), {"a": 3, "b": 8, "c": 64}, balance(1000))
    assert counts_of(rates, balance(1000)) == dict.fromkeys("abc", 1000)


# --- task steps -------------------------------------------------------------------------------------------------------


def test_task_steps_of_random_rates() -> None:
    """After i + 1 steps of a phase floor((i + 1) rate) own steps are done; each once, in order, over all phases."""
    random = np.random.default_rng(1)
    for _ in range(30):
        length = int(random.integers(1, 40))
        counts = [{"a": length}, *({"a": int(random.integers(1, 4 * length))} for _ in range(4))]
        phases = Phases(length, counts)
        assert phases.stop == 5 * length
        done = []
        for step in range(phases.stop):
            done += phases.task_steps(step, "a")
            phase, i = divmod(step, length)
            rate = Fraction(counts[phase]["a"], length)
            assert len(done) == sum(c["a"] for c in counts[:phase]) + (i + 1) * rate // 1
            assert len(phases.task_steps(step, "a")) in (rate // 1, -(-rate // 1))
        assert done == list(range(len(done)))


def drawn(source: TrainSource, own_steps: range) -> list[bytes]:
    size = source.task.samples_per_step
    return [source.load(draw)[0].tobytes() for own in own_steps for draw in range(own * size, (own + 1) * size)]


def test_batches_hold_each_task_step_once_whatever_the_split(sources: dict[str, TrainSource]) -> None:
    """Two phases and an unfinished one; over ranks, expert-parallel or not, and with accumulation."""
    phases = Phases(4, [{"glyphs": 4, "person": 4}, {"glyphs": 3, "person": 6}, {"glyphs": 8, "person": 2}])
    tasks, steps = list(sources), 11
    seen: dict[str, list[bytes]] = {task: [] for task in tasks}
    held = {task: [len(phases.task_steps(step, task)) for step in range(steps)] for task in tasks}
    assert held == {"glyphs": [1, 1, 1, 1, 0, 1, 1, 1, 2, 2, 2], "person": [1, 1, 1, 1, 1, 2, 1, 2, 0, 1, 0]}
    for accumulation, world_size, ep_size in ((1, 1, 1), (1, 2, 2), (2, 4, 2), (4, 3, 1), (2, 1, 1)):
        placement = place({task: Work(1, 1) for task in tasks}, world_size, ep_size)
        ranks = [
            Batches(sources, partial(placement.owned, rank), accumulation, phases.task_steps)
            for rank in range(world_size)
        ]
        for step in range(steps):
            for task, source in sources.items():
                images, labels = [], []
                for micro_step in range(accumulation):
                    parts = [rank[step * accumulation + micro_step] for rank in ranks]
                    parts = [part for part in parts if task in part.tasks]
                    count = source.task.samples_per_step // accumulation * held[task][step]
                    assert {part.tasks[task].global_count for part in parts} == {count}
                    assert [p for part in parts for p in part.tasks[task].positions] == list(range(count))
                    sizes = [len(part.tasks[task].positions) for part in parts]
                    assert max(sizes) - min(sizes) <= 1
                    images.append(torch.cat([part.tasks[task].images for part in parts]))
                    labels.append(torch.cat([part.tasks[task].labels for part in parts]))
                # A micro-batch has its part of every task step: put them together again, task step by task step.
                own = phases.task_steps(step, task)
                size = source.task.samples_per_step // accumulation
                pixels = [
                    image.numpy().tobytes()
                    for nth in range(len(own)) for of_micro in images
                    for image in of_micro[nth * size : (nth + 1) * size]
                ]  # fmt: skip
                assert pixels == drawn(source, own)
                if accumulation == 1 and world_size == 1:
                    seen[task] += pixels
                if task == "person":  # P / accumulation identities of K images each, as in an ordinary step
                    for of_micro in labels:
                        groups = of_micro.reshape(len(own), 4 // accumulation, 3)
                        assert (groups == groups[:, :, :1]).all()
                        assert all(len(set(of_step[:, 0].tolist())) == len(of_step) for of_step in groups)
    for task, source in sources.items():
        assert seen[task] == drawn(source, range(sum(held[task])))


def test_rate_one_is_the_ordinary_mixture(sources: dict[str, TrainSource]) -> None:
    phases = Phases(3, [dict.fromkeys(sources, 3)] * 3)
    positions = partial(place({task: Work(1, 1) for task in sources}, 2, 1).owned, 1)
    plain = Batches(sources, positions, 2, one_of_each)
    balanced = pickle.loads(pickle.dumps(Batches(sources, positions, 2, phases.task_steps)))  # reaches workers
    for wanted, found in zip(loader(plain, 0, 18, 0, pin=False), loader(balanced, 0, 18, 1, pin=False), strict=True):
        assert (found.step, found.micro_step, found.skipped) == (wanted.step, wanted.micro_step, wanted.skipped)
        for task, part in wanted.tasks.items():
            other = found.tasks[task]
            assert torch.equal(other.images, part.images)
            assert torch.equal(other.labels, part.labels)
            assert (other.positions, other.global_count) == (part.positions, part.global_count)
