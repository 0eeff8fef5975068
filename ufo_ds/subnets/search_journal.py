"""What a search has evaluated, on disk: it goes on from there after an interruption.

::

    search.json          what is searched for
    evaluations.jsonl    a line for each candidate, in order
"""

import fcntl
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from ufo_ds import checkpoint
from ufo_ds.errors import UserError
from ufo_ds.model.spec import SubnetSpec
from ufo_ds.training.run_directory import differences


@dataclass(frozen=True)
class Evaluated:
    """A subnet of a task, truly evaluated."""

    spec: SubnetSpec
    metric: str
    metrics: dict[str, float]

    @property
    def value(self) -> float:
        return self.metrics[self.metric]


@dataclass(frozen=True)
class Record:
    """A candidate: a subnet of each task, and what they cost together."""

    subnets: list[Evaluated]
    costs: dict[str, float]

    def to_json(self) -> str:
        subnets = [
            {"name": s.spec.name, "metric": s.metric, "metrics": s.metrics, "spec": asdict(s.spec)}
            for s in self.subnets
        ]  # fmt: skip
        return json.dumps({"subnets": subnets, "costs": self.costs})

    @classmethod
    def from_json(cls, line: str, source: str) -> "Record":
        values = json.loads(line)
        subnets = [
            Evaluated(SubnetSpec.from_values(s["spec"], source), s["metric"], s["metrics"]) for s in values["subnets"]
        ]
        return cls(subnets, values["costs"])


class Journal:
    """
    Args:
        arguments: plain values, all that the results follow from.

    Attributes:
        records: of earlier processes and this one.

    Raises:
        UserError: the directory holds a search with other arguments, or something else.
    """

    def __init__(self, directory: Path, arguments: dict[str, Any]):
        self.directory = directory
        self._arguments = json.loads(json.dumps(arguments))
        self._file: TextIO | None = None
        self._path, about = directory / "evaluations.jsonl", directory / "search.json"
        self.records: list[Record] = []
        try:
            if about.exists():
                self._check(json.loads(about.read_text()))
            elif directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
                raise UserError(f"--out {directory} is there, and no search: choose another directory")
            text = self._path.read_bytes() if self._path.exists() else b""
            self._whole = text.rfind(b"\n") + 1  # a kill may cut the last line short
            lines = text[: self._whole].decode().splitlines()
            self.records = [Record.from_json(line, str(self._path)) for line in lines]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"--out {directory} cannot be read: {error}: choose another directory") from None

    def _check(self, saved: Any) -> None:
        for key, was, now in differences(saved, self._arguments):
            raise UserError(
                f"--out {self.directory} holds another search: {key} was {was!r}, is {now!r}: choose another "
                "directory or restore the value"
            )

    def add(self, record: Record) -> None:
        """
        Raises:
            UserError: it cannot be written, or another process does so.
        """
        try:
            if self._file is None:
                self.directory.mkdir(parents=True, exist_ok=True)
                self._file = self._path.open("a")
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                checkpoint.write_text(self.directory / "search.json", json.dumps(self._arguments, indent=1) + "\n")
                self._file.truncate(self._whole)
            print(record.to_json(), file=self._file, flush=True)
            os.fsync(self._file.fileno())
        except BlockingIOError:
            raise UserError(f"--out {self.directory}: another search writes there: wait or choose another") from None
        except OSError as error:
            raise UserError(f"--out {self.directory}: {error.strerror}: choose one you can write to") from None
        self.records.append(record)
