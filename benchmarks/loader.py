"""Images a second of one loader process, from shards to batches, and the memory of one that has 30 tasks.

    python benchmarks/loader.py [--quick]

Two kinds of JPEG, made by the script: photographs of about 500 x 375 (noise of all scales, quality 92) to 384 x 384 by
a random resized crop and a flip; and re-identification crops of 64 x 128 to 256 x 128 by resize, pad 10 and crop, flip
and erasing with probability 0.5. All bilinear with antialiasing. On the same images, one thread each:

    shards      the package: ``Batches`` over ``TrainSource.load``, batches of 32, uint8
    memory      the same decoding and transforms on the JPEG's bytes in memory, without batches, order or keyed draws
    files       the usual way: a torch Dataset of files and a DataLoader without workers; Pillow, then float, normalised
    files_uint8 the same, but left as uint8 as ours: normalisation is the device's there
    webdataset  plain webdataset over the same tars with our decoding and transforms, batches of 32, uint8

The draws of the peers have the same distributions; they come from one generator, ours from one keyed to each sample.

Seconds are CPU seconds, which other processes on the machine distort least. The kinds take turns, each round in another
order; a ratio is of two neighbours in time, and the median over rounds is reported. Images per second are the medians.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset

from ufo_ds.data.augmentation import CROP_ATTEMPTS, augmented, crop_box
from ufo_ds.data.layouts import Layout, Sample
from ufo_ds.data.mixing import Batches, loader
from ufo_ds.data.shard_writer import write
from ufo_ds.data.shards import ShardSet
from ufo_ds.data.source import TrainSource
from ufo_ds.data.transforms import cropped_pixels, image_size, resized_pixels
from ufo_ds.recipe_task import Augment, CrossEntropy, Head, Loss, RandomResizedCrop, Task, TrainSet
from ufo_ds.seeding import numpy_generator

BATCH = 32
CROP = RandomResizedCrop()
KINDS = {
    "photos": ((384, 384), Augment(random_resized_crop=CROP, flip=True)),
    "crops": ((256, 128), Augment(interpolation="bilinear", pad=10, flip=True, erasing=0.5)),
}
BARS = {"memory": 0.9, "files": 1.5, "webdataset": 1.0}  # images a second from shards / of the peer, at least
TASKS, SAMPLES = 30, 100_000


# --- images -----------------------------------------------------------------------------------------------------------


def natural(width: int, height: int, generator: np.random.Generator) -> Image.Image:
    """Noise whose amplitude falls with its frequency, as in photographs, and a little of its own in every pixel."""
    total = np.zeros((height, width, 3))
    for cells in (2, 4, 8, 16, 32, 64):
        shape = (max(2, round(cells * height / width)), cells, 3)
        layer = Image.fromarray(generator.integers(0, 256, shape, dtype=np.uint8))
        total += (np.asarray(layer.resize((width, height), Image.Resampling.BICUBIC)) - 127.5) / cells**0.6
    total += generator.normal(0, 3, total.shape)
    return Image.fromarray((total + 127.5).clip(0, 255).astype(np.uint8))


def make_shards(kind: str, count: int, directory: Path) -> tuple[str, list[Path]]:
    """The directory of shards, and the JPEGs as files."""
    generator, files = np.random.default_rng(0), []
    for n in range(count):
        size = (64, 128) if kind == "crops" else (500, int(generator.integers(330, 420)))
        files.append(directory / "files" / str(n % 8) / f"{n}.jpg")
        files[-1].parent.mkdir(parents=True, exist_ok=True)
        natural(*size, generator).save(files[-1], quality=92)
    samples = [Sample(file, file.parent.name) for file in files]
    write(Layout(samples), directory / "shards", source="benchmark", shard_size=100)
    return str(directory / "shards"), files


def make_task(name: str, shards: str) -> Task:
    input_hw, augment = KINDS[name.rstrip("0123456789")]
    return Task(
        name=name, head=Head(type="linear"), loss=Loss(cross_entropy=CrossEntropy()), input=input_hw,
        samples_per_step=BATCH, train=[TrainSet(shards=shards)], augment=augment,
    )  # fmt: skip


# --- five ways to load them -------------------------------------------------------------------------------------------


def transformed(data: bytes, kind: str, generator: np.random.Generator) -> np.ndarray:
    """The decoding and transforms of the package, uint8 [3, H, W]."""
    input_hw, augment = KINDS[kind]
    if augment.random_resized_crop:
        box = crop_box(image_size(data), CROP, generator.random((4, CROP_ATTEMPTS)))
        pixels_HWC = cropped_pixels(data, box, input_hw, "bilinear")
    else:
        pixels_HWC = resized_pixels(data, input_hw, "bilinear")
    return augmented(pixels_HWC, input_hw, augment, generator).transpose(2, 0, 1)


def from_memory(contents: list[bytes], kind: str) -> Iterator[int]:
    generator = numpy_generator("memory")
    while True:
        for data in contents:
            np.ascontiguousarray(transformed(data, kind, generator))
            yield 1


def from_shards(shards: str, kind: str) -> Iterator[int]:
    batches = Batches({kind: TrainSource.open(make_task(kind, shards), seed=0)}, lambda _: {kind: range(BATCH)}, 1)
    i = 0
    while True:
        yield len(batches[i].tasks[kind].images)
        i += 1


class Files(Dataset):
    """Images from files by Pillow, as training scripts have it."""

    def __init__(self, files: list[Path], kind: str, normalise: bool):
        self.files, self.kind, self.normalise = files, kind, normalise
        self.generator = np.random.default_rng(0)
        self.mean = self.std = torch.tensor([0.5, 0.5, 0.5])[:, None, None]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        draw = self.generator.random
        with self.files[i].open("rb") as file:
            image = Image.open(file).convert("RGB")
        (height, width), augment = KINDS[self.kind]
        if augment.random_resized_crop:
            top, left, h, w = crop_box((image.height, image.width), CROP, draw((4, CROP_ATTEMPTS)))
            image = image.crop((left, top, left + w, top + h))
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        if augment.pad:
            y, x = self.generator.integers(0, 2 * augment.pad + 1, 2).tolist()
            image = ImageOps.expand(image, augment.pad).crop((x, y, x + width, y + height))
        if draw() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        x_CHW = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
        if self.normalise:
            x_CHW = x_CHW.float().div_(255).sub_(self.mean).div_(self.std)
        if augment.erasing and draw() < augment.erasing:
            self.erase(x_CHW)
        return x_CHW, int(self.files[i].parent.name)

    def erase(self, x_CHW: torch.Tensor) -> None:
        _, height, width = x_CHW.shape
        while True:
            area, aspect, u_top, u_left = self.generator.random(4).tolist()
            area, aspect = (0.02 + 0.38 * area) * height * width, 0.3 + aspect * (1 / 0.3 - 0.3)
            h, w = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
            if h <= height and w <= width:
                break
        top, left = int(u_top * (height - h + 1)), int(u_left * (width - w + 1))
        box = x_CHW[:, top : top + h, left : left + w]
        box.normal_() if self.normalise else box.random_(0, 256)


def from_files(files: list[Path], kind: str, normalise: bool) -> Iterator[int]:
    while True:
        for images, _ in DataLoader(Files(files, kind, normalise), BATCH, shuffle=True):
            yield len(images)


def from_webdataset(shards: str, kind: str) -> Iterator[int]:
    tars, generator = sorted(str(path) for path in Path(shards).glob("*.tar")), numpy_generator("webdataset")

    def sample(entry: dict[str, Any]) -> tuple[np.ndarray, int]:
        return transformed(entry["jpg"], kind, generator), int(entry["cls"])

    while True:
        for images, _ in webdataset.WebDataset(tars, shardshuffle=False).map(sample).batched(BATCH):
            yield len(images)


# --- speed ------------------------------------------------------------------------------------------------------------


def seconds_an_image(images: Iterator[int], count: int) -> float:
    start, done = time.process_time(), 0
    while done < count:
        done += next(images)
    return (time.process_time() - start) / done


def measure_speed(kind: str, directory: Path, count: int, rounds: int) -> tuple[dict[str, float], dict[str, float]]:
    """Images a second of every way, and those from shards relative to the others."""
    shards, files = make_shards(kind, count, directory / kind)
    ways: dict[str, Iterator[int]] = {
        "shards": from_shards(shards, kind),
        "memory": from_memory([file.read_bytes() for file in files], kind),
        "files": from_files(files, kind, True),
        "files_uint8": from_files(files, kind, False),
        "webdataset": from_webdataset(shards, kind),
    }  # fmt: skip
    peers = [name for name in ways if name != "shards"]
    for way in ways.values():
        seconds_an_image(way, count // 2)  # files and modules are read, code is warm
    taken: dict[str, list[float]] = {name: [] for name in ways}
    ratios: dict[str, list[float]] = {name: [] for name in peers}
    for r in range(rounds):
        before = seconds_an_image(ways["shards"], count)
        for name in peers[r % len(peers) :] + peers[: r % len(peers)]:
            peer = seconds_an_image(ways[name], count)
            after = seconds_an_image(ways["shards"], count)
            ratios[name].append(2 * peer / (before + after))
            taken[name].append(peer)
            taken["shards"].append(before)
            before = after
    speeds = {f"{kind}_{name}_per_s": 1 / statistics.median(values) for name, values in taken.items()}
    medians = {name: statistics.median(values) for name, values in ratios.items()}
    print(f"{kind + ', images a second':34}{'median':>9}    {'shards / it':>12}{'min':>7}{'max':>7}")
    for name in ways:
        line = f"{name:34}{speeds[f'{kind}_{name}_per_s']:9.0f}"
        if name in ratios:
            line += f"    {medians[name]:12.3f}{min(ratios[name]):7.2f}{max(ratios[name]):7.2f}"
        print(line, flush=True)
    return speeds, medians


# --- memory -----------------------------------------------------------------------------------------------------------


def memory_mib() -> dict[str, float]:
    """Of this process: resident, proportional (shared pages divided among their processes) and private."""
    kib = {"Rss": 0, "Pss": 0, "Private_Clean": 0, "Private_Dirty": 0}
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        name = line.split(":")[0]
        if name in kib:
            kib[name] = int(line.split()[1])
    private = kib["Private_Clean"] + kib["Private_Dirty"]
    return {"rss": kib["Rss"] / 1024, "pss": kib["Pss"] / 1024, "private": private / 1024}


class Measured(Batches):
    """Batches, and of each the memory of the process that made it and the number of files it has open."""

    def __getitem__(self, i: int) -> tuple[int, dict[str, float], int]:
        batch = super().__getitem__(i)
        images = sum(len(part.images) for part in batch.tasks.values())
        return images, memory_mib(), len(list(Path("/proc/self/fd").iterdir()))


def large_source(name: str, directory: str) -> TrainSource:
    """A source of :data:`SAMPLES` samples: those of a small set of shards again and again, with arrays of its own."""
    small = ShardSet.open(directory)
    index = {"label": small.labels, "camera": small.camera_ids, "shard": small._shard, "offset": small._offset,
             "length": small._length}  # fmt: skip
    times = -(-SAMPLES // len(small))
    tiled = {key: np.tile(values, times)[:SAMPLES] for key, values in index.items()}
    return TrainSource(
        make_task(name, directory), 0, [ShardSet(small.name, small.manifest, tiled, small.tars, small._store)]
    )


def worker_memory(directory: str, tasks: int) -> dict[str, float]:
    """Of a loader process, forked, after it made a batch of four images of every task."""
    sources = {f"crops{n}": large_source(f"crops{n}", directory) for n in range(tasks)}
    batches = Measured(sources, lambda _: dict.fromkeys(sources, range(4)), 1)
    images, mib, files = next(loader(batches, 0, 4, workers=1, pin=False))
    assert images == 4 * tasks
    return {**mib, "files": files}


def measure_memory(directory: Path) -> dict[str, float]:
    """With one task and with 30 of 100,000 samples each.

    What the sources hold is the parent's: a forked worker shares it until it is written to, which is never. Its own are
    the order of the epochs it is in (two at most, 8 bytes a sample), the batches that it makes and open files. A worker
    that is not forked would hold everything: ``rss`` is the bound for that.
    """
    shards = str(directory / "crops" / "shards")
    one, all_ = worker_memory(shards, 1), worker_memory(shards, TASKS)
    figures = {f"worker_{TASKS}_tasks_{key}_mib": all_[key] for key in ("rss", "pss", "private")}
    figures |= {f"worker_1_task_{key}_mib": one[key] for key in ("rss", "pss", "private")}
    more = (TASKS - 1) * SAMPLES / 2**20
    figures["worker_rss_bytes_per_sample"] = (all_["rss"] - one["rss"]) / more
    figures["worker_private_bytes_per_sample"] = (all_["private"] - one["private"]) / more
    figures["worker_files_per_task"] = (all_["files"] - one["files"]) / (TASKS - 1)
    for name, value in figures.items():
        print(f"{name:34}{value:9.1f}")
    return figures


# --- report -----------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="within a minute on two cores: fewer images and rounds")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    figures, bars = {}, {}
    with tempfile.TemporaryDirectory() as name:
        for kind, count in (("photos", 64 if quick else 320), ("crops", 128 if quick else 960)):
            speeds, ratios = measure_speed(kind, Path(name), count, 5 if quick else 12)
            figures |= speeds | {f"{kind}_to_{peer}": ratio for peer, ratio in ratios.items()}
            for peer, bar in BARS.items():
                bars[f"{kind}_to_{peer}"] = {"value": round(ratios[peer], 4), "bar": bar, "ok": ratios[peer] >= bar}
        figures |= measure_memory(Path(name))
    rounded = {name: round(value, 4) for name, value in figures.items()}
    print(json.dumps({"benchmark": "loader", "figures": rounded, "bars": bars}))


if __name__ == "__main__":
    main()
