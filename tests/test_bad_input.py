"""Wrong input ends a training within seconds: exit status 2, one line that names it, nothing on disk changed."""

import json
import resource
import sys
from pathlib import Path

import pytest

from tests import tiny
from tests.ranks import launch
from ufo_ds import cli, train
from ufo_ds.data.layouts import read_csv, read_folder
from ufo_ds.data.shard_writer import write
from ufo_ds.errors import UserError, run


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("tiny"))


def outcome(recipe: Path | str, run_dir: Path, *more: str, config: Path | str = "ds_configs/moe.json", main=train.main):
    """Exit status and error lines of a training in a process of its own."""
    arguments = ["--deepspeed", str(config), "--recipe", str(recipe), "--run_dir", str(run_dir), *more]
    status, output = launch(1, run, main, arguments)
    return status, [line for line in output.splitlines() if line.startswith("error: ")]


def train_with_small_files(arguments: list[str]) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
    train.main(arguments)


def message(capsys, recipe: Path | str, run_dir: Path, *more: str, config: Path | str = "ds_configs/moe.json") -> str:
    """The error line of a training that ends before it joins a job, in this process."""
    assert run(train.main, ["--deepspeed", str(config), "--recipe", str(recipe), "--run_dir", str(run_dir), *more]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert not run_dir.exists()
    return error


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--optimizer.learning_rate", "1"], ["optimizer.learning_rate", "unknown key"]),
        (["--tasks.stripes.heads.type", "linear"], ["tasks.stripes.heads", "unknown key"]),
        (["--tasks.strips.weight", "2"], ["no 'strips'", "colours, stripes"]),
        (["--schedule.steps", "many"], ["schedule.steps", "'many'"]),
        (["--tasks.stripes.samples_per_step", "6"], ["samples_per_step 6", "P x K = 4 x 2"]),
        (["--model.backbone.heads", "3"], ["dim 16", "heads 3"]),
        (["--schedule.steps"], ["needs a value"]),
        (["--stepz", "3"], ["--stepz", "--section.key"]),
        (["--seed", "-1"], ["seed", "-1"]),
    ],
)
def test_recipe(more, words, recipe, tmp_path, capsys):
    error = message(capsys, recipe, tmp_path / "run", *more)
    assert all(word in error for word in words), error


def test_unknown_recipe_and_config(recipe, tmp_path, capsys):
    assert "no recipe 'nothing'" in message(capsys, "nothing", tmp_path / "run")
    assert "no such file" in message(capsys, recipe, tmp_path / "run", config="ds_configs/none.json")
    (tmp_path / "list.json").write_text("[]")
    assert "expected a JSON object" in message(capsys, recipe, tmp_path / "run", config=tmp_path / "list.json")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"gradient_clipping": 5.0}, ["gradient_clipping is 5.0", "optimizer.gradient_clipping is 1.0"]),
        ({"train_batch_size": 32}, ["train_batch_size is 32", "samples per step is 16"]),
        ({"train_micro_batch_size_per_gpu": 4}, ["train_micro_batch_size_per_gpu is 4", "is 16"]),
        ({"optimizer": {"type": "SGD"}}, ["optimizer.type is sgd", "is adamw"]),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 0.1}}}, ["optimizer.params.lr is 0.1", "is 0.001"]),
        ({"scheduler": {"type": "WarmupLR"}}, ["remove the key scheduler"]),
        ({"zero_optimization": {"stage": 0}}, ["stage 0", "use 1, 2 or 3"]),
        ({"expert_parallel": {"autoep_size": 2}}, ["autoep_size 2", "1 rank"]),
        ({"expert_parallel": {"exchange": "all"}}, ["'all'", "aligned, input, layer"]),
        ({"fp16": {"enabled": True}}, ["fp16", "bf16"]),
        ({"gradient_accumulation_steps": 0}, ["gradient_accumulation_steps is 0"]),
        ({"zero_optimization": {"compute_grad_norm": False}}, ["zero_optimization.compute_grad_norm is false"]),
        ({"bf16": {"check_grad_overflow": False}}, ["bf16.check_grad_overflow is false"]),
    ],
)
def test_deepspeed_json(values, words, recipe, tmp_path, capsys):
    (tmp_path / "ds.json").write_text(json.dumps(values))
    error = message(capsys, recipe, tmp_path / "run", config=tmp_path / "ds.json")
    assert all(word in error for word in words), error


