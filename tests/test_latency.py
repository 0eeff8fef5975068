"""Device profiles: devices of known rates, times as noisy as on a shared machine, real calls, files and refusals."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.small_run import make_model, make_recipe, write_checkpoint
from ufo_ds import checkpoint, recipe_file
from ufo_ds.errors import UserError, run
from ufo_ds.latency import main
from ufo_ds.model.architecture import Architecture, SearchSpace
from ufo_ds.model.dense import network
from ufo_ds.model.loading import spec_of
from ufo_ds.recipe_model import Backbone, Elastic, Model
from ufo_ds.subnets import extraction, onnx_export, timing
from ufo_ds.subnets.latency import WORK, Measurement, Profile, Target, fit, left_out_errors, to_measure, work

BACKBONE = Backbone(
    dim=192, depth=6, heads=6, patch_size=16, stem=[24, 48, 48, 96, 96, 192, 192], pool="mean", mlp_ratio=4.0
)
ELASTIC = Elastic(
    depth=[2, 4, 6], dim=[96, 144, 192], heads=[2, 4, 6], mlp_ratio=[1.0, 2.0, 4.0], stem=[0.5, 0.75, 1.0]
)
SPACE = SearchSpace.of(Model(backbone=BACKBONE, elastic=ELASTIC))
RATES = np.array([0.3, 0.1, 40.0, 90.0, 30.0, 25.0, 2.0, 1.5])  # milliseconds for each of WORK
OTHERS = [SPACE.draw("others", i) for i in range(100)]

TINY = """
name: tiny
model:
  backbone: {dim: 16, depth: 2, heads: 2, patch_size: 8, mlp_ratio: 2}
  elastic: {depth: [1, 2], heads: [1, 2], dim: [8, 16]}
tasks:
  - {name: a, head: {type: margin}, loss: {cosface: {}}, input: [16, 24], samples_per_step: 8}
  - {name: b, head: {type: linear}, loss: {cross_entropy: {}}, input: [16, 16], samples_per_step: 8}
