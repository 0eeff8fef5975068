"""`ufo search` on a checkpoint: true evaluations, limits, going on after a kill, and all that it refuses."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from tests.pictures import Bytes, encode, texture
from tests.small_run import CLASSES, make_model, write_checkpoint
from ufo_ds import evaluate, extract, recipe_file, search
from ufo_ds.checkpoint import Reader, of_run
from ufo_ds.data.layouts import Layout, Sample
from ufo_ds.data.shard_writer import write
from ufo_ds.errors import run as entry
from ufo_ds.model.architecture import SearchSpace
from ufo_ds.model.cost import joint_cost, subnet_cost
from ufo_ds.model.loading import spec_of
from ufo_ds.model.spec import SubnetSpec
from ufo_ds.subnets.latency import WORK, Measurement, Profile, Target

BACKBONE = {"dim": 24, "depth": 3, "heads": 3, "patch_size": 8, "mlp_ratio": 3}
SIZES = {"depth": [1, 2, 3], "dim": [9, 16, 24], "heads": [1, 2, 3], "mlp_ratio": [1.0, 2.5, 3.0]}


def make_recipe(root, elastic):
    tasks = {"digits": ("linear", "cross_entropy"), "glyphs": ("margin", "cosface")}
    benchmark = {"name": "which", "protocol": "classification", "shards": f"{root}/digits"}
    of_pairs = [
        {"name": "found", "protocol": "recall", "shards": f"{root}/glyphs"},
        {"name": "others", "protocol": "recall", "shards": f"{root}/glyphs", "at": [2]},
    ]
    return recipe_file.parse(
        {
            "name": "test",
            "model": {"backbone": BACKBONE, "experts": ["ffn"], "elastic": SIZES if elastic else None},
            "tasks": [
                {
                    "name": name,
                    "head": {"type": kind},
                    "loss": {loss: {}},
                    "input": [16, 24],
                    "samples_per_step": 8,
                    "routes": {"ffn": ["shared", "own", "shared"]},
                    "train": [{"shards": f"{root}/{name}"}],
                    "benchmarks": [benchmark] if kind == "linear" else of_pairs,
                }
                for name, (kind, loss) in tasks.items()
            ],
            "data": {"workers": 0},
            "schedule": {"steps": 10},
        },
        "test",
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root, generator = tmp_path_factory.mktemp("search"), np.random.default_rng(0)
    for task, names in CLASSES.items():
        samples = []
        for i in range(24):
            base = np.asarray(texture(np.random.default_rng(i % len(names))), dtype=float)
            image = texture(generator).copy()
            image.frombytes((base + generator.normal(0, 70, base.shape)).clip(0, 255).astype(np.uint8).tobytes())
            samples.append(Sample(Bytes(encode(image)), names[i % len(names)]))
        write(Layout(samples), root / task, source="test", licence="CC0")
    for name, elastic in (("run", True), ("rigid", False)):
        write_checkpoint(root / name / "checkpoints", make_model(make_recipe(root, elastic)))
    return root


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def call(root, out, *arguments):
    words = [str(root / "run"), "--out", str(out), "--evaluations", "7", "--device", "cpu", *map(str, arguments)]
    return entry(search.main, words)


def found_by(capsys, root, out, *arguments):
    capsys.readouterr()
    assert call(root, out, *arguments, "--json") == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def test_the_front_is_of_true_evaluations_within_the_limits(root, tmp_path, capsys):
    """Each is what `ufo evaluate --spec` measures and `ufo extract --spec` writes."""
    out = tmp_path / "out"
    found = found_by(capsys, root, out, "--task", "glyphs", "--limit", "parameters=20e3", "--limit", "flops=3e5")
    assert found == json.loads((out / "front.json").read_text())
    assert (out / "front.png").stat().st_size > 10_000
    records = [json.loads(line) for line in (out / "evaluations.jsonl").read_text().splitlines()]
    assert len(records) == found["evaluated"] == 7
    assert len({record["subnets"][0]["name"] for record in records}) == 7
    reader = Reader(of_run(root / "run"))
    space, whole = SearchSpace.of(reader.recipe.model), spec_of(reader, "glyphs")
    first, second = (records[i]["subnets"][0]["name"] for i in (0, 1))
    assert (first, second) == (whole.name, whole.sliced(space.smallest).name)
    within = [r for r in records if r["costs"]["parameters"] <= 20e3 and r["costs"]["flops"] <= 3e5]
    assert 0 < len(found["front"]) <= len(within) < 7
    front = {member["subnets"][0]["name"] for member in found["front"]}
    for record in within:
        mine, name = (
            (record["subnets"][0]["metrics"]["recall@1"], *record["costs"].values()),
            record["subnets"][0]["name"],
        )
        others = [(r["subnets"][0]["metrics"]["recall@1"], *r["costs"].values()) for r in within]
        beaten = any(o[0] >= mine[0] and o[1] <= mine[1] and o[2] <= mine[2] and o != mine for o in others)
        assert (name in front) == (not beaten)
    member = found["front"][-1]["subnets"][0]
    spec = SubnetSpec.load(out / member["spec"])
    assert spec.name == member["name"]
    cost = subnet_cost(reader.recipe, spec, len(CLASSES["glyphs"]))
    assert found["front"][-1]["costs"] == {"parameters": cost.parameters, "flops": cost.flops}
    run = [str(root / "run"), "--spec", str(out / member["spec"]), "--json", "--device", "cpu"]
    assert entry(evaluate.main, run) == 0
    assert json.loads(capsys.readouterr().out)["glyphs/found/recall@1"] == member["value"]
    arguments = ["--task", "glyphs", "--spec", str(out / member["spec"]), "--out", str(tmp_path / "model")]
    assert entry(extract.main, [str(root / "run"), *arguments]) == 0


def test_a_search_goes_on_and_ends_as_it_would_have(root, tmp_path, capsys):
    arguments = ("--task", "digits", "--task", "glyphs", "--limit", "parameters=40e3")
    whole = found_by(capsys, root, tmp_path / "whole", *arguments)
    lines = (tmp_path / "whole" / "evaluations.jsonl").read_bytes().splitlines(keepends=True)
    for kept, cut in ((1, 0), (4, 30)):
        out = tmp_path / f"killed-{kept}"
        out.mkdir()
        (out / "search.json").write_bytes((tmp_path / "whole" / "search.json").read_bytes())
        (out / "evaluations.jsonl").write_bytes(b"".join(lines[:kept]) + lines[kept][:cut])
        assert found_by(capsys, root, out, *arguments) == whole
        assert (out / "evaluations.jsonl").read_bytes() == b"".join(lines)
        assert {p.name for p in (out / "front").iterdir()} == {p.name for p in (tmp_path / "whole" / "front").iterdir()}


def test_several_tasks_share_one_budget(root, tmp_path, capsys):
    """Parameters of what they share count once, FLOPs add up, accuracy is relative to the whole paths."""
    arguments = ("--task", "glyphs", "--task", "digits", "--limit", "parameters=30e3")
    found = found_by(capsys, root, tmp_path / "out", *arguments)
    recipe = Reader(of_run(root / "run")).recipe
    assert list(found["metrics"].items()) == [("digits", "top1"), ("glyphs", "recall@1")]
    for member in found["front"]:
        specs = [SubnetSpec.load(tmp_path / "out" / subnet["spec"]) for subnet in member["subnets"]]
        cost = joint_cost(recipe, specs, {task: len(names) for task, names in CLASSES.items()})
        assert member["costs"] == {"parameters": cost.parameters, "flops": cost.flops}
        assert cost.parameters <= 30e3
        relative = [s["value"] / found["whole"]["values"][s["task"]] for s in member["subnets"]]
        assert member["accuracy"] == pytest.approx(np.mean(relative))
    assert call(root, tmp_path / "out", *arguments) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].split()[:5] == ["digits", "top1", "glyphs", "recall@1", "of"]
    assert len(table) == 3 + len(found["front"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--task shapes", "no task 'shapes' in test; it has digits, glyphs"),
        ("--task glyphs --limit memory=3", "--limit memory=3: give COST=VALUE with one of parameters, flops, latency"),
        ("--task glyphs --limit flops=1e6x", "--limit flops=1e6x: '1e6x' is no positive number"),
        ("--task glyphs --limit flops=-1", "'-1' is no positive number"),
        ("--task glyphs --limit flops=1e5 --limit flops=1e6", "is one more of flops"),
        ("--task glyphs --costs size", "--costs size: 'size' is none of parameters, flops, latency"),
        ("--task glyphs --limit latency=3", "latency needs --profile: measure one with `ufo latency`"),
        ("--task glyphs --evaluations 3", "--evaluations 3: give 4 or more"),
        ("--task glyphs --benchmark which", "--benchmark 'which' is not there: choose of found, others"),
        ("--task glyphs --benchmark found --benchmark others", "found, others are both of task glyphs"),
        ("--task glyphs --task digits --benchmark found", "task digits has no benchmarks among those asked for"),
        (
            "--task glyphs --metric mAP",
            "--metric mAP is none of glyphs/found of which more is better: choose of",
        ),
        ("--task glyphs --device abacus", "--device 'abacus' cannot be used"),
        (
            "--task glyphs --limit parameters=300",
            "keeps to it: the smallest subnet of glyphs would need parameters=",
        ),
        (
            "--task glyphs --task digits --limit parameters=300 --limit flops=300",
            "nothing keeps to it: the smallest subnets together of digits and glyphs would need parameters=",
        ),
    ],
)
def test_what_it_refuses(root, tmp_path, capsys, arguments, message):
    out = tmp_path / "out"
    assert call(root, out, *arguments.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not out.exists()


def test_what_the_smallest_would_need_is_a_limit_that_holds(root, tmp_path, capsys):
    arguments = ("--task", "glyphs", "--evaluations", "4")
    assert call(root, tmp_path / "a", *arguments, "--limit", "parameters=1", "--limit", "flops=1") == 2
    needs = capsys.readouterr().err.split("would need ")[1].strip().split(", ")
    limits = [word for need in needs for word in ("--limit", need)]
    found = found_by(capsys, root, tmp_path / "b", *arguments, *limits)
    assert len(found["front"]) == 1


def test_a_model_without_elastic_sizes_and_other_things_in_the_directory_are_refused(root, tmp_path, capsys):
    out = tmp_path / "out"
    assert entry(search.main, [str(root / "rigid"), "--task", "glyphs", "--out", str(out)]) == 2
    assert "rigid: there are no subnets without model.elastic" in capsys.readouterr().err
    assert not out.exists()
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    assert call(root, out, "--task", "glyphs") == 2
    assert f"--out {out} is there, and no search" in capsys.readouterr().err
    assert [p.name for p in out.iterdir()] == ["notes.txt"]


def test_other_arguments_in_the_same_directory_are_refused(root, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ("--task", "glyphs", "--evaluations", "4", "--limit", "parameters=20e3")
    found_by(capsys, root, out, *arguments)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for change, message in (
        (("--limit", "flops=1e6"), "limits.flops was None, is 1000000.0"),
        (("--seed", "1"), "seed was 0, is 1"),
        (("--benchmark", "others"), "benchmarks.glyphs.name was 'found', is 'others'"),
        (("--task", "digits"), "benchmarks.digits was None"),
    ):
        assert call(root, out, *arguments, *change) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"--out {out} holds another search" in line
        assert message in line
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_latency_is_a_cost_where_there_is_a_profile(root, tmp_path, capsys):
    """A device on which every block takes 2 ms and calling the model 1 ms; of another model it is refused."""
    recipe = Reader(of_run(root / "run")).recipe
    space = SearchSpace.of(recipe.model)
    profile = Profile(
        machine={}, versions={}, target=Target(), input=(16, 24), backbone=recipe.model.backbone, space=space,
        measurements=[Measurement(architecture=space.largest, ms=7), Measurement(architecture=space.smallest, ms=3)],
        coefficients=dict.fromkeys(WORK, 0.0) | {"call": 1.0, "blocks": 2.0}, error=0.0,
    )  # fmt: skip
    profile.save(tmp_path / "profile.json")
    dataclasses.replace(profile, input=(16, 16)).save(tmp_path / "other.json")
    arguments = ("--task", "glyphs", "--profile", tmp_path / "profile.json", "--limit", "latency=5.5")
    found = found_by(capsys, root, tmp_path / "out", *arguments, "--costs", "latency,parameters")
    for member in found["front"]:
        spec = SubnetSpec.load(tmp_path / "out" / member["subnets"][0]["spec"])
        assert member["costs"]["latency"] == 1 + 2 * spec.architecture.depth <= 5.5
    both = ("--task", "digits", *arguments[:-1], "latency=5.9994")
    for words, message in (
        (both, "the smallest subnets together of digits and glyphs would need latency=6"),
        (("--task", "glyphs", "--profile", tmp_path / "other.json"), "other.json is of a model with input (16, 16)"),
        (("--task", "glyphs", "--profile", root / "run"), "is a directory"),
    ):
        assert call(root, tmp_path / "none", *words) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message.lower() in line.lower()
    assert not (tmp_path / "none").exists()
