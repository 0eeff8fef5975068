"""A task more in a run: all others are the same to the bit, and nothing but what was chosen is trained."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.added_task import OTHERS, add, directory_of, make_run, make_shards, outputs, same, state_of
from tests.small_run import make_images, make_model, make_recipe, outputs_of, write_checkpoint
from ufo_ds import evaluate, extend, extract, recipe_file, status
from ufo_ds.checkpoint import Reader
from ufo_ds.data.mixing import Batch, TaskBatch
from ufo_ds.data.source import TrainSource, open_sets
from ufo_ds.errors import UserError
from ufo_ds.model.loading import load_supernet, spec_of
from ufo_ds.model.parameters import address_of
from ufo_ds.model.starting import opening
from ufo_ds.subnets import licences
from ufo_ds.subnets.task_model import open_model
from ufo_ds.training import new_task


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("data"))


@pytest.fixture
def run(tmp_path, model):
    return make_run(tmp_path / "run", model)


# --- a task more ------------------------------------------------------------------------------------------------------

TRAINED = {  # units and layers, of two blocks
    "head": set(),
    "norms": {("norm", 0), ("norm", 1), ("norm", 2)},
    "ffn": {("ffn", 0), ("ffn", 1)},
    "last": {("attn", 1), ("ffn", 1), ("norm", 1), ("norm", 2)},
    "embed": {("embed", 0)},
    "head norms ffn": {("norm", 0), ("norm", 1), ("norm", 2), ("ffn", 0), ("ffn", 1)},
}


@pytest.mark.parametrize("parts", TRAINED)
def test_only_what_was_chosen_is_trained_and_all_else_is_the_same(run, shards, parts):
    before = {task: (state_of(run, task), outputs(run, task), open_model(run, task).fingerprint) for task in OTHERS}
    names = set(Reader(directory_of(run)).index.parameters)
    add(run, shards, "--train", *parts.split())
    for task, (state, wanted, fingerprint) in before.items():
        assert same(state_of(run, task), state)
        assert all(torch.equal(a, b) for a, b in zip(outputs(run, task), wanted, strict=True))
        assert open_model(run, task).fingerprint == fingerprint
    reader = Reader(directory_of(run))
    new = set(reader.index.parameters) - names
    assert {address_of(name).owner for name in new} == {"colours"}
    own = {(a.unit, a.layer % 3 if a.unit == "norm" else a.layer % 2) for a in map(address_of, new) if a.unit != "head"}
    own = {(unit, 0 if unit == "embed" else layer) for unit, layer in own}
    assert own == TRAINED[parts]
    for name in new:  # each has moved from where it started
        if address_of(name).unit != "head":
            start = reader.parameter(name.replace(".own.colours.", ".shared."))
            if start.shape == reader.parameter(name).shape:
                assert not torch.equal(reader.parameter(name), start), name
    routes = spec_of(reader, "colours").routes
    assert {(u, i) for u, layers in routes.items() for i, route in enumerate(layers) if route == "own"} == own


def test_the_new_task_is_the_same_however_it_is_opened(run, shards, tmp_path, capsys):
    add(run, shards, "--train", "ffn", "--json")
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    evaluate.main([str(run), "--task", "colours", "--json", "--device", "cpu"])
    metrics = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert metrics == pytest.approx(said["metrics"])
    reader = Reader(directory_of(run))
    assert {k: v for k, v in reader.index.metrics.items() if k.startswith("colours/")} == said["metrics"]
    assert reader.index.metrics["digits/digits/top1"] == 0.9
    extract.main([str(run), "--task", "colours", "--out", str(tmp_path / "out"), "--verify"])
    assert open_model(tmp_path / "out").fingerprint == open_model(run, "colours").fingerprint
    model, opened = load_supernet(reader, [spec_of(reader, "colours")]), open_model(run, "colours")
    pixels = torch.randint(0, 256, (4, 3, *opened.input), dtype=torch.uint8)
    batch = Batch(0, 0, {"colours": TaskBatch(pixels, torch.zeros(4, dtype=torch.int64), range(4), 4)}, {})
    with torch.no_grad():
        torch.testing.assert_close(model(batch)["colours"].logits, opened.embed(pixels).logits, rtol=1e-4, atol=1e-5)
    assert status.read(run).recipe == "test"
    assert [task.name for task in recipe_file.load(str(run / "recipe.yaml")).tasks] == [*OTHERS, "colours"]


def test_it_learns(run, shards, capsys):
    add(run, shards, "--train", "embed", "ffn", "--lr", "0.01", "--json", steps=60)
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["metrics"]["colours/colours/top1"] > 0.9


def test_retrieval_takes_a_margin_head_triplet_and_its_shards(run, shards):
    add(run, shards, "--task", "bands", "--batch_size", "8", data="stripes", protocol="retrieval")
    task = next(t for t in Reader(directory_of(run)).recipe.tasks if t.name == "bands")
    assert (task.head.type, task.loss.given) == ("margin", ["cosface"])  # as of glyphs
    assert [b.protocol for b in task.benchmarks] == ["retrieval"]
    assert task.input == (24, 16)
    add(run, shards, data="stripes", protocol="verification")
    task = next(t for t in Reader(directory_of(run)).recipe.tasks if t.name == "stripes")
    assert task.benchmarks[0].shards == str(shards / "stripes" / "pairs")
    assert [t.name for t in Reader(directory_of(run)).recipe.tasks] == [*OTHERS, "bands", "stripes"]


def test_what_the_protocol_does_not_find_is_not_evaluated(run, shards, capsys):
    add(run, shards, data="stripes", protocol="attributes")
    assert "has nothing that attributes reads" in capsys.readouterr().out
    add(run, shards, "--task", "plain", data="made/colours")  # shards to train on, nothing else
    tasks = {task.name: task for task in Reader(directory_of(run)).recipe.tasks}
    assert tasks["stripes"].loss.given == ["binary_cross_entropy"]
    assert tasks["stripes"].benchmarks == tasks["plain"].benchmarks == []
    assert open_model(run, "stripes").classes == [f"id{i}" for i in range(6)]


def test_like_starts_from_that_tasks_path(run, shards):
    before = state_of(run, "digits")
    add(run, shards, "--like", "digits", "--train", "norms")
    reader = Reader(directory_of(run))
    assert spec_of(reader, "colours").routes == {
        "embed": ("own",), "norm": ("own",) * 3, "attn": ("shared",) * 2, "ffn": ("own", "shared"),
    }  # fmt: skip
    for name, value in before.items():  # own copies that are not trained are the same, and the task's own
        if ".own.digits." in name:
            assert torch.equal(reader.parameter(name.replace(".digits.", ".colours.")), value)


def test_a_shared_copy_that_serves_nobody_is_no_start(tmp_path, shards):
    model = make_model(make_recipe(routes={"embed": "own"}))
    for task in OTHERS:
        routes = {**model.routes[task], "embed": ("own",)}
        model.set_routes({task: routes})
    write_checkpoint(tmp_path / "run" / "checkpoints", model)
    with pytest.raises(UserError, match=r"^[^\n]*the shared embed serves no task[^\n]*--like digits$"):
        add(tmp_path / "run", shards)


def test_a_fraction_is_of_every_class_and_grows(shards):
    task = tiny_task(shards, "colours")
    sets = open_sets(task)
    from ufo_ds.data.fraction import fraction_of

    kept = {}
    for fraction in (0.1, 0.5, 1.0):
        source = TrainSource(task, 0, fraction_of(sets, task, fraction, 3))
        assert np.bincount(source.labels).tolist() == [{0.1: 1, 0.5: 4, 1.0: 8}[fraction]] * 3
        kept[fraction] = {source.pixels(i).tobytes() for i in range(len(source))}
    assert kept[0.1] < kept[0.5] < kept[1.0]
    task = tiny_task(shards, "stripes")
    halved = fraction_of(open_sets(task), task, 0.5, 3)
    source = TrainSource(new_task.fitted(task, halved, None), 0, halved)
    assert source.task.identities_per_step == 3
    assert (len(source), source.num_classes, sorted(set(source.labels))) == (18, 3, [0, 1, 2])
    whole = open_sets(task)[0]
    by_pixels = {whole.read(i): whole.classes[whole.labels[i]] for i in range(len(whole))}
    part = fraction_of(open_sets(task), task, 0.5, 3)[0]
    assert all(by_pixels[part.read(i)] == part.classes[part.labels[i]] for i in range(len(part)))


def tiny_task(shards, name):
    recipe = recipe_file.load(str(shards / "made" / "tiny.yaml"))
    return next(task for task in recipe.tasks if task.name == name)


def test_a_task_of_a_recipe(run, shards):
    before = {task: state_of(run, task) for task in OTHERS}
    file = shards / "made" / "tiny.yaml"
    text = file.read_text().replace("[8, 12]", "[16, 24]").replace("[8, 8]", "[16, 16]")
    (shards / "other.yaml").write_text(text)
    extend.main([str(run), "--recipe", str(shards / "other.yaml"), "--task", "stripes", "--steps", "2"])
    task = next(t for t in Reader(directory_of(run)).recipe.tasks if t.name == "stripes")
    assert task.loss.given == ["cosface", "triplet"]
    assert len(task.benchmarks) == 2
    assert all(same(state_of(run, name), before[name]) for name in OTHERS)


def test_licences_go_with_what_it_started_from(run, shards):
    add(run, shards)
    reader = Reader(directory_of(run))
    found = licences.behind(reader.index, reader.recipe, spec_of(reader, "colours"))
    assert found == {"colours": ["none"], "digits": ["MIT"], "glyphs": ["CC BY-NC 4.0"]}
    found = licences.behind(reader.index, reader.recipe, spec_of(reader, "digits"))
    assert found == {"digits": ["MIT"], "glyphs": ["CC BY-NC 4.0"]}


PROCESSES = """
import sys
from ufo_ds.errors import run
from ufo_ds.extend import main
sys.exit(run(main))
"""


def test_two_processes_train_as_one(run, shards, tmp_path):
    arguments = ["--data", str(shards / "stripes"), "--protocol", "retrieval", "--steps", "4", "--batch_size", "9",
                 "--train", "ffn", "last", "--device", "cpu"]  # fmt: skip
    other = Path(shutil.copytree(run, tmp_path / "two"))
    extend.main([str(run), *arguments])
    script = tmp_path / "start.py"
    script.write_text(PROCESSES)
    subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1",
         "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", str(script), str(other),
         *arguments],
        check=True, timeout=300, cwd=Path(__file__).parents[1],
    )  # fmt: skip
    one, two = state_of(run, "stripes"), state_of(other, "stripes")
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-5, atol=1e-5, msg=name)
    assert all(same(state_of(run, task), state_of(other, task)) for task in OTHERS)


def test_an_extended_run_does_not_train_on(run, shards):
    from ufo_ds.training.run_directory import check_resume

    check_resume(run, Reader(directory_of(run)).recipe, directory_of(run), {})
    add(run, shards)
    with pytest.raises(UserError, match=r"^[^\n]*colours was added to or removed from its step[^\n]*--model.init"):
        check_resume(run, make_recipe(), directory_of(run), {})


def test_outputs_of_the_others_are_the_supernets(run, shards, model):
    add(run, shards, "--train", "norms", "ffn", "embed")
    reader = Reader(directory_of(run))
    together = load_supernet(reader, [spec_of(reader, task) for task in [*OTHERS, "colours"]])
    for task in OTHERS:
        found, wanted = outputs_of(together, task, make_images()), outputs_of(model, task, make_images())
        assert torch.equal(found.embedding, wanted.embedding)


def test_a_new_run_starts_from_all_that_an_extended_one_has(run, shards):
    add(run, shards, "--train", "norms")
    reader = Reader(directory_of(run))
    model = dataclasses.replace(reader.recipe.model, init=str(run))
    recipe = dataclasses.replace(reader.recipe, model=model)
    recipe, start = opening(recipe, {name: len(names) for name, names in reader.index.classes.items()})
    name = "blocks.1.norm1.own.colours.weight"
    assert torch.equal(start.values(name, torch.Size([16]), range(16)), reader.parameter(name))
    assert start.routes["colours"]["norm"] == ("own",) * 3
    found = licences.origin({"colours": ["none"], "digits": ["MIT"], "glyphs": ["MIT"]}, None, start.checkpoint)
    assert found.licences["colours"] == ["none", "MIT", "CC BY-NC 4.0"]
