"""Optimizers on flat partitions equal whole-parameter ones; rules reach the parameters they name."""

import pytest
import torch
import torch.distributed as dist

from tests.layerwise import Lamb, Lars
from tests.small_run import make_images, make_model, make_recipe, outputs_of, relative
from ufo_ds import recipe_file
from ufo_ds.data.mixing import Batch, TaskBatch
from ufo_ds.errors import UserError
from ufo_ds.model.parameters import (
    Address,
    UpdateRule,
    address_of,
    check_rules,
    unused,
    update_rule,
    used_together,
    without_effect,
)
from ufo_ds.model.supernet import Supernet
from ufo_ds.parallel.optimizers import OPTIMIZERS, average_decay
from ufo_ds.parallel.shards import Slice
from ufo_ds.recipe import Optimizer, only

SIZES = [7, 1, 64, 0, 33, 128, 5]
RULES = [UpdateRule(1.0, 0.1, True), UpdateRule(0.5, 0.0, False), UpdateRule(2.0, 0.1, False)]
LR = 1e-2


def lay_out(count, seed=0, gap=3):
    """Slices of parameters in random order in ``count`` partitions, with gaps that hold NaN: touched, they spread."""
    generator = torch.Generator().manual_seed(seed)
    flats = [torch.full((sum(SIZES) + gap * len(SIZES),), float("nan")) for _ in range(count)]
    slices = []
    for number, flat in enumerate(flats):
        offset = 0
        for i in torch.randperm(len(SIZES), generator=generator).tolist():
            piece = Slice(f"p{number}.{i}", (SIZES[i],), flat, offset, 0, SIZES[i], None)
            piece.of(flat).copy_(torch.randn(SIZES[i], generator=generator))
            slices.append(piece)
            offset += SIZES[i] + gap
    return flats, slices


def make(slices, flats, **options):
    optimizer = OPTIMIZERS[options["type"]]([{"params": flats}], Optimizer(lr=LR, **options))
    rules = {piece.name: RULES[i % len(RULES)] for i, piece in enumerate(slices)}
    optimizer.prepare(slices, rules)
    return optimizer, rules


def give_gradients(slices, flats, step):
    """A gradient of each piece, as large as real ones and zero at times; the reference's copy of it."""
    generator = torch.Generator().manual_seed(100 + step)
    for flat in flats:
        flat.grad = torch.full_like(flat, float("nan"))
    gradients = {}
    for piece in slices:
        gradients[piece.name] = torch.randn(piece.length, generator=generator) * (0.0 if step == 3 else 0.1)
        piece.of(piece.flat.grad).copy_(gradients[piece.name])
    return gradients


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_slices_are_stepped_as_torch_steps_parameters(kind, momentum):
    flats, slices = lay_out(2)
    wanted = {piece.name: torch.nn.Parameter(piece.of(piece.flat).clone()) for piece in slices}
    optimizer, rules = make(slices, flats, type=kind, momentum=momentum, betas=(0.8, 0.97))
    groups = [
        {"params": [p], "lr": LR * rules[name].lr_scale, "weight_decay": rules[name].weight_decay, "name": name}
        for name, p in wanted.items()
    ]
    if kind == "sgd":
        reference = torch.optim.SGD(groups, momentum=momentum)
    else:
        reference = torch.optim.AdamW(groups, betas=(0.8, 0.97))
    for step in range(10):
        for name, gradient in give_gradients(slices, flats, step).items():
            wanted[name].grad = gradient
        rate = LR * (1 + step % 3)  # of the schedule
        optimizer.param_groups[0]["lr"] = rate
        for group in reference.param_groups:
            group["lr"] = rate * rules[group["name"]].lr_scale
        optimizer.step()
        reference.step()
    for piece in slices:
        torch.testing.assert_close(piece.of(piece.flat), wanted[piece.name].detach(), rtol=1e-7, atol=1e-7)
    assert optimizer.steps == 10


