"""A supernet that starts from a run, or from a model cut out of one, is that model before its first step."""

import dataclasses
import json
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.small_run import CLASSES, PATHS, make_images, make_model, make_recipe, outputs_of, relative, write_checkpoint
from ufo_ds import plan, recipe_file
from ufo_ds.checkpoint import Reader, of_run
from ufo_ds.errors import UserError
from ufo_ds.errors import run as entry
from ufo_ds.model.architecture import Architecture
from ufo_ds.model.loading import spec_of
from ufo_ds.model.spec import routes_of
from ufo_ds.model.starting import opening
from ufo_ds.model.supernet import Supernet, init_weights
from ufo_ds.recipe import only
from ufo_ds.subnets import extraction, joint

NUM_CLASSES = {name: len(names) for name, names in CLASSES.items()}
UNUSUAL = {"stem": [8, 12], "pool": "mean", "heads": [2, 1], "head_dim": 4, "mlp_ratio": [2.0, 3.0]}


def begun(recipe) -> Supernet:
    """As a run of this recipe begins."""
    recipe, start = opening(recipe, NUM_CLASSES)
    with torch.device("meta"):
        model = Supernet(recipe, {task.name: NUM_CLASSES[task.name] for task in recipe.tasks})
    init_weights(model, pretrained=start.values)
    for name, value in start.buffers.items():
        model.get_buffer(name).copy_(value)
    return model.eval()


def with_tasks(recipe, **of_tasks):
    """The recipe with these values of tasks."""
    tasks = [dataclasses.replace(task, **of_tasks.get(task.name, {})) for task in recipe.tasks]
    return dataclasses.replace(recipe, tasks=tasks)


def learning(init, **model):
    """The recipe of the run, its routes to be learned."""
    recipe = make_recipe(init=str(init), routes={"embed": "learned", "ffn": "learned"}, **model)
    return with_tasks(recipe, digits={"routes": {}}, glyphs={"routes": {}})


# --- from a run -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", [{}, UNUSUAL])
def test_a_model_starts_as_the_run(tmp_path, backbone):
    model = make_model(make_recipe(backbone=backbone))
    write_checkpoint(tmp_path / "checkpoints", model)
    found = begun(learning(tmp_path, backbone=backbone))
    assert found.routes == model.routes
    assert not found.learns_routes
    wanted = model.state_dict()
    assert found.state_dict().keys() == wanted.keys()
    for name, value in found.state_dict().items():
        assert torch.equal(value, wanted[name]), name
    assert wanted["heads.glyphs.neck.running_var"].std() > 0


def test_some_tasks_of_a_run(tmp_path, model):
    path = write_checkpoint(tmp_path, model)
    found = begun(only(learning(path), ["glyphs"]))  # a checkpoint is as good as its run
    wanted = model.state_dict()
    assert set(found.tasks) == {"glyphs"}
    assert all(torch.equal(value, wanted[name]) for name, value in found.state_dict().items())
    assert outputs_of(found, "glyphs", make_images()).logits.equal(outputs_of(model, "glyphs", make_images()).logits)


def test_routes_still_being_learned_are_the_more_probable_ones(tmp_path):
    model = make_model(make_recipe(experts=["attn", "embed", "ffn"], routes={"attn": "learned"}))
    with torch.no_grad():
        model.router.logits["digits"].copy_(torch.tensor([[0.0, 1.0], [2.0, 1.0]]))
        model.router.logits["glyphs"].copy_(torch.tensor([[0.0, 0.0], [-2.0, -1.0]]))
    write_checkpoint(tmp_path, model)
    recipe = make_recipe(
        experts=["attn", "embed", "ffn"], routes={"attn": "learned"}, init=str(tmp_path / "step-00000010")
    )
    found = begun(recipe)
    assert found.routes["digits"]["attn"] == ("own", "shared")
    assert found.routes["glyphs"]["attn"] == ("shared", "own")
    for task in CLASSES:
        assert (
            relative(outputs_of(found, task, make_images()).logits, outputs_of(model, task, make_images()).logits)
            < 1e-6
        )


