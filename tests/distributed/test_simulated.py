"""What the ranks of a large job hold, each built by the code that a real one runs (:mod:`tests.distributed.simulated`):
together every parameter once, in equal numbers, and none more than its own part."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ufo_ds import recipe_file
from ufo_ds.model.supernet import Supernet, init_weights
from ufo_ds.parallel import config as configs
from ufo_ds.parallel.machines import GPUS
from ufo_ds.parallel.planning import Planner

REPOSITORY = Path(__file__).parents[2]
# What a process needs beside parameters: the modules and DeepSpeed's dozen functions for each parameter.
OVERHEAD = 192 * 2**20

TINY = """
name: tiny
model:
  backbone: {dim: 16, depth: 2, heads: 2, patch_size: 8, stem: [8]}
  experts: [embed, norm, attn, ffn]
  routes: {ffn: learned, attn: own, norm: own, embed: own}
tasks:
  - {name: a, head: {type: margin, sharded: true}, loss: {cosface: {scale: 30, margin: 0.2}}, input: [16, 24],
     samples_per_step: 64, num_classes: 37, train: [{shards: a}]}
  - {name: b, head: {type: linear}, loss: {cross_entropy: {}}, input: [16, 16], samples_per_step: 32, num_classes: 3,
     train: [{shards: b}]}
  - {name: c, head: {type: linear}, loss: {cross_entropy: {}}, input: [16, 16], samples_per_step: 32, num_classes: 5,
     train: [{shards: c}]}
  - {name: d, head: {type: margin}, loss: {cosface: {scale: 30, margin: 0.2}}, input: [16, 16], samples_per_step: 32,
     num_classes: 7, train: [{shards: d}]}
