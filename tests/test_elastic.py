"""A subnet of the elastic supernet is the small model that its slices make: in evaluation, and in a training step in
which every task goes through several subnets at once."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from tests.test_model import CLASSES, build, make_batch, make_images, make_recipe, relative, scrambled
from ufo_ds import losses
from ufo_ds.model.architecture import Architecture, SearchSpace
from ufo_ds.model.heads import LOSSES
from ufo_ds.model.supernet import Supernet
from ufo_ds.recipe import only

PLAIN = {"dim": 16, "depth": 3, "heads": 2, "patch_size": 8, "mlp_ratio": 3}
STEM = {**PLAIN, "stem": [8, 8, 32], "pool": "mean"}
SIZES = {"depth": [1, 2, 3], "dim": [6, 11, 16], "heads": [1, 2], "mlp_ratio": [1, 2.5, 3]}
SPACES = {"plain": (PLAIN, SIZES), "stem": (STEM, {**SIZES, "stem": [0.5, 1.0]})}


def make_elastic(space="plain", routes="mixed", **elastic):
    backbone, sizes = SPACES[space]
    return make_recipe(routes, backbone=backbone, elastic={**sizes, **elastic})


def small_recipe(recipe, task: str, kept: Architecture):
    """A recipe of one task whose backbone has just these sizes."""
    one = only(recipe, [task])
    backbone = dataclasses.replace(
        one.model.backbone, dim=kept.dim, depth=kept.depth, heads=list(kept.heads), stem=list(kept.stem),
        head_dim=one.model.backbone.head_width, mlp_ratio=[hidden / kept.dim for hidden in kept.hidden],
    )  # fmt: skip
    routes = {}
    for unit, layers in recipe.tasks[[t.name for t in recipe.tasks].index(task)].routes.items():
        layers = layers if isinstance(layers, list) else [layers] * {"embed": 1, "norm": 4}.get(unit, 3)
        last = {"embed": [], "norm": layers[-1:]}.get(unit, [])
        routes[unit] = layers if unit == "embed" else layers[: kept.depth] + last
    model = dataclasses.replace(one.model, elastic=None, backbone=backbone)
    return dataclasses.replace(one, model=model, tasks=[dataclasses.replace(one.tasks[0], routes=routes)])


def slices(name: str, shape: torch.Size, kept: Architecture, whole: Architecture, head: int) -> torch.Tensor:
    """Flat indices of the entries of a parameter or buffer that a subnet keeps, written down from the words."""
    every = torch.arange(shape.numel()).view(shape)
    parts = name.split(".")
    block = int(parts[1]) if parts[0] == "blocks" else None
    unit = parts[2] if parts[0] in ("blocks", "heads") else parts[0]
    d = kept.dim
    if parts[0] == "heads":
        return every if parts[-1] == "bias" else every[..., :d]
    if "qkv" in parts:
        by_head = every.view(3, whole.heads[block], head, *shape[1:])[:, : kept.heads[block]].flatten(0, 2)
        return by_head[:, :d] if len(shape) == 2 else by_head
    if "proj" in parts:
        return every[:d, : kept.heads[block] * head] if len(shape) == 2 else every[:d]
    if "fc1" in parts:
        return every[: kept.hidden[block], :d] if len(shape) == 2 else every[: kept.hidden[block]]
    if "fc2" in parts:
        return every[:d, : kept.hidden[block]] if len(shape) == 2 else every[:d]
    if "stem" in parts:
        i = int(parts[parts.index("stem") + 1])
        before = kept.stem[i - 1] if i else 3
        return every[: kept.stem[i], :before] if len(shape) == 4 else every[: kept.stem[i]]
    if "patch" in parts and len(shape) == 2 and kept.stem:
        return every[:d, : shape[1] // whole.stem[-1] * kept.stem[-1]]
    return every[..., :d] if parts[-1] in ("cls", "position") or "norm" in unit else every[:d]


def small_model(model: Supernet, task: str, kept: Architecture):
    """The subnet as a model of its own, and where in the supernet's tensors each of its tensors is from."""
    recipe = small_recipe(model.recipe, task, kept)
    small = build_like(recipe)
    whole, head = Architecture.of(model.recipe.model.backbone), model.recipe.model.backbone.head_width
    places, state = {}, model.state_dict()
    with torch.no_grad():
        for name, tensor in small.state_dict().items():
            places[name] = slices(name, state[name].shape, kept, whole, head)
            tensor.copy_(state[name].flatten()[places[name].flatten()].view(tensor.shape))
    return small, places


def build_like(recipe):
    model = Supernet(recipe, {task.name: CLASSES[task.name] for task in recipe.tasks})
    model.fill_constants()
    return model


@pytest.mark.parametrize("name", SPACES)
@pytest.mark.parametrize("count", [1, 17])
def test_a_subnet_in_evaluation_is_the_model_of_its_slices(name, count):
    recipe = make_elastic(name)
    model = scrambled(recipe).eval()
    images = make_images(recipe, count)
    space = SearchSpace.of(recipe.model)
    for draw in range(6):
        model.architectures = {task: space.draw(draw, task) for task in list(CLASSES)[draw % 3 : 4]}
        with torch.no_grad():
            found = model(make_batch(images))
            for task, kept in model.architectures.items():
                small, _ = small_model(model, task, kept)
                wanted = small.eval()(make_batch({task: images[task]}))[task]
                assert found[task].embedding.shape == (len(images[task]), kept.dim)
                assert relative(found[task].embedding, wanted.embedding) < 1e-5
                assert relative(found[task].logits, wanted.logits) < 1e-5
                assert model.spec(task).architecture == kept


