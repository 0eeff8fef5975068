"""How long training stands still for a checkpoint, against a save that it waits for.

    python benchmarks/checkpoint.py [--quick] [--directory DIR]

A ViT-S with one task is trained by the engine, in one process: weights and Adam's moments, about 260 MB, are saved. In
every round it is saved once with training waiting until the checkpoint is whole (written, fsync, checksums, published),
and once with training going on: then training stands still while the state is copied to the host's buffer. Steps
beside a write compete with it for the disk and the cores; what they take longer, over all of a write, is given as
``slower_seconds``, and is not part of the ratio: it depends on whether a core is idle.

On a GPU the copy is timed until the device has done it.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from ufo_ds import recipe_file
from ufo_ds.checkpoint import Index, prune
from ufo_ds.data.mixing import Batch, TaskBatch
from ufo_ds.parallel import config as configs
from ufo_ds.parallel.checkpoint import Saver
from ufo_ds.parallel.engine import Engine
from ufo_ds.parallel.launch import adopt_environment, finish_distributed, init_distributed

BAR = 0.10
IMAGES, SIZE = 8, 64
RECIPE = {
    "name": "checkpoint",
    "model": {"backbone": {"name": "vit_small"}},
    "tasks": [
        {
            "name": "task",
            "head": {"type": "linear"},
            "loss": {"cross_entropy": {}},
            "input": [SIZE, SIZE],
            "samples_per_step": IMAGES,
        }
    ],
    "schedule": {"steps": 10**6},
}


def step(engine: Engine, number: int) -> float:
    """Seconds of a training step."""
    began = time.perf_counter()
    images = torch.randint(0, 256, (IMAGES, 3, SIZE, SIZE), dtype=torch.uint8)
    batch = TaskBatch(images, torch.randint(0, 10, (IMAGES,)), range(IMAGES), IMAGES)
    engine.step([Batch(number, 0, {"task": batch}, {})], 1e-4)
    settle()
    return time.perf_counter() - began


def settle() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure(directory: Path, rounds: int) -> dict[str, float]:
    recipe = recipe_file.parse(RECIPE, "checkpoint.py")
    engine = Engine(recipe, configs.resolve({}, "checkpoint.py", recipe, adopt_environment()), {"task": 10})
    saver = Saver(engine, directory)
    found: dict[str, list[float]] = {key: [] for key in ("standing_still", "synchronous", "step", "slower")}
    number = 0

    def save() -> float:
        settle()
        began = time.perf_counter()
        saver.save(Index(number, {}, {}, {}))
        settle()
        return time.perf_counter() - began

    def beside_training() -> tuple[float, float]:
        nonlocal number
        stood, alone, beside = save(), statistics.median(found["step"]), 0.0
        while saver.writing:
            beside += step(engine, number) - alone
            number += 1
        saver.wait()
        return stood, beside

    for i in range(rounds + 1):  # the first one allocates
        for _ in range(3):
            found["step"].append(step(engine, number))
            number += 1
        waited = save()
        began = time.perf_counter()
        saver.wait()
        waited += time.perf_counter() - began
        stood, slower = beside_training()
        prune(directory, 1)
        if i:
            found["synchronous"].append(waited)
            found["standing_still"].append(stood)
            found["slower"].append(slower)
    ratio = statistics.median(a / b for a, b in zip(found["standing_still"], found["synchronous"], strict=True))
    (newest,) = sorted(directory.glob("step-*"))[-1:]
    figures = {f"{key}_seconds": round(statistics.median(values), 4) for key, values in found.items()}
    size = sum(path.stat().st_size for path in newest.iterdir())
    return {"megabytes": round(size / 1e6, 1), "rounds": rounds, **figures, "ratio": round(ratio, 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three rounds instead of ten")
    parser.add_argument("--directory", type=Path, default=Path(), help="on the disk that is measured (default: here)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    init_distributed()
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        figures = measure(Path(directory), 3 if options.quick else 10)
    finish_distributed()
    for key, value in figures.items():
        print(f"{key:<24} {value:g}")
    bars = {"standing_still_to_synchronous": {"value": figures["ratio"], "bar": BAR, "ok": figures["ratio"] <= BAR}}
    print(json.dumps({"benchmark": "checkpoint", "figures": figures, "bars": bars}), flush=True)


if __name__ == "__main__":
    main()
