"""What it costs to use several tasks of a model at once, and to load one of many.

    python benchmarks/direct_use.py [--quick] [--directory DIR]

Mixed call: 64 images of 8 tasks in random order, against 64 of one task, on a ViT-S of 160 x 160 pixels (--quick: 96 x
96) in which every task has its own FFNs and its own embedding: one of patches, as in a plain ViT, or a convolutional
stem. Seconds are CPU seconds of one thread in fp32. The single call's turn, of one task after the other, comes before
and after each mixed one; a ratio is to the mean of the two, and the median over rounds is reported. (glibc's allocator
gives blocks above 32 MB, of which the single call has more, back to the system after each use, which costs that call a
tenth: here it is told to keep them.)

Loading: one task out of a checkpoint of 26, of the recipe ``ufo2_17b`` on a ViT-L (--quick: ViT-B), which is all holes
and takes no room (see ``benchmarks/extraction.py``), in a process of its own: the largest resident set above that
before, and the bytes that are read, against the bytes of the path's parameters, by formula. The last line is one JSON
object.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from extraction import TASK, read_so_far, resident, write_holes

from ufo_ds import UfoModel, recipe_file
from ufo_ds.model.cost import subnet_cost
from ufo_ds.model.spec import SubnetSpec
from ufo_ds.model.supernet import Supernet, init_weights

TASKS, IMAGES, CLASSES = [f"task{n}" for n in range(8)], 64, 100
STEM = [24, 48, 96, 192]
BARS = {"mixed_to_single": 1.1, "mixed_stem_to_single": 1.1, "peak_to_path": 1.3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller images and a smaller model, few rounds")
    parser.add_argument("--directory", type=Path, help="where the model may go (default: the system's for such files)")
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--calls", type=int, nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.load is not None:
        print(json.dumps(load(options.load)))
        return
    if options.calls is not None:
        print(json.dumps(calls(*options.calls)))
        return
    figures = loading("vit_base" if options.quick else "vit_large", options.directory)
    size = ["96", "3"] if options.quick else ["160", "7"]
    for name, stem in (("mixed", []), ("mixed_stem", STEM)):
        figures |= {f"{name}_{key}": value for key, value in child("--calls", *size, *map(str, stem)).items()}
    for name, value in figures.items():
        print(f"{name:<24} {value:.4g}")
    bars = {
        name: {"value": round(figures[name], 4), "bar": bar, "ok": figures[name] <= bar} for name, bar in BARS.items()
    }
    print(json.dumps({"benchmark": "direct_use", "figures": figures, "bars": bars}))


def child(*arguments: str) -> dict[str, float]:
    """What this script finds in a process of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if arguments[0] == "--calls":
        environment |= {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def build(stem: list[int], side: int) -> UfoModel:
    task = {"head": {"type": "linear"}, "loss": {"cross_entropy": {}}, "input": [side, side], "samples_per_step": 8}
    backbone = {"dim": 384, "depth": 12, "heads": 6, "patch_size": 16, "stem": stem}
    recipe = recipe_file.parse(
        {
            "name": "direct_use",
            "model": {"backbone": backbone, "experts": ["embed", "ffn"]},
            "tasks": [{**task, "name": name} for name in TASKS],
            "schedule": {"steps": 1},
        },
        "direct_use.py",
    )
    with torch.device("meta"):
        model = Supernet(recipe, dict.fromkeys(TASKS, CLASSES))
    init_weights(model)
    return UfoModel(model, {name: [str(label) for label in range(CLASSES)] for name in TASKS})


def calls(side: int, rounds: int, *stem: int) -> dict[str, float]:
    """CPU seconds of mixed calls, by those of a single task's with as many images."""
    model, draw = build([*stem], side), torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (IMAGES, 3, side, side), generator=draw, dtype=torch.uint8)
    tasks = [TASKS[i % len(TASKS)] for i in torch.randperm(IMAGES, generator=draw).tolist()]

    def seconds(task: str | list[str]) -> float:
        began = time.thread_time()
        model(images, task=task)
        return time.thread_time() - began

    seconds(TASKS[-1]), seconds(tasks)
    single, mixed = [seconds(TASKS[0])], []
    for number in range(rounds):
        mixed.append(seconds(tasks))
        single.append(seconds(TASKS[(number + 1) % len(TASKS)]))
    ratios = [2 * of_mixed / sum(pair) for of_mixed, pair in zip(mixed, pairwise(single), strict=True)]
    return {
        "to_single": statistics.median(ratios),
        "least": min(ratios),
        "most": max(ratios),
        "seconds": statistics.median(mixed),
    }


def loading(backbone: str, directory: Path | None) -> dict[str, float]:
    recipe = recipe_file.load("ufo2_17b", [("model.backbone", backbone)])
    with TemporaryDirectory(dir=directory) as folder:
        size = write_holes(recipe, Path(folder) / "checkpoint")
        found = child("--load", f"{folder}/checkpoint")
    return {
        "checkpoint_bytes": size,
        **found,
        "peak_to_path": found["peak_bytes"] / found["path_bytes"],
        "read_to_path": found["read_bytes"] / found["path_bytes"],
    }


def load(checkpoint: Path) -> dict[str, float]:
    """In a process of its own."""
    before, read, began = resident("VmRSS"), read_so_far(), time.perf_counter()
    model = UfoModel.from_pretrained(checkpoint, tasks=[TASK])
    found = {
        "read_bytes": read_so_far() - read,
        "peak_bytes": resident("VmHWM") - before,
        "load_seconds": round(time.perf_counter() - began, 2),
    }
    spec: SubnetSpec = model.supernet.spec(TASK)
    return {"path_bytes": 4 * subnet_cost(model.supernet.recipe, spec, len(model.classes[TASK])).parameters, **found}


if __name__ == "__main__":
    main()
