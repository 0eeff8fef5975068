"""The same weights by two naming schemes: one dense path of the supernet, and transformers' ``ViTModel`` (for what that
has not, blocks that differ, a stem or mean pooling, ``UfoViTModel``). Of a smaller path they are leading slices.

For retrieval the neck's batch norm becomes the stock pooler: a diagonal dense layer with a linear activation, so that
``pooler_output`` is the embedding. For classification the pooler is the identity.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, ViTConfig, ViTForImageClassification, ViTModel

from ufo_ds.model.architecture import Architecture
from ufo_ds.model.heads import BatchNormNeck
from ufo_ds.model.hub import UfoViTConfig, UfoViTForImageClassification, UfoViTModel
from ufo_ds.model.layers import resize_position
from ufo_ds.model.spec import SubnetSpec
from ufo_ds.recipe import Recipe
from ufo_ds.recipe_model import Backbone, stem_stride
from ufo_ds.recipe_task import Task

Read = Callable[[str], Tensor]  # a parameter or buffer of the supernet by its name


def is_stock(backbone: Backbone, architecture: Architecture) -> bool:
    """Whether ``ViTModel`` has room for it."""
    alike = len(set(zip(architecture.heads, architecture.hidden, strict=True))) == 1
    return alike and not architecture.stem and backbone.pool == "cls"


def path_names(spec: SubnetSpec) -> Iterator[tuple[str, str]]:
    """For every unit of a path: its name in the supernet and in ``ViTModel`` (attention is spread over four there)."""
    depth = spec.architecture.depth

    def copy_of(unit: str, layer: int) -> str:
        return "shared" if spec.routes[unit][layer] == "shared" else f"own.{spec.task}"

    yield f"embed.{copy_of('embed', 0)}", "embeddings"
    for i in range(depth):
        yield f"blocks.{i}.norm1.{copy_of('norm', i)}", f"layers.{i}.layernorm_before"
        yield f"blocks.{i}.attn.{copy_of('attn', i)}", f"layers.{i}.attention"
        yield f"blocks.{i}.norm2.{copy_of('norm', i)}", f"layers.{i}.layernorm_after"
        yield f"blocks.{i}.ffn.{copy_of('ffn', i)}", f"layers.{i}.mlp"
    yield f"norm.{copy_of('norm', depth)}", "layernorm"


def vit_config(recipe: Recipe, task: str, architecture: Architecture) -> ViTConfig:
    """The config of a task's dense model of these sizes: a ``ViTConfig`` or, where that is not stock, a
    ``UfoViTConfig``."""
    backbone = recipe.model.backbone
    height, width = next(t.input for t in recipe.tasks if t.name == task)
    values: dict[str, Any] = {
        "hidden_size": architecture.dim,
        "num_hidden_layers": architecture.depth,
        "num_attention_heads": max(architecture.heads),
        "intermediate_size": max(architecture.hidden),
        "layer_norm_eps": backbone.layer_norm_eps,
        "image_size": height if height == width else [height, width],
        "patch_size": backbone.patch_size,
        "pooler_act": "linear",
    }
    differ = len(set(architecture.heads)) > 1
    if differ or architecture.heads[0] * backbone.head_width != architecture.dim:
        values["head_dim"] = backbone.head_width
    if is_stock(backbone, architecture):
        return ViTConfig(**values)
    if differ:
        values["heads"] = architecture.heads
    if len(set(architecture.hidden)) > 1:
        values["hidden"] = architecture.hidden
    return UfoViTConfig(stem=architecture.stem, pool=backbone.pool, **values)


def network(recipe: Recipe, task: str, architecture: Architecture, classes: list[str] | None = None) -> PreTrainedModel:
    """A task's dense model of these sizes, with random weights: the backbone with its pooler or, with the names of
    ``classes``, the backbone with a classifier."""
    config: Any = vit_config(recipe, task, architecture)
    stock = is_stock(recipe.model.backbone, architecture)
    if classes is None:
        return ViTModel(config) if stock else UfoViTModel(config)
    config.id2label = dict(enumerate(classes))
    config.label2id = {name: label for label, name in enumerate(classes)}
    if next(t for t in recipe.tasks if t.name == task).loss.multi_label:
        config.problem_type = "multi_label_classification"
    return ViTForImageClassification(config) if stock else UfoViTForImageClassification(config)


def vit_weights(recipe: Recipe, spec: SubnetSpec, read: Read) -> Iterator[tuple[str, Tensor]]:
    """The state of the dense model for a path, one tensor after the other, each read when it is asked for."""
    backbone, architecture = recipe.model.backbone, spec.architecture
    task = next(t for t in recipe.tasks if t.name == spec.task)
    patch, dim = backbone.patch_size, architecture.dim
    to_hw = task.input[0] // patch, task.input[1] // patch
    for ours, theirs in path_names(spec):
        if theirs == "embeddings":
            base = task.input if ".own." in ours else recipe.model.input or recipe.tasks[0].input
            position_LD = leading(read(f"{ours}.position"), None, dim)
            if backbone.prefix:
                yield "embeddings.cls_token", leading(read(f"{ours}.cls"), None, dim)[None]
            yield (
                "embeddings.position_embeddings",
                resize_position(position_LD, (base[0] // patch, base[1] // patch), to_hw)[None],
            )
            channels = [3, *architecture.stem]
            for i, (before, after) in enumerate(pairwise(channels)):
                conv = leading(read(f"{ours}.stem.{i}.conv.weight"), after, before)
                yield f"embeddings.patch_embeddings.stem.{i}.conv.weight", conv
                for kind in ("weight", "bias"):
                    norm = leading(read(f"{ours}.stem.{i}.norm.{kind}"), after)
                    yield f"embeddings.patch_embeddings.stem.{i}.norm.{kind}", norm
            rest = patch // stem_stride(backbone.stem)
            projection = read(f"{ours}.patch.weight").unflatten(1, (-1, rest, rest))
            yield "embeddings.patch_embeddings.projection.weight", leading(projection, dim, channels[-1])
            yield "embeddings.patch_embeddings.projection.bias", leading(read(f"{ours}.patch.bias"), dim)
        elif theirs.endswith("attention"):
            rows = architecture.heads[int(theirs.split(".")[1])] * backbone.head_width
            for kind, columns in (("weight", [dim]), ("bias", [])):
                qkv = read(f"{ours}.qkv.{kind}").chunk(3)
                for name, value in zip(("q_proj", "k_proj", "v_proj"), qkv, strict=True):
                    yield f"{theirs}.{name}.{kind}", leading(value, rows, *columns)
            yield f"{theirs}.o_proj.weight", leading(read(f"{ours}.proj.weight"), dim, rows)
            yield f"{theirs}.o_proj.bias", leading(read(f"{ours}.proj.bias"), dim)
        elif theirs.endswith("mlp"):
            hidden = architecture.hidden[int(theirs.split(".")[1])]
            for name, into, of in (("fc1", hidden, dim), ("fc2", dim, hidden)):
                yield f"{theirs}.{name}.weight", leading(read(f"{ours}.{name}.weight"), into, of)
                yield f"{theirs}.{name}.bias", leading(read(f"{ours}.{name}.bias"), into)
        else:
            for kind in ("weight", "bias"):
                yield f"{theirs}.{kind}", leading(read(f"{ours}.{kind}"), dim)
    scale_D, shift_D = torch.ones(dim), torch.zeros(dim)
    if task.head.type == "margin" or task.head.neck:
        scale_D, shift_D = _neck(task, dim, read)
    yield "pooler.dense.weight", torch.diag(scale_D)
    yield "pooler.dense.bias", shift_D


def classifier_weights(task: Task, dim: int, read: Read) -> Iterator[tuple[str, Tensor]]:
    """Weight and bias of a linear head, as they follow the feature ``[B, dim]`` itself: a neck is folded in."""
    head = f"heads.{task.name}"
    weight_CD, bias_C = leading(read(f"{head}.classifier.weight"), None, dim), read(f"{head}.classifier.bias")
    if task.head.neck:
        scale_D, shift_D = _neck(task, dim, read)
        weight_CD, bias_C = weight_CD * scale_D, bias_C + weight_CD @ shift_D
    yield "classifier.weight", weight_CD
    yield "classifier.bias", bias_C


def leading(tensor: Tensor, *sizes: int | None) -> Tensor:
    """As many leading entries of its first axes, of None all; contiguous."""
    return tensor[tuple(slice(size) for size in sizes)].contiguous()


def _neck(task: Task, dim: int, read: Read) -> tuple[Tensor, Tensor]:
    """What the neck's batch norm multiplies by and adds in evaluation, of the first ``dim`` channels."""
    neck = f"heads.{task.name}.neck"
    scale_D = torch.rsqrt(leading(read(f"{neck}.running_var"), dim) + BatchNormNeck.eps)
    if task.head.type == "margin":
        scale_D = scale_D * leading(read(f"{neck}.weight"), dim)
    return scale_D, -scale_D * leading(read(f"{neck}.running_mean"), dim)