def test_isomorphic_batches_need_the_aligned_exchange(recipe, tmp_path, capsys):
    (tmp_path / "ds.json").write_text('{"expert_parallel": {"exchange": "input"}}')
    options = ["--data.batches", "isomorphic"]
    error = message(capsys, recipe, tmp_path / "run", *options, config=tmp_path / "ds.json")
    assert 'exchange "input"' in error
    assert 'data.batches is "isomorphic": use "aligned"' in error


def test_balance_needs_the_aligned_exchange(recipe, tmp_path, capsys):
    (tmp_path / "ds.json").write_text('{"expert_parallel": {"exchange": "layer"}}')
    options = ["--data.balance", "{every: 5}"]
    error = message(capsys, recipe, tmp_path / "run", *options, config=tmp_path / "ds.json")
    assert 'exchange "layer"' in error
    assert 'data.balance is given: use "aligned"' in error


def test_balance_needs_heterogeneous_batches(recipe, tmp_path, capsys):
    options = ["--data.balance", "{every: 5}", "--data.batches", "isomorphic"]
    error = message(capsys, recipe, tmp_path / "run", *options)
    assert 'balance is for heterogeneous batches, but batches is "isomorphic"' in error


def assert_refused(recipe, tmp_path, words, *more, **options):
    run_dir = tmp_path / "run"
    status, lines = outcome(recipe, run_dir, *more, **options)
    assert status == 2
    assert len(lines) == 1
    assert all(word in lines[0] for word in words), lines[0]
    assert not run_dir.exists()


def test_task_without_shards(recipe, tmp_path):
    assert_refused(recipe, tmp_path, ["colours", "no train set"], "--tasks.colours.train", "[]")
    missing = f"[{{shards: {tmp_path}/none}}]"
    assert_refused(recipe, tmp_path, ["no shards in", "ufo shards"], "--tasks.colours.train", missing)


def test_label_out_of_range(recipe, tmp_path):
    assert_refused(recipe, tmp_path, ["colours", "label out of range", "num_classes is 2"],
                   "--tasks.colours.num_classes", "2")  # fmt: skip


def test_benchmarks_are_checked_before_training(recipe, tmp_path):
    stripes = recipe.parent / "stripes"
    entry = f"[{{name: other, protocol: %s, shards: {stripes}}}]"
    best = ["--evaluation.best", "null"]
    assert_refused(recipe, tmp_path, ["benchmark other", "'id0' out of range"], *best,
                   "--tasks.colours.benchmarks", entry % "classification")  # fmt: skip
    assert_refused(recipe, tmp_path, ["benchmark other", "has no pairs"], *best,
                   "--tasks.stripes.benchmarks", entry % "verification")  # fmt: skip


def test_too_few_identities(recipe, tmp_path):
    assert_refused(recipe, tmp_path, ["stripes", "too few ids"],
                   "--tasks.stripes.samples_per_step", "16", "--tasks.stripes.identities_per_step", "8")  # fmt: skip


def test_samples_that_do_not_divide(recipe, tmp_path):
    (tmp_path / "ds.json").write_text('{"gradient_accumulation_steps": 3}')
    assert_refused(recipe, tmp_path, ["samples_per_step 8", "gradient_accumulation_steps 3", "colours"],
                   config=tmp_path / "ds.json")  # fmt: skip


def test_unknown_best_metric(recipe, tmp_path):
    assert_refused(recipe, tmp_path, ["evaluation.best", "'none/top1'"], "--evaluation.best", "none/top1")


def test_no_permission(recipe, tmp_path):
    (tmp_path / "file").write_text("kept")
    status, lines = outcome(recipe, tmp_path / "file" / "run")
    assert (status, len(lines)) == (2, 1)
    assert "no permission to write" in lines[0]
    assert (tmp_path / "file").read_text() == "kept"


