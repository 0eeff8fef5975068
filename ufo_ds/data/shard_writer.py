"""A layout written as WebDataset shards with index and manifest; ``ufo_ds.data.shards`` says of what form they are."""

import contextlib
import dataclasses
import json
import os
import shutil
import tarfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import webdataset
from safetensors.numpy import save
from tqdm import tqdm

from ufo_ds.data.layouts import Layout, Pair, Sample, Templates, is_image
from ufo_ds.data.shards import INDEX, MANIFEST, ClassEntry, Manifest, ShardEntry, ShardSet, sha256
from ufo_ds.data.transforms import CorruptImage, decode
from ufo_ds.errors import UserError

READ_AHEAD = 64  # images held in memory while they are checked, per worker


def write(
    layout: Layout,
    out: Path,
    *,
    source: str,
    licence: str = "unknown",
    shard_size: int = 10_000,
    max_corrupt: float = 0.0,
    workers: int = 1,
) -> ShardSet:
    """Write a layout as shards; the same input gives the same bytes.

    The directory appears complete, or not at all.

    Args:
        layout: the samples; each image is decoded once, and left out if that fails.
        out: a directory that does not exist yet.
        source: where the data comes from, for the manifest.
        licence: of the data, for the manifest.
        shard_size: samples per shard.
        max_corrupt: share of the images that may be left out.
        workers: threads that read and decode.

    Raises:
        UserError: ``out`` exists or cannot be written, an image cannot be read, or too many are corrupt.
    """
    out = Path(out)
    if shard_size < 1:
        raise UserError(f"shard_size {shard_size}: give 1 or more samples per shard")
    if not 0 <= max_corrupt <= 1:
        raise UserError(f"max_corrupt {max_corrupt}: give a share of the images, from 0 to 1")
    with complete_or_nothing(out) as directory:
        readable = _readable(layout.samples, max_corrupt, workers)
        kept, shards = _write_shards(layout.samples, readable, directory, shard_size)
        _write_index(layout, kept, shards, directory, source, licence)
    return ShardSet.open(out)


def write_parts(parts: dict[str, Layout], out: Path, **options: Any) -> list[ShardSet]:
    """Write every part with :func:`write` into ``out`` / its name; all of them appear, or none.

    Raises:
        UserError: as :func:`write`.
    """
    with complete_or_nothing(Path(out)) as directory:
        for name, layout in parts.items():
            write(layout, directory / name, **options)
    return [ShardSet.open(Path(out) / name) for name in parts]


@contextlib.contextmanager
def complete_or_nothing(out: Path) -> Iterator[Path]:
    """A temporary sibling of ``out`` that takes its place at the end, or goes, with the parents made for it.

    Raises:
        UserError: ``out`` exists or cannot be written.
    """
    if os.path.lexists(out):
        raise UserError(f"{out} exists: remove it or choose another directory")
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    made = [parent for parent in out.parents if not parent.exists()]
    try:
        temporary.mkdir(parents=True)
        yield temporary
        temporary.rename(out)
    except BaseException as error:  # KeyboardInterrupt too
        shutil.rmtree(temporary, ignore_errors=True)
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()
        if isinstance(error, OSError):
            raise UserError(
                f"{out} cannot be written ({error.strerror}): free space there or choose another directory"
            ) from None
        raise


def _readable(samples: list[Sample], max_corrupt: float, workers: int) -> Iterator[tuple[int, bytes]]:
    """``(index, bytes)`` of the samples that decode, as long as the share of the others is at most ``max_corrupt``."""
    total, ahead, corrupt = len(samples), READ_AHEAD * workers, 0
    with ThreadPoolExecutor(workers) as pool, tqdm(total=total, unit="image", disable=None) as progress:
        for start in range(0, total, ahead):
            checked = pool.map(_read_and_check, samples[start : start + ahead])
            for index, (data, fault) in enumerate(checked, start):
                progress.update()
                if fault is None:
                    yield index, data
                    continue
                corrupt += 1
                if corrupt == total or corrupt / total > max_corrupt:
                    raise UserError(
                        f"{samples[index].path} is corrupt ({fault}), number {corrupt} of {total} images: repair or "
                        f"remove it, or allow a share of them with --max_corrupt (now {max_corrupt})"
                    )


def _read_and_check(sample: Sample) -> tuple[bytes, CorruptImage | None]:
    try:
        data = sample.path.read_bytes()
    except OSError as error:
        raise UserError(f"{sample.path} cannot be read ({error.strerror}): make it readable or remove it") from None
    try:
        decode(data)
    except CorruptImage as fault:
        return data, fault
    return data, None


def _write_shards(
    samples: list[Sample], readable: Iterator[tuple[int, bytes]], directory: Path, shard_size: int
) -> tuple[list[int], list[ShardEntry]]:
    """Returns the indices of the samples written, in order, and what to say about each shard."""
    label_of = {name: label for label, name in enumerate(_classes(samples))}
    kept: list[int] = []
    shards = []
    for number, group in groupby(enumerate(readable), key=lambda item: item[0] // shard_size):
        path = directory / f"shard-{number:06d}.tar"
        before = len(kept)
        # A fixed time and TarWriter's fixed user make the bytes a function of the input.
        with path.open("wb") as file, webdataset.TarWriter(file, encoder=False, mtime=0) as tar:
            for position, (index, data) in group:
                sample = samples[index]
                names = {"label": sample.label} | ({"camera": sample.camera} if sample.camera else {})
                tar.write(
                    {
                        "__key__": f"{position:09d}",
                        sample.path.suffix[1:].lower(): data,
                        "cls": str(label_of[sample.label]).encode(),
                        "json": json.dumps(names).encode(),
                    }
                )
                kept.append(index)
        shards.append(ShardEntry(path.name, path.stat().st_size, sha256(path), len(kept) - before))
    return kept, shards


def _write_index(
    layout: Layout, kept: list[int], shards: list[ShardEntry], directory: Path, source: str, licence: str
) -> None:
    """Write index and manifest of the shards in ``directory``."""
    samples = [layout.samples[index] for index in kept]
    classes, cameras = _classes(layout.samples), sorted({s.camera for s in layout.samples if s.camera})
    label_of = {name: label for label, name in enumerate(classes)}
    camera_of: dict[str | None, int] = {name: camera for camera, name in enumerate(cameras)}
    places = np.array([place for entry in shards for place in _image_places(directory / entry.name)], dtype=np.int64)
    index: dict[str, np.ndarray] = {
        "shard": np.repeat(np.arange(len(shards), dtype=np.int32), [entry.samples for entry in shards]),
        "offset": places[:, 0].copy(),
        "length": places[:, 1].copy(),
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
        source=source,
        licence=licence,
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


def _image_places(path: Path) -> list[tuple[int, int]]:
    """Offset and length in bytes of every image in a tar."""
    with tarfile.open(path, "r:") as tar:
        return [(member.offset_data, member.size) for member in tar if is_image(Path(member.name))]
