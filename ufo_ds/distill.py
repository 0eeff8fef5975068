"""Make a small network that does what a larger one does.

ufo distill runs/mine --task person --student mobilenet --out person-mobilenet
ufo distill person-vit another-person-vit --student resnet18 --width 0.25 --out person-small
ufo distill person-vit --student vit_tiny --data photos --out person-tiny     # a folder of images without labels
accelerate launch --num_processes 4 ufo_ds/distill.py runs/mine --task person --student resnet50 --out person-resnet

The student is the size of its name at --width 1. It learns from the teacher's logits, features and distances between
images, a weight of 0 turns one off; with --label_weight 1 also by the recipe's losses, where images have labels. What
the teacher says of the images is computed once and kept until the student is done, with --cache also for later ones.
The result is for `ufo evaluate`, `predict`, `index` and `latency`. Started again after an interruption it goes on.
"""

import argparse
import fcntl
import json
import math
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":  # started by its path: the repository, not this folder, is where packages are found
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from ufo_ds.errors import ArgumentParser, UserError, run

if TYPE_CHECKING:  # these take seconds to import
    from ufo_ds.data.image_files import Images
    from ufo_ds.data.views import Views
    from ufo_ds.distillation.settings import Settings
    from ufo_ds.distillation.teachers import Teachers
    from ufo_ds.recipe import Recipe
    from ufo_ds.recipe_task import Task

VIEWS = 32768  # of all images, by default at least
DEFAULTS = {"logits_weight": 1.0, "feature_weight": 10.0, "relation_weight": 20.0, "label_weight": 0.0}


def main(argv: list[str] | None = None) -> None:
    options = _parser().parse_args(argv)
    for name in DEFAULTS:
        value = getattr(options, name)
        if not 0 <= value < math.inf:
            raise UserError(f"--{name} {value:g}: give 0 or more")
    if not 0 <= options.mixup_prob <= 1:
        raise UserError(f"--mixup_prob {options.mixup_prob:g}: give a share of the views, from 0 to 1")
    if options.mixup_prob == 1 and options.label_weight:
        raise UserError(
            f"--mixup_prob 1 leaves no view with a label for --label_weight {options.label_weight:g}: lower one of them"
        )
    for name in ("width", "temperature", "lr", "epochs"):
        value = getattr(options, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"--{name} {value:g}: give a number above 0")
    for name in ("steps", "batch_size", "views"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} {value}: give 1 or more")
    if options.steps and options.epochs:
        raise UserError(f"--steps {options.steps} and --epochs {options.epochs:g} exclude each other: give one")
    if options.out.exists():
        raise UserError(f"--out {options.out} exists: choose another directory or delete it")

    from ufo_ds.model.students import ALIASES, STUDENTS, unfit  # these take seconds to import

    backbone = ALIASES.get(options.student, options.student)
    if backbone not in STUDENTS:
        raise UserError(f"--student {options.student!r}: one of {', '.join([*STUDENTS, *ALIASES])}")

    from accelerate import Accelerator, InitProcessGroupKwargs
    from transformers.utils import logging

    from ufo_ds.devices import check_device
    from ufo_ds.distillation.teachers import open_teachers

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    check_device(options.device)
    accelerator = Accelerator(
        mixed_precision=options.mixed_precision,
        cpu=options.device == "cpu",
        # The others wait while one asks the teacher.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=7))],
    )
    teachers = open_teachers(options.teacher, options.task, str(accelerator.device))
    if options.seed is not None:
        teachers.recipe = replace(teachers.recipe, seed=options.seed)
    if fault := unfit(backbone, teachers.recipe.tasks[0].input):
        raise UserError(f"--student {options.student}: {fault}: choose another student or teacher")
    result = _distill(options, backbone, teachers, accelerator)
    if accelerator.is_main_process:
        print(json.dumps(result) if options.json else "\n".join(_lines(result)))
    if accelerator.num_processes > 1:
        accelerator.end_training()


