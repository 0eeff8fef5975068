"""How long any subnet of a space takes on a device, from some that were measured there: a device profile.

The time of a call is a sum of what there is to do, each part at a rate of the device that is learned: calling the model
and each of its blocks at all, multiply-adds of attention projections, attention, FFNs and embedding, and elements that
norms, residuals and activations pass over. No rate is negative, so that no subnet gets faster by more work, and the
squares of relative errors are least (non-negative least squares: Lawson and Hanson, 1974).
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from scipy.optimize import nnls

from ufo_ds.checkpoint import write_text
from ufo_ds.errors import UserError
from ufo_ds.model.architecture import Architecture, SearchSpace
from ufo_ds.model.cost import embedding_cost, tokens_of
from ufo_ds.recipe import Recipe
from ufo_ds.recipe_model import Backbone
from ufo_ds.recipe_task import Positive, Size

# What a time is the sum of, with its unit; of all images of a call.
WORK = (
    "call", "blocks", "projections_gflop", "attention_gflop", "ffn_gflop", "embedding_gflop", "tokens_melement",
    "hidden_melement",
)  # fmt: skip
_FILE = ConfigDict(extra="forbid", allow_inf_nan=False)
Milliseconds = Annotated[float, Field(gt=0)]


@dataclass(config=_FILE, kw_only=True, frozen=True)
class Target:
    """What models run on, and how they are called."""

    backend: Literal["torch", "compile", "onnx"] = "torch"
    device: Literal["cpu", "cuda"] = "cpu"
    batch_size: Positive = 1
    threads: Positive = 1  # of the CPU
    dtype: Literal["fp32", "bf16"] = "fp32"


@dataclass(config=_FILE, kw_only=True, frozen=True)
class Measurement:
    architecture: Architecture
    ms: Milliseconds


@dataclass(config=_FILE, kw_only=True, frozen=True)
class Profile:
    """
    Attributes:
        machine: names of the machine and of its CPU or GPU.
        versions: of the libraries that ran there.
        input: height and width of the images.
        coefficients: milliseconds for each of :data:`WORK`.
        error: mean relative error of predicting each of the measurements from the others.
        source: the file it was read from.
    """

    machine: dict[str, str]
    versions: dict[str, str]
    target: Target
    input: Size
    backbone: Backbone
    space: SearchSpace
    measurements: Annotated[list[Measurement], Field(min_length=2)]
    coefficients: dict[str, Annotated[float, Field(ge=0)]]
    error: float
    source: str = "this profile"

    @classmethod
    def load(cls, path: Path) -> "Profile":
        """
        Raises:
            UserError: it cannot be read, or is not of this form.
        """
        try:
            profile = TypeAdapter(cls).validate_json(path.read_bytes())
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}: give a device profile, as `ufo latency` writes it") from None
        except ValidationError as error:
            fault = error.errors()[0]
            where = ".".join(map(str, fault["loc"])) or "the file"
            raise UserError(
                f"{path} is no device profile: {where}: {fault['msg']}: make it with `ufo latency`"
            ) from None
        if set(profile.coefficients) != set(WORK):
            raise UserError(f"{path} has other coefficients than {', '.join(WORK)}: make it again with `ufo latency`")
        return dataclasses.replace(profile, source=str(path))

    def save(self, path: Path) -> None:
        write_text(path, json.dumps(self.values(), indent=1) + "\n")

    def values(self) -> dict[str, Any]:
        """Plain ones, as in its file."""
        values = TypeAdapter(Profile).dump_python(self, mode="json")
        del values["source"]
        return values

    def check(self, recipe: Recipe, task: str) -> None:
        """
        Raises:
            UserError: it is of another model or space than the recipe's, or of another input than the task's.
        """
        size = next(t.input for t in recipe.tasks if t.name == task)
        mine, its = (
            _sizes(self.backbone, self.space, self.input),
            _sizes(recipe.model.backbone, SearchSpace.of(recipe.model), size),
        )
        for name, value in mine.items():
            if value != its[name]:
                raise UserError(
                    f"{self.source} is of a model with {name} {value}, that of task {task} has {its[name]}: "
                    "measure this one with `ufo latency`"
                )

    def predict(self, architectures: Sequence[Architecture]) -> np.ndarray:
        """Milliseconds of a call for each of N subnets of the space, ``[N]``."""
        work_NW = work(self.backbone, self.input, self.target.batch_size, architectures)
        return work_NW @ np.array([self.coefficients[name] for name in WORK])


def work(backbone: Backbone, input_hw: Size, batch_size: int, architectures: Sequence[Architecture]) -> np.ndarray:
    """What each of N subnets has to do in a call, ``[N, len(WORK)]``."""
    tokens = tokens_of(backbone, input_hw)
    rows = []
    for path in architectures:
        width, hidden = sum(path.heads) * backbone.head_width, sum(path.hidden)  # of all blocks together
        flops = [
            8 * tokens * path.dim * width,
            4 * tokens**2 * width,
            4 * tokens * path.dim * hidden,
            embedding_cost(backbone, path, input_hw).flops,
        ]
        elements = [tokens * path.dim * path.depth, tokens * hidden]
        of_images = [*(1e-9 * count for count in flops), *(1e-6 * count for count in elements)]
        rows.append([1, path.depth, *(batch_size * count for count in of_images)])
    return np.array(rows, dtype=float).reshape(-1, len(WORK))


def fit(work_NW: np.ndarray, ms_N: np.ndarray) -> np.ndarray:
    """Milliseconds for each unit of work, ``[W]``, none negative, with the least squares of relative errors."""
    relative_NW = work_NW / ms_N[:, None]
    scale_W = np.linalg.norm(relative_NW, axis=0)
    scale_W[scale_W == 0] = 1  # nothing of it in any of them
    return nnls(relative_NW / scale_W, np.ones(len(ms_N)))[0] / scale_W


def left_out_errors(work_NW: np.ndarray, ms_N: np.ndarray) -> np.ndarray:
    """Relative error for each of N, predicted by what the others give, ``[N]``."""
    rows = np.arange(len(ms_N))
    predicted_N = [work_NW[i] @ fit(work_NW[rows != i], ms_N[rows != i]) for i in rows]
    return np.abs(np.array(predicted_N) / ms_N - 1)


def to_measure(space: SearchSpace, count: int) -> list[Architecture]:
    """Up to so many different subnets: the largest, the smallest, and by turns one at random and one whose blocks are
    all alike. The latter reach further: sums over many random blocks are all close to their mean."""
    found = dict.fromkeys([space.largest, space.smallest])
    for i in range(20 * count):  # small spaces have fewer
        if len(found) >= count:
            break
        drawn = space.draw("latency", i)
        if i % 2:
            once, heads, ratios = space.levels(drawn)
            layers = space.depth[-1]
            drawn = space.architecture(once, [heads[0]] * layers, [ratios[0]] * layers)
        found[drawn] = None
    return list(found)[:count]


def _sizes(backbone: Backbone, space: SearchSpace, input_hw: Size) -> dict[str, Any]:
    """All that times depend on."""
    return {
        "input": tuple(input_hw),
        **{f"backbone.{name}": getattr(backbone, name) for name in ("dim", "depth", "heads", "head_width")},
        **{f"backbone.{name}": getattr(backbone, name) for name in ("mlp_ratio", "patch_size", "stem", "pool")},
        **{f"elastic {name}": choices for name, choices in dataclasses.asdict(space).items()},
    }
