"""Sizes of dense paths: of one, and all that an elastic supernet is trained for.

Every size is that of a leading slice: the first blocks, the first heads of a block, the first hidden channels of its
FFN, the first channels of all tokens and of the stem.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from ufo_ds.errors import UserError
from ufo_ds.recipe_model import Backbone, Model, narrow_stem
from ufo_ds.seeding import torch_generator


@dataclass(frozen=True)
class Architecture:
    """
    Attributes:
        dim: width of the tokens.
        stem: channels of the layers before the patch projection; none in a plain ViT.
        heads: of every block that is kept.
        hidden: width of its FFN's hidden layer.
    """

    dim: int
    stem: tuple[int, ...]
    heads: tuple[int, ...]
    hidden: tuple[int, ...]

    @property
    def depth(self) -> int:
        return len(self.heads)

    @classmethod
    def of(cls, backbone: Backbone) -> "Architecture":
        """The whole of a backbone."""
        return cls(backbone.dim, tuple(backbone.stem), tuple(backbone.heads_L), tuple(backbone.hidden_L))

    @classmethod
    def from_values(cls, values: Any, source: str) -> "Architecture":
        """Check plain values, of a JSON file for instance.

        Raises:
            UserError: a key that is missing or unknown, a size that is no positive whole number, or not as many widths
                as heads.
        """
        keys = ("dim", "stem", "heads", "hidden")
        if not isinstance(values, dict) or set(values) != set(keys):
            raise UserError(f"{source}: architecture needs the keys {', '.join(keys)}, nothing else")
        for key in keys:
            sizes = [values[key]] if key == "dim" else values[key]
            if not isinstance(sizes, list) or any(type(size) is not int or size < 1 for size in sizes):
                kind = "a positive whole number" if key == "dim" else "a list of positive whole numbers"
                raise UserError(f"{source}: {key} of the architecture is {values[key]!r}: give {kind}")
        if not values["heads"] or len(values["heads"]) != len(values["hidden"]):
            raise UserError(
                f"{source}: {len(values['heads'])} heads and {len(values['hidden'])} hidden of the architecture: give "
                f"one of each for every block that is kept"
            )
        return cls(values["dim"], *(tuple(values[key]) for key in keys[1:]))

    def fits(self, largest: "Architecture") -> bool:
        """Whether this is a slice of another; its stem has to change the number of channels where the other does."""
        pairs = [(self.stem, largest.stem), (self.heads, largest.heads), (self.hidden, largest.hidden)]
        return (
            self.dim <= largest.dim
            and self.depth <= largest.depth
            and len(self.stem) == len(largest.stem)
            and [a == b for a, b in pairwise([3, *self.stem])] == [a == b for a, b in pairwise([3, *largest.stem])]
            and all(a <= b for mine, theirs in pairs for a, b in zip(mine, theirs, strict=False))
        )


@dataclass(frozen=True)
class SearchSpace:
    """What ``model.elastic`` lets subnets be: choices of each size, from the smallest to the largest.

    Depth, width and stem are chosen once for a subnet, heads and MLP ratio for each of its blocks.
    """

    depth: tuple[int, ...]
    dim: tuple[int, ...]
    stem: tuple[tuple[int, ...], ...]
    heads: tuple[int, ...]
    mlp_ratio: tuple[float, ...]

    @classmethod
    def of(cls, model: Model) -> "SearchSpace":
        """
        Raises:
            UserError: the model has no ``elastic``.
        """
        backbone, elastic = model.backbone, model.elastic
        if elastic is None:
            raise UserError("there are no subnets without model.elastic in the recipe: train one with it")
        assert isinstance(backbone.heads, int)
        assert isinstance(backbone.mlp_ratio, float)
        return cls(
            tuple(sorted(set(elastic.depth or [backbone.depth]))),
            tuple(sorted(set(elastic.dim or [backbone.dim]))),
            tuple(dict.fromkeys(narrow_stem(backbone.stem, share) for share in sorted(elastic.stem or [1.0]))),
            tuple(sorted(set(elastic.heads or [backbone.heads]))),
            tuple(sorted(set(elastic.mlp_ratio or [backbone.mlp_ratio]))),
        )

    @property
    def largest(self) -> Architecture:
        return self._uniform(-1)

    @property
    def smallest(self) -> Architecture:
        return self._uniform(0)

    def draw(self, *key: int | str) -> Architecture:
        """One by this key, each size uniformly among its choices."""
        generator = torch_generator(*key)

        def levels(choices: int, count: int = 1) -> list[int]:
            return torch.randint(choices, (count,), generator=generator).tolist()

        # All draws are made whatever the depth: what is drawn first then moves nothing that follows.
        once = [levels(len(choices))[0] for choices in (self.depth, self.dim, self.stem)]
        heads, ratios = levels(len(self.heads), self.depth[-1]), levels(len(self.mlp_ratio), self.depth[-1])
        return self.architecture(once, heads, ratios)

    def architecture(self, once: Sequence[int], heads: Sequence[int], ratios: Sequence[int]) -> Architecture:
        """By levels, which count from 0, the smallest choice.

        Args:
            once: of depth, width and stem.
            heads, ratios: of every block, of which those that the depth leaves out do not matter.
        """
        depth, dim, stem = self.depth[once[0]], self.dim[once[1]], self.stem[once[2]]
        hidden = tuple(round(dim * self.mlp_ratio[level]) for level in ratios[:depth])
        return Architecture(dim, stem, tuple(self.heads[level] for level in heads[:depth]), hidden)

    def levels(self, architecture: Architecture) -> tuple[list[int], list[int], list[int]]:
        """The arguments of :meth:`architecture` that give this one; those of blocks left out are -1.

        Raises:
            ValueError: it is not in the space; the message names the size and its choices.
        """
        found = [
            _level("depth", architecture.depth, self.depth),
            _level("dim", architecture.dim, self.dim),
            _level("stem", architecture.stem, self.stem),
        ]
        widths = [round(architecture.dim * ratio) for ratio in self.mlp_ratio]
        heads = [_level("heads", heads, self.heads) for heads in architecture.heads]
        ratios = [_level("hidden", hidden, widths) for hidden in architecture.hidden]
        left_out = [-1] * (self.depth[-1] - architecture.depth)
        return found, heads + left_out, ratios + left_out

    def _uniform(self, level: int) -> Architecture:
        layers = [level] * self.depth[-1]
        return self.architecture([level] * 3, layers, layers)


def subnets_of_step(model: Model, tasks: Iterable[str], seed: int, step: int) -> list[dict[str, Architecture]]:
    """The subnets of every task that a step trains, on the same samples; a task that is not there: its whole path.

    Random ones belong to (seed, step, task), the same on all ranks and in all micro-batches of the step.
    """
    elastic = model.elastic
    if elastic is None:
        return [{}]
    space, sandwich = SearchSpace.of(model), elastic.sampling == "sandwich"
    fixed = [{}, dict.fromkeys(tasks, space.smallest)] if sandwich else []
    count = elastic.subnets - len(fixed)
    return [*fixed, *({task: space.draw(seed, "subnet", step, task, i) for task in tasks} for i in range(count))]


def _level(name: str, size: Any, choices: Sequence[Any]) -> int:
    if size not in choices:
        raise ValueError(f"{name} {size} is none of {', '.join(map(str, choices))}")
    return list(choices).index(size)
