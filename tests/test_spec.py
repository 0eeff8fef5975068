"""SubnetSpec: its file, and wrong ones."""

import dataclasses
import json

import pytest

from ufo_ds.errors import UserError
from ufo_ds.model.architecture import Architecture
from ufo_ds.model.spec import SubnetSpec

SPEC = SubnetSpec(
    "a",
    {"embed": ("own",), "norm": ("shared",) * 3, "attn": ("shared", "own"), "ffn": ("own", "shared")},
    Architecture(dim=24, stem=(4, 8), heads=(2, 1), hidden=(72, 48)),
)
SIZES = json.loads(json.dumps(dataclasses.asdict(SPEC.architecture)))


def test_a_spec_survives_its_file(tmp_path):
    file = tmp_path / "spec.json"
    file.write_text(SPEC.to_json())
    assert SubnetSpec.load(file) == SPEC
    assert json.loads(file.read_text()) == {
        "task": "a",
        "routes": {"embed": ["own"], "norm": ["shared"] * 3, "attn": ["shared", "own"], "ffn": ["own", "shared"]},
        "architecture": {"dim": 24, "stem": [4, 8], "heads": [2, 1], "hidden": [72, 48]},
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": 3}, "it needs the keys task, routes, architecture, nothing else"),
        ({"task": ...}, "it needs the keys task, routes, architecture, nothing else"),
        ({"routes": ["own"]}, "routes needs the units embed, norm, attn, ffn"),
        ({"routes": {"ffn": ["own"]}}, "routes needs the units embed, norm, attn, ffn"),
        ({"routes": {**SPEC.routes, "mlp": ["own"]}}, "routes needs the units embed, norm, attn, ffn"),
        ({"routes": {**SPEC.routes, "ffn": ["own", "learned"]}}, "route 'learned' of ffn: use shared or own"),
        ({"routes": {**SPEC.routes, "ffn": "own"}}, "ffn"),
        ({"routes": {**SPEC.routes, "ffn": 2}}, "ffn"),
        ({"routes": {**SPEC.routes, "ffn": None}}, "ffn"),
        ({"architecture": {**SIZES, "dim": 0}}, "dim of the architecture is 0: give a positive whole number"),
        ({"architecture": {**SIZES, "heads": [2, 1.0]}}, "heads of the architecture is [2, 1.0]: give a list"),
        ({"architecture": {**SIZES, "stem": 4}}, "stem of the architecture is 4: give a list"),
        ({"architecture": {**SIZES, "hidden": [48]}}, "2 heads and 1 hidden of the architecture: give one of each"),
        ({"architecture": {"dim": 24}}, "architecture needs the keys dim, stem, heads, hidden, nothing else"),
    ],
)
def test_a_wrong_spec_ends_in_one_line(tmp_path, change, message):
    values = {key: value for key, value in {**json.loads(SPEC.to_json()), **change}.items() if value is not ...}
    file = tmp_path / "spec.json"
    file.write_text(json.dumps(values))
    with pytest.raises(UserError) as caught:
        SubnetSpec.load(file)
    assert str(file) in str(caught.value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"\xff\xfe\x00"])
def test_what_is_not_json_is_no_spec(tmp_path, content):
    file = tmp_path / "spec.json"
    file.write_bytes(content)
    with pytest.raises(UserError, match="is no subnet spec"):
        SubnetSpec.load(file)


def test_a_missing_file_is_no_spec(tmp_path):
    with pytest.raises(UserError, match=r"none\.json is no subnet spec"):
        SubnetSpec.load(tmp_path / "none.json")
