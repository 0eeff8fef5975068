"""One model or several of a task as the teacher of a smaller one.

Several count as one: the cosine of two images is the mean of the teachers' cosines, as their features of length 1 are
put side by side (their coordinates have nothing in common that could be averaged); logits are the logarithm of the mean
probability (Hinton et al., 2015, section 1), cosines to classes the mean of theirs.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ufo_ds.errors import UserError
from ufo_ds.model.classifiers import CosineClassifier
from ufo_ds.recipe import Recipe
from ufo_ds.subnets.task_model import TaskModel, open_model


class Taught(NamedTuple):
    """What teachers say of images: features [B, D], as they are, and logits [B, C], C = 0 of a task that compares."""

    features: Tensor
    logits: Tensor


class Teachers:
    """
    Attributes:
        recipe: of the task, from the first one.
        widths: of their embeddings; D is the sum.
        classifier: [C, D] of a task that compares, whose product with :meth:`unit` features are cosines to its classes;
            None where a teacher has none, as an extracted model.
    """

    def __init__(self, models: Sequence[TaskModel]):
        """
        Raises:
            UserError: they differ in task, input or classes.
        """
        first, *others = models
        for other in others:
            for what, one, another in (
                ("task", first.task, other.task),
                ("input", list(first.input), list(other.input)),
                ("classes", first.classes, other.classes),
                ("head", first.recipe.tasks[0].head.type, other.recipe.tasks[0].head.type),
            ):
                if one != another:
                    raise UserError(f"teachers differ in {what}: {one} of {first.name}, {another} of {other.name}")
        self.models, self.recipe, self.classes = list(models), first.recipe, first.classes
        blank = torch.zeros(1, 3, *first.input, dtype=torch.uint8)
        self.widths = [model.embed(blank).embedding.shape[1] for model in models]
        weights = [_cosine_weights(model) for model in models]
        self.classifier: Tensor | None = None
        if len({None if weight is None else len(weight) for weight in weights} - {None}) > 1:
            raise UserError(
                f"teachers differ in classes: {', '.join(str(len(w)) for w in weights if w is not None)} identities: "
                "give extracted models, whose classifiers are not there, or teachers of the same training data"
            )
        found = [weight for weight in weights if weight is not None]
        if len(found) == len(models):
            self.classifier = torch.cat([F.normalize(weight) for weight in found], 1) / math.sqrt(len(models))

    def of(self, images: Tensor) -> Taught:
        """
        Args:
            images: uint8 [B, 3, H, W].
        """
        outputs = [model.embed(images) for model in self.models]
        features_BD = torch.cat([output.embedding for output in outputs], 1)
        if not self.classes:
            return Taught(features_BD, features_BD[:, :0])
        return Taught(features_BD, combined([o.logits for o in outputs], self.recipe.tasks[0].loss.multi_label))

    def unit(self, features_BD: Tensor) -> Tensor:
        """Features whose products are the means of the teachers' cosines."""
        parts = [F.normalize(part) for part in features_BD.split(self.widths, 1)]
        return torch.cat(parts, 1) / math.sqrt(len(parts))

    @property
    def name(self) -> str:
        return " + ".join(model.name for model in self.models)

    @property
    def parameters(self) -> int:
        """Of all of them, those that an image's embedding and logits of known classes follow from."""
        return sum(
            parameter.numel()
            for model in self.models
            for name, parameter in model.network.named_parameters()
            if not name.startswith("cosines.")
        )


def combined(logits: Sequence[Tensor], multi_label: bool) -> Tensor:
    """Logits of the mean probabilities of several models: of the softmax, or with ``multi_label`` of each sigmoid."""
    if len(logits) == 1:
        return logits[0]
    stacked_TBC = torch.stack(list(logits)).double()
    if multi_label:
        yes_BC, no_BC = (F.logsigmoid(sign * stacked_TBC).logsumexp(0) for sign in (1, -1))
        return (yes_BC - no_BC).float()
    return (stacked_TBC.log_softmax(2).logsumexp(0) - math.log(len(logits))).float()


def open_teachers(paths: Sequence[Path], task: str | None, device: str) -> Teachers:
    """
    Raises:
        UserError: one cannot be opened, or they do not go together.
    """
    return Teachers([open_model(path, task, device) for path in paths])


def _cosine_weights(model: TaskModel) -> Tensor | None:
    cosines = getattr(model.network, "cosines", None)
    return cosines.weight.detach().float().cpu() if isinstance(cosines, CosineClassifier) else None


def key_of(recipe: Recipe) -> dict[str, object]:
    """What pixels of views follow from beside the images."""
    from ufo_ds.recipe_file import dump

    task = dump(recipe)["tasks"][0]
    return {"task": task["name"], "input": task["input"], "augment": task["augment"], "turns": task["quarter_turns"],
            "seed": recipe.seed}  # fmt: skip
