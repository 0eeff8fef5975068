"""Ranks that hold unequal heads and embeddings build as many sub-groups, or are refused before the first step."""

import pytest

from tests.distributed import construction
from tests.ranks import results

UNEQUAL = {"a": 5, "b": 3001, "c": 3, "d": 4}


def on(zero: dict, ep: int = 2) -> dict:
    return {"zero": zero, "ep": ep, "classes": UNEQUAL}


def test_unequal_heads():
    cases = [
        on({"stage": 3}),
        on({"stage": 3}, ep=1),
        on({"stage": 3, "sub_group_size": 20_000}, ep=1),
        on({"stage": 3, "sub_group_size": 100}),
        on({"stage": 3, "stage3_prefetch_bucket_size": 50_000}),
        on({"stage": 2, "reduce_bucket_size": 1000}),
        on({"stage": 2}),
        on({"stage": 3, "stage3_prefetch_bucket_size": 50_000}, ep=1),
    ]
    expert, data, several, *refused, at_stage_2, prefetching = results(2, construction.build, cases)
    assert expert["tasks"] == [2, 2]  # with its head b has as much to do as a
    assert data["tasks"] == data["slots"] == [4, 4]
    assert expert["sub_groups"] == [2, 2]  # what is shared, and experts with heads
    assert several["sub_groups"][0] == several["sub_groups"][1] > 2
    norm = data["norms"][0]
    for found in (expert, data, several, at_stage_2, prefetching):
        assert found["norms"] == pytest.approx([norm, norm], rel=1e-5)
    for found, words in zip(
        refused,
        [
            ["sub_group_size 100 of the DeepSpeed JSON", " to ", 'use "auto"'],
            ["stage3_prefetch_bucket_size 50000 of the DeepSpeed JSON", 'use "auto"'],
            ["reduce_bucket_size 1000 of the DeepSpeed JSON", 'use "auto"'],
        ],
        strict=True,
    ):
        first, second = found["refused"]
        assert first == second  # on every rank, and alike
        assert "\n" not in first
        assert all(word in first for word in words), first
