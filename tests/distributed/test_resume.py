"""`ufo verify resume` for real, on some topologies; it fails where a checkpoint does not hold what it should."""

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests import tiny
from ufo_ds import checkpoint, verify, verify_resume
from ufo_ds.errors import run


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> list[str]:
    """The recipe on sets so small that epochs end within the run, and with an odd number of rows to be spread."""
    root = tiny.make(tmp_path_factory.mktemp("data")).parent
    words = ["--tasks.letters.num_classes", "7"]
    for task, name in {"digits": "colours", "glyphs": "stripes", "letters": "stripes"}.items():
        words += [f"--tasks.{task}.train", f"[{{shards: {root / name}}}]"]
    return words


def test_one_and_two_ranks(data, capsys):
    assert run(verify.main, ["resume", *data, "--ranks", "1,2", "--optimizers", "adamw", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    check(found, [(1, 1), (2, 1), (2, 2)], ["adamw"])


@pytest.mark.matrix
def test_matrix(capsys):
    assert run(verify.main, ["resume", "--json"]) == 0
    check(json.loads(capsys.readouterr().out), [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4)], ["sgd", "adamw"])


def check(found: dict, shapes: list[tuple[int, int]], optimizers: list[str]) -> None:
    names = [f"{n} rank{'s' * (n > 1)}, EP {ep}, ZeRO-{zero}" for n, ep in shapes for zero in (1, 3)]
    pairs = [(pair["optimizer"], pair["source"], pair["target"]) for pair in found["pairs"]]
    assert pairs == list(product(optimizers, names, names))
    for pair in found["pairs"]:
        assert pair["ok"]
        assert pair["same_samples"]
        states = {"momentum_buffer"} if pair["optimizer"] == "sgd" else {"exp_avg", "exp_avg_sq"}
        assert pair["differences"].keys() == {"weight", "average", "buffer", "loss"} | states
        assert pair["largest_difference"] == max(pair["differences"].values()) <= verify_resume.BAR
    # What is computed elsewhere cannot be the same to the bit everywhere.
    assert any(pair["largest_difference"] for pair in found["pairs"])
    assert all(pair["same_samples"] for pair in found["references"])
    assert found["ok"]


def change_index(path: Path, change: Callable[[dict], None]) -> None:
    index = json.loads((path / checkpoint.INDEX).read_text())
    change(index)
    (path / checkpoint.INDEX).write_text(json.dumps({**index, "sha256": ""}))  # as one of before there were checksums


def change_tensor(path: Path, key: str) -> None:
    """By a thousandth, in a checkpoint of one rank; its checksum is made right."""
    file = path / "rank-00000.safetensors"
    tensors = load_file(file)
    save_file(tensors | {key: tensors[key] * 1.001}, file)
    entry = {"name": file.name, "bytes": file.stat().st_size, "sha256": checkpoint.sha256(file)}
    change_index(path, lambda index: index.update(files=[entry]))


def change_draws(index: dict) -> None:
    """As if a task had been trained in one more step of its own before."""
    index["balance"]["counts"][0]["digits"] += 1


def test_what_is_lost_is_found(data, monkeypatch, capsys):
    """Of the checkpoints of three topologies a tensor of the optimizer is changed in one, what samples come next in
    another; those that go on from them fail, others do not."""
    train_references = verify_resume.train_references

    def and_tamper(job, progress):
        train_references(job, progress)
        first, second, _ = (job.checkpoint("sgd", topology) for topology in job.topologies)
        change_tensor(first, "heads.letters.classifier.weight|momentum_buffer")
        change_index(second, change_draws)

    monkeypatch.setattr(verify_resume, "train_references", and_tamper)
    words = ["resume", *data, "--ranks", "1", "--zero", "1,2,3", "--optimizers", "sgd", "--steps", "1"]
    with pytest.raises(SystemExit) as status:
        run(verify.main, [*words, "--json"])
    assert status.value.code == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["ok"]
    for pair in found["pairs"]:
        assert pair["ok"] == (pair["source"] == "1 rank, EP 1, ZeRO-3")
        assert pair["same_samples"] == (pair["source"] != "1 rank, EP 1, ZeRO-2")
        if pair["source"] == "1 rank, EP 1, ZeRO-1":
            assert pair["at"]["momentum_buffer"] == "heads.letters.classifier.weight"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["onwards"], "ufo verify 'onwards': use one of resume"),
        (["resume", "--ranks", "1,x"], "--ranks '1,x': give positive whole numbers"),
        (["resume", "--ranks", "0"], "--ranks '0': give positive whole numbers"),
        (["resume", "--ranks", "2,3", "--ep", "2"], "--ep '2': none of them divides one of --ranks '2,3': add 1"),
        (["resume", "--zero", "0,4"], "--zero '0,4': give positive"),
        (["resume", "--zero", "4"], "--zero '4': use 1, 2 or 3"),
        (["resume", "--steps", "3,4"], "--steps '3,4': give one number"),
        (["resume", "--optimizers", "adam"], "--optimizers 'adam': use some of sgd, adamw"),
        (["resume", "--recipe", "nothing"], "no recipe 'nothing'"),
        (["resume", "--optimizer.rate", "1"], "unknown key optimizer.rate"),
        (["resume", "--rank", "1"], "unknown argument '--rank'"),
        (["resume", "nowhere"], "nowhere is no run directory with a checkpoint"),
        (["resume", "nowhere", "--recipe", "demo"], "--recipe with the run nowhere"),
        (["resume", "--recipe", "ufo2_17b"], "data_shards"),
    ],
)
def test_wrong_input_is_one_line(words, message, capsys):
    assert run(verify.main, words) == 2
    out, error = capsys.readouterr()
    assert message in error
    assert (out, error.count("\n")) == ("", 1)
