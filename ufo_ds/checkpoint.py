"""Checkpoints on disk, free of any topology.

A checkpoint is a directory ``step-00001000`` of one safetensors file per rank and ``index.json``. Each file holds flat
fp32 slices under keys ``<parameter>|<kind>`` (kind: ``weight``, its moving ``average``, or an optimizer state such as
``exp_avg``); the index says which elements of which parameter they are, so that any number of ranks, and one task's
extraction, read just the ranges they need. The directory is renamed into place last: what has its final name is whole.
"""

import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ufo_ds.errors import UserError
from ufo_ds.recipe import Recipe
from ufo_ds.recipe_file import parse

INDEX = "index.json"
VERSION = 1
CHUNK = 1 << 24  # bytes written at a time
AVERAGE = "average"  # the kind that holds moving averages, of parameters and of buffers


@dataclass
class Parameter:
    """``pieces``: (file number, first element, number of elements), tiling the flattened parameter."""

    shape: list[int]
    kinds: list[str] = field(default_factory=list)
    pieces: list[tuple[int, int, int]] = field(default_factory=list)
    scalars: dict[str, float] = field(default_factory=dict)


@dataclass
class Index:
    """All that a checkpoint says beside its tensors."""

    step: int
    recipe: dict[str, Any]
    classes: dict[str, list[str]]  # per task, the names behind the head's rows
    routes: dict[str, dict[str, list[str]]]
    router: dict[str, Any] = field(default_factory=dict)  # what it remembers of its past
    balance: dict[str, Any] = field(default_factory=dict)  # what rates of sampling so far and to come follow from
    guard: dict[str, Any] = field(default_factory=dict)  # what steps were like, and which were left out
    licences: dict[str, list[str]] = field(default_factory=dict)  # per task, of the images it was trained on
    started_from: str = ""  # the checkpoint of another run, whose licences are then among these
    # Per task that `ufo extend` added: how it was trained, and under "behind" the tasks whose images its start saw.
    added: dict[str, dict[str, Any]] = field(default_factory=dict)
    removed: list[str] = field(default_factory=list)  # tasks that `ufo remove` took out
    metrics: dict[str, float] = field(default_factory=dict)
    specs: dict[str, Any] = field(default_factory=dict)  # per task, of its path where that is less than the whole
    files: list[dict[str, Any]] = field(default_factory=list)  # name, bytes, sha256
    parameters: dict[str, Parameter] = field(default_factory=dict)
    buffers: dict[str, int] = field(default_factory=dict)  # name -> file number
    version: int = VERSION
    sha256: str = ""  # of all of the above, as JSON; "" where it was written before there was one


class Damaged(UserError):
    """A checkpoint that is not as it was written; ``fault`` names the file and what is wrong with it."""

    def __init__(self, fault: str):
        super().__init__(f"{fault}: restore it, or name another checkpoint")
        self.fault = fault


class _File:
    """A safetensors file of fp32 tensors, as :func:`write_tensors` makes it; ``tensors``: shape and place of each.

    Raises:
        Damaged: it is none.
    """

    def __init__(self, path: Path):
        self.file = path.open("rb", buffering=0)
        total = path.stat().st_size
        try:
            data = 8 + int.from_bytes(self.file.read(8), "little")
            header = json.loads(self.file.read(min(data, total) - 8))
            self.checksums: dict[str, str] = header.pop("__metadata__", {})
            self.tensors: dict[str, tuple[torch.Size, int]] = {}
            for key, of_tensor in header.items():
                shape, (start, end) = torch.Size(of_tensor["shape"]), of_tensor["data_offsets"]
                if end - start != 4 * shape.numel() or start < 0 or data + end > total:
                    raise ValueError(f"{key} does not lie in the file")
                self.tensors[key] = shape, data + start
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Damaged(f"{path} has no readable header: {error}") from None


