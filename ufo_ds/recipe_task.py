"""A task of a recipe, as typed dataclasses: its data, head, losses and benchmarks."""

import dataclasses
import math
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from ufo_ds.recipe_benchmark import STRICT, Benchmark, Positive

Unit = Literal["embed", "norm", "attn", "ffn"]
Route = Literal["shared", "own", "learned"]
Size = tuple[Annotated[int, Field(gt=0)], Annotated[int, Field(gt=0)]]  # height, width in pixels
Share = Annotated[float, Field(ge=0, le=1)]


@dataclass(config=STRICT, kw_only=True, frozen=True)
class Head:
    """``linear``: logits. ``margin``: a BN neck and a cosine classifier (its losses add the margin)."""

    type: Literal["linear", "margin"]
    neck: bool = False  # a BN neck before a linear classifier as well
    sharded: bool = False  # the classifier's rows are spread over the ranks that hold the task, each with its part
    # Share of the classes that are not in the batch against which a margin head's samples are set, drawn every step.
    sampled_negatives: Annotated[float, Field(gt=0, le=1)] = 1.0


@dataclass(config=STRICT, kw_only=True, frozen=True)
class CrossEntropy:
    label_smoothing: Share = 0.0
    scale: Annotated[float, Field(gt=0)] | None = None  # of a margin head's cosines; a linear head needs none
    weight: float = 1.0


@dataclass(config=STRICT, kw_only=True, frozen=True)
class BinaryCrossEntropy:
    """Of each attribute whether an image has it, averaged over attributes: see ``ufo_ds.data.attributes``."""

    weight: float = 1.0


@dataclass(config=STRICT, kw_only=True, frozen=True)
class CosFace:
    scale: Annotated[float, Field(gt=0)] = 30.0
    margin: Annotated[float, Field(ge=0)] = 0.2
    weight: float = 1.0


@dataclass(config=STRICT, kw_only=True, frozen=True)
class AMSoftmax(CosFace):
    """The formula of CosFace, published at the same time; recorded under its own name, with its paper's margin."""

    margin: Annotated[float, Field(ge=0)] = 0.35


@dataclass(config=STRICT, kw_only=True, frozen=True)
class ArcFace:
    scale: Annotated[float, Field(gt=0)] = 64.0
    margin: Annotated[float, Field(ge=0, le=math.pi / 2)] = 0.5  # radians
    weight: float = 1.0


@dataclass(config=STRICT, kw_only=True, frozen=True)
class Circle:
    """With class-level labels."""

    scale: Annotated[float, Field(gt=0)] = 128.0
    margin: Annotated[float, Field(ge=0, lt=1)] = 0.25
    weight: float = 1.0


@dataclass(config=STRICT, kw_only=True, frozen=True)
class Triplet:
    margin: float | Literal["soft"] = "soft"
    normalize: bool = False  # distances between embeddings, behind the neck, of length 1
    weight: float = 1.0


@dataclass(config=STRICT, kw_only=True, frozen=True)
class Loss:
    """A weighted sum of those that are given; weights are relative to each other, ``weight`` of the task is of all."""

    cross_entropy: CrossEntropy | None = None
    binary_cross_entropy: BinaryCrossEntropy | None = None
    cosface: CosFace | None = None
    am_softmax: AMSoftmax | None = None
    arcface: ArcFace | None = None
    circle: Circle | None = None
    triplet: Triplet | None = None

    @property
    def given(self) -> list[str]:
        return [field.name for field in dataclasses.fields(self) if getattr(self, field.name) is not None]

    @property
    def multi_label(self) -> bool:
        """Whether labels are sets of attributes, and the outputs of the head one logit for each."""
        return self.binary_cross_entropy is not None

    @property
    def on_cosines(self) -> list[str]:
        """Those that only a margin head can have."""
        return [name for name in ("cosface", "am_softmax", "arcface", "circle") if getattr(self, name) is not None]


@dataclass(config=STRICT, kw_only=True, frozen=True)
class TrainSet:
    shards: str  # a directory made by `ufo shards`, or tars, here or elsewhere: see ``ufo_ds.data.shard_specs``


@dataclass(config=STRICT, kw_only=True, frozen=True)
class Affine:
    """A random affine map of the whole image onto the input, each part uniform; see ``ufo_ds.data.augmentation``."""

    rotation: Annotated[float, Field(ge=0, le=180)] = 0.0  # degrees to either side
    scale: tuple[Annotated[float, Field(ge=0.1)], Annotated[float, Field(le=10)]] = (1.0, 1.0)  # smallest, largest
    shear: Annotated[float, Field(ge=0, le=60)] = 0.0  # degrees to either side, horizontally
    translation: Share = 0.0  # of width and height, to either side

    @model_validator(mode="after")
    def _ordered(self) -> "Affine":
        if self.scale[0] > self.scale[1]:
            raise ValueError(f"scale {list(self.scale)}: give the smaller one first")
        return self


