"""The life of a run: warned, cancelled, on other numbers of nodes, with a node that dies, and up to its report."""

import json
import shutil
import time

import pytest

from tests.distributed.test_training import recorded, weights
from tests.slurm.test_short import STEPS, is_recorded, warn
from ufo_ds import checkpoint
from ufo_ds.parallel.checkpoint import newest_whole

pytestmark = pytest.mark.slurm

LONG = ["--schedule.steps", str(STEPS), "--checkpoint.every", "6", "--evaluation.every", "9"]


def started(cluster, recipe, name, *more, options=("--nodes=2",)):
    run = cluster.place / name
    return run, cluster.submit("train.sh", "--recipe", recipe, "--run_dir", name, *LONG, *more, options=options)


def submit_pipeline(cluster, *words):
    """What it prints, and its jobs by their name."""
    said = cluster.call(cluster.home / "slurm" / "pipeline.sh", "--nodes=2", "--", *words).stdout
    return said, {line.split()[0]: line.split()[1] for line in said.splitlines()[:4]}


@pytest.fixture(scope="module")
def pipeline(cluster, recipe):
    return submit_pipeline(cluster, "--recipe", recipe, "--run_dir", "whole run", *LONG)


@pytest.fixture(scope="module")
def whole(cluster, pipeline):
    """Two nodes with a rank each, without a break: what the pipeline trains."""
    run, job = cluster.place / "whole run", pipeline[1]["train"]
    assert cluster.end(job) == "COMPLETED", cluster.output(job)
    assert cluster.shown(job, "Restarts") == ["0"]
    assert json.loads((run / "starts.jsonl").read_text())["ranks"] == 2
    return run


def test_warned_twice(cluster, recipe, whole):
    """The same numbers and weights in the end, to the bit."""
    run, job = started(cluster, recipe, "warned run")
    warn(cluster, job, run / "metrics.jsonl", 2)
    cluster.wait_for(lambda: cluster.shown(job, "Restarts") == ["1"], job)
    warn(cluster, job, run / "metrics.jsonl", 10)
    assert cluster.end(job) == "COMPLETED", cluster.output(job)
    assert cluster.shown(job, "Restarts") == ["2"]
    assert len((run / "starts.jsonl").read_text().splitlines()) == 3
    assert recorded(run) == recorded(whole)
    assert weights(run, STEPS) == weights(whole, STEPS)


def test_warned_by_the_timer_of_slurm(cluster, recipe, whole):
    """Near a real time limit, by the signal that was asked for. Ranks that are held until then cannot have finished."""
    options = ("--nodes=2", "--time=2", "--signal=B:USR1@45")
    run, job = started(cluster, recipe, "timed run", options=options)
    cluster.wait_for(lambda: is_recorded(run / "metrics.jsonl", 2), job)
    cluster.call("scancel", "--signal=STOP", f"{job}.0")
    cluster.wait_for(lambda: "warned: USR1 goes to all ranks" in cluster.output(job), job)
    cluster.call("scancel", "--signal=CONT", f"{job}.0")
    assert cluster.end(job) == "COMPLETED", cluster.output(job)
    first, second = starts(run)[:2]
    assert first["step"] < second["step"] < STEPS
    assert f"saved step {second['step']}, in the queue again" in cluster.output(job)
    assert recorded(run) == recorded(whole)
    assert weights(run, STEPS) == weights(whole, STEPS)


def test_cancelled_while_it_saves(cluster, recipe):
    """What is being written is finished; the job stays cancelled."""
    run, job = started(cluster, recipe, "cancelled run", "--checkpoint.every", "1", "--checkpoint.keep", "100")
    unfinished = run / "checkpoints"
    cluster.wait_for(lambda: any(unfinished.glob(".step-*.tmp")), job)
    cluster.call("scancel", job)
    assert cluster.end(job) == "CANCELLED"
    deadline = time.monotonic() + 30  # its last processes may take that long: Slurm's KillWait and some seconds
    while cluster.call("squeue", "--noheader", "--jobs", job, check=False).stdout and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not list(unfinished.glob(".step-*.tmp"))
    newest, damaged = newest_whole(unfinished)
    assert newest is not None
    assert not damaged
    assert cluster.shown(job, "Restarts") == ["0"]


