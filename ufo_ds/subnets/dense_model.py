"""An extracted model as it lies in its directory, taken from pixels to embeddings and logits.

Nothing in the directory is run or unpickled: weights are safetensors, classes those of transformers or
:mod:`ufo_ds.model.hub`.
"""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, ViTConfig
from transformers.utils import logging

from ufo_ds import recipe_file
from ufo_ds.errors import UserError
from ufo_ds.model.dense import vit_config
from ufo_ds.model.spec import SubnetSpec
from ufo_ds.recipe import Recipe
from ufo_ds.subnets.dense_network import DenseNetwork
from ufo_ds.subnets.extraction import RECIPE, SPEC, image_processor

CONFIG, PROCESSOR = "config.json", "preprocessor_config.json"
# What, beside the weights, the outputs follow from. Absent ones are None, and left out where most models lack them.
_ARCHITECTURE = (
    "model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act",
    "layer_norm_eps", "qkv_bias", "image_size", "patch_size", "num_channels", "pooler_act", "pooler_output_size",
    "stem", "pool",
)  # fmt: skip
_SELDOM = ("head_dim", "heads", "hidden")


def is_dense_model(path: Path) -> bool:
    return (path / CONFIG).is_file()


@dataclass(frozen=True)
class DenseModel:
    """
    Attributes:
        recipe: restricted to the model's task.
        spec: of its path in the supernet.
        config: of the architecture.
        state: weights by their names in ``ViTModel``, and ``classifier.*``; on the host.
        network: on the device, in evaluation mode.
        classes: names behind the logits; none without a classifier.
    """

    recipe: Recipe
    spec: SubnetSpec
    config: ViTConfig
    state: dict[str, Tensor]
    network: DenseNetwork
    classes: list[str]

    @classmethod
    def load(cls, path: Path, device: torch.device | str = "cpu") -> "DenseModel":
        """Load what ``ufo extract`` wrote.

        Raises:
            UserError: a file is missing or damaged, or what they say does not go together: preprocessing or
                architecture are not those of the task's recipe and the spec.
        """
        if not (path / RECIPE).is_file():
            raise UserError(f"{path} has no {RECIPE}, so its task is not known: extract it again with `ufo extract`")
        recipe = recipe_file.load(str(path / RECIPE))
        if len(recipe.tasks) != 1:
            raise UserError(f"{path / RECIPE} has {len(recipe.tasks)} tasks, a model has one: extract it again")
        spec = SubnetSpec.load(path / SPEC)
        if spec.task != recipe.tasks[0].name:
            raise UserError(
                f"{path / SPEC} is of task {spec.task!r}, {RECIPE} of {recipe.tasks[0].name!r}: extract it again"
            )
        check_preprocessing(path, recipe)
        try:
            with quiet():
                config = AutoConfig.from_pretrained(path, trust_remote_code=False)
                _check_architecture(path, recipe, spec, config)
                backbone = load_whole(AutoModel, path)
                linear = recipe.tasks[0].head.type == "linear"
                classifier = load_whole(AutoModelForImageClassification, path).classifier if linear else None
        except (OSError, ValueError, TypeError, RuntimeError, StrictDataclassError, SafetensorError) as error:
            raise UserError(f"{path} does not load: {str(error).splitlines()[0]}: extract it again") from None
        state = dict(backbone.state_dict())
        if classifier is not None:
            state |= {f"classifier.{name}": value for name, value in classifier.state_dict().items()}
        state = {name: value.cpu() for name, value in state.items()}
        classes = [config.id2label[label] for label in range(len(config.id2label))] if linear else []
        network = DenseNetwork(recipe, backbone, classifier).to(device).eval()
        return cls(recipe, spec, config, state, network, classes)


def architecture(config: ViTConfig) -> dict[str, Any]:
    """What the outputs follow from beside the weights, as plain values, the same for what makes no difference."""
    values = {name: getattr(config, name, None) for name in _ARCHITECTURE}
    size = values["image_size"]
    values["image_size"] = [size] * 2 if isinstance(size, int) else list(size or [])
    values["stem"] = list(values["stem"] or [])
    for name in _SELDOM:
        if value := getattr(config, name, None):
            values[name] = value if isinstance(value, int) else list(value)
    return values


def load_whole(auto: Any, path: Path) -> Any:
    """
    Raises:
        UserError: weights are missing, which transformers would draw at random.
    """
    model, info = auto.from_pretrained(
        path, output_loading_info=True, use_safetensors=True, trust_remote_code=False, local_files_only=True
    )
    missing = sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})
    if missing:
        raise UserError(f"{path} has no weights for {missing[0]} of its architecture: make it again")
    return model


def check_preprocessing(path: Path, recipe: Recipe) -> None:
    """
    Raises:
        UserError: the stock image processor would make other pixels than the task's.
    """
    try:
        stated = json.loads((path / PROCESSOR).read_text())
        assert isinstance(stated, dict)
    except (OSError, ValueError, RecursionError, AssertionError):
        raise UserError(f"{path / PROCESSOR} is missing or no image processor: make the model again") from None
    wanted = json.loads(image_processor(recipe, recipe.tasks[0]).to_json_string())
    for key in {**wanted, **stated}:
        if stated.get(key) != wanted.get(key):
            raise UserError(
                f"{path / PROCESSOR}: {key} is {stated.get(key)!r}, the task's recipe says {wanted.get(key)!r}: "
                "restore it or make the model again"
            )


def _check_architecture(path: Path, recipe: Recipe, spec: SubnetSpec, config: Any) -> None:
    """
    Raises:
        UserError: it is another one than the recipe's and the spec's.
    """
    stated, wanted = architecture(config), architecture(vit_config(recipe, spec.task, spec.architecture))
    for key in {**wanted, **stated}:
        if stated.get(key) != wanted.get(key):
            raise UserError(
                f"{path / CONFIG}: {key} is {stated.get(key)!r}, the task's recipe and {SPEC} say "
                f"{wanted.get(key)!r}: extract the model again"
            )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """transformers reports, as a warning, the half of the file that the other of two classes reads."""
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()
