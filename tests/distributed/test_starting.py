"""Runs that start from another run, on other topologies than its own: equal to it before their first step."""

import shutil
from pathlib import Path

import pytest

from tests import tiny
from tests.distributed import starting
from tests.distributed.test_training import arguments, train, weights
from tests.ranks import launch, results
from ufo_ds import checkpoint, evaluate, recipe_file
from ufo_ds import train as train_script
from ufo_ds.errors import run as entry

ELASTIC = "{depth: [1, 2], dim: [8, 16], heads: [1, 2], mlp_ratio: [1, 2], random: 1}"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def first(recipe, tmp_path_factory) -> Path:
    """Seven steps on two ranks, EP 2, ZeRO-3; routes are frozen after five, both kinds of them."""
    run = tmp_path_factory.mktemp("runs") / "first"
    rules = "[{unit: router, lr_scale: 100}]"
    train(2, recipe, run, "--schedule.steps", "7", "--optimizer.rules", rules, "--optimizer.lr", "0.01")
    routes = checkpoint.Reader(checkpoint.of_run(run)).index.routes
    assert {route for of_task in routes.values() for route in of_task["ffn"]} == {"shared", "own"}
    return run


def case(
    recipe: Path, first: Path, ep: int, stage: int, tasks=("colours", "stripes"), bf16: bool = False,
    more: tuple[tuple[str, str], ...] = (),
) -> dict:  # fmt: skip
    overrides = [("model.init", str(first)), *more]
    return {
        "recipe": str(recipe), "overrides": overrides, "tasks": list(tasks), "ep": ep, "stage": stage, "bf16": bf16,
    }  # fmt: skip


def check(found: dict, first: Path, compared: list[int], tolerance: float = 1e-5) -> None:
    assert found["wrong"] == []
    assert found["compared"] == compared
    assert found["read"] == found["held"]
    routes = checkpoint.Reader(checkpoint.of_run(first)).index.routes
    assert found["routes"] == {task: routes[task] for task in found["routes"]}
    assert found["loss"] < tolerance


# Of two blocks: 4 norms of 2, attentions of 4 and shared FFNs of 4 each, last norm 2, shared embedding of 4; of a task
# its embedding of 4, FFNs of 8 and head of 2.
SHARED, OWN = 4 * 2 + 2 * 4 + 2 * 4 + 2 + 4, 4 + 8 + 2


def test_on_one_process(recipe, first):
    cases = [
        case(recipe, first, 1, 1),
        case(recipe, first, 1, 3, ["stripes"]),
        case(recipe, first, 1, 3, bf16=True),
        case(recipe, first, 1, 2, bf16=True),
    ]
    whole, part, *low = results(1, starting.begin, cases)
    check(whole, first, [SHARED + 2 * OWN])
    check(part, first, [SHARED + OWN])
    for found in low:
        check(found, first, [SHARED + 2 * OWN], tolerance=0.02)


def test_on_two_ranks(recipe, first):
    """Each holds one task, and half of what is shared; or half of everything, a spread classifier too."""
    spread = case(recipe, first, 1, 3, more=(("tasks.stripes.head.sharded", "true"),))
    experts, *others = results(2, starting.begin, [case(recipe, first, 2, 3), case(recipe, first, 1, 3), spread])
    check(experts, first, [SHARED + OWN] * 2)
    for found in others:
        check(found, first, [SHARED + 2 * OWN] * 2)
        assert sum(found["held"]) == sum(experts["held"])


def test_a_whole_run_starts_goes_on_and_is_evaluated(recipe, first, tmp_path):
    """Elastic, from learned routes; gone on with once the first run is gone, to the bit."""
    gone, run = tmp_path / "first", tmp_path / "run"
    shutil.copytree(first, gone)
    words = [
        "--model.init", str(gone), "--model.elastic", ELASTIC, "--schedule.steps", "4", "--checkpoint.every", "2",
        "--evaluation.every", "2",
    ]  # fmt: skip
    step = checkpoint.Reader(checkpoint.of_run(gone)).index.step
    assert f"weights, heads, running statistics and routes of step {step}" in train(1, recipe, run, *words)
    shutil.rmtree(gone)
    routes = checkpoint.Reader(checkpoint.of_run(first)).index.routes
    last = run / "checkpoints" / checkpoint.name_of(4)
    reader, wanted = checkpoint.Reader(last), weights(run, 4)
    assert reader.index.licences == {"colours": ["none"], "stripes": ["none"]}
    assert Path(reader.index.started_from) == gone / "checkpoints" / checkpoint.name_of(step)
    assert reader.index.routes == routes
    assert not [name for name in reader.index.parameters if name.startswith("router")]
    resolved = recipe_file.load(str(run / "recipe.yaml"))
    assert {task.name: task.routes["ffn"] for task in resolved.tasks} == {n: r["ffn"] for n, r in routes.items()}
    shutil.rmtree(last)
    assert "going on from step 2" in train(1, recipe, run, *words)
    assert weights(run, 4) == wanted
    assert checkpoint.Reader(last).index.started_from == reader.index.started_from
    assert entry(evaluate.main, [str(run), "--device", "cpu", "--json"]) == 0


def test_what_does_not_go_together_ends_in_one_line(recipe, first, tmp_path):
    damaged = shutil.copytree(first, tmp_path / "damaged")
    file = checkpoint.of_run(damaged) / "rank-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[8 + int.from_bytes(content[:8], "little")] ^= 1  # of the first tensor
    file.write_bytes(content)
    run = tmp_path / "run"
    for words, message in [
        (["--model.init", str(damaged)], "rank-00001.safetensors changed since it was written: restore it"),
        (["--model.init", str(first), "--tasks.colours.num_classes", "5"], "has classes of colours 3, the recipe 5"),
    ]:
        status, output = launch(1, entry, train_script.main, arguments(1, recipe, run, *words))
        [line] = [line for line in output.splitlines() if line.startswith("error: ")]
        assert (status, message in line) == (2, True), output[-2000:]
        assert not run.exists()
