"""Initial values from a Hugging Face ViT, one that ``ufo extract`` wrote too, read from its safetensors files by range:
a process reads what it keeps."""

import json
import re
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import ViTConfig
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from ufo_ds import recipe_file
from ufo_ds.errors import UserError
from ufo_ds.model.heads import BatchNormNeck
from ufo_ds.model.hub import UfoViTConfig
from ufo_ds.model.initialization import Start
from ufo_ds.model.layers import resize_position
from ufo_ds.model.starting import check_equal, one_or_all, sizes_of
from ufo_ds.recipe import Recipe
from ufo_ds.recipe_model import Backbone, stem_stride
from ufo_ds.recipe_task import Task

RECIPE = "recipe.yaml"  # what `ufo extract` writes beside a model, of its task

# Names in files, which are those of transformers 4, and of models with a head behind the ViT -> those of ``ViTModel``.
_RENAMED = [
    (r"^vit\.", ""),
    (r"^encoder\.layer\.", "layers."),
    (r"\.attention\.attention\.(q|k|v)(?:uery|ey|alue)\.", r".attention.\1_proj."),
    (r"\.attention\.output\.dense\.", ".attention.o_proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"^(layers\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
]


def vit_start(recipe: Recipe, num_classes: Mapping[str, int]) -> Start:
    """Start from the ViT that ``model.init`` names, its units copied into the shared and all own copies; position
    embeddings are resized to each copy's grid.

    Of a model of ``ufo extract`` also the head, if the recipe has a task of the same name: what follows the feature is
    then the same. The classifier of a margin head is not there, and drawn; so are all heads otherwise, and the router.

    Args:
        num_classes: of every task's head.

    Raises:
        UserError: it cannot be loaded, or is of another size or kind.
    """
    source, backbone = recipe.model.init, recipe.model.backbone
    assert source is not None
    config, checkpoint = _open(source)
    check_equal(recipe, _sizes_of(config), sizes_of(backbone), "model.backbone")
    size = [config.image_size] * 2 if isinstance(config.image_size, int) else config.image_size
    grid = size[0] // backbone.patch_size, size[1] // backbone.patch_size
    checkpoint.check(source, dict(_needed(backbone, grid)))
    head = _head(recipe, config, checkpoint, num_classes)
    inputs = {"embed.shared": recipe.model.input or recipe.tasks[0].input}
    inputs |= {f"embed.own.{task.name}": task.input for task in recipe.tasks}
    grids = {unit: (h // backbone.patch_size, w // backbone.patch_size) for unit, (h, w) in inputs.items()}

    def values(name: str, shape: torch.Size, span: range) -> Tensor | None:
        parts = name.split(".")
        if parts[0] == "heads":
            return head.values(name, span) if head is not None and parts[1] == head.task else None
        if parts[0] == "router":
            return None
        unit = parts[2] if parts[0] == "blocks" else parts[0]
        layer = f"layers.{parts[1]}." if parts[0] == "blocks" else ""
        last, kind = parts[-2], parts[-1]
        if unit == "embed":
            if kind == "cls":
                return checkpoint.elements("embeddings.cls_token", span)
            if kind == "position":
                to_hw = grids.get(".".join(parts[:-1]))
                if to_hw is None:  # an empty slot's
                    return None
                stored = "embeddings.position_embeddings"
                position_LD = checkpoint.elements(stored, range(checkpoint.numel(stored))).view(-1, backbone.dim)
                return resize_position(position_LD, grid, to_hw).flatten()[span.start : span.stop]
            place = ".".join(parts[-4:-1]) if parts[-4] == "stem" else "projection"
            return checkpoint.elements(f"embeddings.patch_embeddings.{place}.{kind}", span)
        if unit == "attn":
            if last == "qkv":
                names = [f"{layer}attention.{p}_proj.{kind}" for p in "qkv"]
                return torch.cat(list(_of_joined(checkpoint, names, shape.numel() // 3, span)))
            return checkpoint.elements(f"{layer}attention.o_proj.{kind}", span)
        if unit == "ffn":
            return checkpoint.elements(f"{layer}mlp.{last}.{kind}", span)
        norm = {"norm1": "layernorm_before", "norm2": "layernorm_after", "norm": "layernorm"}[unit]
        return checkpoint.elements(f"{layer}{norm}.{kind}", span)

    heads = "heads are drawn" if head is None else f"with the head of {head.task}, other heads are drawn"
    return Start(values, f"one ViT for all copies, {heads}", {} if head is None else head.buffers)


class _Head:
    """The head of an extracted model's task. There the neck's batch norm is the pooler, and also a part of a linear
    classifier; here it is a neck of the same effect, whose scale, as far as that says, is 1."""

    def __init__(self, checkpoint: "_Checkpoint", task: Task, dim: int):
        self.task = task.name
        self.buffers: dict[str, Tensor] = {}
        self._checkpoint, self._dim = checkpoint, dim
        self._neck: tuple[Tensor, Tensor, Tensor] | None = None  # what it multiplies by, its mean and its scale
        if task.head.neck or task.head.type == "margin":
            scale_D = checkpoint.elements("pooler.dense.weight", range(dim * dim)).view(dim, dim).diagonal().double()
            divisor_D = torch.where(scale_D == 0, 1.0, scale_D)
            mean_D = -checkpoint.elements("pooler.dense.bias", range(dim)).double() / divisor_D
            variance_D = (divisor_D**-2 - BatchNormNeck.eps).clamp(min=0)
            self._neck = scale_D, mean_D, scale_D * (variance_D + BatchNormNeck.eps).sqrt()
            neck = f"heads.{task.name}.neck.running_"
            self.buffers = {f"{neck}mean": mean_D.float(), f"{neck}var": variance_D.float()}

    def values(self, name: str, span: range) -> Tensor | None:
        """Elements of a parameter; None of a margin head's classifier."""
        kind = name.removeprefix(f"heads.{self.task}.")
        if kind == "neck.weight":
            assert self._neck is not None
            return self._neck[2][span.start : span.stop].float()
        if not self._checkpoint.numel(kind):
            return None
        found = self._checkpoint.elements(kind, span)
        if self._neck is None:
            return found
        scale_D, mean_D, _ = self._neck
        if kind == "classifier.weight":
            return (found / scale_D[torch.arange(span.start, span.stop) % self._dim]).float()
        rows_CD = self._checkpoint.elements("classifier.weight", range(span.start * self._dim, span.stop * self._dim))
        return (found + rows_CD.view(-1, self._dim).double() @ mean_D).float()


def _head(recipe: Recipe, config: ViTConfig, checkpoint: "_Checkpoint", num_classes: Mapping[str, int]) -> _Head | None:
    """Of the task that the recipe and an extracted model have both."""
    file, backbone = Path(str(recipe.model.init)) / RECIPE, recipe.model.backbone
    if not file.is_file():
        return None
    # Of other ViTs it may differ: the default of transformers makes no difference that matters.
    eps = "layer_norm_eps"
    check_equal(recipe, {eps: config.layer_norm_eps}, {eps: backbone.layer_norm_eps}, "model.backbone")
    stored = recipe_file.load(str(file)).tasks
    pairs = [(task, theirs) for theirs in stored for task in recipe.tasks if task.name == theirs.name]
    if len(stored) != 1 or not pairs:
        return None
    dim, [(task, theirs)] = backbone.dim, pairs
    wanted: dict[str, Any] = {"type": task.head.type, "neck": task.head.neck}
    found: dict[str, Any] = {"type": theirs.head.type, "neck": theirs.head.neck}
    if task.head.type == "linear":
        wanted["classes"], found["classes"] = num_classes[task.name], checkpoint.numel("classifier.bias")
    of_task = f" of the head of {task.name}"
    check_equal(
        recipe,
        {key + of_task: value for key, value in found.items()},
        {key + of_task: value for key, value in wanted.items()},
    )
    needed = {"classifier.weight": num_classes[task.name] * dim} if task.head.type == "linear" else {}
    if task.head.type == "margin" or task.head.neck:
        needed |= {"pooler.dense.weight": dim * dim, "pooler.dense.bias": dim}
    checkpoint.check(file.parent, needed)
    return _Head(checkpoint, task, dim)


class _Checkpoint:
    """Tensors in safetensors files, by the names that ``ViTModel`` has for them."""

    def __init__(self, files: list[str]):
        self._stored: dict[str, Any] = {}
        for file in files:
            opened = safe_open(file, "pt")
            for stored in opened.keys():  # noqa: SIM118, not a mapping
                name = stored
                for pattern, replacement in _RENAMED:
                    name = re.sub(pattern, replacement, name)
                self._stored[name] = opened.get_slice(stored)

    def check(self, source: str | Path, needed: Mapping[str, int]) -> None:
        """
        Raises:
            UserError: a tensor is not there, or has not as many elements.
        """
        for name, numel in needed.items():
            if (found := self.numel(name)) != numel:
                raise UserError(
                    f"model.init {str(source)!r} has {found or 'no'} elements of {name}, a ViT of its size {numel}"
                )

    def numel(self, name: str) -> int:
        return torch.Size(self._stored[name].get_shape()).numel() if name in self._stored else 0

    def elements(self, name: str, span: range) -> Tensor:
        """Of the flattened tensor, in fp32; whole rows are read."""
        stored = self._stored[name]
        width = torch.Size(stored.get_shape()[1:]).numel()
        first, last = span.start // width, -(-span.stop // width)
        return stored[first:last].flatten()[span.start - first * width : span.stop - first * width].float()


def _open(source: str) -> tuple[ViTConfig, _Checkpoint]:
    try:
        _file(source, CONFIG_NAME)
        ours = ViTConfig.get_config_dict(source)[0].get("model_type") == UfoViTConfig.model_type
        config = (UfoViTConfig if ours else ViTConfig).from_pretrained(source)
    except (OSError, ValueError, StrictDataclassError) as error:
        raise UserError(f"model.init {source!r} is neither a run nor a ViT: {str(error).splitlines()[0]}") from None
    try:
        try:
            files = [_file(source, SAFE_WEIGHTS_NAME)]
        except OSError:
            index = json.loads(Path(_file(source, SAFE_WEIGHTS_INDEX_NAME)).read_text())
            files = [_file(source, file) for file in sorted(set(index["weight_map"].values()))]
    except OSError:
        raise UserError(
            f"model.init {source!r} lacks {SAFE_WEIGHTS_NAME}, or files of its {SAFE_WEIGHTS_INDEX_NAME}: write it "
            f"anew with save_pretrained of transformers"
        ) from None
    try:
        return config, _Checkpoint(files)
    except SafetensorError as error:
        raise UserError(f"model.init {source!r}: damaged file: {error}: fetch it anew") from None


def _file(source: str, name: str) -> str:
    """The local path of a checkpoint's file, which may be fetched for it."""
    path = cached_file(source, name)
    if path is None:  # for some files, where they are absent; for others it raises
        raise FileNotFoundError(f"no {name} there")
    return path


def _sizes_of(config: ViTConfig) -> dict[str, Any]:
    """As those of a backbone."""
    depth = config.num_hidden_layers
    return {
        "dim": config.hidden_size,
        "depth": depth,
        "heads": one_or_all(getattr(config, "heads", None) or [config.num_attention_heads] * depth),
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        "dim x mlp_ratio": one_or_all(getattr(config, "hidden", None) or [config.intermediate_size] * depth),
        "patch_size": config.patch_size,
        "stem": list(getattr(config, "stem", [])),
        "pool": getattr(config, "pool", "cls"),
    }


def _needed(backbone: Backbone, grid: tuple[int, int]) -> Iterator[tuple[str, int]]:
    """What a ViT of this size has: names and numbers of elements."""
    dim, channels = backbone.dim, [3, *backbone.stem]
    if backbone.prefix:
        yield "embeddings.cls_token", dim
    yield "embeddings.position_embeddings", (backbone.prefix + grid[0] * grid[1]) * dim
    for i, (before, after) in enumerate(pairwise(channels)):
        yield f"embeddings.patch_embeddings.stem.{i}.conv.weight", 9 * before * after
        yield f"embeddings.patch_embeddings.stem.{i}.norm.weight", after
        yield f"embeddings.patch_embeddings.stem.{i}.norm.bias", after
    rest = backbone.patch_size // stem_stride(backbone.stem)
    yield "embeddings.patch_embeddings.projection.weight", dim * channels[-1] * rest**2
    yield "embeddings.patch_embeddings.projection.bias", dim
    norms = ["layernorm"]
    for i, (heads, hidden) in enumerate(zip(backbone.heads_L, backbone.hidden_L, strict=True)):
        norms += [f"layers.{i}.layernorm_before", f"layers.{i}.layernorm_after"]
        width = heads * backbone.head_width
        for part, bias in (("q", width), ("k", width), ("v", width), ("o", dim)):
            yield f"layers.{i}.attention.{part}_proj.weight", dim * width
            yield f"layers.{i}.attention.{part}_proj.bias", bias
        for name, bias in (("fc1", hidden), ("fc2", dim)):
            yield f"layers.{i}.mlp.{name}.weight", dim * hidden
            yield f"layers.{i}.mlp.{name}.bias", bias
    for norm in norms:
        yield f"{norm}.weight", dim
        yield f"{norm}.bias", dim


def _of_joined(checkpoint: _Checkpoint, names: list[str], each: int, span: range) -> Iterator[Tensor]:
    """Elements of tensors of ``each`` elements, one behind the other."""
    for i, name in enumerate(names):
        start, stop = max(span.start - i * each, 0), min(span.stop - i * each, each)
        if start < stop:
            yield checkpoint.elements(name, range(start, stop))
