"""The part of a recipe that says what the model is: backbone, copies of its units and their routes, elastic sizes."""

import dataclasses
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator
from pydantic.dataclasses import dataclass

from ufo_ds.recipe_task import STRICT, Positive, Route, Share, Size, Unit

Ratio = Annotated[float, Field(gt=0)]

# dim, depth, heads, MLP ratio, patch size of the published ViTs (Dosovitskiy et al., 2021, table 1; DeiT for the two
# smallest).
BACKBONES: dict[str, dict[str, Any]] = {
    "vit_tiny": {"dim": 192, "depth": 12, "heads": 3, "patch_size": 16},
    "vit_small": {"dim": 384, "depth": 12, "heads": 6, "patch_size": 16},
    "vit_base": {"dim": 768, "depth": 12, "heads": 12, "patch_size": 16},
    "vit_large": {"dim": 1024, "depth": 24, "heads": 16, "patch_size": 16},
    "vit_huge": {"dim": 1280, "depth": 32, "heads": 16, "patch_size": 14},
}


@dataclass(config=STRICT, kw_only=True, frozen=True)
class Backbone:
    """A pre-norm ViT; ``name`` fills the other values from :data:`BACKBONES`. Heads and MLP ratio are those of all
    blocks, or lists with one for each."""

    dim: Positive
    depth: Positive
    heads: Positive | list[Positive]
    head_dim: Positive | None = None  # default: dim / heads
    patch_size: Positive
    mlp_ratio: Ratio | list[Ratio] = 4.0  # hidden width of the FFN / dim
    layer_norm_eps: float = 1e-6
    # Channels of the 3x3 convolutions before the patch projection, which sees what they leave of a patch; none: a plain
    # ViT. Those that change the number of channels halve the size, the others are residual: with patch_size 16,
    # [24, 48, 48, 96, 96, 192, 192] leaves one position for each token.
    stem: list[Positive] = dataclasses.field(default_factory=list)
    pool: Literal["cls", "mean"] = "cls"  # the feature: the class token, or without one the mean of the patches' tokens
    # Standard deviation of the initial position embedding; default: 1 / sqrt(dim). More of it helps small sets.
    position_std: Annotated[float, Field(gt=0)] | None = None
    name: str = "custom"

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        fields = value.kwargs or {} if hasattr(value, "kwargs") else value
        if isinstance(fields, dict) and fields.get("name", "custom") != "custom":
            known = BACKBONES.get(fields["name"])
            if known is None:
                raise ValueError(f"unknown backbone {fields['name']!r}; known: {', '.join(BACKBONES)}")
            return {**known, **fields}
        return value

    @model_validator(mode="after")
    def _one_for_each_block(self) -> "Backbone":
        for name, of_blocks in (("heads", self.heads), ("mlp_ratio", self.mlp_ratio)):
            if isinstance(of_blocks, list) and len(of_blocks) != self.depth:
                raise ValueError(f"{len(of_blocks)} {name} for depth {self.depth}: give one for each block")
        return self

    @model_validator(mode="after")
    def _heads_divide(self) -> "Backbone":
        if self.head_dim is None:
            if isinstance(self.heads, list):
                raise ValueError(f"heads {self.heads} need a head_dim: add it")
            if self.dim % self.heads:
                raise ValueError(f"dim {self.dim} is not a multiple of heads {self.heads}: change one or give head_dim")
        return self

    @model_validator(mode="after")
    def _stem_divides(self) -> "Backbone":
        if self.patch_size % stem_stride(self.stem):
            raise ValueError(
                f"patch_size {self.patch_size} is not a multiple of the stem's stride {stem_stride(self.stem)}: "
                "drop a layer of the stem or change patch_size"
            )
        return self

    @property
    def prefix(self) -> int:
        """Tokens before the patches' ones."""
        return 1 if self.pool == "cls" else 0

    @property
    def head_width(self) -> int:
        """Width of a head's queries, keys and values."""
        if self.head_dim is not None:
            return self.head_dim
        assert isinstance(self.heads, int)
        return self.dim // self.heads

    @property
    def heads_L(self) -> list[int]:
        """Of every block."""
        return self.heads if isinstance(self.heads, list) else [self.heads] * self.depth

    @property
    def hidden_L(self) -> list[int]:
        """Hidden width of every block's FFN."""
        ratios = self.mlp_ratio if isinstance(self.mlp_ratio, list) else [self.mlp_ratio] * self.depth
        return [round(self.dim * ratio) for ratio in ratios]


@dataclass(config=STRICT, kw_only=True, frozen=True)
class Router:
    """How learned routes are found: straight-through Gumbel-softmax over (shared, own), Jang et al., 2017."""

    temperature: Annotated[float, Field(gt=0)] = 5.0
    final_temperature: Annotated[float, Field(gt=0)] | None = None  # reached when routes freeze; default: no change
    # Share of a task's samples, rounded to 1 / whole number, on which the copy not chosen is computed (forward only).
    probe: Annotated[float, Field(gt=0, le=1)] = 1.0
    freeze_at: Positive | None = None  # the step from which each learned route is its more probable branch
    freeze_when_stable: Positive | None = (
        None  # or as soon as no route's more probable branch changed for so many steps
    )


