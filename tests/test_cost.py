"""Parameters and FLOPs by formula, against the modules built on the meta device and torch's own count."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.small_run import CLASSES, make_recipe
from ufo_ds import recipe_file
from ufo_ds.model.architecture import Architecture, SearchSpace
from ufo_ds.model.cost import (
    NOTHING,
    block_cost,
    head_cost,
    joint_cost,
    path_cost,
    subnet_cost,
    supernet_parameters,
)
from ufo_ds.model.dense import network, vit_weights
from ufo_ds.model.spec import UNITS, SubnetSpec
from ufo_ds.model.supernet import Supernet
from ufo_ds.recipe_model import Backbone, Elastic, Model


@pytest.mark.parametrize("name", ["demo", "open_small", "allinone_vit_l", "ufo2_17b"])
def test_as_built(name, monkeypatch):
    """Of the shipped recipes the dense model of every input size, all copies and all heads."""
    monkeypatch.setenv("OPEN_SMALL", "nowhere")
    recipe = recipe_file.load(name)
    backbone = recipe.model.backbone
    for task in {task.input: task for task in recipe.tasks}.values():
        with torch.device("meta"):
            path = network(recipe, task.name, Architecture.of(backbone))
            path.pooler = None
            image = torch.empty(1, 3, *task.input)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            path(image)
        cost = path_cost(backbone, Architecture.of(backbone), task.input)
        assert cost.parameters == sum(parameter.numel() for parameter in path.parameters())
        assert cost.flops == counter.get_total_flops()
    with torch.device("meta"):
        supernet = Supernet(recipe, {task.name: 7 for task in recipe.tasks})
    parts = {name: p.numel() for name, p in supernet.named_parameters()}
    of_copies = sum(count for name, count in parts.items() if name.split(".")[0] not in ("heads", "router"))
    assert supernet_parameters(recipe) == of_copies
    for task in recipe.tasks:
        head = sum(count for name, count in parts.items() if name.startswith(f"heads.{task.name}."))
        assert head_cost(task, backbone.dim, 7).parameters == head
        assert head_cost(task, backbone.dim, 7).flops == 2 * 7 * backbone.dim


NUMBERS = {task: len(names) for task, names in CLASSES.items()}
ELASTIC = {"depth": [3, 2, 1], "dim": [24, 40, 48], "heads": [1, 2, 4], "mlp_ratio": [0.5, 1.3, 3.0]}


def elastic_recipe(inputs=((16, 24), (16, 24)), stem=(), **backbone):
    """Heads of 10 channels, so that no number of them is as wide as the tokens."""
    backbone = {"dim": 48, "depth": 3, "heads": 4, "head_dim": 10, "mlp_ratio": 3.0, "patch_size": 8, **backbone}
    elastic = Elastic(**ELASTIC, stem=[0.5, 0.75, 1.0] if stem else [])
    model = Model(backbone=Backbone(**backbone, stem=list(stem)), experts=list(UNITS), elastic=elastic)
    recipe = make_recipe(inputs)
    tasks = [dataclasses.replace(task, routes={}) for task in recipe.tasks]
    return dataclasses.replace(recipe, model=model, tasks=tasks)


def random_spec(recipe, task, *key):
    architecture = SearchSpace.of(recipe.model).draw(task, *key)
    draw = np.random.default_rng([*key])
    counts = {"embed": 1, "norm": architecture.depth + 1, "attn": architecture.depth, "ffn": architecture.depth}
    routes = {unit: tuple(draw.choice(["shared", "own"], counts[unit]).tolist()) for unit in UNITS}
    return SubnetSpec(task, routes, architecture)


def entries(recipe, spec):
    """By parameter of the supernet, for each axis the indices that a path reads, as the dense model is filled."""
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in Supernet(recipe, NUMBERS).state_dict().items()}
    numbered, found = {}, {}

    def read(name):
        if name.startswith("heads."):
            return torch.ones(shapes[name])
        first = sum(map(math.prod, (shapes[of_one] for of_one in numbered)))
        numbered[name] = first
        return torch.arange(first, first + math.prod(shapes[name]), dtype=torch.float64).view(shapes[name])

    taken = [value.flatten() for name, value in vit_weights(recipe, spec, read) if not name.startswith("pooler.")]
    taken = torch.cat(taken).long().numpy()
    for name, first in numbered.items():
        of_one = taken[(taken >= first) & (taken < first + math.prod(shapes[name]))] - first
        found[name] = [set(axis.tolist()) for axis in np.unravel_index(of_one, shapes[name])]
    return found


@pytest.mark.parametrize("stem", [(), (16, 32, 32)])
@pytest.mark.parametrize("pool", ["cls", "mean"])
@pytest.mark.parametrize("task", ["digits", "glyphs"])
def test_random_subnets_are_as_their_modules(stem, pool, task):
    """``digits`` has a classifier behind its feature, ``glyphs`` none; the pooler is an artefact of the export."""
    recipe = elastic_recipe(stem=stem, pool=pool)
    names = CLASSES[task] if task == "digits" else None
    for number in range(25):
        spec = random_spec(recipe, task, number)
        with torch.device("meta"):
            module = network(recipe, task, spec.architecture, names)
            image = torch.empty(1, 3, 16, 24)
        if names is None:
            module.pooler = None
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            module(image)
        cost = subnet_cost(recipe, spec, NUMBERS[task])
        assert cost.parameters == sum(parameter.numel() for parameter in module.parameters())
        assert cost.flops == counter.get_total_flops()


def test_blocks_are_what_a_deeper_path_costs_more():
    recipe = elastic_recipe()
    backbone, whole = recipe.model.backbone, Architecture(40, (), (1, 4, 2), (52, 20, 120))
    without = Architecture(40, (), (1, 4), (52, 20))
    assert path_cost(backbone, without, (16, 24)) + block_cost(backbone, whole, 2, (16, 24)) == path_cost(
        backbone, whole, (16, 24)
    )


@pytest.mark.parametrize("stem", [(), (16, 32, 32)])
def test_subnets_over_one_copy_are_the_entries_that_any_of_them_reads(stem):
    """Of every parameter the smallest leading slice that holds what each path reads of it."""
    recipe = elastic_recipe(stem=stem)
    for number in range(20):
        specs = [random_spec(recipe, task, number) for task in NUMBERS]
        of_each = [entries(recipe, spec) for spec in specs]
        together = 0
        for name in {name for of_one in of_each for name in of_one}:
            axes = zip(*(of_one[name] for of_one in of_each if name in of_one), strict=True)
            together += math.prod(len(set().union(*axis)) for axis in axes)
        joint = joint_cost(recipe, specs, NUMBERS)
        alone = [subnet_cost(recipe, spec, NUMBERS[spec.task]) for spec in specs]
        dim = specs[0].architecture.dim
        assert joint.parameters == together + 3 * dim + 3  # and the three classes of digits
        assert joint.flops == sum(cost.flops for cost in alone)
        assert max(cost.parameters for cost in alone) <= joint.parameters <= sum(cost.parameters for cost in alone)


def test_one_subnet_over_a_shared_copy_costs_what_it_costs_alone():
    recipe = elastic_recipe(inputs=((16, 24), (32, 24)), stem=(16, 32))
    for number, task in itertools.product(range(10), NUMBERS):
        spec = random_spec(recipe, task, number)
        assert joint_cost(recipe, [spec], NUMBERS) == subnet_cost(recipe, spec, NUMBERS[task])
    assert joint_cost(recipe, [], NUMBERS) == NOTHING


def test_a_shared_embedding_has_positions_for_every_grid():
    """Widths 24 and 40: the class token and the projection of 8 x 8 x 3 pixels are as wide as the wider one, and so are
    no positions of the other's grid; the grids are 2 x 3 and 4 x 3, each with a class token."""
    recipe = elastic_recipe(inputs=((16, 24), (32, 24)))
    routes = {"embed": ("shared",), "norm": ("own",) * 2, "attn": ("own",), "ffn": ("own",)}
    one, other = (SubnetSpec(task, routes, Architecture(dim, (), (1,), (dim // 2,)))
                  for task, dim in (("digits", 24), ("glyphs", 40)))  # fmt: skip
    alone = sum(subnet_cost(recipe, spec, NUMBERS[spec.task]).parameters for spec in (one, other))
    assert joint_cost(recipe, [one, other], NUMBERS).parameters == alone - (8 * 8 * 3 + 1 + 1) * 24
