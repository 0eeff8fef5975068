"""What an evaluation found, item by item: kept beside a run's metrics, so that runs can be compared with intervals.

::

    evaluations/step-00001000/<task>.<benchmark>.safetensors

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
from ufo_ds.evaluation import classification, retrieval, verification
from ufo_ds.evaluation.statistics import Items

_PROTOCOLS: dict[str, Any] = {"classification": classification, "retrieval": retrieval, "verification": verification}
# Of each protocol the metric by which models are compared, and the score of each item whose mean it is.
MAIN_METRIC = {"classification": "top1", "retrieval": "mAP", "verification": "accuracy"}
_SCORE = {"classification": "right", "retrieval": "average_precision", "verification": "right"}


@dataclass(frozen=True)
class Outcomes:
    """One benchmark's outcomes.

    Attributes:
        protocol: of the benchmark.
        flip: whether images were averaged with their mirror images.
        data: a digest of the names of labels and cameras, and of the pairs: alike for the same data alone.
        arrays: the protocol's ``outcomes``; for verification also ``identity``, int [M, 2].
    """

    protocol: str
    flip: bool
    data: str
    arrays: dict[str, np.ndarray]

    def metrics(self) -> dict[str, float]:
        return _PROTOCOLS[self.protocol].metrics(self.arrays)

    @property
    def scores(self) -> np.ndarray:
        """The score of each item, float64 [N]: the main metric is their mean by the weight of :attr:`items`."""
        return self.arrays[_SCORE[self.protocol]].astype(np.float64)

    @property
    def items(self) -> Items:
        """Clusters are identities; images for classification, whose classes are not a sample of classes."""
        count = len(self.scores)
        if self.protocol == "verification":  # a mean over folds of means
            _, fold_N, sizes = np.unique(self.arrays["fold"], return_inverse=True, return_counts=True)
            return Items(1 / (len(sizes) * sizes[fold_N]), self.arrays["identity"])
        identity = self.arrays["identity"] if self.protocol == "retrieval" else np.arange(count)
        return Items(np.full(count, 1 / count), identity[:, None])


def flatten(outcomes: Mapping[str, Outcomes]) -> dict[str, float]:
    """Metrics of all benchmarks: ``task/benchmark/metric`` -> value."""
    return {f"{key}/{name}": value for key, found in outcomes.items() for name, value in found.metrics().items()}


def directory_of(run: Path, step: int) -> Path:
    return run / "evaluations" / checkpoint.name_of(step)


def store(run: Path, step: int, outcomes: Mapping[str, Outcomes]) -> None:
    """Keep outcomes (by ``task/benchmark``) in a run directory, each file written as a whole.

    Raises:
        UserError: it cannot be written to.
    """
    try:
        directory_of(run, step).mkdir(parents=True, exist_ok=True)
        for key, found in outcomes.items():
            about = {"benchmark": key, "protocol": found.protocol, "flip": found.flip, "data": found.data, "step": step}
            arrays = {name: a.astype(np.int32) if a.dtype.kind == "i" else a for name, a in found.arrays.items()}
            checkpoint.write_bytes(path_of(run, step, key), save(arrays, {"about": json.dumps(about)}))
    except OSError as error:
        raise UserError(
            f"{run}: outcomes for `ufo compare` not kept ({error.strerror}): make room or get permission to write there"
        ) from None


def load(run: Path, step: int, key: str) -> Outcomes:
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
        return Outcomes(about["protocol"], about["flip"], about["data"], arrays)
    except (SafetensorError, KeyError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}): make it again with `ufo evaluate {run} --last`") from None


def path_of(run: Path, step: int, key: str) -> Path:
    task, benchmark = key.split("/", 1)
    return directory_of(run, step) / f"{task}.{quote(benchmark, safe='')}.safetensors"
