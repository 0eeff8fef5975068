"""Builds engines whose ranks hold heads of different sizes and takes a step.

A case has the classes of the four tasks, ``ep``, and ``zero``, the section of the DeepSpeed JSON. Its result: what was
refused, or else the number of tasks, of sub-groups and of slots, each of all ranks, and the gradient norm.
"""

import torch.distributed as dist

from tests.distributed.equality import global_batch, make_recipe, part_of, start_value
from tests.distributed.test_equality import case
from ufo_ds.errors import UserError
from ufo_ds.parallel import config as configs
from ufo_ds.parallel import ranks
from ufo_ds.parallel.engine import Engine


def build(options: dict) -> dict:
    recipe = make_recipe(case(options["ep"], 3, routes="frozen", accumulation=1))
    values = {
        "zero_optimization": options["zero"],
        "expert_parallel": {"autoep_size": options["ep"]},
        "bf16": {"enabled": False},
    }
    config = configs.resolve(values, "construction.py", recipe, dist.get_world_size())
    try:
        engine = Engine(recipe, config, options["classes"], pretrained=start_value)
    except UserError as error:
        return {"refused": ranks.from_all(str(error))}
    batch = global_batch(recipe, 0, 0, engine.samples, options["classes"])
    engine.step([part_of(batch, engine.reads(engine.samples))], 0.01)
    found = {
        "tasks": ranks.from_all(len(engine.placement.tasks_of[engine.placement.ep_rank(engine.rank)])),
        "slots": ranks.from_all(engine.placement.slots),
        "sub_groups": ranks.from_all(len(getattr(engine.deepspeed.optimizer, "fp16_groups", []))),
        "norms": ranks.from_all(engine.gradient_norm),
    }
    engine.deepspeed.destroy()
    return found
