"""The same weights by two naming schemes: one dense path of the supernet, and transformers' ``ViTModel`` (for what that
has not, a stem or mean pooling, ``UfoViTModel``).

For retrieval the neck's batch norm becomes the stock pooler: a diagonal dense layer with a linear activation, so that
``pooler_output`` is the embedding. For classification the pooler is the identity.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import ViTConfig

from ufo_ds.model.heads import BatchNormNeck
from ufo_ds.model.hub import UfoViTConfig
from ufo_ds.model.layers import resize_position
from ufo_ds.model.spec import SubnetSpec
from ufo_ds.recipe import Recipe
from ufo_ds.recipe_model import Backbone, stem_stride
from ufo_ds.recipe_task import Task

Read = Callable[[str], Tensor]  # a parameter or buffer of the supernet by its name


def is_stock(backbone: Backbone) -> bool:
    """Whether ``ViTModel`` has room for it."""
    return not backbone.stem and backbone.pool == "cls"


def path_names(spec: SubnetSpec, depth: int) -> Iterator[tuple[str, str]]:
    """For every unit of a path: its name in the supernet and in ``ViTModel`` (attention is spread over four there)."""

    def copy_of(unit: str, layer: int) -> str:
        return "shared" if spec.routes[unit][layer] == "shared" else f"own.{spec.task}"

    yield f"embed.{copy_of('embed', 0)}", "embeddings"
    for i in range(depth):
        yield f"blocks.{i}.norm1.{copy_of('norm', i)}", f"layers.{i}.layernorm_before"
        yield f"blocks.{i}.attn.{copy_of('attn', i)}", f"layers.{i}.attention"
        yield f"blocks.{i}.norm2.{copy_of('norm', i)}", f"layers.{i}.layernorm_after"
        yield f"blocks.{i}.ffn.{copy_of('ffn', i)}", f"layers.{i}.mlp"
    yield f"norm.{copy_of('norm', depth)}", "layernorm"


def vit_config(recipe: Recipe, task: str) -> ViTConfig:
    """The config of a task's dense model: a ``ViTConfig`` or, where the backbone is not stock, a ``UfoViTConfig``."""
    backbone = recipe.model.backbone
    height, width = next(t.input for t in recipe.tasks if t.name == task)
    values: dict[str, Any] = {
        "hidden_size": backbone.dim,
        "num_hidden_layers": backbone.depth,
        "num_attention_heads": backbone.heads_L[0],
        "intermediate_size": backbone.hidden_L[0],
        "layer_norm_eps": backbone.layer_norm_eps,
        "image_size": height if height == width else [height, width],
        "patch_size": backbone.patch_size,
        "pooler_act": "linear",
    }
    if is_stock(backbone):
        return ViTConfig(**values)
    return UfoViTConfig(stem=backbone.stem, pool=backbone.pool, **values)


def vit_weights(recipe: Recipe, spec: SubnetSpec, read: Read) -> Iterator[tuple[str, Tensor]]:
    """The state of the dense model for a path, one tensor after the other, each read when it is asked for."""
    backbone = recipe.model.backbone
    task = next(t for t in recipe.tasks if t.name == spec.task)
    patch, dim = backbone.patch_size, backbone.dim
    to_hw = task.input[0] // patch, task.input[1] // patch
    for ours, theirs in path_names(spec, backbone.depth):
        if theirs == "embeddings":
            base = task.input if ".own." in ours else recipe.model.input or recipe.tasks[0].input
            position = resize_position(read(f"{ours}.position"), (base[0] // patch, base[1] // patch), to_hw)
            if backbone.prefix:
                yield "embeddings.cls_token", read(f"{ours}.cls")[None]
            yield "embeddings.position_embeddings", position[None]
            embeddings, rest = "embeddings.patch_embeddings", patch // stem_stride(backbone.stem)
            for i in range(len(backbone.stem)):
                for name in ("conv.weight", "norm.weight", "norm.bias"):
                    yield f"{embeddings}.stem.{i}.{name}", read(f"{ours}.stem.{i}.{name}")
            yield f"{embeddings}.projection.weight", read(f"{ours}.patch.weight").view(dim, -1, rest, rest)
            yield f"{embeddings}.projection.bias", read(f"{ours}.patch.bias")
        elif theirs.endswith("attention"):
            for kind in ("weight", "bias"):
                qkv = read(f"{ours}.qkv.{kind}").chunk(3)
                for name, value in zip(("q_proj", "k_proj", "v_proj"), qkv, strict=True):
                    yield f"{theirs}.{name}.{kind}", value
                yield f"{theirs}.o_proj.{kind}", read(f"{ours}.proj.{kind}")
        elif theirs.endswith("mlp"):
            for name in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"):
                yield f"{theirs}.{name}", read(f"{ours}.{name}")
        else:
            for kind in ("weight", "bias"):
                yield f"{theirs}.{kind}", read(f"{ours}.{kind}")
    scale_D, shift_D = torch.ones(dim), torch.zeros(dim)
    if task.head.type == "margin" or task.head.neck:
        scale_D, shift_D = _neck(task, read)
    yield "pooler.dense.weight", torch.diag(scale_D)
    yield "pooler.dense.bias", shift_D


def classifier_weights(task: Task, read: Read) -> Iterator[tuple[str, Tensor]]:
    """Weight and bias of a linear head, as they follow the feature itself: a neck is folded in."""
    head = f"heads.{task.name}"
    weight_CD, bias_C = read(f"{head}.classifier.weight"), read(f"{head}.classifier.bias")
    if task.head.neck:
        scale_D, shift_D = _neck(task, read)
        weight_CD, bias_C = weight_CD * scale_D, bias_C + weight_CD @ shift_D
    yield "classifier.weight", weight_CD
    yield "classifier.bias", bias_C


def _neck(task: Task, read: Read) -> tuple[Tensor, Tensor]:
    """What the neck's batch norm multiplies by and adds in evaluation."""
    neck = f"heads.{task.name}.neck"
    scale_D = torch.rsqrt(read(f"{neck}.running_var") + BatchNormNeck.eps)
    if task.head.type == "margin":
        scale_D = scale_D * read(f"{neck}.weight")
    return scale_D, -scale_D * read(f"{neck}.running_mean")
