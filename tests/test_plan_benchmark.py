"""The published layout as ``benchmarks/plan.py`` counts it."""

import pytest

from benchmarks.plan import GPUS_PER_NODE, Published, published_ranks, recipes


@pytest.fixture(scope="module")
def published() -> Published:
    recipe = recipes()["24 tasks, FFN"]
    return Published(recipe, {task.name: task.num_classes or 0 for task in recipe.tasks})


def test_ranks_of_tasks_are_the_published_ones(published):
    ranks = published_ranks(published.samples, 48)
    numbers = {name: len(of_task) for name, of_task in ranks.items()}
    several = {"face": 8, "imagenet": 8, "person": 4, "vehicle": 4, "products": 4, "cifar10": 2}
    assert {name: number for name, number in numbers.items() if number > 1} == several
    assert sorted(rank for of_task in ranks.values() for rank in of_task) == list(range(48))
    for name in ("face", "imagenet"):  # on a node of their own
        assert len({rank // GPUS_PER_NODE for rank in ranks[name]}) == 1


def test_every_image_travels_to_its_task_and_back(published):
    """Summed over ranks: each image goes to one of its task's ranks and back, forward and backward, but for those that
    are read where they belong; and what rings send."""
    ranks = published_ranks(published.samples, 64)
    total = sum(sum(published._traffic(rank, ranks, 64)) for rank in range(64))
    image = 32 * 325 * 1280 * 2  # layers, tokens, width, bf16
    moved = sum(n * (1 - 1 / 64) for n in published.samples.values()) * 2 * 2 * image
    reduced = 2 * 63 * 2 * (published.everywhere - published.unused)
    reduced += sum(2 * (len(of_task) - 1) * 2 * published.own[name] for name, of_task in ranks.items())
    assert total == pytest.approx(moved + reduced, rel=1e-9)


def test_parameters_of_all_ranks_are_the_model(published):
    # ViT-H: 630.9 M on a path, of which 419.6 M are FFNs; shared, and an FFN for each task.
    assert published.own["face"] == pytest.approx(419.6e6, rel=1e-3)
    assert published.unused == pytest.approx(419.6e6 + 1.2e6, rel=1e-3)
    embeddings = 24 * (3 * 14 * 14 + 1 + 1 + 325) * 1280
    heads = sum((n + 1) * 1280 for n in published.num_classes.values())
    assert published.everywhere == pytest.approx(630.9e6 + embeddings + heads, rel=1e-3)
