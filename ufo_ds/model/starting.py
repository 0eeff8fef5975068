"""What a run starts from, ``model.init``: what another run has trained, or a ViT (:mod:`ufo_ds.model.pretrained`)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ufo_ds import checkpoint
from ufo_ds.checkpoint import Reader
from ufo_ds.errors import UserError
from ufo_ds.model.experts import LEARNED
from ufo_ds.model.initialization import Start
from ufo_ds.model.loading import spec_of
from ufo_ds.model.spec import UNITS, routes_of, with_routes
from ufo_ds.recipe import Recipe
from ufo_ds.recipe_model import Backbone


def opening(recipe: Recipe, num_classes: Mapping[str, int], last: Path | None = None) -> tuple[Recipe, Start | None]:
    """The recipe, in which the routes that a run has found replace learned ones, and what to start from, if anything.

    Args:
        num_classes: of every task's head.
        last: the checkpoint from which the run itself goes on. What it once started from is not looked at then.

    Raises:
        UserError: what is to be started from cannot be read, or does not go with the recipe.
    """
    if recipe.model.init is None:
        return recipe, None
    if last is not None:
        saved = Reader(last).recipe
        return with_routes(recipe, {task.name: routes_of(saved, task.name) for task in saved.tasks}), None
    if starts_from_run(recipe):
        start = _of_run(recipe, num_classes)
    else:
        from ufo_ds.model.pretrained import vit_start  # transformers takes seconds to import

        start = vit_start(recipe, num_classes)
    return with_routes(recipe, start.routes), start


def starts_from_run(recipe: Recipe) -> bool:
    """Whether ``model.init`` names a run directory or a checkpoint."""
    if recipe.model.init is None:
        return False
    path = Path(recipe.model.init)
    return (path / checkpoint.INDEX).is_file() or (path / "checkpoints").is_dir()


def check_equal(recipe: Recipe, theirs: Mapping[str, Any], ours: Mapping[str, Any], where: str = "the recipe") -> None:
    """
    Args:
        theirs: values of what ``model.init`` names; ``ours``: the same of the recipe, ``where`` in it.

    Raises:
        UserError: naming the first that differ.
    """
    for name, value in theirs.items():
        if value != ours[name]:
            raise UserError(
                f"model.init {recipe.model.init!r} has {name} {value}, {where} {ours[name]}: make them equal"
            )


def sizes_of(backbone: Backbone) -> dict[str, Any]:
    """What a backbone's parameters have their shapes from."""
    return {
        "dim": backbone.dim,
        "depth": backbone.depth,
        "heads": one_or_all(backbone.heads_L),
        "head_dim": backbone.head_width,
        "dim x mlp_ratio": one_or_all(backbone.hidden_L),
        "patch_size": backbone.patch_size,
        "stem": list(backbone.stem),
        "pool": backbone.pool,
    }


def one_or_all(of_blocks: Sequence[int]) -> int | list[int]:
    """A size of every block, as one number if they are alike."""
    return of_blocks[0] if len(set(of_blocks)) == 1 else list(of_blocks)


def _of_run(recipe: Recipe, num_classes: Mapping[str, int]) -> Start:
    """What a run has trained, of the tasks that the recipe has: weights, averaged where it averages them, running
    statistics and routes."""
    assert recipe.model.init is not None
    if recipe.model.branch_at is not None:
        raise UserError(
            f"model.branch_at {recipe.model.branch_at} with model.init {recipe.model.init!r}, a run whose routes are "
            "found: remove branch_at"
        )
    reader = Reader(checkpoint.of_run(Path(recipe.model.init)))
    if reader.index.specs:
        raise UserError(
            f"model.init {recipe.model.init!r} holds subnets of {', '.join(reader.index.specs)}, no whole model: give "
            f"the run that they are of, or extract one of them alone"
        )
    theirs = reader.recipe
    _check_model(recipe, theirs)
    for task in recipe.tasks:
        _check_task(recipe, theirs, task.name, len(reader.index.classes[task.name]), num_classes[task.name])
    routes = {task.name: spec_of(reader, task.name).routes for task in recipe.tasks}
    for name, of_task in routes.items():
        _check_routes(recipe, name, of_task)

    def values(name: str, shape: torch.Size, span: range) -> Tensor | None:
        if name not in reader.index.parameters:  # an empty slot's
            return None
        return reader.elements(name, span.start, span.stop)

    names = {f"heads.{name}.neck.running_{kind}" for name in routes for kind in ("mean", "var")}
    buffers = {name: reader.buffer(name) for name in sorted(names & reader.index.buffers.keys())}
    words = f"weights, heads, running statistics and routes of step {reader.index.step}"
    return Start(values, words, buffers, routes, reader.directory)


def _check_model(recipe: Recipe, theirs: Recipe) -> None:
    ours = recipe.model
    eps = "layer_norm_eps"
    check_equal(
        recipe,
        sizes_of(theirs.model.backbone) | {eps: theirs.model.backbone.layer_norm_eps},
        sizes_of(ours.backbone) | {eps: ours.backbone.layer_norm_eps},
        "model.backbone",
    )
    if missing := [unit for unit in ours.experts if unit not in theirs.model.experts]:
        raise UserError(
            f"model.init {ours.init!r} has own copies of {', '.join(theirs.model.experts) or 'no unit'}, "
            f"model.experts is {', '.join(ours.experts)}: remove {', '.join(missing)}"
        )
    known = [task.name for task in theirs.tasks]
    for task in recipe.tasks:
        if task.name not in known:
            raise UserError(
                f"model.init {ours.init!r} has the tasks {', '.join(known)}, not {task.name}: remove that, or start "
                f"from a run that has it"
            )


def _check_task(recipe: Recipe, theirs: Recipe, name: str, their_classes: int, our_classes: int) -> None:
    def values(of: Recipe, classes: int) -> dict[str, Any]:
        task = next(task for task in of.tasks if task.name == name)
        found: dict[str, Any] = {
            f"tasks.{name}.head.type": task.head.type,
            f"tasks.{name}.head.neck": task.head.neck or task.head.type == "margin",
            f"classes of {name}": classes,
            "model.input (default: the first task's)": list(of.model.input or of.tasks[0].input),
        }
        return found | ({f"tasks.{name}.input": list(task.input)} if "embed" in recipe.model.experts else {})

    check_equal(recipe, values(theirs, their_classes), values(recipe, our_classes))


def _check_routes(recipe: Recipe, name: str, found: Mapping[str, Sequence[str]]) -> None:
    asked = routes_of(recipe, name)
    for unit in UNITS:
        if any(mine not in (LEARNED, theirs) for mine, theirs in zip(asked[unit], found[unit], strict=True)):
            raise UserError(
                f"model.init {recipe.model.init!r} routes {unit} of {name} {' '.join(found[unit])}, the recipe "
                f"{' '.join(asked[unit])}: say learned, or the same"
            )
