"""A task's model as an ONNX file with what is needed to use it, and the certificate that it computes the same.

The directory holds ``model.onnx`` (normalised ``pixel_values`` [B, 3, H, W] to ``embedding`` [B, D] and, with classes,
``logits`` [B, C]; any B), the settings of the stock image processor that makes the pixels, the names of the classes,
the recipe of its task, benchmarks included, the spec of its path if it has one, and a model card. Its int8 version is a
directory of the same form in it.
"""

import copy
import io
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoImageProcessor

from ufo_ds.checkpoint import write_text
from ufo_ds.data.transforms import evaluation_transform
from ufo_ds.errors import UserError
from ufo_ds.model.heads import Outputs
from ufo_ds.recipe_file import to_yaml
from ufo_ds.subnets import onnx_export, quantization, timing
from ufo_ds.subnets.agreement import compare
from ufo_ds.subnets.dense_model import PROCESSOR
from ufo_ds.subnets.extraction import CERTIFICATE, RECIPE, SPEC, image_processor
from ufo_ds.subnets.latency import Target
from ufo_ds.subnets.onnx_model import CLASSES, EMBEDDING, GRAPH, LOGITS, run
from ufo_ds.subnets.task_model import TaskModel

BATCH_SIZES = range(1, 18)  # of the certificate
INT8 = "int8"
QUANTIZATION = "quantization.json"


def export(model: TaskModel, spec: str | None, out: Path) -> None:
    """Write the directory, but for the card.

    Args:
        spec: of its path in the supernet, as JSON.

    Raises:
        UserError: ``out`` exists or cannot be written.
    """
    if out.exists():
        raise UserError(f"--out {out} exists: choose another directory or delete it")
    unfinished = out.with_name(f".{out.name}.partial")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        names = [EMBEDDING, LOGITS] if model.classes else [EMBEDDING]
        onnx_export.export(OfPixels(model).eval(), torch.zeros(2, 3, *model.input), unfinished / GRAPH, names)
        image_processor(model.recipe, model.recipe.tasks[0]).save_pretrained(unfinished)
        write_text(unfinished / RECIPE, to_yaml(model.recipe))
        if model.classes:
            write_text(unfinished / CLASSES, json.dumps(model.classes, indent=1) + "\n")
        if spec is not None:
            write_text(unfinished / SPEC, spec)
        unfinished.rename(out)
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}: choose a directory with room that you can write to") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def export_int8(directory: Path, pixels_NCHW: Tensor) -> int:
    """Write :data:`INT8` into an exported directory, but for the card. Returns the number of layers in int8.

    Args:
        pixels_NCHW: normalised calibration images.

    Raises:
        UserError: it cannot be written.
    """
    out = directory / INT8
    try:
        out.mkdir()
        count = quantization.quantize(directory / GRAPH, out / GRAPH, pixels_NCHW)
        for name in (PROCESSOR, RECIPE, CLASSES, SPEC):
            if (directory / name).is_file():
                shutil.copyfile(directory / name, out / name)
    except OSError as error:
        raise UserError(f"{out}: {error.strerror}: give it room") from None
    return count


def size_of(directory: Path) -> int:
    """Bytes of the graph with its weights."""
    return sum(file.stat().st_size for file in directory.glob(f"{GRAPH}*"))


def calls(model: TaskModel, directories: Sequence[Path], target: Target) -> list[timing.Call]:
    """Of the model by torch, and of exported ones by ONNX Runtime, with the same pixels."""
    generator = torch.Generator().manual_seed(0)
    pixels_BCHW = torch.randn(target.batch_size, 3, *model.input, generator=generator)
    sessions = [onnx_export.session(directory / GRAPH, target.device, target.threads) for directory in directories]
    of_torch = timing.call_of_module(OfPixels(model).eval(), pixels_BCHW, replace(target, backend="torch"))
    return [of_torch, *(timing.call_of_session(session, pixels_BCHW, target) for session in sessions)]


class OfPixels(nn.Module):
    """What a model makes of normalised images [B, 3, H, W], as tensors alone."""

    def __init__(self, model: TaskModel):
        super().__init__()
        self.network, self.classify = model.network, bool(model.classes)

    def forward(self, pixels_BCHW: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        outputs = self.network.of_pixels(pixels_BCHW)
        return (outputs.embedding, outputs.logits) if self.classify else outputs.embedding


def verify(model: TaskModel, directory: Path, images: list[bytes]) -> dict[str, Any]:
    """Run image files through the directory's image processor and ONNX Runtime, in batches of every size of
    :data:`BATCH_SIZES`, and through the model that was exported; compare, as :mod:`agreement` says.

    The certificate beside the graph says what was found.

    Raises:
        UserError: other values or rank lists, or not at all comparable.
    """
    (directory / CERTIFICATE).unlink(missing_ok=True)  # one of earlier says nothing about what lies there now
    uint8 = torch.from_numpy(np.stack([evaluation_transform(image, model.input) for image in images]))
    with torch.no_grad():
        plain, exact = (_outputs(model, network, uint8) for network in (model.network, _double(model.network)))
    try:
        processor = AutoImageProcessor.from_pretrained(directory)
        opened = [Image.open(io.BytesIO(image)) for image in images]
        pixels_NCHW = processor(images=opened, return_tensors="np")["pixel_values"].astype(np.float32, copy=False)
        session = onnx_export.session(directory / GRAPH)
        batches = batches_of(len(images))
        found = [run(session, pixels_NCHW[batch]) for batch in batches]
    except Exception as error:  # ONNX Runtime has a dozen of its own, without a base class
        raise UserError(f"{directory} does not run: {(str(error).splitlines() or [type(error).__name__])[0]}") from None
    rows = Outputs(*(torch.from_numpy(np.concatenate(arrays)) for arrays in zip(*found, strict=True)))
    agreement = compare(rows, [i for batch in batches for i in batch], plain, exact)
    certificate = {
        "task": model.task,
        "of": model.name,
        "fingerprint": model.fingerprint,
        "images": len(images),
        "batch_sizes": [BATCH_SIZES[0], BATCH_SIZES[-1]],
        **asdict(agreement),
        "image_processor": type(processor).__name__,
        "passed": agreement.passed,
    }
    write_text(directory / CERTIFICATE, json.dumps(certificate, indent=2) + "\n")
    if not agreement.passed:
        raise UserError(
            f"{directory} differs from {model.name} by {agreement.fault}: its graph or its preprocessing are not those "
            "of the model"
        )
    return certificate


def batches_of(count: int) -> list[list[int]]:
    """Positions of so many images in batches of all sizes, again and again from the first image on, until each size and
    each image has been there."""
    batches: list[list[int]] = []
    start = 0
    while len(batches) < len(BATCH_SIZES) or start < count:
        size = BATCH_SIZES[len(batches) % len(BATCH_SIZES)]
        batches.append([(start + i) % count for i in range(size)])
        start += size
    return batches


def _double(network: nn.Module) -> nn.Module:
    return copy.deepcopy(network).double()


def _outputs(model: TaskModel, network: nn.Module, uint8: Tensor) -> Outputs:
    found = [network(images.to(model.device)) for images in uint8.split(BATCH_SIZES[-1])]
    embedding, logits = (torch.cat(tensors).cpu() for tensors in zip(*found, strict=True))
    return Outputs(embedding, logits if model.classes else embedding[:, :0])  # a run's margin head has cosines
