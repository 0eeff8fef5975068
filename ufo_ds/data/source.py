"""The training data of one task: its shard sets joined, its sample order, and the replacement of unreadable images."""

import bisect
import itertools
from collections.abc import Iterator

import numpy as np

from ufo_ds.data import attributes
from ufo_ds.data.augmentation import CROP_ATTEMPTS, augmented, crop_box
from ufo_ds.data.mixup import draw_mixing, mixed
from ufo_ds.data.ratios import with_counts
from ufo_ds.data.sampling import EpochOrder, PKOrder, WindowOrder
from ufo_ds.data.shards import DEFAULT_CACHE, ShardSet
from ufo_ds.data.transforms import CorruptImage, cropped_pixels, evaluation_transform, image_size, resized_pixels
from ufo_ds.errors import UserError
from ufo_ds.recipe import Recipe, ShardCache
from ufo_ds.recipe_task import Task
from ufo_ds.seeding import numpy_generator


class TrainSource:
    """Samples of a task by draw index. With ``quarter_turns`` each image is four samples, turned 0 to 3 times
    counter-clockwise, and each class four, those of one turn after another.

    Args:
        cache: keep every image, once decoded and resized, in this process.
        shuffle_shards: without PK sampling, the samples of so many shards are mixed; None: of all.

    Attributes:
        task: of the recipe.
        classes: label names, or of a multi-label task the attributes. A linear head joins those of its sets by name;
            for a margin head the identities of each set stay apart, so a name may come twice. Those of turned images
            end in "turned 90" and so on.
        num_classes: outputs of the head, at least ``len(classes)``.
        labels: int64 [N], of the images as they are, over all sets; see :meth:`name_of`.
        licences: of the sets, each once.
        shards: number of shards of all sets.
    """

    def __init__(
        self, task: Task, seed: int, sets: list[ShardSet], cache: bool = False, shuffle_shards: int | None = None
    ):
        self.task, self.seed = task, seed
        if task.loss.multi_label:
            names, labels = _join_attributes(task, sets)
        else:
            names, labels = _join_labels(task, sets)
            _check_range(task, task.num_classes or len(names), names, sets, labels)
        turns = 4 if task.quarter_turns else 1
        self._classes_per_turn = len(names)
        self.num_classes = turns * (task.num_classes or len(names))
        self.classes = names + [f"{name} turned {90 * turn}" for turn in range(1, turns) for name in names]
        self.labels = np.concatenate(labels)
        self.licences = list(dict.fromkeys(shards.licence for shards in sets))
        self._sets = sets
        self._starts = list(itertools.accumulate([len(shards) for shards in sets], initial=0))
        self._by_label = np.argsort(self.labels, kind="stable")
        self._cache: dict[int, np.ndarray] | None = {} if cache else None
        sizes = [size for shards in sets for size in shards.shard_sizes]
        self.shards = len(sizes)
        self._order: EpochOrder | WindowOrder | PKOrder  # over turn x image, the images of one turn after another
        if task.identities_per_step:
            turned = np.concatenate([self.labels + turn * len(names) for turn in range(turns)])
            self._order = PKOrder(turned, task.samples_per_step, task.identities_per_step, seed, task.name)
        elif shuffle_shards is not None:  # a shard is one for each turn of its images
            self._order = WindowOrder(sizes * turns, shuffle_shards, seed, task.name)
        else:
            self._order = EpochOrder(turns * len(self.labels), seed, task.name)

    @classmethod
    def open(cls, task: Task, seed: int, cache: bool = False, shard_cache: ShardCache = DEFAULT_CACHE) -> "TrainSource":
        """Open the shards of ``task.train``.

        Raises:
            UserError: no train set, shards that cannot be opened, a label beyond ``num_classes``, too few identities,
                no attributes or too many.
        """
        return cls(task, seed, open_sets(task, shard_cache), cache)

    def __len__(self) -> int:
        """Number of images."""
        return len(self.labels)

    @property
    def head_classes(self) -> list[str]:
        """Names behind the head's rows; those beyond the data's classes are numbered."""
        return [*self.classes, *(f"unused {i}" for i in range(len(self.classes), self.num_classes))]

    def name_of(self, label: int) -> str:
        """Of a label as :meth:`load` gives it: the class, or of a multi-label task its attributes joined."""
        if not self.task.loss.multi_label:
            return self.classes[label]
        return attributes.joined(name for i, name in enumerate(self.classes) if label >> i & 1)

    @property
    def steps_per_epoch(self) -> float:
        """Steps of the task in which every sample comes once; with PK sampling every identity but a remainder."""
        return self._order.size / self.task.samples_per_step

    def index(self, draw: int) -> int:
        """The sample of a draw, ``turns * len(self) + image``; draws count from the start, over all ranks."""
        return self._order.index(draw)

    def load(self, draw: int) -> tuple[np.ndarray, int, list[int]]:
        """Read, turn and augment the image of a draw; :meth:`load_mixed` mixes it with another one.

        An unreadable image is replaced by the next readable one of its label, or of any label if it has none.

        Returns:
            uint8 [3, H, W], maybe a view, its label, and the indices of the images that could not be read.

        Raises:
            UserError: no image of the task can be read.
        """
        return self._sample(self.index(draw), numpy_generator(self.seed, "augment", self.task.name, draw))

    def load_mixed(self, draw: int) -> tuple[np.ndarray, int, int, float, list[int]]:
        """:meth:`load`, and where a draw is to be mixed, with any other image of the task, read for this alone.

        Returns:
            uint8 [3, H, W], maybe a view, its label, the label of the other image, the weight of the first, and the
            indices of the images that could not be read. Without another image it is the same label twice.

        Raises:
            UserError: no image of the task can be read.
        """
        pixels_CHW, label, skipped = self.load(draw)
        generator = numpy_generator(self.seed, "mix", self.task.name, draw)
        mixing = draw_mixing(self.task.augment, generator)
        if mixing is None:
            return pixels_CHW, label, label, 1.0, skipped
        other = int(generator.integers(len(self)))
        other_CHW, other_label, more = self._sample(other, numpy_generator(self.seed, "partner", self.task.name, draw))
        mixed_CHW, weight = mixed(pixels_CHW, other_CHW, mixing)
        return mixed_CHW, label, other_label, weight, skipped + more

    def _sample(self, sample: int, generator: np.random.Generator) -> tuple[np.ndarray, int, list[int]]:
        """For :meth:`load`."""
        augment = self.task.augment
        u_4A = generator.random((4, CROP_ATTEMPTS)) if augment.random_resized_crop else None
        skipped: list[int] = []
        turn, image = divmod(sample, len(self))
        for index in self._candidates(image):
            try:
                pixels_HWC = self._resized(index) if u_4A is None else self._cropped(index, u_4A)
            except CorruptImage:
                skipped.append(index)
                continue
            if turn:
                pixels_HWC = np.rot90(pixels_HWC, turn)
            pixels_HWC = augmented(pixels_HWC, self.task.input, augment, generator)
            label = int(self.labels[index]) + turn * self._classes_per_turn
            return pixels_HWC.transpose(2, 0, 1), label, skipped
        raise UserError(f"task {self.task.name}: none of its {len(self)} images can be read: make its shards again")

    def pixels(self, index: int) -> np.ndarray:
        """A sample as evaluation sees it, uint8 [3, H, W]."""
        return evaluation_transform(self._read(index), self.task.input)

    def _resized(self, index: int) -> np.ndarray:
        """A training image before all that is random, uint8 [H, W, 3], not to be changed."""
        if self._cache is not None and index in self._cache:
            return self._cache[index]
        augment = self.task.augment
        pixels_HWC = resized_pixels(self._read(index), augment.resize or self.task.input, augment.interpolation)
        if self._cache is not None:
            self._cache[index] = pixels_HWC
        return pixels_HWC

    def _cropped(self, index: int, u_4A: np.ndarray) -> np.ndarray:
        """A random part of a training image, uint8 [H, W, 3]."""
        data, augment = self._read(index), self.task.augment
        assert augment.random_resized_crop is not None
        box = crop_box(image_size(data), augment.random_resized_crop, u_4A)
        return cropped_pixels(data, box, self.task.input, augment.interpolation or "bilinear")

    def _read(self, index: int) -> bytes:
        number = bisect.bisect_right(self._starts, index) - 1
        return self._sets[number].read(index - self._starts[number])

    def _candidates(self, index: int) -> Iterator[int]:
        """The image, then the others of its label, then all of other labels, each time cyclically from it on."""
        yield index
        label = self.labels[index]
        start, stop = (np.searchsorted(self.labels, label, side, self._by_label) for side in ("left", "right"))
        same = self._by_label[start:stop]  # ascending, as the sort is stable
        later = np.searchsorted(same, index) + 1
        yield from np.roll(same, -later)[:-1].tolist()
        for other in range(index + 1, index + len(self)):
            if self.labels[other % len(self)] != label:
                yield other % len(self)


