"""A plan's bytes are those of engines: memory to the byte, traffic within 2%; and where ranks have parameters of the
same sizes, they gather and reduce as many elements in the same order, whatever their tasks (see planned.py)."""

import json

import pytest

from tests.distributed import planned
from tests.distributed.test_equality import LARGE, STEM
from tests.distributed.test_equality import case as of_equality
from tests.ranks import results

BOUND = 0.02  # |planned - found| / found


def case(ep, stage, exchange="aligned", routes="learned", bf16=False, autocast=False, zero=None, **options):
    values = {"bf16": bf16, "autocast": autocast, "zero": zero or {}}
    return {**of_equality(ep, stage, exchange, routes, **options), **values}


RELEASING = {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
CASES = {
    1: [case(1, 1), case(1, 2, bf16=True, optimizer="adamw"), case(1, 3, optimizer="lamb")],
    2: [
        case(1, 1, optimizer="adamw", routes="frozen", accumulation=1),
        case(2, 1, "layer", routes="frozen", tasks=3),
        case(1, 2, "aligned", sharded=["a", "c"], last=1),
        case(2, 2, "input", bf16=True, mixing=True, optimizer="lamb"),
        case(1, 3, routes="frozen", bf16=True, optimizer="lars"),
        case(1, 3, zero=RELEASING, accumulation=1, sharded=["b"], sampled=["a"]),
        case(1, 3, zero=RELEASING, recompute="full", probe=0.25, routes="frozen", drop_path=0.0),
        case(2, 3, "layer", routes="frozen", optimizer="adamw"),
        case(2, 3, zero=LARGE, one_input=True, last=1),
        case(2, 1, one_input=True, zero={"reduce_bucket_size": 2000}),
        case(2, 2, routes="frozen", one_input=True, last=1, zero={"reduce_bucket_size": 2000}),
        case(2, 3, bf16=True, routes="frozen", one_input=True, zero=LARGE, sharded=["a"], optimizer="lamb"),
        case(2, 3, "input", tasks=3, backbone=STEM, zero={**RELEASING, "sub_group_size": 1000}, bf16=True),
        case(2, 3, experts=["ffn"], shared_samples=0.2, optimizer="adamw", zero={"reduce_bucket_size": 10**7}),
        case(1, 3, zero={**RELEASING, "stage3_max_reuse_distance": 7000}, experts=[], recompute=2, routes="frozen"),
        case(2, 3, "layer", routes="frozen", recompute="full"),
        case(2, 1, autocast=True, routes="frozen"),  # DeepSpeed remembers that there was one: the last cases
        case(2, 3, autocast=True, routes="frozen", zero=RELEASING),
    ],
    4: [
        case(1, 1, tasks=3, bf16=True),
        case(2, 1, "input", routes="frozen", optimizer="adamw"),
        case(4, 2, tasks=4, routes="frozen", last=1),
        case(2, 2, "layer", routes="frozen", accumulation=1, optimizer="lamb"),
        case(1, 3, tasks=3, optimizer="adamw", routes="frozen"),
        case(2, 3, bf16=True, sharded=["a"], routes="frozen", zero=RELEASING),
        case(2, 3, sharded=["a"], one_input=True, last=1, zero=LARGE),
        case(4, 3, one_input=True, routes="frozen", last=1, zero=LARGE),
        case(2, 2, one_input=True, last=1, zero={"reduce_bucket_size": 2000}),
        case(4, 3, "layer", tasks=4, routes="frozen", bf16=True),
    ],
}  # fmt: skip


def check(ranks: int, cases: list[dict]) -> None:
    for result in results(ranks, planned.run, cases, before=planned.count_collectives, timeout=600):
        for rank, pairs in enumerate(result["ranks"]):
            line = f"{ranks} ranks, rank {rank}: {json.dumps(pairs)} of {json.dumps(result['case'])}"
            for key, (wanted, found) in pairs["memory"].items():
                assert wanted == found, f"{key}: {line}"
            assert pairs["memory"]["parameters"][1] > 0
            assert not pairs["other"], line
            assert pairs["order"] == result["ranks"][0]["order"], line
            for kind, (wanted, found) in pairs["traffic"].items():
                assert abs(wanted - found) <= BOUND * found, f"{kind}: {line}"
            assert ranks == 1 or sum(found for _, found in pairs["traffic"].values()) > 0


@pytest.mark.parametrize(("ranks", "cases"), [(2, CASES[2][1::2]), (4, CASES[4][1::3])])
def test_some(ranks, cases):
    check(ranks, cases)


@pytest.mark.matrix
@pytest.mark.parametrize("ranks", CASES)
def test_matrix(ranks):
    check(ranks, CASES[ranks])
