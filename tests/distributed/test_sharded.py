"""A head whose rows are spread over ranks computes what one process would, at every ZeRO stage."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.distributed.test_equality import BOUND, case, check

REPOSITORY = Path(__file__).parents[2]


def launch(ranks: int, *arguments: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *arguments], cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_heads_and_necks_over_ranks(tmp_path):
    launch(3, "tests/distributed/holders.py", str(tmp_path / "results.json"))
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results) > 100
    for of_case, worst in results:
        assert max(worst.values()) <= BOUND, (of_case, worst)


def test_two_ranks(tmp_path):
    check(
        2,
        [case(1, 3, routes="frozen", experts=["ffn"], sharded=["a", "c"], sampled=["a"], last=1, mixing=True)],
        tmp_path,
    )


def test_four_ranks(tmp_path):
    # With EP 2 the heads in the same slot of the other expert-parallel rank are spread too, also an empty one's.
    cases = [
        case(2, 3, "layer", "frozen", experts=["ffn"], sharded=["a"], sampled=["a", "b"], last=1),
        case(2, 2, "input", "frozen", experts=["ffn"], sharded=["c"], accumulation=1, tasks=3, mixing=True),
        case(1, 1, routes="frozen", experts=[], sharded=["a", "b"], accumulation=1, optimizer="adamw", tasks=3),
    ]
    check(4, cases, tmp_path)
