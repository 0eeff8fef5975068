"""Given features written by ranks in uneven parts, and scored by all of them; started by torchrun.

    torchrun --nproc_per_node 4 tests/distributed/features.py RECIPE FEATURES.safetensors SHARES.json OUT

SHARES.json holds a list of ways to cut the images of each task, one number a rank; OUT becomes a run directory with the
outcomes of each, as those of steps.
"""

import json
import sys
from pathlib import Path

import torch.distributed as dist
from safetensors.numpy import load_file

from ufo_ds import recipe_file
from ufo_ds.evaluation import outcomes
from ufo_ds.evaluation.features import FeatureFiles, open_images
from ufo_ds.parallel import ranks, scoring


def main(recipe_name: str, features_file: str, shares_file: str, out: str) -> None:
    dist.init_process_group("gloo")
    recipe, given = recipe_file.load(recipe_name), load_file(features_file)
    images, classes = open_images(recipe), {"colours": [f"colour{i}" for i in range(3)], "stripes": []}
    for way, shares in enumerate(json.loads(Path(shares_file).read_text())):
        files = FeatureFiles(Path(out) / "features")
        if ranks.this() == 0:
            files.create()
        ranks.wait_for_all()
        for task, mine in images.items():
            start = sum(shares[task][: ranks.this()])
            stop = start + shares[task][ranks.this()]
            for kind in mine.kinds:
                for row in range(start, stop, 5):  # batches of five
                    files.write(task, kind, row, given[f"{task}.{kind}"][row : min(row + 5, stop)])
        ranks.wait_for_all()
        found = scoring.score(recipe, images, files.read(images), classes)
        assert len(found) == 3
        if ranks.this() == ranks.count() - 1:  # all have everything
            outcomes.store(Path(out), way, found)
        ranks.wait_for_all()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
