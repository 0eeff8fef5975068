"""Image files to distil on, and recipes to do it by."""

import numpy as np
from PIL import Image

from tests.small_run import encode
from ufo_ds import recipe_file
from ufo_ds.subnets.task_model import open_model


def make_folder(folder, count=12, names=("zero", "one", "two"), seed=0, size=(20, 26)):
    """Images in a sub-folder for each name; without names in none. Those of a name are alike."""
    draw = np.random.default_rng(seed)
    for i in range(count):
        name = names[i % len(names)] if names else ""
        (folder / name).mkdir(parents=True, exist_ok=True)
        base = np.zeros((*size, 3)) + 40 + 70 * (names.index(name) if names else 0)
        noise = (base + draw.normal(0, 20, base.shape)).clip(0, 255).astype(np.uint8)
        (folder / name / f"{i:03}.png").write_bytes(encode(Image.fromarray(noise), "PNG"))
    return folder


def with_task(run, **values):
    """The recipe of one task of the run, changed."""
    recipe = recipe_file.dump(open_model(run, "glyphs").recipe)
    recipe["tasks"][0] |= values
    recipe["data"]["workers"] = 0
    return recipe_file.parse(recipe, "test")