def test_a_run_goes_on_without_what_it_started_from(tmp_path, model):
    write_checkpoint(tmp_path / "first" / "checkpoints", model)
    recipe = learning(tmp_path / "first")
    resolved, start = opening(recipe, NUM_CLASSES)
    assert start.checkpoint == tmp_path / "first" / "checkpoints" / "step-00000010"
    with torch.device("meta"):
        second = Supernet(resolved, NUM_CLASSES)
    init_weights(second)
    last = write_checkpoint(tmp_path / "second", second, step=3)
    shutil.rmtree(tmp_path / "first")
    assert opening(recipe, NUM_CLASSES, last) == (resolved, None)
    assert opening(resolved, NUM_CLASSES, last) == (resolved, None)
    with pytest.raises(UserError, match=r"^model.init [^\n]* is neither a run nor a ViT[^\n]*$"):
        opening(recipe, NUM_CLASSES)


def test_routes_that_are_learned_stay_so_where_a_run_goes_on(tmp_path):
    """Of one that started from a ViT."""
    recipe = learning("somewhere/vit")
    with torch.device("meta"):
        model = Supernet(recipe, NUM_CLASSES)
    init_weights(model)
    assert opening(recipe, NUM_CLASSES, write_checkpoint(tmp_path, model)) == (recipe, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backbone": {"dim": 32}}, "has dim 16, model.backbone 32: make"),
        ({"backbone": {"depth": 3}}, "has depth 2, model.backbone 3: make"),
        ({"backbone": {"heads": 4}}, "has heads 2, model.backbone 4: make"),
        ({"backbone": {"head_dim": 4}}, "has head_dim 8, model.backbone 4: make"),
        ({"backbone": {"mlp_ratio": [4, 2]}}, "has dim x mlp_ratio 64, model.backbone [64, 32]: make"),
        ({"backbone": {"patch_size": 4}}, "has patch_size 8, model.backbone 4: make"),
        ({"backbone": {"stem": [8]}}, "has stem [], model.backbone [8]: make"),
        ({"backbone": {"pool": "mean"}}, "has pool cls, model.backbone mean: make"),
        ({"backbone": {"layer_norm_eps": 1e-5}}, "has layer_norm_eps 1e-06, model.backbone 1e-05: make"),
        ({"experts": ["norm", "ffn"]}, "has own copies of embed, ffn, model.experts is norm, ffn: remove norm"),
        ({"branch_at": 7}, "model.branch_at 7 with model.init"),
        ({"input": [32, 16]}, "has model.input (default: the first task's) [16, 16], the recipe [32, 16]: make"),
        ({"inputs": ((16, 16), (24, 24))}, "has tasks.glyphs.input [24, 16], the recipe [24, 24]: make"),
        ({"routes": {"ffn": "shared"}}, "routes ffn of digits own shared, the recipe shared shared: say"),
    ],
)  # fmt: skip
def test_another_model_than_the_runs_is_refused(run, change, message):
    values = {"routes": {"ffn": "learned"}, **change}
    backbone, inputs = values.pop("backbone", {}), values.pop("inputs", ((16, 16), (24, 16)))
    recipe = with_tasks(make_recipe(inputs, init=str(run), **values), digits={"routes": {}}, glyphs={"routes": {}})
    backbone = dataclasses.replace(recipe.model.backbone, **backbone)
    recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, backbone=backbone))
    with pytest.raises(UserError) as caught:
        opening(recipe, NUM_CLASSES)
    assert message in str(caught.value)
    assert "model.init" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_tasks_than_the_runs_are_refused(run):
    recipe = learning(run)
    head = dataclasses.replace(recipe.tasks[0].head, neck=True)
    for wrong, classes, message in [
        (with_tasks(recipe, glyphs={"name": "letters"}), {}, r"has the tasks digits, glyphs, not letters: "),
        (recipe, {"glyphs": 5}, r"has classes of glyphs 4, the recipe 5: make"),
        (with_tasks(recipe, digits={"head": head}), {}, r"has tasks\.digits\.head\.neck False, the recipe True: make"),
        (
            with_tasks(recipe, digits={"head": recipe.tasks[1].head, "loss": recipe.tasks[1].loss}), {},
            r"has tasks\.digits\.head\.type linear, the recipe margin: make",
        ),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=rf"^model\.init [^\n]* {message}[^\n]*$"):
            opening(wrong, NUM_CLASSES | classes)


