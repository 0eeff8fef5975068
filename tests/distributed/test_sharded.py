"""A head whose rows are spread over ranks computes what one process would, at every ZeRO stage."""

import json

from tests.distributed import holders
from tests.distributed.test_equality import BOUND, ELASTIC, case, check
from tests.ranks import run


def test_heads_and_necks_over_ranks(tmp_path):
    run(3, holders.main, tmp_path / "results.json")
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results) > 100
    for of_case, worst in results:
        assert max(worst.values()) <= BOUND, (of_case, worst)


def test_two_ranks():
    check(2, [case(1, 3, routes="frozen", experts=["ffn"], sharded=["a", "c"], sampled=["a"], last=1, mixing=True)])


def test_four_ranks():
    # With EP 2 the heads in the same slot of the other expert-parallel rank are spread too, also an empty one's.
    cases = [
        case(
            2,
            3,
            "layer",
            "frozen",
            experts=["ffn"],
            sharded=["a"],
            sampled=["a", "b"],
            last=1,
            elastic={**ELASTIC, "dim": [16]},
        ),
        case(2, 2, "input", "frozen", experts=["ffn"], sharded=["c"], accumulation=1, tasks=3, mixing=True),
        case(1, 1, routes="frozen", experts=[], sharded=["a", "b"], accumulation=1, optimizer="adamw", tasks=3),
    ]
    check(4, cases)
