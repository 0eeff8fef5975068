"""Every rank writes and reads its own slices of a checkpoint (format: :mod:`ufo_ds.checkpoint`).

Training stands still only while a rank copies its slices to the host's memory, into one buffer as large as they are,
which is kept for the next time. A thread then writes them to disk; once those of all ranks have, the first rank's gives
the checkpoint its name. The threads speak over a gloo group of their own.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ufo_ds.checkpoint import (
    AVERAGE,
    Damaged,
    Index,
    Parameter,
    Reader,
    average_of,
    checksum,
    find,
    name_of,
    publish,
    write_tensors,
)
from ufo_ds.errors import UserError
from ufo_ds.model.initialization import Start
from ufo_ds.parallel import ranks
from ufo_ds.parallel.averages import head_buffers
from ufo_ds.parallel.engine import Engine
from ufo_ds.parallel.experts import EMPTY
from ufo_ds.parallel.shards import make_state, optimizer_state, parameter_slices, refresh_low_precision


class Saver:
    """Writes the checkpoints of a run, one at a time, while training goes on. Every rank makes one and calls it.

    Args:
        directory: where checkpoints go. What an earlier start of the run left there unfinished is deleted.
    """

    def __init__(self, engine: Engine, directory: Path):
        self.engine, self.directory = engine, directory
        self._group = dist.new_group(backend="gloo")
        self._host = torch.empty(0)
        self._thread: Thread | None = None
        self._error: str | None = None  # why the checkpoint could not be written, on all ranks alike
        self._raised: BaseException | None = None  # on this rank: another one is lost, or a fault of ours
        if engine.rank == 0:
            for unfinished in directory.glob(".step-*.tmp"):
                shutil.rmtree(unfinished)
        dist.barrier()

    def save(self, index: Index, then: Callable[[], None] = lambda: None) -> None:
        """Begin to write a checkpoint, once the one before is written.

        Args:
            index: with everything but files, parameters, buffers and what the guard remembers.
            then: what the first rank does once it is published.

        Raises:
            UserError: of the checkpoint before, as :meth:`wait`.
        """
        self.wait()
        index.guard = self.engine.guard.memory()
        sources, parameters, buffers = _slices(self.engine)
        size = sum(source.numel() for source in sources.values())
        on_gpu = self.engine.device.type == "cuda"
        if self._host.numel() != size:
            self._host = torch.empty(size, pin_memory=on_gpu)
        rooms = self._host.split([source.numel() for source in sources.values()])
        copies = {key: room.view(source.shape) for (key, source), room in zip(sources.items(), rooms, strict=True)}
        for key, source in sources.items():
            copies[key].copy_(source, non_blocking=True)
        # In the order of the device's work: the next step changes nothing before it is copied, and the host goes on.
        copied = torch.cuda.Event() if on_gpu else None
        if copied is not None:
            copied.record()
        shapes = {key: source.shape for key, source in sources.items()}

        def write() -> None:
            unfinished = self.directory / f".{name_of(index.step)}.tmp"
            mine: dict[str, Any] = {"parameters": parameters, "buffers": buffers, "error": None}
            path = unfinished / f"rank-{self.engine.rank:05d}.safetensors"
            try:
                if copied is not None:
                    torch.cuda.set_device(self.engine.device)  # a thread begins on the first one
                    copied.synchronize()
                try:
                    unfinished.mkdir(parents=True, exist_ok=True)
                    checksums = {key: checksum(copy) for key, copy in copies.items()}
                    mine["entry"] = write_tensors(path, shapes, copies.values(), checksums)
                except OSError as error:
                    mine["error"] = f"{error}"
                self._error = self._finish(unfinished, index, mine, then)
            except BaseException as error:  # of a thread nobody would hear of it
                self._raised = error

        self._thread = Thread(target=write, name="checkpoint", daemon=True)
        self._thread.start()

    def _finish(self, unfinished: Path, index: Index, mine: dict[str, Any], then: Callable[[], None]) -> str | None:
        """Publish what all ranks have written, or delete it; what went wrong, on all ranks."""
        everyone: list[Any] = [None] * self.engine.world_size
        dist.gather_object(mine, everyone if self.engine.rank == 0 else None, group=self._group)
        outcome: list[str | None] = [None]
        if self.engine.rank == 0:
            outcome = [next((rank["error"] for rank in everyone if rank["error"] is not None), None)]
            try:
                if outcome[0] is None:
                    _publish(unfinished, index, everyone)
                    then()
            except OSError as error:
                outcome = [f"{error}"]
            if outcome[0] is not None:
                shutil.rmtree(unfinished, ignore_errors=True)
                outcome = [f"checkpoint {self.directory / name_of(index.step)} not written: {outcome[0]}: "
                           "make room and start again"]  # fmt: skip
        dist.broadcast_object_list(outcome, group=self._group)
        return outcome[0]

    @property
    def writing(self) -> bool:
        """Whether this rank still has to do with a checkpoint."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def failed(self) -> bool:
        """Whether a checkpoint is known, to this rank as yet, not to have been written."""
        return self._error is not None or self._raised is not None

    def wait(self) -> None:
        """Until the checkpoint that is being written, if any, is whole.

        Raises:
            UserError: the disk is full or not writable (on all ranks alike). Nothing is left behind then.
            RuntimeError: another rank is lost.
        """
        if self._thread is not None:
            self._thread.join()
        if self._error is not None:
            raise UserError(self._error)
        if self._raised is not None:
            raise self._raised

    def end(self, seconds: float = 30.0) -> None:
        """The same where training ends, early or not; raises nothing. To be called last."""
        if self._thread is not None:
            self._thread.join(seconds)
        if not self.writing:
            dist.destroy_process_group(self._group)


