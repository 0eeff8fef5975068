"""`ufo data`: its figures against counts by hand, its picture against what training and evaluation load."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from tests import tiny
from ufo_ds import cli, data_report, recipe_file
from ufo_ds.data import batch_picture, summary
from ufo_ds.data.source import TrainSource
from ufo_ds.errors import run


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return tiny.make(tmp_path_factory.mktemp("tiny"))


def test_figures_by_hand(recipe, tmp_path, capsys):
    """3 colours of 8 images, in steps of 8; 6 identities of 6 images from 2 cameras, in steps of 4 x 2; 20 pairs."""
    assert run(data_report.main, [str(recipe), "--json", "--out", str(tmp_path)]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["tasks"] == [
        {"task": "colours", "samples": 24, "classes": 3, "shards": 1, "samples_per_step": 8,
         "identities_per_step": None, "steps_per_epoch": 3, "images_per_identity": None},
        {"task": "stripes", "samples": 36, "classes": 6, "shards": 1, "samples_per_step": 8,
         "identities_per_step": 4, "steps_per_epoch": 1, "images_per_identity": [6, 6, 6]},
    ]  # fmt: skip
    stripes = {"benchmark": "stripes/stripes", "protocol": "retrieval", "samples": 36, "ids": 6, "cameras": 2}
    assert [entry for entry in values["benchmarks"] if "pairs" not in entry["benchmark"]] == [
        {"benchmark": "colours/colours", "protocol": "classification", "part": "shards", "samples": 24, "ids": 3,
         "cameras": 0, "pairs": None},
        {**stripes, "part": "query", "pairs": None},
        {**stripes, "part": "gallery", "pairs": None},
    ]  # fmt: skip
    (pairs,) = [entry for entry in values["benchmarks"] if "pairs" in entry["benchmark"]]
    assert (pairs["pairs"], pairs["samples"], pairs["cameras"]) == (20, pairs["ids"], 0)
    assert values["picture"] == str(tmp_path / "data-tiny.png")


def test_quarter_turns_and_two_sets_count(recipe):
    """Identities of two sets stay apart; each quarter turn of one is another; each set has its shards."""
    root = recipe.parent
    twice = [("tasks.stripes.train", f"[{{shards: {root}/stripes}}, {{shards: {root}/colours}}]"),
             ("tasks.stripes.quarter_turns", "true"), ("tasks.stripes.input", "[8, 8]")]  # fmt: skip
    loaded = recipe_file.load(str(recipe), twice)
    sources = {task.name: TrainSource.open(task, 0) for task in loaded.tasks}
    figures = summary.task_figures(loaded, sources)[1]
    assert (figures.samples, figures.classes, figures.shards) == (4 * (36 + 24), 4 * (6 + 3), 2)
    assert figures.steps_per_epoch == 9  # 36 identities, 4 a step
    assert figures.images_per_identity == (6, 6, 8)


def test_table_is_aligned(recipe, tmp_path, capsys):
    assert run(data_report.main, [str(recipe), "--out", str(tmp_path), "--tasks.colours.samples_per_step=7"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["colours", "24", "3", "1", "7", "3.4", "-"]
    assert lines[2].split() == ["stripes", "36", "6", "1", "4", "x", "2", "1.0", "6", "/", "6", "/", "6"]
    assert len({len(line) for line in lines[:3]}) == 1


def test_picture_shows_what_is_loaded(recipe, monkeypatch):
    """With images drawn at their own size their pixels are on the page: evaluation's above, training's below."""
    monkeypatch.setattr(batch_picture, "_LONGEST", 12)
    loaded = recipe_file.load(str(recipe))
    source = TrainSource.open(loaded.tasks[1], 0)  # 8 x 12 pixels
    page = np.asarray(batch_picture.draw(loaded.tasks[1:], {"stripes": source}, "title"))
    for draw in (0, 5):
        places = []
        for pixels in (source.pixels(source.index(draw)), source.load(draw)[0]):
            inner = pixels.transpose(1, 2, 0)[1:-1, 1:-1]  # the outermost pixels are under the edge
            windows = np.lib.stride_tricks.sliding_window_view(page, inner.shape)[:, :, 0]
            places.append(np.argwhere((windows == inner).all(axis=(2, 3, 4))))
        (above,), (below,) = places
        assert above[0] < below[0]
        assert above[1] == below[1]


def test_picture_of_many_tasks_of_odd_sizes(recipe):
    tasks, sources = [], {}
    for size in ([8, 8], [7, 41], [64, 5], [300, 200], [1, 1]):
        overrides = [("tasks.stripes.input", str(size)), ("model.backbone.patch_size", "1")]
        task = recipe_file.load(str(recipe), overrides).tasks[1]
        for n in range(6):
            tasks.append(dataclasses.replace(task, name=f"of_{size[0]}_by_{size[1]}_number_{n}"))
        sources |= dict.fromkeys([task.name for task in tasks[-6:]], TrainSource.open(task, 0))
    many = batch_picture.draw(tasks, sources, "a title that is longer than the page " * 9)
    assert many.width < 1400
    assert many.height > 29 * 100
    assert many.width == batch_picture.draw(tasks[:1], sources, "one").width


def test_unreadable_images_leave_a_gap(recipe, tmp_path):
    root = tiny.make(tmp_path / "broken").parent
    shard = next((root / "colours").glob("*.tar"))
    data = bytearray(shard.read_bytes())
    start = data.find(b"\x89PNG")
    while start >= 0:  # all but the last image
        following = data.find(b"\x89PNG", start + 1)
        if following >= 0:
            data[start : start + 4] = b"\0\0\0\0"
        start = following
    shard.write_bytes(data)
    loaded = recipe_file.load(str(root / "tiny.yaml"))
    sources = {"colours": TrainSource.open(loaded.tasks[0], 0)}
    assert isinstance(batch_picture.draw(loaded.tasks[:1], sources, ""), Image.Image)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nothing"], "no recipe 'nothing'"),
        (["RECIPE", "--optimizer.learning_rate", "1"], "optimizer.learning_rate"),
        (["RECIPE", "--out", "RECIPE"], "--out"),
        (["RECIPE", "--tasks.colours.train", "[{shards: nowhere}]"], "no shards in nowhere"),
        (["RECIPE", "--audit", "--tasks.colours.benchmarks", "[]", "--tasks.stripes.benchmarks", "[]",
          "--evaluation.best", "null"], "has no benchmark"),
        (["RECIPE", "more"], "unknown argument 'more'"),
    ],
)  # fmt: skip
def test_wrong_input(arguments, words, recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(data_report.main, [word.replace("RECIPE", str(recipe)) for word in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert words in error
    assert list(tmp_path.iterdir()) == []


def test_the_verb(recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["ufo", "data", str(recipe), "--out", str(tmp_path)])
    assert cli.main() == 0
    assert capsys.readouterr().out.startswith("task ")
    assert Image.open(tmp_path / "data-tiny.png").format == "PNG"
