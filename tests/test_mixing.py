"""Batches of several tasks: the same global batches from any split, any number of workers, any start."""

import dataclasses
import itertools
import multiprocessing
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ufo_ds.data.layouts import Layout, Sample
from ufo_ds.data.mixing import Batch, Batches, Positions, in_turn, loader
from ufo_ds.data.shard_writer import write
from ufo_ds.data.source import TrainSource
from ufo_ds.data.transforms import evaluation_transform
from ufo_ds.errors import UserError
from ufo_ds.recipe_task import Augment, CosFace, CrossEntropy, Head, Loss, Task, TrainSet

ACCUMULATION = 2


def make_shards(directory: Path, counts: dict[str, int], seed: int = 0) -> str:
    """Shards of random PNGs, ``counts[name]`` of each class; every image is another one."""
    generator = np.random.default_rng(seed)
    samples = []
    for name, count in counts.items():
        for n in range(count):
            path = directory / "images" / f"{name}_{n}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(generator.integers(0, 256, (11, 9, 3), dtype=np.uint8)).save(path)
            samples.append(Sample(path, name))
    write(Layout(samples), directory / "shards", source="test", shard_size=5)
    return str(directory / "shards")


def linear_task(name: str, *shards: str, samples_per_step: int = 8, num_classes: int | None = None) -> Task:
    return Task(
        name=name,
        head=Head(type="linear"),
        loss=Loss(cross_entropy=CrossEntropy()),
        input=(8, 8),
        samples_per_step=samples_per_step,
        num_classes=num_classes,
        train=[TrainSet(shards=directory) for directory in shards],
        augment=Augment(pad=1, flip=True),
    )


def margin_task(name: str, *shards: str, samples_per_step: int = 12, identities_per_step: int = 4) -> Task:
    return Task(
        name=name,
        head=Head(type="margin"),
        loss=Loss(cosface=CosFace()),
        input=(12, 6),
        samples_per_step=samples_per_step,
        identities_per_step=identities_per_step,
        train=[TrainSet(shards=directory) for directory in shards],
        augment=Augment(pad=1, flip=True, erasing=0.5),
    )


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TrainSource]:
    """``glyphs``: 3 classes, 15 images; ``person``: 4 + 3 identities of 2 to 5 images in two sets."""
    root = tmp_path_factory.mktemp("sets")
    glyphs = make_shards(root / "glyphs", {"a": 4, "b": 5, "c": 6})
    market = make_shards(root / "market", {"p1": 2, "p2": 3, "p3": 4, "p4": 5}, seed=1)
    msmt = make_shards(root / "msmt", {"p1": 4, "p2": 4, "p9": 3}, seed=2)
    return {
        "glyphs": TrainSource.open(linear_task("glyphs", glyphs), seed=3),
        "person": TrainSource.open(margin_task("person", market, msmt), seed=3),
    }


def whole(sources: dict[str, TrainSource]) -> Batches:
    return Batches(sources, reading(glyphs=range(4), person=range(6)), ACCUMULATION)


def reading(**share: range) -> Positions:
    """What a rank reads of each task that a step holds."""
    return partial(_reading, share)


def _reading(share: dict[str, range], counts: dict[str, int]) -> dict[str, range]:
    return {name: positions if counts[name] else range(0) for name, positions in share.items()}


def content(batch: Batch) -> dict[str, tuple[bytes, list[int], range, int]]:
    return {
        name: (part.images.numpy().tobytes(), part.labels.tolist(), part.positions, part.global_count)
        for name, part in batch.tasks.items()
    }


