"""What goes wrong in a long run, on real ranks: killed ranks, full disks, damaged checkpoints, gradients that are not
finite. There is no launcher here that ends the others."""

import json
import os
import random
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from tests import tiny
from tests.distributed import guarded
from tests.distributed.test_training import REPOSITORY, recorded, weights
from tests.ranks import Ranks
from ufo_ds import checkpoint, train
from ufo_ds.errors import run as entry
from ufo_ds.parallel.checkpoint import newest_whole

STEPS, EVERY = 24, 3
LONGER = ["--schedule.steps", str(STEPS), "--checkpoint.every", str(EVERY)]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("tiny"))


def train_slowly(arguments: list[str], file_size: dict[int, int]) -> int:
    """A training whose disk takes its time; ``file_size``: by rank, the bytes after which it is full."""
    fsync, draw = os.fsync, random.Random(os.environ.get("RANK"))

    def slow(descriptor: int) -> None:
        time.sleep(draw.uniform(0.0, 0.1))
        fsync(descriptor)

    os.fsync = slow
    if (limit := file_size.get(int(os.environ.get("RANK", 0)))) is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    return entry(train.main, arguments)


def training(count: int, recipe: Path, run_dir: Path, *more: str, file_size: dict[int, int] | None = None) -> Ranks:
    """Ranks of a training; EP 2 where there are two."""
    arguments = ["--recipe", str(recipe), "--run_dir", str(run_dir), *more]
    config = REPOSITORY / "ds_configs" / "moe.json"
    if count > 1:
        config = run_dir.with_name("moe.json")
        config.write_text('{"expert_parallel": {"autoep_size": 2}}')
    arguments += ["--deepspeed", str(config)]
    return Ranks(count, train_slowly, arguments, file_size or {})


def finish(ranks: Ranks) -> str:
    status = ranks.end(300)
    assert status == [0] * len(status), ranks.output()[-3000:]
    return ranks.output()


