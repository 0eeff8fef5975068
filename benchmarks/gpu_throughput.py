"""Part of gpu.py: training images a second of ViT-H/14, dense and with own copies of everything for 8 and 26 tasks.

The dense peer is the plain ViT of task_moe_step.py; the supernets have its weights in every copy, the structure of the
recipe ufo2_17b, and the same number of images a step, spread evenly over tasks. A step is forward, backward and an SGD
update of bf16 weights, each parameter's as soon as its gradient is there, so that 26 tasks' gradients need no room. The
loss is a fixed linear function of the features: the backbone alone is measured. "Share of the peak" is of the matrix
products' rate measured here; FLOPs are the model's, forward and twice as many backward; recomputed ones do not count.
"""

import dataclasses
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks.task_moe_step import DenseViT, LinearLoss, path_of
from ufo_ds import recipe_file
from ufo_ds.data.mixing import Batch, TaskBatch
from ufo_ds.model.architecture import Architecture
from ufo_ds.model.cost import path_cost
from ufo_ds.model.supernet import Supernet
from ufo_ds.recipe import Recipe
from ufo_ds.training.optimizer_in_backward import to_device

TASKS = (8, 26)
ROUNDS, SMALL_ROUNDS = 7, 2
RATE = 1e-9  # of the updates: bf16 weights stay as they are, which makes all steps alike
MOST = {"tasks_8": 1.05, "tasks_26": 1.10}  # of the dense peer's time


@dataclass(frozen=True)
class Setting:
    """``recompute``: of every block, only its input is kept for the backward pass."""

    side: int
    images: int
    recompute: bool

    @property
    def name(self) -> str:
        return f"{self.side}px" + ("" if self.recompute else "_all_kept")


SETTINGS = (Setting(256, 416, True), Setting(256, 156, False), Setting(384, 208, True))
SMALL_SETTINGS = (Setting(28, 26, True), Setting(28, 26, False), Setting(42, 26, True))


@dataclass(frozen=True)
class Bench:
    """What a setting is measured with: ``peak`` in FLOPs a second, ``end`` on the monotonic clock."""

    models: dict[str, nn.Module]
    peak: float
    device: torch.device
    end: float
    small: bool


def measure(device: torch.device, small: bool, limit_s: float, report: Callable[..., None]) -> None:
    end = time.monotonic() + limit_s
    peak = matrix_peak(device, 64 if small else 8192)
    report(figures={"matrix_peak_tflops": peak / 1e12})
    settings = SMALL_SETTINGS if small else SETTINGS
    models: dict[str, nn.Module] = {}
    side = 0
    for i, setting in enumerate(settings):
        share_s = (end - time.monotonic()) / (len(settings) - i)
        if setting.side != side:
            models.clear()
            _free(device)
            models, side = build(device, small, setting.side), setting.side
        bench = Bench(models, peak, device, time.monotonic() + 0.9 * share_s, small)
        measure_setting(setting, bench, report)


def matrix_peak(device: torch.device, size: int) -> float:
    """FLOPs a second of square bf16 products of random values; the median of several rounds."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)

    def products() -> None:
        for _ in range(10):
            torch.mm(a, b, out=out)

    products()
    return 10 * 2 * size**3 / statistics.median(seconds(device, products) for _ in range(7))


def seconds(device: torch.device, act: Callable[[], object]) -> float:
    """On a GPU between events on its stream."""
    if device.type != "cuda":
        start = time.perf_counter()
        act()
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    act()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


# --- models -----------------------------------------------------------------------------------------------------------


def make_recipe(side: int, small: bool, tasks: int) -> Recipe:
    """ufo2_17b's backbone and experts, with this many tasks of this input size."""
    task = {"head": {"type": "linear"}, "loss": {"cross_entropy": {}}, "input": [side, side], "samples_per_step": 1}
    return recipe_file.parse(
        {
            "name": "gpu_throughput",
            "model": {
                "backbone": {"dim": 16, "depth": 2, "heads": 2, "patch_size": 14} if small else "vit_huge",
                "experts": ["embed", "norm", "attn", "ffn"],
            },
            "tasks": [{**task, "name": f"task{i}"} for i in range(tasks)],
            "schedule": {"steps": 1000},
        },
        "gpu_throughput.py",
    )