schedule: {steps: 10}
"""


def test_work_is_the_flops_of_the_module():
    """All multiply-adds but those of the pooler; they are those of the batch."""
    recipe = make_recipe(((32, 48), (32, 48)))
    recipe = dataclasses.replace(recipe, model=Model(backbone=BACKBONE, elastic=ELASTIC), tasks=[
        dataclasses.replace(task, routes={}) for task in recipe.tasks])  # fmt: skip
    for subnet in OTHERS[:20]:
        with torch.device("meta"):
            model = network(recipe, "glyphs", subnet)
            images = torch.empty(3, 3, 32, 48)
        model.pooler = None
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(images)
        found = dict(zip(WORK, work(BACKBONE, (32, 48), 3, [subnet])[0], strict=True))
        assert sum(found[name] for name in WORK if name.endswith("gflop")) == pytest.approx(
            1e-9 * counter.get_total_flops(), rel=1e-12
        )
        assert (found["call"], found["blocks"]) == (1, subnet.depth)
        assert found["tokens_melement"] == pytest.approx(1e-6 * 3 * 6 * subnet.dim * subnet.depth)
        assert found["hidden_melement"] == pytest.approx(1e-6 * 3 * 6 * sum(subnet.hidden))


def profile_of(ms_of_work, architectures) -> Profile:
    work_NW = work(BACKBONE, (64, 64), 2, architectures)
    ms_N = ms_of_work(work_NW)
    return Profile(
        machine={"name": "one"},
        versions={"torch": "2"},
        target=Target(batch_size=2),
        input=(64, 64),
        backbone=BACKBONE,
        space=SPACE,
        measurements=[Measurement(architecture=a, ms=ms) for a, ms in zip(architectures, ms_N.tolist(), strict=True)],
        coefficients=dict(zip(WORK, fit(work_NW, ms_N).tolist(), strict=True)),
        error=float(left_out_errors(work_NW, ms_N).mean()),
    )


def test_a_device_of_constant_rates_is_found_exactly():
    profile = profile_of(lambda work_NW: work_NW @ RATES, to_measure(SPACE, 40))
    wanted = work(BACKBONE, (64, 64), 2, OTHERS) @ RATES
    assert profile.predict(OTHERS) == pytest.approx(wanted, rel=1e-9)
    assert profile.error < 1e-9
    # What one subnet's blocks do can be told apart, but attention and its projections only by the width.
    assert profile.coefficients["blocks"] == pytest.approx(RATES[1], rel=1e-6)
    assert profile.coefficients["ffn_gflop"] == pytest.approx(RATES[4], rel=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_noise_is_averaged_out_and_the_error_left_out_tells_of_others(seed):
    draw = np.random.default_rng(seed)
    profile = profile_of(lambda work_NW: work_NW @ RATES * draw.normal(1, 0.05, len(work_NW)), to_measure(SPACE, 40))
    wanted = work(BACKBONE, (64, 64), 2, OTHERS) @ RATES
    noisy = wanted * draw.normal(1, 0.05, len(wanted))
    error = np.abs(profile.predict(OTHERS) / wanted - 1).mean()
    assert error < 0.03
    assert profile.error == pytest.approx(np.abs(profile.predict(OTHERS) / noisy - 1).mean(), rel=0.4)
    assert min(profile.coefficients.values()) >= 0


def test_more_work_never_takes_less_time():
    """Even where the measurements say so: those of the larger ones are a third of what they should be."""
    profile = profile_of(
        lambda work_NW: work_NW @ RATES / np.where(work_NW[:, 4] > np.median(work_NW[:, 4]), 3, 1),
        to_measure(SPACE, 40),
    )
    for subnet in OTHERS:
        wider = dataclasses.replace(subnet, hidden=tuple(2 * hidden for hidden in subnet.hidden))
        assert profile.predict([wider]) >= profile.predict([subnet])


def test_left_out_errors_are_those_of_fits_to_the_others():
    work_NW = work(BACKBONE, (64, 64), 1, to_measure(SPACE, 12))
    ms_N = work_NW @ RATES * np.random.default_rng(0).normal(1, 0.1, 12)
    found = left_out_errors(work_NW, ms_N)
    others = fit(np.delete(work_NW, 3, 0), np.delete(ms_N, 3))
    assert found[3] == pytest.approx(abs(work_NW[3] @ others / ms_N[3] - 1), rel=1e-12)


def test_those_measured_are_different_and_reach_the_ends():
    found = to_measure(SPACE, 40)
    assert len(set(found)) == 40
    assert found[:2] == [SPACE.largest, SPACE.smallest]
    assert found[:10] == to_measure(SPACE, 10)
    assert sum(len(set(subnet.heads)) == len(set(subnet.hidden)) == 1 for subnet in found) >= 20
    for subnet in found:
        SPACE.levels(subnet)
    small = SearchSpace((1, 2), (8, 16), ((),), (2,), (2.0,))
    assert set(to_measure(small, 40)) == {
        Architecture(dim, (), (2,) * depth, (2 * dim,) * depth) for dim in (8, 16) for depth in (1, 2)
    }


def test_times_are_freed_of_slow_rounds_and_interrupted_calls():
    """Rounds are up to three times slower than others, for all models alike; one call in five is interrupted."""
    draw = np.random.default_rng(0)
    seconds_N = draw.uniform(1e-3, 9e-3, 30)
    slowness_R = draw.uniform(1, 3, 41)
    times_RNC = slowness_R[:, None, None] * seconds_N[:, None] * draw.normal(1, 0.01, (41, 30, 3)).clip(0.9)
    times_RNC *= np.where(draw.random(times_RNC.shape) < 0.2, draw.uniform(2, 30, times_RNC.shape), 1)
    assert timing.typical(times_RNC) == pytest.approx(seconds_N * np.median(slowness_R), rel=0.03)


def test_models_share_memory_for_random_weights_and_compute():
    recipe = make_recipe(backbone={"mlp_ratio": 2.0})
    subnets = [Architecture(16, (), (2, 1), (32, 8)), Architecture(8, (), (1,), (8,))]
    with torch.device("meta"):
        models = [network(recipe, "glyphs", subnet) for subnet in subnets]
    timing.with_random_weights(models, Target())
    starts = {next(model.parameters()).untyped_storage().data_ptr() for model in models}
    assert len(starts) == 1
    for model in models:
        addresses = [parameter.data_ptr() - min(starts) for parameter in model.parameters()]
        assert all(address % 64 == 0 for address in addresses)
        assert len(set(addresses)) == len(addresses)
    calls = timing.prepare(models, (24, 16), Target(batch_size=2))
    outputs = [call() for call in calls]
    assert [output.shape for output in outputs] == [(2, 16), (2, 8)]
    assert all(output.isfinite().all() and output.std() > 0 for output in outputs)
    times_RNC = timing.measure(calls, Target(batch_size=2), rounds=2)
    assert times_RNC.shape == (2, 2, timing.CALLS)
    assert (times_RNC > 0).all()


def test_onnx_runtime_gives_the_same_outputs():
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    recipe = make_recipe(backbone={"stem": [8, 16], "pool": "mean"})
    with torch.device("meta"):
        model = network(recipe, "glyphs", Architecture(16, (8, 16), (2, 1), (32, 8)))
    target = Target(backend="onnx", batch_size=2)
    timing.check(target)
    timing.with_random_weights([model], target)
    with torch.no_grad():  # weights so small that outputs are hardly more than rounding
        for parameter in model.parameters():
            parameter.mul_(30)
    call, by_torch = (timing.prepare([model], (24, 16), t)[0] for t in (target, Target(batch_size=2)))
    found, wanted = call()[0].numpy(), by_torch().numpy()
    assert found == pytest.approx(wanted, abs=1e-5 * float(np.abs(wanted).max()))


@pytest.fixture
def recipe_path(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return path


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(timing, "SECONDS", 0.0)
    monkeypatch.setattr(timing, "ROUNDS", (2, 2))


def test_profile_of_a_recipe(recipe_path, tmp_path, quick, capsys):
    out = tmp_path / "profile.json"
    main([str(recipe_path), "--task", "a", "--measurements", "6", "--batch_size", "2", "--out", str(out), "--json"])
    printed = json.loads(capsys.readouterr().out)
    assert printed == {"out": str(out), **json.loads(out.read_text())}
    profile = Profile.load(out)
    assert profile.source == str(out)
    assert profile.values() == json.loads(out.read_text())
    assert profile.target == Target(batch_size=2)
    recipe = recipe_file.load(str(recipe_path))
    profile.check(recipe, "a")
    subnets = [measurement.architecture for measurement in profile.measurements]
    assert subnets == to_measure(SearchSpace.of(recipe.model), 6)
    wanted = work(profile.backbone, (16, 24), 2, subnets) @ [profile.coefficients[name] for name in WORK]
    assert profile.predict(subnets) == pytest.approx(wanted)
    main([str(recipe_path), "--task", "a", "--measurements", "3", "--out", str(out)])
    assert "3 subnets of a" in capsys.readouterr().out


def test_profile_of_a_run(recipe_path, tmp_path, quick):
    """Of a run directory only the recipe is read."""
    (tmp_path / "run").mkdir()
    recipe_path.rename(tmp_path / "run" / "recipe.yaml")
    main([str(tmp_path / "run"), "--task", "b", "--measurements", "2", "--out", str(tmp_path / "profile.json")])
    assert Profile.load(tmp_path / "profile.json").input == (16, 16)


@pytest.mark.parametrize("task", ["digits", "glyphs"])
def test_an_extracted_model(task, tmp_path, quick, capsys):
    reader = checkpoint.Reader(write_checkpoint(tmp_path / "run", make_model(make_recipe())))
    model = tmp_path / "model"
    extraction.extract(reader, spec_of(reader, task), model)
    main([str(model), "--batch_size", "4", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert 0 < found["low_ms"] <= found["ms"] <= found["high_ms"]
    assert found["images_per_second"] == pytest.approx(4e3 / found["ms"])
    main([str(model), "--task", task])
    assert "images/s" in capsys.readouterr().out
    assert "is a model of task" in error_of(capsys, [str(model), "--task", "other"])
    assert "--out" in error_of(capsys, [str(model), "--out", str(tmp_path / "profile.json")])


def error_of(capsys, arguments):
    assert run(main, arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--task", "c"], "no task 'c' in tiny; it has a, b"),
        ([], "--task: say of which task: a, b"),
        (["--task", "a", "--batch_size", "0"], "--batch_size '0': give a whole number from 1"),
        (["--task", "a", "--measurements", "1"], "--measurements '1': give a whole number from 2"),
        (["--task", "a", "--device", "cuda"], "--device cuda: torch sees no GPU"),
        (["--task", "a", "--out", "nowhere/profile.json"], "--out nowhere/profile.json: give a file in a directory"),
        (["--task", "a", "--backend", "onnx", "--dtype", "bf16"], "--dtype bf16 with --backend onnx"),
    ],
)
def test_wrong_arguments_are_one_line(recipe_path, tmp_path, capsys, more, words):
    if "cuda" in more and torch.cuda.is_available():
        pytest.skip("has a GPU")
    if "onnx" in more:
        pytest.importorskip("onnxruntime")
    out = [] if "--out" in more else ["--out", str(tmp_path / "profile.json")]
    assert words in error_of(capsys, [str(recipe_path), *more, *out])
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.yaml"]


def test_missing_libraries_and_wrong_models_are_one_line(recipe_path, tmp_path, capsys, monkeypatch):
    assert "--out: say where" in error_of(capsys, [str(recipe_path), "--task", "a"])
    out = ["--out", str(tmp_path / "profile.json")]
    assert "no run directory" in error_of(capsys, [str(tmp_path), "--task", "a", *out])
    for text, words in (("{depth: [2]}", "one subnet only"), (None, "no subnets without model.elastic")):
        elastic = "{depth: [1, 2], heads: [1, 2], dim: [8, 16]}"
        recipe_path.write_text(TINY.replace(elastic, text) if text else TINY.replace(f"  elastic: {elastic}\n", ""))
        assert words in error_of(capsys, [str(recipe_path), "--task", "a", *out])
    monkeypatch.setattr(onnx_export, "find_spec", lambda name: None if name == "onnxscript" else object())
    onnx = error_of(capsys, [str(recipe_path), "--task", "a", "--backend", "onnx", *out])
    assert "needs onnxscript: pip install 'ufo_ds[onnx]'" in onnx
    assert not (tmp_path / "profile.json").exists()


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("depth: 2", "depth: 1", "backbone.depth 2, that of task a has 1"),
        ("heads: 2,", "heads: 2, head_dim: 4,", "backbone.head_width 8, that of task a has 4"),
        ("heads: [1, 2]", "heads: [2]", "elastic heads (1, 2), that of task a has (2,)"),
        ("[16, 24]", "[16, 16]", "input (16, 24), that of task a has (16, 16)"),
        ("mlp_ratio: 2", "mlp_ratio: 3", "backbone.mlp_ratio 2.0, that of task a has 3.0"),
    ],
)
def test_a_profile_of_another_model_is_refused(recipe_path, tmp_path, quick, old, new, words):
    out = tmp_path / "profile.json"
    main([str(recipe_path), "--task", "a", "--measurements", "2", "--out", str(out)])
    assert old in TINY
    text = TINY.replace(old, new).replace("depth: [1, 2]", "depth: [1]" if new == "depth: 1" else "depth: [1, 2]")
    recipe_path.write_text(text)
    with pytest.raises(UserError) as caught:
        Profile.load(out).check(recipe_file.load(str(recipe_path)), "a")
    assert words in str(caught.value)
    assert str(caught.value).startswith(str(out))


def test_a_file_that_is_no_profile_is_refused(recipe_path, tmp_path, quick):
    path = tmp_path / "profile.json"
    with pytest.raises(UserError, match="No such file"):
        Profile.load(path)
    main([str(recipe_path), "--task", "a", "--measurements", "2", "--out", str(path)])
    values = json.loads(path.read_text())
    for change, words in (
        ({"coefficients": {"call": 1.0}}, "has other coefficients than call, blocks"),
        ({"measurements": []}, "is no device profile: measurements"),
        ({"error": "much"}, "is no device profile: error"),
        ({"more": 1}, "is no device profile: more"),
    ):
        path.write_text(json.dumps({**values, **change}))
        with pytest.raises(UserError) as caught:
            Profile.load(path)
        assert words in str(caught.value)
    path.write_text("nothing")
    with pytest.raises(UserError, match="is no device profile: the file"):
        Profile.load(path)
