"""Builds ranks of a job one after the other in a single process, as if the others were there.

    python tests/distributed/simulated.py JOBS.json RESULTS

torch's fake process group knows how many ranks there are and sends nothing; all else is what a real rank runs. Each
rank is built in a fork of its own and leaves RESULTS/<job>-<rank>.json: what it holds of each parameter, numbers of
modules and groups, seconds and memory. A job has ``recipe``, ``deepspeed`` (the JSON's values), ``world_size``,
``ranks`` (None: all), and

- ``initialize``: whether DeepSpeed makes its engine too, or the rank ends with what :mod:`ufo_ds.parallel.construction`
  has built;
- ``save``: whether the values go to RESULTS/<job>-<rank>.safetensors.
"""

import json
import os
import resource
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from safetensors.torch import save_file
from torch.testing._internal.distributed.fake_pg import FakeStore

from ufo_ds import recipe_file
from ufo_ds.model import classifiers
from ufo_ds.parallel import config as configs
from ufo_ds.parallel import launch
from ufo_ds.parallel.engine import Engine


class DeepSpeedTurn(Exception):
    pass


class ConstructedEngine(Engine):
    """An engine up to where DeepSpeed would get the model."""

    def _initialize(self):
        raise DeepSpeedTurn


def join(rank: int, world_size: int) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(world_size)}
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    launch.init_distributed()
    deepspeed.init_distributed(verbose=False)


def sub_groups(engine: Engine, initialized: bool) -> int:
    """By DeepSpeed's own splitting."""
    if initialized:
        return len(engine.deepspeed.optimizer.fp16_groups)
    splitter = SimpleNamespace(sub_group_size=engine.config.deepspeed["zero_optimization"]["sub_group_size"])
    split = DeepSpeedZeroOptimizer_Stage3._create_fp16_sub_groups
    return sum(len(split(splitter, group["params"])) for group in engine.optimizer.param_groups)


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def build(job: dict, rank: int, results: Path) -> None:
    join(rank, job["world_size"])
    recipe = recipe_file.load(job["recipe"])
    config = configs.resolve(job["deepspeed"], "simulated.py", recipe, job["world_size"])
    classes = {task.name: task.num_classes for task in recipe.tasks}
    kind = Engine if job["initialize"] else ConstructedEngine
    engine = kind.__new__(kind)
    start, start_cpu, start_resident = time.perf_counter(), time.process_time(), resident()
    with suppress(DeepSpeedTurn):
        engine.__init__(recipe, config, classes)
    seconds, cpu = time.perf_counter() - start, time.process_time() - start_cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    groups: list[list[int]] = []
    pieces, values = {}, {}
    parts = classifiers.parts(engine.model)
    for name, parameter in engine.model.named_parameters():
        members, mine = dist.get_process_group_ranks(parameter.ds_process_group), parameter.ds_tensor
        held = parts.get(name, classifiers.Part(parameter.ds_shape, range(parameter.ds_shape[0])))
        width = held.shape[1:].numel()
        first = members.index(rank) * mine.numel()
        length = max(0, min(mine.numel(), len(held.rows) * width - first))  # padding lies behind
        if len(held.rows) < held.shape[0]:  # of a classifier that the holders of the task share
            members = list(engine.placement.holders(engine.placement.ep_rank(rank)))
        if members not in groups:
            groups.append(members)
        pieces[name] = (held.shape.numel(), held.rows.start * width + first, length, groups.index(members))
        if job["save"]:
            values[name] = mine[:length].clone()
    if job["save"]:
        save_file(values, results.with_suffix(".safetensors"))
    partitions = [parameter.ds_tensor for parameter in engine.model.parameters()]
    found = {
        "tasks": engine.placement.tasks_of[engine.placement.ep_rank(rank)],
        "alike": {
            "modules": len(list(engine.model.modules())),
            "parameters": len(pieces),
            "parameter groups": len(engine.optimizer.param_groups),
            "sub-groups": sub_groups(engine, job["initialize"]),
            "slots": engine.placement.slots,
        },
        "dtypes": sorted({str(part.dtype) for part in partitions}),
        "groups": groups,
        "pieces": pieces,
        "seconds": seconds,
        "cpu_seconds": cpu,
        "memory": peak - start_resident,
        "part": sum(part.nbytes for part in partitions),
        "largest": max(p.ds_numel for p in engine.model.parameters()) * partitions[0].element_size(),
    }
    results.with_suffix(".json").write_text(json.dumps(found))


def main() -> None:
    jobs, results = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    torch.set_num_threads(1)
    for number, job in enumerate(jobs):
        for rank in range(job["world_size"]) if job["ranks"] is None else job["ranks"]:
            child = os.fork()
            if child == 0:
                try:
                    build(job, rank, results / f"{number}-{rank}")
                    os._exit(0)
                finally:
                    traceback.print_exc()
                    os._exit(1)
            if os.waitpid(child, 0)[1]:
                sys.exit(f"rank {rank} of {job['world_size']} failed")


if __name__ == "__main__":
    main()