@pytest.fixture(scope="module")
def process_group(tmp_path_factory):
    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize(
    "options",
    [
        {"type": "lars", "momentum": 0.9, "trust": 0.02},
        {"type": "lars", "momentum": 0.0},
        {"type": "lamb", "betas": (0.8, 0.97)},
        {"type": "lamb", "norm_bounds": (6.0, 7.0)},  # both bounds are met: the norms are about 1, 3, 6, 8, 11
    ],
)
def test_layer_wise_rates_are_those_of_the_papers(options):
    flats, slices = lay_out(2)
    for piece in slices[1::7]:
        piece.of(piece.flat).zero_()  # a norm of zero has no rate
    wanted = {piece.name: torch.nn.Parameter(piece.of(piece.flat).clone()) for piece in slices}
    optimizer, rules = make(slices, flats, **options)
    groups = [
        {
            "params": [p], "lr": LR * rules[name].lr_scale, "weight_decay": rules[name].weight_decay,
            "adapted": rules[name].adapted,
        }
        for name, p in wanted.items()
    ]  # fmt: skip
    filled = optimizer.options
    if options["type"] == "lars":
        reference = Lars(groups, filled.momentum, filled.trust)
    else:
        reference = Lamb(groups, filled.betas, filled.norm_bounds)
    for step in range(10):
        for name, gradient in give_gradients(slices, flats, step).items():
            wanted[name].grad = gradient
        optimizer.step()
        reference.step()
    for piece in slices:
        torch.testing.assert_close(piece.of(piece.flat), wanted[piece.name].detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_slices_left_out_stay_to_the_bit(kind):
    flats, slices = lay_out(2)
    optimizer, _ = make(slices, flats, type=kind, average=0.9)
    for step in range(2):
        give_gradients(slices, flats, step)
        optimizer.step()
    unused = {piece.name for piece in slices[::3]}
    optimizer.leave_out(unused)

    def tensors_of(piece):
        state = [value for value in optimizer.state[piece.flat].values() if torch.is_tensor(value)]
        assert len(state) == (2 if kind == "sgd" else 3)
        return [piece.of(tensor).clone() for tensor in [piece.flat, *state]]

    before = {piece.name: tensors_of(piece) for piece in slices}
    give_gradients(slices, flats, 2)
    optimizer.step()
    for piece in slices:
        for old, new in zip(before[piece.name], tensors_of(piece), strict=True):
            assert torch.equal(old, new) == (piece.name in unused or not piece.length)


@pytest.mark.parametrize(("start", "length"), [(0, 12), (3, 4), (5, 1), (5, 5), (0, 4), (8, 4), (2, 8)])
def test_the_bias_of_keys_stays_to_the_bit(start, length):
    """Elements 4 to 7 of this one, of which a rank has elements ``start`` on."""
    flat = torch.full((20,), float("nan"))
    piece = Slice("blocks.0.attn.shared.qkv.bias", (12,), flat, 3, start, length, None)
    piece.of(flat).copy_(before := torch.randn(length))
    optimizer, _ = make([piece], [flat], type="adamw", average=0.9)
    give_gradients([piece], [flat], 0)
    optimizer.step()
    keys = [4 <= element < 8 for element in range(start, start + length)]
    assert (piece.of(flat) == before).tolist() == keys


def test_no_output_depends_on_the_bias_of_keys():
    recipe = make_recipe(experts=["embed", "attn", "ffn"])
    model, changed = make_model(recipe), make_model(recipe)
    with torch.no_grad():
        for name, parameter in changed.named_parameters():
            keys = without_effect(name, parameter.shape)
            parameter[keys.start : keys.stop] += torch.randn(len(keys), *parameter.shape[1:])
    assert not torch.equal(model.blocks[0].attn.shared.qkv.bias, changed.blocks[0].attn.shared.qkv.bias)
    for task in ("digits", "glyphs"):
        wanted, found = (outputs_of(m, task, make_images()).embedding for m in (model, changed))
        assert relative(found, wanted) < 1e-5


def test_averages_follow_their_definition():
    flats, slices = lay_out(1)
    optimizer, _ = make(slices, flats, type="sgd", average=0.3)
    expected = {piece.name: piece.of(piece.flat).clone() for piece in slices}
    for step in range(6):
        give_gradients(slices, flats, step)
        optimizer.step()
        decay = [1 / 10, 2 / 11, 3 / 12, 0.3, 0.3, 0.3][step]
        for piece in slices:
            expected[piece.name] = decay * expected[piece.name] + (1 - decay) * piece.of(piece.flat)
    for piece in slices:
        found = piece.of(optimizer.state[piece.flat]["average"])
        torch.testing.assert_close(found, expected[piece.name], rtol=1e-6, atol=1e-7)
    assert average_decay(0.99, 10**9) == 0.99


@pytest.mark.parametrize(
    ("name", "address"),
    [
        ("embed.shared.patch.bias", Address("embed", -1, None, True)),
        ("embed.own.face.cls", Address("embed", -1, "face", False)),
        ("blocks.7.norm2.own.face.weight", Address("norm", 7, "face", False)),
        ("blocks.0.ffn.shared.fc1.bias", Address("ffn", 0, None, True)),
        ("blocks.11.attn.own.face.qkv.weight", Address("attn", 11, "face", False)),
        ("norm.shared.bias", Address("norm", -1, None, True)),
        ("heads.face.neck.weight", Address("neck", 0, "face", False)),
        ("heads.face.classifier.bias", Address("head", 0, "face", True)),
        ("router.logits.face", Address("router", 0, "face", False)),
    ],
)
def test_names_say_where_a_parameter_lives(name, address):
    assert address_of(name) == address


def test_what_no_path_goes_through_is_found():
    """Checked against autograd: what gets no gradient in some steps (logits of decided routes: zeros)."""
    recipe = make_recipe(
        experts=["embed", "norm", "attn", "ffn"],
        routes={"norm": ["own", "shared", "own"], "attn": ["own", "learned"]},
    )
    model = make_model(recipe)
    torch.manual_seed(0)
    for routes in (
        {},
        {"digits": {**model.routes["digits"], "attn": ("own", "own"), "norm": ("own", "own", "own")}},
        {"glyphs": {**model.routes["glyphs"], "attn": ("own", "shared"), "embed": ("own",)}},
    ):
        model.set_routes(routes)
        model.zero_grad()
        images = {task.name: torch.randint(0, 256, (4, 3, *task.input), dtype=torch.uint8) for task in recipe.tasks}
        labels = torch.zeros(4, dtype=torch.int64)
        tasks = {name: TaskBatch(x, labels, range(4), 4) for name, x in images.items()}
        for step in range(8):  # of which each of both copies of a learned route is chosen at some
            model.train()(Batch(step, 0, tasks, {})).sum().backward()
        wanted = {
            name for name, parameter in model.named_parameters()
            if parameter.grad is None or (name.startswith("router") and not parameter.grad.any())
        }  # fmt: skip
        names = [name for name, _ in model.named_parameters()]
        assert unused(names, model.routes) == wanted
        assert wanted
        shared = {name for name in wanted if ".shared." in name}
        assert unused(names, model.routes, shared_samples=0.1) == wanted - shared
    empty_slots = {"blocks.0.ffn.own.EMPTY0.fc1.weight", "heads.EMPTY0.classifier.bias"}
    assert unused(empty_slots, model.routes, shared_samples=0.1) == empty_slots


def test_what_several_tasks_use_is_found():
    routes = {
        "digits": {"embed": ("own",), "ffn": ("shared", "learned")},
        "glyphs": {"embed": ("shared",), "ffn": ("shared", "shared")},
    }
    names = ["embed.shared.cls", "blocks.0.ffn.shared.fc1.bias", "blocks.1.ffn.shared.fc1.bias",
             "blocks.0.ffn.own.digits.fc1.bias", "heads.digits.classifier.bias", "router.logits.digits"]  # fmt: skip
    assert used_together(names, routes) == set(names[1:3])
    assert used_together(names, routes, shared_samples=0.1) == set(names[:3])


def rules_of(recipe, names):
    return {name: (rule.lr_scale, rule.weight_decay) for name in names if (rule := update_rule(name, recipe))}


def test_rules_reach_what_they_name():
    """Scales multiply, the last weight decay counts, in order of the recipe; lr_scale of a task stays."""
    values = recipe_file.dump(make_recipe(routes={"ffn": "learned"}))
    values["tasks"][0]["lr_scale"] = 0.5
    values["tasks"][0]["routes"] = {}
    values["optimizer"] = {
        "weight_decay": 0.05,
        "rules": [
            {"bias": True, "lr_scale": 2},
            {"unit": "head", "task": "digits", "lr_scale": 0.1},
            {"task": ["digits", "glyphs"], "unit": "ffn", "weight_decay": 0.2},
            {"task": ["glyphs"], "weight_decay": 0.3, "lr_scale": 3},
            {"unit": "norm", "bias": False, "weight_decay": 0.01},
        ],
    }
    found = rules_of(
        recipe_file.parse(values, "test"),
        names := [
            "embed.shared.patch.weight",
            "embed.shared.patch.bias",
            "embed.own.digits.position",
            "blocks.0.norm1.shared.weight",
            "blocks.0.norm1.shared.bias",
            "blocks.0.ffn.shared.fc1.weight",
            "blocks.0.ffn.own.digits.fc1.weight",
            "blocks.0.ffn.own.digits.fc1.bias",
            "blocks.0.ffn.own.glyphs.fc1.weight",
            "heads.digits.classifier.weight",
            "heads.digits.classifier.bias",
            "heads.glyphs.neck.weight",
            "router.logits.digits",
            "router.logits.glyphs",
        ],
    )
    wanted = [
        (1, 0.05), (2, 0), (0.5, 0), (1, 0.01), (2, 0), (1, 0.05), (0.5, 0.2), (1, 0.2), (3, 0.3),
        (0.05, 0.05), (0.1, 0), (3, 0.3), (1, 0), (3, 0.3),
    ]  # fmt: skip
    assert found == {name: pytest.approx(rule) for name, rule in zip(names, wanted, strict=True)}


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"unit": "neck", "bias": True}, r"optimizer.rules.1: no parameter .* \{'unit': 'neck', 'bias': True\}"),
        ({"unit": "router"}, "optimizer.rules.1: no parameter of this model matches"),
        ({"task": "digits", "unit": "attn"}, "optimizer.rules.1: no parameter of this model matches"),
        ({"task": "faces"}, "optimizer.rules.1: no task 'faces'; there are digits, glyphs"),
        ({"unit": "nose"}, r"optimizer.rules.1.unit = 'nose'"),
        ({"bias": True, "lr": 2}, "unknown key optimizer.rules.1.lr = 2"),
    ],
)
def test_a_rule_for_nothing_is_an_error(rule, message):
    values = recipe_file.dump(make_recipe())
    values["optimizer"]["rules"] = [{"bias": True}, rule]
    with torch.device("meta"):
        model = Supernet(make_recipe(), {"digits": 3, "glyphs": 4})
    with pytest.raises(UserError, match=message):
        check_rules(recipe_file.parse(values, "test"), [name for name, _ in model.named_parameters()])


def test_rules_of_one_task_stay_with_it():
    values = recipe_file.dump(make_recipe())
    values["optimizer"]["rules"] = [{"task": ["digits", "glyphs"]}, {"task": "digits", "bias": True}, {"bias": True}]
    rules = only(recipe_file.parse(values, "test"), ["glyphs"]).optimizer.rules
    assert [(rule.task, rule.bias) for rule in rules] == [(["glyphs"], None), (None, True)]
