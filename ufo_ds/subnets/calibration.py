"""``calibration.json`` of a model: the similarity from which two images count as the same, and how sure that is.

::

    {
      "model": "9f2c...",                                 the model's fingerprint
      "task": "faces", "benchmark": "lfw",                on which it was measured
      "flip": false,                                      outputs averaged with the mirror image's, as there
      "probability": {"slope": 21.4, "intercept": -7.9},  of the same: 1 / (1 + exp(-(slope x cosine + intercept)))
      "thresholds": [
        {"far": 0.001, "threshold": 0.41, "expected_far": 0.001, "far_interval": [0.0004, 0.0021], "tar": 0.97,
         "tar_interval": [0.96, 0.98], "impostors": 30000, "genuine": 3000, "identities": 4000}
      ]
    }

A pair counts as the same when its cosine is the threshold or more; :class:`ufo_ds.evaluation.thresholds.Threshold` says
what the other figures are.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from ufo_ds.checkpoint import write_text
from ufo_ds.errors import UserError
from ufo_ds.evaluation.thresholds import Probability, Threshold


@dataclass(config=ConfigDict(extra="forbid", allow_inf_nan=False), kw_only=True, frozen=True)
class Calibration:
    model: str
    task: str
    benchmark: str
    flip: bool
    probability: Probability
    thresholds: Annotated[list[Threshold], Field(min_length=1)]


def table(calibration: Calibration) -> Iterator[str]:
    """Lines for people."""
    first = calibration.thresholds[0]
    yield (
        f"{calibration.task}/{calibration.benchmark}: {first.genuine:,} pairs of the same, {first.impostors:,} of "
        f"others, {first.identities:,} identities"
    )
    yield "     FAR  95% interval       threshold      TAR  95% interval"
    for t in calibration.thresholds:
        far, tar = ("{:7.1e} .. {:7.1e}".format(*t.far_interval), "{:.4f} .. {:.4f}".format(*t.tar_interval))
        yield f"{t.far:8.2g}  {far}  {t.threshold:9.4f}  {t.tar:7.4f}  {tar}"


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
