"""Checkpoints: read by range from any number of files, found whole or not at all, kept as the recipe says."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.small_run import CLASSES, PATHS, make_images, make_model, make_recipe, outputs_of, relative, write_checkpoint
from ufo_ds import checkpoint
from ufo_ds.checkpoint import Damaged, Index, Parameter, Reader
from ufo_ds.errors import UserError
from ufo_ds.model.architecture import Architecture
from ufo_ds.model.dense import path_names
from ufo_ds.model.loading import load_supernet, spec_of
from ufo_ds.model.spec import SubnetSpec

# --- reading a checkpoint ---------------------------------------------------------------------------------------------


def test_parameters_are_put_together_from_their_pieces(model, reader):
    pieces = [parameter.pieces for parameter in reader.index.parameters.values()]
    assert sum(len({file for file, _, _ in piece}) == 2 for piece in pieces) > 40
    for name, parameter in model.named_parameters():
        assert torch.equal(reader.parameter(name), parameter), name
    for name in ("heads.glyphs.neck.running_mean", "heads.glyphs.neck.running_var"):
        assert torch.equal(reader.buffer(name), model.get_buffer(name))


def test_files_are_what_the_library_writes_and_reads(tmp_path):
    draw = torch.Generator().manual_seed(0)
    shapes = {"a": [3, 4], "b": [5], "c|weight": [2, 3, 2], "d": [1]}
    tensors = {key: torch.randn(shape, generator=draw) for key, shape in shapes.items()}
    entry = checkpoint.write_tensors(tmp_path / "ours", shapes, tensors.values(), {"a": "b"})
    assert entry["sha256"] == checkpoint.sha256(tmp_path / "ours")
    assert entry["bytes"] == (tmp_path / "ours").stat().st_size
    found = load_file(tmp_path / "ours")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key], tensors[key]) for key in tensors)
    with safe_open(tmp_path / "ours", "pt") as file:
        assert file.metadata() == {"a": "b"}


def test_a_flipped_byte_is_no_value_and_no_crash(tmp_path, model):
    """Anywhere in a file, header and lengths included: what is read whole is right, or said to be damaged."""
    path = write_checkpoint(tmp_path, model)
    file, draw = path / "rank-0.safetensors", np.random.default_rng(0)
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    wanted = {name: parameter.detach() for name, parameter in model.named_parameters()}
    found = 0
    for position in [*range(8), *draw.integers(8, 8 + size, 60), *draw.integers(8 + size, len(content), 60)]:
        changed = bytearray(content)
        changed[position] ^= 1 << int(draw.integers(0, 8))
        file.write_bytes(changed)
        try:
            reader = Reader(path)
            for name, value in wanted.items():
                assert torch.equal(reader.parameter(name), value), (position, name)
        except Damaged:
            found += 1
    assert found > 100  # some names of checksums may change, and the header's end is spaces


def test_any_range_of_a_parameter_can_be_read(model, reader):
    draw = np.random.default_rng(0)
    parameters = dict(model.named_parameters())
    for name in draw.choice(list(parameters), 100):
        flat = parameters[name].flatten()
        start, stop = np.sort(draw.integers(0, len(flat) + 1, 2)).tolist()
        assert torch.equal(reader.read(name, "weight", start, stop), flat[start:stop])


def test_a_supernet_of_one_task_is_that_part_of_the_whole(model, reader):
    for task in CLASSES:
        spec = spec_of(reader, task)
        alone = load_supernet(reader, [spec])
        units = [f"{unit}." for unit, _ in path_names(spec)]
        backbone = [name for name, _ in alone.named_parameters() if not name.startswith("heads.")]
        assert all(name.startswith(tuple(units)) for name in backbone)  # and nothing that is not on its path
        assert all(any(name.startswith(unit) for name in backbone) for unit in units)
        wanted = outputs_of(model, task, make_images())
        found = outputs_of(alone, task, make_images())
        assert relative(found.embedding, wanted.embedding) < 1e-6
        assert relative(found.logits, wanted.logits) < 1e-6


def test_the_spec_of_a_run_is_its_routes(reader):
    for task, routes in PATHS.items():
        whole = Architecture.of(reader.recipe.model.backbone)
        assert spec_of(reader, task) == SubnetSpec(
            task, {unit: tuple(layers) for unit, layers in routes.items()}, whole
        )
    with pytest.raises(UserError, match=r"no task 'faces' in test; it has digits, glyphs"):
        spec_of(reader, "faces")


def test_routes_still_being_learned_go_to_the_more_probable_copy(tmp_path):
    learning = make_recipe(experts=["attn", "embed", "ffn"], routes={"attn": "learned"})
    model = make_model(learning)
    with torch.no_grad():
        model.router.logits["digits"].copy_(torch.tensor([[0.0, 1.0], [2.0, 1.0]]))
        model.router.logits["glyphs"].copy_(torch.tensor([[0.0, 0.0], [-2.0, -1.0]]))
    reader = Reader(write_checkpoint(tmp_path, model))
    assert spec_of(reader, "digits").routes["attn"] == ("own", "shared")
    assert spec_of(reader, "glyphs").routes["attn"] == ("shared", "own")
    for task in CLASSES:
        found = outputs_of(load_supernet(reader, [spec_of(reader, task)]), task, make_images())
        assert relative(found.logits, outputs_of(model, task, make_images()).logits) < 1e-6


@pytest.mark.parametrize("position", [0.01, 0.5, 0.99])
def test_a_flipped_byte_is_found(tmp_path, run, position):
    copied = shutil.copytree(checkpoint.of_run(run), tmp_path / "copied")
    Reader(copied).verify()
    file = copied / "rank-1.safetensors"
    data = bytearray(file.read_bytes())
    data[int(position * len(data))] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match=r"^[^\n]*rank-1\.safetensors changed since it was written[^\n]*$"):
        Reader(copied).verify()
    Reader(copied).verify(0, 2)  # the first and the last of three files
    with pytest.raises(UserError):
        Reader(copied).verify(1, 2)


def test_a_file_that_is_cut_short_or_missing_is_found(tmp_path, run):
    copied = shutil.copytree(checkpoint.of_run(run), tmp_path / "copied")
    reader = Reader(copied)
    file = copied / "rank-0.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"^[^\n]*rank-0\.safetensors is missing or cut short[^\n]*$"):
        Reader(copied)
    with pytest.raises(UserError, match=r"^[^\n]*rank-0\.safetensors changed since it was written[^\n]*$"):
        reader.verify()
    file.unlink()
    with pytest.raises(UserError, match=r"^[^\n]*rank-0\.safetensors is missing or cut short[^\n]*$"):
        Reader(copied)


def test_a_directory_without_an_index_is_no_checkpoint(tmp_path, run):
    copied = shutil.copytree(run / "checkpoints", tmp_path / "checkpoints")
    [whole] = checkpoint.find(copied)
    shutil.copytree(whole, copied / "step-00000020")
    (copied / "step-00000020" / "index.json").unlink()
    assert checkpoint.find(copied) == [whole]
    assert checkpoint.of_run(tmp_path) == whole
    with pytest.raises(UserError, match="is no checkpoint"):
        Reader(copied / "step-00000020")
    with pytest.raises(UserError, match="is no run directory with a checkpoint"):
        checkpoint.of_run(tmp_path / "elsewhere")


@pytest.mark.parametrize("content", ["", "{", "{}", "[]", "null", '{"parameters": []}', '{"parameters": {"a": {}}}'])
def test_an_index_that_is_none_ends_in_one_line(tmp_path, content):
    (tmp_path / "index.json").write_text(content)
    with pytest.raises(UserError, match=r"^[^\n]*is no checkpoint[^\n]*$"):
        Reader(tmp_path)


def test_a_checkpoint_of_another_version_is_refused(tmp_path, run):
    copied = shutil.copytree(checkpoint.of_run(run), tmp_path / "copied")
    values = json.loads((copied / "index.json").read_text())
    (copied / "index.json").write_text(json.dumps({**values, "version": 2}))
    with pytest.raises(UserError, match="version 2, expected 1"):
        Reader(copied)


# --- publishing and keeping checkpoints -------------------------------------------------------------------------------


def publish(directory, step, pieces=((0, 0, 6),), shape=(2, 3)):
    """A checkpoint of one parameter without files."""
    unfinished = directory / f"unfinished-{step}"
    unfinished.mkdir(parents=True)
    parameter = Parameter(list(shape), ["weight"], list(pieces))
    return checkpoint.publish(unfinished, Index(step, {}, {}, {}, parameters={"w": parameter}), [])


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ([(0, 0, 2), (1, 3, 3)], "w has a gap or an overlap at element 2"),
        ([(0, 0, 3), (1, 2, 4)], "w has a gap or an overlap at element 3"),
        ([(0, 1, 5)], "w has a gap or an overlap at element 0"),
        ([(0, 0, 6), (1, 0, 6)], "w has a gap or an overlap at element 6"),
        ([(0, 0, 5)], "w ends at element 5"),
        ([(0, 0, 7)], "w ends at element 7"),
        ([], "w ends at element 0"),
    ],
)
def test_gaps_and_overlaps_are_refused(tmp_path, pieces, message):
    with pytest.raises(RuntimeError, match=message):
        publish(tmp_path, 1, pieces)
    assert checkpoint.find(tmp_path) == []


def test_pieces_may_come_in_any_order(tmp_path):
    final = publish(tmp_path, 3, [(1, 4, 2), (2, 0, 1), (0, 1, 3)])
    assert final == tmp_path / "step-00000003"
    assert Reader(final).index.parameters["w"].pieces == [[2, 0, 1], [0, 1, 3], [1, 4, 2]]
    assert not list(tmp_path.glob("unfinished*"))


def test_a_step_may_be_published_again(tmp_path):
    old = publish(tmp_path, 3)
    (old / "left-over").touch()
    assert publish(tmp_path, 3) == old
    assert [path.name for path in old.iterdir()] == ["index.json"]


def test_the_newest_and_the_best_are_kept(tmp_path):
    for step in (5, 30, 100, 20, 10):
        publish(tmp_path, step)
    assert [path.name for path in checkpoint.find(tmp_path)] == [f"step-{s:08d}" for s in (5, 10, 20, 30, 100)]
    checkpoint.write_best(tmp_path, 10, "top1", 0.75)
    checkpoint.prune(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "best.json", "step-00000010", "step-00000030", "step-00000100",
    ]  # fmt: skip
    checkpoint.write_best(tmp_path, 100, "top1", 0.8)
    checkpoint.prune(tmp_path, 2)
    assert [path.name for path in checkpoint.find(tmp_path)] == ["step-00000030", "step-00000100"]
    checkpoint.prune(tmp_path, 5)
    assert len(checkpoint.find(tmp_path)) == 2


def test_a_run_stands_for_its_best_or_its_last_checkpoint(tmp_path):
    steps = {step: publish(tmp_path / "checkpoints", step) for step in (1, 2, 3)}
    assert checkpoint.of_run(tmp_path) == steps[3]  # no best yet
    checkpoint.write_best(tmp_path / "checkpoints", 2, "top1", 0.5)
    assert checkpoint.read_best(tmp_path / "checkpoints") == (2, 0.5)
    assert checkpoint.of_run(tmp_path) == steps[2]
    assert checkpoint.of_run(tmp_path, "last") == steps[3]
    assert checkpoint.of_run(steps[1]) == steps[1]
    shutil.rmtree(steps[2])
    assert checkpoint.of_run(tmp_path) == steps[3]
