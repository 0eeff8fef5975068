"""Cost of a training step (forward and backward) of subnets against one of the whole model.

    python benchmarks/elastic_step.py [--quick]

A ViT of ViT-S's width, 224 x 224 pixels, 197 tokens, four tasks of eight images that share everything. Each subnet has
half of the FLOPs, which are counted, not derived: by fewer blocks, by narrower tokens, by fewer heads and narrower
FFNs, by a little of all; and four different subnets, one a task, in one batch. A sandwich's step, of the whole, one
half and a subnet of each task, is compared with the sum of what they cost one by one. (glibc's allocator gives blocks
above 32 MB, which the sandwich has, back to the system after each use. With MALLOC_MMAP_MAX_=0 and
MALLOC_TRIM_THRESHOLD_=2147483647 it keeps them: with two layers "sandwich" was then 1.07 instead of 1.41.)

Seconds are CPU seconds of one thread in fp32. The whole model's turn comes before and after each variant's; a ratio is
to the mean of the two, and the median over rounds is reported.
"""

import argparse
import json
import statistics
import time
from dataclasses import replace

import torch
from torch.utils.flop_counter import FlopCounterMode

from ufo_ds import recipe_file
from ufo_ds.data.mixing import Batch, TaskBatch
from ufo_ds.model.architecture import Architecture
from ufo_ds.model.supernet import Supernet, init_weights

TASKS, IMAGES, DIM, HEADS = ("a", "b", "c", "d"), 8, 384, 6
BAR = 0.6
Subnets = list[dict[str, Architecture]]  # of a step, by task; none of a task: the whole


def build(depth: int) -> Supernet:
    """On the sizes that the recipe lists nothing depends here: the steps are given theirs."""
    task = {"head": {"type": "linear"}, "loss": {"cross_entropy": {}}, "input": [224, 224], "samples_per_step": IMAGES}
    recipe = recipe_file.parse(
        {
            "name": "elastic_step",
            "model": {
                "backbone": {"dim": DIM, "depth": depth, "heads": HEADS, "patch_size": 16},
                "elastic": {"depth": [depth // 2, depth]},
            },
            "tasks": [{**task, "name": name} for name in TASKS],
            "schedule": {"steps": 1},
        },
        "elastic_step.py",
    )
    with torch.device("meta"):
        model = Supernet(recipe, dict.fromkeys(TASKS, 100))
    init_weights(model)
    return model.train()


def step(model: Supernet, subnets: Subnets) -> float:
    """CPU seconds of one."""
    images = torch.zeros(IMAGES, 3, 224, 224, dtype=torch.uint8)
    labels = torch.zeros(IMAGES, dtype=torch.int64)
    batch = Batch(0, 0, {name: TaskBatch(images, labels, range(IMAGES), IMAGES) for name in TASKS}, {})
    model.subnets = lambda step: subnets  # type: ignore[method-assign]
    model.zero_grad()
    began = time.process_time()
    model(batch).sum().backward()
    return time.process_time() - began


def flops(model: Supernet, subnets: Subnets) -> int:
    with FlopCounterMode(display=False) as counter:
        step(model, subnets)
    return counter.get_total_flops()


def halves(depth: int) -> dict[str, Subnets]:
    whole = Architecture(DIM, (), (HEADS,) * depth, (4 * DIM,) * depth)

    def same(**sizes: tuple[int, ...] | int) -> Subnets:
        return [dict.fromkeys(TASKS, replace(whole, **sizes))]  # type: ignore[arg-type]

    kept = {
        "blocks": same(heads=(HEADS,) * (depth // 2), hidden=(4 * DIM,) * (depth // 2)),
        "tokens": same(dim=256, heads=(4,) * depth, hidden=(1120,) * depth),
        "heads_and_ffn": same(heads=(3,) * depth, hidden=(2 * DIM,) * depth),
        "a_little_of_all": same(dim=320, heads=(4,) * depth, hidden=(3 * 320, 2 * 320) * (depth // 2)),
    }
    kept["one_a_task"] = [dict(zip(TASKS, (subnets[0]["a"] for subnets in kept.values()), strict=True))]
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two layers and few rounds")
    options = parser.parse_args()
    torch.set_num_threads(1)
    depth, rounds = (2, 3) if options.quick else (4, 5)
    model = build(depth)
    variants, whole = halves(depth), [{}]
    figures = {f"flops_{name}": flops(model, subnets) / flops(model, whole) for name, subnets in variants.items()}
    random = variants["one_a_task"][0]
    small = variants["heads_and_ffn"][0]
    ratios: dict[str, list[float]] = {name: [] for name in [*variants, "sandwich"]}
    for _ in range(rounds):
        for name, subnets in variants.items():
            before = step(model, whole)
            seconds = step(model, subnets)
            ratios[name].append(2 * seconds / (before + step(model, whole)))
        apart = sum(step(model, [subnets]) for subnets in ({}, small, random))
        together = step(model, [{}, small, random])
        ratios["sandwich"].append(2 * together / (apart + sum(step(model, [s]) for s in ({}, small, random))))
    figures |= {name: statistics.median(of_name) for name, of_name in ratios.items()}
    for name, value in figures.items():
        print(f"{name:<24} {value:.3f}")
    bars = {name: {"value": figures[name], "bar": BAR, "ok": figures[name] <= BAR} for name in variants}
    print(json.dumps({"benchmark": "elastic_step", "figures": figures, "bars": bars}))


if __name__ == "__main__":
    main()
