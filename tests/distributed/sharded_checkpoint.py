"""Trains two steps and saves; then loads that on other topologies and saves it again; started by torchrun.

    torchrun --nproc_per_node 4 tests/distributed/sharded_checkpoint.py DIRECTORY CASES.json

The cases are those of equality.py; the n-th checkpoint is in DIRECTORY/n.
"""

import json
import sys
from pathlib import Path

import torch

from tests.distributed.equality import MANY_CLASSES, configure, global_batch, make_recipe, part_of
from ufo_ds.checkpoint import Index, name_of
from ufo_ds.parallel import checkpoint
from ufo_ds.parallel.engine import Engine
from ufo_ds.parallel.launch import finish_distributed, init_distributed
from ufo_ds.recipe_file import dump

STEPS = 2


def main(directory: str, cases_file: str) -> None:
    torch.set_num_threads(1)
    init_distributed()
    out = Path(directory)
    for i, case in enumerate(json.loads(Path(cases_file).read_text())):
        recipe = make_recipe(case)
        engine = Engine(recipe, configure(case, recipe), MANY_CLASSES)
        if i == 0:
            for step in range(STEPS):
                batch = global_batch(recipe, step, 0, engine.samples, MANY_CLASSES)
                engine.step([part_of(batch, engine.positions())], 1e-3)
        else:
            checkpoint.load(engine, out / str(i - 1) / name_of(STEPS))
        routes = {name: {unit: list(r) for unit, r in units.items()} for name, units in engine.model.routes.items()}
        checkpoint.save(engine, out / str(i), Index(STEPS, dump(recipe), {}, routes))
        engine.deepspeed.destroy()
    finish_distributed()


if __name__ == "__main__":
    main(*sys.argv[1:])
