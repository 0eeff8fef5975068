"""A layout written as WebDataset shards with index and manifest; ``ufo_ds.data.shards`` says of what form they are."""

import dataclasses
import hashlib
import io
import json
import os
import tarfile
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import webdataset
from PIL import Image
from safetensors.numpy import save

from ufo_ds.data.layouts import Layout, Pair, Sample, Templates, is_image
from ufo_ds.data.shard_journal import Journal, WholeShard, check_absent, resumable, say
from ufo_ds.data.shards import INDEX, MANIFEST, ClassEntry, Manifest, ShardEntry, ShardSet, sha256
from ufo_ds.data.transforms import CorruptImage, decode
from ufo_ds.errors import UserError
from ufo_ds.progress import Progress

READ_AHEAD = 4  # images held in memory while they are checked, per worker
LARGE = 2**24  # pixels from which images are decoded by one thread alone: the largest take over a gigabyte each
FORM = 1  # of the bytes written for a layout: raised when they change, lest two versions share an interrupted run


@dataclasses.dataclass(frozen=True)
class Part:
    """What one directory of shards is made of.

    Args:
        layout: the samples; each image is decoded once, and left out if that fails.
        source: where the data comes from, for the manifest.
        licence: of the data, for the manifest.
    """

    layout: Layout
    source: str
    licence: str = "unknown"


def write(layout: Layout, out: Path, *, source: str, licence: str = "unknown", **options: Any) -> ShardSet:
    """Write one layout as shards, as :func:`write_sets` does, into ``out`` itself."""
    return write_parts({"": layout}, out, source=source, licence=licence, **options)[0]


def write_parts(
    parts: dict[str, Layout], out: Path, *, source: str, licence: str = "unknown", **options: Any
) -> list[ShardSet]:
    """Write the parts of one data set, as :func:`write_sets` does."""
    return write_sets({name: Part(layout, source, licence) for name, layout in parts.items()}, out, **options)


def write_sets(
    parts: dict[str, Part], out: Path, *, shard_size: int = 10_000, max_corrupt: float = 0.0, workers: int = 1
) -> list[ShardSet]:
    """Write every part as shards into ``out`` / its name; all of them appear, or none.

    The same input gives the same bytes, whatever the workers and however often the writing was interrupted: see
    :func:`ufo_ds.data.shard_journal.resumable`. An error leaves nothing behind.

    Args:
        parts: by name.
        out: a directory that does not exist yet.
        shard_size: samples per shard.
        max_corrupt: share of the images of a part that may be left out.
        workers: threads that read and decode.

    Raises:
        UserError: a part without images; ``out`` exists, cannot be written or is being made by another process; an
            image cannot be read, or too many are corrupt.
    """
    out = Path(out)
    if shard_size < 1:
        raise UserError(f"shard_size {shard_size}: give 1 or more samples per shard")
    if not 0 <= max_corrupt <= 1:
        raise UserError(f"max_corrupt {max_corrupt}: give a share of the images, from 0 to 1")
    if workers < 1:
        raise UserError(f"workers {workers}: give 1 or more")
    for name, part in parts.items():
        if not part.layout.samples:
            raise UserError(f"{part.source}: {f'part {name}' if name else 'the set'} has no images: nothing to write")
    check_absent(out)  # before the time that a fingerprint takes
    with ThreadPoolExecutor(workers) as pool:
        fingerprint = _fingerprint(parts, f"{FORM} {shard_size} {max_corrupt}", pool)
    # The pool ends before what it writes is removed, or has the place of ``out``.
    with resumable(out, fingerprint) as journal, ThreadPoolExecutor(1) as large, ThreadPoolExecutor(workers) as pool:
        for name, part in parts.items():
            reader = _Reader(part.layout.samples, max_corrupt, pool, large, READ_AHEAD * workers)
            places = _write_shards(name, reader, journal, shard_size)
            _write_index(
                part, reader.kept(), [shard.entry for shard in journal.parts[name]], places, journal.directory / name
            )
    return [ShardSet.open(out / name) for name in parts]


def _fingerprint(parts: dict[str, Part], options: str, pool: ThreadPoolExecutor) -> str:
    """Of all that decides about the bytes of the shards; instead of the images their files' sizes and times."""
    digest = hashlib.sha256(options.encode())
    for name, part in parts.items():
        samples = part.layout.samples
        digest.update(json.dumps([name, len(samples)]).encode())
        for of_some in pool.map(_digest, (samples[start : start + 1000] for start in range(0, len(samples), 1000))):
            digest.update(of_some)
    return digest.hexdigest()


def _digest(samples: list[Sample]) -> bytes:
    digest = hashlib.sha256()
    for sample in samples:
        # An image that is part of a larger file has it as its ``file``, and is named by its place there.
        file = getattr(sample.path, "file", sample.path)
        try:
            state = [(stat := os.stat(file)).st_size, stat.st_mtime_ns] if isinstance(file, Path) else []
        except OSError as error:
            raise _unreadable(sample, error) from None
        digest.update(json.dumps([str(sample.path), sample.label, sample.camera, *state]).encode())
    return digest.digest()


