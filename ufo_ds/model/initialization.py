"""The initial values of a supernet's parameters: of any elements of any of them, at a cost that grows with their
number, and the same whatever is asked for beside them."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from ufo_ds.model.classifiers import Part
from ufo_ds.recipe import Recipe
from ufo_ds.seeding import normal_elements, uniform_elements

# (name, shape, elements of the flattened parameter) -> their values
Values = Callable[[str, torch.Size, range], Tensor]
Pretrained = Callable[[str, torch.Size, range], Tensor | None]  # None: no value of this parameter


@dataclass(frozen=True)
class Start:
    """What training starts from in place of drawn values.

    Attributes:
        values: of parameters, any elements of them.
        words: what it is, for people.
        buffers: running statistics of necks, by name.
        routes: of every task, per unit and layer; none where the recipe's stand.
        checkpoint: which of a run it is.
    """

    values: Pretrained
    words: str
    buffers: Mapping[str, Tensor] = field(default_factory=dict)
    routes: Mapping[str, Mapping[str, tuple[str, ...]]] = field(default_factory=dict)
    checkpoint: Path | None = None


def start_values(recipe: Recipe, pretrained: Pretrained | None = None) -> Values:
    """Pretrained values where there are any, drawn ones elsewhere.

    Own copies start as the shared copy does (with their task's own grid), so that the routes differ by what is
    learned, not by the draw. Copies of a unit follow each other in a model, so few draws are remembered.
    """
    draw_of_copies = lru_cache(maxsize=8)(lambda name, shape, span: initial_values(name, shape, span, recipe))

    def values(name: str, shape: torch.Size, span: range) -> Tensor:
        found = pretrained(name, shape, span) if pretrained else None
        if found is not None:
            return found
        common = re.sub(r"\.own\.[^.]+\.", ".shared.", name)
        if ".shared." in common:
            return draw_of_copies(common, shape, span)
        return initial_values(name, shape, span, recipe)

    return values


def initial_values(name: str, shape: torch.Size, span: range, recipe: Recipe) -> Tensor:
    """Elements ``span`` of a flattened parameter, drawn by (seed, name), in fp32.

    The initialisation of big_vision's ViT: norms 1, biases and class tokens 0, matrices by Glorot and Bengio (2010),
    position embeddings normal. The router's logits are 0, classifiers small; a stem's convolutions by He et al. (2015).
    """
    parts = name.split(".")
    unit = parts[2] if parts[0] in ("blocks", "heads") else parts[0]
    if unit == "router" or parts[-1] in ("bias", "cls"):
        return torch.zeros(len(span))
    if unit in ("norm", "norm1", "norm2", "neck") or parts[-2:] == ["norm", "weight"]:
        return torch.ones(len(span))
    key = (recipe.seed, "init", name)
    if unit == "classifier":
        return normal_elements(span, *key) * 0.01
    if parts[-1] == "position":
        return normal_elements(span, *key) * (recipe.model.backbone.position_std or shape[1] ** -0.5)
    if parts[-2] == "conv":
        return normal_elements(span, *key) * math.sqrt(2 / (shape[0] * shape[2:].numel()))
    rows = shape[0] // 3 if parts[-2] == "qkv" else shape[0]  # three matrices in one
    return uniform_elements(span, *key) * math.sqrt(6 / (rows + shape[1]))


def fill(elements: Tensor, start: int, name: str, part: Part, values: Values) -> None:
    """Set elements ``start ..`` of a flattened parameter, of which ``part`` says what matrix it is a part of. What lies
    behind that part's rows is padding, 0."""
    width = part.shape[1:].numel()
    inside = max(0, min(len(elements), len(part.rows) * width - start))
    with torch.no_grad():
        if inside:
            first = part.rows.start * width + start
            elements[:inside] = values(name, part.shape, range(first, first + inside))
        elements[inside:] = 0.0
