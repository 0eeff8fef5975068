"""What cutting one task out of a checkpoint reads and holds, against the size of the model that comes out.

python benchmarks/extraction.py            # 17 billion parameters; --quick: ViT-L, within a minute

The checkpoint is one of the recipe ``ufo2_17b`` (26 tasks, every unit an expert, SGD with momentum) by 16 ranks in two
expert-parallel groups: real index and headers, and checksums, of files that are holes, so that it takes no room. One
task is cut out in a process of its own: bytes that it reads, headers and index included, and the largest resident set
above that before. Beside it the same checkpoint of two tasks. The last line is one JSON object.
"""

import argparse
import json
import os
import subprocess
import sys
import time
import zlib
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from ufo_ds import checkpoint, recipe_file
from ufo_ds.checkpoint import Index, Parameter
from ufo_ds.model.parameters import address_of
from ufo_ds.model.supernet import Supernet
from ufo_ds.recipe import Recipe, only

TASK, OTHER = "imagenet", "cifar10"
RANKS, GROUPS = 16, 2
KINDS = ["weight", "momentum_buffer"]
BARS = {"read_to_subnet": 1.1, "peak_to_subnet": 1.3}
MOST_BY_TASKS = 0.05  # of the subnet, by which more tasks may raise the peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smaller model")
    parser.add_argument("--directory", type=Path, help="where the models may go (default: the system's for such files)")
    parser.add_argument("--child", type=Path, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        print(json.dumps(extract(*options.child)))
        return
    whole = recipe_file.load("ufo2_17b", [("model.backbone", "vit_large")] if options.quick else [])
    found = {}
    for name, recipe in (("all_tasks", whole), ("two_tasks", only(whole, [TASK, OTHER]))):
        with TemporaryDirectory(dir=options.directory) as directory:
            size = write_holes(recipe, Path(directory) / "checkpoint")
            command = [sys.executable, __file__, "--child", f"{directory}/checkpoint", f"{directory}/out"]
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
            found[name] = {"checkpoint_bytes": size, **json.loads(done.stdout.splitlines()[-1])}
        print(f"{name}: {found[name]}", flush=True)
    figures = {f"{name}_{key}": value for name, of_one in found.items() for key, value in of_one.items()}
    everything, two = found["all_tasks"], found["two_tasks"]
    values = {
        "read_to_subnet": everything["read_bytes"] / everything["subnet_bytes"],
        "peak_to_subnet": everything["peak_bytes"] / everything["subnet_bytes"],
    }
    bars = {key: {"value": round(values[key], 4), "bar": bar, "ok": values[key] <= bar} for key, bar in BARS.items()}
    more = (everything["peak_bytes"] - two["peak_bytes"]) / everything["subnet_bytes"]
    bars["peak_by_more_tasks"] = {"value": round(more, 4), "bar": MOST_BY_TASKS, "ok": more <= MOST_BY_TASKS}
    print(json.dumps({"benchmark": "extraction", "figures": figures, "bars": bars}))


def write_holes(recipe: Recipe, directory: Path) -> int:
    """A checkpoint whose tensors are all zero; the sum of the sizes of its files."""
    directory.mkdir()
    classes = {task.name: task.num_classes or 0 for task in recipe.tasks}
    with torch.device("meta"):
        model = Supernet(recipe, classes)
    index = Index(
        step=1,
        recipe=recipe_file.dump(recipe),
        classes={name: [str(label) for label in range(count)] for name, count in classes.items()},
        routes={name: {unit: list(layers) for unit, layers in model.routes[name].items()} for name in classes},
    )
    names = list(classes)
    shapes: list[dict[str, int]] = [{} for _ in range(RANKS)]
    for name, parameter in model.named_parameters():
        owner = address_of(name).owner
        half = RANKS // GROUPS
        first = 0 if owner is None else names.index(owner) % GROUPS * half
        holders = range(RANKS) if owner is None else range(first, first + half)
        length = -(-parameter.numel() // len(holders))
        pieces = []
        for part, rank in enumerate(holders):
            mine = max(0, min(length, parameter.numel() - part * length))
            if mine:
                pieces.append((rank, part * length, mine))
                shapes[rank] |= {f"{name}|{kind}": mine for kind in KINDS}
        index.parameters[name] = Parameter(list(parameter.shape), KINDS, pieces)
    buffers = [name for name, _ in model.named_buffers() if "running_" in name]
    shapes[0] |= dict.fromkeys(buffers, recipe.model.backbone.dim)
    index.buffers = dict.fromkeys(buffers, 0)
    for rank, of_rank in enumerate(shapes):
        path = directory / f"rank-{rank:05d}.safetensors"
        header: dict[str, Any] = {"__metadata__": {key: checksum_of_zeros(count) for key, count in of_rank.items()}}
        end = 0
        for key, count in of_rank.items():
            header[key] = {"dtype": "F32", "shape": [count], "data_offsets": [end, end + 4 * count]}
            end += 4 * count
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + end)
        index.files.append({"name": path.name, "bytes": path.stat().st_size, "sha256": ""})
    checkpoint.write_text(directory / checkpoint.INDEX, json.dumps(vars(index) | {
        "parameters": {name: vars(parameter) for name, parameter in index.parameters.items()}
    }))  # fmt: skip
    return sum(entry["bytes"] for entry in index.files)


@cache
def checksum_of_zeros(count: int) -> str:
    return f"{zlib.crc32(bytes(4 * count)):08x}"


def extract(source: Path, out: Path) -> dict[str, float]:
    """In a process of its own."""
    from ufo_ds.model.loading import spec_of
    from ufo_ds.subnets import extraction

    before, read, began = resident("VmRSS"), read_so_far(), time.perf_counter()
    reader = checkpoint.Reader(source)
    parameters = extraction.extract(reader, spec_of(reader, TASK), out)
    return {
        "parameters": parameters,
        "subnet_bytes": (out / "model.safetensors").stat().st_size,
        "read_bytes": read_so_far() - read,
        "peak_bytes": resident("VmHWM") - before,
        "seconds": round(time.perf_counter() - began, 2),
    }


def resident(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


def read_so_far() -> int:
    """Bytes that this process has read from files."""
    return int(Path("/proc/self/io").read_text().split("rchar:")[1].split()[0])


if __name__ == "__main__":
    main()
