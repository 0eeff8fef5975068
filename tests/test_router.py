"""Learned routes: one branch forward, the softmax's gradient backward, noise by (seed, step, task), and frozen at last;
the path that is left is written and read as a SubnetSpec."""

import random

import pytest
import torch

from ufo_ds import recipe_file
from ufo_ds.data.mixing import Batch, TaskBatch
from ufo_ds.model.architecture import Architecture
from ufo_ds.model.router import Router
from ufo_ds.model.spec import SubnetSpec
from ufo_ds.model.supernet import Supernet, init_weights

PLACES = {"a": [("attn", 0), ("ffn", 0), ("ffn", 2)], "b": [("ffn", 0)], "c": []}
ULP = 2**-23  # 1 + soft - soft may miss 1 by a rounding


def make_router(places=PLACES, temperature=5.0, seed=0, logits=None, final_temperature=None, steps=100, probe=1.0):
    router = Router(places, temperature, final_temperature or temperature, steps, probe, seed)
    with torch.no_grad():
        for task, parameter in router.logits.items():
            parameter.copy_(torch.zeros(len(parameter), 2) if logits is None else logits[task])
    return router


def random_logits(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {task: torch.randn(len(rows), 2, generator=generator) for task, rows in PLACES.items() if rows}


# --- the router -------------------------------------------------------------------------------------------------------


def test_there_is_one_parameter_for_each_task_that_learns():
    shapes = {name: tuple(parameter.shape) for name, parameter in make_router().named_parameters()}
    assert shapes == {"logits.a": (3, 2), "logits.b": (1, 2)}


def test_weights_are_one_hot():
    router = make_router(logits=random_logits())
    favours_own = [own > shared for logits in random_logits().values() for shared, own in logits.tolist()]
    for step in range(50):
        decided = router(step)
        assert decided.shape == (4, 3)
        assert decided[:, 2].tolist() == favours_own  # whatever the noise
        weights = decided[:, :2]
        hard = weights.round()
        assert hard.sum(1).tolist() == [1.0] * 4
        assert (weights - hard).abs().max() <= ULP
        assert weights[hard == 0].tolist() == [0.0] * 4


def test_evaluation_takes_the_more_probable_branch_without_noise():
    logits = {"a": torch.tensor([[0.1, 0.0], [0.0, 1e-4], [0.0, 0.0]]), "b": torch.tensor([[-5.0, 3.0]])}
    router = make_router(temperature=0.01, logits=logits)
    for _ in range(3):  # equal logits: the shared copy
        assert router(None).tolist() == [[1.0, 0.0, 0.0], [0.0, 1.0, 1.0], [1.0, 0.0, 0.0], [0.0, 1.0, 1.0]]


@pytest.mark.parametrize("temperature", [0.5, 5.0])
def test_gradients_are_those_of_the_softmax(temperature):
    router = make_router(temperature=temperature, logits=random_logits())
    upstream = torch.tensor([[1.0, -2.0], [0.5, 3.0], [0.0, 1.0], [-1.0, -1.5]])
    (router(3)[:, :2] * upstream).sum().backward()
    noisy = torch.cat(list(random_logits().values())) + router._noise(3)
    wanted = []
    for (shared, own), (from_shared, from_own) in zip(noisy.tolist(), upstream.tolist(), strict=True):
        # p = 1 / (1 + exp((own - shared) / T)); dp/d shared = p (1 - p) / T, and the other three are its negatives.
        p = 1 / (1 + torch.tensor((own - shared) / temperature).exp().item())
        slope = p * (1 - p) / temperature * (from_shared - from_own)
        wanted += [slope, -slope]
    found = torch.cat([router.logits["a"].grad, router.logits["b"].grad]).flatten()
    assert found.tolist() == pytest.approx(wanted, rel=1e-4, abs=1e-7)


def test_noise_is_a_function_of_seed_step_and_task():
    torch.manual_seed(0)
    first = make_router()._noise(7)
    torch.manual_seed(1)
    assert torch.equal(make_router()._noise(7), first)
    assert torch.equal(make_router({"b": PLACES["b"]})._noise(7), first[3:])
    assert torch.equal(make_router({"z": [("ffn", 1)], "a": PLACES["a"]})._noise(7)[1:], first[:3])
    assert not torch.equal(make_router()._noise(8), first)
    assert not torch.equal(make_router(seed=1)._noise(7), first)
    assert not torch.equal(first[1], first[3])  # a and b
    assert not torch.equal(first[0], first[1])  # attn and ffn


def test_noise_of_a_layer_does_not_depend_on_what_else_is_learned():
    everything = {"a": [(unit, i) for unit in ("norm", "attn", "ffn") for i in range(40)]}
    rows = dict(zip(everything["a"], make_router(everything)._noise(3), strict=True))
    draw = random.Random(0)
    for _ in range(100):
        some = sorted(draw.sample(everything["a"], draw.randint(1, 20)), key=everything["a"].index)
        assert torch.equal(
            make_router({"b": [("ffn", 0)], "a": some})._noise(3)[1:], torch.stack([rows[p] for p in some])
        )


def test_noise_is_gumbels():
    noise = make_router({"a": [("ffn", i) for i in range(20_000)]})._noise(0)
    # Mean 0.5772 (Euler), variance pi^2 / 6 = 1.6449; the mean of 40,000 has a deviation of 1.2825 / 200 = 0.0064.
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.03)
    assert noise.var().item() == pytest.approx(1.6449, abs=0.1)