@pytest.fixture(scope="module")
def uninterrupted(recipe, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "uninterrupted"
    finish(training(2, recipe, run, *LONGER))
    return run


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


# --- killed -----------------------------------------------------------------------------------------------------------


def begun_after(moment: float, path: Path) -> bool:
    try:
        return path.stat().st_mtime > moment  # not what a killed run left
    except FileNotFoundError:
        return False


def kill_somewhere(draw: random.Random, recipe: Path, run: Path) -> tuple[str, float]:
    """Start, kill one rank at a random moment; the moment, and the seconds until the other one was at an end."""
    moment, metrics = draw.choice(["start", "step", "saving", "saving"]), run / "metrics.jsonl"
    whole, _ = newest_whole(run / "checkpoints")
    step = (int(whole.name[5:]) if whole else 0) + draw.randint(1, 6)
    before = metrics.stat().st_ino if metrics.exists() else None
    started, ranks = time.time(), training(2, recipe, run, *LONGER)
    ranks.wait_for(lambda: "ZeRO-3" in ranks.output())
    if moment == "step":  # in a new file: that of the start before is replaced
        ranks.wait_for(lambda: metrics.exists() and metrics.stat().st_ino != before)
        ranks.wait_for(lambda: f'"step": {step}, "kind": "train"' in metrics.read_text())
    if moment == "saving":
        step = -(-step // EVERY) * EVERY
        ranks.wait_for(lambda: begun_after(started, run / "checkpoints" / f".step-{step:08d}.tmp"))
    time.sleep(draw.uniform(0.0, 0.2))
    victim = draw.randrange(2)
    ranks.send(signal.SIGKILL, victim)
    began = time.monotonic()
    status = ranks.end(60)
    assert None not in status, (moment, victim, ranks.output()[-2000:])
    if status[victim] == -signal.SIGKILL and status[1 - victim]:
        assert "lost another rank" in ranks.logs[1 - victim].read_text()
    return f"{moment} {step}, status {status}", time.monotonic() - began


def survive(seed: int, kills: int, recipe: Path, uninterrupted: Path, run: Path) -> None:
    draw = random.Random(seed)
    for _ in range(kills):
        moment, seconds = kill_somewhere(draw, recipe, run)
        left = [path.name for path in (run / "checkpoints").glob(".step-*.tmp")]
        whole, damaged = newest_whole(run / "checkpoints")
        assert not damaged
        at = f"whole: {whole.name if whole else None}, unfinished: {left}"
        print(f"kill: {moment}, the other rank at an end after {seconds:.1f} s; {at}")
    output = finish(training(2, recipe, run, *LONGER))
    assert f"going on from step {int(whole.name[5:])}" in output if whole else "starting in" in output
    assert not list((run / "checkpoints").glob(".*.tmp"))
    assert recorded(run) == recorded(uninterrupted)
    assert weights(run, STEPS) == weights(uninterrupted, STEPS)


def test_killed_anywhere(recipe, uninterrupted, tmp_path):
    """Ranks are killed as they start, train and save: each time the other one ends, and in the end the numbers are
    those of an uninterrupted run, to the bit."""
    survive(0, 3, recipe, uninterrupted, tmp_path / "run")


@pytest.mark.matrix
@pytest.mark.parametrize("seed", range(1, 6))
def test_killed_anywhere_often(seed, recipe, uninterrupted, tmp_path):
    survive(seed, 4, recipe, uninterrupted, tmp_path / "run")


def test_a_signal_waits_for_the_checkpoint(recipe, tmp_path):
    run = tmp_path / "run"
    ranks = training(2, recipe, run, *LONGER)
    ranks.wait_for(lambda: len(list((run / "checkpoints").glob(".step-*.tmp/rank-*"))) == 2)
    for rank in range(2):
        ranks.send(signal.SIGTERM, rank)
    status = ranks.end(60)
    assert None not in status
    assert 0 not in status
    assert not list((run / "checkpoints").glob(".*.tmp"))
    whole, damaged = newest_whole(run / "checkpoints")
    assert whole is not None
    assert not damaged


# --- full and damaged disks -------------------------------------------------------------------------------------------


def test_the_disk_of_one_rank_is_full(recipe, tmp_path):
    """All ranks say the same, and end while the training would have gone on; nothing is left."""
    run = tmp_path / "run"
    ranks = training(2, recipe, run, *LONGER, "--evaluation.best", "null", file_size={1: 40_000})
    assert ranks.end(120) == [2, 2], ranks.output()
    lines = [line for line in ranks.output().splitlines() if line.startswith("error: ")]
    assert len(lines) == 2
    assert len(set(lines)) == 1
    assert "step-00000003 not written: [Errno 27] File too large: make room and start again" in lines[0]
    assert list((run / "checkpoints").iterdir()) == []
    assert recorded(run)[-1]["step"] < STEPS


def flip(path: Path, position: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(position * (len(data) - 1))] ^= 1
    path.write_bytes(data)


def cut(path: Path, share: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])


@pytest.mark.parametrize("name", ["index.json", "rank-00000.safetensors", "rank-00001.safetensors"])
@pytest.mark.parametrize("damage", [flip, cut])
def test_damage_anywhere_is_found(name, damage, uninterrupted, tmp_path):
    draw = random.Random(f"{name} {damage}")
    for _ in range(10):
        copied = shutil.copytree(uninterrupted / "checkpoints", tmp_path / "checkpoints", dirs_exist_ok=True)
        *_, before, newest = checkpoint.find(copied)
        damage(newest / name, draw.random())
        whole, damaged = newest_whole(copied)
        assert whole == before
        assert list(damaged) == [newest]
        assert name in damaged[newest]


def test_going_on_behind_damage(recipe, uninterrupted, tmp_path):
    """The line names the file and the checkpoint before; told so, the run goes on from that and ends the same."""
    run = shutil.copytree(uninterrupted, tmp_path / "run")
    newest = run / "checkpoints" / f"step-{STEPS:08d}"
    flip(newest / "rank-00001.safetensors", 0.5)
    before = contents(run)
    more = [*LONGER, "--evaluation.best", "null"]
    ranks = training(2, recipe, run, *more)
    assert ranks.end(120) == [2, 2]
    lines = {line for line in ranks.output().splitlines() if line.startswith("error: ")}
    assert lines == {
        f"error: {newest}/rank-00001.safetensors changed since it was written: add --checkpoint.damaged set_aside to "
        "go on from step-00000021, which is whole"
    }
    assert contents(run) == before
    output = finish(training(2, recipe, run, *more, "--checkpoint.damaged", "set_aside"))
    assert "set aside as damaged-step-00000024" in output
    assert "going on from step 21" in output
    assert recorded(run) == recorded(uninterrupted)
    assert weights(run, STEPS) == weights(uninterrupted, STEPS)
    for file in newest.with_name(f"damaged-{newest.name}").iterdir():  # kept as it was
        assert file.read_bytes() == before[str(newest / file.name)]
    assert "going on from step 24" in finish(training(2, recipe, run, *more, "--checkpoint.damaged", "set_aside"))


# --- steps left out ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stage", "bf16"), [(1, False), (2, False), (2, True), (3, False), (3, True)])
def test_a_rank_with_nan(stage, bf16, tmp_path):
    """One pixel of one rank is NaN in the second of two micro-batches: nothing changes on any rank, and what follows is
    what a run that never saw the step computes. (The checks are in guarded.py, on every rank.)"""
    ranks = Ranks(2, guarded.main, stage, bf16)
    assert ranks.end(240) == [0, 0], ranks.output()[-3000:]


def test_too_many_steps_left_out(recipe, tmp_path):
    """A learning rate at which weights overflow: the run stops, all it saved is whole, and the steps are recorded."""
    run = tmp_path / "run"
    more = ["--optimizer.lr", "1e30", "--guard.patience", "3", "--checkpoint.every", "1", "--evaluation.every", "100"]
    ranks = training(1, recipe, run, *more)
    assert ranks.end(120) == [2], ranks.output()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    left_out = [line for line in lines if line["kind"] == "left_out"]
    last = lines[-1]["step"]
    assert lines[-3:] == left_out
    assert [line["in_a_row"] for line in left_out] == [1, 2, 3]
    (error,) = [line for line in ranks.output().splitlines() if line.startswith("error: ")]
    assert f"guard.patience 3: so many steps in a row were left out, up to step {last} (" in error
    whole, damaged = newest_whole(run / "checkpoints")
    assert not damaged
    assert whole is not None
    assert f"the last checkpoint is {whole.name}" in error
    reader = checkpoint.Reader(whole)
    assert all(torch.isfinite(reader.parameter(name)).all() for name in reader.index.parameters)
