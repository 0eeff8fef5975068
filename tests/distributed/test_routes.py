"""Routes in real runs: all tasks on the shared path, then branched off, learned, frozen at rest; kept and drawn."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests import tiny
from tests.distributed.test_training import recorded, train, weights
from ufo_ds import checkpoint

ROUTES = [
    "--model.branch_at", "4", "--model.router", "{freeze_when_stable: 3, probe: 0.5}", "--model.shared_samples", "0.1",
    "--optimizer.rules", "[{unit: router, lr_scale: 30}]", "--optimizer.average", "0.9",
    "--checkpoint.every", "1", "--checkpoint.keep", "99",
]  # fmt: skip


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def run(recipe, tmp_path_factory) -> Path:
    """Two ranks, EP 2, ZeRO-3; the directory also holds the output."""
    run = tmp_path_factory.mktemp("runs") / "run"
    (run.parent / "output.txt").write_text(train(2, recipe, run, *ROUTES))
    return run


def at(run: Path, step: int) -> checkpoint.Reader:
    return checkpoint.Reader(run / "checkpoints" / checkpoint.name_of(step))


def whole(reader: checkpoint.Reader, name: str, kind: str) -> torch.Tensor:
    return reader.read(name, kind, 0, torch.Size(reader.index.parameters[name].shape).numel())


def test_own_copies_start_as_the_shared_one_is(run):
    """Until they branch, own copies are what they were drawn as. The first step on a branch then begins with the shared
    copy's optimizer state and average: exp_avg_sq keeps 0.999 of itself, the average 5 / 14 (step 5: t = 4)."""
    before, after = at(run, 4), at(run, 5)
    assert all(set(layers) == {"shared"} for of_task in before.index.routes.values() for layers in of_task.values())
    assert after.index.routes["stripes"]["ffn"] == ["learned", "learned"]
    shared = [name for name in before.index.parameters if ".ffn.shared." in name or name.startswith("embed.shared.pat")]
    assert len(shared) > 4
    for name in shared:
        for task in ("colours", "stripes"):
            own = name.replace(".shared.", f".own.{task}.")
            assert torch.equal(whole(at(run, 1), own, "weight"), whole(before, own, "weight"))  # left alone so far
            squares = whole(before, name, "exp_avg_sq")
            assert squares.any()
            assert (whole(after, own, "exp_avg_sq") >= 0.998 * squares).all()
            wanted = 5 / 14 * whole(before, name, "average") + 9 / 14 * whole(after, own, "weight")
            torch.testing.assert_close(whole(after, own, "average"), wanted, rtol=1e-5, atol=1e-6)


def test_routes_freeze_when_at_rest_and_what_is_unused_stands_still(run):
    frozen = next(step for step in range(5, 13) if "learned" not in at(run, step).index.routes["stripes"]["ffn"])
    router = at(run, frozen).index.router
    assert frozen - 1 - max(router["changed_at"], 4) == 3  # frozen before the step that the checkpoint follows
    routes = at(run, frozen).index.routes
    unused = [
        f"blocks.{layer}.ffn.own.{task}.fc1.weight"
        for task in routes for layer, route in enumerate(routes[task]["ffn"]) if route == "shared"
    ]  # fmt: skip
    used = [
        f"blocks.{layer}.ffn.own.{task}.fc1.weight"
        for task in routes for layer, route in enumerate(routes[task]["ffn"]) if route == "own"
    ]  # fmt: skip
    for names, stands_still in ((unused, True), (used, False)):
        for name in names:
            kinds = [at(run, frozen).index.parameters[name].kinds, at(run, 11).index.parameters[name].kinds]
            assert kinds[0] == kinds[1]
            values = [at(run, step).read(name, "weight", 0, 16) for step in (frozen, 11)]
            assert torch.equal(*values) == stands_still
    for task, of_task in routes.items():
        assert of_task == at(run, 12).index.routes[task]
    # The shared path is still trained, by a tenth of every task's samples.
    name = "blocks.1.ffn.shared.fc1.weight"
    assert not torch.equal(at(run, frozen).parameter(name), at(run, 11).parameter(name))


def test_routes_are_recorded_and_drawn(run):
    lines = [line for line in recorded(run) if line["kind"] == "routes"]
    assert lines[0]["step"] == 5
    assert set(lines[0]["own"]) == {"colours", "stripes"}
    logits = at(run, 6).index.parameters["router.logits.stripes"].shape
    probabilities = lines[1]["own"]["stripes"]["ffn"]
    assert logits == [2, 2]
    wanted = at(run, 6).read("router.logits.stripes", "weight", 0, 4).view(2, 2).softmax(1)[:, 1].tolist()
    assert probabilities == pytest.approx(wanted, abs=1e-6)
    assert "routes frozen at step" in (run.parent / "output.txt").read_text()
    with Image.open(run / "routes.png") as picture:
        assert min(picture.size) > 200


def test_a_resumed_run_freezes_at_the_same_step(recipe, run, tmp_path):
    """The router's memory is in the checkpoint: to the bit."""
    other = tmp_path / "run"
    train(2, recipe, other, *ROUTES, "--schedule.steps", "6")
    # The cosine of a shorter schedule differs, so that only what is before the cut may be taken over.
    for step in range(1, 7):
        source, target = run / "checkpoints" / checkpoint.name_of(step), other / "checkpoints"
        for path in (target / checkpoint.name_of(step)).iterdir():
            path.unlink()
        for path in source.iterdir():
            (target / checkpoint.name_of(step) / path.name).write_bytes(path.read_bytes())
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [json.dumps(line) for line in lines if line["step"] <= 6]
    (other / "metrics.jsonl").write_text("\n".join(kept) + "\n")
    assert "going on from step 6" in train(2, recipe, other, *ROUTES)
    assert recorded(other) == recorded(run)
    assert weights(other) == weights(run)


def test_one_process_takes_the_same_routes(recipe, run, tmp_path):
    train(1, recipe, tmp_path / "run", *ROUTES)
    found, wanted = recorded(tmp_path / "run"), recorded(run)
    assert [(line["step"], line["kind"]) for line in found] == [(line["step"], line["kind"]) for line in wanted]
    for a, b in zip(found, wanted, strict=True):
        if a["kind"] == "train":
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
    assert at(tmp_path / "run", 12).index.routes == at(run, 12).index.routes


def test_a_single_task_with_autocast(recipe, tmp_path):
    """The recipe restricted to one task, fp32 weights and bf16 arithmetic."""
    config = tmp_path / "autocast.json"
    config.write_text(
        json.dumps({"torch_autocast": {"enabled": True, "dtype": "bfloat16"}, "zero_optimization": {"stage": 1}})
    )
    output = train(
        1, recipe, tmp_path / "run", "--task", "colours", "--deepspeed", str(config),
        "--model.experts", "[]", "--model.routes", "{}",
    )  # fmt: skip
    assert "fp32 with autocast to bf16" in output
    assert "\n  colours" in output
    assert "stripes" not in output
    losses = [line["loss"] for line in recorded(tmp_path / "run") if line["kind"] == "train"]
    assert losses[-1] < losses[0]
