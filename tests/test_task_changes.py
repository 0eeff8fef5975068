"""A task less in a run, and what both changes have in common: proofs, kills, wrong input."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.added_task import OTHERS, add, directory_of, files_of, make_run, make_shards, outputs, same, state_of
from tests.small_run import make_model, make_recipe, write_checkpoint
from ufo_ds import checkpoint, extend, extract, recipe_file, remove, verify_untouched
from ufo_ds.checkpoint import Reader
from ufo_ds.errors import UserError
from ufo_ds.model.loading import spec_of
from ufo_ds.subnets import licences, task_changes, untouched


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("data"))


@pytest.fixture
def run(tmp_path, model):
    return make_run(tmp_path / "run", model)


# --- a task less ------------------------------------------------------------------------------------------------------


def test_an_added_task_is_removed_without_a_trace(run, shards):
    wanted = files_of(directory_of(run))
    add(run, shards)
    assert files_of(directory_of(run)).keys() - wanted.keys() == {
        Path("task-colours.safetensors"),
        Path("changes.jsonl"),
    }
    remove.main([str(run), "--task", "colours"])
    found = files_of(directory_of(run))
    for name, content in wanted.items():
        if name != Path("index.json"):
            assert found[name] == content
    assert found.keys() - wanted.keys() == {Path("changes.jsonl")}
    index = Reader(directory_of(run)).index
    before = json.loads(wanted[Path("index.json")])
    assert index.licences == before["licences"]
    assert index.recipe["model"]["experts"] == before["recipe"]["model"]["experts"]
    assert index.added == {}


@pytest.mark.parametrize("gone", OTHERS)
def test_a_task_of_the_joint_training_is_removed(run, gone):
    (stays,) = set(OTHERS) - {gone}
    before, wanted = state_of(run, stays), outputs(run, stays)
    old = {entry["name"] for entry in Reader(directory_of(run)).index.files}
    remove.main([str(run), "--task", gone])
    reader = Reader(directory_of(run))
    reader.verify()
    assert [task.name for task in reader.recipe.tasks] == [stays]
    assert same(state_of(run, stays), before)
    assert all(torch.equal(a, b) for a, b in zip(outputs(run, stays), wanted, strict=True))
    keys = [key for i in range(len(reader.index.files)) for key in reader.contents(i)[0]]
    assert keys
    assert not any(gone in key.split("|")[0].split(".") for key in keys)
    left = {file.name for file in directory_of(run).glob("*.safetensors")}
    assert left == {entry["name"] for entry in reader.index.files}
    assert left & old == (
        ({"rank-0.safetensors", "rank-1.safetensors"} if gone == "glyphs" else {"rank-2.safetensors"}) & left
    )
    assert reader.index.licences.keys() == set(OTHERS)  # the shared copies have learned from its images
    with pytest.raises(UserError, match="one has to remain"):
        remove.main([str(run), "--task", stays])


def test_more_and_less_in_turn(run, shards):
    before = state_of(run, "glyphs")
    add(run, shards)
    remove.main([str(run), "--task", "digits"])
    add(run, shards, "--like", "colours", "--task", "hues")
    remove.main([str(run), "--task", "colours"])
    reader = Reader(directory_of(run))
    assert [task.name for task in reader.recipe.tasks] == ["glyphs", "hues"]
    assert same(state_of(run, "glyphs"), before)
    found = licences.behind(reader.index, reader.recipe, spec_of(reader, "hues"))
    assert found.keys() == {"hues", "colours", "digits", "glyphs"}
    reader.verify()
    verify_untouched.main([str(run)])


# --- proofs, kills, refusals ------------------------------------------------------------------------------------------


def test_untouched_finds_what_changed(run, shards, tmp_path, capsys):
    with pytest.raises(UserError, match="no task was added or removed"):
        verify_untouched.main([str(run)])
    before = Path(shutil.copytree(run, tmp_path / "before"))
    add(run, shards)
    verify_untouched.main([str(run)])
    verify_untouched.main([str(run), str(before)])
    assert "digits, glyphs: the same to the bit" in capsys.readouterr().out
    other = make_model(make_recipe())
    with torch.no_grad():
        value = other.get_parameter("blocks.1.attn.shared.proj.weight")
        value[3, 4] = torch.nextafter(value[3, 4], torch.tensor(9.0))
    shutil.rmtree(before)
    write_checkpoint(before / "checkpoints", other)
    with pytest.raises(SystemExit) as left:
        verify_untouched.main([str(run), str(before)])
    assert left.value.code == 1
    assert capsys.readouterr().err.strip() == f"{run}: digits: blocks.1.attn.shared.proj.weight differs"
    line = untouched.last_line(directory_of(run))
    shutil.copy(directory_of(run) / untouched.CHANGES, directory_of(before) / untouched.CHANGES)
    with pytest.raises(SystemExit):
        verify_untouched.main([str(before)])
    assert set(line["weights"]) == set(OTHERS)
    line["torch"] = "another"
    line["outputs"] = dict.fromkeys(OTHERS, "")
    (directory_of(run) / untouched.CHANGES).write_text(json.dumps(line) + "\n")
    verify_untouched.main([str(run)])
    assert "not compared: recorded by torch another" in capsys.readouterr().out


def test_a_change_of_another_task_is_not_published(run, shards, monkeypatch):
    wanted = files_of(directory_of(run))
    digests = untouched.digests

    def damaged(reader, tasks):
        found = digests(reader, tasks)
        if reader.directory.name == task_changes.STAGED:
            found.outputs["glyphs"] = "0" * 64
        return found

    monkeypatch.setattr(untouched, "digests", damaged)
    with pytest.raises(UserError, match="extend of colours is not published, as glyphs: the outputs on noise differ"):
        add(run, shards)
    assert files_of(directory_of(run)) == wanted


@pytest.mark.parametrize("change", ["extend", "remove"])
@pytest.mark.parametrize("at", ["write_tensors", "write_index", "replace"])
def test_a_kill_before_the_index_is_there_leaves_the_old_one(run, shards, monkeypatch, change, at):
    before = {task: state_of(run, task) for task in OTHERS}
    index = (directory_of(run) / "index.json").read_bytes()

    def act():
        if change == "extend":
            add(run, shards)
        else:
            remove.main([str(run), "--task", "digits"])

    class Killed(BaseException):
        pass

    def kill(*_, **__):
        raise Killed

    with monkeypatch.context() as patch:
        if at == "write_tensors":
            patch.setattr(task_changes, at, kill)
        elif at == "write_index":
            patch.setattr(checkpoint, at, kill)
        else:
            patch.setattr(task_changes.os, "replace", kill)
        with pytest.raises(Killed):
            act()
    assert (directory_of(run) / "index.json").read_bytes() == index
    assert all(same(state_of(run, task), before[task]) for task in OTHERS)
    act()  # what is left over does not matter
    Reader(directory_of(run)).verify()
    assert same(state_of(run, "glyphs"), before["glyphs"])


@pytest.mark.parametrize("change", ["extend", "remove"])
def test_what_a_kill_after_the_index_left_undone_is_done_by_the_next_change(run, shards, monkeypatch, change):
    class Killed(BaseException):
        pass

    def kill(*_):
        raise Killed

    settle, calls = task_changes.settle, []

    def settle_once(directory):  # before a change, and not after it
        calls.append(directory)
        (settle if len(calls) == 1 else kill)(directory)

    with monkeypatch.context() as patch:
        patch.setattr(task_changes, "settle", settle_once)
        with pytest.raises(Killed):
            add(run, shards) if change == "extend" else remove.main([str(run), "--task", "digits"])
    left = [*OTHERS, "colours"] if change == "extend" else ["glyphs"]
    assert [task.name for task in Reader(directory_of(run)).recipe.tasks] == left
    assert [task.name for task in recipe_file.load(str(run / "recipe.yaml")).tasks] == OTHERS
    with task_changes.held(directory_of(run)):
        pass
    assert [task.name for task in recipe_file.load(str(run / "recipe.yaml")).tasks] == left
    used = {entry["name"] for entry in Reader(directory_of(run)).index.files}
    assert {file.name for file in directory_of(run).glob("*.safetensors")} == used


def test_a_full_disk_leaves_no_part_of_a_file(run, shards, monkeypatch):
    wanted = files_of(directory_of(run))

    def fill_up(path, *_):
        path.write_bytes(b"a part of it")
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(task_changes, "write_tensors", fill_up)
    for change in (lambda: add(run, shards), lambda: remove.main([str(run), "--task", "digits"])):
        with pytest.raises(UserError, match="No space left on device: make room"):
            change()
        assert files_of(directory_of(run)) == wanted


def test_another_checkpoint_than_the_best_leaves_the_recipe(run, shards):
    best = directory_of(run)
    last = Path(shutil.copytree(best, best.with_name("step-00000020")))
    checkpoint.write_best(best.parent, 10, "digits/digits/top1", 0.9)
    recipe = (run / "recipe.yaml").read_text()
    add(last, shards)
    assert (run / "recipe.yaml").read_text() == recipe
    add(run, shards)
    assert [task.name for task in recipe_file.load(str(run / "recipe.yaml")).tasks] == [*OTHERS, "colours"]
    remove.main([str(last), "--task", "colours"])
    assert [task.name for task in recipe_file.load(str(run / "recipe.yaml")).tasks] == [*OTHERS, "colours"]


def test_the_name_of_a_removed_task_keeps_its_licences(run, shards):
    remove.main([str(run), "--task", "digits"])
    with pytest.raises(UserError, match=r"^[^\n]*--task 'digits' was removed[^\n]*choose another$"):
        add(run, shards, "--task", "digits")
    add(run, shards, "--like", "glyphs")
    add(run, shards, "--like", "colours", "--task", "hues")
    remove.main([str(run), "--task", "colours"])
    with pytest.raises(UserError, match="--task 'colours' was removed"):
        add(run, shards)
    remove.main([str(run), "--task", "hues"])
    add(run, shards, "--like", "glyphs")  # nothing is left that learned from it
    index = Reader(directory_of(run)).index
    assert index.added.keys() == {"colours"}
    assert index.licences == {"digits": ["MIT"], "glyphs": ["CC BY-NC 4.0"], "colours": ["none"]}


def test_licences_that_are_not_known_are_not_forgotten(tmp_path, model):
    write_checkpoint(tmp_path / "run" / "checkpoints", model, apart="glyphs")
    remove.main([str(tmp_path / "run"), "--task", "digits"])
    reader = Reader(directory_of(tmp_path / "run"))
    found = licences.behind(reader.index, reader.recipe, spec_of(reader, "glyphs"))
    assert found == {"digits": ["unknown"], "glyphs": ["unknown"]}


def test_routes_learned_to_be_shared_outlive_the_last_own_copy(tmp_path, shards):
    recipe = make_recipe(routes={"embed": "shared", "ffn": "learned"})
    tasks = [dataclasses.replace(task, routes={"ffn": "learned"}) for task in recipe.tasks]
    model = make_model(make_recipe(routes={"embed": "shared"}, experts=["ffn", "embed"]))
    for task, ffn in zip(OTHERS, ["own", "shared"], strict=True):
        model.set_routes({task: {**model.routes[task], "embed": ("shared",), "ffn": (ffn,) * 2}})
    for task in OTHERS:
        for block in model.blocks:
            if model.routes[task]["ffn"][0] == "shared" and block.ffn.own is not None and task in block.ffn.own:
                del block.ffn.own[task]
    model.recipe = dataclasses.replace(recipe, tasks=tasks)
    run = tmp_path / "run"
    write_checkpoint(run / "checkpoints", model, apart="glyphs")
    wanted = outputs(run, "glyphs")
    remove.main([str(run), "--task", "digits"])
    assert all(torch.equal(a, b) for a, b in zip(outputs(run, "glyphs"), wanted, strict=True))


def test_a_damaged_record_is_said(run, shards):
    add(run, shards)
    record = directory_of(run) / untouched.CHANGES
    whole = record.read_bytes()
    for content in (b"", whole[:-50], whole + b"{}\n", whole + b"5\n", whole + b"\xff\n", b"[" * 100_000):
        record.write_bytes(content)
        with pytest.raises(UserError, match=r"^the last line of [^\n]*changes.jsonl is damaged[^\n]*$"):
            verify_untouched.main([str(run)])


def test_bad_input(run, shards, tmp_path):
    wanted = files_of(run)
    data = ["--data", str(shards / "colours"), "--protocol", "classification"]
    for arguments, message in [
        (["--protocol", "retrieval"], "give both --data DIR and --protocol"),
        (["--data", str(shards / "colours")], "give both --data DIR and --protocol"),
        (["--recipe", "demo"], "--recipe demo without --task"),
        ([*data, "--recipe", "demo", "--task", "glyphs"], "--data .* with --recipe demo: give one"),
        ([*data, "--task", "digits"], "--task 'digits' is there already"),
        ([*data, "--task", "Dig its"], "Dig its"),
        ([*data, "--like", "letters"], "--like 'letters' is no task of this run: it has digits, glyphs"),
        ([*data, "--fraction", "0"], "--fraction 0: "),
        ([*data, "--steps", "-1"], "--steps -1: give a positive number"),
        ([*data, "--train", "last", "--last_blocks", "3"], "--last_blocks 3: the model has 2 blocks"),
        ([*data, "--last_blocks", "1"], "is for --train last"),
        (["--data", str(tmp_path), "--protocol", "classification"], "has a manifest.json: make it with `ufo shards`"),
        (
            ["--data", str(shards / "stripes"), "--protocol", "retrieval", "--fraction", "0.1"],
            "images of 1 of its ident",
        ),
    ]:
        with pytest.raises(UserError, match=rf"^[^\n]*({message})[^\n]*$"):
            extend.main([str(run), "--steps", "2", *arguments])
    with pytest.raises(UserError, match="is no run directory with a checkpoint"):
        add(tmp_path / "nothing", shards)
    with pytest.raises(UserError, match=r"--task 'letters' is not there: .* has digits, glyphs"):
        remove.main([str(run), "--task", "letters"])
    extract.main([str(run), "--task", "digits", "--task", "glyphs", "--out", str(tmp_path / "both")])
    with pytest.raises(UserError, match="holds subnets of digits, glyphs and no whole model"):
        add(tmp_path / "both", shards)
    with task_changes.held(directory_of(run)), pytest.raises(UserError, match="another process trains or changes it"):
        add(run, shards)
    (run / ".lock").unlink()
    assert files_of(run) == wanted
