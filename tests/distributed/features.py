"""Given features written by ranks in uneven parts, and scored by all of them; started by torchrun.

    torchrun --nproc_per_node 4 tests/distributed/features.py RECIPE FEATURES.safetensors SHARES.json OUT

SHARES.json holds per task how the images are cut, one number a rank; OUT becomes a run directory with the outcomes.
"""

import json
import sys
from pathlib import Path

from safetensors.numpy import load_file

from ufo_ds import recipe_file
from ufo_ds.evaluation import outcomes
from ufo_ds.evaluation.features import FeatureFiles, open_images
from ufo_ds.parallel import ranks, scoring
from ufo_ds.parallel.launch import finish_distributed, init_distributed


def main() -> None:
    init_distributed()
    recipe, given = recipe_file.load(sys.argv[1]), load_file(sys.argv[2])
    shares, out = json.loads(Path(sys.argv[3]).read_text()), Path(sys.argv[4])
    files = FeatureFiles(out / "features")
    if ranks.this() == 0:
        files.create()
    ranks.wait_for_all()
    images = open_images(recipe)
    for task, mine in images.items():
        start = sum(shares[task][: ranks.this()])
        stop = start + shares[task][ranks.this()]
        for kind in mine.kinds:
            for row in range(start, stop, 5):  # batches of five
                files.write(task, kind, row, given[f"{task}.{kind}"][row : min(row + 5, stop)])
    ranks.wait_for_all()
    found = scoring.score(
        recipe, images, files.read(images), {"colours": [f"colour{i}" for i in range(3)], "stripes": []}
    )
    assert len(found) == 3
    if ranks.this() == ranks.count() - 1:  # all have everything
        outcomes.store(out, 1, found)
    finish_distributed()


if __name__ == "__main__":
    main()
