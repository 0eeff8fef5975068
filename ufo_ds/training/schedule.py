"""The learning rate as a function of the step: nothing to save, nothing to restore."""

import math

from ufo_ds.recipe import Optimizer, Schedule


def learning_rate(step: int, optimizer: Optimizer, schedule: Schedule) -> float:
    """Linear warm-up from 0 over ``warmup_steps``, then half a cosine from ``optimizer.lr`` to ``min_lr``.

    The same as ``transformers.get_cosine_with_min_lr_schedule_with_warmup`` at its step + 1: the first step is taken
    with a rate above zero.
    """
    done = step + 1
    if done <= schedule.warmup_steps:
        return optimizer.lr * done / schedule.warmup_steps
    progress = (done - schedule.warmup_steps) / max(schedule.steps - schedule.warmup_steps, 1)
    return schedule.min_lr + (optimizer.lr - schedule.min_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))
