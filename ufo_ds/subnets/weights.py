"""Weights of a path of a checkpoint, by the names that they have in its dense model."""

from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from ufo_ds.checkpoint import Reader
from ufo_ds.model.dense import Read, classifier_weights, vit_weights
from ufo_ds.model.loading import check_path
from ufo_ds.model.spec import SubnetSpec
from ufo_ds.recipe import Recipe

Statistics = Mapping[str, Tensor]  # of a neck, by their names in the supernet; in place of those in the checkpoint
NONE: Statistics = {}


def state_of(reader: Reader, spec: SubnetSpec, statistics: Statistics = NONE) -> dict[str, Tensor]:
    """Weights of a path by their names in ``ViTModel``, and ``classifier.*`` of a linear head; the rest is not read.

    Raises:
        UserError: the path does not fit the model.
    """
    check_path(reader, spec)
    return dict(path_weights(reader.recipe, spec, partial(read, reader, statistics)))


def path_weights(recipe: Recipe, spec: SubnetSpec, read: Read) -> Iterator[tuple[str, Tensor]]:
    """The same, one after the other, each read when it is asked for."""
    yield from vit_weights(recipe, spec, read)
    task = next(task for task in recipe.tasks if task.name == spec.task)
    if task.head.type == "linear":
        yield from classifier_weights(task, spec.architecture.dim, read)


def read(reader: Reader, statistics: Statistics, name: str) -> Tensor:
    """A parameter or buffer of the supernet."""
    if name in statistics:
        return statistics[name]
    return reader.buffer(name) if name in reader.index.buffers else reader.parameter(name)


def shape_of(reader: Reader, name: str) -> Tensor:
    """The same on the meta device, without reading a parameter."""
    if name in reader.index.buffers:
        return reader.buffer(name).to("meta")
    return torch.empty(reader.index.parameters[name].shape, device="meta")