def test_a_run_without_a_checkpoint_is_refused(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match=r"^[^\n]* is no run directory with a checkpoint[^\n]*$"):
        opening(learning(tmp_path), NUM_CLASSES)


def test_subnets_of_several_tasks_are_refused(tmp_path, run):
    """Their tasks are of different sizes."""
    reader = Reader(of_run(run))
    joint.extract(reader, [spec_of(reader, task) for task in CLASSES], tmp_path / "both", {})
    with pytest.raises(
        UserError, match=r"^model\.init [^\n]* holds subnets of digits, glyphs, no whole model: [^\n]*$"
    ):
        opening(learning(tmp_path / "both"), NUM_CLASSES)


def test_a_subnet_is_the_whole_of_a_smaller_model(tmp_path):
    """Cut out of an elastic model whose blocks then differ, trained on as a model of its own."""
    elastic = {"depth": [1, 2], "dim": [8, 16], "heads": [1, 2], "mlp_ratio": [1, 2]}
    model = make_model(make_recipe(backbone={"mlp_ratio": 2}, elastic=elastic))
    reader = Reader(write_checkpoint(tmp_path / "checkpoints", model))
    spec = spec_of(reader, "digits").sliced(Architecture(8, (), (2, 1), (8, 16)))
    extraction.extract(reader, spec, tmp_path / "digits", {})
    backbone = {"dim": 8, "heads": [2, 1], "head_dim": 8, "mlp_ratio": [1, 2]}
    found = begun(make_recipe(backbone=backbone, init=str(tmp_path / "digits")))
    model.architectures = {"digits": spec.architecture}
    wanted = outputs_of(model, "digits", make_images())
    for a, b in zip(wanted, outputs_of(found, "digits", make_images()), strict=True):
        assert relative(b, a) < 1e-5


def test_a_plan_knows_the_routes_of_a_run(tmp_path, run, capsys):
    """No router, and own copies that no task takes are not counted as computed."""
    recipe = learning(run)
    classes = {name: {"num_classes": count} for name, count in NUM_CLASSES.items()}
    figures = {}
    for name, init in (("found", str(run)), ("learned", None)):
        changed = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, init=init))
        file = tmp_path / f"{name}.yaml"
        file.write_text(recipe_file.to_yaml(with_tasks(changed, **classes)))
        plan.main(["--recipe", str(file), "--deepspeed", "ds_configs/moe.json", "--json"])
        figures[name] = json.loads(capsys.readouterr().out)
    assert figures["found"]["parameters"]["routers"] == 0
    assert figures["learned"]["parameters"]["routers"] == 2 * 2 * 3  # of two tasks, one embedding and two FFNs
    for key in ("shared", "heads"):
        assert figures["found"]["parameters"][key] == figures["learned"]["parameters"][key]
    words = [
        "--recipe",
        str(tmp_path / "found.yaml"),
        "--deepspeed",
        "ds_configs/moe.json",
        "--model.backbone.dim",
        "32",
    ]
    assert entry(plan.main, words) == 2
    assert "has dim 16, model.backbone 32" in capsys.readouterr().err


# --- from an extracted model ------------------------------------------------------------------------------------------


def extracted_again(tmp_path, found, task):
    reader = Reader(write_checkpoint(tmp_path / "again", found))
    extraction.extract(reader, spec_of(reader, task), tmp_path / f"{task}-again")
    return tmp_path / f"{task}-again"