optimizer: {type: adamw, lr: 0.01}
schedule: {steps: 1}
"""


def simulate(jobs: list[dict], tmp_path: Path) -> list[dict[int, dict]]:
    """What was found, by job and rank."""
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    results = tmp_path / "results"
    results.mkdir()
    command = [sys.executable, "tests/distributed/simulated.py", str(tmp_path / "jobs.json"), str(results)]
    # Gathered parameters would come out of glibc's heap, which does not give back what is free between other things.
    environment = os.environ | {
        "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(2**20)
    }  # fmt: skip
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=7200)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [range(job["world_size"]) if job["ranks"] is None else job["ranks"] for job in jobs]
    return [
        {rank: json.loads((results / f"{number}-{rank}.json").read_text()) for rank in of_job}
        for number, of_job in enumerate(ranks)
    ]


def whole_model(recipe_name: str) -> Supernet:
    recipe = recipe_file.load(recipe_name)
    with torch.device("meta"):
        return Supernet(recipe, {task.name: task.num_classes for task in recipe.tasks})


def check_alike(ranks: dict[int, dict]) -> None:
    assert len({json.dumps(found["alike"]) for found in ranks.values()}) == 1


def check_memory(ranks: dict[int, dict]) -> None:
    for rank, found in ranks.items():
        assert found["memory"] <= found["part"] + found["largest"] + OVERHEAD, (rank, found["memory"])


def check_ownership(ranks: dict[int, dict], model: Supernet) -> None:
    """The pieces of the ranks that partition a parameter are all of it, and no other rank has any."""
    holders: dict[str, list[tuple[int, int, list, list[int]]]] = {}
    for rank, found in ranks.items():
        for name, (numel, first, length, group) in found["pieces"].items():
            holders.setdefault(name, []).append((rank, numel, [first, first + length], found["groups"][group]))
    shapes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    assert {name for name in holders if "EMPTY" not in name} == set(shapes)
    for name, of_ranks in holders.items():
        ends = 0
        for rank, numel, (first, stop), members in of_ranks:
            if "EMPTY" not in name:
                assert [holder[0] for holder in of_ranks] == members, (name, rank)
                assert numel == shapes[name], name
                if first < stop:  # of small ones there may be nothing left
                    assert first == ends, (name, rank)
                    ends = stop
        assert ends == shapes.get(name, 0), name


def tiny(path: Path, world_size: int, ep_size: int, bf16: bool) -> dict:
    values = {"bf16": {"enabled": bf16}, "expert_parallel": {"autoep_size": ep_size}}
    return {"recipe": str(path), "deepspeed": values, "world_size": world_size, "ranks": None, "initialize": not bf16,
            "save": True}  # fmt: skip


def seventeen_billion(world_size: int, ranks: list[int] | None, initialize: bool = False) -> dict:
    values = configs.load(str(REPOSITORY / "ds_configs/moe_17b.json"))
    return {"recipe": "ufo2_17b", "deepspeed": values, "world_size": world_size, "ranks": ranks,
            "initialize": initialize, "save": False}  # fmt: skip


def test_small_ranks_and_large_ones(tmp_path):
    """In one launch: all ranks of small jobs, and one of each expert-parallel rank of a model of 17 billion
    parameters."""
    (tmp_path / "tiny.yaml").write_text(TINY)
    jobs = [tiny(tmp_path / "tiny.yaml", 6, 3, False), tiny(tmp_path / "tiny.yaml", 4, 2, True)]
    *small, large = simulate([*jobs, seventeen_billion(48, [0, 47])], tmp_path)
    model = whole_model(str(tmp_path / "tiny.yaml"))
    init_weights(model)
    for number, ranks in enumerate(small):
        values = {rank: load_file(tmp_path / f"results/{number}-{rank}.safetensors") for rank in ranks}
        check_small(ranks, values, dict(model.named_parameters()))
        check_ownership(ranks, model)
    check_large(large)


def check_small(ranks: dict[int, dict], values: dict[int, dict], wanted: dict[str, torch.Tensor]) -> None:
    """Together they have the values of the whole model."""
    check_alike(ranks)
    assert ranks[0]["alike"]["sub-groups"] == ranks[0]["alike"]["parameter groups"] == 3  # one is of sharded heads
    assert {name for of_rank in values.values() for name in of_rank if "EMPTY" not in name} == set(wanted)
    for name, parameter in wanted.items():
        owners = {tuple(found["tasks"]) for found in ranks.values() if name in found["pieces"]}
        assert len(owners) == 1 or "shared" in name or "router" in name, name
        pieces = torch.cat([of_rank[name] for of_rank in values.values() if name in of_rank])
        assert torch.equal(pieces, parameter.detach().flatten().to(pieces.dtype)), name


def check_large(ranks: dict[int, dict]) -> None:
    check_alike(ranks)
    check_memory(ranks)
    assert sum(len(found["tasks"]) for found in ranks.values()) == 26
    assert len({task for found in ranks.values() for task in found["tasks"]}) == 26
    for found in ranks.values():
        assert found["dtypes"] == ["torch.bfloat16"]
        assert [len(members) for members in found["groups"]] == [48, 24]
        slots = found["alike"]["slots"]
        # A path of its own for each slot, over 24 ranks, and the shared one over 48, in bytes; heads come on top.
        assert found["part"] == pytest.approx(630.9e6 * 2 * (slots / 24 + 1 / 48), rel=0.05)


@pytest.mark.matrix
@pytest.mark.parametrize("world_size", [48, 64, 128])
def test_all_ranks_of_17_billion_parameters(world_size, tmp_path):
    ranks = simulate([seventeen_billion(world_size, None)], tmp_path)[0]
    cpu = sorted(found["cpu_seconds"] for found in ranks.values())
    beside = max(found["memory"] - found["part"] - found["largest"] for found in ranks.values())
    print(
        f"{world_size} ranks, of {ranks[0]['alike']}: CPU {cpu[len(cpu) // 2]:.1f} s, at most {cpu[-1]:.1f};"
        f" memory at most {max(found['memory'] for found in ranks.values()) / 2**20:.0f} MiB, of it part"
        f" {max(found['part'] for found in ranks.values()) / 2**20:.0f}, beside part and largest parameter"
        f" {beside / 2**20:.0f}"
    )
    check_alike(ranks)
    check_memory(ranks)
    check_ownership(ranks, whole_model("ufo2_17b"))


@pytest.mark.matrix
def test_engines_of_17_billion_parameters(tmp_path):
    """All of ``deepspeed.initialize``, on the CPU: no more memory than a plan says is held throughout, and the largest
    parameter whole."""
    recipe = recipe_file.load("ufo2_17b")
    classes = {task.name: task.num_classes for task in recipe.tasks}
    values = configs.load(str(REPOSITORY / "ds_configs/moe_17b.json"))
    plan = Planner(recipe, classes, values, "moe_17b.json", GPUS["h200"], 8).plan(128)
    built, initialized = simulate([seventeen_billion(128, [0, 1], whole) for whole in (False, True)], tmp_path)
    check_alike({**built, **{rank + 128: found for rank, found in initialized.items()}})
    for rank, found in initialized.items():
        assert found["pieces"] == built[rank]["pieces"]
        print(f"rank {rank} of 128: CPU {found['cpu_seconds']:.1f} s, memory {found['memory'] / 2**20:.0f} MiB")
        planned = plan.ranks[0].memory
        assert found["memory"] <= planned.resident + found["largest"] + OVERHEAD