def test_batch_is_made_of_the_drawn_samples(sources: dict[str, TrainSource]) -> None:
    """Written out: micro-batch i of a task with n samples in it holds the draws i n .. i n + n - 1."""
    dataset = whole(sources)
    for i in range(9):
        batch = dataset[i]
        assert (batch.step, batch.micro_step) == (i // 2, i % 2)
        assert batch.skipped == {"glyphs": [], "person": []}
        for name, count, shape in (("glyphs", 4, (3, 8, 8)), ("person", 6, (3, 12, 6))):
            part = batch.tasks[name]
            assert part.global_count == len(part.images) == count
            assert part.images.dtype == torch.uint8
            assert part.labels.dtype == torch.int64
            assert part.positions == range(count)
            for position in range(count):
                pixels, label, _ = sources[name].load(i * count + position)
                assert part.images[position].shape == shape
                assert part.images[position].numpy().tobytes() == pixels.tobytes()
                assert part.labels[position] == label == sources[name].labels[sources[name].index(i * count + position)]


@pytest.mark.parametrize("cuts", [(0, 0), (1, 3), (2, 2), (4, 4), (0, 4)])
def test_any_split_over_ranks_is_the_whole_batch(sources: dict[str, TrainSource], cuts: tuple[int, int]) -> None:
    ranks = []
    for start, stop in itertools.pairwise((0, *cuts, 4)):
        share = {"glyphs": range(start, stop), "person": range(start + start // 2, stop + stop // 2)}
        ranks.append(Batches(sources, reading(**share), ACCUMULATION))
    for i in range(5):
        expected, parts = whole(sources)[i], [rank[i] for rank in ranks]
        for name, task in expected.tasks.items():
            for field in ("images", "labels"):
                joined = torch.cat([getattr(part.tasks[name], field) for part in parts])
                assert torch.equal(joined, getattr(task, field))
            assert [n for part in parts for n in part.tasks[name].positions] == list(task.positions)
            assert {part.tasks[name].global_count for part in parts} == {task.global_count}


def test_a_task_that_a_rank_does_not_read_is_there_and_empty(sources: dict[str, TrainSource]) -> None:
    batch = Batches(sources, reading(glyphs=range(0), person=range(6)), ACCUMULATION)[0]
    part = batch.tasks["glyphs"]
    assert (part.images.shape, part.labels.shape, len(part.positions)) == ((0, 3, 8, 8), (0,), 0)
    assert part.images.dtype == torch.uint8
    assert part.global_count == 4


def test_workers_and_start_change_nothing(sources: dict[str, TrainSource]) -> None:
    dataset = whole(sources)
    expected = [content(dataset[i]) for i in range(10)]
    before = torch.get_rng_state()
    for workers in (0, 1, 2):
        batches = list(loader(dataset, 0, 10, workers, pin=False))
        assert [content(batch) for batch in batches] == expected
        assert [2 * batch.step + batch.micro_step for batch in batches] == list(range(10))
    for start in (1, 7, 10):
        assert [content(batch) for batch in loader(dataset, start, 10, 1, pin=False)] == expected[start:]
    assert torch.equal(before, torch.get_rng_state()), "the loader moved the global generator"


def test_sources_reach_spawned_processes(sources: dict[str, TrainSource]) -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        (batch,) = pool.map(whole(sources).__getitem__, [3])
    assert content(batch) == content(whole(sources)[3])


def test_accumulation_does_not_change_the_step(sources: dict[str, TrainSource]) -> None:
    once = Batches(sources, reading(glyphs=range(8), person=range(12)), 1)
    for step in range(4):
        parts = [whole(sources)[ACCUMULATION * step + micro_step] for micro_step in range(ACCUMULATION)]
        for name, task in once[step].tasks.items():
            assert torch.equal(torch.cat([part.tasks[name].images for part in parts]), task.images)
            assert torch.equal(torch.cat([part.tasks[name].labels for part in parts]), task.labels)


@pytest.mark.parametrize("cut", [0, 1, 4])
def test_isomorphic_steps_are_those_of_one_task_in_turn(sources: dict[str, TrainSource], cut: int) -> None:
    """Steps 0, 2, 4 are the steps 0, 1, 2 of the first task, steps 1, 3, 5 those of the second; over two ranks."""
    shares = [
        {"glyphs": range(cut), "person": range(cut, 6)},
        {"person": range(cut), "glyphs": range(cut, 4)},  # in another order
    ]
    ranks = [Batches(sources, reading(**share), ACCUMULATION, partial(in_turn, list(sources))) for share in shares]
    assert list(sources) == ["glyphs", "person"]
    for i, (own_i, trained, absent) in enumerate([
        (0, "glyphs", "person"), (1, "glyphs", "person"), (0, "person", "glyphs"), (1, "person", "glyphs"),
        (2, "glyphs", "person"), (3, "glyphs", "person"), (2, "person", "glyphs"), (3, "person", "glyphs"),
    ]):  # fmt: skip
        parts, expected = [rank[i] for rank in ranks], whole(sources)[own_i].tasks[trained]
        for part, share in zip(parts, shares, strict=True):
            assert (part.step, part.micro_step) == (i // 2, i % 2)
            rows = share[trained]
            found = part.tasks[trained]
            assert torch.equal(found.images, expected.images[rows.start : rows.stop])
            assert torch.equal(found.labels, expected.labels[rows.start : rows.stop])
            assert (found.positions, found.global_count) == (rows, expected.global_count)
            other = part.tasks[absent]
            assert other.images.shape == (0, 3, *sources[absent].task.input)
            assert (len(other.labels), other.positions, other.global_count) == (0, range(0), 0)


def test_isomorphic_batches_from_any_worker_and_start(sources: dict[str, TrainSource]) -> None:
    dataset = Batches(sources, whole(sources).positions, ACCUMULATION, partial(in_turn, list(sources)))
    expected = [content(dataset[i]) for i in range(9)]
    for workers, start in ((0, 3), (2, 0), (1, 5)):
        assert [content(batch) for batch in loader(dataset, start, 9, workers, pin=False)] == expected[start:]


def test_every_sample_once_per_epoch(sources: dict[str, TrainSource]) -> None:
    source = sources["glyphs"]
    for epoch in range(3):
        assert sorted(source.index(epoch * 15 + n) for n in range(15)) == list(range(15))


def test_identities_of_several_sets_stay_apart(sources: dict[str, TrainSource]) -> None:
    person = sources["person"]
    assert person.classes == ["p1", "p2", "p3", "p4", "p1", "p2", "p9"]
    assert person.num_classes == 7
    assert np.bincount(person.labels).tolist() == [2, 3, 4, 5, 4, 4, 3]
    for i in range(12):
        labels = whole(sources)[i].tasks["person"].labels.reshape(2, 3)  # P / accumulation identities of K images
        assert (labels == labels[:, :1]).all()
        assert labels[0, 0] != labels[1, 0]


def test_classes_of_several_sets_are_joined_by_name(tmp_path: Path) -> None:
    first = make_shards(tmp_path / "1", {"bus": 2, "dog": 3})
    second = make_shards(tmp_path / "2", {"ant": 1, "dog": 2})
    source = TrainSource.open(linear_task("things", first, second, num_classes=9), seed=0)
    assert source.classes == ["ant", "bus", "dog"]
    assert source.num_classes == 9
    assert source.labels.tolist() == [1, 1, 2, 2, 2, 0, 2, 2]
    with pytest.raises(UserError, match=r"things: label out of range: 2 \('dog'\) in .*1/shards, but num_classes is 2"):
        TrainSource.open(linear_task("things", first, second, num_classes=2), seed=0)


def break_image(shards: str, file: Path) -> None:
    """Overwrite an image inside its shard, where the size stays as it was."""
    data = file.read_bytes()
    for shard in Path(shards).glob("*.tar"):
        shard.write_bytes(shard.read_bytes().replace(data, bytes(len(data))))


def test_unreadable_images_are_replaced_and_reported(tmp_path: Path) -> None:
    shards = make_shards(tmp_path, {"a": 3, "b": 2, "c": 2})  # samples a: 0 1 2, b: 3 4, c: 5 6
    files = [tmp_path / "images" / f"{name}.png" for name in ("a_0", "a_1", "a_2", "b_0", "b_1", "c_0", "c_1")]
    task = dataclasses.replace(linear_task("things", shards, samples_per_step=7), augment=Augment())
    for broken in (1, 3, 4):
        break_image(shards, files[broken])
    source = TrainSource.open(task, seed=0)
    # The next of the label, cyclically; b has none left, so it takes the next sample.
    replaced = {0: (0, []), 1: (2, [1]), 2: (2, []), 3: (5, [3, 4]), 4: (5, [4, 3]), 5: (5, []), 6: (6, [])}
    for draw in range(21):
        index = source.index(draw)
        used, skipped = replaced[index]
        pixels, label, reported = source.load(draw)
        np.testing.assert_array_equal(pixels, evaluation_transform(files[used].read_bytes(), (8, 8)))
        assert source.classes[label] == files[used].name[0]
        assert reported == skipped
    batches = list(loader(Batches({"things": source}, reading(things=range(7)), 1), 0, 3, 2, pin=False))
    assert [sorted(batch.skipped["things"]) for batch in batches] == [[1, 3, 3, 4, 4]] * 3
    for file in files:
        break_image(shards, file)
    with pytest.raises(UserError, match="none of its 7 images can be read"):
        source.load(0)


def test_a_shard_cut_short_while_training_is_an_unreadable_image(tmp_path: Path) -> None:
    shards = make_shards(tmp_path, {"a": 2})
    source = TrainSource.open(linear_task("things", shards), seed=0)
    shard = Path(shards) / "shard-000000.tar"
    last = (tmp_path / "images" / "a_1.png").read_bytes()
    with shard.open("r+b") as file:
        file.truncate(shard.read_bytes().index(last) + 10)
    assert sorted(skipped for _, _, skipped in (source.load(0), source.load(1))) == [[], [1]]


def test_to_and_pin_keep_the_content(sources: dict[str, TrainSource]) -> None:
    batch = whole(sources)[3]
    assert content(batch.to("cpu")) == content(batch)
    moved = batch.to("meta")
    assert {part.images.device.type for part in moved.tasks.values()} == {"meta"}
    assert (moved.step, moved.micro_step, moved.skipped) == (1, 1, {"glyphs": [], "person": []})
    if torch.cuda.is_available():
        (pinned,) = loader(whole(sources), 3, 4, 1, pin=True)
        assert content(pinned) == content(batch)
        assert all(part.images.is_pinned() for part in pinned.tasks.values())


def test_pixels_are_those_of_the_file(tmp_path: Path) -> None:
    """From file to batch with no transform but the resize to the size it has: the very pixels."""
    shards = make_shards(tmp_path, {"a": 3})
    task = linear_task("things", shards, samples_per_step=3)
    source = TrainSource.open(dataclasses.replace(task, augment=Augment(), input=(11, 9)), seed=0)
    part = Batches({"things": source}, reading(things=range(3)), 1)[0].tasks["things"]
    for n in range(3):
        file = tmp_path / "images" / f"a_{source.index(n)}.png"
        pixels = np.asarray(Image.open(file))
        np.testing.assert_array_equal(part.images[n].permute(1, 2, 0).numpy(), pixels)


def test_wrong_tasks(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"task glyphs has no train set"):
        TrainSource.open(linear_task("glyphs"), seed=0)
    with pytest.raises(UserError, match=r"nowhere.*ufo shards"):
        TrainSource.open(linear_task("glyphs", str(tmp_path / "nowhere")), seed=0)
    shards = make_shards(tmp_path, {"a": 2, "b": 2})
    with pytest.raises(UserError, match="task person: too few ids: 2 in its shards, but identities_per_step is 4"):
        TrainSource.open(margin_task("person", shards), seed=0)
