"""What an evaluation found, item by item: kept beside a run's metrics, so that runs can be compared with intervals.

::

    evaluations/step-00001000/<task>.<benchmark>.safetensors
    evaluations/step-00001000/metrics.json          task/benchmark/metric -> value, of all of them

Each file holds the arrays of its protocol's ``outcomes`` and, as JSON in its header, which benchmark they are of.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ufo_ds import checkpoint
from ufo_ds.errors import UserError
from ufo_ds.evaluation import (
    attributes,
    classification,
    identification,
    one_shot,
    random_gallery,
    recall,
    retrieval,
    templates,
    verification,
)
from ufo_ds.evaluation.statistics import Items
from ufo_ds.recipe_benchmark import Protocol

# Each is a module of pure functions: outcomes of arrays; metrics, items and chance of outcomes.
PROTOCOLS: dict[Protocol, Any] = {
    "classification": classification,
    "attributes": attributes,
    "retrieval": retrieval,
    "recall": recall,
    "random_gallery": random_gallery,
    "verification": verification,
    "templates": templates,
    "identification": identification,
    "one_shot": one_shot,
}

METRICS = "metrics.json"


@dataclass(frozen=True)
class Outcomes:
    """One benchmark's outcomes.

    Attributes:
        protocol: of the benchmark.
        settings: of the benchmark, those that are not the default (flip, re-ranking, ...).
        data: a digest of the names of labels and cameras, and of the pairs: alike for the same data alone.
        arrays: the protocol's ``outcomes``; for verification also ``identity``, int [M, 2].
    """

    protocol: Protocol
    settings: dict[str, Any]
    data: str
    arrays: dict[str, np.ndarray]

    def metrics(self) -> dict[str, float]:
        return PROTOCOLS[self.protocol].metrics(self.arrays)

    def chance(self) -> dict[str, float]:
        """What guessing gets, of the metrics where that is known."""
        return PROTOCOLS[self.protocol].chance(self.arrays)

    @property
    def main_metric(self) -> str:
        """The metric by which models are compared."""
        return PROTOCOLS[self.protocol].MAIN_METRIC

    @property
    def scores(self) -> np.ndarray:
        """The score of each item, float64 [N]: the main metric is their mean by the weight of :attr:`items`."""
        return PROTOCOLS[self.protocol].items(self.arrays)[0]

    @property
    def items(self) -> Items:
        return PROTOCOLS[self.protocol].items(self.arrays)[1]


def flatten(outcomes: Mapping[str, Outcomes]) -> dict[str, float]:
    """Metrics of all benchmarks: ``task/benchmark/metric`` -> value."""
    return {f"{key}/{name}": value for key, found in outcomes.items() for name, value in found.metrics().items()}


def directory_of(run: Path, step: int | None) -> Path:
    """Of a step of a run; of a model, which has none, without it."""
    return run / "evaluations" / (checkpoint.name_of(step) if step is not None else "")


def store(run: Path, step: int | None, outcomes: Mapping[str, Outcomes]) -> None:
    """Keep outcomes (by ``task/benchmark``) in the directory of a run or model, each file written as a whole.

    Raises:
        UserError: it cannot be written to.
    """
    metrics = directory_of(run, step) / METRICS
    try:
        metrics.parent.mkdir(parents=True, exist_ok=True)
        for key, found in outcomes.items():
            about = {
                "benchmark": key, "protocol": found.protocol, "settings": found.settings, "data": found.data,
                "step": step,
            }  # fmt: skip
            arrays = {name: a.astype(np.int32) if a.dtype.kind == "i" else a for name, a in found.arrays.items()}
            checkpoint.write_bytes(path_of(run, step, key), save(arrays, {"about": json.dumps(about)}))
        earlier = json.loads(metrics.read_text()) if metrics.exists() else {}
        checkpoint.write_text(metrics, json.dumps(earlier | flatten(outcomes), indent=1) + "\n")
    except OSError as error:
        raise UserError(
            f"{run}: outcomes for `ufo compare` not kept ({error.strerror}): make room or get permission to write there"
        ) from None


def load(run: Path, step: int | None, key: str) -> Outcomes:
    """Read what :func:`store` wrote of one benchmark.

    Raises:
        UserError: nothing was, or the file is damaged.
    """
    path = path_of(run, step, key)
    if not path.is_file():
        raise UserError(
            f"{path} is missing: finish the training in {run}, or `ufo evaluate {run} --last` if it is finished"
        )
    try:
        with safe_open(path, "np") as file:
            about = json.loads((file.metadata() or {})["about"])
            names = file.keys()
            arrays = {name: file.get_tensor(name) for name in names}
        found = Outcomes(about["protocol"], about["settings"], about["data"], arrays)
        found.metrics()  # a KeyError where an array is missing
        return found
    except (SafetensorError, KeyError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}): make it again with `ufo evaluate {run} --last`") from None


def path_of(run: Path, step: int | None, key: str) -> Path:
    task, benchmark = key.split("/", 1)
    return directory_of(run, step) / f"{task}.{quote(benchmark, safe='')}.safetensors"