def test_a_node_dies(cluster, recipe):
    """Its daemon and tasks are killed: the job goes on from the last checkpoint with the node that is left, and once
    it is back, with both."""
    run, job = started(cluster, recipe, "shrunken run", "--schedule.steps", "400", options=("--nodes=1-2",))
    cluster.wait_for(lambda: bool(checkpoint.find(run / "checkpoints")), job)
    cluster.node("stop", "n2")
    try:
        cluster.wait_for(lambda: len(starts(run)) == 2, job)
        assert cluster.shown(job, "NumNodes") == ["1"]
        first, second = starts(run)
        assert (first["ranks"], second["ranks"]) == (2, 1)
        assert second["step"] >= 6
        assert second["step"] % 6 == 0 or second["step"] % 9 == 0  # the best one is saved too, where it is evaluated
        seen = second["step"] + 2
    finally:
        cluster.node("start", "n2")
    cluster.wait_for(lambda: cluster.call("sinfo", "-h", "-N", "-n", "n2", "-o", "%T").stdout.strip() == "idle", job)
    warn(cluster, job, run / "metrics.jsonl", seen)
    cluster.wait_for(lambda: len(starts(run)) == 3, job)
    assert starts(run)[-1]["ranks"] == 2
    cluster.wait_for(lambda: recorded(run)[-1]["step"] > starts(run)[-1]["step"], job)
    cluster.call("scancel", job)
    assert cluster.end(job) == "CANCELLED"


def starts(run):
    file = run / "starts.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def test_pipeline(cluster, pipeline, whole):
    """From training to the report."""
    said, jobs = pipeline
    assert list(jobs) == ["train", "extract", "evaluate", "report"]
    assert f"--jobs={','.join(jobs.values())}" in said
    for job in jobs.values():
        assert cluster.end(job) == "COMPLETED", cluster.output(job)
    for task, metric in {"colours": "top1", "stripes": "mAP"}.items():
        assert (whole / "extracted" / task / "certificate.json").is_file()
        assert f"{task}/{task}" in cluster.output(jobs["evaluate"])
        assert metric in cluster.output(jobs["evaluate"])
        assert list((whole / "extracted" / task / "evaluations").iterdir())
    assert "<html" in (whole / "report.html").read_text()[:1000]
    assert f"step {STEPS} of {STEPS} (100%)" in cluster.output(jobs["report"])


def test_a_failing_child_stops_its_dependants(cluster, recipe, whole):
    """Of a pipeline on a run of another recipe, which training refuses. With a model in the way none is submitted."""
    run = cluster.place / "other run"
    shutil.copytree(whole, run, ignore=shutil.ignore_patterns("extracted"))
    words = ["--recipe", recipe, "--run_dir", run.name, *LONG, "--seed", "1"]
    _, jobs = submit_pipeline(cluster, *words)
    (run / "extracted" / "stripes").mkdir(parents=True)
    found = cluster.call(cluster.home / "slurm" / "pipeline.sh", *words, check=False)
    assert found.returncode == 2
    assert found.stderr.startswith("error: other run/extracted/stripes exists")
    assert cluster.end(jobs.pop("train")) == "FAILED"
    for job in jobs.values():
        assert cluster.end(job, 60) == "CANCELLED"
        assert set(cluster.shown(job, "Reason")) == {"DependencyNeverSatisfied"}


def test_in_a_script_a_verb_is_one_process(cluster, whole):
    """Also where Slurm says in its environment that the job has several tasks, which were never started."""
    words = ["--run", whole.name, "colours", "--", "--json"]
    job = cluster.submit("evaluate.sh", *words, options=("--nodes=2", "--ntasks=4"))
    assert cluster.end(job) == "COMPLETED", cluster.output(job)
    assert '"colours/colours/top1"' in cluster.output(job)