def save(engine: Engine, directory: Path, index: Index) -> Path:
    """Write one checkpoint, and wait until it is whole; raises as :meth:`Saver.wait`."""
    saver = Saver(engine, directory)
    try:
        saver.save(index)
        saver.wait()
    finally:
        saver.end()
    return directory / name_of(index.step)


def _slices(engine: Engine) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]], list[str]]:
    """What this rank stores: flat tensors by key, what the index says of its parameters, names of its buffers."""
    tensors: dict[str, Tensor] = {}
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
            tensors |= {f"{piece.name}|{kind}": piece.of(t) for kind, t in tensors_of.items()}
    buffers = {}
    if engine.placement.replica(engine.rank) == 0:
        buffers = head_buffers(engine)
        buffers |= {average_of(name): value for name, value in engine.buffer_averages.values.items()}
    return tensors | buffers, parameters, list(buffers)


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


def newest_whole(directory: Path) -> tuple[Path | None, dict[Path, str]]:
    """The newest checkpoint whose checksums are right, and what is wrong with each newer one. Every rank calls it, and
    reads a part of the files.
    """
    damaged: dict[Path, str] = {}
    for path in reversed(find(directory)):
        fault = _fault(path)
        if fault is None:
            return path, damaged
        damaged[path] = fault
    return None, damaged


def _fault(path: Path) -> str | None:
    fault = None
    try:
        Reader(path).verify(ranks.this(), ranks.count())
    except Damaged as error:
        fault = error.fault
    except OSError as error:
        fault = f"{path} cannot be read ({error.strerror})"
    return next((found for found in ranks.from_all(fault) if found is not None), None)


def check_whole(path: Path) -> None:
    """Every rank calls it, and reads a part of the files.

    Raises:
        Damaged: naming a file that is not as it was written, on all ranks alike.
    """
    if (fault := _fault(path)) is not None:
        raise Damaged(fault)


def begin(engine: Engine, start: Start) -> None:
    """Give this rank what training starts from and construction did not: the necks' statistics and, where parameters
    are bf16, what that rounds off their fp32 partitions."""
    for held in (head_buffers(engine), engine.buffer_averages.values):
        for name in held.keys() & start.buffers.keys():
            held[name].copy_(start.buffers[name])
    if engine.config.precision != "bf16":
        return
    for piece in parameter_slices(engine):
        stop = piece.start + piece.length
        found = start.values(piece.name, torch.Size(piece.shape), range(piece.start, stop)) if piece.length else None
        if found is not None:
            piece.of(piece.flat).copy_(found)
            if (average := optimizer_state(engine, piece.flat).get(AVERAGE)) is not None:
                piece.of(average).copy_(found)


def load(engine: Engine, directory: Path) -> Index:
    """Read weights, optimizer state, buffers and routes of any topology into this one, from a checkpoint that is whole
    (:func:`newest_whole`)."""
    reader = Reader(directory)
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
    engine.guard.remember(index.guard)
    refresh_low_precision(engine)
    return index
