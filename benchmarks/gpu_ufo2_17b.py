"""Part of gpu.py: the whole of the recipe ufo2_17b, 17 billion parameters, trained on one GPU.

The recipe as it is, backbone, experts, 26 tasks with the published numbers of classes, heads, losses, rules and weight
decay, but for three things. A step has a 16th of the images (448), each task its part of them. SGD works inside the
backward pass (``ufo_ds.training.optimizer_in_backward``), so the published clip norm of 5 is each parameter's own. And
the rate is the published peak of 0.2 from the first step on: 20 steps of the warm-up would show nothing.

Images are real, and of ten classes: scikit-learn's scans of handwritten digits, enlarged, others in every step.
"""

import dataclasses
import gc
import statistics
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

from benchmarks.gpu_throughput import recompute, seconds
from ufo_ds import recipe_file
from ufo_ds.data.mixing import Batch, TaskBatch
from ufo_ds.model.architecture import Architecture
from ufo_ds.model.cost import path_cost
from ufo_ds.model.supernet import Supernet
from ufo_ds.recipe import Recipe
from ufo_ds.recipe_task import Task
from ufo_ds.seeding import numpy_generator
from ufo_ds.training import optimizer_in_backward as in_backward
from ufo_ds.training.optimizer_in_backward import SGDInBackward

STEPS, SMALL_STEPS = 20, 3
SMALL_DIVISORS = (288,)
DIVISORS = (16, 32, 64)  # of the recipe's samples: the first for which memory suffices


def measure(device: torch.device, small: bool, limit_s: float, report: Callable[..., None]) -> None:
    end = time.monotonic() + limit_s
    recipe = make_recipe(small)
    began = time.perf_counter()
    model, optimizer = build(recipe, device)
    if device.type == "cuda":
        torch.cuda.synchronize()
    state = optimizer.state_bytes()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert sum(state.values()) == 4 * parameters
    report(
        figures={
            "parameters": parameters,
            "tasks": len(recipe.tasks),
            "construction_s": time.perf_counter() - began,
            **{f"{kind}_gib": of_kind / 2**30 for kind, of_kind in state.items()},
        }
    )
    recompute(model, True)
    train(model, optimizer, device, small, end, report)


def make_recipe(small: bool) -> Recipe:
    recipe = recipe_file.load("ufo2_17b")
    if not small:
        return recipe
    backbone = dataclasses.replace(recipe.model.backbone, dim=16, depth=2, heads=2, name="custom")
    model = dataclasses.replace(recipe.model, backbone=backbone)
    tasks = [dataclasses.replace(task, input=(28, 28)) for task in recipe.tasks]
    return dataclasses.replace(recipe, model=model, tasks=tasks)


def build(recipe: Recipe, device: torch.device) -> tuple[Supernet, SGDInBackward]:
    """Without a copy of the model on the host."""
    with torch.device("meta"):
        model = Supernet(recipe, {task.name: task.num_classes or 0 for task in recipe.tasks})
    in_backward.to_device(model, device)
    options = recipe.optimizer
    optimizer = SGDInBackward(
        dict(model.named_parameters()), in_backward.rules_of(model), options.momentum, options.gradient_clipping
    )
    in_backward.assign_initial_values(optimizer, model)
    return model.train(), optimizer


def train(
    model: Supernet,
    optimizer: SGDInBackward,
    device: torch.device,
    small: bool,
    end: float,
    report: Callable[..., None],
) -> None:
    """All steps for which there is time; after each it reports what there is so far."""
    recipe, digits = model.recipe, Digits(device)
    optimizer.learning_rate = recipe.optimizer.lr
    losses: list[list[float]] = []
    taken: list[float] = []
    divisors = list(SMALL_DIVISORS if small else DIVISORS)
    while len(losses) < (SMALL_STEPS if small else STEPS) and time.monotonic() + max(taken, default=0.0) < end:
        batch = digits.batch(recipe, len(losses), divisors[0])
        images = sum(part.global_count for part in batch.tasks.values())
        found: list[Tensor] = []
        try:
            taken.append(seconds(device, partial(step, model, batch, found)))
        except torch.OutOfMemoryError as error:
            message = str(error).partition("\n")[0]
        else:
            losses.append(found[0].tolist())
            print(f"step {len(losses)}: loss {sum(losses[-1]):.2f}, {taken[-1]:.2f} s, {images} images", flush=True)
            report(**summary(recipe, losses, taken, images, device, small))
            continue
        # What had its gradient has taken this step, the rest has not: as good a model as any to go on from.
        report(notes=[f"no room for {images} images a step: {message}"])
        del divisors[0]
        if not divisors:
            break
        model.zero_grad()
        gc.collect()
        torch.cuda.empty_cache()


def step(model: Supernet, batch: Batch, found: list[Tensor]) -> None:
    losses_TK = model(batch)
    losses_TK.sum().backward()
    found.append(losses_TK.detach().sum(1))


def summary(
    recipe: Recipe, losses: list[list[float]], taken: list[float], images: int, device: torch.device, small: bool
) -> dict:
    """Figures and bars of the steps so far; the first one warms up."""
    median = statistics.median(taken[1:] or taken)
    first, last = np.array(losses[0]), np.mean(losses[-5:], axis=0)
    backbone = recipe.model.backbone
    flops = 3 * path_cost(backbone, Architecture.of(backbone), recipe.tasks[0].input).flops
    figures = {
        "steps": len(losses),
        "images_a_step": images,
        "step_s": median,
        "images_per_s": images / median,
        "tflops": images / median * flops / 1e12,  # of the model, recomputed ones left out
        "loss_of_first_step": first.sum(),
        "loss_of_last_5_steps": last.sum(),
        "tasks_with_less_loss": int((last < first).sum()),
        "losses": [sum(of_step) for of_step in losses],
    }
    if device.type == "cuda":
        figures["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        figures["peak_reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
    return {"figures": figures, "bars": {} if small else {"loss_last_5_to_first": (last.sum() / first.sum(), 0.9)}}


class Digits:
    """Batches of scans ``[1797, 1, 8, 8]``, for any task."""

    def __init__(self, device: torch.device):
        self.device = device
        digits = load_digits()
        self.scans = torch.tensor(digits.images * (255 / 16), dtype=torch.float32, device=device)[:, None]
        self.of_digit = [np.flatnonzero(digits.target == digit) for digit in range(10)]

    def batch(self, recipe: Recipe, step: int, divisor: int) -> Batch:
        """A part of the recipe's samples of every task, drawn by (step, task)."""
        return Batch(step, 0, {task.name: self._of(task, step, divisor) for task in recipe.tasks}, {})

    def _of(self, task: Task, step: int, divisor: int) -> TaskBatch:
        random = numpy_generator("gpu", step, task.name)
        n, each = max(2, task.samples_per_step // divisor), 1
        if task.identities_per_step:
            each = task.samples_per_step // task.identities_per_step
        identities = max(2, n // each)
        repeated = -(-identities // 10)  # where more are wanted than there are digits
        labels = np.concatenate([random.permutation(10) for _ in range(repeated)])[:identities].repeat(each)
        rows = [random.choice(self.of_digit[label]) for label in labels]
        scans = self.scans[torch.tensor(rows, device=self.device)]
        grey = F.interpolate(scans, size=task.input, mode="bilinear").to(torch.uint8)
        classes = torch.tensor(labels % (task.num_classes or 10), device=self.device)
        return TaskBatch(grey.expand(-1, 3, -1, -1), classes, range(len(labels)), len(labels))
