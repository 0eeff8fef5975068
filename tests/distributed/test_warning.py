"""A run that is warned of its end, on real ranks: all save the same step and leave, and it goes on as if it had not
been."""

import json
import signal
from pathlib import Path

import pytest

from tests import tiny
from tests.distributed.test_faults import LONGER, STEPS, finish, training
from tests.distributed.test_training import recorded, weights
from ufo_ds import checkpoint
from ufo_ds.parallel.checkpoint import newest_whole
from ufo_ds.parallel.warning import LEFT


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("more", [[], ["--evaluation.every", "1", "--warning_signal", "SIGUSR2"]])
def test_warned_twice(more, recipe, tmp_path):
    """Once the one rank, once the other; where each step is evaluated, the one that was left at is too."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    finish(training(2, recipe, whole, *LONGER, *more))
    number, stops = signal.SIGUSR2 if more else signal.SIGUSR1, []
    for rank, step in enumerate((5, 14)):
        ranks = training(2, recipe, run, *LONGER, *more)
        ranks.wait_for(lambda: (run / "metrics.jsonl").exists())
        ranks.wait_for(lambda step=step: f'"step": {step}, "kind": "train"' in (run / "metrics.jsonl").read_text())
        ranks.send(number, rank)
        assert ranks.end(60) == [LEFT, LEFT], ranks.output()
        newest, damaged = newest_whole(run / "checkpoints")
        assert newest is not None
        assert not damaged
        stops.append(checkpoint.Reader(newest).index.step)
        assert step < stops[-1] < STEPS
        assert f"warned by {number.name}: saved step {stops[-1]} and left" in ranks.output()
        assert recorded(run)[-1]["step"] == stops[-1]
    assert f"going on from step {stops[-1]}" in finish(training(2, recipe, run, *LONGER, *more))
    assert recorded(run) == recorded(whole)
    assert weights(run, STEPS) == weights(whole, STEPS)
    assert checkpoint.read_best(run / "checkpoints") == checkpoint.read_best(whole / "checkpoints")
    starts = [json.loads(line) for line in (run / "starts.jsonl").read_text().splitlines()]
    assert [(start["step"], start["ranks"]) for start in starts] == [(step, 2) for step in (0, *stops)]


def test_warned_while_it_starts(recipe, tmp_path):
    """Before the ranks have joined: it makes a step and leaves."""
    ranks = training(2, recipe, tmp_path / "run", *LONGER)
    ranks.wait_for(lambda: "ZeRO-3" in ranks.output())
    ranks.send(signal.SIGUSR1, 1)
    assert ranks.end(60) == [LEFT, LEFT], ranks.output()


def test_warned_in_the_last_step_it_is_done(recipe, tmp_path):
    run = tmp_path / "run"
    ranks = training(2, recipe, run, "--schedule.steps", "1", "--warning_signal", "usr1")
    ranks.wait_for(lambda: "ZeRO-3" in ranks.output())
    ranks.send(signal.SIGUSR1, 0)
    assert ranks.end(60) == [0, 0], ranks.output()


@pytest.mark.parametrize("name", ["USR3", "KILL", "STOP", ""])
def test_no_such_signal(name, recipe, tmp_path):
    ranks = training(1, recipe, tmp_path / "run", "--warning_signal", name)
    assert ranks.end(60) == [2]
    assert f"error: --warning_signal {name!r}: use the name of a signal" in ranks.output()
