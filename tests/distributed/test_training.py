"""Real runs over real shards: started by a launcher, killed, gone on with."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests import tiny
from tests.ranks import run as run_ranks
from ufo_ds import checkpoint, evaluate, verify
from ufo_ds import train as train_script
from ufo_ds.errors import run as entry

REPOSITORY = Path(__file__).parents[2]
PORT = str(20000 + os.getpid() % 10000)  # of its own, whatever else is trained here
LAUNCHER = {
    1: [sys.executable],
    2: [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", PORT],
    4: [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "4"],
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("tiny"))


def arguments(ranks: int, recipe: Path, run: Path, *more: str) -> list[str]:
    config = REPOSITORY / "ds_configs" / "moe.json"
    if ranks > 1:  # by load it would be 1: stripes have more tokens
        values = json.loads(config.read_text())
        values["expert_parallel"]["autoep_size"] = 2
        config = run.with_name("moe.json")
        config.write_text(json.dumps(values))
    return ["--deepspeed", str(config), "--recipe", str(recipe), "--run_dir", str(run), *more]


def command(ranks: int, recipe: Path, run: Path, *more: str) -> list[str]:
    return [*LAUNCHER[ranks], str(REPOSITORY / "ufo_ds" / "train.py"), *arguments(ranks, recipe, run, *more)]


def start(words: list[str]) -> subprocess.Popen[str]:
    # A session of its own: whatever a test starts, it can end as a whole.
    return subprocess.Popen(
        words, cwd=REPOSITORY, env=os.environ | {"MASTER_PORT": PORT}, start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def finish(process: subprocess.Popen[str], timeout: float = 240) -> str:
    try:
        output, _ = process.communicate(timeout=timeout)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return output


def train(ranks: int, recipe: Path, run: Path, *more: str) -> str:
    """A training without a launcher, see :mod:`tests.ranks`; its output."""
    return run_ranks(ranks, entry, train_script.main, arguments(ranks, recipe, run, *more))


def recorded(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "images_per_second"} for line in lines]


def wait_for(condition, process: subprocess.Popen[str], timeout: float = 120) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None, process.communicate()[0][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def ranks_of(process: subprocess.Popen[str]) -> list[int]:
    """Process ids of the ranks: those in the launcher's session that run train.py themselves."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_bytes().split(b"\0")
            same = os.getsid(int(path.name)) == process.pid
        except OSError:
            continue
        script = next((i for i, word in enumerate(words) if word.endswith(b"ufo_ds/train.py")), None)
        if same and script in (1, 2) and b"-m" not in words:
            found.append(int(path.name))
    return sorted(found)


@pytest.fixture(scope="module")
def uninterrupted(recipe, tmp_path_factory) -> Path:
    """Twelve steps on two ranks, EP 2, ZeRO-3, started by DeepSpeed's launcher."""
    run = tmp_path_factory.mktemp("runs") / "uninterrupted"
    process = start(command(2, recipe, run))
    output = finish(process)
    assert process.returncode == 0, output[-3000:]
    assert "expert parallel 2 x data parallel 1, ZeRO-3" in output
    return run


def test_records_and_keeps(uninterrupted):
    steps = [line["step"] for line in recorded(uninterrupted) if line["kind"] == "train"]
    assert steps == list(range(1, 13))
    found = [path.name for path in checkpoint.find(uninterrupted / "checkpoints")]
    best = checkpoint.read_best(uninterrupted / "checkpoints")
    assert best is not None
    assert found[-2:] == ["step-00000008", "step-00000012"]
    assert checkpoint.name_of(best[0]) in found


