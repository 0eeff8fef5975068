"""One task of what was trained, ready to be used: an extracted model, or a path of a run's supernet as a dense model.

Both have the same fingerprint when they are the same model, so that an index or a calibration made with one serves the
other.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import ViTConfig

from ufo_ds import checkpoint
from ufo_ds.data.mixing import Batch
from ufo_ds.devices import check_device
from ufo_ds.errors import UserError
from ufo_ds.model.classifiers import CosineClassifier
from ufo_ds.model.dense import leading, vit_config
from ufo_ds.model.heads import Outputs
from ufo_ds.model.loading import spec_of
from ufo_ds.model.spec import SubnetSpec
from ufo_ds.recipe import Recipe, only
from ufo_ds.recipe_task import Size
from ufo_ds.subnets import recalibration
from ufo_ds.subnets.dense_model import DenseModel, architecture, is_dense_model
from ufo_ds.subnets.dense_network import with_weights
from ufo_ds.subnets.extraction import image_processor
from ufo_ds.subnets.image_network import ImageNetwork
from ufo_ds.subnets.onnx_model import OnnxModel, is_onnx_model
from ufo_ds.subnets.student_model import StudentModel, is_student
from ufo_ds.subnets.weights import state_of


@dataclass(frozen=True)
class TaskModel:
    """
    Attributes:
        name: where it is from, as a message or a file names it.
        recipe: restricted to the task.
        classes: names behind the logits, of a linear head; of a margin head none.
        fingerprint: sha256 of weights, architecture and preprocessing.
        calibration: where its calibration is kept, if it has one; see :mod:`ufo_ds.subnets.calibration`.
        network: uint8 [B, 3, H, W] to :class:`Outputs`.
        device: of the network.
    """

    name: str
    recipe: Recipe
    classes: list[str]
    fingerprint: str
    calibration: Path
    network: ImageNetwork
    device: str

    @property
    def task(self) -> str:
        return self.recipe.tasks[0].name

    @property
    def input(self) -> Size:
        """Height and width of images."""
        return self.recipe.tasks[0].input

    @torch.no_grad()
    def embed(self, images: Tensor, flip: bool = False) -> Outputs:
        """Run images.

        Args:
            images: uint8 [B, 3, H, W], as ``evaluation_transform`` makes them for :attr:`input`; on any device.
            flip: average the outputs with those of the mirror images, as a benchmark with ``flip`` does.

        Returns:
            Embeddings [B, D], not normalised, and logits [B, C]; fp32, on the host.
        """
        images = images.to(self.device)
        outputs = self.network(images)
        if flip:
            mirrored = self.network(images.flip(3))
            outputs = Outputs(*((one + other) / 2 for one, other in zip(outputs, mirrored, strict=True)))
        return Outputs(*(tensor.float().cpu() for tensor in outputs))

    def forward(self, batch: Batch) -> dict[str, Outputs]:
        """The task's part of a batch, as ``ufo_ds.evaluation.features.predict`` runs models."""
        return {self.task: self.embed(batch.tasks[self.task].images)}


def is_model(path: Path) -> bool:
    """Whether it is the directory of one task's model, and no run."""
    return is_dense_model(path) or is_onnx_model(path)  # a student's has a config.json as a dense model's has


def open_model(path: Path, task: str | None = None, device: str = "cpu") -> TaskModel:
    """Open a model directory of ``ufo extract``, ``distill`` or ``export``, or a task of a run directory (its best
    checkpoint) or checkpoint.

    Args:
        task: which of the run's tasks; may be left out where there is one.

    Raises:
        UserError: neither is there, files are missing or damaged, no such task, or no such device.
    """
    check_device(device)
    if is_model(path):
        model = _of_directory(path, device)
        if task not in (None, model.task):
            raise UserError(
                f"--task {task}: {path} is a model of task {model.task!r}: leave --task out or use that model"
            )
        return model
    if not (path / checkpoint.INDEX).is_file() and not checkpoint.find(path / "checkpoints"):
        raise UserError(f"{path} is neither a model nor a run directory with a checkpoint")
    reader = checkpoint.Reader(checkpoint.of_run(path))
    names = [t.name for t in reader.recipe.tasks]
    if task is None and len(names) > 1:
        raise UserError(f"{path} has the tasks {', '.join(names)}: choose one with --task")
    return task_model(reader, path, spec_of(reader, names[0] if task is None else task), device)


def _of_directory(path: Path, device: str) -> TaskModel:
    if is_onnx_model(path):
        exported = OnnxModel.load(path, device)
        return TaskModel(
            str(path), exported.recipe, exported.classes, exported.fingerprint, path / "calibration.json",
            exported.network, device,
        )  # fmt: skip
    if is_student(path):
        student = StudentModel.load(path, device)
        digest = _digest(student.architecture, student.state, student.recipe)
        return TaskModel(
            str(path), student.recipe, student.classes, digest, path / "calibration.json", student.network, device
        )
    dense = DenseModel.load(path, device)
    digest = fingerprint(dense.config, dense.state, dense.recipe)
    return TaskModel(str(path), dense.recipe, dense.classes, digest, path / "calibration.json", dense.network, device)


def task_model(
    reader: checkpoint.Reader, path: Path, spec: SubnetSpec, device: str = "cpu", pixels: Tensor | None = None
) -> TaskModel:
    """A path of a checkpoint. What is read is checked, the rest is not looked at.

    Args:
        path: the run directory or checkpoint, as it is called.
        pixels: training images for the statistics of its neck; see :func:`recalibration.statistics`.

    Raises:
        UserError: no such task or path, or what is read of it is damaged, or there are no images.
    """
    recipe = only(reader.recipe, [spec.task])
    state = state_of(reader, spec, recalibration.statistics(reader, spec, pixels, device))
    digest = fingerprint(vit_config(recipe, spec.task, spec.architecture), state, recipe)
    classes, cosines = [], None
    if recipe.tasks[0].head.type == "linear":
        classes = reader.index.classes[spec.task]
    elif not recipe.tasks[0].head.sharded:  # logits that no extracted model has
        cosines = CosineClassifier(spec.architecture.dim, len(reader.index.classes[spec.task]))
        weight_CD = reader.parameter(f"heads.{spec.task}.classifier.weight")
        cosines.weight = nn.Parameter(leading(weight_CD, None, spec.architecture.dim))
    network = with_weights(reader.recipe, spec, state, cosines).to(device)
    name = spec.task if spec == spec_of(reader, spec.task) else spec.name
    return TaskModel(
        f"{path} --task {name}", recipe, classes, digest, path / f"calibration-{name}.json", network, device
    )


def fingerprint(config: ViTConfig, state: Mapping[str, Tensor], recipe: Recipe) -> str:
    """sha256 of all that an embedding follows from: architecture, preprocessing and every weight, to the bit.

    Args:
        state: by the names in ``ViTModel``, and ``classifier.*``.
        recipe: of the one task.
    """
    return _digest(architecture(config), state, recipe)


def _digest(architecture: Mapping[str, Any], state: Mapping[str, Tensor], recipe: Recipe) -> str:
    values: dict[str, Any] = {
        "architecture": architecture,
        "preprocessing": json.loads(image_processor(recipe, recipe.tasks[0]).to_json_string()),
    }
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode())
    for name in sorted(state):
        value = state[name].detach().contiguous()
        digest.update(f"\n{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
