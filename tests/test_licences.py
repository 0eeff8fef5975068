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
from ufo_ds.recipe import only
from ufo_ds.subnets.licences import UNKNOWN, Origin, behind, check_commercial_use, origin, permits_commercial_use

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


def started(reader, tmp_path, licences, **about):
    """The checkpoint of a run of one task that started from another run's."""
    task_recipe = make_recipe(init=str(reader.directory))
    licences, first = origin(licences, None, reader.directory)
    path = write_checkpoint(tmp_path, make_model(task_recipe), licences=licences, started_from=first, **about)
    return Reader(path)


def test_a_run_inherits_the_licences_of_what_it_started_from(tmp_path, reader):
    """Of all tasks, whether it goes on with them or not, and again of its own start."""
    second = started(reader, tmp_path / "second", {"digits": ["CC0-1.0", "MIT"]})
    wanted = {"digits": ["CC0-1.0", "MIT", "CC BY 4.0 (of somebody)"], "glyphs": LICENCES["glyphs"]}
    assert origin({"digits": ["MIT"]}, second.index, None).started_from == str(reader.directory)
    assert behind(second.index, only(second.recipe, ["digits"]), path_of(second, "digits", "shared")) == wanted
    own = path_of(second, "digits", "own")
    assert behind(second.index, second.recipe, own) == {"digits": wanted["digits"]}
    check_commercial_use(second.index, second.recipe, own)
    third = started(second, tmp_path / "third", {"digits": ["ISC"]}, step=11)
    assert third.index.licences == {"digits": ["ISC", *wanted["digits"]], "glyphs": LICENCES["glyphs"]}
    check_commercial_use(third.index, third.recipe, own)
    with pytest.raises(UserError, match=r"'CC BY-NC 4\.0' of the images of glyphs"):
        check_commercial_use(third.index, third.recipe, path_of(third, "digits", "shared"))
    assert origin({"digits": ["MIT"]}, None, None) == Origin({"digits": ["MIT"]}, "")


@pytest.mark.parametrize(
    ("model", "inherited"), [({"init": "some/vit"}, [UNKNOWN]), ({"branch_at": 5}, ["CC BY-NC 4.0"])]
)
def test_what_was_mixed_in_before_stays_so(tmp_path, reader, model, inherited):
    """A ViT of unknown images at the very beginning; a start from what all tasks had shared."""
    first = write_checkpoint(tmp_path / "first", make_model(make_recipe(**model)), licences=LICENCES)
    second = started(Reader(first), tmp_path / "second", {"digits": ["CC BY 4.0 (of somebody)"]})
    assert second.index.licences["digits"] == [*LICENCES["digits"], *inherited]
    with pytest.raises(UserError, match=f"the licence '{inherited[0]}' of the images of digits"):
        check_commercial_use(second.index, second.recipe, path_of(second, "digits", "own"))


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
