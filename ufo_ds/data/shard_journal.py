"""Work on a directory that goes on after an interruption: a hidden sibling with a lock and a journal of what is whole.

While ``OUT`` is made there is ``.OUT.partial`` beside it::

    lock          held by the process at work
    journal.json  the fingerprint of the job and the shards that are whole
    out/          takes the place of OUT at the end
"""

import contextlib
import dataclasses
import errno
import fcntl
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from ufo_ds.data.shards import ShardEntry
from ufo_ds.errors import UserError


@dataclasses.dataclass
class WholeShard:
    entry: ShardEntry
    stop: int  # how many samples of the layout were read by its end
    corrupt: list[int]  # those of them left out since the end of the shard before


@dataclasses.dataclass
class _Notes:
    fingerprint: str
    parts: dict[str, list[WholeShard]]


class Journal:
    """The whole shards of each part of a job, kept on disk.

    Attributes:
        directory: takes the place of the job's output at the end.
        parts: the whole shards of a part, by its name.
    """

    def __init__(self, partial: Path, fingerprint: str):
        self._path = partial / "journal.json"
        self.directory = partial / "out"
        found = self._read()
        if found is None or found.fingerprint != fingerprint:
            if self.directory.exists():
                say(f"{partial} is of other input or other options than this run's: starting anew")
                shutil.rmtree(self.directory)
            self._notes = _Notes(fingerprint, {})
            self._write()
            self.directory.mkdir()
        else:
            self._notes = found
            whole = sum(len(shards) for shards in found.parts.values())
            say(f"{partial}: going on after {whole} whole shards")
            self.directory.mkdir(exist_ok=True)
        self.parts = self._notes.parts

    def add(self, part: str, shard: WholeShard) -> None:
        """Note a shard, which is on disk."""
        self.parts.setdefault(part, []).append(shard)
        self._write()

    def keep(self, part: str, count: int) -> None:
        """Forget the shards of a part behind the first ``count``."""
        self.parts[part] = self.parts.get(part, [])[:count]
        self._write()

    def _read(self) -> _Notes | None:
        try:
            return TypeAdapter(_Notes).validate_json(self._path.read_bytes())
        except (OSError, ValidationError):
            return None

    def _write(self) -> None:
        new = self._path.with_suffix(".new")
        new.write_bytes(TypeAdapter(_Notes).dump_json(self._notes))
        to_disk(new)
        new.rename(self._path)


@contextlib.contextmanager
def resumable(out: Path, fingerprint: str) -> Iterator[Journal]:
    """Make ``out`` in a hidden sibling that takes its place at the end.

    After an error the sibling goes, with the parents made for it. An interruption (a signal, a loss of power) leaves
    it, and the next call with the same fingerprint goes on with what its journal names.

    Args:
        out: what is made.
        fingerprint: of everything that decides about the bytes of the shards.

    Raises:
        UserError: ``out`` exists, cannot be written, or another process is making it.
    """
    check_absent(out)
    made = [parent for parent in out.parents if not parent.exists()]
    partial = out.with_name(f".{out.name}.partial")
    with _readable_errors(out), _locked(partial):
        try:
            check_absent(out)  # the process that held the lock before may have made it
            journal = Journal(partial, fingerprint)
            yield journal
            for directory, _, files in os.walk(journal.directory):
                for path in (Path(directory), *(Path(directory, file) for file in files)):
                    to_disk(path)
            journal.directory.rename(out)
            shutil.rmtree(partial, ignore_errors=True)
        except Exception:  # not KeyboardInterrupt or SystemExit
            shutil.rmtree(partial, ignore_errors=True)
            for parent in made:
                with contextlib.suppress(OSError):
                    parent.rmdir()
            raise


def check_absent(out: Path) -> None:
    """Refuse to write over what is there.

    Raises:
        UserError: ``out`` exists.
    """
    if os.path.lexists(out):
        raise UserError(f"{out} exists: remove it or choose another directory")


def to_disk(path: Path) -> None:
    """Have a file or directory survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def _readable_errors(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{out} cannot be written ({error.strerror}): free space there or choose another directory"
        ) from None


@contextlib.contextmanager
def _locked(partial: Path) -> Iterator[None]:
    """Make the directory, or take over the one that an interrupted process left."""
    descriptor = _lock(partial)
    while descriptor is None:
        descriptor = _lock(partial)
    try:
        yield
    finally:
        os.close(descriptor)
        with contextlib.suppress(OSError):  # NFS keeps a removed file's directory until the file is closed
            partial.rmdir()


def _lock(partial: Path) -> int | None:
    """A descriptor that holds the lock; None if its file was removed by the process that held it until now."""
    partial.mkdir(parents=True, exist_ok=True)
    path = partial / "lock"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(f"another process is at work in {partial}: wait for it or end it") from None
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP):  # Lustre may be mounted without locks: do without
            os.close(descriptor)
            raise
    if path.exists() and os.path.samestat(path.stat(), os.fstat(descriptor)):
        return descriptor
    os.close(descriptor)
    return None