@dataclass(config=STRICT, kw_only=True, frozen=True)
class Jitter:
    """Factors drawn from 1 +- the value; see ``ufo_ds.data.augmentation``."""

    brightness: Share = 0.0
    contrast: Share = 0.0
    saturation: Share = 0.0
    grayscale: Share = 0.0  # probability of no colour at all
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.0  # shares of a full turn to either side, in HSV


@dataclass(config=STRICT, kw_only=True, frozen=True)
class RandomResizedCrop:
    """A random part of the original image, resized to the input (Szegedy et al., 2015); uniform in area and place, and
    in the logarithm of the aspect."""

    area: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(le=1)]] = (0.08, 1.0)  # shares of the image's
    aspect: tuple[Annotated[float, Field(gt=0)], float] = (3 / 4, 4 / 3)  # width / height

    @model_validator(mode="after")
    def _ordered(self) -> "RandomResizedCrop":
        for key in ("area", "aspect"):
            smallest, largest = getattr(self, key)
            if smallest > largest:
                raise ValueError(f"{key} {[smallest, largest]}: give the smaller one first")
        return self


@dataclass(config=STRICT, kw_only=True, frozen=True)
class AutoAugment:
    """One of the 25 pairs of operations found on ImageNet (Cubuk et al., 2019); see ``ufo_ds.data.policies``."""

    policy: Literal["imagenet"] = "imagenet"
    probability: Share = 1.0  # of any change


@dataclass(config=STRICT, kw_only=True, frozen=True)
class RandAugment:
    """Random operations, all of one strength (Cubuk et al., 2020); see ``ufo_ds.data.policies``."""

    operations: Positive = 2  # one after another, drawn with replacement from 14
    magnitude: Annotated[float, Field(ge=0, le=10)] = 9.0  # 10: the end of every operation's range


@dataclass(config=STRICT, kw_only=True, frozen=True)
class Mix:
    """Of samples with other ones of the task; the weight of the first is drawn from Beta(alpha, alpha)."""

    alpha: Annotated[float, Field(gt=0)] = 1.0
    probability: Share = 0.5


@dataclass(config=STRICT, kw_only=True, frozen=True)
class Augment:
    """In the order in which it is done."""

    resize: Size | None = None  # of the image before all that is random, not below the input; default: the input
    random_resized_crop: RandomResizedCrop | None = None  # in place of the resize
    # Of the resize, or of random_resized_crop (there by default bilinear): by torch, fast. Default of the resize:
    # bilinear by Pillow, three times slower and to the bit as in evaluation; the two bilinear ones differ by at most 1.
    interpolation: Literal["bilinear", "bicubic"] | None = None
    affine: Affine | None = None
    auto_augment: AutoAugment | None = None
    rand_augment: RandAugment | None = None
    jitter: Jitter | None = None
    pad: Annotated[int, Field(ge=0)] = 0  # black pixels on every side, then a random crop to the input size
    flip: bool = False
    erasing: Share = 0.0  # probability of Random Erasing (Zhong et al., 2020)
    # Of a sample one or the other or none, so their probabilities add up to at most 1; for linear heads.
    mixup: Mix | None = None  # the mean of two images, and of their losses (Zhang et al., 2018)
    cutmix: Mix | None = None  # a rectangle of another image (Yun et al., 2019)

    @property
    def mixes(self) -> bool:
        return self.mixup is not None or self.cutmix is not None


