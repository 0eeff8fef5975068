"""A student in training: with the head of its task, and what compares it with its teacher."""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ufo_ds.distillation import losses
from ufo_ds.distillation.settings import Settings
from ufo_ds.distillation.teachers import Taught, Teachers
from ufo_ds.model.heads import BatchNormNeck, TaskHead
from ufo_ds.model.students import UfoStudentConfig, UfoStudentModel
from ufo_ds.recipe_task import Task

LOSSES = ("logits", "feature", "relation", "label")


class Trainee(nn.Module):
    """Pixels and what the teacher says of them to losses.

    The head is the one of the recipe, so that the loss of labels is what the teacher was trained by: BN neck,
    classifier, margins. Its neck and classifier become part of the student in the end, see :meth:`finished`; the
    classifier of a task that compares is for training alone.

    Args:
        num_classes: of the labels.
    """

    def __init__(self, student: UfoStudentModel, task: Task, num_classes: int, teachers: Teachers, settings: Settings):
        super().__init__()
        dim = student.config.embedding_size
        if student.classifier is not None:
            student.classifier.requires_grad_(False)  # the head's learns
        self.student, self.task, self.settings = student, task, settings
        self.head = TaskHead(task.head, dim, max(num_classes, 1), task.loss)
        generator = torch.Generator().manual_seed(settings.seed)
        with torch.no_grad():
            for name, parameter in self.head.named_parameters():
                if name.endswith("classifier.weight"):
                    parameter.normal_(0, dim**-0.5, generator=generator)
                else:
                    parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        learned = settings.label_weight > 0 or (settings.logits_weight > 0 and task.head.type == "linear")
        self.head.classifier.requires_grad_(learned)  # gradients are awaited of all that asks for one
        # Of one teacher the embedding is compared as it is, so that what is near to what carries over.
        width = sum(teachers.widths)
        needs = settings.feature_weight > 0 or (settings.logits_weight > 0 and task.head.type == "margin")
        self.to_teacher = nn.Linear(dim, width) if needs and width != dim else nn.Identity()
        self.register_buffer("cosines", teachers.classifier, persistent=False)
        self.cosines: Tensor | None
        self.scale = next((getattr(task.loss, name).scale or 1.0 for name in task.loss.given
                           if hasattr(getattr(task.loss, name), "scale")), 1.0)  # fmt: skip
        self.widths = teachers.widths

    def forward(self, pixels_BCHW: Tensor, labels_B: Tensor, taught: Taught, unit_BD: Tensor) -> Tensor:
        """
        Args:
            pixels_BCHW: normalised.
            labels_B: int64, negative where there is none.
            taught: what the teacher says of the samples; not looked at where nothing is learned from it.
            unit_BD: its features as :meth:`Teachers.unit` has them.

        Returns:
            :data:`LOSSES`, each the mean over samples, 0 of what is off; without weights.
        """
        feature_BD = self.student.embed(pixels_BCHW).float()
        zero = 0 * feature_BD.sum()
        found = dict.fromkeys(LOSSES, zero)
        embedding_BD = self.head.neck(feature_BD)
        if self.settings.label_weight:
            known = labels_B >= 0
            of_labels_K = self.head(feature_BD[known], labels_B[known], len(labels_B))
            found["label"] = of_labels_K.sum()
        projected_BD = self.to_teacher(embedding_BD)
        if self.settings.feature_weight:
            if self.settings.feature_loss == "mse":
                found["feature"] = losses.mean_squared_error(projected_BD, taught.features).mean()
            else:
                found["feature"] = losses.cosine(projected_BD, unit_BD).mean()
        if self.settings.relation_weight:
            found["relation"] = losses.relational_distance(embedding_BD, unit_BD).mean()
        if self.settings.logits_weight:
            found["logits"] = self._divergence(embedding_BD, projected_BD, taught, unit_BD).mean()
        return torch.stack([found[name] for name in LOSSES])

    def _divergence(self, embedding_BD: Tensor, projected_BD: Tensor, taught: Taught, unit_BD: Tensor) -> Tensor:
        """Of logits, without margins: of a task that compares, the cosines to the teacher's classes times the scale of
        its loss."""
        temperature = self.settings.temperature
        if self.task.head.type == "margin":
            assert self.cosines is not None
            parts = [F.normalize(part) for part in projected_BD.split(self.widths, 1)]
            student_BD = torch.cat(parts, 1) / len(parts) ** 0.5
            logits_BC, teacher_BC = (self.scale * F.linear(x_BD, self.cosines) for x_BD in (student_BD, unit_BD))
            return losses.symmetric_divergence(logits_BC, teacher_BC, temperature)
        logits_BC = self.head.classifier.logits(embedding_BD)
        divergence = losses.binary_symmetric_divergence if self.task.loss.multi_label else losses.symmetric_divergence
        return divergence(logits_BC, taught.logits, temperature)

    @torch.no_grad()
    def finished(self) -> UfoStudentModel:
        """The student as it is used: the neck folded into its projector, the classifier of a linear head behind it."""
        student = copy.deepcopy(self.student)
        neck, projector = self.head.neck, student.projector
        if isinstance(neck, BatchNormNeck):
            scale_D = torch.rsqrt(neck.running_var + neck.eps)
            if neck.weight is not None:
                scale_D = scale_D * neck.weight
            projector.weight.mul_(scale_D[:, None])
            projector.bias.copy_((projector.bias - neck.running_mean) * scale_D)
        if student.classifier is not None:
            student.classifier.load_state_dict(self.head.classifier.state_dict())
        return student.eval()


def new_student(
    backbone: str, width: float, task: Task, classes: list[str], embedding_size: int, seed: int
) -> UfoStudentModel:
    """With random weights, the same for the same seed.

    Raises:
        ValueError: it cannot take the task's images.
    """
    values: dict[str, Any] = {}
    if classes:
        values = {"id2label": dict(enumerate(classes)), "label2id": {name: i for i, name in enumerate(classes)}}
        if task.loss.multi_label:
            values["problem_type"] = "multi_label_classification"
    config = UfoStudentConfig(
        backbone=backbone, width=width, image_size=list(task.input), embedding_size=embedding_size,
        classify=bool(classes), **values,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UfoStudentModel(config)
