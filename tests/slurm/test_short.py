"""What CI runs too, where Slurm is installed: jobs that end before they train, and one that is warned."""

import json

import pytest

from tests.distributed.test_training import recorded, weights

pytestmark = pytest.mark.slurm

STEPS = 18
SHORT = ["--schedule.steps", str(STEPS), "--checkpoint.every", "6", "--evaluation.every", "1000", "--evaluation.best",
         "null"]  # fmt: skip


def is_recorded(metrics, step):
    return metrics.exists() and f'"step": {step}, "kind": "train"' in metrics.read_text()


def warn(cluster, job, metrics, step, name="USR1"):
    """As Slurm does by itself with --signal=B:USR1@180, once a step is recorded."""
    cluster.wait_for(lambda: is_recorded(metrics, step), job)
    cluster.call("scancel", "--batch", f"--signal={name}", job)


def test_a_wrong_recipe_fails_at_once(cluster, recipe):
    """With its one line; nothing is made, and it does not start again. Nothing is submitted by a pipeline."""
    words = ["--recipe", recipe, "--run_dir", "wrong run", "--optimizer.rate", "1"]
    job = cluster.submit("train.sh", *words, options=("--nodes=2",))
    assert cluster.end(job, 120) == "FAILED"
    assert cluster.shown(job, "ExitCode") == ["2:0"]
    assert cluster.shown(job, "Restarts") == ["0"]
    lines = [line for line in cluster.output(job).splitlines() if line.startswith("error: ")]
    assert set(lines) == {f"error: {recipe}: unknown key optimizer.rate = 1: remove it or correct its name"}
    assert not (cluster.place / "wrong run").exists()
    before = cluster.call("squeue", "--states=all", "--noheader").stdout
    found = cluster.call(cluster.home / "slurm" / "pipeline.sh", *words, check=False)
    assert found.returncode == 2
    assert "unknown key optimizer.rate" in found.stderr
    assert cluster.call("squeue", "--states=all", "--noheader").stdout == before


def test_what_a_training_needs_of_slurm(cluster, recipe):
    """One line says so: no job at all, GPUs whose ranks have no CPUs, tasks that are on no node in particular."""
    found = cluster.call("bash", cluster.home / "slurm" / "train.sh", "--seed", "1", check=False)
    assert found.returncode == 2
    assert found.stderr == f"error: not started by Slurm: sbatch {cluster.home}/slurm/train.sh --seed 1\n"
    wrong = {
        ("--gpus-per-node=2",): "CPUs of a node: 1, for 2 ranks: add --cpus-per-gpu=N to sbatch's options",
        ("--nodes=2", "--ntasks=4"): "--ntasks=4 on 2 nodes: say how many on each, as --ntasks-per-node=N",
    }
    for options, line in wrong.items():
        job = cluster.submit("train.sh", "--recipe", recipe, "--run_dir", "no run", options=options)
        assert cluster.end(job, 120) == "FAILED"
        assert cluster.shown(job, "ExitCode") == ["2:0"]
        assert cluster.output(job) == f"error: {line}\n"
    assert not (cluster.place / "no run").exists()


def test_a_rank_for_each_gpu(cluster, recipe):
    """Of a recipe and in a directory that the environment names. (The GPUs are none: the ranks compute on CPUs.)"""
    named = {"UFO_RECIPE": str(recipe), "UFO_RUN_DIR": "run on GPUs"}
    options = ("--gpus-per-node=2", "--cpus-per-gpu=1")
    job = cluster.submit("train.sh", *SHORT, "--schedule.steps", "2", options=options, **named)
    assert cluster.end(job) == "COMPLETED", cluster.output(job)
    assert json.loads((cluster.place / "run on GPUs" / "starts.jsonl").read_text())["ranks"] == 2


def test_restarts_without_progress_are_limited(cluster, recipe):
    """On a site whose environment does not start."""
    site = cluster.place / "a site.sh"
    site.write_text(f"source '{cluster.home}/slurm/site.sh'\ncontainer=(false)\n")
    words = ["--recipe", recipe, "--run_dir", "vain run"]
    job = cluster.submit("train.sh", *words, UFO_SITE=str(site), UFO_MAX_RESTARTS="2")
    assert cluster.end(job, 180) == "FAILED"
    assert cluster.shown(job, "ExitCode") == ["1:0"]
    assert cluster.shown(job, "Restarts") == ["2"]
    assert "error: status 1, after 2 restarts without a checkpoint after step 0: given up" in cluster.output(job)


def test_two_by_two_and_warned(cluster, recipe):
    """Two nodes with two ranks each; warned by a signal of their own, saved, in the queue again, and on to the end."""
    run = cluster.place / "two by two"
    words = ["--recipe", recipe, "--run_dir", run.name, *SHORT]
    options = ("--nodes=2", "--ntasks-per-node=2")
    job = cluster.submit("train.sh", *words, options=options, UFO_WARNING_SIGNAL="USR2")
    warn(cluster, job, run / "metrics.jsonl", 2, "USR2")
    assert cluster.end(job) == "COMPLETED", cluster.output(job)
    assert cluster.shown(job, "Restarts") == ["1"]
    found = json.loads(cluster.call("ufo", "status", run, "--json").stdout)
    start, again = found["starts"]
    assert (start["step"], start["ranks"], again["ranks"]) == (0, 4, 4)
    assert 2 < again["step"] < STEPS
    assert f"saved step {again['step']}, in the queue again" in cluster.output(job)
    assert found["step"] == found["steps"] == found["checkpoint"] == STEPS
    assert f"step {STEPS}/{STEPS}" in cluster.output(job)
    assert [line["step"] for line in recorded(run) if line["kind"] == "train"] == list(range(1, STEPS + 1))
    assert weights(run, STEPS)
