"""Training of a task that is added to a trained supernet, on one process or several, by accelerate."""

from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import nn

from ufo_ds.data.mixing import Batches, loader
from ufo_ds.data.source import TrainSource
from ufo_ds.errors import UserError
from ufo_ds.evaluation.features import TaskImages, predict
from ufo_ds.evaluation.outcomes import Outcomes
from ufo_ds.model.parameters import update_rule, without_effect
from ufo_ds.model.supernet import Supernet
from ufo_ds.parallel import ranks, scoring
from ufo_ds.parallel.collectives import everyone
from ufo_ds.parallel.placement import share
from ufo_ds.progress import Progress
from ufo_ds.recipe import Optimizer, Recipe, Schedule
from ufo_ds.training.schedule import learning_rate


@dataclass(frozen=True)
class Settings:
    """Of the training: AdamW, a linear warm-up over a tenth of the steps, then half a cosine to zero."""

    steps: int
    lr: float

    @property
    def schedule(self) -> Schedule:
        return Schedule(steps=self.steps, warmup_steps=self.steps // 10)


def start_accelerate(device: str | None, mixed_precision: str) -> Accelerator:
    """Join the job that ``accelerate launch`` began, if it did.

    Args:
        device: "cpu" to leave a GPU alone.
        mixed_precision: no, bf16 or fp16.

    Raises:
        UserError: a precision that this device lacks.
    """
    try:
        return Accelerator(
            cpu=device == "cpu",
            mixed_precision=mixed_precision,
            # The neck's statistics are those of all processes' samples already.
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        )
    except ValueError as error:
        raise UserError(f"--mixed_precision {mixed_precision}: {str(error).splitlines()[0]}") from None


def train(model: Supernet, source: TrainSource, settings: Settings, accelerator: Accelerator) -> float:
    """Train what has gradients; the rest stays to the bit. Returns the loss of the last step.

    The loss is global: the sum over processes is the mean over the batch's samples, whichever process holds them.

    Args:
        model: of the one task, on the accelerator's device.

    Raises:
        UserError: the loss is not finite, or too many images cannot be read.
    """
    recipe, world = model.recipe, accelerator.num_processes
    (task,) = recipe.tasks
    if world > task.samples_per_step:
        raise UserError(f"{world} processes for {task.samples_per_step} samples in a step: take fewer processes")
    model.eval()  # frozen parts; the neck alone has two modes, and the model one of losses and one of outputs
    model.training = True
    model.heads.train()
    for head in model.heads.children():
        head.set_group(everyone())  # type: ignore[operator]
    optimizer = torch.optim.AdamW(_groups(model), betas=recipe.optimizer.betas)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    frozen_slices = [
        (parameter, without_effect(name, parameter.shape))
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and without_effect(name, parameter.shape)
    ]
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    clipping = recipe.optimizer.gradient_clipping or 1.0
    options = Optimizer(lr=settings.lr)
    batches = Batches({task.name: source}, partial(_positions, world, accelerator.process_index), 1)
    unreadable: set[int] = set()
    progress = Progress(settings.steps, unit="steps", name=f"train {task.name}")
    loss = torch.zeros(())
    with progress if accelerator.is_main_process else nullcontext():
        pin = accelerator.device.type == "cuda"
        for batch in loader(batches, 0, settings.steps, recipe.data.workers, pin):
            unreadable.update(batch.skipped[task.name])
            if len(unreadable) > recipe.data.max_corrupt * len(source):
                raise UserError(
                    f"task {task.name}: {len(unreadable)} of {len(source)} images cannot be read, more than "
                    f"data.max_corrupt {recipe.data.max_corrupt} of the run: check them with `ufo shards verify`"
                )
            rate = learning_rate(batch.step, options, settings.schedule)
            for group in optimizer.param_groups:
                group["lr"] = rate * group["lr_scale"]
            loss = wrapped(batch.to(accelerator.device)).sum()
            accelerator.backward(loss * world)  # which takes the mean of the processes' gradients
            for parameter, span in frozen_slices:
                assert parameter.grad is not None
                parameter.grad[span.start : span.stop] = 0.0
            accelerator.clip_grad_norm_(trained, clipping)
            optimizer.step()
            optimizer.zero_grad()
            if accelerator.is_main_process:
                progress.update()
    accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
    total = accelerator.reduce(loss.detach().float(), reduction="sum").item()
    if not all(bool(torch.isfinite(parameter).all()) for parameter in trained):
        raise UserError(f"task {task.name}: the loss is not finite any more: lower --lr {settings.lr:g}")
    model.eval()
    return total


def _positions(world: int, rank: int, counts: dict[str, int]) -> dict[str, range]:
    return {name: share(range(count), world, rank) for name, count in counts.items()}


def _groups(model: Supernet) -> list[dict[str, object]]:
    """What is trained, by the recipe's rules."""
    found: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rule = update_rule(name, model.recipe)
            found.setdefault((rule.lr_scale, rule.weight_decay), []).append(parameter)
    return [
        {"params": parameters, "lr_scale": scale, "weight_decay": decay} for (scale, decay), parameters in found.items()
    ]


def evaluate(
    model: Supernet, recipe: Recipe, images: dict[str, TaskImages], classes: list[str], device: torch.device
) -> dict[str, Outcomes]:
    """Outcomes of the task's benchmarks, each process a part of the images; the same on all."""
    if not images:
        return {}
    (task,) = recipe.tasks
    with scoring.feature_files() as files:
        predict(
            lambda batch: model(batch.to(device)),
            images,
            {name: share(range(len(mine)), ranks.count(), ranks.this()) for name, mine in images.items()},
            recipe.evaluation.batch_size,
            recipe.data.workers,
            files,
            quiet=ranks.this() != 0,
        )
        ranks.wait_for_all()
        found = scoring.score(recipe, images, files.read(images), {task.name: classes})
        ranks.wait_for_all()
    return found


def updated(model: Supernet) -> tuple[int, int]:
    """Numbers of parameters that are trained, and of all on the task's path with its head."""
    counts = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(count for count, is_trained in counts if is_trained), sum(count for count, _ in counts)
