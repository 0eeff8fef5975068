"""An exported model as it lies in its directory, run by ONNX Runtime.

The graph is protobuf, not pickle, and nothing else in the directory is run; weights outside of the graph's file are
taken from files beside it alone.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ufo_ds import recipe_file
from ufo_ds.errors import UserError
from ufo_ds.model.heads import Outputs
from ufo_ds.recipe import Recipe
from ufo_ds.subnets import onnx_export
from ufo_ds.subnets.dense_model import PROCESSOR, check_preprocessing
from ufo_ds.subnets.extraction import RECIPE
from ufo_ds.subnets.image_network import ImageNetwork

GRAPH, CLASSES = "model.onnx", "classes.json"
EMBEDDING, LOGITS = "embedding", "logits"  # outputs


class OnnxNetwork(ImageNetwork):
    """Its outputs are on the host."""

    def __init__(self, recipe: Recipe, session: Any):
        super().__init__(recipe)
        self.session = session

    def normalize(self, images: Tensor) -> Tensor:
        return super().normalize(images.cpu())

    def of_pixels(self, pixels_BCHW: Tensor) -> Outputs:
        found = run(self.session, pixels_BCHW.numpy())
        return Outputs(*(torch.from_numpy(array) for array in found))


@dataclass(frozen=True)
class OnnxModel:
    """
    Attributes:
        recipe: of the task.
        network: in evaluation mode.
        classes: names behind the logits; none of a task that compares.
        fingerprint: sha256 of the graph with its weights, and of the preprocessing.
    """

    recipe: Recipe
    network: OnnxNetwork
    classes: list[str]
    fingerprint: str

    @classmethod
    def load(cls, path: Path, device: str = "cpu") -> "OnnxModel":
        """Load what ``ufo export`` wrote.

        Raises:
            UserError: a file is missing or damaged, or what they say does not go together, or a package is not here.
        """
        onnx_export.check_installed(str(path))
        onnx_export.check_provider(device)
        if not (path / RECIPE).is_file():
            raise UserError(f"{path} has no {RECIPE}, so its task is not known: make it again with `ufo export`")
        recipe = recipe_file.load(str(path / RECIPE))
        if len(recipe.tasks) != 1:
            raise UserError(f"{path / RECIPE} has {len(recipe.tasks)} tasks, a model has one: export it again")
        check_preprocessing(path, recipe)
        classes = _classes(path) if recipe.tasks[0].head.type == "linear" else []
        beside = _files_beside(path / GRAPH)
        try:
            session = onnx_export.session(path / GRAPH, device)
        except Exception as error:  # ONNX Runtime has a dozen of its own, without a base class
            raise UserError(f"{path / GRAPH} does not load: {_line(error)}: export it again") from None
        _check_shapes(path / GRAPH, session, recipe, classes)
        digest = hashlib.sha256((path / PROCESSOR).read_bytes())
        for file in [path / GRAPH, *beside]:
            with file.open("rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
        return cls(recipe, OnnxNetwork(recipe, session).eval(), classes, digest.hexdigest())


def is_onnx_model(path: Path) -> bool:
    return (path / GRAPH).is_file()


def run(session: Any, pixels_BCHW: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings [B, D] and logits [B, C], C = 0 without a classifier, of normalised pixels."""
    names = [output.name for output in session.get_outputs()]
    found = dict(zip(names, session.run(names, {onnx_export.PIXELS: pixels_BCHW}), strict=True))
    return found[EMBEDDING], found.get(LOGITS, found[EMBEDDING][:, :0])


def _classes(path: Path) -> list[str]:
    """
    Raises:
        UserError: they are missing, or no list of names.
    """
    try:
        names = json.loads((path / CLASSES).read_text())
        assert isinstance(names, list)
        assert all(isinstance(name, str) for name in names)
    except (OSError, ValueError, RecursionError, AssertionError):
        raise UserError(f"{path / CLASSES} is missing or no list of names: restore it or export again") from None
    return names


def _check_shapes(graph: Path, session: Any, recipe: Recipe, classes: list[str]) -> None:
    """
    Raises:
        UserError: inputs or outputs are not those of a model of the task.
    """
    task = recipe.tasks[0]
    found = {value.name: (value.type, value.shape[1:]) for value in (*session.get_inputs(), *session.get_outputs())}
    wanted: dict[str, list[Any]] = {
        onnx_export.PIXELS: [3, *task.input],
        **({LOGITS: [len(classes)]} if classes else {}),
    }
    width = found.get(EMBEDDING, ("", []))[1]
    wanted[EMBEDDING] = width if len(width) == 1 and isinstance(width[0], int) else ["D"]
    if found != {name: ("tensor(float)", shape) for name, shape in wanted.items()}:
        raise UserError(
            f"{graph} has {_values(found)}, a model of {task.name} has "
            f"{_values({name: ('tensor(float)', shape) for name, shape in wanted.items()})}: export it again"
        )


def _values(values: dict[str, tuple[str, list[Any]]]) -> str:
    return ", ".join(
        f"{name} {kind} [{', '.join(map(str, ['B', *shape]))}]" for name, (kind, shape) in sorted(values.items())
    )


def _files_beside(graph: Path) -> list[Path]:
    """Files of weights that a graph names.

    Raises:
        UserError: it is none, or one of them is elsewhere than beside it.
    """
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(graph, load_external_data=False)
    except (OSError, DecodeError, ValueError) as error:
        raise UserError(f"{graph} does not load: {_line(error)}: export it again") from None
    tensors = [*_tensors(model.graph)]
    for function in model.functions:
        tensors += [tensor for node in function.node for tensor in _tensors_of_node(node)]
    locations = [entry.value for tensor in tensors for entry in tensor.external_data if entry.key == "location"]
    names = dict.fromkeys(locations)
    for name in names:
        if Path(name).name != name or not (graph.parent / name).is_file():
            raise UserError(f"{graph} takes weights from {name!r}, which is no file beside it: export it again")
    return [graph.parent / name for name in names]


def _tensors(graph: Any) -> Iterator[Any]:
    """All constant tensors of a graph and of those within it."""
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        yield from _tensors_of_node(node)


def _tensors_of_node(node: Any) -> Iterator[Any]:
    for attribute in node.attribute:
        yield from (attribute.t, *attribute.tensors)
        for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
            yield from (sparse.values, sparse.indices)
        for graph in (attribute.g, *attribute.graphs):
            if graph.node or graph.initializer:
                yield from _tensors(graph)


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