def _parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(
        prog="ufo distill", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "teacher", type=Path, nargs="+",
        help="an extracted model, or a run directory or checkpoint with --task; several count as one",
    )  # fmt: skip
    parser.add_argument("--task", help="of a run with several")
    parser.add_argument(
        "--student", required=True,
        help="resnet18, resnet50, mobilenet_v2, mobilenet_v3_small (or mobilenet), mobilenet_v3_large, vit_tiny or "
        "vit_small",
    )  # fmt: skip
    parser.add_argument("--width", type=float, default=1.0, help="multiplier of channels, or of a ViT's heads")
    parser.add_argument("--out", type=Path, required=True, help="directory to make")
    parser.add_argument(
        "--data", action="append", metavar="SOURCE",
        help="shards or a folder of images, whose labels are its sub-folders, or without labels (may be given several "
        "times; default: the train sets of the task)",
    )  # fmt: skip
    for name, what in (
        ("logits", "symmetric divergence of the logits"), ("feature", "distance to the teacher's embedding"),
        ("relation", "distances between images (RKD-D)"), ("label", "the recipe's losses of labels"),
    ):  # fmt: skip
        key = f"{name}_weight"
        parser.add_argument(
            f"--{key}", type=float, default=DEFAULTS[key], metavar="W", help=f"of {what} (default: {DEFAULTS[key]:g})"
        )
    parser.add_argument("--feature_loss", choices=["cosine", "mse"], default="cosine")
    parser.add_argument("--temperature", type=float, default=2.0, help="logits are divided by it (default: 2)")
    parser.add_argument("--steps", type=int, help="of the training (default: 2000)")
    parser.add_argument("--epochs", type=float, help="in place of --steps")
    parser.add_argument("--batch_size", type=int, default=64, help="images of a step, over all processes (default: 64)")
    parser.add_argument("--lr", type=float, default=2e-3, help="the highest learning rate of AdamW (default: 0.002)")
    parser.add_argument("--seed", type=int, help="of weights, order and augmentation (default: the recipe's)")
    parser.add_argument(
        "--views", type=int,
        help=f"augmented views of each image, which come again and again (default: as many as make {VIEWS} of all)",
    )  # fmt: skip
    parser.add_argument(
        "--mixup_prob", type=float, default=0.5, metavar="P",
        help="share of the views that are blends of two (MixUp), which have no label (default: 0.5)",
    )  # fmt: skip
    parser.add_argument("--cache", type=Path, help="keep what the teacher says here (default: until the end)")
    parser.add_argument("--mixed_precision", choices=["no", "bf16", "fp16"], default="no")
    parser.add_argument("--device", choices=["cpu", "cuda"], default=_device())
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _distill(options: argparse.Namespace, backbone: str, teachers: "Teachers", accelerator: Any) -> dict[str, Any]:
    from ufo_ds.data.views import Views
    from ufo_ds.distillation import loop, writing
    from ufo_ds.distillation.cache import cache_of
    from ufo_ds.distillation.corrupt import Corrupt
    from ufo_ds.distillation.trainee import Trainee, new_student
    from ufo_ds.evaluation import outcomes
    from ufo_ds.subnets import measuring
    from ufo_ds.subnets.task_model import open_model

    def say(line: str) -> None:
        if accelerator.is_main_process:
            print(line, file=sys.stderr, flush=True)

    recipe, task = teachers.recipe, teachers.recipe.tasks[0]
    sources = _sources(options.data, recipe)
    images = sum(len(source.names) for source in sources)
    settings = _settings(options, teachers, images, say)
    views = Views(recipe, sources, teachers.classes, settings.views, settings.mixup_prob)
    settings = _possible(settings, views, task, say)
    processes = accelerator.num_processes
    corrupt = Corrupt(images, recipe.data.max_corrupt)
    student = new_student(backbone, options.width, task, teachers.classes, teachers.widths[0], settings.seed)
    trainee = Trainee(student, task, views.num_classes, teachers, settings)
    partial = options.out.with_name(f"{options.out.name}.partial")
    fingerprints = [model.fingerprint for model in teachers.models]
    with _prepared(partial, options, settings, backbone, fingerprints, accelerator):
        cache = None
        if settings.of_teacher:
            cache = cache_of(options.cache or partial / "teacher", teachers, sources, views)
            if accelerator.is_main_process:
                cache.fill(teachers, views, recipe.data.workers, corrupt)
        accelerator.wait_for_everyone()
        final = loop.train(
            trainee, accelerator, teachers, cache, views, settings, corrupt, partial / "state.safetensors",
            recipe.data.workers, say,
        )  # fmt: skip
        if not accelerator.is_main_process:
            return {}
        finished, model = trainee.cpu().finished(), partial / "model"
        writing.write(model, finished, teachers)
        known = measuring.here(recipe)
        of_student = measuring.measure(open_model(model, device=str(accelerator.device)), known)
        if of_student:
            outcomes.store(model, None, of_student)
        of_teachers = [outcomes.flatten(measuring.measure(teacher, known)) for teacher in teachers.models]
        metrics = outcomes.flatten(of_student)
        of_teacher = {name: sum(of[name] for of in of_teachers) / len(of_teachers) for name in metrics}
        inherited = writing.licences_behind(options.teacher, task.name)
        writing.write_card(model, finished, teachers, inherited, sources, settings, metrics, of_teacher)
        parameters = sum(p.numel() for p in finished.parameters())
        result = {
            "out": str(options.out), "task": task.name, "student": backbone, "width": options.width,
            "parameters": parameters, "megabytes": (model / "model.safetensors").stat().st_size / 1e6,
            "teacher_parameters": teachers.parameters, "teacher_megabytes": 4 * teachers.parameters / 1e6,
            "images": images, "unreadable": len(corrupt.found), "processes": processes, "settings": asdict(settings),
            "losses": final, "metrics": metrics, "teacher_metrics": of_teacher,
        }  # fmt: skip
        model.rename(options.out)
        shutil.rmtree(partial, ignore_errors=True)
        return result


