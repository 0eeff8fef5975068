"""Add a task to a trained run, with little data and few new parameters; every other task stays the same to the bit.

ufo extend runs/mine --data data_shards/birds --protocol classification
ufo extend runs/mine --data data_shards/birds --protocol classification --fraction 0.1 --train norms ffn
ufo extend runs/mine --data data_shards/bikes --protocol retrieval --like person      # starts from that task's path
ufo extend runs/mine --recipe new.yaml --task cats          # head, losses, augmentation and benchmarks of a recipe
accelerate launch --num_processes 8 ufo_ds/extend.py runs/big --data data_shards/birds --protocol classification

The task starts from the path that all tasks share. What it trains becomes a copy of its own, started from the one it
replaces; the rest of its path stays shared, and frozen. It is written into the run's best checkpoint: `ufo evaluate`,
`ufo extract` and `ufo predict` have it from then on. `ufo verify untouched` compares the other tasks with what they
were. Stopped before its end, a training begins anew the next time.
"""

import argparse
import contextlib
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any, get_args

if __name__ == "__main__":  # started by its path: the repository, not this folder, is where packages are found
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from ufo_ds import checkpoint, recipe_file
from ufo_ds.checkpoint import Reader
from ufo_ds.data.fraction import fraction_of
from ufo_ds.data.source import TrainSource, open_sets
from ufo_ds.errors import ArgumentParser, UserError, run
from ufo_ds.evaluation import benchmarks, outcomes
from ufo_ds.evaluation.features import open_images
from ufo_ds.evaluation.outcomes import Outcomes
from ufo_ds.model.loading import spec_of
from ufo_ds.model.parameters import address_of
from ufo_ds.model.supernet import Supernet
from ufo_ds.parallel import ranks
from ufo_ds.recipe import Recipe, only
from ufo_ds.recipe_benchmark import Protocol
from ufo_ds.recipe_task import Task
from ufo_ds.subnets import licences, task_changes
from ufo_ds.training import extension_path, new_task
from ufo_ds.training.extension_path import PARTS, ExtensionPath, as_routes

