"""What a training step keeps of the forward pass for the backward pass, in bytes, by formula.

Per token of a block, with D the width and H the hidden width of the FFN:

    norms       the inputs of both (2 D, residual stream), mean and 1 / standard deviation of each (4 numbers)
    attention   input of the qkv projection (D), q, k and v (3 A), its output (A), log of the softmax's sum (heads)
    FFN         its input (D), before and behind the activation function (2 H)

with A the width of all its heads together. Where A is D that is 8 D + 2 H elements, 16 D where H is 4 D, and a factor
of each residual branch for drop path. Attention scores are not kept: PyTorch's fused kernels compute them again. Not
counted: where some tasks take the shared copy of a unit and others their own, or shared attention has images of several
sizes, rows are copied to sort them, up to D for a unit.

Of a block that is recomputed its input is kept (D), and drop path's factors; while it is recomputed, all of the above.
"""

from dataclasses import dataclass
from itertools import pairwise

from ufo_ds.recipe import Recipe
from ufo_ds.recipe_model import Backbone
from ufo_ds.recipe_task import Size, Task

FP32 = 4  # bytes


@dataclass(frozen=True)
class Precision:
    """Bytes of an element: of a parameter, of the inputs of matrix products, and of the residual stream."""

    parameter: int
    rows: int
    residual: int

    @property
    def autocast(self) -> bool:
        return self.rows < self.parameter


PRECISIONS = {"fp32": Precision(4, 4, 4), "bf16": Precision(2, 2, 2), "fp32 with autocast to bf16": Precision(4, 2, 4)}


def kept_per_image(recipe: Recipe, input_hw: Size, precision: Precision) -> dict[str, list[int]]:
    """Bytes that one image keeps in every unit, by layer."""
    backbone = recipe.model.backbone
    dim = backbone.dim
    grid, tokens = _grid(backbone, input_hw), _tokens(backbone, input_hw)
    norm = tokens * (dim * precision.residual + 2 * FP32)
    attention_L = [
        tokens * ((dim + 4 * heads * backbone.head_width) * precision.rows + heads * FP32) for heads in backbone.heads_L
    ]
    ffn_L = [tokens * (dim + 2 * hidden) * precision.rows for hidden in backbone.hidden_L]
    branch = tokens * precision.rows if recipe.model.drop_path else 0
    return {
        "embed": [_embedding(backbone, grid, tokens, precision)],
        "norm": [2 * norm] * backbone.depth + [norm],
        "attn": [attention + branch for attention in attention_L],
        "ffn": [ffn + branch for ffn in ffn_L],
    }


def kept_of_recomputed(recipe: Recipe, input_hw: Size, precision: Precision) -> int:
    """Bytes that one image keeps of a block that is recomputed."""
    backbone = recipe.model.backbone
    factors = 2 * FP32 if recipe.model.drop_path else 0
    return _tokens(backbone, input_hw) * (backbone.dim * precision.residual + factors)


def kept_by_head(task: Task, dim: int, images: int, rows: int, precision: Precision) -> int:
    """Bytes that a head keeps of ``images``, ``rows`` of its classifier being here: it computes in fp32."""
    margin = task.head.type == "margin"
    copies = (precision.parameter < FP32) + margin  # of the weight: in fp32, and normalised
    logits = sum(3 if name in ("arcface", "circle") else 1 for name in task.loss.given if name != "triplet")
    features = 3 if margin else precision.parameter < FP32  # before the neck, behind it, normalised
    return FP32 * (copies * rows * dim + images * (features * dim + logits * rows))


def _grid(backbone: Backbone, input_hw: Size) -> tuple[int, int]:
    return input_hw[0] // backbone.patch_size, input_hw[1] // backbone.patch_size


def _tokens(backbone: Backbone, input_hw: Size) -> int:
    height, width = _grid(backbone, input_hw)
    return backbone.prefix + height * width


def _embedding(backbone: Backbone, grid: tuple[int, int], tokens: int, precision: Precision) -> int:
    """The input of the patch projection; of each layer of a stem what goes into its norm, and what comes out of it and
    of its sum."""
    if not backbone.stem:
        return tokens * 3 * backbone.patch_size**2 * precision.rows
    side, elements = backbone.patch_size, 3 * backbone.patch_size**2
    for before, after in pairwise([3, *backbone.stem]):
        side //= 1 if before == after else 2
        elements += (3 if before == after else 2) * after * side**2
    matrix_input = tokens * backbone.stem[-1] * side**2
    return (grid[0] * grid[1] * elements + matrix_input) * precision.rows
