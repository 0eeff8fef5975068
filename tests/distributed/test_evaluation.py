"""The number of ranks, and how images are cut among them, changes no metric."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests import tiny
from ufo_ds import recipe_file
from ufo_ds.evaluation import benchmarks, outcomes
from ufo_ds.evaluation.features import open_images

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("tiny"))


def launch(ranks: int, *arguments: str) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *arguments], cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize(
    ("ranks", "ways"),
    [
        (2, [{"stripes": [32, 32], "colours": [12, 12]}, {"stripes": [1, 63], "colours": [24, 0]}]),
        (4, [{"stripes": [7, 0, 52, 5], "colours": [0, 11, 1, 12]}]),
    ],
)
def test_given_features_on_ranks(recipe, tmp_path, ranks, ways):
    loaded = recipe_file.load(str(recipe))
    images = open_images(loaded)
    sizes = {name: len(mine) for name, mine in images.items()}
    draw = np.random.default_rng(0)
    given = {
        "colours.logits": draw.normal(size=(sizes["colours"], 3)).astype(np.float32),
        "stripes.embedding": draw.normal(size=(sizes["stripes"], 7)).astype(np.float32),
    }
    save_file(given, tmp_path / "features.safetensors")
    (tmp_path / "shares.json").write_text(json.dumps(ways))
    launch(
        ranks, "tests/distributed/features.py", str(recipe), str(tmp_path / "features.safetensors"),
        str(tmp_path / "shares.json"), str(tmp_path / "run"),
    )  # fmt: skip
    predictions = {
        "colours": {"logits": given["colours.logits"]}, "stripes": {"embedding": given["stripes.embedding"]}
    }  # fmt: skip
    wanted = benchmarks.score(loaded, images, predictions, {"colours": [f"colour{i}" for i in range(3)], "stripes": []})
    assert len(wanted) == 3
    for way, key in itertools.product(range(len(ways)), wanted):
        assert sizes == {task: sum(shares) for task, shares in ways[way].items()}
        found = outcomes.load(tmp_path / "run", way, key)
        assert found.metrics() == wanted[key].metrics()  # to the last digit
        for name, array in wanted[key].arrays.items():
            np.testing.assert_array_equal(found.arrays[name], array)
