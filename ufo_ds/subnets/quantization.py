"""An exported graph with int8 weights and activations, by ONNX Runtime's static quantization (QDQ).

Convolutions and products with a weight matrix are computed in int8: weights with a scale for each output channel,
activations (uint8) with one scale and zero point a tensor, from the least and greatest value on calibration images. The
products come out in fp32, as is all that is between these layers: rounding what is added to the residual stream to 8
bits costs more accuracy than all else together. Products of two activations, in attention, stay in fp32 too, and so
does what follows the last block (pooler, neck, classifier): a neck that subtracts a large mean multiplies what rounding
does to it.
"""

import contextlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ufo_ds.data.image_files import Images, open_images
from ufo_ds.data.shard_specs import is_here
from ufo_ds.data.shards import ShardSet
from ufo_ds.data.source import open_sets
from ufo_ds.data.spaced_images import spaced_images
from ufo_ds.errors import UserError
from ufo_ds.recipe import Recipe
from ufo_ds.subnets import onnx_export

IMAGES = 256
BATCH = 32
LAYERS = ("Conv", "Gemm", "MatMul")


def quantize(graph: Path, out: Path, pixels_NCHW: Tensor) -> int:
    """Write the int8 graph. Returns the number of layers that are computed in int8.

    Args:
        pixels_NCHW: normalised calibration images.
    """
    import onnx
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    large = graph.with_name(f"{graph.name}.data").is_file()
    names = layers(onnx.load(graph, load_external_data=False).graph)
    with _quiet():
        quantize_static(
            graph,
            out,
            _Batches(pixels_NCHW),
            quant_format=QuantFormat.QDQ,
            nodes_to_quantize=names,
            op_types_to_quantize=list(LAYERS),
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
            use_external_data_format=large,
            extra_options={"OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"]},
        )
    return len(names)


def layers(graph: Any) -> list[str]:
    """Names of the nodes to compute in int8: those with a weight, but the last ones, which no other follows."""
    weights = {tensor.name for tensor in graph.initializer}
    nodes = [node for node in graph.node if node.op_type in LAYERS and not weights.isdisjoint(node.input)]
    names = {node.name for node in nodes}
    followed: set[str] = set()  # values from which a path leads to one of them
    for node in reversed(graph.node):  # which are in the order of computation
        if node.name in names or not followed.isdisjoint(node.output):
            followed.update(node.input)
    return [node.name for node in nodes if not followed.isdisjoint(node.output)]


def calibration_images(recipe: Recipe, source: str | None = None) -> Tensor:
    """Up to :data:`IMAGES` of the task's training images, evenly spaced, as evaluation sees them: uint8 [N, 3, H, W].

    Args:
        recipe: of the one task.
        source: shards or a folder of images to take instead.

    Raises:
        UserError: they are not here, or none can be read.
    """
    (task,) = recipe.tasks
    sets: Sequence[Images | ShardSet]
    if source is not None:
        sets = [open_images(source)]
    elif all(is_here(entry.shards) for entry in task.train) and task.train:
        sets = open_sets(task, recipe.data.shard_cache)
    else:
        where = ", ".join(entry.shards for entry in task.train) or "no train set"
        raise UserError(
            f"--int8 needs calibration images, and {where} is not here: give shards or a folder of such images with "
            "--calibration"
        )
    found = [image for image in spaced_images(sets, IMAGES, task.input) if image is not None]
    if not found:
        raise UserError(f"{source or task.train[0].shards}: no image can be read: give others with --calibration")
    return torch.from_numpy(np.stack(found))


class _Batches:
    """What ONNX Runtime calls a data reader: batches one after the other, then None."""

    def __init__(self, pixels_NCHW: Tensor):
        self._batches = iter(pixels_NCHW.split(BATCH))

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self._batches, None)
        return None if batch is None else {onnx_export.PIXELS: batch.numpy()}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """It advises, as a warning, to prepare the graph by a tool of its own."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)
