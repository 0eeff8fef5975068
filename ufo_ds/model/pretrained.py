"""Initial values from a Hugging Face ViT, read from its safetensors files by range: a process reads what it keeps."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import ViTConfig
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from ufo_ds.errors import UserError
from ufo_ds.model.architecture import Architecture
from ufo_ds.model.dense import is_stock
from ufo_ds.model.initialization import Pretrained
from ufo_ds.model.layers import resize_position
from ufo_ds.recipe import Recipe

# Names in files, which are those of transformers 4, and of models with a head behind the ViT -> those of ``ViTModel``.
_RENAMED = [
    (r"^vit\.", ""),
    (r"^encoder\.layer\.", "layers."),
    (r"\.attention\.attention\.(q|k|v)(?:uery|ey|alue)\.", r".attention.\1_proj."),
    (r"\.attention\.output\.dense\.", ".attention.o_proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"^(layers\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
]


def pretrained_values(recipe: Recipe) -> Pretrained:
    """Initial values from the ViT that ``model.init`` names, its units copied into the shared and all own copies;
    position embeddings are resized to each copy's grid. Heads and the router are drawn.

    Raises:
        UserError: it cannot be loaded, or is of another size or kind.
    """
    source, backbone = recipe.model.init, recipe.model.backbone
    assert source is not None
    if not is_stock(backbone, Architecture.of(backbone)):
        raise UserError(
            f"model.init {source!r} is a ViT with a class token and no stem, model.backbone has stem {backbone.stem} "
            f"and pool {backbone.pool!r}: leave model.init out, or stem and pool"
        )
    config, checkpoint = _open(source)
    for ours, theirs, name in [
        (backbone.dim, config.hidden_size, "dim"),
        (backbone.depth, config.num_hidden_layers, "depth"),
        (backbone.heads, config.num_attention_heads, "heads"),
        (backbone.hidden_L[0], config.intermediate_size, "dim x mlp_ratio"),
        (backbone.patch_size, config.patch_size, "patch_size"),
    ]:
        if ours != theirs:
            raise UserError(f"model.init {source!r} has {name} {theirs}, model.backbone {ours}: make them equal")
    size = [config.image_size] * 2 if isinstance(config.image_size, int) else config.image_size
    grid = size[0] // backbone.patch_size, size[1] // backbone.patch_size
    for name, numel in _needed(config, backbone.patch_size, grid):
        if (found := checkpoint.numel(name)) != numel:
            raise UserError(f"model.init {source!r} has {found or 'no'} elements of {name}, a ViT of its size {numel}")
    inputs = {"embed.shared": recipe.model.input or recipe.tasks[0].input}
    inputs |= {f"embed.own.{task.name}": task.input for task in recipe.tasks}
    grids = {unit: (h // backbone.patch_size, w // backbone.patch_size) for unit, (h, w) in inputs.items()}

    def values(name: str, shape: torch.Size, span: range) -> Tensor | None:
        parts = name.split(".")
        if parts[0] in ("heads", "router"):
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
            return checkpoint.elements(f"embeddings.patch_embeddings.projection.{kind}", span)
        if unit == "attn":
            if last == "qkv":
                names = [f"{layer}attention.{p}_proj.{kind}" for p in "qkv"]
                return torch.cat(list(_of_joined(checkpoint, names, shape.numel() // 3, span)))
            return checkpoint.elements(f"{layer}attention.o_proj.{kind}", span)
        if unit == "ffn":
            return checkpoint.elements(f"{layer}mlp.{last}.{kind}", span)
        norm = {"norm1": "layernorm_before", "norm2": "layernorm_after", "norm": "layernorm"}[unit]
        return checkpoint.elements(f"{layer}{norm}.{kind}", span)

    return values


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
        config = ViTConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise UserError(f"model.init {source!r} is no ViT checkpoint: {str(error).splitlines()[0]}") from None
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


def _needed(config: ViTConfig, patch: int, grid: tuple[int, int]) -> Iterator[tuple[str, int]]:
    """What a ``ViTModel`` has: names and numbers of elements."""
    dim, hidden = config.hidden_size, config.intermediate_size
    yield "embeddings.cls_token", dim
    yield "embeddings.position_embeddings", (1 + grid[0] * grid[1]) * dim
    yield "embeddings.patch_embeddings.projection.weight", dim * 3 * patch**2
    yield "embeddings.patch_embeddings.projection.bias", dim
    norms = ["layernorm"]
    for i in range(config.num_hidden_layers):
        norms += [f"layers.{i}.layernorm_before", f"layers.{i}.layernorm_after"]
        for part in "qkvo":
            yield f"layers.{i}.attention.{part}_proj.weight", dim * dim
            yield f"layers.{i}.attention.{part}_proj.bias", dim
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
