"""Parameters and FLOPs of dense paths, by formula: what a task costs once it is cut out of the supernet.

FLOPs are those of one image forward: multiply-adds x 2 of convolutions, matrix products and attention, as
``torch.utils.flop_counter`` counts them; norms, activations, softmax and sums are not counted. All paths of a task with
the same architecture cost the same, whichever copies they take.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from ufo_ds.model.architecture import Architecture
from ufo_ds.model.spec import SubnetSpec
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


NOTHING = Cost(0, 0)


def path_cost(backbone: Backbone, architecture: Architecture, input_hw: Size) -> Cost:
    """A dense ViT for images of this size, from the pixels to the pooled feature; without head and neck."""
    blocks = (block_cost(backbone, architecture, block, input_hw) for block in range(architecture.depth))
    return sum(blocks, embedding_cost(backbone, architecture, input_hw)) + _norm(architecture.dim)


def embedding_cost(backbone: Backbone, architecture: Architecture, input_hw: Size) -> Cost:
    """Stem, patch projection, class token and position embedding."""
    grid, positions = _grid(backbone, input_hw), tokens_of(backbone, input_hw) * architecture.dim
    return _embedding(backbone, architecture.dim, *architecture.stem, patches=grid) + Cost(positions, 0)


def block_cost(backbone: Backbone, architecture: Architecture, block: int, input_hw: Size) -> Cost:
    """One block of it."""
    dim, tokens = architecture.dim, tokens_of(backbone, input_hw)
    attention = _attention(dim, architecture.heads[block] * backbone.head_width, tokens)
    return attention + _ffn(dim, architecture.hidden[block], tokens) + _norm(dim) * 2


def head_cost(task: Task, dim: int, classes: int) -> Cost:
    """Neck and classifier of a task in training. A neck's running statistics are no parameters."""
    margin = task.head.type == "margin"
    return Cost(classes * dim + (dim if margin else classes), 2 * classes * dim)  # a neck's scale, or a bias


def subnet_cost(recipe: Recipe, spec: SubnetSpec, classes: int) -> Cost:
    """What is deployed of a subnet: its dense ViT and, behind a linear head, the classifier with its bias.

    A margin head's classifier serves only training. A neck is not counted: it scales and shifts every channel, which
    goes into the last norm (or the classifier) at no cost. The diagonal ``dim`` x ``dim`` matrix by which ``ufo
    extract`` writes it as the stock pooler is of that form alone, and is not counted either. Position embeddings are
    those of the task's own input size.
    """
    task = _task(recipe, spec.task)
    path = path_cost(recipe.model.backbone, spec.architecture, task.input)
    return path + _deployed_head(task, spec.architecture.dim, classes)


def joint_cost(recipe: Recipe, specs: Sequence[SubnetSpec], classes: Mapping[str, int]) -> Cost:
    """Several tasks' subnets (counted as :func:`subnet_cost` does) over one shared copy of what they share.

    A shared unit that several use counts once, as large as the largest slice of it in each direction; the shared
    position embedding once for every grid. FLOPs add up, as each task has its own pass.

    The directory that ``ufo extract`` writes for several tasks may hold more, as it is a checkpoint: margin heads, and
    own copies as large as what is shared. It holds one shared position embedding, which is resized to other grids.
    """
    backbone = recipe.model.backbone
    largest: dict[_Piece, tuple[int, ...]] = {}
    parameters = flops = 0
    for spec in specs:
        task = _task(recipe, spec.task)
        parameters += _deployed_head(task, spec.architecture.dim, classes[spec.task]).parameters
        flops += subnet_cost(recipe, spec, classes[spec.task]).flops
        for piece, sizes in _slices(backbone, spec, task.input):
            largest[piece] = tuple(map(max, largest.get(piece, sizes), sizes))
    for (unit, *_), sizes in largest.items():
        if unit == "position":
            parameters += sizes[0] * sizes[1]
        elif unit == "embed":
            parameters += _embedding(backbone, *sizes).parameters
        elif unit == "norm":
            parameters += _norm(*sizes).parameters
        else:
            parameters += (_attention if unit == "attn" else _ffn)(*sizes).parameters
    return Cost(parameters, flops)


