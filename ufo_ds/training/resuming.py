"""Whether a checkpoint goes on at any other topology: many short runs, on many topologies in one job.

On every topology a run is trained some steps, saved, and trained on without a break: the reference. Then every topology
loads the checkpoint of every one, trains as many steps, and is compared with the run that was not interrupted: losses,
all that the last checkpoints hold, and the samples that the ranks together were stepped with.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ufo_ds import checkpoint
from ufo_ds.data.mixing import Batch
from ufo_ds.data.source import TrainSource, open_sources
from ufo_ds.model.initialization import Pretrained
from ufo_ds.model.starting import opening
from ufo_ds.parallel import checkpoint as parallel_checkpoint
from ufo_ds.parallel import config as configs
from ufo_ds.parallel import ranks
from ufo_ds.parallel.engine import Engine
from ufo_ds.recipe import Checkpoint, Evaluation, Logging, Recipe, Schedule
from ufo_ds.subnets.licences import Origin
from ufo_ds.training.loop import Trainer
from ufo_ds.training.run_differences import SEEN, differences

BEFORE = 3  # steps on a topology until its checkpoint


@dataclass(frozen=True)
class Topology:
    """``ep``: the size of the expert-parallel groups; ``zero``: the stage."""

    ranks: int
    ep: int
    zero: int

    def __str__(self) -> str:
        return f"{self.ranks} rank{'s' * (self.ranks > 1)}, EP {self.ep}, ZeRO-{self.zero}"

    def config(self, recipe: Recipe, accumulation: int) -> configs.DistributedConfig:
        """
        Raises:
            UserError: it does not go with the recipe.
        """
        values = {
            "gradient_accumulation_steps": accumulation,
            "zero_optimization": {"stage": self.zero},
            "expert_parallel": {"autoep_size": self.ep, "exchange": "aligned"},
            "bf16": {"enabled": False},
        }
        return configs.resolve(values, str(self), recipe, self.ranks)


@dataclass(frozen=True)
class Job:
    """
    Attributes:
        scratch: for the runs' directories.
        recipes: by optimizer, all as :func:`for_comparison` makes them.
        accumulation: micro-batches a step.
        start: the checkpoint from which the references go on, or None.
        first: its step, or 0.
        steps: to be compared.
    """

    scratch: Path
    recipes: dict[str, Recipe]
    topologies: tuple[Topology, ...]
    accumulation: int
    start: Path | None
    first: int
    steps: int

    @property
    def name(self) -> str:
        return next(iter(self.recipes.values())).name

    @property
    def saved(self) -> int:
        """The step of the checkpoints that others go on from."""
        return self.first + BEFORE

    def reference(self, optimizer: str, topology: Topology) -> Path:
        """The directory of the run that is not interrupted."""
        return self.scratch / optimizer / f"{topology.ranks}-{topology.ep}-{topology.zero}"

    def checkpoint(self, optimizer: str, topology: Topology) -> Path:
        """The checkpoint of that which others go on from."""
        return self.reference(optimizer, topology) / "checkpoints" / checkpoint.name_of(self.saved)

    @property
    def end(self) -> int:
        return self.saved + self.steps


def for_comparison(recipe: Recipe, optimizer: Any, learning_rate: float, first: int, steps: int) -> Recipe:
    """The recipe, to be trained from step ``first`` on: at a constant rate, since one that falls to zero would hide
    differences; saved where others go on and at the end; not evaluated."""
    saved = first + BEFORE
    return dataclasses.replace(
        recipe,
        optimizer=dataclasses.replace(recipe.optimizer, type=optimizer, lr=learning_rate),
        schedule=Schedule(steps=saved + steps, min_lr=learning_rate),
        tasks=[dataclasses.replace(task, benchmarks=[]) for task in recipe.tasks],
        evaluation=Evaluation(),
        checkpoint=Checkpoint(every=saved, keep=1000),
        logging=Logging(every=1, tensorboard=False),
        data=dataclasses.replace(recipe.data, workers=0),  # samples are noted in the process that loads them
    )


def train_references(job: Job, world_size: int, report: Path) -> None:
    """On every topology of this many ranks: train, save, train on. Every rank of a job calls it; for each run
    ``report`` gets a line."""
    for optimizer in job.recipes:
        for topology in job.topologies:
            if topology.ranks == world_size:
                _train(job, optimizer, topology, job.start, job.reference(optimizer, topology))
                _report(report, {})


def resume(job: Job, world_size: int, report: Path) -> None:
    """On every topology of this many ranks: go on from the checkpoint of every topology, and compare. As above; a line
    is a JSON object of optimizer, source and target (as numbers of the topologies) and :func:`differences`."""
    for optimizer in job.recipes:
        for t, target in enumerate(job.topologies):
            if target.ranks != world_size:
                continue
            for s, source in enumerate(job.topologies):
                run = job.scratch / optimizer / "resumed"
                _train(job, optimizer, target, job.checkpoint(optimizer, source), run)
                if ranks.this() == 0:
                    found = differences(job.reference(optimizer, source), run, job.saved, job.end)
                    _report(report, {"optimizer": optimizer, "source": s, "target": t, **found})
                    shutil.rmtree(run)


def _report(path: Path, values: dict[str, Any]) -> None:
    if ranks.this() == 0:
        with path.open("a") as file:
            file.write(json.dumps(values) + "\n")


def _train(job: Job, optimizer: str, topology: Topology, start: Path | None, run: Path) -> None:
    """Train from a checkpoint, or from the beginning, to the end of the schedule, and keep what was seen."""
    recipe, opened = open_sources(job.recipes[optimizer], job.accumulation)
    sources = {name: NotingSource(source) for name, source in opened.items()}
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        recipe, begun = opening(recipe, {name: source.num_classes for name, source in sources.items()}, start)
        values = None if begun is None else begun.values
        engine = NotingEngine(recipe, topology.config(recipe, job.accumulation), sources, values)
        if begun is not None:
            parallel_checkpoint.begin(engine, begun)
        index = None if start is None else parallel_checkpoint.load(engine, start)
        step, balance = (0, {}) if index is None else (index.step, index.balance)
        Trainer(engine, dict(sources), {}, None, run / "checkpoints", {}, balance, Origin({})).train(step)
        everyone = ranks.from_all(engine.samples_seen)
        if engine.rank == 0:
            samples = sorted(sample for of_rank in everyone for sample in of_rank)
            checkpoint.write_text(run / SEEN, json.dumps({"samples": samples, "losses": engine.losses_seen}))
        engine.deepspeed.destroy()
    ranks.wait_for_all()


class NotingSource(TrainSource):
    """A source that notes the draws that a loader asks for, and which images they are: (draw, number of the image)."""

    def __init__(self, source: TrainSource):
        vars(self).update(vars(source))
        self.noted: list[tuple[int, int]] = []

    def load(self, draw: int) -> tuple[np.ndarray, int, list[int]]:
        self.noted.append((draw, self.index(draw)))
        return super().load(draw)


class NotingEngine(Engine):
    """An engine that notes what it is stepped with, and the losses.

    Attributes:
        samples_seen: of this rank: (step, micro-step, task, position in the task's global micro-batch, draw, number of
            the image, CRC-32 of its pixels as they were augmented and mixed).
        losses_seen: of every step, global means by task.
    """

    def __init__(
        self,
        recipe: Recipe,
        config: configs.DistributedConfig,
        sources: dict[str, NotingSource],
        pretrained: Pretrained | None,
    ):
        num_classes = {name: source.num_classes for name, source in sources.items()}
        super().__init__(recipe, config, num_classes, pretrained)
        self.sources = sources
        self.samples_seen: list[tuple[int, int, str, int, int, int, int]] = []
        self.losses_seen: list[dict[str, dict[str, float]]] = []

    def step(self, batches: Iterable[Batch], learning_rate: float, stop: bool = False) -> Tensor:
        parts_TK = super().step(self._noted(batches), learning_rate, stop)
        self.losses_seen.append(self.mean_losses(parts_TK))
        return parts_TK

    def _noted(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        for batch in batches:
            for task, part in batch.tasks.items():
                for position, pixels in zip(part.positions, part.images.numpy(), strict=True):
                    drawn = self.sources[task].noted.pop(0)
                    sample = (batch.step, batch.micro_step, task, position, *drawn, zlib.crc32(pixels.tobytes()))
                    self.samples_seen.append(sample)
            yield batch
