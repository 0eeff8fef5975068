"""What a teacher says of every view of every image, kept on disk so that no view goes through it twice.

::

    CACHE/<key>/about.json       what it is of
    CACHE/<key>/features.f32     [views of all images, D], rows of nothing else
    CACHE/<key>/logits.f32       [..., C], of a task with classes

The key is a digest of all that the rows follow from: the teachers to the bit, the images, their augmentation, the seed.
Rows are written in order, so that the size of a file says how many are done, and a restart goes on behind them.
"""

import fcntl
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from ufo_ds.checkpoint import write_text
from ufo_ds.data.image_files import Images
from ufo_ds.data.views import InOrder, Views
from ufo_ds.distillation.corrupt import Corrupt
from ufo_ds.distillation.teachers import Taught, Teachers, key_of
from ufo_ds.errors import UserError
from ufo_ds.progress import Progress

BATCH = 64


class TeacherCache:
    """
    Args:
        directory: of all caches.
        about: what the rows follow from.
        rows, widths: numbers of rows, and of columns of features and logits.
    """

    def __init__(self, directory: Path, about: dict[str, Any], rows: int, widths: tuple[int, int]):
        self._about = json.dumps(about, sort_keys=True, indent=1)
        self.directory = directory / hashlib.sha256(self._about.encode()).hexdigest()[:16]
        self.rows = rows
        self._files = {"features.f32": widths[0]} | ({"logits.f32": widths[1]} if widths[1] else {})
        self._maps: dict[str, np.ndarray] = {}

    @property
    def done(self) -> int:
        """Whole rows that are there."""
        sizes = []
        for name, width in self._files.items():
            path = self.directory / name
            sizes.append(path.stat().st_size // (4 * width) if path.exists() else 0)
        return min(sizes)

    def fill(self, teachers: Teachers, views: Views, workers: int, corrupt: Corrupt) -> None:
        """Compute the rows that are not there; in one process alone. Another that fills the same cache is waited for.

        Raises:
            UserError: no room, no image can be read, or too many cannot.
        """
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            with (self.directory / ".lock").open("a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                self._fill(teachers, views, workers, corrupt)
        except OSError as error:
            raise UserError(
                f"--cache {self.directory}: {error.strerror}: choose one with room that you can write to"
            ) from None

    def _fill(self, teachers: Teachers, views: Views, workers: int, corrupt: Corrupt) -> None:
        # Whole batches, so that rows are those of an uninterrupted pass to the bit.
        batches, begin = -(-self.rows // BATCH), min(self.done, self.rows) // BATCH
        if self.done >= self.rows:
            return
        loader: Any = DataLoader(
            InOrder(views, BATCH), batch_size=None, sampler=range(begin, batches), num_workers=workers,
            generator=torch.Generator(),
        )  # fmt: skip
        write_text(self.directory / "about.json", self._about + "\n")
        with Progress(batches, done=begin, unit="batches", name="what the teacher says") as progress:
            for name, width in self._files.items():
                path = self.directory / name
                path.touch()
                os.truncate(path, begin * BATCH * width * 4)
            files = [(self.directory / name).open("ab") for name in self._files]
            for batch in loader:
                corrupt.add(batch.skipped)
                for file, rows in zip(files, teachers.of(batch.pixels), strict=False):
                    file.write(rows.numpy().astype(np.float32).tobytes())
                    file.flush()
                progress.update()
            for file in files:
                file.close()

    def read(self, numbers: np.ndarray) -> Taught:
        """Rows of views."""
        found = [torch.from_numpy(self._map(name)[numbers]) for name in self._files]
        return Taught(found[0], found[1] if len(found) > 1 else found[0][:, :0])

    def _map(self, name: str) -> np.ndarray:
        if name not in self._maps:
            flat = np.memmap(self.directory / name, dtype=np.float32, mode="r")
            self._maps[name] = flat.reshape(-1, self._files[name])[: self.rows]
        return self._maps[name]


def cache_of(directory: Path, teachers: Teachers, sources: list[Images], views: Views) -> TeacherCache:
    """The cache of these teachers and views."""
    digest = hashlib.sha256()
    for source in sources:
        digest.update(source.digest().encode())
    about = {
        "teachers": [{"name": model.task, "fingerprint": model.fingerprint} for model in teachers.models],
        "images": digest.hexdigest(),
        "views": views.views,
        "mixup_prob": views.mixup_prob,
        **key_of(teachers.recipe),
    }
    return TeacherCache(directory, about, len(views), (sum(teachers.widths), len(teachers.classes)))
