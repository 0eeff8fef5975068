"""Every rank writes and reads its own slices of a checkpoint (format: :mod:`ufo_ds.checkpoint`)."""

import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from ufo_ds.checkpoint import WRITE_ERRORS, Index, Parameter, Reader, average_of, entry_of, name_of, publish
from ufo_ds.errors import UserError
from ufo_ds.parallel.averages import head_buffers
from ufo_ds.parallel.engine import Engine
from ufo_ds.parallel.experts import EMPTY
from ufo_ds.parallel.shards import make_state, optimizer_state, parameter_slices, refresh_low_precision


def save(engine: Engine, directory: Path, index: Index) -> Path:
    """Write a checkpoint; every rank calls it. ``index`` comes with everything but files, parameters and buffers.

    Raises:
        UserError: the disk is full or not writable (on all ranks alike). Nothing is left behind then.
    """
    unfinished = directory / f".{name_of(index.step)}.tmp"
    if engine.rank == 0:
        shutil.rmtree(unfinished, ignore_errors=True)
    error = _together(lambda: unfinished.mkdir(parents=True) if engine.rank == 0 else None)
    mine: dict[str, Any] = {}
    if error is None:
        error = _together(lambda: mine.update(_write(engine, unfinished)))
    if error is None:
        everyone: list[Any] = [None] * engine.world_size if engine.rank == 0 else []
        dist.gather_object(mine, everyone if engine.rank == 0 else None)
        error = _together(lambda: _publish(unfinished, index, everyone) if engine.rank == 0 else None)
    if error is not None:
        if engine.rank == 0:
            shutil.rmtree(unfinished, ignore_errors=True)
        raise UserError(f"checkpoint {directory / name_of(index.step)} not written: {error}: make room and start again")
    return directory / name_of(index.step)


def _write(engine: Engine, directory: Path) -> dict[str, Any]:
    tensors: dict[str, torch.Tensor] = {}
    parameters: dict[str, dict[str, Any]] = {}
    for piece in parameter_slices(engine):
        if EMPTY in piece.name:
            continue
        tensors_of = {"weight": piece.flat}
        scalars = {}
        for key, value in optimizer_state(engine, piece.flat).items():
            if torch.is_tensor(value) and value.shape == piece.flat.shape:
                tensors_of[key] = value
            elif value is not None:
                scalars[key] = float(value)
        parameters[piece.name] = {
            "shape": list(piece.shape),
            "kinds": list(tensors_of),
            "piece": (piece.start, piece.length),
            "scalars": scalars,
        }
        if piece.length:
            tensors |= {f"{piece.name}|{kind}": piece.of(t).cpu().clone() for kind, t in tensors_of.items()}
    buffers = {}
    if engine.placement.replica(engine.rank) == 0:
        buffers = {name: buffer.cpu().clone() for name, buffer in head_buffers(engine).items()}
        buffers |= {average_of(name): value.cpu().clone() for name, value in engine.buffer_averages.values.items()}
    path = directory / f"rank-{engine.rank:05d}.safetensors"
    save_file(tensors | buffers, path)
    return {"entry": entry_of(path), "parameters": parameters, "buffers": list(buffers)}


def _publish(unfinished: Path, index: Index, everyone: list[dict[str, Any]]) -> None:
    for number, rank in enumerate(everyone):
        for name, found in rank["parameters"].items():
            start, length = found["piece"]
            known = index.parameters.setdefault(
                name, Parameter(found["shape"], found["kinds"], scalars=found["scalars"])
            )
            if length:
                known.pieces.append((number, start, length))
        index.buffers |= dict.fromkeys(rank["buffers"], number)
    publish(unfinished, index, [rank["entry"] for rank in everyone])


def load(engine: Engine, directory: Path) -> Index:
    """Read weights, optimizer state, buffers and routes of any topology into this one.

    Raises:
        UserError: a file that is missing or changed (on all ranks alike).
    """
    readers: list[Reader] = []

    def check() -> None:
        readers.append(Reader(directory))
        readers[0].verify(engine.rank, engine.world_size)

    if (error := _together(check)) is not None:
        raise UserError(str(error))
    reader = readers[0]
    index = reader.index
    for piece in parameter_slices(engine):
        if EMPTY in piece.name:
            continue
        found = index.parameters[piece.name]
        stop = piece.start + piece.length
        for kind in found.kinds:
            target = piece.flat if kind == "weight" else make_state(engine, piece.flat, kind)
            if piece.length:
                piece.of(target).copy_(reader.read(piece.name, kind, piece.start, stop))
        optimizer_state(engine, piece.flat).update(found.scalars)
    for name, buffer in head_buffers(engine).items():
        buffer.copy_(reader.stored_buffer(name))
    for name, value in engine.buffer_averages.values.items():
        value.copy_(reader.stored_buffer(average_of(name)))
    engine.model.set_routes(index.routes)
    engine.model.router.remember(index.router)
    refresh_low_precision(engine)
    return index


def _together(action: Any) -> BaseException | None:
    """Run something that may fail on any rank; the first rank's failure, or None, on all."""
    error: BaseException | None = None
    try:
        action()
    except (UserError, *WRITE_ERRORS) as caught:
        error = caught
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, None if error is None else f"{error}")
    return next((RuntimeError(text) for text in everyone if text is not None), None)
