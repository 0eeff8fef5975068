"""Which test images a recipe's training has seen: every training set of all tasks against every benchmark of all."""

import dataclasses
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from ufo_ds.data.evaluation_set import EvaluationSet, digest
from ufo_ds.data.fingerprints import Fingerprints
from ufo_ds.data.matching import Kind, Match, matches
from ufo_ds.data.shards import ShardSet
from ufo_ds.errors import UserError
from ufo_ds.recipe import Recipe
from ufo_ds.recipe_benchmark import Part

_STRICT = ConfigDict(extra="forbid")


@dataclass(config=_STRICT, kw_only=True, frozen=True)
class TrainPart:
    """A training set of a task; ``unreadable`` of its samples could not be looked at."""

    task: str
    shards: str
    samples: int
    unreadable: int


@dataclass(config=_STRICT, kw_only=True, frozen=True)
class BenchmarkPart:
    """What a benchmark (``task/benchmark``) reads as ``shards``, ``query`` or ``gallery``.

    ``data`` is the digest of the whole benchmark, as an evaluation keeps it.
    """

    benchmark: str
    part: Part
    shards: str
    samples: int
    unreadable: int
    data: str


@dataclass(config=_STRICT, kw_only=True, frozen=True)
class Pair:
    """Image ``train_index`` of a training set is image ``index`` of a benchmark's part, or nearly.

    For ``bits`` and ``difference`` see :class:`ufo_ds.data.matching.Match`; both are 0 for equal images.
    """

    task: str
    shards: str
    train_index: int
    benchmark: str
    part: Part
    index: int
    kind: Kind
    bits: int
    difference: float


@dataclass(config=_STRICT, kw_only=True, frozen=True)
class Audit:
    """Of each test image at most ten pairs with each training set, the nearest first."""

    version: Literal[1]
    recipe: str
    train: list[TrainPart]
    test: list[BenchmarkPart]
    pairs: list[Pair]

    @classmethod
    def load(cls, path: Path) -> "Audit":
        """Read what :meth:`to_json` wrote.

        Raises:
            UserError: no such file, or another one.
        """
        try:
            return TypeAdapter(cls).validate_json(path.read_bytes())
        except OSError as error:
            raise UserError(
                f"--audit {path}: {error.strerror}: make it with `ufo data RECIPE --audit --out DIR`"
            ) from None
        except ValidationError as error:
            fault = error.errors()[0]
            where = ".".join(str(part) for part in fault["loc"])
            raise UserError(
                f"--audit {path} is not an audit ({where} {fault['msg']}): make it with `ufo data RECIPE --audit`"
            ) from None

    def to_json(self) -> str:
        return TypeAdapter(Audit).dump_json(self, indent=1).decode() + "\n"

    def overlaps(self) -> Iterator[tuple[TrainPart, BenchmarkPart, list[Pair]]]:
        """Every training set with every part of a benchmark and what they share, the nearest pairs first."""
        between = defaultdict(list)
        for pair in self.pairs:
            between[pair.task, pair.shards, pair.benchmark, pair.part].append(pair)
        for train in self.train:
            for test in self.test:
                pairs = between[train.task, train.shards, test.benchmark, test.part]
                yield train, test, sorted(pairs, key=lambda pair: (pair.difference, pair.bits, pair.index))


def counts_of(pairs: list[Pair]) -> tuple[int, int]:
    """How many test images have an equal image among the pairs, and how many only a nearly equal one."""
    exact = {pair.index for pair in pairs if pair.kind != "near"}
    return len(exact), len({pair.index for pair in pairs} - exact)


def audit(recipe: Recipe) -> Audit:
    """Look at every image once, and at every training set with every benchmark.

    Raises:
        UserError: shards that are missing or damaged, or nothing to compare.
    """
    train = list(dict.fromkeys((task.name, entry.shards) for task in recipe.tasks for entry in task.train))
    test = [(f"{task.name}/{benchmark.name}", benchmark) for task in recipe.tasks for benchmark in task.benchmarks]
    if not train or not test:
        what = "benchmark" if train else "training set"
        raise UserError(f"recipe {recipe.name} has no {what}: there is nothing to compare")
    directories = [shards for _, shards in train] + [path for _, benchmark in test for path in benchmark.parts.values()]
    cache = recipe.data.shard_cache
    prints = {path: Fingerprints.of(ShardSet.open(path, cache), path) for path in dict.fromkeys(directories)}
    found: dict[tuple[str, str], list[Match]] = {}
    train_parts = [
        TrainPart(task=task, shards=path, samples=len(prints[path].readable), unreadable=_unreadable(prints[path]))
        for task, path in train
    ]
    test_parts, pairs = [], []
    for key, benchmark in test:
        data = digest(*(EvaluationSet.open(path, cache) for path in benchmark.parts.values()))
        for part, path in benchmark.parts.items():
            entry = BenchmarkPart(
                benchmark=key, part=part, shards=path, samples=len(prints[path].readable),
                unreadable=_unreadable(prints[path]), data=data,
            )  # fmt: skip
            test_parts.append(entry)
            for task, train_path in train:
                if (train_path, path) not in found:  # the same shards may serve several tasks
                    found[train_path, path] = matches(prints[train_path], prints[path])
                pairs += [_pair(task, train_path, entry, match) for match in found[train_path, path]]
    return Audit(version=1, recipe=recipe.name, train=train_parts, test=test_parts, pairs=pairs)


def _unreadable(prints: Fingerprints) -> int:
    return int(np.count_nonzero(~prints.readable))


def _pair(task: str, shards: str, test: BenchmarkPart, match: Match) -> Pair:
    return Pair(
        task=task, shards=shards, benchmark=test.benchmark, part=test.part,
        index=match.test_index, **{k: v for k, v in dataclasses.asdict(match).items() if k != "test_index"},
    )  # fmt: skip
