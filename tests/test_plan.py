"""`ufo plan`: figures that are known otherwise, what would fit, and wrong input."""

import json
from pathlib import Path

import pytest

from ufo_ds import plan
from ufo_ds.errors import run

SHIPPED = ["--recipe", "ufo2_17b", "--deepspeed", "ds_configs/moe_17b.json"]


def figures(capsys, *more: str) -> dict:
    plan.main([*SHIPPED, *more, "--json"])
    return json.loads(capsys.readouterr().out)


def test_published_construction(capsys):
    """27 x 630.9 M parameters; forward and backward pass 1.28 TFLOP an image; all bytes of all ranks are those of the
    whole model."""
    found = figures(capsys, "--world_size", "64")
    assert found["parameters"]["without_heads"] == 27 * found["tasks"]["face"]["path_parameters"]
    assert found["tasks"]["face"]["path_parameters"] == pytest.approx(630.9e6, rel=1e-4)
    assert 3 * found["tasks"]["svhn"]["flops_per_image"] == pytest.approx(1.28e12, rel=1e-2)
    assert found["images_per_step"] == 7168
    # Every rank has as many slots as the fullest: own copies shared by the ranks that hold them, the shared one by all.
    slots = max(len(rank["tasks"]) for rank in found["ranks"])
    copies = found["tasks"]["face"]["path_parameters"] * (slots * found["ep_size"] + 1) / 64
    largest_head = found["tasks"]["face"]["head_parameters"] * found["ep_size"] / 64
    for rank in found["ranks"]:
        assert copies <= rank["memory"]["master"] / 4 <= copies + slots * largest_head
        assert rank["memory"]["parameters"] * 2 == rank["memory"]["master"]


def test_what_fits_fits(capsys, tmp_path):
    """Where settings do not fit, the remedies do, and half as many ranks as they say do not."""
    small = ["--gpu", "a100-40", "--world_size"]
    short = figures(capsys, *small, "32")
    assert not short["fits"]
    assert short["what_fits"]
    for line in short["what_fits"]:
        key, value = line.split()
        if key == "--world_size":
            assert figures(capsys, *small, value)["fits"]
            assert not figures(capsys, *small, str(int(value) // 2))["fits"]
        elif key.startswith("--"):
            assert figures(capsys, *small, "32", key, value)["fits"]
        else:
            values = json.loads(Path("ds_configs/moe_17b.json").read_text())
            (tmp_path / "ds.json").write_text(json.dumps({**values, key: int(value)}))
            assert figures(capsys, *small, "32", "--deepspeed", str(tmp_path / "ds.json"))["fits"]


def test_recomputation_costs_a_forward_pass_and_saves_activations(capsys):
    once = figures(capsys, "--world_size", "64")
    again = figures(capsys, "--world_size", "64", "--model.activation_checkpointing", "full")
    # All but the embedding and the head are blocks, and backward takes twice the forward pass.
    assert again["flops_per_step"] == pytest.approx(once["flops_per_step"] * 4 / 3, rel=5e-3)
    for before, after in zip(once["ranks"], again["ranks"], strict=True):
        # Of 31 blocks the inputs are left, a sixteenth: 18 x 18 + 1 tokens of 1280 bf16 numbers for each image of the
        # four micro-batches.
        saved = before["memory"]["activations"] - after["memory"]["activations"]
        assert saved == pytest.approx(31 * 15 * before["images"] / 4 * 325 * 1280 * 2, rel=0.05)
        for key in ("parameters", "gradients", "optimizer_state", "reduction_buffer"):
            assert after["memory"][key] == before["memory"][key]


def test_a_step_of_several_subnets_costs_what_each_does(capsys):
    whole = figures(capsys, "--world_size", "64")
    two = figures(capsys, "--world_size", "64", "--model.elastic", "{depth: [16, 32], random: 0}")  # one of half depth
    assert two["flops_per_step"] == pytest.approx(1.5 * whole["flops_per_step"], rel=5e-3)
    drawn = figures(capsys, "--world_size", "64", "--model.elastic", "{depth: [16, 32], sampling: random}")
    assert drawn["flops_per_step"] == pytest.approx(0.75 * whole["flops_per_step"], rel=5e-2)
    for before, after, one in zip(whole["ranks"], two["ranks"], drawn["ranks"], strict=True):
        kept = before["memory"]["activations"]
        assert 1.85 * kept < after["memory"]["activations"] <= 2 * kept  # a bound; the heads' weights are there once
        assert one["memory"] == before["memory"]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--gpu", "v100"], ["'v100'", "h200"]),
        (["--world_size", "12"], ["12", "--gpus_per_node 8"]),
        (["--world_size", "many"], ["--world_size", "'many'"]),
        (["--world_size", "0"], ["--world_size", "'0'"]),
        (["--recipe", "nothing.yaml"], ["nothing.yaml"]),
        (["--deepspeed", "nothing.json"], ["nothing.json"]),
        (["--recipe", "allinone_vit_l", "--deepspeed", "ds_configs/moe.json", "--gradient", "3"], ["--gradient"]),
    ],
)
def test_wrong_input(capsys, more, words):
    assert run(plan.main, [*SHIPPED, *more]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert all(word in error for word in words), error


def test_uncounted_settings_are_refused(capsys, tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}))
    assert run(plan.main, [*SHIPPED, "--deepspeed", str(path)]) == 2
    assert "offload_optimizer" in capsys.readouterr().err


def test_text_is_narrow(capsys):
    plan.main([*SHIPPED, "--world_size", "32", "--gpu", "a100-40"])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    assert any(line.startswith("DOES NOT FIT") for line in lines)
