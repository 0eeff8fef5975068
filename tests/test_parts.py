"""The parts of a task's samples in training: a block that is probed for the router's gradient, and those that take the
shared path; whatever processes hold them."""

import itertools
import math
import random
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F

from tests.test_model import CLASSES, LINEAR, TASKS, make_batch, make_images, pixels_of, relative, scrambled
from tests.test_model import make_recipe as make_recipe_with
from ufo_ds.data.mixing import TaskBatch
from ufo_ds.model.packing import Segment
from ufo_ds.model.spec import UNITS
from ufo_ds.model.supernet import Supernet

ROUTES = {
    "a": dict.fromkeys(UNITS, "learned"),
    "b": {"embed": "own", "norm": ["learned", "own", "shared", "learned"], "attn": ["learned", "shared", "own"],
          "ffn": "learned"},
    "c": dict.fromkeys(UNITS, "own"),
    "d": dict.fromkeys(UNITS, "shared"),
}  # fmt: skip


def make_recipe(probe=1.0, shared_samples=0.0, tasks="abcd", change=None, **model):
    """Tasks that learn all their routes, some, and none; ``change`` goes over each task."""
    chosen = [{**t, "routes": ROUTES[t["name"]], **(change or {})} for t in TASKS if t["name"] in tasks]
    router = {"temperature": 1.0, "probe": probe}
    return make_recipe_with(tasks=chosen, router=router, shared_samples=shared_samples, **model)


def make_model(*args, **kwargs):
    """In training and in double precision, but for the heads, which compute in single precision."""
    model = scrambled(make_recipe(*args, **kwargs)).double().train()
    model.heads.float()
    return model


def gradients(model):
    """Of all parameters, None as zero; they are forgotten."""
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    model.zero_grad()
    return found


