"""Begins runs from what another run has trained, and compares them with it.

A case has the recipe file, overrides of it, the tasks to take, ``ep``, ``stage``, and ``bf16``. Its result, over all
ranks: names of parameters, averages and statistics that are not those of the run, how many were compared, bytes of
weights that each rank read and those of its slices, the routes, and by how much the losses of the first step differ
from those of the run's model on the same batch (of the largest).
"""

import os
from collections.abc import Sequence

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param

from tests.distributed.equality import global_batch, part_of
from ufo_ds import recipe_file
from ufo_ds.checkpoint import AVERAGE, Reader
from ufo_ds.model import classifiers
from ufo_ds.model.loading import load_supernet, spec_of
from ufo_ds.model.starting import opening
from ufo_ds.parallel import checkpoint, ranks
from ufo_ds.parallel import config as configs
from ufo_ds.parallel.averages import head_buffers
from ufo_ds.parallel.engine import Engine
from ufo_ds.parallel.experts import EMPTY
from ufo_ds.parallel.shards import optimizer_state, parameter_slices
from ufo_ds.recipe import only

CLASSES = {"colours": 3, "stripes": 6}


def begin(case: dict) -> dict:
    recipe = only(recipe_file.load(case["recipe"], case["overrides"]), case["tasks"])
    values = {
        "zero_optimization": {"stage": case["stage"]},
        "expert_parallel": {"autoep_size": case["ep"]},
        "bf16": {"enabled": case["bf16"]},
    }
    config = configs.resolve(values, "starting.py", recipe, dist.get_world_size())
    classes = {name: CLASSES[name] for name in case["tasks"]}
    recipe, start = opening(recipe, classes)
    assert start is not None
    assert start.checkpoint is not None
    checkpoint.check_whole(start.checkpoint)
    counter, preadv = [0], os.preadv

    def counting(file: int, buffers: Sequence[memoryview], offset: int) -> int:
        counter[0] += (count := preadv(file, buffers, offset))
        return count

    os.preadv = counting
    engine = Engine(recipe, config, classes, pretrained=start.values)
    os.preadv = preadv
    checkpoint.begin(engine, start)

    reader, wrong, compared = Reader(start.checkpoint), set(), 0
    padded = classifiers.parts(engine.model)
    for name, parameter in engine.model.named_parameters():
        found = safe_get_full_fp32_param(parameter)
        if EMPTY not in name:
            compared += 1
            rows = padded[name].rows if name in padded else range(len(found))
            wanted = reader.parameter(name)[rows.start : rows.stop]
            wrong |= set() if torch.equal(found[: len(rows)], wanted) else {name}
    slices = [piece for piece in parameter_slices(engine) if piece.length and EMPTY not in piece.name]
    for piece in slices:
        average = piece.of(optimizer_state(engine, piece.flat)[AVERAGE])
        wanted = reader.elements(piece.name, piece.start, piece.start + piece.length)
        wrong |= set() if torch.equal(average, wanted) else {f"average of {piece.name}"}
    for held in (head_buffers(engine), engine.buffer_averages.values):
        wrong |= {name for name, value in held.items() if not torch.equal(value, reader.buffer(name))}

    batch = global_batch(recipe, 0, 0, engine.samples, classes)
    model = load_supernet(reader, [spec_of(reader, name) for name in classes])
    wanted = model.train()(batch).detach()
    found = engine.sum_over_ranks(engine.step([part_of(batch, engine.positions())], 0.001))
    engine.deepspeed.destroy()
    everyone = ranks.from_all((sorted(wrong), compared, counter[0], 4 * sum(piece.length for piece in slices)))
    return {
        "wrong": sorted({name for names, *_ in everyone for name in names}),
        "compared": [count for _, count, *_ in everyone],
        "read": [count for *_, count, _ in everyone],
        "held": [count for *_, count in everyone],
        "routes": engine.model.routes,
        "loss": ((found - wanted).abs().max() / wanted.abs().max()).item(),
    }
