"""The training of a student, in one process or several (``accelerate launch``), which goes on where it was stopped."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ufo_ds.data.views import Drawn, Steps, Views
from ufo_ds.distillation.cache import TeacherCache
from ufo_ds.distillation.corrupt import Corrupt
from ufo_ds.distillation.settings import Settings
from ufo_ds.distillation.teachers import Taught, Teachers
from ufo_ds.distillation.trainee import LOSSES, Trainee
from ufo_ds.errors import UserError
from ufo_ds.progress import Progress

SAVE_EVERY = 500  # steps
CLIP = 2.0  # norm of the gradient


class Average(nn.Module):
    """Moving average of a model's weights and running statistics; of the first steps the mean, nearly."""

    def __init__(self, model: nn.Module, decay: float):
        super().__init__()
        self.decay = decay
        self.state = {name: value.detach().clone() for name, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                self.state[name].lerp_(value, 1 - decay)
            else:
                self.state[name].copy_(value)


def rate(settings: Settings, step: int) -> float:
    """The learning rate of a step: linear warm-up, then half a cosine down to 0."""
    warmup = round(settings.warmup * settings.steps)
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    return settings.lr * (1 + math.cos(math.pi * (step - warmup) / max(settings.steps - warmup, 1))) / 2


def train(
    trainee: Trainee,
    accelerator: Accelerator,
    teachers: Teachers,
    cache: TeacherCache | None,
    views: Views,
    settings: Settings,
    corrupt: Corrupt,
    saved: Path,
    workers: int,
    say: Callable[[str], None],
) -> dict[str, float]:
    """Train, and leave the averaged weights in ``trainee``.

    Args:
        cache: what the teachers say of the views; None where nothing is learned from them.
        saved: file to save to now and then, and to go on from.

    Returns:
        The losses of the last hundredth of the steps, or of the last one.
    """
    weights = {name: getattr(settings, f"{name}_weight") for name in LOSSES}
    decayed = [p for p in trainee.parameters() if p.requires_grad and p.ndim > 1]
    others = [p for p in trainee.parameters() if p.requires_grad and p.ndim <= 1]
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.98))
    trainee.to(accelerator.device)
    average = Average(trainee, settings.average)
    begin = _load(saved, trainee, average, optimizer, accelerator.device)
    if begin:
        say(f"goes on at step {begin} of {settings.steps}")
    model, prepared = accelerator.prepare(trainee, optimizer)
    model.train()
    drawn = Drawn(views, settings.batch_size)
    steps = Steps(views, drawn, accelerator.process_index, accelerator.num_processes)
    loader: Any = DataLoader(
        steps, batch_size=None, sampler=range(begin, settings.steps), num_workers=workers,
        pin_memory=accelerator.device.type == "cuda", generator=torch.Generator(),
    )  # fmt: skip
    mean, std = (
        255 * torch.tensor(values, device=accelerator.device)[:, None, None]
        for values in (teachers.recipe.data.mean, teachers.recipe.data.std)
    )
    weight_K = torch.tensor([weights[name] for name in LOSSES], device=accelerator.device)
    total_K, counted = torch.zeros(len(LOSSES), device=accelerator.device), 0
    with Progress(settings.steps, done=begin, unit="steps", name=trainee.student.config.backbone) as progress:
        for step, batch in enumerate(loader, start=begin):
            corrupt.add(batch.skipped)
            taught = Taught(torch.empty(0), torch.empty(0)) if cache is None else cache.read(batch.numbers.numpy())
            unit_BD = taught.features if cache is None else teachers.unit(taught.features)
            moved = [
                x.to(accelerator.device, non_blocking=True) for x in (batch.pixels, batch.labels, *taught, unit_BD)
            ]
            for group in optimizer.param_groups:
                group["lr"] = rate(settings, step)
            losses_K = model((moved[0].float() - mean) / std, moved[1], Taught(moved[2], moved[3]), moved[4])
            accelerator.backward((weight_K * losses_K).sum())
            accelerator.clip_grad_norm_(model.parameters(), CLIP)
            prepared.step()
            prepared.zero_grad()
            average.update(trainee, step)
            if step >= settings.steps - max(settings.steps // 100, 1):
                total_K, counted = total_K + losses_K.detach(), counted + 1
            done = step + 1
            if done % SAVE_EVERY == 0 and done < settings.steps and accelerator.is_main_process:
                _save(saved, trainee, average, optimizer, done)
            progress.update()
    trainee.load_state_dict(average.state)
    trainee.eval()
    found = (total_K / max(counted, 1)).tolist()
    return {name: value for name, value in zip(LOSSES, found, strict=True) if weights[name]}


def _save(path: Path, trainee: nn.Module, average: Average, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Everything that the next step follows from; written as a whole."""
    tensors: dict[str, Tensor] = {"step": torch.tensor(step)}
    tensors |= {f"model.{name}": value for name, value in trainee.state_dict().items()}
    tensors |= {f"average.{name}": value for name, value in average.state.items()}
    for number, values in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{name}": value for name, value in values.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    save_file({name: value.contiguous().cpu() for name, value in tensors.items()}, unfinished)
    unfinished.rename(path)


def _load(
    path: Path, trainee: nn.Module, average: Average, optimizer: torch.optim.Optimizer, device: torch.device
) -> int:
    """Returns the next step, 0 if nothing was saved.

    Raises:
        UserError: what was saved is damaged.
    """
    if not path.exists():
        return 0
    try:
        tensors = load_file(path)
        trainee.load_state_dict(_under("model.", tensors))
        average.state = {name: value.to(device) for name, value in _under("average.", tensors).items()}
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in _under("optimizer.", tensors).items():
            number, _, kind = name.partition(".")
            state.setdefault(int(number), {})[kind] = value
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        return int(tensors["step"])
    except (OSError, SafetensorError, RuntimeError, KeyError, ValueError) as error:
        raise UserError(f"{path} is damaged: {str(error).splitlines()[0]}: delete it to start over") from None


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