def open_sources(recipe: Recipe, accumulation: int) -> tuple[Recipe, dict[str, TrainSource]]:
    """Open the training data of all tasks.

    Args:
        accumulation: micro-batches per step.

    Returns:
        The recipe with ``samples_per_step`` for every task, and the sources by task.

    Raises:
        UserError: shards that cannot be opened, or that do not go with the recipe.
    """
    data = recipe.data
    sets = {task.name: open_sets(task, data.shard_cache) for task in recipe.tasks}
    recipe = with_counts(recipe, {name: sum(map(len, own)) for name, own in sets.items()}, accumulation)
    sources = {
        task.name: TrainSource(task, recipe.seed, sets[task.name], data.cache, data.shuffle_shards)
        for task in recipe.tasks
    }
    return recipe, sources


def open_sets(task: Task, cache: ShardCache = DEFAULT_CACHE) -> list[ShardSet]:
    """Open the shards of ``task.train``.

    Raises:
        UserError: no train set, shards that cannot be opened.
    """
    if not task.train:
        raise UserError(f"task {task.name} has no train set: list shards under tasks.{task.name}.train")
    return [ShardSet.open(entry.shards, cache) for entry in task.train]


def _join_labels(task: Task, sets: list[ShardSet]) -> tuple[list[str], list[np.ndarray]]:
    """Class names of the task, and each set's labels as positions among them."""
    if task.head.type == "margin":
        offsets = np.cumsum([0] + [len(shards.classes) for shards in sets])
        classes = [name for shards in sets for name in shards.classes]
        return classes, [shards.labels + offset for shards, offset in zip(sets, offsets[:-1], strict=True)]
    classes = sorted({name for shards in sets for name in shards.classes})
    position = {name: label for label, name in enumerate(classes)}
    return classes, [np.array([position[name] for name in shards.classes])[shards.labels] for shards in sets]