TRAIN, STEPS, LR = ("embed", "norms"), 500, 3e-3


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """
    Raises:
        UserError: options that do not go together.
    """
    parser = ArgumentParser(
        prog="ufo extend", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("run", type=Path, help="a run directory (its best checkpoint), or one checkpoint")
    parser.add_argument(
        "--data", type=Path,
        help="of `ufo shards`: train, and what the protocol reads (test or val, query and gallery, pairs); or only "
        "shards to train on",
    )  # fmt: skip
    parser.add_argument("--protocol", choices=get_args(Protocol), help="what the task is for: head and loss follow")
    parser.add_argument("--recipe", help="take the task of the name --task from this recipe instead")
    parser.add_argument("--task", help="its name (default: of the directory)")
    parser.add_argument(
        "--like", metavar="TASK",
        help="start from the path of this task, and take input size, augmentation and sampling from it (default: start "
        "from the shared path, and take them from the first task with such a head)",
    )  # fmt: skip
    parser.add_argument(
        "--train", nargs="+", choices=PARTS, default=list(TRAIN), metavar="PART",
        help=f"what is trained beside the head: norms, ffn, embed, last (attention, FFN and norms of the last blocks); "
        f"head for nothing else (default: {' '.join(TRAIN)})",
    )  # fmt: skip
    parser.add_argument("--last_blocks", type=int, metavar="N", help="that `last` is (default: a quarter of them)")
    parser.add_argument("--fraction", type=float, default=1.0, help="of the training images or identities (default: 1)")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of the training (default: {STEPS})")
    parser.add_argument("--lr", type=float, default=LR, help=f"highest learning rate (default: {LR:g})")
    parser.add_argument("--batch_size", type=int, help="images in a step, over all processes (default: as of --like)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--from_scratch", action="store_true",
        help="to compare with: everything own, trained, and drawn at random, so that the run plays no part",
    )  # fmt: skip
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    parser.add_argument("--mixed_precision", choices=["no", "bf16", "fp16"], default="no")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    options = parser.parse_args(argv)
    if options.recipe is not None:
        for name in ("data", "protocol"):
            if getattr(options, name) is not None:
                raise UserError(f"--{name} {getattr(options, name)} with --recipe {options.recipe}: give one of them")
        if options.task is None:
            raise UserError(f"--recipe {options.recipe} without --task: say which of its tasks")
    elif options.data is None or options.protocol is None:
        given = next((f"--{n} {getattr(options, n)}" for n in ("data", "protocol") if getattr(options, n)), "")
        raise UserError(f"{given or options.run}: give both --data DIR and --protocol P, or --recipe FILE --task NAME")
    if not 0 < options.fraction <= 1:
        raise UserError(f"--fraction {options.fraction:g}: give a part of the images, above 0 and up to 1")
    for name in ("steps", "lr", "batch_size", "last_blocks"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise UserError(f"--{name} {value}: give a positive number")
    if options.seed < 0:
        raise UserError(f"--seed {options.seed}: give 0 or more")
    if options.last_blocks is not None and "last" not in options.train:
        raise UserError(f"--last_blocks {options.last_blocks} is for --train last: add that")
    return options


def main(argv: list[str] | None = None) -> None:
    options = parse_arguments(argv)
    directory = checkpoint.of_run(options.run)

    from ufo_ds.training import extension  # accelerate takes seconds to import

    accelerator = extension.start_accelerate(options.device, options.mixed_precision)
    with task_changes.held(directory) if accelerator.is_main_process else contextlib.nullcontext():
        ranks.wait_for_all()
        reader = Reader(directory)  # not before: another process may just have changed it
        recipe, source, path, taken = prepare(options, reader)
        (task,) = recipe.tasks
        images = open_images(recipe)
        benchmarks.check(recipe, images, {task.name: source.classes})
        if accelerator.is_main_process and not options.json:
            print("\n".join(taken), flush=True)
        model = extension_path.build(
            recipe, source.num_classes, reader, path, options.from_scratch, accelerator.device
        )  # fmt: skip
        counts = extension.updated(model)
        loss = extension.train(model, source, extension.Settings(options.steps, options.lr), accelerator)
        found = extension.evaluate(model, recipe, images, source.head_classes, accelerator.device)
        about = {
            "behind": behind(reader, path, options.from_scratch), "like": path.like, "seed": options.seed,
            "train": ["everything"] if options.from_scratch else sorted({*options.train, "head"}),
            "from_scratch": options.from_scratch, "fraction": options.fraction, "images": len(source),
            "steps": options.steps, "lr": options.lr, "loss": loss, "updated": counts[0], "parameters": counts[1],
        }  # fmt: skip
        problem = None
        if accelerator.is_main_process:
            try:
                _write(directory, model, recipe, path, source, about, found)
            except UserError as error:
                problem = str(error)
        problem = ranks.from_first(problem)
        if problem is not None:
            raise UserError(problem)
        if accelerator.is_main_process:
            _report(options, directory, task.name, about, found)
    if accelerator.num_processes > 1:
        accelerator.end_training()


def prepare(options: argparse.Namespace, reader: Reader) -> tuple[Recipe, TrainSource, ExtensionPath, list[str]]:
    """All that is trained, with everything checked that can be: the recipe of the new task alone, its images, its path,
    and lines that say what was taken from where.

    Raises:
        UserError: wrong input of any kind.
    """
    whole, taken = reader.recipe, []
    if options.recipe is not None:
        task = only(recipe_file.load(options.recipe), [options.task]).tasks[0]
        if not task.samples_per_step:
            raise UserError(f"task {task.name} of {options.recipe} has no samples_per_step of its own: give it some")
        taken.append(f"{task.name}: the task of {options.recipe}")
    else:
        name = options.task or new_task.name_for(options.data)
        template = new_task.template_of(whole, options.protocol, options.like)
        task = new_task.make_task(name, options.data, options.protocol, whole, template)
        taken += _taken(task, options, template)
    task_changes.check_name(reader.index, task.name)
    if options.from_scratch:
        path = extension_path.everything(whole)
    else:
        if options.like is not None:
            new_task.task_of(whole, options.like)
        path = extension_path.find_path(reader, options.like, options.train, options.last_blocks)
    sets = fraction_of(open_sets(task, whole.data.shard_cache), task, options.fraction, options.seed)
    fitted = new_task.fitted(task, sets, options.batch_size)
    if fitted.samples_per_step < (options.batch_size or task.samples_per_step):
        taken.append(f"{fitted.samples_per_step} images in a step, as there are few")
    task = dataclasses.replace(fitted, routes=as_routes(path.routes), weight=1.0, lr_scale=1.0, share=None)
    recipe = only(task_changes.with_task(whole, task, path.units), [task.name])
    model = dataclasses.replace(
        recipe.model, shared_samples=0.0, drop_path=0.0, elastic=None, branch_at=None, init=None,
        activation_checkpointing="none",
    )  # fmt: skip
    evaluation = dataclasses.replace(recipe.evaluation, best=None)
    recipe = dataclasses.replace(recipe, model=model, seed=options.seed, evaluation=evaluation)
    source = TrainSource(recipe.tasks[0], options.seed, sets, recipe.data.cache)
    start = "random values" if options.from_scratch else f"the path of {path.like}" if path.like else "the shared path"
    count, turned = len(source.classes), ""
    if task.quarter_turns:
        count, turned = count // 4, ", turned to be four each"
    taken.append(f"{len(source)} images of {count} {_kind(task)}{turned}; starts from {start}")
    return recipe, source, path, taken


def _kind(task: Task) -> str:
    return "attributes" if task.loss.multi_label else "identities" if task.head.type == "margin" else "classes"


def _taken(task: Task, options: argparse.Namespace, template: Task | None) -> list[str]:
    height, width = task.input
    lines = [f"{task.name}: {task.head.type} head, {' + '.join(task.loss.given)}"]
    if template is None:
        lines.append(f"input {height}x{width}, no augmentation: no task of the run has such a head; see --like")
    else:
        losses = ", losses" if task.loss == template.loss else ""
        lines.append(f"input {height}x{width}, augmentation, sampling{losses} as of {template.name}")
    if not task.benchmarks:
        lines.append(f"not evaluated: {options.data} has nothing that {options.protocol} reads")
    return lines


def behind(reader: Reader, path: ExtensionPath, scratch: bool) -> list[str]:
    """The tasks whose images have a part in what the new one starts from."""
    if scratch:
        return []
    if path.like is None:
        return licences.trained(reader.index, reader.recipe)
    return list(licences.behind(reader.index, reader.recipe, spec_of(reader, path.like)))


def _write(
    directory: Path, model: Supernet, recipe: Recipe, path: ExtensionPath, source: TrainSource, about: dict[str, Any],
    found: dict[str, Outcomes],
) -> None:  # fmt: skip
    """Into the checkpoint, and what was found into the run."""
    task = recipe.tasks[0]
    task_changes.add(
        directory,
        task,
        path.units,
        {
            name: parameter.detach().float().cpu().contiguous()
            for name, parameter in model.named_parameters()
            if address_of(name).owner == task.name
        },
        {name: b.detach().float().cpu() for name, b in model.named_buffers() if name.startswith("heads.")},
        source.head_classes,
        as_routes(path.routes),
        source.licences,
        about,
        outcomes.flatten(found),
    )
    if (run_dir := task_changes.run_of(directory)) is not None and found:
        outcomes.store(run_dir, Reader(directory).index.step, found)


def _report(
    options: argparse.Namespace, directory: Path, task: str, about: dict[str, Any], found: dict[str, Outcomes]
) -> None:
    metrics = outcomes.flatten(found)
    if options.json:
        print(json.dumps({"checkpoint": str(directory), "task": task, **about, "metrics": metrics}))
        return
    for line in benchmarks.table(metrics):
        print(line)
    print(
        f"{directory}: has the task {task}, {about['updated']} parameters trained of {about['parameters']} of its path "
        f"({about['updated'] / about['parameters']:.1%}); the other tasks are the same to the bit"
    )


if __name__ == "__main__":
    sys.exit(run(main))