class Reader:
    """Reads tensors, or ranges of them, of one checkpoint.

    Raises:
        Damaged: there is no index or it is not as it was written, or a file has not the size it says.
        UserError: of another version.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        try:
            values = json.loads((directory / INDEX).read_text())
            written = {**values, "sha256": ""}
            parameters = {name: Parameter(**p) for name, p in values.pop("parameters").items()}
            self.index = Index(parameters=parameters, **values)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise Damaged(f"{directory} is no checkpoint: {INDEX}: {error}") from None
        if self.index.version != VERSION:
            raise UserError(f"{directory}: version {self.index.version}, expected {VERSION}: train again")
        if self.index.sha256 and self.index.sha256 != hashlib.sha256(json.dumps(written).encode()).hexdigest():
            raise Damaged(f"{directory / INDEX} changed since it was written")
        for entry in self.index.files:
            path = directory / entry["name"]
            if not path.is_file() or path.stat().st_size != entry["bytes"]:
                raise Damaged(f"{path} is missing or cut short")
        self._files: dict[int, _File] = {}

    @property
    def recipe(self) -> Recipe:
        return parse(self.index.recipe, str(self.directory / INDEX))

    def _slice(self, file: int, key: str, start: int, stop: int) -> Tensor:
        """Rows ``start .. stop`` of a stored tensor. No other bytes are read: mapped files, as of the library of
        safetensors, bring their neighbours into memory too.

        Raises:
            Damaged: there are fewer bytes, or all of the tensor was read, and it is not as it was written.
        """
        path = self.directory / self.index.files[file]["name"]
        if file not in self._files:
            self._files[file] = _File(path)
        stored = self._files[file]
        if key not in stored.tensors:
            raise Damaged(f"{path} lacks {key}")
        shape, offset = stored.tensors[key]
        stop = min(stop, shape[0])
        found = torch.empty(stop - start, *shape[1:])
        values: Any = found.numpy()
        content = memoryview(values).cast("B")
        offset += 4 * shape[1:].numel() * start
        while content:
            count = os.preadv(stored.file.fileno(), [content], offset)
            if not count:
                raise Damaged(f"{path} is cut short")
            content, offset = content[count:], offset + count
        written = stored.checksums.get(key) if len(found) == shape[0] else None
        if written is not None and written != checksum(found):
            raise Damaged(f"{path}: {key} changed since it was written")
        return found

    def read(self, name: str, kind: str, start: int, stop: int) -> Tensor:
        """Elements ``start .. stop`` of a flattened parameter's value (``weight``) or optimizer state."""
        out = torch.empty(stop - start)
        for file, first, length in self.index.parameters[name].pieces:
            low, high = max(start, first), min(stop, first + length)
            if low < high:
                out[low - start : high - start] = self._slice(file, f"{name}|{kind}", low - first, high - first)
        return out

    def elements(self, name: str, start: int, stop: int) -> Tensor:
        """Elements ``start .. stop`` of a flattened parameter, fp32, as the model is meant to be used: of its moving
        average if the checkpoint has one."""
        kinds = self.index.parameters[name].kinds
        return self.read(name, AVERAGE if AVERAGE in kinds else "weight", start, stop)

    def parameter(self, name: str) -> Tensor:
        """A whole parameter."""
        shape = torch.Size(self.index.parameters[name].shape)
        return self.elements(name, 0, shape.numel()).view(shape)

    def buffer(self, name: str) -> Tensor:
        """The same of a buffer."""
        return self.stored_buffer(average_of(name) if average_of(name) in self.index.buffers else name)

    def stored_buffer(self, key: str) -> Tensor:
        """A buffer as training goes on with it; ``average_of(name)`` is the key of its average."""
        return self.stored(self.index.buffers[key], key)

    def contents(self, file: int) -> tuple[dict[str, torch.Size], dict[str, str]]:
        """Shapes of all that a file holds, by key, and the checksums of what has one."""
        if file not in self._files:
            self._files[file] = _File(self.directory / self.index.files[file]["name"])
        found = self._files[file]
        return {key: shape for key, (shape, _) in found.tensors.items()}, found.checksums

    def stored(self, file: int, key: str) -> Tensor:
        """A tensor as a file holds it."""
        return self._slice(file, key, 0, 2**62)

    def verify(self, part: int = 0, parts: int = 1) -> None:
        """Compare checksums of every ``parts``-th file.

        Raises:
            Damaged: naming the file that changed since it was written.
        """
        for entry in self.index.files[part::parts]:
            path = self.directory / entry["name"]
            if sha256(path) != entry["sha256"]:
                raise Damaged(f"{path} changed since it was written")


def average_of(buffer: str) -> str:
    return f"{buffer}|{AVERAGE}"


def name_of(step: int) -> str:
    return f"step-{step:08d}"


def find(directory: Path) -> list[Path]:
    """Whole checkpoints of a directory, oldest first."""
    return sorted(path.parent for path in directory.glob(f"step-*/{INDEX}"))


