"""With communication behind computation a run still equals one process: heads of unequal sizes are padded, parameters
gathered ahead and in part twice, gradients reduced in many buckets (see equality.py)."""

import pytest

from tests.distributed.test_equality import LARGE, case, check

BUCKETS = {"reduce_bucket_size": 2000}


def test_unequal_tasks_on_four_ranks():
    """8 : 4 : 2 : 1 samples of tasks with 5, 7, 3 and 4 classes, gradients clipped."""
    cases = [
        case(2, 3, one_input=True, zero=LARGE),  # a, and three tasks: empty slots
        case(4, 3, one_input=True, zero=LARGE),
        case(2, 3, one_input=True, zero=LARGE, routes="frozen", sharded=["a"], last=1),
        case(4, 3, one_input=True, routes="freezing"),
        # Of the shared embedding's gradients the order in which autograd makes them is another on ranks without d.
        case(4, 2, one_input=True, zero=BUCKETS, routes="frozen"),
    ]
    assert all(of_case["clipping"] for of_case in cases)
    check(4, cases)


@pytest.mark.matrix
def test_two_ranks():
    cases = [
        case(2, 3, "input", routes="frozen", one_input=True, zero=LARGE, last=1, mixing=True),
        case(2, 3, "layer", routes="freezing", one_input=True, zero=LARGE, accumulation=1),
        case(2, 2, routes="frozen", one_input=True, zero=BUCKETS, last=1),
        case(2, 2, routes="frozen", last=1),
        case(2, 1, routes="frozen", one_input=True, zero=BUCKETS, last=1),
        case(1, 3, zero=LARGE, experts=["ffn"], sharded=["a", "c"], sampled=["a"]),
    ]
    check(2, cases)
