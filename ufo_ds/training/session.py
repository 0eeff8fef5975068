"""From a checked recipe to a finished run: open the data, join the job, build the engine, resume, train."""

import os
import signal
import sys
from pathlib import Path

import torch

from ufo_ds.data import demo_shards
from ufo_ds.data.source import TrainSource, open_sources
from ufo_ds.errors import UserError
from ufo_ds.evaluation import benchmarks
from ufo_ds.evaluation.features import open_images
from ufo_ds.model.starting import opening
from ufo_ds.parallel import checkpoint, ranks
from ufo_ds.parallel.config import DistributedConfig
from ufo_ds.parallel.engine import Engine
from ufo_ds.parallel.launch import finish_distributed, init_distributed, is_lost_rank, leave_on_sigterm
from ufo_ds.parallel.placement import imbalance
from ufo_ds.parallel.warning import LEFT, WarningSignal
from ufo_ds.recipe import Recipe
from ufo_ds.subnets.licences import origin
from ufo_ds.training.loop import Trainer
from ufo_ds.training.run_directory import RunDirectory, check_resume, check_writable
from ufo_ds.training.split_table import split_table


def train(recipe: Recipe, config: DistributedConfig, run_dir: Path, warning: WarningSignal) -> dict[str, float]:
    """Train, or go on training, in ``run_dir``; the metrics of the last evaluation.

    Raises:
        UserError: wrong input of any kind; nothing on disk has changed then, unless training had begun.
        SystemExit: with status :data:`LEFT` where the run was warned before its end, and has saved.
    """
    rank, world_size = init_distributed()
    if warning.number != signal.SIGTERM:
        leave_on_sigterm()
    if world_size > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # ranks that share cores and each take all of them are many times slower
    try:
        if demo_shards.reads_demo(recipe):
            if rank == 0:
                demo_shards.make_if_absent()
            ranks.wait_for_all()
        recipe, sources = open_sources(recipe, config.accumulation)
        check_writable(run_dir)
        last, damaged = checkpoint.newest_whole(run_dir / "checkpoints")
        num_classes = {name: source.num_classes for name, source in sources.items()}
        recipe, begun = opening(recipe, num_classes, last)
        check_resume(run_dir, recipe, last, damaged)
        if begun is not None and begun.checkpoint is not None:
            checkpoint.check_whole(begun.checkpoint)
        images = open_images(recipe)
        benchmarks.check(recipe, images, {name: source.classes for name, source in sources.items()})
        engine = Engine(recipe, config, num_classes, pretrained=None if begun is None else begun.values)
        if begun is not None:
            checkpoint.begin(engine, begun)
        directory = _open(run_dir, recipe, engine)
        if directory is not None:
            directory.set_aside(damaged)
        loaded = checkpoint.load(engine, last) if last is not None else None
        start, metrics, balance = (loaded.step, loaded.metrics, loaded.balance) if loaded is not None else (0, {}, {})
        if rank == 0:
            _announce(engine, sources, run_dir, start)
            if begun is not None:
                print(f"from {recipe.model.init}: {begun.words}", flush=True)
        licences = {name: source.licences for name, source in sources.items()}
        came_from = origin(licences, loaded, None if begun is None else begun.checkpoint)
        trainer = Trainer(engine, sources, images, directory, run_dir / "checkpoints", metrics, balance, came_from)
        metrics = trainer.train(start, warning)
        if directory is not None:
            directory.close()
    except RuntimeError as error:
        if world_size > 1 and is_lost_rank(error):
            # The others' tracebacks would bury the one cause there is.
            print(
                f"rank {rank}: lost another rank, which was killed or crashed ({str(error).splitlines()[0][:120]}): "
                f"the same command goes on from the last checkpoint in {run_dir}",
                file=sys.stderr,
                flush=True,
            )
            os._exit(1)  # no collective can end well now
        raise
    for number in (signal.SIGTERM, warning.number):  # of a launcher that ends the others as soon as one has left
        signal.signal(number, signal.SIG_IGN)
    finish_distributed()
    if trainer.left_at is not None:
        if rank == 0:
            print(
                f"warned by {warning.number.name}: saved step {trainer.left_at} and left; the same command goes on",
                flush=True,
            )
        raise SystemExit(LEFT)
    return metrics


def _open(run_dir: Path, recipe: Recipe, engine: Engine) -> RunDirectory | None:
    """Rank 0 holds the directory; if it cannot, all ranks fail alike."""
    directory, problem = None, None
    if engine.rank == 0:
        try:
            directory = RunDirectory(run_dir, recipe, engine.config.deepspeed, recipe.logging.tensorboard)
        except UserError as error:
            problem = str(error)
    problem = ranks.from_first(problem)
    if problem is not None:
        raise UserError(problem)
    return directory


def _announce(engine: Engine, sources: dict[str, TrainSource], run_dir: Path, start: int) -> None:
    placement, config, recipe = engine.placement, engine.config, engine.recipe
    where = f"going on from step {start}" if start else "starting"
    print(f"{recipe.name}: {where} in {run_dir}, {recipe.schedule.steps} steps, device {engine.device}")
    print(
        f"{engine.world_size} {'rank' if engine.world_size == 1 else 'ranks'}, "
        f"expert parallel {placement.ep_size} x data parallel {placement.replicas}, "
        f"ZeRO-{config.stage}, {config.precision}, exchange {config.exchange}, "
        f"gradient accumulation {config.accumulation}, busiest rank {imbalance(placement, engine.work):.3f} of the mean"
    )
    if not engine.sizes_agree:
        print(
            "communication does not overlap: ranks have own embeddings of different sizes, as their tasks' inputs are; "
            "with the embedding shared, or one input size, it would"
        )
    reads = [engine.reads_of(rank)(engine.samples) for rank in range(engine.world_size)]
    for line in split_table(sources, placement, reads, config.accumulation, recipe.data.workers):
        print(f"  {line}", flush=True)