def _join_attributes(task: Task, sets: list[ShardSet]) -> tuple[list[str], list[np.ndarray]]:
    """The attributes of the task, sorted, and each set's labels as bits."""
    names = sorted({name for shards in sets for label in shards.classes for name in attributes.names_in(label)})
    where = f"task {task.name}: {', '.join(shards.name for shards in sets)}"
    if not 0 < len(names) <= attributes.MOST:
        raise UserError(
            f"{where}: {len(names)} attributes in labels such as {sets[0].classes[0]!r}: a label is 1 to "
            f"{attributes.MOST} attributes joined by '+'"
        )
    if task.num_classes not in (None, len(names)):  # an output without images would flatter the metrics
        raise UserError(f"{where}: {len(names)} attributes, but num_classes is {task.num_classes}: leave it out")
    return names, [attributes.to_bits(shards.classes, names)[shards.labels] for shards in sets]


def _check_range(
    task: Task, num_classes: int, classes: list[str], sets: list[ShardSet], labels: list[np.ndarray]
) -> None:
    for shards, of_set in zip(sets, labels, strict=True):
        largest = int(of_set.max())
        if largest >= num_classes:
            raise UserError(
                f"task {task.name}: label out of range: {largest} ({classes[largest]!r}) in {shards.name}, but "
                f"num_classes is {num_classes}: raise it to {len(classes)} or leave it out"
            )
