"""What tests of tasks that are added and removed start from."""

import shutil

import torch

from tests import tiny
from tests.small_run import write_checkpoint
from ufo_ds import checkpoint, extend, recipe_file
from ufo_ds.checkpoint import Reader
from ufo_ds.model.loading import spec_of
from ufo_ds.subnets import untouched
from ufo_ds.subnets.task_model import open_model

OTHERS = ["digits", "glyphs"]


def make_shards(root):
    """Colours to classify and stripes to retrieve, as `ufo extend` wants them."""
    tiny.make(root / "made")
    for task, parts in {"colours": ["train", "test"], "stripes": ["train", "query", "gallery"]}.items():
        for part in parts:
            shutil.copytree(root / "made" / task, root / task / part)
    shutil.copytree(root / "made" / "pairs", root / "stripes" / "pairs")
    return root


def make_run(run, model):
    """A run of two tasks, weights in three files, of which the third has glyphs alone."""
    write_checkpoint(run / "checkpoints", model, apart="glyphs", metrics={"digits/digits/top1": 0.9},
                     licences={"digits": ["MIT"], "glyphs": ["CC BY-NC 4.0"]})  # fmt: skip
    (run / "recipe.yaml").write_text(recipe_file.to_yaml(model.recipe))
    return run


def directory_of(run):
    return checkpoint.of_run(run)


def state_of(run, task):
    """Everything a task's path and head are, by name."""
    reader = Reader(directory_of(run))
    return {
        name: reader.buffer(name) if name in reader.index.buffers else reader.parameter(name)
        for name in untouched.tensor_names(reader, spec_of(reader, task))
    }


def outputs(run, task, seed=0):
    model = open_model(run, task)
    pixels = torch.randint(0, 256, (5, 3, *model.input), generator=torch.Generator().manual_seed(seed))
    return model.embed(pixels.to(torch.uint8))


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def add(run, shards, *arguments, data="colours", protocol="classification", steps=3):
    extend.main([
        str(run), "--data", str(shards / data), "--protocol", protocol, "--steps", str(steps), "--device", "cpu",
        *arguments,
    ])  # fmt: skip


def files_of(path):
    return {file.relative_to(path): file.read_bytes() for file in path.rglob("*") if file.is_file()}
