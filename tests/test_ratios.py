"""Samples per step from a total with shares or a temperature; the table of who reads them."""

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import tiny
from tests.distributed.test_training import train
from tests.test_mixing import linear_task, make_shards, margin_task
from ufo_ds import recipe_file
from ufo_ds.data.ratios import largest_remainder, with_counts
from ufo_ds.data.source import TrainSource
from ufo_ds.errors import UserError
from ufo_ds.parallel.placement import Work, place
from ufo_ds.recipe import Recipe
from ufo_ds.training.run_directory import check_resume
from ufo_ds.training.split_table import split_table

# --- whole numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("total", "weights", "counts"),
    [
        (10, [1, 2, 7], [1, 2, 7]),
        (10, [0.1, 0.2, 0.7], [1, 2, 7]),
        (10, [1, 1, 1], [4, 3, 3]),  # 3.33 each: the first of equals
        (10, [47, 16, 15.8, 12, 6.1, 3.1], [4, 2, 1, 1, 1, 1]),  # two of 1; 8 x (.518, .176, .174, .132): 4 1 1 1
        (5, [1000, 1, 1], [3, 1, 1]),
        (3, [5, 1, 9], [1, 1, 1]),
        (7, [3], [7]),
    ],
)
def test_largest_remainder_by_hand(total: int, weights: list[float], counts: list[int]) -> None:
    assert largest_remainder(total, weights) == counts


@settings(max_examples=60, derandomize=True, deadline=None, database=None)
@given(weights=st.lists(st.integers(1, 50), min_size=1, max_size=4), more=st.integers(0, 12))
def test_largest_remainder_is_the_nearest_split(weights: list[int], more: int) -> None:
    """Of all splits with at least 1 each, none is nearer (by squares) to the exact one, where that has 1 for each."""
    total = len(weights) + more
    counts = largest_remainder(total, weights)
    assert sum(counts) == total
    assert min(counts) >= 1
    for one, other in itertools.combinations(range(len(weights)), 2):
        if weights[one] > weights[other]:
            assert counts[one] >= counts[other]
    exact = [total * weight / sum(weights) for weight in weights]
    if min(exact) >= 1:
        every = (s for s in itertools.product(range(1, total + 1), repeat=len(weights)) if sum(s) == total)
        distance = min(sum((n - x) ** 2 for n, x in zip(split, exact, strict=True)) for split in every)
        assert math.isclose(sum((n - x) ** 2 for n, x in zip(counts, exact, strict=True)), distance, abs_tol=1e-9)


# --- recipes ----------------------------------------------------------------------------------------------------------

FREE = [
    ("tasks.digits.samples_per_step", "0"), ("tasks.glyphs.samples_per_step", "0"),
    ("tasks.glyphs.identities_per_step", "null"), ("tasks.glyphs.images_per_identity", "4"),
]  # fmt: skip
SHARES = [*FREE, ("tasks.digits.share", "1"), ("tasks.glyphs.share", "2.2")]


def demo(*changes: tuple[str, str]) -> Recipe:
    return recipe_file.load("demo", [*FREE, *changes])


def counts_of(recipe: Recipe) -> dict[str, tuple[int, int | None]]:
    return {task.name: (task.samples_per_step, task.identities_per_step) for task in recipe.tasks}


