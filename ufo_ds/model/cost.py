"""Parameters and FLOPs of dense paths, by formula: what a task costs once it is cut out of the supernet.

FLOPs are those of one image forward: multiply-adds x 2 of convolutions, matrix products and attention, as
``torch.utils.flop_counter`` counts them; norms, activations, softmax and sums are not counted. All paths of a task cost
the same, whichever copies they take.
"""

from dataclasses import dataclass
from itertools import pairwise

from ufo_ds.recipe import Recipe
from ufo_ds.recipe_model import Backbone, stem_stride
from ufo_ds.recipe_task import Size, Task


@dataclass(frozen=True)
class Cost:
    parameters: int
    flops: int

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.parameters + other.parameters, self.flops + other.flops)

    def __mul__(self, times: int) -> "Cost":
        return Cost(self.parameters * times, self.flops * times)


def path_cost(backbone: Backbone, input_hw: Size) -> Cost:
    """A dense ViT for images of this size, from the pixels to the pooled feature; without head and neck."""
    return _embedding(backbone, input_hw) + block_cost(backbone, input_hw) * backbone.depth + _norm(backbone)


def block_cost(backbone: Backbone, input_hw: Size) -> Cost:
    """One block of it."""
    tokens = backbone.prefix + _grid(backbone, input_hw)
    return _attention(backbone.dim, tokens) + _ffn(backbone, tokens) + _norm(backbone) * 2


def head_cost(task: Task, dim: int, classes: int) -> Cost:
    """Neck and classifier of a task. A neck's running statistics are no parameters."""
    margin = task.head.type == "margin"
    return Cost(classes * dim + (dim if margin else classes), 2 * classes * dim)  # a neck's scale, or a bias


def supernet_parameters(recipe: Recipe) -> int:
    """Of all copies of all units, whether a path takes them or not; without heads and router."""
    backbone, experts = recipe.model.backbone, recipe.model.experts
    copies = {unit: 1 + len(recipe.tasks) * (unit in experts) for unit in ("norm", "attn", "ffn")}
    per_layer = (
        _attention(backbone.dim, 0).parameters * copies["attn"]
        + _ffn(backbone, 0).parameters * copies["ffn"]
        + 2 * _norm(backbone).parameters * copies["norm"]
    )
    inputs = [recipe.model.input or recipe.tasks[0].input]
    inputs += [task.input for task in recipe.tasks] if "embed" in experts else []
    embeddings = sum(_embedding(backbone, size).parameters for size in inputs)
    return embeddings + backbone.depth * per_layer + copies["norm"] * _norm(backbone).parameters


def _grid(backbone: Backbone, input_hw: Size) -> int:
    return (input_hw[0] // backbone.patch_size) * (input_hw[1] // backbone.patch_size)


def _embedding(backbone: Backbone, input_hw: Size) -> Cost:
    """Stem, patch projection, class token and position embedding."""
    patches, side = _grid(backbone, input_hw), backbone.patch_size
    parameters = flops = 0
    for before, after in pairwise([3, *backbone.stem]):
        side //= 1 if before == after else 2  # what is left of the side of a patch
        parameters += 9 * before * after + 2 * after  # and the scale and shift of a group norm
        flops += 2 * patches * side**2 * 9 * before * after
    channels = [3, *backbone.stem][-1]
    assert side == backbone.patch_size // stem_stride(backbone.stem)
    matrix = channels * side**2 * backbone.dim
    tokens = 2 * backbone.prefix + patches  # a class token, and all positions
    return Cost(parameters + matrix + backbone.dim * (1 + tokens), flops + 2 * patches * matrix)


def _attention(dim: int, tokens: int) -> Cost:
    """Four projections with biases; queries x keys and weights x values."""
    return Cost(4 * dim * (dim + 1), 2 * tokens * 4 * dim**2 + 2 * 2 * tokens**2 * dim)


def _ffn(backbone: Backbone, tokens: int) -> Cost:
    dim, hidden = backbone.dim, backbone.hidden_L[0]
    return Cost(2 * dim * hidden + hidden + dim, 2 * tokens * 2 * dim * hidden)


def _norm(backbone: Backbone) -> Cost:
    return Cost(2 * backbone.dim, 0)
