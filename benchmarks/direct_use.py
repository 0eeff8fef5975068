"""What it costs to use several tasks of a model at once, and to load one of many.

    python benchmarks/direct_use.py [--quick] [--directory DIR]

Mixed call: 64 images of 8 tasks in random order, against 64 of one task, on a ViT-S of 224 x 224 pixels (--quick: 96 x
96) in which every task has its own FFNs and its own embedding: one of patches, as in a plain ViT, or a convolutional
stem. Beside it a call for each of the tasks. Seconds are CPU seconds of one thread in fp32. The single call's turn, of
another task every round, comes before and after each of the others; a ratio is to the mean of the two, and the median
over rounds is reported.

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
BARS = {"mixed": 1.1, "mixed_stem": 1.1, "peak_to_path": 1.3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller images and a smaller model, few rounds")
    parser.add_argument("--directory", type=Path, help="where the model may go (default: the system's for such files)")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.child is not None:
        print(json.dumps(load(options.child)))
        return
    figures = loading("vit_base" if options.quick else "vit_large", options.directory)
    for suffix, stem in (("", []), ("_stem", STEM)):
        mixed, apart = calls(stem, 96 if options.quick else 224, 3 if options.quick else 5)
        figures |= {f"mixed{suffix}": mixed, f"one_by_one{suffix}": apart}
    for name, value in figures.items():
        print(f"{name:<20} {value:.4g}")
    bars = {
        name: {"value": round(figures[name], 4), "bar": bar, "ok": figures[name] <= bar} for name, bar in BARS.items()
    }
    print(json.dumps({"benchmark": "direct_use", "figures": figures, "bars": bars}))


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


def calls(stem: list[int], side: int, rounds: int) -> tuple[float, float]:
    """CPU seconds of a mixed call, and of a call for each task, by those of a single task's with as many images."""
    model, draw = build(stem, side), torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (IMAGES, 3, side, side), generator=draw, dtype=torch.uint8)
    tasks = [TASKS[i % len(TASKS)] for i in torch.randperm(IMAGES, generator=draw).tolist()]
    by_task = {name: images[[i for i, task in enumerate(tasks) if task == name]] for name in TASKS}

    def single(number: int) -> float:
        began = time.thread_time()
        model(images, task=TASKS[number % len(TASKS)])
        return time.thread_time() - began

    def mixed() -> float:
        began = time.thread_time()
        model(images, task=tasks)
        return time.thread_time() - began

    def one_by_one() -> float:
        began = time.thread_time()
        for name, of_task in by_task.items():
            model(of_task, task=name)
        return time.thread_time() - began

    single(0), mixed()
    found: dict[str, list[float]] = {"mixed": [], "one_by_one": []}
    for number in range(rounds):
        before = single(number)
        for name, call in (("mixed", mixed), ("one_by_one", one_by_one)):
            seconds, after = call(), single(number)
            found[name].append(2 * seconds / (before + after))
            before = after
        print(f"stem {stem}: " + ", ".join(f"{name} {values[-1]:.3f}" for name, values in found.items()), flush=True)
    return statistics.median(found["mixed"]), statistics.median(found["one_by_one"])


def loading(backbone: str, directory: Path | None) -> dict[str, float]:
    recipe = recipe_file.load("ufo2_17b", [("model.backbone", backbone)])
    with TemporaryDirectory(dir=directory) as folder:
        size = write_holes(recipe, Path(folder) / "checkpoint")
        command = [sys.executable, __file__, "--child", f"{folder}/checkpoint"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    found = json.loads(done.stdout.splitlines()[-1])
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
