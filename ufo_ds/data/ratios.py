"""How many samples of each task a step holds, where the recipe gives their total.

It is split by the tasks' shares, or by a temperature T: in proportion to ``images ** (1 / T)``, as in multilingual
training (Arivazhagan et al., 2019; mT5, Xue et al., 2021, writes ``alpha`` for 1 / T).

Every micro-batch needs an equal part of a task's samples, with PK sampling of its identities. So counts are multiples
of one unit, the gradient accumulation times the least common multiple of all ``images_per_identity``. A task with PK
sampling keeps its images per identity K, and P follows: as many identities as its samples hold.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

from ufo_ds.errors import UserError
from ufo_ds.recipe import Recipe


def with_counts(recipe: Recipe, images: Mapping[str, int], accumulation: int) -> Recipe:
    """The recipe with ``samples_per_step`` for every task, without total, shares and temperature.

    Args:
        images: of each task's train sets.
        accumulation: micro-batches per step.

    Raises:
        UserError: a total that is not a multiple of the unit, or with less than a unit for each task.
    """
    total = recipe.data.samples_per_step
    if total is None:
        return recipe
    per_identity = math.lcm(*(task.images_per_identity or 1 for task in recipe.tasks))
    unit = accumulation * per_identity
    meaning = f"gradient_accumulation_steps {accumulation} x images_per_identity {per_identity}"
    least = unit * len(recipe.tasks)
    if total < least:
        raise UserError(
            f"data.samples_per_step {total} is too small for {len(recipe.tasks)} tasks of at least {unit} samples "
            f"({meaning}): use {least} or more"
        )
    if total % unit:
        below = total - total % unit
        raise UserError(
            f"data.samples_per_step {total} is not a multiple of {unit} ({meaning}): use {below} or {below + unit}"
        )
    exponent = 1 / (recipe.data.temperature or 1.0)
    weights = [task.share or images[task.name] ** exponent for task in recipe.tasks]  # one of them holds for all tasks
    tasks = []
    for task, units in zip(recipe.tasks, largest_remainder(total // unit, weights), strict=True):
        samples, k = units * unit, task.images_per_identity
        identities = None if k is None else samples // k
        tasks.append(
            dataclasses.replace(
                task, samples_per_step=samples, share=None, identities_per_step=identities, images_per_identity=None
            )
        )
    data = dataclasses.replace(recipe.data, samples_per_step=None, temperature=None)
    return dataclasses.replace(recipe, tasks=tasks, data=data)


def largest_remainder(total: int, weights: Sequence[float]) -> list[int]:
    """Whole numbers in proportion to positive weights that add up to ``total``, at least 1 each (Hamilton's method).

    What would be less than 1 is 1; the others share what is left. Their parts are rounded down, and those that lost
    most, the first among equals, get one more. ``total`` is at least the number of weights.
    """
    exact = [Fraction(str(weight)) for weight in weights]  # 2.2 is 11 / 5, as whoever wrote it meant
    counts, left, rest = [1] * len(exact), total, list(range(len(exact)))
    while True:
        scale = left / sum(exact[i] for i in rest)
        small = [i for i in rest if exact[i] * scale < 1]
        if not small:
            break
        rest, left = [i for i in rest if i not in small], left - len(small)
    for i in rest:
        counts[i] = math.floor(exact[i] * scale)
    missing = left - sum(counts[i] for i in rest)
    for i in sorted(rest, key=lambda i: counts[i] - exact[i] * scale)[:missing]:
        counts[i] += 1
    return counts