@pytest.mark.parametrize("routes", ["shared", "own", "mixed"])
@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("sampling", ["sandwich", "random"])
def test_a_step_is_the_mean_of_its_subnets_and_touches_only_their_slices(space, sampling, routes):
    recipe = make_elastic(space, routes, sampling=sampling, random=2, distillation=0.0)
    model = scrambled(recipe).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images = make_images(recipe, 5)
    batch = make_batch(images, step=3)
    found = model(batch)
    found.sum().backward()
    subnets = model.subnets(3)
    assert len(subnets) == {"sandwich": 4, "random": 1}[sampling]
    if sampling == "sandwich":
        assert subnets[:2] == [{}, dict.fromkeys(model.tasks, SearchSpace.of(recipe.model).smallest)]
    wanted = torch.zeros_like(found)
    gradients = {name: torch.zeros_like(parameter).flatten() for name, parameter in model.named_parameters()}
    touched = {name: torch.zeros(parameter.numel(), dtype=torch.bool) for name, parameter in model.named_parameters()}
    running = {name: value for name, value in before.items() if "running" in name}
    original = build_like(recipe)
    original.load_state_dict(before)
    for i, architectures in enumerate(subnets):
        for row, task in enumerate(recipe.tasks):
            kept = architectures.get(task.name, SearchSpace.of(recipe.model).largest)
            small, places = small_model(original, task.name, kept)
            losses_1K = small.train()(make_batch({task.name: images[task.name]}, step=3))
            (losses_1K.sum() / len(subnets)).backward()
            wanted[row] += losses_1K[0].detach() / len(subnets)
            for name, parameter in small.named_parameters():
                if parameter.grad is not None:
                    gradients[name][places[name].flatten()] += parameter.grad.flatten()
                    touched[name][places[name].flatten()] = True
            if i == 0:  # the first subnet's statistics are kept
                for name, buffer in small.named_buffers():
                    if "running" in name:
                        running[name].flatten()[places[name].flatten()] = buffer.flatten()
    assert relative(found, wanted) < 1e-5
    largest = max(gradient.abs().max() for gradient in gradients.values())
    for name, parameter in model.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert (gradient.flatten() - gradients[name]).abs().max() < 1e-5 * largest, name
        assert not gradient.flatten()[~touched[name]].any(), name
    for name, value in running.items():
        assert relative(model.state_dict()[name], value) < 1e-5, name


def test_smaller_subnets_learn_from_the_largest():
    share = 0.75
    recipe = make_elastic(random=1, distillation=share)
    images = make_images(recipe, 5)
    model = scrambled(recipe)
    found = model.train()(make_batch(images))
    for row, task in enumerate(recipe.tasks):
        logits, label_losses = [], []
        for architectures in model.subnets(0):
            kept = architectures.get(task.name, SearchSpace.of(recipe.model).largest)
            small, _ = small_model(model, task.name, kept)
            batch = make_batch({task.name: images[task.name]})
            label_losses.append(small.train()(batch)[0].sum())
            features = small.backbone({task.name: images[task.name]}).pooled_BD
            head = small.heads[task.name]
            logits.append(head.classifier(head.neck(features)))
        scale = 8 if task.head.type == "margin" else 1
        teacher = (scale * logits[0].detach()).log_softmax(1)
        divergences = [
            F.kl_div((scale * x).log_softmax(1), teacher, reduction="batchmean", log_target=True) for x in logits[1:]
        ]
        from_labels = label_losses[0] + (1 - share) * sum(label_losses[1:])
        assert found[row, :-1].sum().item() == pytest.approx(from_labels.item() / 3, rel=1e-5)
        assert LOSSES[-1] == "distillation"
        assert found[row, -1].item() == pytest.approx(share * sum(divergences).item() / 3, rel=1e-4)
        assert found[row, -1] > 0


def test_a_teacher_has_no_gradient_and_says_nothing_new_to_itself():
    logits, teacher = torch.randn(7, 5, requires_grad=True), torch.randn(7, 5, requires_grad=True)
    for loss in (losses.divergence, losses.binary_divergence):
        value = loss(logits, teacher)
        assert (value > 0).all()
        value.sum().backward()
        assert teacher.grad is None
        assert loss(teacher, teacher).abs().max() < 1e-6
    wanted = F.kl_div(logits.log_softmax(1), teacher.softmax(1), reduction="none").sum(1)
    assert relative(losses.divergence(logits, teacher), wanted) < 1e-5


def test_subnets_belong_to_seed_step_and_task():
    recipe = make_elastic(random=3)
    model, other = build(recipe), build(only(recipe, ["c"]))
    assert model.subnets(5) == model.subnets(5)
    assert model.subnets(5)[2:] != model.subnets(6)[2:]
    drawn = model.subnets(5)[2:]
    assert len({draw[task] for draw in drawn for task in model.tasks}) > 6
    assert [draw["c"] for draw in drawn] == [draw["c"] for draw in other.subnets(5)[2:]]
    reseeded = build(dataclasses.replace(recipe, seed=1))
    assert reseeded.subnets(5)[2:] != drawn


@pytest.mark.parametrize("routes", ["own", "learned"])
def test_parts_and_learned_routes_go_with_subnets(routes):
    """What one process computes is the sum of what two halves of the batch do."""
    recipe = make_elastic(routes=routes, random=1, distillation=0.5)
    recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, shared_samples=0.3, drop_path=0.4))
    tasks = [task for task in recipe.tasks if task.head.type == "linear"]  # no statistics of the batch
    model = scrambled(only(recipe, [task.name for task in tasks])).train()
    images = make_images(model.recipe, 8)
    whole = model(make_batch(images))
    halves = sum(model(make_batch(images, part=part)) for part in (slice(0, 3), slice(3, None)))
    assert relative(halves, whole) < 1e-5
    assert torch.isfinite(whole).all()