@dataclass(config=STRICT, kw_only=True, frozen=True)
class Task:
    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
    head: Head
    loss: Loss
    input: Size
    samples_per_step: Annotated[int, Field(ge=0)] = 0  # 0: follows from `share` or `data.temperature`
    # Relative weight with which the task gets its part of data.samples_per_step; see ``ufo_ds.data.ratios``.
    share: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    train: list[TrainSet] = dataclasses.field(default_factory=list)
    # Of the images, before quarter_turns; default, and all that attributes can have: counted in the shards.
    num_classes: Positive | None = None
    identities_per_step: Positive | None = None  # PK sampling: P identities of samples_per_step / P images each
    images_per_identity: Annotated[int, Field(ge=2)] | None = None  # the same with `share` or `data.temperature`: K
    weight: float = 1.0
    lr_scale: Annotated[float, Field(ge=0)] = 1.0  # of the task's own copies and head
    routes: dict[Unit, Route | list[Route]] = dataclasses.field(default_factory=dict)  # over model.routes
    augment: Augment = dataclasses.field(default_factory=Augment)
    # In training the quarter turns of an image are four classes, 4 x num_classes in all (Santoro et al., 2016).
    quarter_turns: bool = False
    benchmarks: list[Benchmark] = dataclasses.field(default_factory=list)

    @model_validator(mode="after")
    def _free_name(self) -> "Task":
        if hasattr(torch.nn.ModuleDict, self.name):  # modules are named after tasks
            raise ValueError(f"the name {self.name!r} is taken by PyTorch: choose another, such as {self.name}_task")
        return self

    @model_validator(mode="after")
    def _consistent(self) -> "Task":
        p, k, n = self.identities_per_step, self.images_per_identity, self.samples_per_step
        if p and not n:
            raise ValueError(
                f"{self.name}: identities_per_step {p} goes with samples_per_step; with a share or data.temperature "
                f"give images_per_identity"
            )
        if k and n:
            raise ValueError(
                f"{self.name}: images_per_identity {k} goes with a share or data.temperature; with samples_per_step "
                f"{n} give identities_per_step"
            )
        if p and n < 2 * p:
            raise ValueError(
                f"{self.name}: samples_per_step {n} is smaller than P x K = {p} x 2; raise samples_per_step or lower "
                f"identities_per_step"
            )
        if p and n % p:
            raise ValueError(f"{self.name}: samples_per_step {n} is not a multiple of identities_per_step {p}")
        if self.loss.triplet and not (p or k):
            raise ValueError(
                f"{self.name}: triplet needs PK sampling: {'identities_per_step' if n else 'images_per_identity'}"
            )
        return self

    @model_validator(mode="after")
    def _attributes_fit(self) -> "Task":
        if not self.loss.multi_label:
            return self
        if self.loss.given != ["binary_cross_entropy"]:
            others = ", ".join(name for name in self.loss.given if name != "binary_cross_entropy")
            raise ValueError(f"{self.name}: binary_cross_entropy is a task's only loss: remove it or {others}")
        if self.head.type != "linear" or self.head.sharded:
            raise ValueError(f"{self.name}: binary_cross_entropy is for a linear head that is not sharded")
        if self.identities_per_step or self.images_per_identity:
            raise ValueError(
                f"{self.name}: attributes are no identities: remove "
                f"{'identities_per_step' if self.identities_per_step else 'images_per_identity'}"
            )
        return self

    @model_validator(mode="after")
    def _losses_fit(self) -> "Task":
        loss, ce = self.loss, self.loss.cross_entropy
        if self.head.type == "linear" and self.head.sampled_negatives < 1:
            raise ValueError(f"{self.name}: sampled_negatives is for margin heads: remove it")
        if self.augment.mixes and (self.head.type != "linear" or loss.triplet):
            raise ValueError(f"{self.name}: mixup and cutmix are for a linear head without triplet")
        if loss.multi_label:
            return self  # see above
        if self.head.type == "linear":
            if ce is None or loss.on_cosines or ce.scale is not None:
                raise ValueError(f"{self.name}: a linear head goes with cross_entropy without scale, and needs it")
        elif ce is None and not loss.on_cosines:
            raise ValueError(f"{self.name}: a margin head needs cosface, am_softmax, arcface, circle or cross_entropy")
        elif ce is not None and ce.scale is None:
            raise ValueError(f"{self.name}: cross_entropy of a margin head needs the scale of its cosines, such as 30")
        elif self.head.sharded and any(b.protocol == "classification" for b in self.benchmarks):
            raise ValueError(f"{self.name}: a sharded margin head gives no logits: remove classification benchmarks")
        return self

    @model_validator(mode="after")
    def _images_fit(self) -> "Task":
        size = self.augment.resize or self.input
        if size[0] < self.input[0] or size[1] < self.input[1]:
            raise ValueError(f"{self.name}: augment.resize {size} is smaller than the input {self.input}")
        if self.augment.random_resized_crop and self.augment.resize:
            raise ValueError(f"{self.name}: random_resized_crop takes the place of resize: remove one of them")
        if sum(mix.probability for mix in (self.augment.mixup, self.augment.cutmix) if mix) > 1:
            raise ValueError(f"{self.name}: the probabilities of mixup and cutmix add up to more than 1: lower them")
        if self.augment.auto_augment and self.augment.rand_augment:
            raise ValueError(f"{self.name}: both auto_augment and rand_augment: remove one of them")
        if self.quarter_turns and self.head.type != "margin":
            raise ValueError(f"{self.name}: quarter_turns need a margin head: a linear one is tested on its classes")
        if self.quarter_turns and (size[0] != size[1] or self.input[0] != self.input[1]):
            raise ValueError(f"{self.name}: quarter_turns need a square input and resize, not {self.input} and {size}")
        return self
