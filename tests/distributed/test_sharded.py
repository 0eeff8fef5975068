"""A head whose rows are spread over ranks computes what one process would, at every ZeRO stage; its checkpoints do not
tell that they were."""

import json

import torch

from tests.distributed import holders, sharded_checkpoint
from tests.distributed.test_equality import BOUND, case, check
from tests.ranks import run
from ufo_ds.checkpoint import Reader


def test_heads_and_necks_over_ranks(tmp_path):
    run(3, holders.main, tmp_path / "results.json")
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


def test_checkpoints_of_sharded_heads_fit_any_topology(tmp_path):
    def on(ep: int, stage: int, sharded: list[str]) -> dict:
        return case(ep, stage, routes="frozen", experts=["ffn"], optimizer="adamw", accumulation=1, sharded=sharded)

    # Two holders of each task, then four, then one, which has all rows.
    cases = [on(2, 3, ["a"]), on(1, 2, ["a", "b"]), on(4, 3, ["a"])]
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    run(4, sharded_checkpoint.main, tmp_path, tmp_path / "cases.json")
    wanted, *others = [Reader(tmp_path / str(i) / "step-00000002") for i in range(len(cases))]
    weights = [reader.index.parameters["heads.a.classifier.weight"] for reader in (wanted, *others)]
    assert all(weight.shape == [1003, 16] for weight in weights)
    assert weights[0].pieces == [[0, 0, 502 * 16], [2, 502 * 16, 501 * 16]]  # ranks 0 and 2 hold task a
    assert weights[1].pieces[-1] == [3, 753 * 16, 250 * 16]
    assert weights[2].pieces == [[0, 0, 1003 * 16]]
    for found in others:
        assert found.index.parameters.keys() == wanted.index.parameters.keys()
        for name, parameter in wanted.index.parameters.items():
            other = found.index.parameters[name]
            assert (other.shape, other.scalars) == (parameter.shape, parameter.scalars), name
            assert set(other.kinds) == set(parameter.kinds) == {"weight", "average", "exp_avg", "exp_avg_sq"}
            size = torch.Size(parameter.shape).numel()
            for kind in parameter.kinds:
                assert torch.equal(found.read(name, kind, 0, size), wanted.read(name, kind, 0, size)), (name, kind)