class _Reader:
    """The samples of a part whose images decode.

    Attributes:
        samples: all of them.
        corrupt: indices of those that were read and did not decode.
    """

    def __init__(
        self,
        samples: list[Sample],
        max_corrupt: float,
        pool: ThreadPoolExecutor,
        large: ThreadPoolExecutor,
        ahead: int,
    ):
        self.samples, self.corrupt, self.pool = samples, list[int](), pool
        self._max_corrupt, self._large, self._ahead = max_corrupt, large, ahead

    def read(self, start: int, name: str) -> Iterator[tuple[int, bytes]]:
        """``(index, bytes)`` in the order of the samples, from ``start`` on.

        Raises:
            UserError: an image cannot be read, or more than the allowed share is corrupt.
        """
        total = len(self.samples)
        with Progress(total, done=start, unit="images", name=name) as progress:
            for index, (data, fault) in enumerate(self._checked(start), start):
                progress.update()
                if fault is None:
                    yield index, data
                    continue
                self.corrupt.append(index)
                number = len(self.corrupt)
                if number == total or number / total > self._max_corrupt:
                    raise UserError(
                        f"{self.samples[index].path} is corrupt ({fault}), number {number} of {total} images: repair "
                        f"or remove it, or allow a share of them with --max_corrupt (now {self._max_corrupt})"
                    )

    def _checked(self, start: int) -> Iterator[tuple[bytes, CorruptImage | None]]:
        """Only so many images ahead that the workers have enough to do: the memory they take is bounded."""
        waiting: deque[Future] = deque()
        for sample in islice(self.samples, start, None):
            waiting.append(self.pool.submit(_read_and_check, sample, self._large))
            if len(waiting) > self._ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def kept(self) -> list[int]:
        """Indices of the samples that are not corrupt, once all were read."""
        corrupt = set(self.corrupt)
        return [index for index in range(len(self.samples)) if index not in corrupt]


def _read_and_check(sample: Sample, large: ThreadPoolExecutor) -> tuple[bytes, CorruptImage | None]:
    try:
        data = sample.path.read_bytes()
    except OSError as error:
        raise _unreadable(sample, error) from None
    # A thread of their own, not a lock: what one has freed, its allocator keeps for the same thread.
    return data, large.submit(_fault, data).result() if _is_large(data) else _fault(data)


def _fault(data: bytes) -> CorruptImage | None:
    try:
        decode(data)
    except CorruptImage as fault:
        return fault
    return None


def _is_large(data: bytes) -> bool:
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.width * image.height > LARGE
    except Exception:  # decode says what is wrong with it
        return False


def _unreadable(sample: Sample, error: OSError) -> UserError:
    return UserError(f"{sample.path} cannot be read ({error.strerror}): make it readable or remove it")


def _write_shards(name: str, reader: _Reader, journal: Journal, shard_size: int) -> np.ndarray:
    """Write the shards of a part that are not whole yet.

    Returns:
        int64 [N, 2], offset and length in bytes of every image in its shard.
    """
    directory = journal.directory / name
    directory.mkdir(parents=True, exist_ok=True)
    places = _places_in_whole_shards(name, journal, reader.pool)
    whole = journal.parts[name]
    start, position = whole[-1].stop if whole else 0, sum(map(len, places))
    reader.corrupt += [index for shard in whole for index in shard.corrupt]
    label_of = {label: number for number, label in enumerate(_classes(reader.samples))}

    def finish(path: Path, stop: int, corrupt: list[int]) -> None:
        places.append(_image_places(path))
        entry = ShardEntry(path.name, path.stat().st_size, sha256(path), len(places[-1]))
        journal.add(name, WholeShard(entry, stop, corrupt))

    finishing: Future | None = None
    noted = len(reader.corrupt)
    readable = reader.read(start, name)
    for number, first in enumerate(readable, len(whole)):
        path = directory / f"shard-{number:06d}.tar"
        of_shard = chain([first], islice(readable, shard_size - 1))
        indices = _write_shard(path, of_shard, position, reader.samples, label_of)
        position += len(indices)
        # A corrupt image behind the last one of the shard will be met again by who goes on from here.
        corrupt = [index for index in reader.corrupt[noted:] if index < indices[-1]]
        noted += len(corrupt)
        if finishing is not None:
            finishing.result()
        finishing = reader.pool.submit(finish, path, indices[-1] + 1, corrupt)
    if finishing is not None:
        finishing.result()
    return np.concatenate(places)


