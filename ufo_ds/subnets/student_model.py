"""A student as it lies in its directory, taken from pixels to embeddings and logits: see :mod:`ufo_ds.model.students`.

Nothing in the directory is run or unpickled.
"""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModel

from ufo_ds import recipe_file
from ufo_ds.errors import UserError
from ufo_ds.model.heads import Outputs
from ufo_ds.model.students import UfoStudentConfig, UfoStudentModel
from ufo_ds.recipe import Recipe
from ufo_ds.subnets.dense_model import CONFIG, check_preprocessing, load_whole, quiet
from ufo_ds.subnets.extraction import RECIPE
from ufo_ds.subnets.image_network import ImageNetwork

WEIGHTS = "model.safetensors"


class StudentNetwork(ImageNetwork):
    """Logits are there of a student with classes."""

    def __init__(self, recipe: Recipe, student: UfoStudentModel):
        super().__init__(recipe)
        self.student = student

    def of_pixels(self, pixels_BCHW: Tensor) -> Outputs:
        outputs = self.student(pixels_BCHW)
        embedding_BD = outputs.pooler_output.float()
        return Outputs(embedding_BD, embedding_BD[:, :0] if outputs.logits is None else outputs.logits.float())


@dataclass(frozen=True)
class StudentModel:
    """
    Attributes:
        recipe: of the task.
        state: weights by their names; on the host.
        network: on the device, in evaluation mode.
        classes: names behind the logits; none of a task that compares.
    """

    recipe: Recipe
    state: dict[str, Tensor]
    network: StudentNetwork
    classes: list[str]

    @classmethod
    def load(cls, path: Path, device: torch.device | str = "cpu") -> "StudentModel":
        """Load what ``ufo distill`` wrote.

        Raises:
            UserError: a file is missing or damaged, or what they say does not go together.
        """
        if not (path / RECIPE).is_file():
            raise UserError(f"{path} has no {RECIPE}, so its task is not known: make it again with `ufo distill`")
        recipe = recipe_file.load(str(path / RECIPE))
        if len(recipe.tasks) != 1:
            raise UserError(f"{path / RECIPE} has {len(recipe.tasks)} tasks, a student has one: make it again")
        check_preprocessing(path, recipe)
        task = recipe.tasks[0]
        try:
            with quiet():
                config = AutoConfig.from_pretrained(path, trust_remote_code=False)
                for key, stated, wanted in (
                    ("image_size", list(config.image_size), list(task.input)),
                    ("classify", config.classify, task.head.type == "linear"),
                ):
                    if stated != wanted:
                        raise UserError(
                            f"{path / CONFIG}: {key} is {stated!r}, the task's recipe says {wanted!r}: restore it or "
                            "make the student again"
                        )
                _check_shapes(path, config)
                student = load_whole(AutoModel, path)
        except (
            OSError,
            ValueError,
            TypeError,
            RuntimeError,
            OverflowError,
            StrictDataclassError,
            SafetensorError,
        ) as error:
            raise UserError(f"{path} does not load: {str(error).splitlines()[0]}: make it again") from None
        classes = [config.id2label[label] for label in range(len(config.id2label))] if config.classify else []
        state = {name: value.detach().cpu() for name, value in student.state_dict().items()}
        return cls(recipe, state, StudentNetwork(recipe, student).to(device).eval(), classes)

    @property
    def architecture(self) -> dict[str, Any]:
        """What the outputs follow from beside the weights, as plain values."""
        config = self.network.student.config
        return {
            "model_type": config.model_type, "backbone": config.backbone, "width": config.width,
            "image_size": list(config.image_size), "embedding_size": config.embedding_size,
            "classify": config.classify,
        }  # fmt: skip


def _check_shapes(path: Path, config: UfoStudentConfig) -> None:
    """Before anything of the sizes in a config is made: they are those of the weights.

    Raises:
        UserError: they are not.
    """
    # By their shapes alone: transformers writes some of its own models' weights under other names.
    with torch.device("meta"):
        wanted = Counter(tuple(value.shape) for value in UfoStudentModel(config).state_dict().values())
    with safe_open(path / WEIGHTS, framework="pt") as file:
        found = Counter(tuple(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    for shape in wanted:
        if wanted[shape] != found[shape]:
            raise UserError(
                f"{path / CONFIG}: its sizes give {wanted[shape]} tensors {list(shape)}, {WEIGHTS} has {found[shape]}: "
                "restore it or make the student again"
            )


def is_student(path: Path) -> bool:
    """Whether it is the directory of a student; its config need not be a whole one."""
    try:
        return json.loads((path / CONFIG).read_text()).get("model_type") == UfoStudentConfig.model_type
    except (OSError, ValueError, AttributeError):
        return False