def tokens_of(backbone: Backbone, input_hw: Size) -> int:
    """Of an image, the class token included."""
    return backbone.prefix + _grid(backbone, input_hw)


def supernet_parameters(recipe: Recipe) -> int:
    """Of all copies of all units, whether a path takes them or not; without heads and router."""
    backbone, experts = recipe.model.backbone, recipe.model.experts
    whole, dim = Architecture.of(backbone), backbone.dim
    copies = {unit: 1 + len(recipe.tasks) * (unit in experts) for unit in ("norm", "attn", "ffn")}
    attention = sum(_attention(dim, heads * backbone.head_width).parameters for heads in whole.heads)
    ffns = sum(_ffn(dim, hidden).parameters for hidden in whole.hidden)
    norms = (2 * backbone.depth + 1) * _norm(dim).parameters
    inputs = [recipe.model.input or recipe.tasks[0].input]
    inputs += [task.input for task in recipe.tasks] if "embed" in experts else []
    embedding = _embedding(backbone, dim, *whole.stem).parameters
    embeddings = sum(embedding + tokens_of(backbone, size) * dim for size in inputs)
    return embeddings + attention * copies["attn"] + ffns * copies["ffn"] + norms * copies["norm"]


def _task(recipe: Recipe, name: str) -> Task:
    return next(task for task in recipe.tasks if task.name == name)


def _deployed_head(task: Task, dim: int, classes: int) -> Cost:
    return NOTHING if task.head.type == "margin" else head_cost(task, dim, classes)


_Piece = tuple[str, str, tuple[int, ...]]  # what it is, the task that owns it (none: shared), and which of its kind


def _slices(backbone: Backbone, spec: SubnetSpec, input_hw: Size) -> Iterator[tuple[_Piece, tuple[int, ...]]]:
    """The pieces of a path and the sizes of each, as the function of its cost takes them."""
    path, width = spec.architecture, backbone.head_width

    def owner(unit: str, layer: int) -> str:
        return spec.task if spec.routes[unit][layer] == "own" else ""

    yield ("embed", owner("embed", 0), ()), (path.dim, *path.stem)
    grid = tuple(side // backbone.patch_size for side in input_hw)
    yield ("position", owner("embed", 0), grid), (path.dim, tokens_of(backbone, input_hw))
    for i in range(path.depth):
        yield ("attn", owner("attn", i), (i,)), (path.dim, path.heads[i] * width)
        yield ("ffn", owner("ffn", i), (i,)), (path.dim, path.hidden[i])
        for norm in (0, 1):
            yield ("norm", owner("norm", i), (i, norm)), (path.dim,)
    yield ("norm", owner("norm", -1), ()), (path.dim,)


def _grid(backbone: Backbone, input_hw: Size) -> int:
    return (input_hw[0] // backbone.patch_size) * (input_hw[1] // backbone.patch_size)


def _embedding(backbone: Backbone, dim: int, *stem: int, patches: int = 0) -> Cost:
    """Stem, patch projection and class token; position embeddings are apart."""
    side = backbone.patch_size
    parameters = flops = 0
    # Where the size is halved is the backbone's: a slice has as many layers, with their strides.
    strides = [stem_stride(backbone.stem[: i + 1]) for i in range(len(stem))]
    for (before, after), stride in zip(pairwise([3, *stem]), strides, strict=True):
        side = backbone.patch_size // stride  # what is left of the side of a patch
        parameters += 9 * before * after + 2 * after  # and the scale and shift of a group norm
        flops += 2 * patches * side**2 * 9 * before * after
    matrix = [3, *stem][-1] * side**2 * dim
    return Cost(parameters + matrix + dim * (1 + backbone.prefix), flops + 2 * patches * matrix)


def _attention(dim: int, width: int, tokens: int = 0) -> Cost:
    """Four projections with biases; queries x keys and weights x values. ``width`` is that of all heads together."""
    return Cost(4 * dim * width + 3 * width + dim, 2 * tokens * 4 * dim * width + 2 * 2 * tokens**2 * width)


def _ffn(dim: int, hidden: int, tokens: int = 0) -> Cost:
    return Cost(2 * dim * hidden + hidden + dim, 2 * tokens * 2 * dim * hidden)


def _norm(dim: int) -> Cost:
    return Cost(2 * dim, 0)