@pytest.mark.parametrize("route", ["shared", "own"])
@pytest.mark.parametrize("task", CLASSES)
@pytest.mark.parametrize("backbone", [{}, {"stem": [8, 12], "pool": "mean"}, {"heads": 1, "head_dim": 4}, UNUSUAL])
def test_an_extracted_model_goes_in_and_comes_out_again(tmp_path, backbone, task, route):
    """Every weight to the bit, but those in which a neck's statistics are."""
    model = make_model(make_recipe(backbone=backbone))
    reader = Reader(write_checkpoint(tmp_path / "checkpoints", model))
    extraction.extract(reader, spec_of(reader, task), tmp_path / task)
    size = next(t.input for t in model.recipe.tasks if t.name == task)
    recipe = make_recipe(backbone=backbone, init=str(tmp_path / task), input=list(size))
    routes = {"embed": route, "ffn": route}
    found = begun(with_tasks(recipe, digits={"routes": routes}, glyphs={"routes": routes}))
    first, again = (
        load_file(p / "model.safetensors") for p in (tmp_path / task, extracted_again(tmp_path, found, task))
    )
    assert again.keys() == first.keys()
    for name, value in first.items():
        if "pooler" in name:
            torch.testing.assert_close(again[name], value, rtol=1e-6, atol=1e-7)
        else:
            assert torch.equal(again[name], value), name
    for a, b in zip(outputs_of(model, task, make_images()), outputs_of(found, task, make_images()), strict=True):
        if a.shape[1] == 16 or task == "digits":  # the classifier of a margin head is not in the model
            assert relative(b, a) < 1e-5
    if task == "glyphs":
        assert found.heads["glyphs"].classifier.weight.std().item() == pytest.approx(0.01, rel=0.5)  # drawn


def test_a_linear_heads_neck_comes_out_of_its_classifier(tmp_path):
    recipe = make_recipe()
    neck = {"digits": {"head": dataclasses.replace(recipe.tasks[0].head, neck=True)}}
    model = make_model(with_tasks(recipe, **neck))
    assert model.heads["digits"].neck.running_var.std() > 0
    reader = Reader(write_checkpoint(tmp_path / "checkpoints", model))
    extraction.extract(reader, spec_of(reader, "digits"), tmp_path / "digits")
    found = begun(with_tasks(make_recipe(init=str(tmp_path / "digits")), **neck))
    wanted = outputs_of(model, "digits", make_images())
    for a, b in zip(wanted, outputs_of(found, "digits", make_images()), strict=True):
        assert relative(b, a) < 1e-6
    head, before = found.heads["digits"], model.heads["digits"]
    for a, b in [
        (before.neck.running_mean, head.neck.running_mean), (before.neck.running_var, head.neck.running_var),
        (before.classifier.weight, head.classifier.weight), (before.classifier.bias, head.classifier.bias),
    ]:  # fmt: skip
        assert relative(b, a) < 1e-5  # what was folded is as it was before
    first, again = (load_file(p / "model.safetensors")
                    for p in (tmp_path / "digits", extracted_again(tmp_path, found, "digits")))  # fmt: skip
    for name, value in first.items():
        if "pooler" in name or "classifier" in name:
            torch.testing.assert_close(again[name], value, rtol=1e-6, atol=1e-6)
        else:
            assert torch.equal(again[name], value), name


def test_a_margin_heads_neck_has_the_same_effect(tmp_path):
    """Whatever its scale: 1 is what it starts from again, but for the sign, and a channel that is off stays off."""
    model = make_model(make_recipe())
    with torch.no_grad():
        model.heads["glyphs"].neck.weight.copy_(torch.linspace(-1.5, 1.5, 16))
        model.heads["glyphs"].neck.weight[3] = 0.0
    reader = Reader(write_checkpoint(tmp_path / "checkpoints", model))
    extraction.extract(reader, spec_of(reader, "glyphs"), tmp_path / "glyphs")
    found = begun(make_recipe(init=str(tmp_path / "glyphs"), input=[24, 16]))
    assert found.routes == {task: routes_of(found.recipe, task) for task in PATHS}
    wanted = outputs_of(model, "glyphs", make_images()).embedding
    assert relative(outputs_of(found, "glyphs", make_images()).embedding, wanted) < 1e-6
    scale = found.heads["glyphs"].neck.weight.tolist()
    assert scale == pytest.approx([-1] * 3 + [0] + [-1] * 4 + [1] * 8, abs=1e-6)


