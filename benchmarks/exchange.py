"""A training step with the three ways that samples come to the ranks of their experts: aligned, input, layer.

    python benchmarks/exchange.py [--quick]

Four tasks of 16, 8, 4 and 4 images of 112 x 112 pixels, spread over two expert-parallel ranks; each has its own
attention and FFN in every layer of a narrow ViT. The engine of a training, ZeRO-3 over gloo, one thread a rank, on 2
and on 4 ranks. The three engines of a launch take turns; each round starts with another one. A ratio is to the aligned
step of the same round, and medians are reported, of CPU seconds of all ranks and of wall seconds. Images are in memory:
a loader has no part in it.

Bytes are those that all ranks hand to ``all_to_all_single`` for others in one step. The heads of these tasks are
linear. With margin heads and a triplet loss in place of them, ranks that share a task also exchange its features and
labels.

On one machine bytes go through memory; between machines their share of the step grows.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from ufo_ds import recipe_file
from ufo_ds.data.mixing import Batch, TaskBatch
from ufo_ds.recipe import Recipe

IMAGE, CLASSES, SAMPLES = 112, 8, {"a": 16, "b": 8, "c": 4, "d": 4}
EXCHANGES = ("aligned", "input", "layer")
RANKS = (2, 4)
SLOWER = 1.05  # up to the noise of a few rounds


def make_recipe(depth: int, triplet: bool) -> Recipe:
    head: dict = {"head": {"type": "linear"}, "loss": {"cross_entropy": {}}}
    if triplet:
        head = {"head": {"type": "margin"}, "loss": {"cosface": {}, "triplet": {}}, "identities_per_step": 2}
    return recipe_file.parse(
        {
            "name": "exchange",
            "model": {
                "backbone": {"dim": 128, "depth": depth, "heads": 4, "patch_size": 16},
                "experts": ["attn", "ffn"],
            },
            "tasks": [
                {"name": name, "input": [IMAGE, IMAGE], "samples_per_step": count, **head}
                for name, count in SAMPLES.items()
            ],
            "schedule": {"steps": 1},
        },
        "exchange.py",
    )


# --- one rank ---------------------------------------------------------------------------------------------------------


def count_all_to_all() -> list[int]:
    """Bytes for other ranks are added up in the list's only element; DeepSpeed takes hold of the function later."""
    sent, original = [0], dist.all_to_all_single

    def counted(output, input, output_split_sizes, input_split_sizes, group):
        others = sum(input_split_sizes) - input_split_sizes[dist.get_rank(group)]
        sent[0] += others * input[:1].nbytes
        return original(output, input, output_split_sizes, input_split_sizes, group=group)

    dist.all_to_all_single = counted
    return sent


def run_rank(result: Path, depth: int, rounds: int) -> None:
    sent = count_all_to_all()
    from ufo_ds.parallel import config as configs
    from ufo_ds.parallel import ranks
    from ufo_ds.parallel.engine import Engine
    from ufo_ds.parallel.launch import finish_distributed, init_distributed

    rank, world_size = init_distributed()
    generator = torch.Generator().manual_seed(0)
    images = {
        name: torch.randint(0, 256, (count, 3, IMAGE, IMAGE), dtype=torch.uint8, generator=generator)
        for name, count in SAMPLES.items()
    }

    def trainer(exchange: str, triplet: bool = False) -> Callable[[int], tuple[float, float, int, float]]:
        recipe = make_recipe(depth, triplet)
        values = {
            "expert_parallel": {"autoep_size": 2, "exchange": exchange},
            "zero_optimization": {"stage": 3},
            "bf16": {"enabled": False},
        }
        config = configs.resolve(values, "exchange.py", recipe, world_size)
        engine = Engine(recipe, config, dict.fromkeys(SAMPLES, CLASSES))

        def step(i: int) -> tuple[float, float, int, float]:
            """CPU seconds of all ranks, wall seconds, bytes, loss."""
            tasks = {
                name: TaskBatch(
                    images[name][span.start : span.stop],
                    torch.arange(span.start, span.stop) // 2 % CLASSES,
                    span,
                    SAMPLES[name],
                )
                for name, span in engine.positions().items()
            }
            sent[0] = 0
            ranks.wait_for_all()
            wall, cpu = time.perf_counter(), time.process_time()
            parts_TK = engine.step([Batch(i, 0, tasks, {})], 1e-3)
            cpu = time.process_time() - cpu
            nbytes = sent[0]
            ranks.wait_for_all()
            wall = time.perf_counter() - wall
            everyone = ranks.from_all((cpu, wall, nbytes))
            loss = sum(sum(of_task.values()) for of_task in engine.mean_losses(parts_TK).values())
            cpus, walls, counts = zip(*everyone, strict=True)
            return sum(cpus), max(walls), sum(counts), loss

        for i in range(3):  # in which DeepSpeed records the order of modules
            step(i)
        return step

    steps = {exchange: trainer(exchange) for exchange in EXCHANGES}
    found: dict[str, list] = {exchange: [] for exchange in EXCHANGES}
    for i in range(rounds):
        for exchange in EXCHANGES[i % 3 :] + EXCHANGES[: i % 3]:
            found[exchange].append(steps[exchange](3 + i))
    with_triplet = trainer("aligned", triplet=True)(3)[2]
    if rank == 0:
        result.write_text(json.dumps({"found": found, "with_triplet": with_triplet}))
    finish_distributed()