def assert_same(found, wanted):
    for name in wanted:
        if not wanted[name].any():
            assert not found[name].any(), name
        torch.testing.assert_close(
            found[name], wanted[name], rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def slow_losses(model, batch, scale_of):
    """Every image on its own through a vision transformer that is written out, with both copies of a learned route.

    ``scale_of(task, position)``: by how much the gradient of its routes' weights counts; None: it takes the shared
    path.
    """
    rows = iter(model.router(batch.step)[:, :2])
    weights = {(task, *place): next(rows) for task, places in model.router.places.items() for place in places}

    def features(task, image, scale):
        segment = model.segment(task, image[None])

        def through(module, unit, layer, x_LD):
            route = "shared" if scale is None else model.routes[task][unit][layer]
            if route != "learned":
                return (module.shared if route == "shared" else module.own[task])(x_LD, [segment])
            weight = weights[task, unit, layer]
            weight = weight.detach() + scale * (weight - weight.detach())
            return weight[0] * module.shared(x_LD, [segment]) + weight[1] * module.own[task](x_LD, [segment])

        size = [side * 8 for side in segment.grid_hw]
        pixels = pixels_of(image[None])[..., : size[0], : size[1]]
        x_LD = F.pad(F.unfold(pixels, 8, stride=8)[0].T, (0, 0, 1, 0)).double()
        x_LD = through(model.embed, "embed", 0, x_LD)
        for i, block in enumerate(model.blocks):
            x_LD = x_LD + through(block.attn, "attn", i, through(block.norm1, "norm", i, x_LD))
            x_LD = x_LD + through(block.ffn, "ffn", i, through(block.norm2, "norm", i, x_LD))
        return through(model.norm, "norm", len(model.blocks), x_LD)[0]

    losses = []
    for name, task in batch.tasks.items():
        x_BD = torch.stack([features(name, image, scale_of(name, i)) for i, image in enumerate(task.images)])
        losses.append(model.heads[name](x_BD, task.labels, task.global_count))
    return torch.stack(losses)


# --- the router's gradient --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("probe", "share"), [(1.0, 0.0), (1.0, 0.3), (0.5, 0.0), (0.25, 0.3), (0.1, 0.0), (0.5, 1.0)])
def test_losses_and_gradients_are_those_of_both_copies_weighted(probe, share):
    model = make_model(probe, share)
    images = make_images(model.recipe, count=5)
    blocks = round(1 / probe)
    for step in range(4):
        batch = make_batch(images, step=step)
        found = model(batch)
        found.sum().backward()
        found_gradients = gradients(model)

        def scale_of(task, i, step=step):
            shared = math.ceil(share * len(images[task]))
            if i < shared:
                return None
            rest, block = len(images[task]) - shared, model.router.probed_block(step, task)
            return float(blocks) if rest * block // blocks <= i - shared < rest * (block + 1) // blocks else 0.0

        wanted = slow_losses(model, batch, scale_of)
        wanted.sum().backward()
        assert relative(found, wanted) < 1e-5
        wanted_gradients = gradients(model)
        assert_same(found_gradients, wanted_gradients)
        if probe == 1.0:
            assert all(wanted_gradients[f"router.logits.{task}"].abs().max() > 1e-3 for task in "ab")


def steps_by_block(model, task):
    """For every block of the task's samples a step that probes it."""
    steps = {}
    for step in itertools.count():
        steps.setdefault(model.router.probed_block(step, task), step)
        if len(steps) == model.router.blocks:
            return [steps[block] for block in range(model.router.blocks)]


@pytest.mark.parametrize(("blocks", "count"), [(2, 6), (3, 7), (5, 3)])
@pytest.mark.parametrize("task", ["a", "b"])
def test_over_all_blocks_the_routers_gradient_is_on_average_the_full_one(task, blocks, count):
    model = make_model(1 / blocks, tasks=task)
    images = make_images(model.recipe, count=count)
    tasks = make_batch(images).tasks
    weight_BD = torch.randn(count, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

    def gradients_with(segments):
        """Of the path that is drawn at step 3."""
        pooled_BD = model.backbone(images, segments, 3, model.router(3)).pooled_BD
        (pooled_BD * weight_BD).square().sum().backward()
        return gradients(model)

    logits = f"router.logits.{task}"
    by_block = [gradients_with(model._cut(task, tasks[task], step)) for step in steps_by_block(model, task)]
    unprobed = gradients_with([model.segment(task, images[task])])
    full_model = make_model(1.0, tasks=task)
    full_segments = full_model._cut(task, tasks[task], 0)
    assert [s.part for s in full_segments] == ["probe"]
    pooled_BD = full_model.backbone(images, full_segments, 3, full_model.router(3)).pooled_BD
    (pooled_BD * weight_BD).square().sum().backward()
    full = gradients(full_model)
    assert full[logits].any()
    average = sum(one[logits] for one in by_block) / blocks
    torch.testing.assert_close(average, full[logits], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(by_block[0][logits], full[logits], rtol=1e-2)
    assert not unprobed[logits].any()
    for one in [*by_block, unprobed]:  # the probe changes no other gradient
        for name in set(full) - {logits}:
            torch.testing.assert_close(one[name], full[name], rtol=1e-9, atol=1e-9)


# --- samples on the shared path ---------------------------------------------------------------------------------------


LAYERS = {"embed": 1, "norm": 4, "attn": 3, "ffn": 3}


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 1.0])
def test_shared_samples_take_the_shared_path_and_the_others_their_tasks(share):
    model = make_model(0.5, share)
    images = make_images(model.recipe, count=4)
    shared_model, own_model = make_model(), make_model()
    drawn = iter(model.router(2)[:, 1].round().bool().tolist())
    choices = {task: [next(drawn) for _ in places] for task, places in model.router.places.items()}
    own_model.set_routes(own_model.decided_routes({"c": [], "d": [], **choices}))
    shared_model.set_routes({t: {unit: ["shared"] * n for unit, n in LAYERS.items()} for t in images})
    segments = [s for name, task in make_batch(images).tasks.items() for s in model._cut(name, task, 2)]
    with torch.no_grad():
        found = model.backbone(images, segments, 2, model.router(2)).pooled_BD
        shared, own = shared_model.backbone(images).pooled_BD, own_model.backbone(images).pooled_BD
    counts = [len(image) for image in images.values()]
    takes_shared = torch.cat([torch.arange(count) < math.ceil(share * count) for count in counts])
    wanted = torch.where(takes_shared[:, None], shared, own)
    assert (shared - own)[: sum(counts[:3])].abs().amax(1).min() > 1e-2  # of all but d, whose routes are shared
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def test_evaluation_knows_no_shared_samples():
    images = make_images(make_recipe())
    outputs = []
    with torch.no_grad():
        for model in (make_model(), make_model(0.25, shared_samples=0.5)):
            outputs.append(model.eval()(make_batch(images)))
            assert [s.part for name, t in make_batch(images).tasks.items() for s in model._cut(name, t, 0)] == [
                "plain"
            ] * 4
    for name in images:
        assert torch.equal(outputs[0][name].logits, outputs[1][name].logits)


@pytest.mark.parametrize("share", [0.0, 0.2])
def test_shared_copies_learn_from_shared_samples_even_where_all_routes_are_own(share):
    model = make_model(shared_samples=share, change={"routes": dict.fromkeys(UNITS, "own")})
    images = make_images(model.recipe)
    model(make_batch(images)).sum().backward()
    for name, parameter in model.named_parameters():
        if ".shared." in name:
            assert (parameter.grad is not None and parameter.grad.any()) if share else parameter.grad is None, name
        else:
            assert parameter.grad.any(), name


def test_a_process_without_shared_samples_still_has_gradients_of_the_shared_copies():
    model = make_model(shared_samples=0.2, change={"routes": dict.fromkeys(UNITS, "own")})
    model(make_batch(make_images(model.recipe), part=slice(2, None))).sum().backward()
    for name, parameter in model.named_parameters():
        if ".shared." in name:
            assert parameter.grad is not None, name
            assert not parameter.grad.any(), name


# --- the cut over processes -------------------------------------------------------------------------------------------


def random_split(draw, count):
    """Consecutive ranges, some of them empty, that make up ``range(count)``."""
    cuts = sorted(draw.randint(0, count) for _ in range(draw.randint(0, 4)))
    return [range(start, stop) for start, stop in itertools.pairwise([0, *cuts, count])]


def task_batch(positions, count):
    return TaskBatch(torch.empty(len(positions), 3, 16, 16, dtype=torch.uint8), torch.zeros(0), positions, count)


def meta_model(*args, **kwargs):
    recipe = make_recipe(*args, **kwargs)
    with torch.device("meta"):
        return Supernet(recipe, {task.name: CLASSES[task.name] for task in recipe.tasks})


def test_processes_cut_their_samples_alike():
    draw = random.Random(0)
    for _ in range(100):
        blocks, share = draw.randint(1, 7), draw.choice([0.0, 0.1, 0.25, 0.5, 0.9, 1.0])
        model = meta_model(1 / blocks, share)
        count, step = draw.randint(1, 30), draw.randint(0, 1000)
        shared = math.ceil(Fraction(str(share)) * count)
        for name in "abcd":
            split = random_split(draw, count)
            cuts = [model._cut(name, task_batch(positions, count), step) for positions in split]
            spans = [(s.part, s.span) for s in cuts[0]]
            assert all([(s.part, s.span) for s in cut] == spans for cut in cuts)
            assert [i for _, span in spans for i in span] == list(range(count))
            assert [span for part, span in spans if part == "shared"] == ([range(shared)] if shared else [])
            probed = [span for part, span in spans if part == "probe"]
            rest = count - shared
            if name in "ab":
                assert sum(map(len, probed)) in (rest // blocks, -(-rest // blocks))
                assert len(probed) <= 1
            else:
                assert not probed
            for positions, cut in zip(split, cuts, strict=True):
                parts = [part for part, span in spans for i in span if i in positions]  # of every sample, in its order
                assert parts == [s.part for s in cut for _ in range(s.images)]
                assert all((s.task, s.grid_hw, s.tokens, s.prefix) == (name, (2, 2), 5, 1) for s in cut)


def test_over_all_blocks_each_sample_is_probed_once():
    draw = random.Random(1)
    for _ in range(30):
        blocks, count = draw.randint(1, 7), draw.randint(1, 20)
        model = meta_model(1 / blocks, shared_samples=0.2)
        probed = []
        for step in steps_by_block(model, "a"):
            cut = model._cut("a", task_batch(range(count), count), step)
            probed += [i for s in cut if s.part == "probe" for i in s.span]
        assert probed == list(range(math.ceil(count / 5), count))


def test_the_default_is_one_segment_of_all_samples():
    for model in (meta_model(), meta_model(0.5)):
        assert model._cut("c", task_batch(range(2, 5), 7), 0) == [Segment("c", 3, 5, (2, 2), span=range(7))]
    without_experts = meta_model(0.5, 0.5, experts=[], change={"routes": dict.fromkeys(UNITS, "shared")})
    assert without_experts._cut("a", task_batch(range(2, 5), 7), 0) == [Segment("a", 3, 5, (2, 2), span=range(7))]


@pytest.mark.parametrize(("probe", "share"), [(0.5, 0.0), (1.0, 0.4), (0.3, 0.4)])
def test_losses_and_gradients_do_not_depend_on_the_split(probe, share):
    draw = random.Random(0)
    model = make_model(probe, share, change=LINEAR, drop_path=0.5)  # linear heads: no statistics over the batch
    images = make_images(model.recipe, count=6)
    wanted = model(make_batch(images, step=7))
    wanted.sum().backward()
    wanted_gradients = gradients(model)
    assert all(wanted_gradients[f"router.logits.{task}"].any() for task in "ab")
    for _ in range(4):
        cuts = sorted(draw.randint(0, 9) for _ in range(3))
        parts = [slice(start, stop) for start, stop in itertools.pairwise([0, *cuts, None])]
        found = sum(model(make_batch(images, step=7, part=part)) for part in parts)
        found.sum().backward()
        assert relative(found, wanted) < 1e-5
        assert_same(gradients(model), wanted_gradients)


@pytest.mark.parametrize(("share", "count", "wanted"), [(0.07, 100, 7), (0.14, 50, 7), (0.55, 100, 55), (0.1, 11, 2)])
def test_the_number_of_shared_samples_is_that_of_the_decimal_share(share, count, wanted):
    cut = meta_model(shared_samples=share)._cut("c", task_batch(range(count), count), 0)
    assert [s.images for s in cut] == [wanted, count - wanted]
