"""Own copies that begin as what the shared copy has become (sparse upcycling; Komatsuzaki et al., 2023)."""

import re

import torch
import torch.distributed as dist
from torch import Tensor

from ufo_ds.model.layers import resize_position
from ufo_ds.model.supernet import Supernet
from ufo_ds.parallel.engine import Engine
from ufo_ds.parallel.experts import EMPTY
from ufo_ds.parallel.shards import make_state, optimizer_state, parameter_slices, refresh_low_precision


def branch(engine: Engine) -> None:
    """Give every own copy of a unit the value and the optimizer state of the shared copy, and every task the routes of
    the recipe. Every rank calls it.

    A position embedding, with what belongs to it, is resized to its task's grid.
    """
    slices = {piece.name: piece for piece in parameter_slices(engine)}
    copies: dict[str, list[str]] = {}
    for name in slices:
        shared = re.sub(r"\.own\.[^.]+\.", ".shared.", name)
        if shared != name:
            copies.setdefault(shared, []).append(name)
    for shared in sorted(copies):  # all ranks have copies, empty ones perhaps, of the same units
        source = slices[shared]
        state = optimizer_state(engine, source.flat)
        kinds = [key for key, value in state.items() if torch.is_tensor(value) and value.shape == source.flat.shape]
        for kind in ["weight", *kinds]:
            local = source.of(source.flat if kind == "weight" else state[kind])
            whole = torch.zeros(source.shape, device=local.device)
            whole.view(-1)[source.start : source.start + source.length] = local
            dist.all_reduce(whole)
            for name in copies[shared]:
                target = slices[name]
                if EMPTY in name:
                    continue
                value = _fitted(whole, engine.model, name).flatten()[target.start : target.start + target.length]
                target.of(target.flat if kind == "weight" else make_state(engine, target.flat, kind)).copy_(value)
    engine.model.set_routes(engine.model.routes_of_recipe())
    refresh_low_precision(engine)


def _fitted(value: Tensor, model: Supernet, name: str) -> Tensor:
    if not name.endswith(".position"):
        return value
    task = model.tasks[name.split(".")[2]]
    shared_input = model.recipe.model.input or model.recipe.tasks[0].input
    resized = resize_position(value, model.grid_hw(shared_input), model.grid_hw(task.input))
    return resized.clamp(value.min(), value.max())  # bicubic overshoots, and a second moment must not be negative
