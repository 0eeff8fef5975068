"""Licences of the images behind a path: whose they are, and what they permit."""

import dataclasses
import shutil

import pytest

from tests.small_run import make_model, make_recipe, write_checkpoint
from ufo_ds import extract
from ufo_ds.checkpoint import Reader
from ufo_ds.errors import UserError
from ufo_ds.model.loading import spec_of
from ufo_ds.model.spec import SubnetSpec
from ufo_ds.subnets.licences import UNKNOWN, behind, check_commercial_use, permits_commercial_use

LICENCES = {"digits": ["CC BY 4.0 (of somebody)", "MIT"], "glyphs": ["CC BY-NC 4.0"]}


@pytest.mark.parametrize(
    ("licence", "permitted"),
    [
        *((name, True) for name in (
            "MIT", "MIT licence", "Apache-2.0", "Apache License 2.0", "BSD-3-Clause", "BSD 2-Clause", "CC0 1.0",
            "CC0-1.0", "CC BY 4.0 (UCI digits)", "CC-BY-SA-4.0", "cc-by-4.0", "ODbL v1.0", "public domain", "PDDL",
        )),
        *((name, False) for name in (
            "unknown", "none", "", "CC BY-NC 4.0", "CC-BY-NC-SA-4.0", "CC BY-ND 4.0", "MIT-like", "not MIT",
            "no formal licence, credit to AT&T", "BSD, for research only", "CC BY 4.0, non-commercial use", "GPL-3.0",
            "MITRE", "research use", "CC BY 4.0; academic purposes",
        )),
    ],
)  # fmt: skip
def test_what_a_licence_permits(licence, permitted):
    assert permits_commercial_use(licence) is permitted


@pytest.fixture
def reader(tmp_path):
    model = make_model(make_recipe())
    return Reader(write_checkpoint(tmp_path / "run" / "checkpoints", model, licences=LICENCES))


def path_of(reader, task: str, route: str) -> SubnetSpec:
    spec = spec_of(reader, task)
    return dataclasses.replace(spec, routes={unit: (route,) * len(layers) for unit, layers in spec.routes.items()})


def test_whose_images_are_behind_a_path(reader):
    recipe, index = reader.recipe, reader.index
    own, shared = path_of(reader, "digits", "own"), path_of(reader, "digits", "shared")
    assert behind(index, recipe, own) == {"digits": LICENCES["digits"]}
    assert behind(index, recipe, shared) == LICENCES
    one = dataclasses.replace(own, routes={**own.routes, "norm": (*own.routes["norm"][:-1], "shared")})
    assert behind(index, recipe, one) == LICENCES
    branched = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, branch_at=5))
    assert behind(index, branched, own) == LICENCES
    assert behind(dataclasses.replace(index, licences={}), recipe, own) == {"digits": [UNKNOWN]}


def test_what_is_not_permitted_is_refused(reader):
    check_commercial_use(reader.index, reader.recipe, path_of(reader, "digits", "own"))
    with pytest.raises(
        UserError, match=r"'CC BY-NC 4\.0' of the images of glyphs \(which shares weights with digits\)"
    ):
        check_commercial_use(reader.index, reader.recipe, path_of(reader, "digits", "shared"))
    with pytest.raises(UserError, match=r"of the images of glyphs is not known"):
        check_commercial_use(reader.index, reader.recipe, path_of(reader, "glyphs", "own"))
    started = dataclasses.replace(reader.recipe, model=dataclasses.replace(reader.recipe.model, init="some/vit"))
    with pytest.raises(UserError, match=r"started from 'some/vit'"):
        check_commercial_use(reader.index, started, path_of(reader, "digits", "own"))


def test_the_command_refuses_before_it_writes(tmp_path, reader):
    run, out = tmp_path / "run", tmp_path / "out"
    with pytest.raises(UserError, match=r"^--allow commercial: [^\n]*$"):
        extract.main([str(run), "--task", "digits", "--out", str(out), "--allow", "commercial"])
    assert not out.exists()
    extract.main([str(run), "--task", "digits", "--out", str(out)])
    card = (out / "README.md").read_text()
    assert "| digits | CC BY 4.0 (of somebody); MIT |" in card
    assert "| glyphs | CC BY-NC 4.0 |" in card
    shutil.rmtree(run)
    free = {"digits": ["MIT"], "glyphs": ["CC0-1.0"]}
    write_checkpoint(run / "checkpoints", make_model(make_recipe()), licences=free)
    extract.main([str(run), "--task", "digits", "--out", str(tmp_path / "free"), "--allow", "commercial"])
    assert (tmp_path / "free" / "model.safetensors").exists()
