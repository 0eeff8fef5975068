"""Where in a step a GPU's host would have to wait for it.

Seen are operations that give the host a value or a size that the device has to compute, and tensors made of Python's
values, whose copy to a device waits. Of every case the result holds, by rank, for one step ``[who, where, what, how
often]``: who is "ufo_ds" or "deepspeed", whoever called torch, and "autograd" in the backward pass of torch's own.
"""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.distributed.equality import CLASSES, MANY_CLASSES, global_batch, make_recipe, part_of, start_value
from ufo_ds.parallel import config as configs
from ufo_ds.parallel.engine import Engine

WAITING = {
    "_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim",
    "unique_consecutive", "bincount", "lift_fresh",
}  # fmt: skip
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}


READING = {torch.Tensor.tolist: "tolist", torch.Tensor.cpu: "cpu", torch.Tensor.numpy: "numpy"}
Found = Counter[tuple[str, str, str]]


@contextmanager
def noted_waits() -> Iterator[Found]:
    """Notes what waits meanwhile, in the backward pass too: on a CPU that runs in the caller's thread."""
    found: Found = Counter()
    with _Calls(found), _Operations(found):
        yield found


class _Calls(TorchFunctionMode):
    """Of methods that read memory without an operation of torch, where it is the host's."""

    def __init__(self, found: Found):
        super().__init__()
        self.found = found

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in READING:
            self.found[(*_caller(), READING[func])] += 1
        return func(*args, **(kwargs or {}))


class _Operations(TorchDispatchMode):
    def __init__(self, found: Found):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name in INDEXING and any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1])
        by_counts = name == "repeat_interleave" and (kwargs or {}).get("output_size") is None
        if name in WAITING or by_mask or by_counts:
            self.found[(*_caller(), name)] += 1
        return func(*args, **(kwargs or {}))


def _caller() -> tuple[str, str]:
    frame = sys._getframe(2)
    while frame is not None:
        path, function = frame.f_code.co_filename, frame.f_code.co_name
        for package in ("ufo_ds", "deepspeed"):
            if f"/{package}/" in path:
                return package, f"{path.rpartition(f'/{package}/')[2]}:{function}"
        if function == "_engine_run_backward":
            return "autograd", function
        frame = frame.f_back
    return "autograd", "?"


def run(case: dict) -> dict:
    recipe = make_recipe(case)
    classes = {t.name: (MANY_CLASSES if case["sharded"] else CLASSES)[t.name] for t in recipe.tasks}
    values = {
        "gradient_accumulation_steps": case["accumulation"],
        "zero_optimization": {"stage": case["stage"]},
        "expert_parallel": {"autoep_size": case["ep"], "exchange": case["exchange"]},
        "bf16": {"enabled": case["bf16"]},
    }
    config = configs.resolve(values, "waits.py", recipe, dist.get_world_size())
    engine = Engine(recipe, config, classes, pretrained=start_value)
    for step in range(3):  # in the first ones DeepSpeed records the order of modules
        batches = [
            part_of(global_batch(recipe, step, i, engine.samples, classes), engine.reads(engine.samples))
            for i in range(case["accumulation"])
        ]
        with noted_waits() as found:
            engine.step(batches, recipe.optimizer.lr)
    engine.deepspeed.destroy()
    result: list = [None] * dist.get_world_size()
    dist.all_gather_object(result, [[*key, count] for key, count in sorted(found.items())])
    return {"case": case, "ranks": result}
