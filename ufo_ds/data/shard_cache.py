"""A directory for shards that lie elsewhere, shared by all processes of a machine and bounded in size.

::

    shards/KEY.tar       whole shards; the time of modification is that of the last use
    shards/KEY.part      being fetched by the process that holds the lock KEY; its size is the room reserved for it
    indices/             of ``ufo_ds.data.tar_index``
    locks/

Whoever needs room takes it from the shards least recently used. A process that has such a shard open reads on.
"""

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from filelock import BaseFileLock, FileLock, Timeout

from ufo_ds.data import download
from ufo_ds.data.shard_specs import is_remote
from ufo_ds.errors import UserError
from ufo_ds.recipe import ShardCache

ROOM_TIMEOUT_S = 120.0  # without a byte in any other download, while they leave no room for this one
_STEP = 1 << 24  # bytes reserved at a time for a shard of unknown size


@dataclass(frozen=True)
class Tar:
    """One shard.

    Attributes:
        name: path, URL, or ``pipe:`` and command.
        key: of a remote shard, in the cache.
        size: in bytes; None as long as nobody knows.
        version: of what is behind a URL.
    """

    name: str
    key: str = ""
    size: int | None = None
    version: download.Version | None = None

    @property
    def is_remote(self) -> bool:
        return is_remote(self.name)


@dataclass(frozen=True)
class Store:
    """The cache, of ``bound`` bytes of shards at most, those that are being fetched included."""

    directory: Path
    bound: int

    @classmethod
    def of(cls, settings: ShardCache) -> "Store":
        directory = settings.directory or os.environ.get("UFO_CACHE") or "~/.cache/ufo_ds"
        return cls(Path(directory).expanduser(), int(settings.gib * 2**30))

    def index_path(self, key: str) -> Path:
        return self.directory / "indices" / f"{key}.safetensors"

    def lock(self, name: str) -> BaseFileLock:
        """Between processes and threads.

        Raises:
            UserError: the directory cannot be written.
        """
        try:
            for folder in ("shards", "indices", "locks"):
                (self.directory / folder).mkdir(parents=True, exist_ok=True)
            if not os.access(self.directory / "locks", os.W_OK):
                raise PermissionError(13, "Permission denied")
        except OSError as error:
            raise self._unusable(error) from None
        return FileLock(self.directory / "locks" / f"{name}.lock")

    def present(self, tar: Tar) -> int | None:
        """A descriptor of a shard that is in the cache; None if it is not, or not whole."""
        try:
            descriptor = os.open(self._path(tar), os.O_RDONLY)
        except FileNotFoundError:
            return None
        if tar.size in (None, os.fstat(descriptor).st_size):
            return descriptor
        os.close(descriptor)  # the machine went down before it was written out
        return None

    def fetch(self, tar: Tar) -> int:
        """A descriptor of a shard, which is fetched unless another process has done so.

        Raises:
            UserError: it cannot be fetched, or there is no room for it.
        """
        with self.fetched(tar) as file:
            return os.dup(file.fileno())

    @contextlib.contextmanager
    def fetched(self, tar: Tar) -> Iterator[BinaryIO]:
        """A shard as a file, fetched if need be; what was fetched is kept if the block ends well.

        Raises:
            UserError: as :meth:`fetch`.
        """
        part = self._path(tar).with_suffix(".part")
        try:
            with self.lock(tar.key):
                descriptor = self.present(tar)
                if descriptor is not None:
                    with os.fdopen(descriptor, "rb") as whole:
                        yield whole
                    return
                try:
                    with part.open("w+b") as file:
                        self._fill(tar, part, file)
                        yield file
                        with self.lock("room"):  # whoever counts what is there finds it under one of its names
                            part.rename(self._path(tar))
                finally:
                    part.unlink(missing_ok=True)
        except OSError as error:
            raise self._unusable(error) from None

    def _fill(self, tar: Tar, part: Path, file: BinaryIO) -> None:
        download.fetch(tar.name, file, _Reservation(self, part, file), tar.version)
        size = os.fstat(file.fileno()).st_size
        if tar.size not in (None, size):
            raise UserError(
                f"{tar.name} has {size} bytes, expected {tar.size}: copy it again; if it is meant to have changed, "
                f"remove {self.directory / 'indices'}"
            )
        file.seek(0)

    def try_reserve(self, part: Path, file: BinaryIO, size: int) -> float | None:
        """Let a file grow to ``size`` bytes, at the cost of the shards least recently used.

        Returns:
            None, or if there is no room: when the last byte was written to any of the other parts that take it.
        """
        with self.lock("room"):
            parts = {path: found for path, found in self._files(".part") if path != part and self._is_alive(path)}
            tars = self._files(".tar")
            used = sum(found.st_size for found in parts.values()) + sum(found.st_size for _, found in tars)
            for path, found in sorted(tars, key=lambda item: item[1].st_mtime):
                if used + size <= self.bound:
                    break
                path.unlink(missing_ok=True)
                used -= found.st_size
            if used + size > self.bound:
                return max(found.st_mtime for found in parts.values())
            os.ftruncate(file.fileno(), max(size, os.fstat(file.fileno()).st_size))
            return None

    def _files(self, suffix: str) -> list[tuple[Path, os.stat_result]]:
        found = []
        for path in (self.directory / "shards").glob(f"*{suffix}"):
            with contextlib.suppress(FileNotFoundError):  # a part that was given up meanwhile
                found.append((path, path.stat()))
        return found

    def _is_alive(self, part: Path) -> bool:
        """Whether a process is fetching it; what a killed one left goes."""
        try:
            with self.lock(part.stem).acquire(blocking=False):
                part.unlink(missing_ok=True)
        except Timeout:
            return True
        return False

    def _path(self, tar: Tar) -> Path:
        return self.directory / "shards" / f"{tar.key}.tar"

    def _unusable(self, error: OSError) -> UserError:
        return UserError(
            f"the shard cache {self.directory} cannot be used ({error.strerror or error}): free space there, or set "
            f"data.shard_cache.directory or UFO_CACHE to another directory"
        )


class _Reservation:
    """Room for a part, taken before it is written."""

    def __init__(self, store: Store, part: Path, file: BinaryIO):
        self.store, self.part, self.file, self.size = store, part, file, 0

    def __call__(self, size: int) -> None:
        """
        Raises:
            UserError: the shard is larger than the cache, or other downloads leave no room and stand still.
        """
        if size <= self.size:
            return
        store = self.store
        if size > store.bound:
            raise UserError(
                f"a shard of {size} bytes or more does not fit into the shard cache of {store.bound} bytes in "
                f"{store.directory}: raise data.shard_cache.gib or make smaller shards"
            )
        if self.size:  # of unknown size: not a look at the whole directory for every chunk
            step = max(1, min(_STEP, store.bound // 64))
            size = min(-(-size // step) * step, store.bound)
        while (last_byte := store.try_reserve(self.part, self.file, size)) is not None:
            if time.time() - last_byte > ROOM_TIMEOUT_S:
                raise UserError(
                    f"the shard cache of {store.bound} bytes in {store.directory} has no room for the shards that are "
                    f"fetched at the same time: raise data.shard_cache.gib"
                )
            time.sleep(0.1)
        self.size = size