@pytest.mark.parametrize(("advantage", "share"), [(0.0, 0.5), (1.0, 0.7310586)])  # 1 / (1 + e^-1)
def test_branches_are_taken_as_often_as_the_softmax_says(advantage, share):
    router = make_router({"a": [("ffn", 0)]}, logits={"a": torch.tensor([[0.0, advantage]])})
    steps = 4000
    with torch.no_grad():
        found = sum(router(step)[0, 1].item() for step in range(steps)) / steps
    assert found == pytest.approx(share, abs=5 * 0.5 / steps**0.5)


def test_choices_are_sorted_by_unit_and_layer():
    decided = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1.0, 0.0, 1.0], [ULP, 1 - ULP, 1.0]], requires_grad=True)
    found = make_router(probe=0.25).choices(decided, 0)
    assert {place: {task: (c.own, c.scale) for task, c in by_task.items()} for place, by_task in found.items()} == {
        ("attn", 0): {"a": (False, 4.0)},
        ("ffn", 0): {"a": (True, 4.0), "b": (True, 4.0)},
        ("ffn", 2): {"a": (False, 4.0)},
    }
    upstream = {("attn", 0, "a"): 0, ("ffn", 0, "a"): 1, ("ffn", 2, "a"): 2, ("ffn", 0, "b"): 3}
    for (unit, layer, task), row in upstream.items():
        weights_2 = found[unit, layer][task].weights_2
        assert weights_2.tolist() == decided[row, :2].tolist()
        (gradient,) = torch.autograd.grad(weights_2 @ torch.tensor([2.0, 3.0]), decided)
        assert gradient.nonzero().tolist() == [[row, 0], [row, 1]]
        assert gradient[row].tolist() == [2.0, 3.0, 0.0]


@pytest.mark.parametrize(("probe", "blocks"), [(1.0, 1), (0.5, 2), (0.3, 3), (0.1, 10)])
def test_a_gradient_from_a_probe_stands_for_that_of_all_blocks(probe, blocks):
    router = make_router({"a": [("ffn", 0)]}, probe=probe)
    assert router.choices(router(0), 0)["ffn", 0]["a"].scale == blocks


@pytest.mark.parametrize(
    ("first", "last", "wanted"),  # at steps 0, 25, 50, 75, 100, 1000 of 100
    [
        (5.0, 5.0, [5.0] * 6),
        (8.0, 0.5, [8.0, 4.0, 2.0, 1.0, 0.5, 0.5]),  # halves every 25 steps
        (1.0, 81.0, [1.0, 3.0, 9.0, 27.0, 81.0, 81.0]),
    ],
)
def test_the_temperature_changes_by_equal_factors(first, last, wanted):
    router = make_router(temperature=first, final_temperature=last, logits=random_logits())
    assert [router.temperature_at(step) for step in (0, 25, 50, 75, 100, 1000)] == pytest.approx(wanted)
    upstream = torch.tensor([[1.0, -2.0], [0.5, 3.0], [0.0, 1.0], [-1.0, -1.5]])
    for step, temperature in zip((0, 25, 50, 75, 100, 1000), wanted, strict=True):
        gradients = []
        for one in (router, make_router(temperature=temperature, logits=random_logits())):
            gradients.append(torch.autograd.grad((one(step)[:, :2] * upstream).sum(), list(one.parameters())))
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)