def of_run(path: Path, which: str = "best") -> Path:
    """The checkpoint that a run directory (or a checkpoint itself) stands for: the best, or the last.

    Raises:
        UserError: neither is there.
    """
    if (path / INDEX).is_file():
        return path
    everyone = find(path / "checkpoints")
    if not everyone:
        raise UserError(
            f"{path} is no run directory with a checkpoint: give the --run_dir of a training, or one of its checkpoints"
        )
    best = read_best(path / "checkpoints")
    if which == "best" and best is not None and (path / "checkpoints" / name_of(best[0])) in everyone:
        return path / "checkpoints" / name_of(best[0])
    return everyone[-1]


def read_best(directory: Path) -> tuple[int, float] | None:
    """Step and value of the best checkpoint."""
    try:
        values = json.loads((directory / "best.json").read_text())
        return int(values["step"]), float(values["value"])
    except (OSError, ValueError, KeyError):
        return None


def write_best(directory: Path, step: int, metric: str, value: float) -> None:
    write_text(directory / "best.json", json.dumps({"step": step, "metric": metric, "value": value}) + "\n")


def prune(directory: Path, keep: int) -> None:
    """Delete all but the ``keep`` newest checkpoints and the best one."""
    best = read_best(directory)
    for path in find(directory)[:-keep]:
        if best is None or path.name != name_of(best[0]):
            (path / INDEX).unlink()  # first of all: a checkpoint without its index is none
            shutil.rmtree(path)


def publish(unfinished: Path, index: Index, files: Iterable[dict[str, Any]]) -> Path:
    """Write the index of a directory whose files are on disk, and give it its final name.

    Raises:
        RuntimeError: the pieces of a parameter do not tile it.
    """
    write_index(unfinished, index, files)
    final = unfinished.parent / name_of(index.step)
    if final.exists():
        shutil.rmtree(final)
    os.replace(unfinished, final)
    sync_directory(final.parent)
    return final


def write_index(directory: Path, index: Index, files: Iterable[dict[str, Any]]) -> None:
    """Write the index of a directory whose files are on disk. For the errors see :func:`publish`."""
    index.files = list(files)
    for name, parameter in index.parameters.items():
        parameter.pieces.sort(key=lambda piece: piece[1])
        position = 0
        for _, start, length in parameter.pieces:
            if start != position:
                raise RuntimeError(f"checkpoint: {name} has a gap or an overlap at element {position}")
            position += length
        if position != torch.Size(parameter.shape).numel():
            raise RuntimeError(f"checkpoint: {name} ends at element {position} of {parameter.shape}")
    values = json.loads(json.dumps({**asdict(index), "sha256": ""}))  # as it will be read
    values["sha256"] = hashlib.sha256(json.dumps(values).encode()).hexdigest()
    write_text(directory / INDEX, json.dumps(values))
    sync_directory(directory)


def write_text(path: Path, text: str) -> None:
    """:func:`write_bytes` of a text in UTF-8."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Replace a file as a whole, on disk when this returns."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_tensors(
    path: Path,
    shapes: Mapping[str, Sequence[int]],
    tensors: Iterable[Tensor],
    metadata: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Write fp32 tensors on the CPU, one after the other, in the order of ``shapes``, as a safetensors file; its entry
    for an index. Only one of them need be there at a time. The file is on disk when this returns.

    The file: length of the header as u64, header (JSON, padded to 8 bytes), data
    (https://huggingface.co/docs/safetensors).
    """
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for key, shape in shapes.items():
        start, end = end, end + 4 * torch.Size(shape).numel()
        header[key] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    digest = hashlib.sha256(head)
    with path.open("wb") as file:
        file.write(head)
        for shape, tensor in zip(shapes.values(), tensors, strict=True):
            assert tensor.dtype == torch.float32
            assert tensor.shape == torch.Size(shape)
            content: Any = tensor.contiguous().view(-1).numpy().view("uint8")
            for start in range(0, len(content), CHUNK):
                chunk = content[start : start + CHUNK]
                digest.update(chunk)
                file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    return {"name": path.name, "bytes": len(head) + end, "sha256": digest.hexdigest()}


def checksum(tensor: Tensor) -> str:
    """CRC-32 of a tensor's elements. A rank's file has that of every tensor in its metadata, so that what is read by
    itself can be checked by itself."""
    content: Any = tensor.contiguous().numpy()
    return f"{zlib.crc32(content):08x}"


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_directory(path: Path) -> None:
    """Have on disk which files a directory holds."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
