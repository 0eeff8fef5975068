"""Cost of a training step (forward and backward) of the Task-MoE ViT against a dense ViT of the same active size.

    python benchmarks/task_moe_step.py [--quick]

ViT-S (quick: one layer of it), 224 x 224 pixels, 197 tokens, 32 images a step whatever the number of tasks; every task
has its own FFN and attention in every layer. The dense peer is the plain ViT written below: it does the same work on
the same images, which is checked on features and gradients before anything is timed. transformers' ``ViTModel`` is
there for comparison. The loss is a fixed linear function of the features, so the backbone alone is measured.

The part on two ranks trains the same backbones, with linear heads, through the engine (gloo, EP 2, ZeRO-3, aligned
exchange), the dense one as a recipe without experts.

Seconds are CPU seconds of one thread in fp32, which other processes on the machine distort least, or of a GPU with
bf16 weights, as DeepSpeed's bf16 holds them, and 512 images. The peer's turn comes before and after every two
variants; a ratio is to the mean of the two, and the median over rounds is reported.

What is left of the difference on a CPU is the matrix products' own: BLAS takes about a tenth longer for 32 products of
197 rows than for one of 6304. glibc's allocator works for us: it gives blocks above 32 MB, which only the dense peer
has, back to the system after each use. With MALLOC_MMAP_MAX_=0 and MALLOC_TRIM_THRESHOLD_=2147483647 it keeps them, and
the ratios are higher (seen with one layer: tasks_8 1.06 instead of 1.01, tasks_32 1.16 instead of 1.10).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ufo_ds import recipe_file
from ufo_ds.data.mixing import Batch, TaskBatch
from ufo_ds.model.packing import Segment
from ufo_ds.model.supernet import Supernet, init_weights
from ufo_ds.recipe import Recipe

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE, SCALE = (torch.bfloat16, 16) if DEVICE.type == "cuda" else (torch.float32, 1)
IMAGE, PATCH, DIM, HEADS = 224, 16, 384, 6
BALANCED_4, UNBALANCED_4 = [8] * 4, [16, 8, 4, 4]
BALANCED_8, UNBALANCED_8 = [4] * 8, [16, 4, 4, 2, 2, 2, 1, 1]
BARS = {
    "tasks_2": 1.05, "tasks_8": 1.05, "tasks_32": 1.10,
    "unbalanced": 1.05,  # to balanced counts: no worse, up to the noise of a few rounds
    "router_probe_0.25": 1.15, "engine_2_ranks": 1.05,
}  # fmt: skip


# --- the dense peer ---------------------------------------------------------------------------------------------------


class DenseBlock(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(dim, 3 * dim), "proj": nn.Linear(dim, dim)})
        self.ffn = nn.ModuleDict({"fc1": nn.Linear(dim, 4 * dim), "fc2": nn.Linear(4 * dim, dim)})

    def forward(self, x_BLD: Tensor) -> Tensor:
        b, length, dim = x_BLD.shape
        qkv = self.attn["qkv"](self.norm1(x_BLD)).view(b, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y_BHLK = F.scaled_dot_product_attention(*qkv.unbind(0))
        x_BLD = x_BLD + self.attn["proj"](y_BHLK.transpose(1, 2).reshape(b, length, dim))
        return x_BLD + self.ffn["fc2"](F.gelu(self.ffn["fc1"](self.norm2(x_BLD))))


class DenseViT(nn.Module):
    """A plain ViT; uint8 images to features. Parameters have the supernet's names, without those of copies."""

    def __init__(self, depth: int, dim: int = DIM, heads: int = HEADS, patch: int = PATCH, image: int = IMAGE):
        super().__init__()
        self.embed = nn.ModuleDict({"patch": nn.Conv2d(3, dim, patch, stride=patch)})
        self.embed.cls = nn.Parameter(torch.zeros(1, dim))
        self.embed.position = nn.Parameter(torch.zeros(1 + (image // patch) ** 2, dim))
        self.blocks = nn.ModuleList(DenseBlock(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.02)  # no bias or token is zero

    def forward(self, images_BCHW: Tensor) -> Tensor:
        images_BCHW = pixels(images_BCHW).to(self.norm.weight.dtype)
        x_BLD = self.embed["patch"](images_BCHW).flatten(2).transpose(1, 2)
        x_BLD = torch.cat([self.embed.cls.expand(len(x_BLD), 1, -1), x_BLD], dim=1) + self.embed.position
        for block in self.blocks:
            x_BLD = block(x_BLD)
        return self.norm(x_BLD)[:, 0]


def pixels(images_BCHW: Tensor) -> Tensor:
    return ((images_BCHW.to(DEVICE).float() - 127.5) / 127.5).to(DTYPE)


# --- the supernet -----------------------------------------------------------------------------------------------------


def make_recipe(depth: int, samples: Sequence[int], routes: str = "own", probe: float = 1.0) -> Recipe:
    """``samples``: of every task; ``routes``: of attention and FFN in every layer, "shared" for no experts."""
    units = [] if routes == "shared" else ["attn", "ffn"]
    task = {"head": {"type": "linear"}, "loss": {"cross_entropy": {}}, "input": [IMAGE, IMAGE]}
    return recipe_file.parse(
        {
            "name": "task_moe_step",
            "model": {
                "backbone": {"dim": DIM, "depth": depth, "heads": HEADS, "patch_size": PATCH},
                "experts": units,
                "routes": dict.fromkeys(units, routes),
                "router": {"probe": probe},
            },
            "tasks": [{**task, "name": f"task{i}", "samples_per_step": n} for i, n in enumerate(samples)],
            "schedule": {"steps": 1000},
        },
        "task_moe_step.py",
    )


class LinearLoss(nn.Module):
    """In place of the heads: a fixed linear function of the features, which it keeps."""

    def __init__(self, direction_BD: Tensor):
        super().__init__()
        self.direction_BD = direction_BD

    def forward(self, features_BD: Tensor, segments: Sequence[Segment], *_: Mapping) -> Tensor:
        self.features_BD = features_BD.detach()
        return (features_BD * self.direction_BD).sum()


def make_supernet(recipe: Recipe, dense: DenseViT, direction_BD: Tensor) -> Supernet:
    """With the dense peer's weights in every copy."""
    values = {name: value.detach().cpu() for name, value in dense.named_parameters()}
    with torch.device("meta"):
        model = Supernet(recipe, {})

    def value(name: str, shape: torch.Size, span: range) -> Tensor | None:
        return None if name.startswith("router") else values[path_of(name)].flatten()[span.start : span.stop]

    init_weights(model, pretrained=value)
    model.heads = LinearLoss(direction_BD)
    return model.to(DEVICE, DTYPE).train()


def path_of(name: str) -> str:
    """A parameter of the supernet by its name on the dense path."""
    parts = name.split(".")
    at = next(i for i, part in enumerate(parts) if part in ("shared", "own"))
    return ".".join(parts[:at] + parts[at + (1 if parts[at] == "shared" else 2) :])


def make_batch(images_BCHW: Tensor, recipe: Recipe, step: int, positions: Mapping[str, range] | None = None) -> Batch:
    """The images in the order of tasks; ``positions`` as of :class:`TaskBatch`, default: all."""
    tasks, pieces = {}, images_BCHW.split([task.samples_per_step for task in recipe.tasks])
    for task, images in zip(recipe.tasks, pieces, strict=True):
        span = range(len(images)) if positions is None else positions.get(task.name, range(0))
        if span or positions is None:
            mine = images[span.start : span.stop]
            tasks[task.name] = TaskBatch(mine, torch.zeros(len(mine), dtype=torch.int64), span, len(images))
    return Batch(step, 0, tasks, {})


def assert_same_work(model: Supernet, dense: DenseViT, features_BD: Tensor, tolerance: float) -> None:
    """After a backward pass of both: equal features; gradients of all copies together equal the dense peer's."""

    def compare(found: Tensor, wanted: Tensor, what: str) -> None:
        error = ((found.float() - wanted.float()).abs().max() / wanted.float().abs().max()).item()
        if error > tolerance:
            raise AssertionError(f"{what} differs from the dense peer's by {error:.1e} of its largest value")

    compare(model.heads.features_BD, features_BD, "the features")
    sums: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not name.startswith("router"):
            sums[path_of(name)] = sums.get(path_of(name), 0) + parameter.grad.float()
    for name, parameter in dense.named_parameters():
        if not name.endswith("qkv.bias"):  # the keys' part has a true gradient of zero
            compare(sums[name].view_as(parameter), parameter.grad, f"the gradient of {name}")


# --- timing -----------------------------------------------------------------------------------------------------------


def seconds(step: Callable[[], object]) -> float:
    clock = time.perf_counter if DEVICE.type == "cuda" else time.process_time
    start = clock()
    step()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def take_turns(
    peer: Callable[[int], object], variants: Mapping[str, Callable[[int], object]], rounds: int, limit_s: float
) -> dict[str, list[float]]:
    """Ratios of every variant to the peer's turns around it. Each round starts with another variant; a round that
    would end after ``limit_s`` is not begun, but three are in any case. All must have run before."""
    names, ratios = list(variants), {name: [] for name in variants}
    begin = time.perf_counter()
    for r in range(rounds):
        if r >= 3 and (time.perf_counter() - begin) * (r + 1) / r > limit_s:
            break
        order = names[r % len(names) :] + names[: r % len(names)]
        before = seconds(lambda: peer(r))  # noqa: B023
        for pair in (order[i : i + 2] for i in range(0, len(order), 2)):
            taken = [seconds(lambda: variants[name](r)) for name in pair]  # noqa: B023
            after = seconds(lambda: peer(r))  # noqa: B023
            for name, t in zip(pair, taken, strict=True):
                ratios[name].append(2 * t / (before + after))
            before = after
    return ratios


# --- in one process ---------------------------------------------------------------------------------------------------


def measure_in_process(quick: bool) -> dict[str, list[float]]:
    depth = 1 if quick else 12
    torch.manual_seed(0)
    images = torch.randint(0, 256, (32 * SCALE, 3, IMAGE, IMAGE), dtype=torch.uint8)
    direction_BD = torch.randn(len(images), DIM).to(DEVICE, DTYPE)
    dense = DenseViT(depth).to(DEVICE, DTYPE)

    def dense_step(_: int) -> Tensor:
        dense.zero_grad()
        features_BD = dense(images)
        (features_BD * direction_BD).sum().backward()
        return features_BD.detach()

    def task_moe(samples: Sequence[int], routes: str = "own", probe: float = 1.0) -> Callable[[int], None]:
        recipe = make_recipe(depth, [n * SCALE for n in samples], routes, probe)
        model = make_supernet(recipe, dense, direction_BD)

        def step(i: int) -> None:
            model.zero_grad()
            model(make_batch(images, recipe, i)).backward()

        step(0)  # warms up, too
        assert_same_work(model, dense, features_BD, 1e-4 if DEVICE.type == "cpu" else 5e-2)
        model.zero_grad()  # no gradients kept of the many models that are not running
        return step

    features_BD = dense_step(0)
    experts = {"tasks_2": [16] * 2, "tasks_8": BALANCED_8, "tasks_8_unbalanced": UNBALANCED_8}
    routers = {"router_probe_0.25": 0.25}
    others: dict[str, Callable[[], Callable[[int], object]]] = {}
    if not quick:
        experts |= {"tasks_4": BALANCED_4, "tasks_4_unbalanced": UNBALANCED_4}
        routers |= {"router_probe_0.1": 0.1, "router_probe_1": 1.0}
        others = {
            "no_experts": lambda: task_moe([32], "shared"),
            "transformers": lambda: transformers_step(depth, images, direction_BD),
        }
    # Group by group, since all models at once would need 20 GB.
    groups: list[dict[str, Callable[[], Callable[[int], object]]]] = [
        {name: partial(task_moe, samples) for name, samples in experts.items()} | others,
        {"tasks_32": partial(task_moe, [1] * 32)},
        {name: partial(task_moe, BALANCED_8, "learned", probe) for name, probe in routers.items()},
    ]
    ratios: dict[str, list[float]] = {}
    for group in groups:
        variants = {name: build() for name, build in group.items()}
        ratios |= take_turns(dense_step, variants, rounds=7, limit_s=8 if quick else 400)
    return ratios


def transformers_step(depth: int, images_BCHW: Tensor, direction_BD: Tensor) -> Callable[[int], None]:
    from transformers import ViTModel

    from ufo_ds.model.architecture import Architecture
    from ufo_ds.model.dense import vit_config

    recipe = make_recipe(depth, [len(images_BCHW)], "shared")
    config = vit_config(recipe, "task0", Architecture.of(recipe.model.backbone))
    model = ViTModel(config, add_pooling_layer=False).to(DEVICE, DTYPE).train()

    def step(_: int) -> None:
        model.zero_grad()
        (model(pixels(images_BCHW)).last_hidden_state[:, 0] * direction_BD).sum().backward()

    step(0)
    return step


# --- through the engine -----------------------------------------------------------------------------------------------


def measure_on_two_ranks(quick: bool) -> dict[str, list[float]]:
    with tempfile.TemporaryDirectory() as directory:
        result = Path(directory) / "ratios.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        command += [__file__, "--rank_of", str(result), *(["--quick"] if quick else [])]
        repository = str(Path(__file__).resolve().parent.parent)
        environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [repository, os.environ.get("PYTHONPATH")]))
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
        return json.loads(result.read_text())


def run_rank(result: Path, quick: bool) -> None:
    """One of the two ranks: engines with and without experts take turns; CPU seconds of both ranks count."""
    from ufo_ds.parallel import config as configs
    from ufo_ds.parallel import ranks
    from ufo_ds.parallel.engine import Engine
    from ufo_ds.parallel.launch import finish_distributed, init_distributed

    rank, world_size = init_distributed()
    torch.manual_seed(0)
    images = torch.randint(0, 256, (32, 3, IMAGE, IMAGE), dtype=torch.uint8)

    def trainer(routes: str) -> Callable[[int], tuple[float, float]]:
        recipe = make_recipe(1 if quick else 4, BALANCED_8, routes)
        values = {"expert_parallel": {"autoep_size": 2}, "zero_optimization": {"stage": 3}, "bf16": {"enabled": False}}
        config = configs.resolve(values, "task_moe_step.py", recipe, world_size)
        engine = Engine(recipe, config, {task.name: 2 for task in recipe.tasks})

        def step(i: int) -> tuple[float, float]:
            """CPU seconds of both ranks: of forward and backward, and with the optimizer."""
            batch = make_batch(images, recipe, i, engine.positions())
            backward = seconds(lambda: engine.backward(batch))
            update = seconds(lambda: engine.update(1e-3))
            everyone = ranks.from_all((backward, backward + update))
            return sum(t for t, _ in everyone), sum(t for _, t in everyone)

        step(0)
        return step

    dense, experts = trainer("shared"), trainer("own")
    ratios: dict[str, list[float]] = {"engine_2_ranks": [], "engine_2_ranks_with_optimizer": []}
    before = dense(0)
    for i in range(1, 4 if quick else 10):
        taken, after = experts(i), dense(i)
        for name, t, b, a in zip(ratios, taken, before, after, strict=True):
            ratios[name].append(2 * t / (b + a))
        before = after
    if rank == 0:
        result.write_text(json.dumps(ratios))
    finish_distributed()


# --- report -----------------------------------------------------------------------------------------------------------


def report(ratios: Mapping[str, list[float]]) -> dict:
    """Print the table; the object of the last line."""
    figures = {name: statistics.median(values) for name, values in ratios.items()}
    print(f"{'step, relative to the dense ViT':34}{'median':>8}{'min':>8}{'max':>8}{'rounds':>8}")
    for name, values in ratios.items():
        print(f"{name:34}{figures[name]:8.3f}{min(values):8.3f}{max(values):8.3f}{len(values):8}")
    pairs = [(name, name.removesuffix("_unbalanced")) for name in figures if name.endswith("_unbalanced")]
    unbalanced = max(figures[name] / figures[balanced] for name, balanced in pairs)
    print(f"{'unbalanced / balanced':34}{unbalanced:8.3f}")
    bars = {}
    for name, bar in BARS.items():
        value = unbalanced if name == "unbalanced" else figures[name]
        bars[name] = {"value": round(value, 4), "bar": bar, "ok": value <= bar}
    rounded = {name: round(value, 4) for name, value in figures.items()}
    return {"benchmark": "task_moe_step", "figures": rounded, "bars": bars}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="within a minute on two cores: one layer, few rounds")
    parser.add_argument("--rank_of", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.rank_of:
        run_rank(options.rank_of, options.quick)
        return
    ratios = measure_in_process(options.quick) | measure_on_two_ranks(options.quick)
    print(json.dumps(report(ratios)))


if __name__ == "__main__":
    main()
