"""Small elastic supernets with two tasks, their checkpoints and train sets, and commands on them."""

import json

import numpy as np

from tests.pictures import Bytes, encode, texture
from tests.small_run import CLASSES
from ufo_ds import checkpoint, recipe_file
from ufo_ds.checkpoint import Reader
from ufo_ds.data.layouts import Layout, Sample
from ufo_ds.data.shard_writer import write
from ufo_ds.data.shards import ShardSet
from ufo_ds.errors import run as entry
from ufo_ds.model.architecture import SearchSpace
from ufo_ds.model.loading import spec_of

PLAIN = {"backbone": {"dim": 24, "depth": 3, "heads": 3, "patch_size": 8, "mlp_ratio": 3}}
STEM = {"backbone": {**PLAIN["backbone"], "stem": [8, 8, 32], "pool": "mean"}}
SIZES = {"depth": [1, 2, 3], "dim": [9, 16, 24], "heads": [1, 2, 3], "mlp_ratio": [1.0, 2.5, 3.0]}
SPACES = {
    "plain": {**PLAIN, "elastic": SIZES},
    "stem": {**STEM, "elastic": {**SIZES, "stem": [0.5, 1.0]}},
    "own": {**PLAIN, "elastic": SIZES, "experts": ["embed", "norm", "attn", "ffn"]},
}


def make_recipe(root, space="plain", sampling="sandwich"):
    """A linear head behind a neck, and a margin head; routes differ by layer where there are own copies."""
    model = {"experts": ["ffn"], **SPACES[space]}
    model["elastic"] = {**model["elastic"], "sampling": sampling}
    routes = {"ffn": ["shared", "own", "shared"]}
    if space == "own":
        routes = {"embed": "own", "norm": ["own", "shared", "own", "own"], "attn": ["shared", "own", "own"], **routes}
    tasks = {"digits": ("linear", "cross_entropy", [16, 24]), "glyphs": ("margin", "cosface", [24, 16])}
    return recipe_file.parse(
        {
            "name": "test",
            "model": model,
            "tasks": [
                {
                    "name": name,
                    "head": {"type": kind, "neck": True} if kind == "linear" else {"type": kind},
                    "loss": {loss: {}},
                    "input": size,
                    "samples_per_step": 8,
                    "routes": routes,
                    "train": [{"shards": f"{root}/{name}-{part}"} for part in ("one", "two")],
                    "benchmarks": [{"name": "which", "protocol": "classification", "shards": f"{root}/{name}-two"}],
                }
                for name, (kind, loss, size) in tasks.items()
            ],
            "schedule": {"steps": 10},
        },
        "test",
    )  # fmt: skip


def write_shards(root):
    """Train sets of 12 and 20 images for each task, one of them unreadable."""
    generator = np.random.default_rng(0)
    for task, names in CLASSES.items():
        for part, count in (("one", 12), ("two", 20)):
            data = [encode(texture(generator)) for _ in range(count)]
            samples = [Sample(Bytes(image), names[i % len(names)]) for i, image in enumerate(data)]
            write(Layout(samples), root / f"{task}-{part}", source="test", licence="CC0")
        shards = ShardSet.open(root / f"{task}-one")
        [tar] = (root / f"{task}-one").glob("*.tar")
        tar.write_bytes(tar.read_bytes().replace(shards.read(4), bytes(len(shards.read(4)))))
    return root


def open_run(run):
    return Reader(checkpoint.of_run(run))


def drawn(reader, task, *key):
    return spec_of(reader, task).sliced(SearchSpace.of(reader.recipe.model).draw(*key))


def run_json(capsys, command, *arguments):
    capsys.readouterr()
    assert entry(command.main, [*map(str, arguments), "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def error_of(capsys, command, *arguments):
    capsys.readouterr()
    assert entry(command.main, [*map(str, arguments)]) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


def write_spec(directory, spec):
    path = directory / f"{spec.name}.json"
    path.write_text(spec.to_json())
    return path