def build(device: torch.device, small: bool, side: int) -> dict[str, nn.Module]:
    """The dense peer, and supernets with its weights."""
    torch.manual_seed(0)
    backbone = make_recipe(side, small, 1).model.backbone
    with torch.device(device):
        dense = DenseViT(backbone.depth, backbone.dim, backbone.heads, backbone.patch_size, side).bfloat16()
    values = {name: parameter.detach() for name, parameter in dense.named_parameters()}
    models: dict[str, nn.Module] = {"dense": dense}
    for tasks in TASKS:
        with torch.device("meta"):
            model = Supernet(make_recipe(side, small, tasks), {})
        to_device(model, device)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(values[path_of(name)].view_as(parameter))
        models[f"tasks_{tasks}"] = model
    for model in models.values():
        model.train()
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(_update)
    return models


@torch.no_grad()
def _update(parameter: Tensor) -> None:
    parameter.add_(parameter.grad, alpha=-RATE)
    parameter.grad = None


def recompute(model: nn.Module, on: bool) -> None:
    for block in model.blocks:
        vars(block).pop("forward", None)
        if on:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)


# --- steps ------------------------------------------------------------------------------------------------------------


def measure_setting(setting: Setting, bench: Bench, report: Callable[..., None]) -> None:
    """With half as many images, or half of these, where memory does not suffice."""
    for images in (setting.images, setting.images // 2, setting.images // 4):
        try:
            take_turns(dataclasses.replace(setting, images=images), bench, report)
            return
        except torch.OutOfMemoryError as error:
            message = str(error).partition("\n")[0]
        report(notes=[f"{setting.name}: no room for {images} images a step: {message}"])
        for model in bench.models.values():
            model.zero_grad()
        _free(bench.device)


def take_turns(setting: Setting, bench: Bench, report: Callable[..., None]) -> None:
    models, device = bench.models, bench.device
    images = torch.randint(0, 256, (setting.images, 3, setting.side, setting.side), device=device, dtype=torch.uint8)
    width = models["dense"].norm.weight.shape[0]
    direction_BD = torch.randn(setting.images, width, device=device, dtype=torch.bfloat16)
    steps = dict(_steps(models, images, direction_BD))
    for model in models.values():
        recompute(model, setting.recompute)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    features = {name: step() for name, step in steps.items()}  # the first of each warms up
    different = max(_difference(features[name], features["dense"]) for name in features)
    for step in steps.values():
        step()
    taken: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for r in range(SMALL_ROUNDS if bench.small else ROUNDS):
        began = time.monotonic()
        for name in names[r % len(names) :] + names[: r % len(names)]:
            taken[name].append(seconds(device, steps[name]))
        if r >= 1 and 2 * time.monotonic() - began > bench.end:
            break
    backbone = models["tasks_8"].recipe.model.backbone
    flops = 3 * setting.images * path_cost(backbone, Architecture.of(backbone), (setting.side,) * 2).flops
    figures: dict[str, float] = {
        f"{setting.name}_images_a_step": setting.images,
        f"{setting.name}_rounds": len(taken["dense"]),
    }
    bars: dict[str, tuple[float, float]] = {}
    bars[f"{setting.name}_features_difference"] = different, 0.1  # to the dense peer's, relative; bf16
    for name, of_name in taken.items():
        median = statistics.median(of_name)
        figures[f"{setting.name}_{name}_images_per_s"] = setting.images / median
        figures[f"{setting.name}_{name}_share_of_peak"] = flops / median / bench.peak
        if name != "dense":
            ratio = statistics.median(a / b for a, b in zip(of_name, taken["dense"], strict=True))
            figures[f"{setting.name}_{name}_time_to_dense"] = ratio
            if not bench.small:
                bars[f"{setting.name}_{name}_time_to_dense"] = ratio, MOST[name]
    if device.type == "cuda":
        figures[f"{setting.name}_peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    report(figures=figures, bars=bars)


def _steps(
    models: Mapping[str, nn.Module], images: Tensor, direction_BD: Tensor
) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    def dense_step(model: nn.Module) -> Tensor:
        features_BD = model(images)
        (features_BD * direction_BD).sum().backward()
        return features_BD.detach()

    def task_moe_step(model: Supernet, batch: Batch) -> Tensor:
        model(batch).backward()
        return model.heads.features_BD

    for name, model in models.items():
        if name == "dense":
            yield name, partial(dense_step, model)
        else:
            model.heads = LinearLoss(direction_BD)
            yield name, partial(task_moe_step, model, make_batch(images, list(model.tasks)))


def make_batch(images: Tensor, names: Sequence[str]) -> Batch:
    """The images one after another, as evenly over tasks as their number allows."""
    tasks = {}
    for name, of_task in zip(names, images.tensor_split(len(names)), strict=True):
        n = len(of_task)
        tasks[name] = TaskBatch(of_task, torch.zeros(n, dtype=torch.int64), range(n), n)
    return Batch(0, 0, tasks, {})


def _difference(found: Tensor, wanted: Tensor) -> float:
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
