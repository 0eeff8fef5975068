"""Training, from an engine and its data to a run directory with checkpoints and metrics."""

import contextlib
import sys
import time
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ufo_ds import checkpoint
from ufo_ds.data.mixing import Batch, Batches, TaskSteps, in_turn, loader, one_of_each
from ufo_ds.data.source import TrainSource
from ufo_ds.errors import UserError
from ufo_ds.evaluation import benchmarks, outcomes
from ufo_ds.evaluation.features import FeatureFiles, TaskImages
from ufo_ds.parallel import checkpoint as parallel_checkpoint
from ufo_ds.parallel import ranks, scoring
from ufo_ds.parallel.branching import branch
from ufo_ds.parallel.conflict import gradient_conflict
from ufo_ds.parallel.engine import Engine
from ufo_ds.parallel.guard import LeftOut
from ufo_ds.parallel.warning import WarningSignal
from ufo_ds.recipe_file import dump
from ufo_ds.subnets.licences import Origin
from ufo_ds.training.balance import Balancer
from ufo_ds.training.run_directory import RunDirectory
from ufo_ds.training.schedule import learning_rate


class Trainer:
    """One run on one rank.

    Args:
        sources: training data of every task.
        images: evaluation images of the tasks with benchmarks.
        directory: on rank 0, where to record; elsewhere None.
        checkpoints: where checkpoints go, on all ranks.
        metrics: of the last evaluation before a resume.
        balance: :meth:`Balancer.memory` before a resume.
        origin: of the weights, for checkpoints.
    """

    def __init__(
        self,
        engine: Engine,
        sources: dict[str, TrainSource],
        images: dict[str, TaskImages],
        directory: RunDirectory | None,
        checkpoints: Path,
        metrics: dict[str, float],
        balance: dict[str, Any],
        origin: Origin,
    ):
        self.engine, self.recipe, self.origin = engine, engine.recipe, origin
        self.sources, self.images = sources, images
        self.directory, self.checkpoints = directory, checkpoints
        self.classes = {name: source.head_classes for name, source in sources.items()}
        self.unreadable: dict[str, set[int]] = {name: set() for name in sources}
        self.metrics = metrics
        self.left_at: int | None = None  # the step after which a warned run left
        self.saver = parallel_checkpoint.Saver(engine, checkpoints)
        self.balancer = (
            None if self.recipe.data.balance is None else Balancer(engine, self.recipe.data.balance, balance)
        )
        self.task_steps: TaskSteps = one_of_each
        if self.recipe.data.batches == "isomorphic":
            self.task_steps = partial(in_turn, list(sources))
        elif self.balancer is not None:
            self.task_steps = self.balancer.phases.task_steps

    def train(self, start: int, warning: WarningSignal | None = None) -> dict[str, float]:
        """Train from step ``start`` to the schedule's end, or until warned; the metrics of the last evaluation.

        Raises:
            UserError: more unreadable images than ``data.max_corrupt`` allows; no room for a checkpoint; more steps in
                a row left out than ``guard.patience`` allows.
        """
        try:
            self._train(start, warning)
            self.saver.wait()
        finally:
            self.saver.end()
        return self.metrics

    def _train(self, start: int, warning: WarningSignal | None) -> None:
        recipe, gas = self.recipe, self.engine.config.accumulation
        steps = recipe.schedule.steps
        if self.directory is not None:
            self.directory.begin(start, self.engine.world_size)
        if start < (recipe.model.branch_at or 0):
            self.engine.model.share_everything()
        if start and self._evaluation_is_due(start) and not self._was_evaluated(start) and self._evaluate(start):
            self._save(start, is_best=True)
        batches = self._batches(start)
        progress = tqdm(total=steps, initial=start, desc="train", unit="step", disable=_bar_off(self.engine.rank))
        clock, counted = time.perf_counter(), start
        for step in range(start, steps):
            if step == recipe.model.branch_at:
                branch(self.engine)
            if self._routes_are_due(step):
                self._report_routes(self.engine.freeze_routes(), step)
            rate = learning_rate(step, recipe.optimizer, recipe.schedule)
            done, of_step = step + 1, self._noted(islice(batches, gas))
            if recipe.logging.conflict_every is not None and done % recipe.logging.conflict_every == 0:
                of_step = iter(kept := list(of_step))
                began = time.perf_counter()
                self._record_conflict(done, kept)
                clock += time.perf_counter() - began
            if warning is not None:
                warning.ask()
            parts = self.engine.step(of_step, rate, stop=self.saver.failed)
            leaves = warning is not None and warning.came() and done < steps
            progress.update()
            if self.engine.guard.left_out is not None:
                self._record_left_out(done, self.engine.guard.left_out)
            elif self.balancer is not None:
                self.balancer.note(step, parts)
            if self.engine.guard.left_out is None and (done % recipe.logging.every == 0 or done == steps):
                seconds, clock = time.perf_counter() - clock, time.perf_counter()
                self._record_step(done, parts, rate, self._images(counted, done) / seconds)
                self._record_routes(done)
                counted = done
            evaluate = done == steps or (self._evaluation_is_due(done) and not leaves)  # that can take long
            is_best = self._evaluate(done) if evaluate else False
            if is_best or leaves or done == steps or done % recipe.checkpoint.every == 0:
                self._save(done, is_best)
            if leaves:
                self.left_at = done
                break
            if done == steps and self.directory is not None:
                self.directory.draw_routes()
            if evaluate:  # neither evaluation nor saving counts as training time
                clock = time.perf_counter()
        progress.close()

    def _batches(self, start: int) -> Iterator[Batch]:
        """All micro-batches from a step on. The first of a phase of sampling finds its rates, on all ranks at once."""
        recipe, gas, stop = self.recipe, self.engine.config.accumulation, self.recipe.schedule.steps
        dataset = Batches(self.sources, self.engine.reads, gas, self.task_steps)
        pin = self.engine.device.type == "cuda"
        while start < recipe.schedule.steps:
            if self.balancer is not None:
                if self.balancer.is_due(start):
                    self._report_rates(start, *self.balancer.begin_phase())
                stop = min(recipe.schedule.steps, self.balancer.phases.stop)
            yield from loader(dataset, start * gas, stop * gas, recipe.data.workers, pin)
            start = stop

    def _images(self, start: int, stop: int) -> int:
        """How many images the steps from ``start`` to ``stop - 1`` hold, over all ranks."""
        return sum(
            len(self.task_steps(step, task.name)) * task.samples_per_step
            for step in range(start, stop) for task in self.recipe.tasks
        )  # fmt: skip

    def _report_rates(self, step: int, rates: dict[str, float], slowness: dict[str, float]) -> None:
        if self.directory is not None:
            self.directory.record_rates(step + 1, rates, slowness)
        of_tasks = (f"{task} x{rate:.2f} (loss at {slowness[task]:.0%} of its start)" for task, rate in rates.items())
        self._say(f"sampling: {', '.join(of_tasks)}")

    def _noted(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        for batch in batches:
            for name, indices in batch.skipped.items():
                self.unreadable[name].update(indices)
            yield batch

    def _count_unreadable(self) -> dict[str, int]:
        """Per task, how many of its images were found to be unreadable so far, by any rank."""
        everyone = ranks.from_all(self.unreadable)
        counts = {name: len(set().union(*(of_rank[name] for of_rank in everyone))) for name in self.unreadable}
        for name, count in counts.items():
            size = len(self.sources[name])
            if count > self.recipe.data.max_corrupt * size:
                raise UserError(
                    f"task {name}: {count} of {size} images cannot be read, more than data.max_corrupt "
                    f"{self.recipe.data.max_corrupt}: check them with `ufo shards verify` or raise it"
                )
        return counts

    def _record_step(self, done: int, parts: torch.Tensor, rate: float, images_per_second: float) -> None:
        losses = self.engine.mean_losses(parts)
        norm, unreadable = self.engine.gradient_norm, self._count_unreadable()
        weights = {task.name: task.weight for task in self.recipe.tasks}
        total = sum(weights[task] * sum(values.values()) for task, values in losses.items())
        if self.directory is None:
            return
        values = {
            "loss": total,
            **{f"{task}/{name}": value for task, of_task in losses.items() for name, value in of_task.items()},
            "learning_rate": rate,
            **({} if norm is None else {"gradient_norm": norm}),
            **{f"{name}/unreadable": float(count) for name, count in unreadable.items() if count},
            "images_per_second": images_per_second,
        }
        self.directory.record(done, values, "train")
        parts_text = "  ".join(f"{task} {sum(of_task.values()):.3f}" for task, of_task in losses.items())
        self._say(
            f"step {done}/{self.recipe.schedule.steps}  loss {total:.3f}  ({parts_text})  lr {rate:.2e}  "
            f"{images_per_second:.0f} images/s"
        )

    def _record_left_out(self, done: int, step: LeftOut) -> None:
        if step.asked:
            self.saver.wait()  # it is the one that failed
        guard, patience = self.engine.guard, self.recipe.guard.patience
        values = f"loss {step.loss:.3g}, gradient norm {step.gradient_norm:.3g}"
        if self.directory is not None:
            self.directory.record_left_out(done, step.loss, step.gradient_norm, guard.count, guard.in_a_row)
        self._say(f"step {done} left out: {values} ({guard.count} so far, {guard.in_a_row} in a row)")
        if guard.in_a_row >= patience:
            self.saver.wait()
            last = next((path.name for path in reversed(checkpoint.find(self.checkpoints))), "none")
            raise UserError(
                f"guard.patience {patience}: so many steps in a row were left out, up to step {done} ({values}): "
                f"lower optimizer.lr or look at the data; the last checkpoint is {last}"
            )

    def _record_conflict(self, done: int, batches: list[Batch]) -> None:
        found = gradient_conflict(self.engine, batches)
        if self.directory is not None and found:
            values = {f"{task}/{key}": value for task, of_task in found.items() for key, value in of_task.items()}
            self.directory.record(done, values, "conflict")

    def _evaluation_is_due(self, done: int) -> bool:
        every = self.recipe.evaluation.every
        return every is not None and done % every == 0

    def _was_evaluated(self, done: int) -> bool:
        """Not where the run was warned at this step: then it is, as training goes on."""
        return ranks.from_first(self.directory is None or self.directory.was_evaluated(done))

    def _evaluate(self, done: int) -> bool:
        """Evaluate on all ranks; whether these are the best metrics so far."""
        if not self.images:
            return False
        evaluation, files = self.recipe.evaluation, FeatureFiles(self.checkpoints.parent / ".features")
        if self.directory is not None:
            files.create()
        ranks.wait_for_all()
        self.engine.predict(self.images, evaluation.batch_size, self.recipe.data.workers, files)
        ranks.wait_for_all()
        found = scoring.score(self.recipe, self.images, files.read(self.images), self.classes)
        self.metrics = outcomes.flatten(found)
        if self.directory is not None:
            files.remove()
            outcomes.store(self.directory.path, done, found)
            self.directory.record(done, self.metrics, "evaluation")
            for line in benchmarks.table(self.metrics):
                self._say(f"  {line}")
        self.saver.wait()  # it may become the best
        best = checkpoint.read_best(self.checkpoints)
        value = self.metrics.get(evaluation.best or "")
        ranks.wait_for_all()  # all have read the best so far before it changes
        return value is not None and (best is None or best[0] >= done or value > best[1])

    def _save(self, done: int, is_best: bool) -> None:
        index = checkpoint.Index(
            step=done,
            recipe=dump(self.recipe),
            classes=self.classes,
            routes={
                name: {unit: list(layers) for unit, layers in routes.items()}
                for name, routes in self.engine.model.routes.items()
            },
            router=self.engine.model.router.memory(),
            balance={} if self.balancer is None else self.balancer.memory(),
            licences=self.origin.licences,
            started_from=self.origin.started_from,
            metrics=self.metrics,
        )

        def then() -> None:
            if is_best:
                assert self.recipe.evaluation.best is not None
                metric = self.recipe.evaluation.best
                checkpoint.write_best(self.checkpoints, done, metric, index.metrics[metric])
            checkpoint.prune(self.checkpoints, self.recipe.checkpoint.keep)

        self.saver.save(index, then)

    def _routes_are_due(self, step: int) -> bool:
        """Whether learned routes are to be frozen now, by schedule or because they have come to rest."""
        model, router = self.engine.model, self.recipe.model.router
        if not model.learns_routes:
            return False
        stable = router.freeze_when_stable
        since = max(model.router.changed_at, self.recipe.model.branch_at or 0)
        return step == router.freeze_at or (stable is not None and step - since >= stable)

    def _record_routes(self, done: int) -> None:
        if not self.engine.model.learns_routes:
            return
        probabilities = self.engine.route_probabilities()
        if self.directory is not None:
            router = self.engine.model.router
            self.directory.record_routes(done, probabilities, router.temperature_at(done), router.changed_at)

    def _report_routes(self, routes: dict[str, dict[str, tuple[str, ...]]], step: int) -> None:
        self._say(f"routes frozen at step {step}, unchanged since step {self.engine.model.router.changed_at}")
        for task, units in routes.items():
            text = "  ".join(f"{unit} {''.join(route[0] for route in layers)}" for unit, layers in units.items())
            self._say(f"routes of {task} (s shared, o own; by layer): {text}")

    def _say(self, line: str) -> None:
        if self.engine.rank == 0:
            with contextlib.suppress(BrokenPipeError):
                tqdm.write(line, file=sys.stdout)
                sys.stdout.flush()


def _bar_off(rank: int) -> bool | None:
    return True if rank else None  # None: shown on a terminal only
