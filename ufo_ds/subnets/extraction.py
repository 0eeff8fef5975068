"""One path of a checkpoint as a dense Hugging Face model, and the certificate that it computes the same.

The directory holds a ``ViTModel`` (embedding in ``pooler_output``) or, for a classification task,
``ViTForImageClassification``, with the settings of its image processor, a model card, the spec of the path and the
recipe of its task, benchmarks included; no code.
What these have no room for, blocks that differ, a stem or mean pooling, is a ``UfoViTModel`` or
``UfoViTForImageClassification``: they load after ``import ufo_ds.model.hub``.
"""

import io
import json
import shutil
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification, ViTImageProcessorPil

from ufo_ds.checkpoint import Reader, write_tensors, write_text
from ufo_ds.data.mixing import Batch, TaskBatch
from ufo_ds.data.transforms import evaluation_transform
from ufo_ds.errors import UserError
from ufo_ds.model.dense import is_stock, network
from ufo_ds.model.heads import Outputs
from ufo_ds.model.loading import check_path, load_supernet
from ufo_ds.model.spec import SubnetSpec
from ufo_ds.recipe import Recipe, only
from ufo_ds.recipe_file import to_yaml
from ufo_ds.recipe_task import Task
from ufo_ds.subnets import recalibration
from ufo_ds.subnets.agreement import compare
from ufo_ds.subnets.model_card import HUB, model_card
from ufo_ds.subnets.weights import Statistics, path_weights, read, shape_of

CERTIFICATE = "certificate.json"
RECIPE = "recipe.yaml"
SPEC = "spec.json"


def extract(reader: Reader, spec: SubnetSpec, out: Path, statistics: Statistics | None = None) -> int:
    """Write the dense model of a path. Only its parameters are read, each when it is written, so that no more than one
    is in memory. Returns their number.

    Args:
        statistics: of the neck, as :func:`recalibration.statistics` finds them; default: found here.

    Raises:
        UserError: ``out`` exists, or the path does not fit the model, or what is read is damaged, or the statistics of
            the neck have to be found and there are no images.
    """
    recipe = reader.recipe
    task = _task(recipe, spec.task)
    check_path(reader, spec)
    if out.exists():
        raise UserError(f"--out {out} exists: choose another directory or delete it")
    if statistics is None:
        statistics = recalibration.statistics(reader, spec)
    with torch.device("meta"):
        classes = reader.index.classes[spec.task] if task.head.type == "linear" else None
        model = network(recipe, spec.task, spec.architecture, classes)
    # The pooler of a classification model is not part of its class, but of the AutoModel in the same directory.
    prefix = "vit." if task.head.type == "linear" else ""
    shapes = {
        name if name.startswith("classifier.") else f"{prefix}{name}": value.shape
        for name, value in path_weights(recipe, spec, partial(shape_of, reader))
    }
    missing = set(model.state_dict()) - set(shapes)
    assert not missing, missing
    config = model.config
    config.architectures, config.dtype = [type(model).__name__], "float32"
    unfinished = out.with_name(f".{out.name}.partial")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        config.save_pretrained(unfinished)
        tensors = (value for _, value in path_weights(recipe, spec, partial(read, reader, statistics)))
        write_tensors(unfinished / "model.safetensors", shapes, tensors, {"format": "pt"})
        image_processor(recipe, task).save_pretrained(unfinished)
        write_text(unfinished / SPEC, spec.to_json() + "\n")
        write_text(unfinished / RECIPE, to_yaml(only(recipe, [spec.task])))
        parameters = sum(shape.numel() for shape in shapes.values())
        write_text(unfinished / "README.md", model_card(reader, spec, parameters, recalibrated=bool(statistics)))
        unfinished.rename(out)
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}: choose a directory with room that you can write to") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return parameters


def image_processor(recipe: Recipe, task: Task) -> ViTImageProcessorPil:
    """Preprocessing of a task's benchmarks, as transformers does it."""
    return ViTImageProcessorPil(
        size={"height": task.input[0], "width": task.input[1]},
        resample=Image.Resampling.BILINEAR,
        image_mean=list(recipe.data.mean),
        image_std=list(recipe.data.std),
        do_convert_rgb=True,
    )


def verify(
    reader: Reader, spec: SubnetSpec, directory: Path, images: list[bytes], statistics: Statistics | None = None
) -> dict[str, float | int | str]:
    """Run image files through AutoImageProcessor and the extracted model, and through the supernet; compare, as
    :mod:`agreement` says. For the ``statistics`` see :func:`extract`.

    The certificate beside the model says by how much they differ at most, relative to the largest output, and that they
    give the same rank lists.

    Raises:
        UserError: other values or rank lists, or not at all comparable.
    """
    task = _task(reader.recipe, spec.task)
    (directory / CERTIFICATE).unlink(missing_ok=True)  # one of earlier says nothing about what lies there now
    supernet = load_supernet(reader, [spec])
    if statistics is None:
        statistics = recalibration.statistics(reader, spec)
    for name, value in statistics.items():
        supernet.get_buffer(name)[: len(value)] = value
    uint8 = torch.from_numpy(np.stack([evaluation_transform(image, task.input) for image in images]))
    empty = torch.zeros(len(uint8), dtype=torch.int64)
    batch = Batch(0, 0, {task.name: TaskBatch(uint8, empty, range(len(uint8)), len(uint8))}, {})
    with torch.no_grad():
        plain, exact = supernet(batch)[task.name], supernet.double()(batch)[task.name]
    linear = task.head.type == "linear"
    if not linear:  # those of the extracted model are none
        plain, exact = (Outputs(outputs.embedding, outputs.embedding[:, :0]) for outputs in (plain, exact))
    try:
        processor, found = _run_extracted(directory, images, linear)
    except (OSError, ValueError, RuntimeError, StrictDataclassError) as error:
        raise UserError(f"{directory} does not run: {str(error).splitlines()[0]}") from None
    agreement = compare(found, range(len(images)), plain, exact)
    certificate: dict[str, float | int | str] = {
        "task": task.name,
        "spec": spec.name,
        "step": reader.index.step,
        "images": len(images),
        **asdict(agreement),
        "image_processor": processor,
        "loaded_by": "transformers"
        if is_stock(reader.recipe.model.backbone, spec.architecture)
        else f"transformers and {HUB}",
        "passed": agreement.passed,
    }
    write_text(directory / CERTIFICATE, json.dumps(certificate, indent=2) + "\n")
    if not agreement.passed:
        raise UserError(
            f"{directory} differs from the supernet by {agreement.fault}: its weights or its preprocessing are not "
            "those of the run"
        )
    return certificate


def _run_extracted(directory: Path, images: list[bytes], classify: bool) -> tuple[str, Outputs]:
    """Image files through what is in the directory, by transformers alone, or for what is not stock with
    :mod:`ufo_ds.model.hub` imported: embeddings, and logits to classify."""
    processor = AutoImageProcessor.from_pretrained(directory)
    pixels = processor(images=[Image.open(io.BytesIO(image)) for image in images], return_tensors="pt").pixel_values
    with torch.no_grad():
        embedding = AutoModel.from_pretrained(directory).eval()(pixels).pooler_output
        logits = embedding[:, :0]
        if classify:
            logits = AutoModelForImageClassification.from_pretrained(directory).eval()(pixels).logits
    return type(processor).__name__, Outputs(embedding, logits)


def _task(recipe: Recipe, name: str) -> Task:
    found = [task for task in recipe.tasks if task.name == name]
    if not found:
        raise UserError(f"no task {name!r} in {recipe.name}; it has {', '.join(t.name for t in recipe.tasks)}")
    return found[0]