def test_probed_blocks_are_drawn_alike_and_equally_often():
    router, again = make_router(probe=0.2), make_router({"z": [("ffn", 1)]}, probe=0.2)
    steps = range(2000)
    drawn = {task: [router.probed_block(step, task) for step in steps] for task in "ab"}
    assert drawn["a"] == [again.probed_block(step, "a") for step in steps]
    assert drawn["a"] != drawn["b"]
    assert drawn["a"] != [make_router(probe=0.2, seed=1).probed_block(step, "a") for step in steps]
    for blocks in drawn.values():  # the standard deviation of each count is sqrt(2000 x 0.2 x 0.8) = 17.9
        assert [blocks.count(block) for block in range(5)] == pytest.approx([400] * 5, abs=5 * 17.9)
    assert {make_router(probe=1.0).probed_block(step, "a") for step in range(20)} == {0}


def test_the_step_of_the_last_change_is_noted():
    router = make_router({"a": [("attn", 0), ("ffn", 1)], "b": [("ffn", 0)]}, probe=0.5)

    def at(step, a, b):
        with torch.no_grad():
            router.logits["a"].copy_(torch.tensor(a))
            router.logits["b"].copy_(torch.tensor(b))
        router.choices(router(step), step)
        return router.likelier_own, router.changed_at

    shared, own = [0.0, -1.0], [0.0, 1.0]
    assert (router.likelier_own, router.changed_at) == ({}, 0)
    assert at(10, [shared, own], [shared]) == ({"a": [False, True], "b": [False]}, 0)  # nothing to compare with
    assert at(11, [shared, own], [shared]) == ({"a": [False, True], "b": [False]}, 0)
    assert at(12, [shared, own], [[0.0, 1e-6]]) == ({"a": [False, True], "b": [True]}, 12)
    assert at(12, [shared, own], [own]) == ({"a": [False, True], "b": [True]}, 12)  # a further micro-batch
    assert at(13, [[-3.0, -4.0], own], [own]) == ({"a": [False, True], "b": [True]}, 12)  # another size, the same sign
    assert at(None, [own, own], [shared]) == ({"a": [False, True], "b": [True]}, 12)  # an evaluation
    assert at(14, [own, shared], [own]) == ({"a": [True, False], "b": [True]}, 14)
    assert at(15, [own, [2.0, 2.0]], [own]) == ({"a": [True, False], "b": [True]}, 14)  # equal: shared


# --- learned routes in the supernet -----------------------------------------------------------------------------------


def make_supernet():
    """Task a learns its FFNs, b all but the embedding and one attention; c learns nothing."""
    linear = {"head": {"type": "linear"}, "loss": {"cross_entropy": {}}, "input": [16, 16], "samples_per_step": 2}
    recipe = recipe_file.parse(
        {
            "name": "test",
            "model": {
                "backbone": {"dim": 16, "depth": 3, "heads": 2, "patch_size": 8},
                "experts": ["norm", "attn", "ffn"],
                "routes": {"norm": "shared", "attn": "shared", "ffn": "learned"},
                "router": {"temperature": 1.0},
            },
            "tasks": [
                {"name": "a", **linear},
                {"name": "b", **linear, "routes": {"norm": "learned", "attn": ["learned", "own", "learned"]}},
                {"name": "c", **linear, "routes": {"ffn": ["shared", "own", "shared"]}},
            ],
            "schedule": {"steps": 1},
        },
        "test",
    )
    with torch.device("meta"):
        model = Supernet(recipe, {"a": 3, "b": 3, "c": 3})
    init_weights(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return model


def make_batch(step=0, tasks="abc"):
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (2, 3, 16, 16), generator=generator).to(torch.uint8)
    return Batch(step, 0, {name: TaskBatch(images, torch.tensor([0, 1]), range(2), 2) for name in tasks}, {})


def own_is_likelier(model):
    return {task: (logits[:, 1] > logits[:, 0]).tolist() for task, logits in model.router.logits.items()}


def rows_seen(model):
    """The number of rows of every call of every copy, as they come."""
    rows = {}
    for name, module in model.named_modules():
        if name.endswith((".shared", ".own")):
            module.register_forward_pre_hook(lambda _, args, name=name: rows.setdefault(name, []).append(len(args[0])))
    return rows


def test_only_what_the_recipe_says_is_learned():
    router = make_supernet().router
    assert router.places == {
        "a": [("ffn", 0), ("ffn", 1), ("ffn", 2)],
        "b": [*(("norm", i) for i in range(4)), ("attn", 0), ("attn", 2), *(("ffn", i) for i in range(3))],
    }