def damaged_recipe(tmp_path: Path, images: int) -> Path:
    """The tiny recipe over shards of which some images are overwritten with noise, checksums and all."""
    recipe = tiny.make(tmp_path)
    directory = tmp_path / "colours"
    (shard,) = directory.glob("*.tar")
    data = bytearray(shard.read_bytes())
    position = 0
    for _ in range(images):
        position = data.index(b"\x89PNG", position) + 4
        data[position : position + 40] = bytes(40)
    shard.write_bytes(data)
    return recipe


def test_corrupt_images_up_to_a_share(tmp_path):
    """Two of 24 images are unreadable: 8.3% are allowed or not."""
    recipe = damaged_recipe(tmp_path, images=2)
    more = ["--tasks.colours.benchmarks", "[]", "--evaluation.best", "null"]
    status, _ = outcome(recipe, tmp_path / "run", *more, "--data.max_corrupt", "0.1")
    assert status == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["colours/unreadable"] for line in lines if "colours/unreadable" in line][-1] == 2
    status, errors = outcome(recipe, tmp_path / "other", *more, "--data.max_corrupt", "0.05")
    assert (status, len(errors)) == (2, 1)
    assert "of 24 images cannot be read" in errors[0]


def test_corrupt_image_of_a_benchmark(tmp_path):
    """A benchmark with an image left out would be another one. The line comes from a loader's worker process."""
    recipe = damaged_recipe(tmp_path, images=1)
    more = ["--data.max_corrupt", "0.5", "--data.workers", "1", "--schedule.steps", "1"]
    status, errors = outcome(recipe, tmp_path / "run", *more)
    assert (status, len(errors)) == (2, 1)
    assert "cannot be read" in errors[0]
    assert "Traceback" not in errors[0]


def test_shard_cut_short(tmp_path):
    recipe = tiny.make(tmp_path)
    (shard,) = (tmp_path / "stripes").glob("*.tar")
    shard.write_bytes(shard.read_bytes()[:-512])
    assert_refused(recipe, tmp_path, [shard.name])


def test_checkpoint_of_another_recipe_and_full_disk(recipe, tmp_path):
    run_dir = tmp_path / "run"
    steps = ["--schedule.steps", "2", "--evaluation.best", "null"]

    status, lines = outcome(recipe, run_dir, *steps, main=train_with_small_files)
    assert (status, len(lines)) == (2, 1)
    assert "step-00000002 not written" in lines[0]
    assert list((run_dir / "checkpoints").iterdir()) == []

    assert outcome(recipe, run_dir, *steps)[0] == 0  # with room it goes on

    def content() -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}

    before = content()
    status, lines = outcome(recipe, run_dir, *steps, "--tasks.stripes.samples_per_step", "12")
    assert (status, len(lines)) == (2, 1)
    assert "tasks.stripes.samples_per_step was 8, is 12" in lines[0]
    assert content() == before


def test_verbs(recipe, tmp_path, capsys):
    """The other commands, one line each."""

    def error_of(*arguments: str) -> str:
        sys.argv = ["ufo", *arguments]
        assert cli.main() == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        return error

    assert "no verb 'cut'" in error_of("cut")
    for verb in cli.VERBS:
        assert "--help" in error_of(verb, "a", "b", "--no_such_option") or verb == "verify"
    assert "'speling' (choose from" in error_of("extend", "run", "--protocol", "speling")
    assert "no run directory" in error_of("evaluate", str(tmp_path))
    assert "no run directory" in error_of("extract", str(tmp_path), "--task", "a", "--out", str(tmp_path / "out"))
    assert "none" in error_of("shards", "folder", str(tmp_path / "none"), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_layouts_by_hand(tmp_path):
    """What `ufo shards` reads is refused in the same way when called from Python."""
    (tmp_path / "list.csv").write_text("path,colour\na.png,red\n")
    with pytest.raises(UserError, match="header"):
        read_csv(tmp_path / "list.csv")
    (tmp_path / "classes" / "a").mkdir(parents=True)
    with pytest.raises(UserError):
        write(read_folder(tmp_path / "classes"), tmp_path / "out", source="test")