@pytest.mark.parametrize("task", CLASSES)
def test_any_elements_are_those_of_the_whole(tmp_path, task):
    """Of everything that there is, heads and stems too: ranks read parts."""
    recipe = make_recipe(backbone={"stem": [8, 12]})
    recipe = with_tasks(recipe, digits={"head": dataclasses.replace(recipe.tasks[0].head, neck=True)})
    reader = Reader(write_checkpoint(tmp_path / "checkpoints", make_model(recipe)))
    extraction.extract(reader, spec_of(reader, task), tmp_path / task)
    recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, init=str(tmp_path / task)))
    _, start = opening(recipe, NUM_CLASSES)
    with torch.device("meta"):
        model = Supernet(recipe, NUM_CLASSES)
    draw, found = random.Random(0), set()
    for name, parameter in model.named_parameters():
        whole = start.values(name, parameter.shape, range(parameter.numel()))
        for _ in range(5):
            first, last = sorted(draw.sample(range(parameter.numel() + 1), 2))
            part = start.values(name, parameter.shape, range(first, last))
            assert (part is None) == (whole is None)
            if whole is not None:
                found.add(name)
                torch.testing.assert_close(part, whole[first:last], rtol=1e-6, atol=1e-7)
    drawn = {name for name, _ in model.named_parameters()} - found
    others = {"digits": ["glyphs.classifier.weight", "glyphs.neck.weight"],
              "glyphs": ["digits.classifier.weight", "digits.classifier.bias", "glyphs.classifier.weight"]}  # fmt: skip
    assert drawn == {f"heads.{name}" for name in others[task]}


def test_a_task_of_another_name_takes_the_backbone_alone(tmp_path, extracted, model):
    recipe = with_tasks(make_recipe(init=str(extracted / "digits")), digits={"name": "numbers"})
    resolved, start = opening(recipe, NUM_CLASSES)
    assert resolved == recipe
    assert not start.buffers
    assert start.values("heads.numbers.classifier.weight", torch.Size([3, 16]), range(48)) is None
    bias = start.values("blocks.1.ffn.own.glyphs.fc1.bias", torch.Size([64]), range(5, 64))
    assert torch.equal(bias, model.state_dict()["blocks.1.ffn.shared.fc1.bias"][5:])


def test_another_head_than_the_models_is_refused(extracted):
    recipe = make_recipe(init=str(extracted / "digits"))
    head = dataclasses.replace(recipe.tasks[0].head, neck=True)
    for wrong, classes, message in [
        (recipe, 7, "has classes of the head of digits 3, the recipe 7"),
        (with_tasks(recipe, digits={"head": head}), 3, "has neck of the head of digits False, the recipe True"),
        (
            with_tasks(recipe, digits={"head": recipe.tasks[1].head, "loss": recipe.tasks[1].loss}), 3,
            "has type of the head of digits linear, the recipe margin",
        ),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=rf"^model\.init [^\n]* {message}: make them equal$"):
            opening(wrong, NUM_CLASSES | {"digits": classes})


def test_a_model_that_lacks_something_is_refused(tmp_path, extracted):
    copied = shutil.copytree(extracted / "glyphs", tmp_path / "glyphs")
    state = load_file(copied / "model.safetensors")
    save_file({name: x for name, x in state.items() if name != "pooler.dense.bias"}, copied / "model.safetensors")
    with pytest.raises(UserError, match=r"^model\.init [^\n]* has no elements of pooler\.dense\.bias, [^\n]* 16$"):
        opening(make_recipe(init=str(copied), input=[24, 16]), NUM_CLASSES)
    recipe = make_recipe(init=str(extracted / "glyphs"), input=[24, 16], backbone={"layer_norm_eps": 1e-5})
    with pytest.raises(UserError, match=r"^model\.init [^\n]* has layer_norm_eps 1e-06, model\.backbone 1e-05: make"):
        opening(recipe, NUM_CLASSES)


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        ({"pool": "mean"}, r"has stem \[8, 12\], model.backbone \[\]"),
        ({"stem": [8, 16], "pool": "mean"}, r"has stem \[8, 12\], model.backbone \[8, 16\]"),
        ({"stem": [8, 12]}, r"has pool mean, model.backbone cls"),
    ],
)
def test_another_stem_or_pool_than_the_models_is_refused(tmp_path, backbone, message):
    model = make_model(make_recipe(backbone={"stem": [8, 12], "pool": "mean"}))
    reader = Reader(write_checkpoint(tmp_path / "checkpoints", model))
    extraction.extract(reader, spec_of(reader, "glyphs"), tmp_path / "glyphs")
    with pytest.raises(UserError, match=rf"^model\.init [^\n]* {message}: make them equal$"):
        opening(make_recipe(backbone=backbone, init=str(tmp_path / "glyphs")), NUM_CLASSES)
