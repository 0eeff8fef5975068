"""The GPU benchmark without a GPU: everything in it runs, and a part may fail or hang."""

import json
import subprocess
import sys
import time

import pytest
import torch

from benchmarks import gpu, gpu_equality, gpu_ufo2_17b


def test_everything_runs_without_a_gpu(tmp_path):
    command = [sys.executable, gpu.__file__, "--quick", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:-1] == ["Tiny models, no file written: these figures say nothing about any GPU."], done.stderr
    found = json.loads(lines[-1])
    assert found["notes"] == []
    assert not (tmp_path / "out").exists()
    figures, bars = found["figures"], found["bars"]
    assert len(bars) == 14  # of what is right, not of what is fast
    assert all(bar["ok"] for bar in bars.values()), bars
    for setting in ("28px", "28px_all_kept", "42px"):
        for model in ("dense", "tasks_8", "tasks_26"):
            assert figures[f"throughput_{setting}_{model}_images_per_s"] > 0
    assert figures["ufo2_17b_steps"] == gpu_ufo2_17b.SMALL_STEPS
    assert figures["ufo2_17b_tasks"] == 26


def test_differences_show():
    wanted = torch.tensor([4.0, -2.0])
    assert gpu_equality.difference(wanted.clone(), wanted) == 0
    assert gpu_equality.difference(torch.tensor([4.0, -1.0]), wanted) == 0.25
    assert gpu_equality.difference(torch.tensor([float("nan"), -2.0]), wanted) == float("inf")


def test_a_part_that_hangs_is_stopped_and_what_it_found_is_kept(tmp_path):
    file = tmp_path / "part.json"
    program = (
        "import time; from pathlib import Path; from benchmarks.gpu import Report\n"
        f"Report(Path({str(file)!r}))({{'x': 1.0}}, {{'y': (2.0, 1.0)}}); time.sleep(99)"
    )
    process = subprocess.Popen([sys.executable, "-c", program], cwd=gpu.REPOSITORY, process_group=0)
    while not file.exists():
        time.sleep(0.01)
    *_, last = gpu.outcomes(process, file, 0.2)
    assert process.returncode == -9
    assert last["figures"] == {"x": 1.0}
    assert last["bars"] == {"y": {"value": 2.0, "bar": 1.0, "ok": False}}
    assert last["notes"] == ["stopped after 0.2 s"]


def test_a_part_that_dies_is_noted(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", "import os; os.abort()"], process_group=0)
    *_, last = gpu.outcomes(process, tmp_path / "nothing.json", 60)
    assert last == {"figures": {}, "bars": {}, "notes": ["ended with status -6"]}


def test_a_failure_is_one_line_in_the_report(tmp_path, monkeypatch):
    def measure(*_):
        raise ValueError("no such thing\nand more")

    monkeypatch.setattr(gpu_equality, "measure", measure)
    with pytest.raises(SystemExit, match="1"):
        gpu.run_part("equality", tmp_path / "part.json", quick=True)
    assert json.loads((tmp_path / "part.json").read_text())["notes"] == ["failed: ValueError: no such thing"]


def test_a_report_is_plain_json(tmp_path):
    report = gpu.Report(tmp_path / "part.json")
    report({"n": 3, "x": 1 / 3, "all": [float("inf"), 2.0]}, {"y": (float("nan"), 1.0)}, ["word"])
    assert json.loads((tmp_path / "part.json").read_text(), parse_constant=pytest.fail) == {
        "figures": {"n": 3, "x": 0.33333, "all": ["inf", 2.0]},
        "bars": {"y": {"value": "nan", "bar": 1.0, "ok": False}},
        "notes": ["word"],
    }


def test_results_are_written_as_they_come(tmp_path):
    results = gpu.Results(tmp_path / "results")
    results.note("equality", {"figures": {"device": "NVIDIA H200", "x": 1}, "bars": {}, "notes": []}, 2.0)
    file = tmp_path / "results" / "gpu-h200.json"
    assert json.loads(file.read_text())["figures"] == {
        "equality_device": "NVIDIA H200",
        "equality_x": 1,
        "equality_s": 2.0,
    }
    results.note("ufo2_17b", {"figures": {}, "bars": {}, "notes": ["ended with status -9"]}, 1.0)
    assert results.content["notes"] == ["ufo2_17b: ended with status -9"]
    results.note("engine", {"figures": {"device": "NVIDIA H200"}, "bars": {"b": {"ok": True}}, "notes": []}, 1.0)
    assert json.loads(file.read_text()) == results.content


def test_limits_leave_room_within_nine_minutes():
    assert sum(gpu.LIMITS.values()) <= 520
    assert min(gpu.LIMITS.values()) > gpu.START_S
