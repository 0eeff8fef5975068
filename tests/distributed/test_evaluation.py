"""The number of ranks, and how images are cut among them, changes no metric."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests import tiny
from tests.distributed import features
from tests.ranks import run
from ufo_ds import recipe_file
from ufo_ds.evaluation import benchmarks, outcomes
from ufo_ds.evaluation.features import open_images


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("tiny"))


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
    run(
        ranks, features.main, str(recipe), tmp_path / "features.safetensors", tmp_path / "shares.json", tmp_path / "run"
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