def test_the_more_probable_routes_are_decided():
    model = make_supernet()
    with torch.no_grad():
        model.router.logits["a"].copy_(torch.tensor([[0.0, 1.0], [2.0, 1.0], [-1.0, 0.0]]))
        model.router.logits["b"].copy_(torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 0.0]]).repeat(3, 1))
    routes = model.decided_routes(own_is_likelier(model))
    shared, own = "shared", "own"
    assert routes == {
        "a": {"embed": (shared,), "norm": (shared,) * 4, "attn": (shared,) * 3, "ffn": (own, shared, own)},
        "b": {"embed": (shared,), "norm": (own, shared, shared, own), "attn": (shared, own, shared),
              "ffn": (own, shared, shared)},
        "c": {"embed": (shared,), "norm": (shared,) * 4, "attn": (shared,) * 3, "ffn": (shared, own, shared)},
    }  # fmt: skip
    model.set_routes(routes)
    assert not model.learns_routes
    assert model.spec("b") == SubnetSpec("b", routes["b"], Architecture.of(model.recipe.model.backbone))


def test_frozen_routes_compute_what_evaluation_did():
    model = make_supernet().eval()
    with torch.no_grad():
        before = model(make_batch())
        model.set_routes(model.decided_routes(own_is_likelier(model)))
        after = model(make_batch())
    for task, outputs in before.items():
        torch.testing.assert_close(after[task].logits, outputs.logits, rtol=1e-6, atol=1e-6)


def test_training_draws_a_path_each_step_until_routes_are_frozen():
    model = make_supernet().train()
    with torch.no_grad():
        assert torch.equal(model(make_batch(step=0)), model(make_batch(step=0)))
        assert len({tuple(model(make_batch(step))[:, 0].tolist()) for step in range(8)}) > 1
        model.set_routes(model.decided_routes(own_is_likelier(model)))
        assert len({tuple(model(make_batch(step))[:, 0].tolist()) for step in range(8)}) == 1


def test_a_step_of_training_is_one_dense_path():
    model = make_supernet().train()
    with torch.no_grad():
        sampled = model(make_batch(step=5))
        drawn = model.router(5)[:, 1].round().bool().split([len(rows) for rows in model.router.places.values()])
        model.set_routes(
            model.decided_routes(dict(zip(model.router.places, (row.tolist() for row in drawn), strict=True)))
        )
        torch.testing.assert_close(model(make_batch(step=5)), sampled, rtol=1e-5, atol=1e-6)


def test_after_freezing_one_branch_is_computed():
    model = make_supernet()
    rows = rows_seen(model)
    images = 2 * 5  # rows of a task: two images of 2 x 2 patches and the class token
    with torch.no_grad():
        model(make_batch(tasks="a"))
    assert sorted([rows["blocks.0.ffn.shared"], rows["blocks.0.ffn.own"]]) == [[0, images], [images, 0]]
    rows.clear()
    routes = {
        "a": {"embed": ["shared"], "norm": ["shared"] * 4, "attn": ["shared"] * 3, "ffn": ["own", "shared", "own"]},
        "b": {"embed": ["shared"], "norm": ["shared"] * 4, "attn": ["own"] * 3, "ffn": ["own", "shared", "shared"]},
        "c": {"embed": ["shared"], "norm": ["shared"] * 4, "attn": ["shared"] * 3, "ffn": ["own", "shared", "own"]},
    }
    model.set_routes(routes)
    with torch.no_grad():
        model(make_batch())
    assert {name: rows.get(f"blocks.{name}") for name in ("0.ffn.shared", "0.ffn.own", "1.ffn.shared", "1.ffn.own",
            "2.ffn.shared", "2.ffn.own", "1.attn.shared", "1.attn.own", "1.norm1.shared", "1.norm2.own")} == {
        "0.ffn.shared": None, "0.ffn.own": [3 * images],  # all go their own ways
        "1.ffn.shared": [3 * images], "1.ffn.own": None,
        "2.ffn.shared": [images], "2.ffn.own": [2 * images],
        "1.attn.shared": [2 * images], "1.attn.own": [images],
        "1.norm1.shared": [3 * images], "1.norm2.own": None,
    }  # fmt: skip


def test_routes_of_one_task_may_be_frozen_alone():
    model = make_supernet().train()
    routes = {"embed": ["shared"], "norm": ["shared"] * 4, "attn": ["shared"] * 3, "ffn": ["own"] * 3}
    with torch.no_grad():
        before = model(make_batch(step=2))
        model.set_routes({"a": routes})
        after = model(make_batch(step=2))
    assert model.learns_routes
    assert torch.equal(after[1:], before[1:])  # the draws of b are what they were