def _sources(data: list[str] | None, recipe: "Recipe") -> "list[Images]":
    """
    Raises:
        UserError: nothing is there.
    """
    from ufo_ds.data.image_files import ShardImages, open_images

    if data:
        return [open_images(source) for source in data]
    train = recipe.tasks[0].train
    if not train:
        raise UserError(f"task {recipe.tasks[0].name} has no train set: give images with --data")
    return [ShardImages(entry.shards, recipe.data.shard_cache) for entry in train]


def _settings(options: argparse.Namespace, teachers: "Teachers", images: int, say: Any) -> "Settings":
    from ufo_ds.distillation.settings import Settings

    task = teachers.recipe.tasks[0]
    samples = images * (4 if task.quarter_turns else 1)
    epochs = options.epochs
    steps = max(1, round(epochs * samples / options.batch_size)) if epochs else options.steps or 2000
    weights = {name: getattr(options, name) for name in DEFAULTS}
    if weights["logits_weight"] and not teachers.classes and teachers.classifier is None:
        say(f"{teachers.name} has no classifier: nothing is learned from logits")
        weights["logits_weight"] = 0.0
    most = min(VIEWS, steps * options.batch_size)  # more would not be used
    settings = Settings(
        **weights, temperature=options.temperature, feature_loss=options.feature_loss, steps=steps,
        batch_size=options.batch_size, views=options.views or math.ceil(most / samples), mixup_prob=options.mixup_prob,
        lr=options.lr, seed=teachers.recipe.seed,
    )  # fmt: skip
    return settings if settings.of_teacher else replace(settings, mixup_prob=0.0)  # a mixed view has no label


def _possible(settings: "Settings", views: "Views", task: "Task", say: Any) -> "Settings":
    """Without the loss of labels where there are none.

    Raises:
        UserError: none is left, or none that a classifier learns from.
    """
    labelled = int((views.labels >= 0).sum())
    if settings.label_weight and labelled < len(views.labels):
        if not labelled:
            say("the images have no labels of the task: nothing is learned from labels")
            settings = replace(settings, label_weight=0.0)
        else:
            say(f"{labelled} of {len(views.labels)} images have labels of the task")
    if not settings.of_teacher and not settings.label_weight:
        raise UserError("nothing is left to learn from: give a weight above 0, or images with labels")
    if task.head.type == "linear" and not settings.logits_weight and not settings.label_weight:
        raise UserError(
            f"the classifier of {task.name} learns from logits or labels: give --logits_weight or --label_weight"
        )
    return settings


@contextmanager
def _prepared(
    partial: Path, options: argparse.Namespace, settings: "Settings", backbone: str, teachers: list[str],
    accelerator: Any,
) -> Iterator[None]:  # fmt: skip
    """The directory of what is not finished, held against others that make the same. What is there of another
    distillation goes, but for the teacher's part, which has a key of its own.

    Raises:
        UserError: it cannot be written, or another process holds it.
    """
    with ExitStack() as stack:
        if accelerator.is_main_process:
            about = {"student": backbone, "width": options.width, "data": options.data, "teachers": teachers}
            text = json.dumps(about | asdict(settings), indent=1) + "\n"
            file = partial / "settings.json"
            try:
                partial.mkdir(parents=True, exist_ok=True)
                lock = stack.enter_context((partial / ".lock").open("a"))
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not file.exists() or file.read_text() != text:
                    (partial / "state.safetensors").unlink(missing_ok=True)
                shutil.rmtree(partial / "model", ignore_errors=True)
                file.write_text(text)
            except BlockingIOError:
                raise UserError(f"--out {options.out}: another process makes it: choose another directory") from None
            except OSError as error:
                raise UserError(
                    f"--out {options.out}: {error.strerror}: choose a directory that you can write to"
                ) from None
        accelerator.wait_for_everyone()
        yield


def _lines(result: dict[str, Any]) -> list[str]:
    """For people: student and teacher side by side."""
    names = ["parameters", "megabytes", *result["metrics"]]
    width = max(map(len, names))
    rows = [
        f"{result['out']}: {result['student']} for {result['task']}",
        f"{'':<{width}}  {'student':>12}  {'teacher':>12}",
    ]
    rows.append(f"{'parameters':<{width}}  {result['parameters']:>12,}  {result['teacher_parameters']:>12,}")
    rows.append(f"{'megabytes':<{width}}  {result['megabytes']:>12.2f}  {result['teacher_megabytes']:>12.2f}")
    for name, value in result["metrics"].items():
        rows.append(f"{name:<{width}}  {value:>12.4f}  {result['teacher_metrics'][name]:>12.4f}")
    if result["unreadable"]:
        rows.append(f"{result['unreadable']} of {result['images']} images could not be read")
    return rows


if __name__ == "__main__":
    sys.exit(run(main))