@dataclass(config=STRICT, kw_only=True, frozen=True)
class Elastic:
    """Subnets of every task's path, of which each step trains some: leading slices of all its matrices. What is left
    out is as in the backbone, which is the largest subnet and so among the choices."""

    depth: list[Positive] = dataclasses.field(default_factory=list)  # the first blocks
    dim: list[Positive] = dataclasses.field(default_factory=list)
    stem: list[Annotated[float, Field(gt=0, le=1)]] = dataclasses.field(default_factory=list)  # share of its channels
    heads: list[Positive] = dataclasses.field(default_factory=list)  # of each block
    mlp_ratio: list[Ratio] = dataclasses.field(default_factory=list)  # of each block, times the subnet's dim
    # "sandwich": the largest, the smallest and `random` others of each task in every step (Yu and Huang, 2019);
    # "random": one of each task, as published. The running statistics of necks then mix all sizes: evaluation while
    # training is of little use; `ufo evaluate` and what cuts subnets out find them anew.
    sampling: Literal["sandwich", "random"] = "sandwich"
    random: Annotated[int, Field(ge=0)] = 1
    # Share of the loss of the smaller ones that is the divergence from what the largest says of the same images
    # (in-place distillation: Yu et al., 2020); the rest is the loss of the labels.
    distillation: Share = 0.9

    @property
    def subnets(self) -> int:
        """How many of each task a step trains."""
        return 1 if self.sampling == "random" else 2 + self.random


@dataclass(config=STRICT, kw_only=True, frozen=True)
class Model:
    backbone: Backbone
    experts: list[Unit] = dataclasses.field(default_factory=list)  # units of which each task has a copy of its own
    # Per unit a route for all layers, or one for each layer; a unit with experts is `own` unless said otherwise.
    routes: dict[Unit, Route | list[Route]] = dataclasses.field(default_factory=dict)
    router: Router = dataclasses.field(default_factory=Router)
    # The step until which all tasks take the shared path. Own copies then start as copies of it (sparse upcycling).
    branch_at: Positive | None = None
    # Share of every task's training samples, rounded up, that takes the shared copy of every unit whatever the routes,
    # so that the shared path stays one from which a new task can start.
    shared_samples: Share = 0.0
    elastic: Elastic | None = None  # train subnets of all sizes beside the whole
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0  # of the last layer, rising linearly from 0
    input: Size | None = None  # of the shared position embedding; default: the first task's input
    # Blocks of which only the input is kept for the backward pass, which computes them again (Chen et al., 2016): none,
    # all ("full"), or every n-th, from the first on.
    activation_checkpointing: Literal["none", "full"] | int = "none"
    # To start from: a run directory or checkpoint (all that it holds of the recipe's tasks, learned routes decided as
    # they are there), a model of `ufo extract`, or any Hugging Face ViT (directory or hub id).
    init: str | None = None

    @field_validator("activation_checkpointing", mode="before")
    @classmethod
    def _none_full_or_every_nth(cls, value: Any) -> Any:
        if value not in ("none", "full") and (type(value) is not int or value < 2):
            raise ValueError(f'{value!r} is neither "none" nor "full" nor a whole number from 2, for every n-th block')
        return value

    @property
    def subnets(self) -> int:
        """How many of each task a step trains, the whole among them."""
        return 1 if self.elastic is None else self.elastic.subnets

    @property
    def recomputed_blocks(self) -> range:
        """Those that activation checkpointing computes again."""
        chosen = self.activation_checkpointing
        return range(0) if chosen == "none" else range(0, self.backbone.depth, 1 if chosen == "full" else chosen)

    @model_validator(mode="after")
    def _freezes_after_branching(self) -> "Model":
        frozen = self.router.freeze_at
        if self.branch_at and frozen and frozen <= self.branch_at:
            raise ValueError(f"router.freeze_at {frozen} is not after branch_at {self.branch_at}: raise it")
        return self

    @model_validator(mode="after")
    def _largest_subnet_is_the_backbone(self) -> "Model":
        if self.elastic is None:
            return self
        backbone = self.backbone
        if isinstance(backbone.heads, list) or isinstance(backbone.mlp_ratio, list):
            raise ValueError("elastic needs a backbone whose blocks are alike: give one number of heads and mlp_ratio")
        whole = {"depth": backbone.depth, "dim": backbone.dim, "heads": backbone.heads, "mlp_ratio": backbone.mlp_ratio}
        for name, largest in {**whole, "stem": 1.0}.items():
            choices = getattr(self.elastic, name)
            if choices and max(choices) != largest:
                raise ValueError(f"elastic.{name} {choices}: the largest must be {largest:g}, as in the backbone")
        if self.elastic.stem and not backbone.stem:
            raise ValueError(f"elastic.stem {self.elastic.stem}, but the backbone has no stem: remove it")
        for share in self.elastic.stem:
            if stem_stride(narrow_stem(backbone.stem, share)) != stem_stride(backbone.stem):
                raise ValueError(f"elastic.stem {share:g} of {backbone.stem} is {narrow_stem(backbone.stem, share)}: "
                                 "channels that differ must stay different")  # fmt: skip
        return self

    @model_validator(mode="before")
    @classmethod
    def _backbone_name(cls, value: Any) -> Any:
        fields = dict(value.kwargs or {}) if hasattr(value, "kwargs") else value
        if isinstance(fields, dict) and isinstance(fields.get("backbone"), str):
            return {**fields, "backbone": {"name": fields["backbone"]}}
        return value


def number_of_routes(unit: str, depth: int) -> int:
    """How often a unit is routed: once per block; the embedding once; norms in every block and after the last."""
    return {"embed": 1, "norm": depth + 1}.get(unit, depth)


def narrow_stem(stem: Sequence[int], share: float) -> tuple[int, ...]:
    """The leading channels of every layer of a stem, at least one."""
    return tuple(max(1, round(channels * share)) for channels in stem)


def stem_stride(stem: Sequence[int]) -> int:
    """By how much a stem reduces height and width: by 2 with every change of the number of channels."""
    return 2 ** sum(a != b for a, b in pairwise([3, *stem]))
