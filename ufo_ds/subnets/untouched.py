"""Whether the tasks of a checkpoint are the same to the bit after a change that is none of theirs: their weights, and
what they say of images.

Every change leaves a line in ``changes.jsonl`` of the checkpoint's directory: what it was, by which torch on which
machine, and the digests of all tasks that were there before and after.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ufo_ds.checkpoint import Reader
from ufo_ds.errors import UserError
from ufo_ds.model.dense import path_names
from ufo_ds.model.loading import spec_of
from ufo_ds.model.spec import SubnetSpec
from ufo_ds.seeding import torch_generator
from ufo_ds.subnets.latency import Target
from ufo_ds.subnets.task_model import TaskModel, task_model
from ufo_ds.subnets.timing import machine

CHANGES = "changes.jsonl"
NOISE = 4  # images of a task
OUTPUTS = "the outputs on noise"


@dataclass(frozen=True)
class Digests:
    """Of some tasks of a checkpoint, sha256 as hexadecimal digits.

    Attributes:
        weights: by task, :attr:`TaskModel.fingerprint`.
        outputs: by task, of embeddings and logits of noise.
        tensors: of every parameter and buffer that one of the tasks uses, by name, the first 16 digits.
    """

    weights: dict[str, str]
    outputs: dict[str, str]
    tensors: dict[str, str]


def digests(reader: Reader, tasks: list[str]) -> Digests:
    """
    Raises:
        UserError: something of a task is damaged.
    """
    found = Digests({}, {}, {})
    for task in tasks:
        spec = spec_of(reader, task)
        model = open_task(reader, spec)
        found.weights[task] = model.fingerprint
        with _one_thread():
            found.outputs[task] = _digest(*model.embed(noise(model)))
        for name in tensor_names(reader, spec):
            if name not in found.tensors:
                value = reader.buffer(name) if name in reader.index.buffers else reader.parameter(name)
                found.tensors[name] = _digest(value)[:16]
    return found


def open_task(reader: Reader, spec: SubnetSpec) -> TaskModel:
    """The task's path on the CPU. Where its neck has no statistics of its own, they are those of noise: no shards need
    be here."""
    height, width = next(task.input for task in reader.recipe.tasks if task.name == spec.task)
    return task_model(reader, reader.directory, spec, pixels=_noise(spec.task, 64, height, width))


def noise(model: TaskModel) -> Tensor:
    """Fixed images, uint8 [B, 3, H, W]."""
    return _noise(model.task, NOISE, *model.input)


def _noise(task: str, count: int, height: int, width: int) -> Tensor:
    return torch.randint(
        0, 256, (count, 3, height, width), dtype=torch.uint8, generator=torch_generator(0, "untouched", task)
    )


def tensor_names(reader: Reader, spec: SubnetSpec) -> Iterator[str]:
    """Of all that a task's path and head consist of, in the checkpoint."""
    units = (*(f"{unit}." for unit, _ in path_names(spec)), f"heads.{spec.task}.")
    for name in [*reader.index.parameters, *reader.index.buffers]:
        if name.startswith(units) and "|" not in name:
            yield name


def first_difference(reader: Reader, before: Digests, after: Digests, outputs: bool = True) -> str | None:
    """Which tensor of which task differs first, for people; None if none does.

    Args:
        reader: of the checkpoint ``after`` is of.
        outputs: compare them too.
    """
    for task in before.weights:
        if task not in after.weights:
            return f"{task} is not there any more"
        for name in tensor_names(reader, spec_of(reader, task)):
            if name in before.tensors and before.tensors[name] != after.tensors[name]:
                return f"{task}: {name} differs"
        if before.weights[task] != after.weights[task]:
            return f"{task}: its path, preprocessing or fingerprint differs"
        if outputs and before.outputs[task] != after.outputs[task]:
            return f"{task}: {OUTPUTS} differ"
    return None


def line(change: str, task: str, found: Digests) -> dict[str, Any]:
    """Of a change, for :data:`CHANGES`."""
    when = datetime.now().astimezone().isoformat(timespec="seconds")
    return {
        "change": change, "task": task, "time": when, **here(),
        "weights": found.weights, "outputs": found.outputs, "tensors": found.tensors,
    }  # fmt: skip


def here() -> dict[str, Any]:
    """What the bits of outputs depend on."""
    names = machine(Target(device="cpu"))
    return {"torch": torch.__version__, "cpu": names["cpu"]}


def digests_of_line(values: Mapping[str, Any]) -> Digests:
    return Digests(values["weights"], values["outputs"], values["tensors"])


def last_line(directory: Path) -> dict[str, Any] | None:
    """Of the last change of a checkpoint, if there was one.

    Raises:
        UserError: it is not as it was written.
    """
    path = directory / CHANGES
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_bytes().splitlines()[-1])
        texts = [found["change"], found["task"], found["time"]]
        texts += [text for key in ("weights", "outputs", "tensors") for pair in found[key].items() for text in pair]
        assert all(isinstance(text, str) for text in texts)
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError, AssertionError):
        raise UserError(
            f"the last line of {path} is damaged: restore it, or name another run to compare with"
        ) from None
    return found


def _digest(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{list(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """How sums are split over threads would change their last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
