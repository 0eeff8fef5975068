"""Images to distil on: each in a fixed number of augmented views, so that what a teacher says of them can be kept."""

import bisect
import itertools
from collections.abc import Sequence
from typing import Self

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ufo_ds.data import attributes
from ufo_ds.data.augmentation import CROP_ATTEMPTS, augmented, crop_box
from ufo_ds.data.image_files import Images
from ufo_ds.data.mixup import Mixing, mixed
from ufo_ds.data.sampling import EpochOrder, PKOrder
from ufo_ds.data.transforms import CorruptImage, cropped_pixels, image_size, resized_pixels
from ufo_ds.errors import UserError
from ufo_ds.recipe import Recipe
from ufo_ds.seeding import numpy_generator

UNKNOWN = -1  # label of an image without one


class Views:
    """Views of all images of some sources, by number: ``sample * views + view``. With ``quarter_turns`` each image is
    four samples, turned 0 to 3 times counter-clockwise.

    A view is a function of (seed, task, number): augmented as in training. A share of them are mixed with a view of any
    image, by a weight between 0 and 1, and have no label: of what is between images a teacher of few says more than of
    these, which it has learned by heart ("function matching": Beyer et al., 2022, section 3). The mixing of the recipe
    is left out.

    Args:
        recipe: of one task.
        sources: where the images are.
        classes: names behind a classifier's labels; an image whose label is none of them has no label. Of a task that
            compares none: then the labels of each source are identities of their own.
        views: of each image.
        mixup_prob: share of the views that are mixed.

    Attributes:
        labels: int64 [samples], :data:`UNKNOWN` where there is none.
        num_classes: of the labels.
    """

    def __init__(
        self, recipe: Recipe, sources: Sequence[Images], classes: Sequence[str], views: int, mixup_prob: float
    ):
        self.task, self.seed, self.views, self.mixup_prob = recipe.tasks[0], recipe.seed, views, mixup_prob
        self._sources = sources
        self._starts = list(itertools.accumulate([len(source.names) for source in sources], initial=0))
        self.images = self._starts[-1]
        turns = 4 if self.task.quarter_turns else 1
        labels, per_turn = _labels(sources, classes, self.task.loss.multi_label)
        self.num_classes = turns * per_turn
        self.labels = np.concatenate(
            [np.where(labels == UNKNOWN, UNKNOWN, labels + turn * per_turn) for turn in range(turns)]
        )
        self._resized: dict[int, np.ndarray] | None = {} if recipe.data.cache else None

    def __len__(self) -> int:
        """Number of views of all samples."""
        return len(self.labels) * self.views

    def load(self, number: int) -> tuple[np.ndarray, int, list[int]]:
        """A view. In place of an image that cannot be read there is the next one that can.

        Returns:
            uint8 [3, H, W], maybe a view, its label, and the positions of images that could not be read.

        Raises:
            UserError: no image can be read.
        """
        pixels_CHW, label, skipped = self._plain(number)
        generator = numpy_generator(self.seed, "mixed view", self.task.name, number)
        chance, weight = generator.random(2).tolist()
        if chance >= self.mixup_prob:
            return pixels_CHW, label, skipped
        other_CHW, _, also_skipped = self._plain(int(generator.integers(len(self))))
        pixels_CHW, _ = mixed(pixels_CHW, other_CHW, Mixing(weight, None))
        return pixels_CHW, UNKNOWN, skipped + also_skipped

    def _plain(self, number: int) -> tuple[np.ndarray, int, list[int]]:
        """A view before it is mixed."""
        turn, image = divmod(number // self.views, self.images)
        skipped: list[int] = []
        for index in [*range(image, self.images), *range(image)]:
            generator = numpy_generator(self.seed, "view", self.task.name, number)
            try:
                pixels_HWC = self._start(index, generator)
            except CorruptImage:
                skipped.append(index)
                continue
            if turn:
                pixels_HWC = np.rot90(pixels_HWC, turn)
            pixels_HWC = augmented(pixels_HWC, self.task.input, self.task.augment, generator)
            return pixels_HWC.transpose(2, 0, 1), int(self.labels[turn * self.images + index]), skipped
        raise UserError(f"none of the {self.images} images to distil on can be read: give others with --data")

    def _start(self, index: int, generator: np.random.Generator) -> np.ndarray:
        """A part of the image, or all of it resized: uint8 [H, W, 3], not to be changed."""
        augment = self.task.augment
        if augment.random_resized_crop:
            data = self._read(index)
            box = crop_box(image_size(data), augment.random_resized_crop, generator.random((4, CROP_ATTEMPTS)))
            return cropped_pixels(data, box, self.task.input, augment.interpolation or "bilinear")
        if self._resized is not None and index in self._resized:
            return self._resized[index]
        pixels_HWC = resized_pixels(self._read(index), augment.resize or self.task.input, augment.interpolation)
        if self._resized is not None:
            self._resized[index] = pixels_HWC
        return pixels_HWC

    def _read(self, index: int) -> bytes:
        number = bisect.bisect_right(self._starts, index) - 1
        return self._sources[number].read(index - self._starts[number])


def _labels(sources: Sequence[Images], classes: Sequence[str], multi_label: bool) -> tuple[np.ndarray, int]:
    """Labels of all images and the number of classes."""
    if multi_label:
        names = [name for source in sources for name in source.labels]
        known = [name is not None and attributes.names_in(name) <= set(classes) for name in names]
        bits = attributes.to_bits([name or "" if is_known else "" for name, is_known in zip(names, known, strict=True)],
                                  classes)  # fmt: skip
        return np.where(known, bits, UNKNOWN), len(classes)
    if classes:
        number = {name: label for label, name in enumerate(classes)}
        found = [number.get(name, UNKNOWN) if name else UNKNOWN for source in sources for name in source.labels]
        return np.array(found, dtype=np.int64), len(classes)
    identities: dict[tuple[int, str], int] = {}
    found = []
    for i, source in enumerate(sources):
        for name in source.labels:
            found.append(UNKNOWN if name is None else identities.setdefault((i, name), len(identities)))
    return np.array(found, dtype=np.int64), len(identities)


class Drawn:
    """Which views make up a step, and in which order: a function of (seed, task, draw).

    With images of known identity of a task that samples them so, P of K images each; else every sample once an epoch.

    Attributes:
        batch_size: samples of a step: what is asked for, or the multiple of K next below it.
    """

    def __init__(self, views: Views, batch_size: int):
        self._views, task = views, views.task
        self.batch_size = batch_size
        self._order: EpochOrder | PKOrder = EpochOrder(len(views.labels), views.seed, task.name)
        each = task.images_per_identity
        if task.identities_per_step:
            each = task.samples_per_step // task.identities_per_step
        identities = len(np.unique(views.labels))
        if each and identities > 1 and (views.labels != UNKNOWN).all():
            self.batch_size = each * min(max(batch_size // each, 2), identities)
            self._order = PKOrder(views.labels, self.batch_size, self.batch_size // each, views.seed, task.name)

    def number(self, draw: int) -> int:
        """The number of the view."""
        generator = numpy_generator(self._views.seed, "which view", self._views.task.name, draw)
        return self._order.index(draw) * self._views.views + int(generator.integers(self._views.views))


class ViewBatch:
    """Some views: their numbers int64 [B], pixels uint8 [B, 3, H, W] and labels int64 [B], and the positions of images
    that could not be read."""

    def __init__(self, views: Views, numbers: Sequence[int]):
        pixels = np.empty((len(numbers), 3, *views.task.input), dtype=np.uint8)
        labels = np.empty(len(numbers), dtype=np.int64)
        self.skipped: list[int] = []
        for row, number in enumerate(numbers):
            pixels[row], labels[row], skipped = views.load(number)
            self.skipped += skipped
        self.numbers = torch.tensor(numbers, dtype=torch.int64)
        self.pixels: Tensor = torch.from_numpy(pixels)
        self.labels: Tensor = torch.from_numpy(labels)

    def pin_memory(self) -> Self:
        """What a loader calls, so that copies to a GPU run beside the computation."""
        self.pixels, self.labels = self.pixels.pin_memory(), self.labels.pin_memory()
        return self


class InOrder(Dataset[ViewBatch]):
    """All views in order, by batch."""

    def __init__(self, views: Views, batch_size: int):
        self.views, self.batch_size = views, batch_size

    def __getitem__(self, i: int) -> ViewBatch:
        first = i * self.batch_size
        return ViewBatch(self.views, range(first, min(first + self.batch_size, len(self.views))))


class Steps(Dataset[ViewBatch]):
    """The part of every step that one of several processes has."""

    def __init__(self, views: Views, drawn: Drawn, process: int, processes: int):
        """
        Raises:
            UserError: the samples of a step cannot be divided.
        """
        if drawn.batch_size % processes:
            raise UserError(
                f"--batch_size: a step of {drawn.batch_size} images cannot be divided by {processes} processes: give "
                "another"
            )
        self.views, self.drawn = views, drawn
        each = drawn.batch_size // processes
        self.positions = range(process * each, (process + 1) * each)

    def __getitem__(self, step: int) -> ViewBatch:
        first = step * self.drawn.batch_size
        return ViewBatch(self.views, [self.drawn.number(first + position) for position in self.positions])
