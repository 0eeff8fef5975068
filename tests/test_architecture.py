"""Sizes of subnets: the space of a recipe, draws from it, and names."""

import dataclasses
import json
from itertools import product

import pytest

from tests.test_spec import SPEC
from ufo_ds.errors import UserError
from ufo_ds.model.architecture import Architecture, SearchSpace
from ufo_ds.model.spec import SubnetSpec
from ufo_ds.recipe_model import Backbone, Elastic, Model

BACKBONE = Backbone(dim=32, depth=3, heads=4, patch_size=8, stem=[8, 16, 16], mlp_ratio=3.0)
ELASTIC = Elastic(depth=[3, 2], dim=[16, 24, 32], stem=[0.5, 1.0], heads=[2, 4], mlp_ratio=[1.5, 3.0])
SPACE = SearchSpace.of(Model(backbone=BACKBONE, elastic=ELASTIC))


def everything(space: SearchSpace) -> set[Architecture]:
    """All subnets of a space, by its definition."""
    return {
        Architecture(dim, stem, heads, tuple(round(dim * ratio) for ratio in ratios))
        for depth, dim, stem in product(space.depth, space.dim, space.stem)
        for heads in product(space.heads, repeat=depth)
        for ratios in product(space.mlp_ratio, repeat=depth)
    }


def test_the_largest_is_the_backbone_and_the_smallest_its_first_slices():
    assert SPACE.largest == Architecture.of(BACKBONE) == Architecture(32, (8, 16, 16), (4,) * 3, (96,) * 3)
    assert SPACE.smallest == Architecture(16, (4, 8, 8), (2, 2), (24, 24))
    assert SPACE.smallest.fits(SPACE.largest)
    assert not SPACE.largest.fits(SPACE.smallest)


def test_every_subnet_is_its_levels():
    subnets = everything(SPACE)
    assert len(subnets) == 3 * 2 * (4**2 + 4**3)
    for subnet in subnets:
        assert SPACE.architecture(*SPACE.levels(subnet)) == subnet
        assert subnet.fits(SPACE.largest)


def test_draws_reach_every_subnet_and_belong_to_their_key():
    draws = [SPACE.draw(0, "subnet", step) for step in range(6000)]
    assert draws == [SPACE.draw(0, "subnet", step) for step in range(6000)]
    assert set(draws) <= everything(SPACE)
    counts = [sum(draw.depth == depth for draw in draws) for depth in SPACE.depth]
    assert min(counts) > 0.45 * len(draws)  # depths alike, though far more subnets are deep
    small = {draw for draw in draws if draw.depth == 2}
    assert small == {subnet for subnet in everything(SPACE) if subnet.depth == 2}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": 20}, "dim 20 is none of 16, 24, 32"),
        ({"stem": (8, 16, 8)}, "stem (8, 16, 8) is none of (4, 8, 8), (8, 16, 16)"),
        ({"heads": (4,), "hidden": (96,)}, "depth 1 is none of 2, 3"),
        ({"heads": (4, 3, 4)}, "heads 3 is none of 2, 4"),
        ({"hidden": (96, 48, 72)}, "hidden 72 is none of 48, 96"),
    ],
)
def test_a_size_outside_of_the_space_is_named(change, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011, matched below
        SPACE.levels(dataclasses.replace(SPACE.largest, **change))
    assert str(caught.value) == message


def test_without_elastic_there_is_no_space():
    with pytest.raises(UserError, match=r"no subnets without model\.elastic"):
        SearchSpace.of(Model(backbone=BACKBONE))


@pytest.mark.parametrize(
    ("elastic", "message"),
    [
        ({"depth": [2]}, "elastic.depth [2]: the largest must be 3"),
        ({"heads": [2, 8]}, "elastic.heads [2, 8]: the largest must be 4"),
        ({"stem": [0.5]}, "elastic.stem [0.5]: the largest must be 1"),
        ({"stem": [0.4, 1.0]}, "channels that differ must stay different"),
        ({"mlp_ratio": [0.01, 3.0]}, "leaves FFNs of the smallest dim no channel"),
    ],
)
def test_a_space_without_the_backbone_is_refused(elastic, message):
    with pytest.raises(ValueError, match="elastic") as caught:
        Model(backbone=BACKBONE, elastic=Elastic(**elastic))
    assert message in str(caught.value)


def test_names_are_short_and_differ():
    specs = [dataclasses.replace(SPEC, architecture=subnet) for subnet in everything(SPACE)]
    names = {spec.name for spec in specs}
    assert len(names) == len(specs)
    assert max(map(len, names)) < 20
    assert SPEC.name.startswith("a-2x24-")
    assert SubnetSpec.from_values(json.loads(SPEC.to_json()), "here").name == SPEC.name
    assert dataclasses.replace(SPEC, task="b").name[1:] != SPEC.name[1:]


def test_a_slice_keeps_the_routes_of_its_blocks():
    assert SPEC.sliced(Architecture(24, (4, 8), (2,), (72,))) == SubnetSpec(
        "a",
        {"embed": ("own",), "norm": ("shared",) * 2, "attn": ("shared",), "ffn": ("own",)},
        Architecture(24, (4, 8), (2,), (72,)),
    )
