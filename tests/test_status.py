"""What `ufo status` reads out of the files of runs."""

import json
import os
import time
from dataclasses import replace

import pytest

from tests.small_run import make_model, make_recipe, write_checkpoint
from ufo_ds import recipe_file, status
from ufo_ds.checkpoint import Reader, write_best, write_index
from ufo_ds.errors import run as entry
from ufo_ds.recipe_file import to_yaml


def lines_of(directory, name, lines, cut=""):
    (directory / name).write_text("".join(f"{json.dumps(line)}\n" for line in lines) + cut)


@pytest.fixture
def run(tmp_path):
    """Of two tasks with 8 samples a step each; 10 steps, of which 6 are done, the last of them after the checkpoint."""
    recipe = make_recipe()
    (tmp_path / "recipe.yaml").write_text(to_yaml(recipe))
    train = [
        {"step": n, "kind": "train", "loss": 1.0, "digits/cross_entropy": 1 / n, "glyphs/cosface": 1.5 * n,
         "glyphs/distillation": 0.5 * n,
         "learning_rate": 0.1, "digits/unreadable": 3.0, "images_per_second": speed}
        for n, speed in zip((1, 2, 4, 5), (1.0, 64.0, 32.0, 640.0), strict=True)
    ]  # fmt: skip
    left_out = {"step": 6, "kind": "left_out", "loss": None, "gradient_norm": None, "count": 2, "in_a_row": 1}
    evaluation = {"step": 4, "kind": "evaluation", "digits/digits/top1": 0.75}
    lines_of(tmp_path, "metrics.jsonl", [*train, evaluation, left_out], cut='{"step": 7, "kind": "tr')
    starts = [
        {"step": step, "time": f"2026-01-0{step + 1}T00:00:00+00:00", "ranks": 1 + (step < 5)}
        for step in (0, 2, 3, 4, 5)
    ]
    lines_of(tmp_path, "starts.jsonl", starts)
    for step in (3, 5):
        write_checkpoint(tmp_path / "checkpoints", make_model(recipe), step=step)
    write_best(tmp_path / "checkpoints", 3, "digits/digits/top1", 0.5)
    hour = time.time() - 3600
    os.utime(tmp_path / "metrics.jsonl", (hour, hour))
    return tmp_path


def test_values(run, capsys):
    assert entry(status.main, [str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    wanted = {
        "run": str(run), "recipe": "test", "step": 6, "steps": 10, "left_out": 2, "checkpoint": 5, "evaluated_at": 4,
        "images_per_second": 48.0,  # the median of 1, 32, 64 and 640
        "seconds_per_step": 16 / 48, "seconds_left": 4 * 16 / 48,
        "loss": {"digits": 1 / 5, "glyphs": 10.0}, "metrics": {"digits/digits/top1": 0.75},
        "best": {"step": 3, "metric": "digits/digits/top1", "value": 0.5},
    }  # fmt: skip
    assert {key: found[key] for key in wanted} == wanted
    assert [start["step"] for start in found["starts"]] == [0, 2, 3, 4, 5]
    assert 3600 <= found["seconds_ago"] < 3700
    assert 0 <= found["checkpoint_seconds_ago"] < 100


def test_lines(run, capsys):
    assert entry(status.main, [str(run)]) == 0
    out = capsys.readouterr().out
    for text in (
        f"{run}: test, step 6 of 10 (60%), last recorded 1:00:0",
        "48 images/s, 0.333 s a step; 00:01 of training left",
        "checkpoint   step 5, 00:0",
        "; best digits/digits/top1 0.5000 at step 3",
        "restarts     4: step 0 on 2 ranks, 2026-01-01T00:00; ...; step 4 on 2 ranks, 2026-01-05T00:00; step 5 ",
        "left out     2 steps",
        "loss         digits 0.200  glyphs 10.000",
        "metrics      after step 4\n  digits/digits  top1 0.7500",
    ):
        assert text in out


def test_a_run_that_has_just_begun(run, tmp_path, capsys):
    new = tmp_path / "new"
    new.mkdir()
    (new / "recipe.yaml").write_text((run / "recipe.yaml").read_text())
    assert entry(status.main, [str(new)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{new}: test, step 0 of 10 (0%)", "checkpoint   none yet", "restarts     0",
    ]  # fmt: skip
    assert entry(status.main, [str(new), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["seconds_left"] is None


def test_one_task_a_step(run):
    text = (run / "recipe.yaml").read_text()
    assert "batches: heterogeneous" in text
    (run / "recipe.yaml").write_text(text.replace("batches: heterogeneous", "batches: isomorphic"))
    assert status.read(run).seconds_per_step == pytest.approx(8 / 48)


def test_an_added_task_has_no_part_in_the_training(run):
    """Recipe and checkpoint have it, the steps that were logged have not."""
    before = status.read(run)
    recipe = recipe_file.load(str(run / "recipe.yaml"))
    later = replace(recipe, tasks=[*recipe.tasks, replace(recipe.tasks[0], name="later")])
    (run / "recipe.yaml").write_text(to_yaml(later))
    index = Reader(run / "checkpoints" / "step-00000005").index
    index.added["later"] = {}
    write_index(run / "checkpoints" / "step-00000005", index, index.files)
    found = status.read(run)
    assert (found.seconds_per_step, found.loss) == (before.seconds_per_step, before.loss)


def test_no_run(tmp_path, capsys):
    assert entry(status.main, [str(tmp_path / "nowhere")]) == 2
    out, error = capsys.readouterr()
    assert (out, error.count("\n")) == ("", 1)
    assert "nowhere is no run directory (it has no recipe.yaml)" in error
