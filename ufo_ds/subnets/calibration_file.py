"""``calibration.json`` of a model: the similarity from which two images count as the same, and how sure that is.

::

    {
      "model": "9f2c...",                                 the model's fingerprint
      "task": "faces", "benchmark": "lfw",                on which it was measured
      "flip": false,                                      outputs averaged with the mirror image's, as there
      "pairs": {"same": 3000, "different": 3000},
      "probability": {"slope": 21.4, "intercept": -7.9},  of the same: 1 / (1 + exp(-(slope x cosine + intercept)))
      "thresholds": [
        {"far": 0.001, "threshold": 0.41, "far_interval": [0.0004, 0.0021], "tar": 0.97, "tar_interval": [0.96, 0.98]}
      ]
    }

A pair counts as the same when its cosine is the threshold or more. ``far`` is what was asked for, ``far_interval`` and
``tar_interval`` say within which bounds the rates of the threshold are known. The probability is that where half of
all pairs are the same.
"""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from ufo_ds.checkpoint import write_text
from ufo_ds.errors import UserError

_PLAIN = ConfigDict(extra="forbid", allow_inf_nan=False)
Share = Annotated[float, Field(ge=0, le=1)]


@dataclass(config=_PLAIN, kw_only=True, frozen=True)
class Threshold:
    far: Share
    threshold: float
    far_interval: tuple[Share, Share]
    tar: Share
    tar_interval: tuple[Share, Share]


@dataclass(config=_PLAIN, kw_only=True, frozen=True)
class Probability:
    slope: float
    intercept: float

    def of(self, cosine: float) -> float:
        """That two images with this cosine show the same, where half of all pairs do."""
        return 0.5 * (1 + math.tanh((self.slope * cosine + self.intercept) / 2))  # the logistic function, no overflow


@dataclass(config=_PLAIN, kw_only=True, frozen=True)
class Calibration:
    model: str
    task: str
    benchmark: str
    flip: bool
    pairs: dict[str, int]
    probability: Probability
    thresholds: Annotated[list[Threshold], Field(min_length=1)]


def write(path: Path, calibration: Calibration) -> None:
    """
    Raises:
        UserError: it cannot be written.
    """
    try:
        write_text(path, json.dumps(asdict(calibration), indent=2) + "\n")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}: choose a place you can write to") from None


def read(path: Path, fingerprint: str) -> Calibration | None:
    """The calibration of the model with this fingerprint, None where no file is.

    Raises:
        UserError: the file is of another model, or not of this form.
    """
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}: make it readable") from None
    try:
        found = TypeAdapter(Calibration).validate_json(text)
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(map(str, fault["loc"])) or "the file"
        raise UserError(f"{path} is no calibration: {where}: {fault['msg']}: make it again") from None
    if found.model != fingerprint:
        raise UserError(
            f"{path} is the calibration of model {found.model[:12]}, this is model {fingerprint[:12]}: make it again"
        )
    return found
