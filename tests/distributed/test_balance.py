"""Sampling by slowness in a real run: its rates follow from its losses, and a killed run goes on with the same ones."""

import json
import shutil
from pathlib import Path

import pytest

from tests import tiny
from tests.distributed.test_training import recorded, train, weights
from ufo_ds import checkpoint

# Rates of a phase: 3 to 9 task steps in 6 steps. Checkpoints come within phases, and at the end of the second one.
BALANCE = [
    "--data.balance", "{every: 6, strength: 3, largest: 2}", "--schedule.steps", "20",
    "--checkpoint.every", "2", "--checkpoint.keep", "99", "--optimizer.lr", "0.01",
]  # fmt: skip
TASKS = ("colours", "stripes")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def run(recipe, tmp_path_factory) -> Path:
    """Two ranks, EP 2, ZeRO-3; the directory also holds the output."""
    run = tmp_path_factory.mktemp("runs") / "run"
    (run.parent / "output.txt").write_text(train(2, recipe, run, *BALANCE))
    return run


def losses(run: Path) -> dict[str, list[float]]:
    """Of every step, as logged: 0 where a step does not hold the task."""
    lines = [line for line in recorded(run) if line["kind"] == "train"]
    return {task: [sum(v for k, v in line.items() if k in NAMES[task]) for line in lines] for task in TASKS}


NAMES = {"colours": ["colours/cross_entropy"], "stripes": ["stripes/cosface", "stripes/triplet"]}


def test_rates_follow_from_the_logged_losses(run):
    lines = [line for line in recorded(run) if line["kind"] == "balance"]
    assert [line["step"] for line in lines] == [7, 13, 19]
    of_step = losses(run)
    counts = [dict.fromkeys(TASKS, 6), *({t: round(6 * line["rates"][t]) for t in TASKS} for line in lines)]
    for phase, line in enumerate(lines):
        for task in TASKS:
            held = [(i + 1) * counts[phase][task] // 6 - i * counts[phase][task] // 6 for i in range(6)]
            found = of_step[task][6 * phase : 6 * phase + 6]
            assert [loss > 0 for loss in found] == [n > 0 for n in held]
            mean = sum(n * loss for n, loss in zip(held, found, strict=True)) / sum(held)
            assert line["slowness"][task] == pytest.approx(mean / (sum(of_step[task][:6]) / 6), rel=1e-5)
        # Equal samples: the rates of two tasks add up to 2, so both bounds cannot be met but by 1/2 and 3/2.
        weights_of = {task: line["slowness"][task] ** 3 for task in TASKS}
        rates = {task: min(max(2 * w / sum(weights_of.values()), 0.5), 1.5) for task, w in weights_of.items()}
        for task in TASKS:
            assert counts[phase + 1][task] == 6 * line["rates"][task]
            assert abs(line["rates"][task] - rates[task]) <= 0.5 / 6 + 1e-6
    assert lines[0]["slowness"] == lines[0]["rates"] == dict.fromkeys(TASKS, 1)  # only the first phase was seen
    assert all(line["rates"]["colours"] < 1 < line["rates"]["stripes"] for line in lines[1:])
    said = [line for line in (run.parent / "output.txt").read_text().splitlines() if line.startswith("sampling: ")]
    rate, part = lines[1]["rates"]["colours"], lines[1]["slowness"]["colours"]
    assert said[1].startswith(f"sampling: colours x{rate:.2f} (loss at {part:.0%} of its start), stripes x")
    assert len(said) == 3


@pytest.mark.parametrize("last", [12, 16])
def test_go_on_within_and_between_phases(last, recipe, run, tmp_path):
    """What a kill leaves behind: a checkpoint at the end of the second phase or within the third, and lines of a step
    after it, for the former with the third phase's rates. Then all is as in a run without the kill, to the bit."""
    other = tmp_path / "run"
    (other / "checkpoints").mkdir(parents=True)
    shutil.copytree(*(path / "checkpoints" / checkpoint.name_of(last) for path in (run, other)))
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (other / "metrics.jsonl").write_text("".join(line for line in lines if json.loads(line)["step"] < last + 2))
    assert f"going on from step {last}" in train(2, recipe, other, *BALANCE)
    assert recorded(other) == recorded(run)
    assert weights(other, 20) == weights(run, 20)
    memories = [
        checkpoint.Reader(path / "checkpoints" / checkpoint.name_of(step)).index.balance
        for step in (18, 20)
        for path in (other, run)
    ]
    assert memories[0] == memories[1]
    assert memories[2] == memories[3]


def test_go_on_on_one_rank(recipe, run, tmp_path):
    """From within the third phase with half the ranks: the rest of it and the fourth hold each task as often, and the
    rates of the fourth follow from the losses of all of the third, of which one rank now goes on with both parts."""
    other = tmp_path / "run"
    (other / "checkpoints").mkdir(parents=True)
    shutil.copytree(*(path / "checkpoints" / checkpoint.name_of(16) for path in (run, other)))
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (other / "metrics.jsonl").write_text("".join(line for line in lines if json.loads(line)["step"] <= 16))
    assert "going on from step 16" in train(1, recipe, other, *BALANCE, "--data.workers", "2")
    found, wanted = (
        [line for line in recorded(path) if line["kind"] == "balance" and line["step"] == 19] for path in (other, run)
    )
    assert found[0]["rates"] == wanted[0]["rates"]
    assert found[0]["slowness"] == pytest.approx(wanted[0]["slowness"], rel=1e-4)
    for task in TASKS:
        assert [loss > 0 for loss in losses(other)[task]] == [loss > 0 for loss in losses(run)[task]]
        assert losses(other)[task] == pytest.approx(losses(run)[task], rel=1e-3)