@pytest.mark.parametrize(
    ("changes", "accumulation", "counts"),
    [
        # 40 units of 4: 40 / 3.2 = 12.5 and 27.5; the first of equal remainders.
        ({"share": ("1", "2.2")}, 1, {"digits": (52, None), "glyphs": (108, 27)}),
        # 20 units of 8: 6.25 and 13.75.
        ({"share": ("1", "2.2")}, 2, {"digits": (48, None), "glyphs": (112, 28)}),
        # 1,600 and 100 images: 16 : 1, 4 : 1 and 2 : 1 of 40 units, 37.6 : 2.4, 32 : 8 and 26.7 : 13.3.
        ({"temperature": "1"}, 1, {"digits": (152, None), "glyphs": (8, 2)}),
        ({"temperature": "2"}, 1, {"digits": (128, None), "glyphs": (32, 8)}),
        ({"temperature": "4"}, 1, {"digits": (108, None), "glyphs": (52, 13)}),
        ({"temperature": "1000"}, 1, {"digits": (80, None), "glyphs": (80, 20)}),
    ],
)
def test_counts_by_hand(changes: dict, accumulation: int, counts: dict) -> None:
    given = [("data.samples_per_step", "160")]
    if "share" in changes:
        given += zip(("tasks.digits.share", "tasks.glyphs.share"), changes["share"], strict=True)
    else:
        given += [("data.temperature", changes["temperature"])]
    recipe = with_counts(demo(*given), {"digits": 1600, "glyphs": 100}, accumulation)
    assert counts_of(recipe) == counts
    # Nothing is left of how it was found: the same recipe as with these numbers written out.
    written = [(f"tasks.{name}.samples_per_step", str(n)) for name, (n, _) in counts.items()]
    written += [("tasks.glyphs.identities_per_step", str(counts["glyphs"][1]))]
    assert recipe == recipe_file.load("demo", written)
    assert with_counts(recipe, {}, 3) is recipe


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (FREE, "digits: samples_per_step is missing: add it, or set data.temperature"),
        ([("data.temperature", "2")],
         "data.temperature 2.0 and samples_per_step 128 of glyphs exclude each other: keep one way"),
        ([*SHARES, ("data.temperature", "2"), ("data.samples_per_step", "160")],
         "data.temperature 2.0 and share 2.2 of glyphs exclude each other"),
        ([("tasks.digits.share", "1"), ("tasks.digits.samples_per_step", "0")],
         "share 1.0 of digits and samples_per_step 128 of glyphs exclude each other"),
        ([*FREE, ("tasks.digits.share", "1"), ("data.samples_per_step", "160")], "glyphs: share is missing: add it"),
        (SHARES, "share 2.2 of glyphs needs data.samples_per_step"),
        ([*FREE, ("data.temperature", "1")], "data.temperature 1.0 needs data.samples_per_step"),
        ([("data.samples_per_step", "160")], "data.samples_per_step 160 is a total to be split, but there is"),
        ([*FREE, ("data.samples_per_step", "160"), ("data.temperature", "0.9")], "data.temperature = 0.9"),
        ([("tasks.glyphs.samples_per_step", "0")], "glyphs: identities_per_step 32 goes with samples_per_step"),
        ([("tasks.glyphs.images_per_identity", "4")], "glyphs: images_per_identity 4 goes with a share"),
        ([*SHARES, ("tasks.glyphs.share", "0")], "tasks.glyphs.share = 0"),
        ([*SHARES, ("tasks.glyphs.images_per_identity", "null"), ("tasks.glyphs.loss.triplet", "{}")],
         "glyphs: triplet needs PK sampling: images_per_identity"),
    ],
)  # fmt: skip
def test_other_than_one_way(changes: list[tuple[str, str]], message: str) -> None:
    with pytest.raises(UserError) as caught:
        recipe_file.load("demo", changes)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("total", "message"),
    [
        ("8", r"data.samples_per_step 8 is too small for 2 tasks of at least 12 samples .*: use 24 or more"),
        (
            "100",
            r"data.samples_per_step 100 is not a multiple of 12 \(gradient_accumulation_steps 3 x .* 4\): use 96 or",
        ),
    ],
)
def test_totals_that_do_not_fit(total: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        with_counts(demo(*SHARES, ("data.samples_per_step", total)), {}, 3)


def test_a_run_keeps_the_counts_it_found(tmp_path: Path) -> None:
    """24 and 36 images, 10 units of 2 at T = 4: 4.7 and 5.3. The same command goes on, another temperature does not."""
    recipe, run = tiny.make(tmp_path), tmp_path / "run"
    changes = [
        ("tasks.colours.samples_per_step", "0"), ("tasks.stripes.samples_per_step", "0"),
        ("tasks.stripes.identities_per_step", "null"), ("tasks.stripes.images_per_identity", "2"),
        ("tasks.colours.benchmarks", "[]"), ("tasks.stripes.benchmarks", "[]"), ("evaluation.best", "null"),
        ("data.samples_per_step", "20"),
    ]  # fmt: skip
    more = [word for key, value in [*changes, ("data.temperature", "4")] for word in (f"--{key}", value)]
    output = train(1, recipe, run, *more, "--schedule.steps", "1")
    table = [line.split() for line in output.splitlines() if line.startswith("  ")]
    assert ["colours", "24", "3", "1", "10", "2.4", "rank", "0:", "10"] in table
    assert ["stripes", "36", "6", "1", "5", "x", "2", "1.0", "rank", "0:", "10"] in table
    assert counts_of(recipe_file.load(str(run / "recipe.yaml"))) == {"colours": (10, None), "stripes": (10, 5)}
    assert "going on from step 1" in train(1, recipe, run, *more, "--schedule.steps", "2")
    other = recipe_file.load(str(recipe), [*changes, ("data.temperature", "1")])
    with pytest.raises(UserError, match=r"another recipe: tasks.colours.samples_per_step was 10, is 8: "):
        check_resume(run, with_counts(other, {"colours": 24, "stripes": 36}, 1), run / "checkpoints/step-00000002", {})


# --- table ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TrainSource]:
    """15 images in 3 shards; 12 images of 4 identities in 4 shards, two sets; shards hold 5 at most."""
    root = tmp_path_factory.mktemp("sets")
    glyphs = make_shards(root / "glyphs", {"a": 4, "b": 5, "c": 6})
    people = [make_shards(root / name, {"p1": 3, "p2": 3}) for name in ("one", "two")]
    return {
        "glyphs": TrainSource.open(linear_task("glyphs", glyphs, samples_per_step=6), seed=0),
        "person": TrainSource.open(margin_task("person", *people), seed=0),
    }


def table(sources: dict[str, TrainSource], ranks: int, ep: int, exchange: str, gas: int, workers: int) -> list[str]:
    samples = {name: source.task.samples_per_step // gas for name, source in sources.items()}
    placement = place({name: Work(count, 1) for name, count in samples.items()}, ranks, ep)
    read: Callable = placement.owned if exchange == "aligned" else placement.read_evenly
    return split_table(sources, placement, [read(rank, samples) for rank in range(ranks)], gas, workers)


def test_tables(sources: dict[str, TrainSource]) -> None:
    assert table(sources, 2, 2, "aligned", 2, 1) == [
        "task    images  classes  shards  samples a step  steps an epoch  read by",
        "glyphs      15        3       3               6             2.5  rank 0: 6",
        "person      12        4       4           4 x 3             1.0  rank 1: 12",
        "1 loader process a rank",
    ]
    assert table(sources, 4, 2, "input", 1, 4) == [
        "task    images  classes  shards  samples a step  steps an epoch  read by                 trained on",
        "glyphs      15        3       3               6             2.5  ranks 0-3: 1 to 2 each  ranks 0, 1",
        "person      12        4       4           4 x 3             1.0  ranks 0-3: 3 each       ranks 2, 3",
        "4 loader processes a rank take its micro-batches in turn, from any shard, also where shards are fewer "
        "(glyphs: 3)",
    ]
    lines = table(sources, 16, 2, "aligned", 1, 0)
    assert lines[1].endswith("  ranks 0-5: 1 each")  # 6 samples for the 8 ranks with the task
    assert lines[2].endswith("  ranks 8-15: 1 to 2 each")
    assert lines[-1] == "images are loaded between steps (data.workers 0)"
    lines = table(sources, 16, 1, "aligned", 1, 0)
    assert lines[1].endswith("  6 ranks of 0-15: 1 each")  # 12 to 15, then 0 and 1
    assert lines[2].endswith("  ranks 0-11: 1 each")