def test_the_averages_are_what_is_evaluated(uninterrupted, capsys):
    """During training, and after it from the checkpoint: the same metrics, and not those of the last weights."""
    reader = checkpoint.Reader(checkpoint.find(uninterrupted / "checkpoints")[-1])
    assert {"weight", "average", "exp_avg", "exp_avg_sq"} == set(reader.index.parameters["norm.shared.weight"].kinds)
    name = "heads.stripes.neck.running_mean"
    assert not torch.equal(reader.buffer(name), reader.stored_buffer(name))
    logged = [line for line in recorded(uninterrupted) if line["kind"] == "evaluation"][-1]
    assert entry(evaluate.main, [str(reader.directory), "--json", "--device", "cpu"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found) > 10
    assert found.items() <= logged.items()


@pytest.mark.parametrize("ranks", [2, 4])
def test_evaluation_on_ranks(ranks, uninterrupted):
    """Features computed by ranks, of which one has but a part of the last batch, give the metrics of one process."""
    metrics = next((uninterrupted / "evaluations").glob("step-00000012")) / "metrics.json"
    wanted = json.loads(metrics.read_text())
    metrics.unlink()
    words = [str(uninterrupted), "--last", "--batch_size", "7", "--device", "cpu", "--json"]
    if ranks == 2:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        output = finish(start([*torchrun, str(REPOSITORY / "ufo_ds" / "evaluate.py"), *words]))
    else:
        output = run_ranks(ranks, entry, evaluate.main, ["--local_rank=0", *words])  # as from DeepSpeed's launcher
    found = json.loads(next(line for line in output.splitlines() if line.startswith("{")))
    assert found == pytest.approx(wanted, abs=1e-6)
    assert json.loads(metrics.read_text()) == found  # kept once, by the first rank


def test_kill_and_go_on(recipe, uninterrupted, tmp_path):
    """kill -9 of a rank in the middle of a step: over within seconds, the cause said; then the same numbers to the bit,
    also where the conflict of gradients is measured now and then. (Kills at other moments: test_faults.py.)"""
    run = tmp_path / "run"
    measured = ["--logging.conflict_every", "3"]
    process = start(command(2, recipe, run, *measured))
    metrics = run / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and '"step": 6, "kind": "train"' in metrics.read_text(), process)
    pids = ranks_of(process)
    assert len(pids) == 2
    os.kill(pids[1], signal.SIGKILL)
    output = finish(process, timeout=60)
    assert process.returncode != 0
    assert "lost another rank, which was killed or crashed" in output
    assert "Traceback" not in output
    assert "going on from step 4" in train(2, recipe, run, *measured)
    assert [line for line in recorded(run) if line["kind"] != "conflict"] == recorded(uninterrupted)
    assert weights(run) == weights(uninterrupted)
    conflict = [line for line in recorded(run) if line["kind"] == "conflict"]
    assert [line["step"] for line in conflict] == [3, 6, 9, 12]
    for line in conflict:
        for task in ("colours", "stripes"):
            assert line[f"{task}/gradient_norm"] > 0
            assert abs(line[f"{task}/gradient_cosine"]) <= 1


def test_a_run_goes_on_anywhere(uninterrupted, capsys):
    """`ufo verify resume` of a run whose routes are decided; the run stays as it is. (Of all else test_resume.py.)"""

    def files() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in sorted(uninterrupted.rglob("*"))}

    before = files()
    assert entry(verify.main, ["resume", str(uninterrupted), "--ranks", "1,2", "--zero", "3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["recipe"], found["first_step"], len(found["pairs"])) == ("tiny", 15, 9)
    assert all(pair["optimizer"] == "adamw" and pair["ok"] for pair in found["pairs"])
    assert files() == before


def test_bf16_and_zero_stages(recipe, tmp_path):
    """bf16 at every ZeRO stage trains, saves and evaluates; the loss falls as in fp32."""
    for stage in (1, 2, 3):
        config = {"bf16": {"enabled": True}, "zero_optimization": {"stage": stage}, "gradient_accumulation_steps": 2}
        path = tmp_path / f"zero{stage}.json"
        path.write_text(json.dumps(config))
        run = tmp_path / f"run{stage}"
        train(1, recipe, run, "--deepspeed", str(path), "--logging.tensorboard", str(stage == 1))
        losses = [line["loss"] for line in recorded(run) if line["kind"] == "train"]
        assert losses[-1] < losses[0]
    board = EventAccumulator(str(tmp_path / "run1" / "tensorboard")).Reload()
    written = [line["loss"] for line in recorded(tmp_path / "run1") if line["kind"] == "train"]
    assert [event.value for event in board.Scalars("train/loss")] == pytest.approx(written)


def test_a_second_run_is_refused(recipe, uninterrupted):
    """Two trainings in one directory would overwrite each other's checkpoints."""
    with (uninterrupted / ".lock").open("a") as lock:
        import fcntl

        fcntl.flock(lock, fcntl.LOCK_EX)
        process = start(command(1, recipe, uninterrupted, "--schedule.steps", "14"))
        output = finish(process)
    assert process.returncode == 2
    assert "another process trains in it" in output


def weights(run: Path, step: int = 12) -> dict[str, bytes]:
    """All that a checkpoint holds of numbers: weights, averages, optimizer state, running statistics."""
    reader = checkpoint.Reader(run / "checkpoints" / checkpoint.name_of(step))
    found = {}
    for name, parameter in reader.index.parameters.items():
        count = math.prod(parameter.shape)
        found |= {f"{name} {kind}": reader.read(name, kind, 0, count).numpy().tobytes() for kind in parameter.kinds}
    return found | {key: reader.stored_buffer(key).numpy().tobytes() for key in reader.index.buffers}