def launch(world_size: int, quick: bool) -> dict:
    with tempfile.TemporaryDirectory() as directory:
        result = Path(directory) / "found.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world_size)]
        command += [__file__, "--rank_of", str(result), *(["--quick"] if quick else [])]
        repository = str(Path(__file__).resolve().parent.parent)
        environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [repository, os.environ.get("PYTHONPATH")]))
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
        return json.loads(result.read_text())


# --- report -----------------------------------------------------------------------------------------------------------


def report(by_ranks: dict[int, dict]) -> dict:
    """Print the table; the object of the last line."""
    figures: dict[str, float] = {}
    bars: dict[str, dict] = {}
    print(f"{'step, relative to aligned':28}{'CPU':>7}{'wall':>7}{'wall s':>8}{'rounds':>8}  bytes of all-to-all")
    for world_size, measured in by_ranks.items():
        found = measured["found"]
        losses = [[loss for *_, loss in found[exchange]] for exchange in EXCHANGES]
        for other in losses[1:]:  # the same training, whatever the exchange
            assert all(abs(a - b) <= 1e-4 * abs(a) for a, b in zip(losses[0], other, strict=True)), losses
        for exchange in EXCHANGES:
            pairs = list(zip(found[exchange], found["aligned"], strict=True))
            cpu, wall = (statistics.median(a[k] / b[k] for a, b in pairs) for k in (0, 1))
            seconds = statistics.median(a[1] for a, _ in pairs)
            nbytes = found[exchange][-1][2]
            print(
                f"{f'{world_size} ranks, {exchange}':28}{cpu:7.3f}{wall:7.3f}{seconds:8.3f}{len(pairs):8}  {nbytes:,}"
            )
            key = f"{exchange}_{world_size}_ranks"
            figures |= {f"{key}_cpu": round(cpu, 4), f"{key}_wall": round(wall, 4), f"{key}_bytes": nbytes}
            if exchange == "aligned":
                bars[f"{key}_bytes"] = {"value": nbytes, "bar": 0, "ok": nbytes == 0}
            else:
                ratio = round(1 / cpu, 4)
                bars[f"aligned_over_{key}_cpu"] = {"value": ratio, "bar": SLOWER, "ok": ratio <= SLOWER}
        figures[f"aligned_{world_size}_ranks_with_triplet_bytes"] = measured["with_triplet"]
        print(f"{f'{world_size} ranks, aligned, triplet':58}  {measured['with_triplet']:,}")
    return {"benchmark": "exchange", "figures": figures, "bars": bars}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="within a minute on two cores: two layers, few rounds")
    parser.add_argument("--rank_of", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.rank_of:
        run_rank(options.rank_of, depth=2 if options.quick else 6, rounds=6 if options.quick else 15)
        return
    print(json.dumps(report({world_size: launch(world_size, options.quick) for world_size in RANKS})))


if __name__ == "__main__":
    main()
