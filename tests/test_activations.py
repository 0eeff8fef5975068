"""Formulas of what is kept for the backward pass, against what autograd keeps."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from tests.distributed.equality import CLASSES, global_batch, make_recipe, start_value
from tests.distributed.test_equality import STEM, case
from ufo_ds.model import layers
from ufo_ds.model.spec import UNITS
from ufo_ds.model.supernet import Supernet, init_weights
from ufo_ds.subnets.activations import PRECISIONS, kept_by_head, kept_of_recomputed, kept_per_image

BACKBONE = {"dim": 64, "depth": 2, "heads": 4, "patch_size": 2}


@pytest.mark.parametrize(
    ("backbone", "precision", "recompute"),
    [
        (BACKBONE, "fp32", "none"),
        (BACKBONE, "bf16", "none"),
        ({**BACKBONE, **STEM, "patch_size": 8}, "fp32", "none"),
        (BACKBONE, "fp32", 2),
        (BACKBONE, "bf16", "full"),
        ({**BACKBONE, "heads": [6, 1], "head_dim": 20, "mlp_ratio": [1.5, 6]}, "fp32", "none"),
    ],
)
def test_as_autograd_keeps(backbone, precision, recompute, monkeypatch):
    """Everything but the parameters themselves, each memory once, in a forward pass of training."""
    monkeypatch.setattr(layers, "attend", F.scaled_dot_product_attention)  # as on GPUs, in bf16 too
    recipe = make_recipe(case(1, 3, routes="frozen", tasks=4, accumulation=1, backbone=backbone, recompute=recompute))
    tasks = [dataclasses.replace(task, routes={}) for task in recipe.tasks]  # all own
    recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, routes={}), tasks=tasks)
    with torch.device("meta"):
        model = Supernet(recipe, CLASSES)
    init_weights(model, pretrained=start_value)
    if precision == "bf16":
        for parameter in model.parameters():  # as DeepSpeed does, which leaves the buffers
            parameter.data = parameter.data.bfloat16()
    batch = global_batch(recipe, 0, 0, {task.name: 2 * task.samples_per_step for task in recipe.tasks}, CLASSES)
    kept: dict[int, int] = {}
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        losses = model.train()(batch)
    planned = 0
    for task in recipe.tasks:
        images = len(batch.tasks[task.name].images)
        per_image = kept_per_image(recipe, task.input, PRECISIONS[precision])
        again = recipe.model.recomputed_blocks
        planned += images * sum(
            nbytes for unit in UNITS for i, nbytes in enumerate(per_image[unit]) if unit == "embed" or i not in again
        )
        planned += images * len(again) * kept_of_recomputed(recipe, task.input, PRECISIONS[precision])
        planned += kept_by_head(
            task, model.recipe.model.backbone.dim, images, CLASSES[task.name], PRECISIONS[precision]
        )
    assert losses.requires_grad
    assert planned == pytest.approx(sum(kept.values()), rel=0.05)
