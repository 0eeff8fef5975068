"""What engines hold and send beside what a plan says of them.

Of every case the result holds, by rank, pairs (planned, found) of bytes: of memory as tensors of the engine and of
DeepSpeed, of traffic as seen by torch's collectives in one step, by the formulas of ``ufo_ds.parallel.traffic``.
"""

import inspect
from collections import Counter
from contextlib import contextmanager

import torch
import torch.distributed as dist

from tests.distributed.equality import (
    CLASSES,
    MANY_CLASSES,
    global_batch,
    make_recipe,
    part_of,
    start_value,
)
from ufo_ds.checkpoint import AVERAGE
from ufo_ds.parallel import config as configs
from ufo_ds.parallel.engine import Engine
from ufo_ds.parallel.rank_model import RankModels
from ufo_ds.parallel.traffic import KINDS, rank_traffic
from ufo_ds.parallel.zero_memory import memory, sized

HELD = ("parameters", "master", "gradients", "reduction_buffer", "optimizer_state", "averages", "buffers")
SENT: Counter = Counter()
ORDER: list[tuple[str, int, int]] = []  # gathers and scatters: ranks that take part, elements


def count_collectives() -> None:
    """Wrap torch's functions; DeepSpeed takes hold of them when the job begins."""

    def wrap(name: str, kind: str, sent) -> None:
        function = getattr(dist, name)
        parameters = inspect.signature(function)

        def counted(*args, **kwargs):
            SENT[kind] += sent(parameters.bind(*args, **kwargs).arguments)
            return function(*args, **kwargs)

        setattr(dist, name, counted)

    def ring(whole: str, times: int = 1):
        def sent(arguments: dict) -> float:
            tensor, size = arguments[whole], dist.get_world_size(arguments.get("group"))
            if whole != "tensor":
                ORDER.append((whole, size, tensor.numel()))
            # Plans do not count single numbers (norms, flags, counts) and the three that the guard looks at.
            counted = tensor.numel() > 1 and not (tensor.numel() == 3 and tensor.is_floating_point())
            return tensor.nbytes * (size - 1) / size * times if counted else 0.0

        return sent

    def direct(arguments: dict) -> float:
        rows = arguments["input_split_sizes"]
        mine = rows[dist.get_rank(arguments["group"])]
        return arguments["input"].nbytes * (sum(rows) - mine) / sum(rows) if sum(rows) else 0.0

    wrap("all_reduce", "all-reduce", ring("tensor", 2))
    wrap("all_gather_into_tensor", "all-gather", ring("output_tensor"))
    wrap("reduce_scatter_tensor", "reduce-scatter", ring("input"))
    wrap("all_to_all_single", "all-to-all", direct)
    for name in ("all_gather", "reduce_scatter", "broadcast", "reduce", "all_to_all"):
        wrap(name, name, lambda arguments: 1)  # not expected in a step


def nbytes(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@contextmanager
def noted_buckets(optimizer, found: dict):
    """Of ZeRO-1 and 2 the buckets are there during the backward pass only."""
    original = optimizer.setup_buckets

    def setup_buckets():
        original()
        found["reduction_buffer"] = nbytes(b for bucket in optimizer.ipg_buckets.values() for b in bucket.buffer)

    optimizer.setup_buckets = setup_buckets
    yield
    del optimizer.setup_buckets


def held(engine: Engine, batches, rate: float) -> dict[str, int]:
    """After a step, and gradients at its end."""
    zero, found = engine.deepspeed.optimizer, {}
    if engine.config.stage == 3:
        for batch in batches:
            engine.backward(batch)
            engine.update(rate)
        found["parameters"] = nbytes(zero.fp16_partitioned_groups_flat)
        found["master"] = nbytes(zero.fp32_partitioned_groups_flat)
        found["gradients"] = nbytes([zero.grad_partitions_flat_buffer])
        found["reduction_buffer"] = nbytes(bucket.buffer for bucket in zero.ipg_buckets.values())
    else:
        with noted_buckets(zero, found):
            for batch in batches:
                engine.backward(batch)
                if engine.deepspeed.is_gradient_accumulation_boundary():
                    found["gradients"] = nbytes(g for group in zero.averaged_gradients.values() for g in group)
                engine.update(rate)
        found["parameters"] = nbytes(zero.bit16_groups_flat)
        found["master"] = nbytes(zero.single_partition_of_fp32_groups)
    states = [(key, t) for state in engine.optimizer.state.values() for key, t in state.items() if torch.is_tensor(t)]
    found["optimizer_state"] = nbytes(t for key, t in states if key != AVERAGE)
    found["averages"] = nbytes(t for key, t in states if key == AVERAGE)
    found["buffers"] = nbytes(engine.model.buffers())
    return found


def run(case: dict) -> dict:
    recipe = make_recipe(case)
    classes = {t.name: (MANY_CLASSES if case["sharded"] else CLASSES)[t.name] for t in recipe.tasks}
    zero = {"stage": case["stage"], **case["zero"]}
    values = {
        "gradient_accumulation_steps": case["accumulation"],
        "zero_optimization": zero,
        "expert_parallel": {"autoep_size": case["ep"], "exchange": case["exchange"]},
        "bf16": {"enabled": case["bf16"]},
        "torch_autocast": {"enabled": case["autocast"], "dtype": "bfloat16"},
    }
    config = configs.resolve(values, "planned.py", recipe, dist.get_world_size())
    engine = Engine(recipe, config, classes, pretrained=start_value)
    rank, placement = engine.rank, engine.placement

    def batches(step: int):
        for micro_step in range(case["accumulation"]):
            whole = global_batch(recipe, step, micro_step, engine.samples, classes)
            yield part_of(whole, engine.reads(engine.samples))

    found = held(engine, batches(0), recipe.optimizer.lr)
    for step in (1, 2):
        engine.step(batches(step), recipe.optimizer.lr)
    SENT.clear()
    ORDER.clear()
    engine.step(batches(3), recipe.optimizer.lr)
    sent = dict(SENT)

    models = RankModels(recipe, classes)
    assert models.placement(dist.get_world_size(), config.ep_size, config.accumulation) == placement
    everyone = models.of(placement)
    model = everyone[placement.ep_rank(rank)]
    config = sized(config, everyone, None)
    assert config == engine.config
    planned = memory(model, config, recipe.optimizer, 0)
    traffic = rank_traffic(recipe, config, placement, model, rank, 1)
    engine.deepspeed.destroy()
    mine = {
        "memory": {key: (getattr(planned, key), found[key]) for key in HELD},
        "traffic": {kind: (traffic.of(kind), sent.pop(kind, 0.0)) for kind in KINDS},
        "other": sent,
        "order": list(ORDER) if engine.sizes_agree and config.stage == 3 else [],
    }
    result: list = [None] * dist.get_world_size()
    dist.all_gather_object(result, mine)
    return {"case": case, "ranks": result}