def _write_shard(
    path: Path, items: Iterator[tuple[int, bytes]], position: int, samples: list[Sample], label_of: dict[str, int]
) -> list[int]:
    """Returns the indices of the samples in it; the first one has the given position among all that are kept."""
    indices = []
    # A fixed time and TarWriter's fixed user make the bytes a function of the input.
    with path.open("wb") as file, webdataset.TarWriter(file, encoder=False, mtime=0) as tar:
        for key, (index, data) in enumerate(items, position):
            sample = samples[index]
            names = {"label": sample.label} | ({"camera": sample.camera} if sample.camera else {})
            tar.write(
                {
                    "__key__": f"{key:09d}",
                    sample.path.suffix[1:].lower(): data,
                    "cls": str(label_of[sample.label]).encode(),
                    "json": json.dumps(names).encode(),
                }
            )
            indices.append(index)
    return indices


def _places_in_whole_shards(part: str, journal: Journal, pool: ThreadPoolExecutor) -> list[np.ndarray]:
    """Places of the images, per shard; the first shard that is not as the journal has it goes, with all behind it."""
    places: list[np.ndarray] = []
    whole = journal.parts.get(part, [])
    paths = [journal.directory / part / shard.entry.name for shard in whole]
    for path, of_images in zip(paths, pool.map(_places_if_sound, paths, [s.entry.sha256 for s in whole]), strict=True):
        if of_images is None:
            say(f"{path} is not as the interrupted run left it: going on before it")
            break
        places.append(of_images)
    journal.keep(part, len(places))
    return places


def _places_if_sound(path: Path, checksum: str) -> np.ndarray | None:
    return _image_places(path) if path.is_file() and sha256(path) == checksum else None


def _image_places(path: Path) -> np.ndarray:
    """Offset and length in bytes of every image in a tar, int64 [N, 2]."""
    with tarfile.open(path, "r:") as tar:
        places = [(member.offset_data, member.size) for member in tar if is_image(Path(member.name))]
    return np.array(places, dtype=np.int64)


def _write_index(part: Part, kept: list[int], shards: list[ShardEntry], places_N2: np.ndarray, directory: Path) -> None:
    """Write index and manifest of the shards in ``directory``."""
    layout = part.layout
    samples = [layout.samples[index] for index in kept]
    classes, cameras = _classes(layout.samples), sorted({s.camera for s in layout.samples if s.camera})
    label_of = {name: label for label, name in enumerate(classes)}
    camera_of: dict[str | None, int] = {name: camera for camera, name in enumerate(cameras)}
    index: dict[str, np.ndarray] = {
        "shard": np.repeat(np.arange(len(shards), dtype=np.int32), [entry.samples for entry in shards]),
        "offset": places_N2[:, 0].copy(),
        "length": places_N2[:, 1].copy(),
        "label": np.array([label_of[s.label] for s in samples], dtype=np.int64),
        "camera": np.array([camera_of.get(s.camera, -1) for s in samples], dtype=np.int64),
    }
    if layout.pairs is not None:
        index["pairs"] = _kept_pairs(layout.pairs, kept)
    if layout.templates is not None:
        index |= _kept_templates(layout.templates, kept)
    (directory / INDEX).write_bytes(save(index))  # save_file would make it readable by its owner alone
    counts = Counter(sample.label for sample in samples)
    given = layout.pairs if layout.templates is None else layout.templates.pairs
    pairs = None if given is None else len(index["pairs" if layout.templates is None else "template_pairs"])
    manifest = Manifest(
        version=1,
        samples=len(kept),
        classes=[ClassEntry(name, counts[name]) for name in classes],
        cameras=cameras,
        shards=shards,
        index_sha256=sha256(directory / INDEX),
        corrupt=len(layout.samples) - len(kept),
        pairs=pairs,
        dropped_pairs=0 if given is None or pairs is None else len(given) - pairs,
        source=part.source,
        licence=part.licence,
    )
    (directory / MANIFEST).write_text(json.dumps(dataclasses.asdict(manifest), indent=1) + "\n")


def _kept_pairs(pairs: list[Pair], kept: list[int]) -> np.ndarray:
    """int64 [M, 4] of the pairs both of whose images were kept, by their new positions."""
    position_of = {index: position for position, index in enumerate(kept)}
    rows = [
        (pair.fold, position_of[pair.first], position_of[pair.second], pair.same)
        for pair in pairs
        if pair.first in position_of and pair.second in position_of
    ]
    return np.array(rows, dtype=np.int64).reshape(-1, 4)


def _kept_templates(templates: Templates, kept: list[int]) -> dict[str, np.ndarray]:
    """Arrays of the kept samples, and the pairs of templates that have any."""
    template = templates.template[kept]
    has_images = np.isin(templates.pairs[:, :2], template).all(axis=1)
    return {
        "template": template,
        "media": templates.media[kept],
        "score": templates.score[kept],
        "template_pairs": templates.pairs[has_images],
    }


def _classes(samples: list[Sample]) -> list[str]:
    return sorted({sample.label for sample in samples})
