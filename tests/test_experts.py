"""Packing of tokens, and the way of each task's rows through shared and own copies."""

import dataclasses
import itertools
import math
import random

import pytest
import torch
import torch.nn.functional as F

from ufo_ds.model.experts import Choice, RoutedUnit
from ufo_ds.model.layers import FFN, Attention, Embedding, Norm
from ufo_ds.model.packing import Segment, alike, concatenate, join, overlap, patchify, split, unpatchify


def relative(found, wanted):
    assert found.shape == wanted.shape
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


# --- packing ----------------------------------------------------------------------------------------------------------


def random_segments(draw, tasks=3, dim_hw=3):
    """Up to ``tasks`` segments; some have no images, some neighbours have equal lengths."""
    segments = []
    for task in "abcde"[: draw.randint(0, tasks)]:
        h, w = draw.randint(1, dim_hw), draw.randint(1, dim_hw)
        segments.append(Segment(task, draw.choice([0, 1, 2, 3]), 1 + h * w, (h, w)))
    return segments


@pytest.mark.parametrize("prefix", [0, 1, 2])
@pytest.mark.parametrize(("size", "patch"), [((16, 16), 8), ((8, 24), 8), ((19, 30), 7), ((5, 5), 5)])
def test_patches_are_those_of_a_convolution(size, patch, prefix):
    images = torch.randn(3, 3, *size)
    h, w = size[0] // patch, size[1] // patch
    x_BLP = patchify(images, patch, prefix).view(3, prefix + h * w, 3 * patch**2)
    assert not x_BLP[:, :prefix].any()
    whole = images[:, :, : h * patch, : w * patch]
    assert torch.equal(x_BLP[:, prefix:], F.unfold(whole, patch, stride=patch).transpose(1, 2))
    weight = torch.randn(4, 3, patch, patch)
    wanted = F.conv2d(images, weight, stride=patch).flatten(2).transpose(1, 2)
    assert relative(x_BLP[:, prefix:] @ weight.flatten(1).T, wanted) < 1e-5


@pytest.mark.parametrize("prefix", [0, 1, 2])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_patches_are_put_together_to_the_images_they_were_cut_from(count, prefix):
    images = torch.randn(count, 5, 6, 9)
    segment = Segment("a", count, prefix + 6, (2, 3), prefix)
    assert torch.equal(unpatchify(patchify(images, 3, prefix), segment, 3), images)


def test_runs_are_those_of_images_of_equal_length():
    draw = random.Random(0)
    for _ in range(300):
        segments = random_segments(draw, tasks=5, dim_hw=2)
        lengths = [s.tokens for s in segments for _ in range(s.images)]  # of every image
        found = [(s.images, s.tokens) for s in alike(segments, key=lambda segment: segment.tokens)]
        assert found == [(len(list(run)), length) for length, run in itertools.groupby(lengths)]


def test_split_gives_each_segment_its_rows():
    draw = random.Random(0)
    for _ in range(50):
        segments = random_segments(draw, tasks=5)
        owners = [s.task for s in segments for _ in range(s.images * s.tokens)]
        rows = torch.arange(len(owners))[:, None]
        pieces = split(rows, segments)
        assert [len(piece) for piece in pieces] == [owners.count(s.task) for s in segments]
        assert torch.equal(concatenate(pieces, like=rows), rows)


def test_joined_are_neighbours_of_one_task():
    parts = [
        Segment("a", 2, 5, (2, 2), part="shared", span=range(0, 3)),
        Segment("a", 0, 5, (2, 2), part="plain", span=range(3, 4)),
        Segment("a", 4, 5, (2, 2), part="probe", span=range(4, 8)),
        Segment("b", 1, 7, (2, 3), part="probe", span=range(0, 1)),
        Segment("a", 1, 5, (2, 2), part="plain", span=range(8, 9)),
    ]
    assert join(iter(parts)) == [Segment("a", 6, 5, (2, 2), span=range(0, 8)), *parts[3:]]
    assert join([]) == []


def test_overlap_is_what_two_ranges_have_in_common():
    ranges = [range(start, stop) for start in range(6) for stop in range(start, 6)]
    for a, b in itertools.product(ranges, ranges):
        assert list(overlap(a, b)) == sorted(set(a) & set(b))


# --- experts ----------------------------------------------------------------------------------------------------------

GRIDS = {None: (2, 2), "a": (1, 2)}  # of the shared copy, of a's; the others' are 2 x 3
UNITS = {  # how a copy is made, the width of its rows
    "ffn": (lambda _: FFN(8, 12, 0), 8),
    "attn": (lambda _: Attention(8, 2, 4, 0), 8),
    "norm": (lambda _: Norm(8), 8),
    "embed": (lambda task: Embedding(2, 8, GRIDS.get(task, (2, 3))), 12),
    "stem": (lambda task: Embedding(4, 8, GRIDS.get(task, (2, 3)), stem=[16]), 48),
}
PARTS = ["shared", "plain", "probe", "plain"]  # the order in which a batch has them


def make_unit(kind, routes):
    """A routed unit whose copies all differ."""
    unit = RoutedUnit(UNITS[kind][0], "abcde", routes)
    with torch.no_grad():
        for parameter in unit.parameters():
            parameter.normal_()
    return unit


def calls_of(modules):
    """Of every call of the modules, as they come, the rows and whether it is differentiated."""
    calls = {name: [] for name in modules}
    for name, module in modules.items():
        module.register_forward_pre_hook(
            lambda _, args, name=name: calls[name].append((args[0].detach().clone(), torch.is_grad_enabled()))
        )
    return calls


def rows_of(calls):
    return {name: [len(rows) for rows, _ in of_one] for name, of_one in calls.items()}


def random_parts(draw):
    """Segments of several tasks, each in the parts of a batch, some of which are missing or empty."""
    return [
        dataclasses.replace(segment, images=draw.choice([0, 1, 2]), part=part)
        for segment in random_segments(draw, tasks=5)
        for part in PARTS
        if draw.random() < 0.8
    ]


def straight_through(logits_2, temperature=1.0):
    """One-hot weights (shared, own) with the gradient of the softmax."""
    soft_2 = (logits_2 / temperature).softmax(0)
    hard_2 = torch.tensor([1.0, 0.0] if soft_2[0] >= soft_2[1] else [0.0, 1.0])
    return hard_2 + soft_2 - soft_2.detach()


def per_image(unit, x_ND, segments, weights_T2, scale):
    """The obvious way: every image on its own, through the copies that its part and its task's route say. On what is
    probed autograd goes through both copies, and the gradient of the weights is ``scale`` times what it finds."""
    rows, row = [], 0
    for segment in segments:
        one = dataclasses.replace(segment, images=1)
        own = unit.own[segment.task] if unit.own is not None else None
        for _ in range(segment.images):
            x_LD = x_ND[row : row + segment.tokens]
            row += segment.tokens
            match "shared" if segment.part == "shared" else unit.routes[segment.task]:
                case "shared":
                    rows.append(unit.shared(x_LD, [one]))
                case "own":
                    rows.append(own(x_LD, [one]))
                case "learned":
                    weight = weights_T2[segment.task]
                    fixed = weight.detach()
                    weight = fixed + scale * (weight - fixed) if segment.part == "probe" else fixed
                    rows.append(weight[0] * unit.shared(x_LD, [one]) + weight[1] * own(x_LD, [one]))
    return torch.cat(rows) if rows else x_ND.new_zeros(0, 8)


def gradients(unit, x_ND, logits):
    """Of the input, the logits and all parameters, which are forgotten."""
    named = {"x": x_ND, **{f"logits.{task}": logit for task, logit in logits.items()}, **dict(unit.named_parameters())}
    found = {name: torch.zeros_like(t) if t.grad is None else t.grad for name, t in named.items()}
    for tensor in named.values():
        tensor.grad = None
    return found


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("kind", UNITS)
def test_routed_units_and_their_gradients_equal_a_loop_over_images(kind, scale):
    draw = random.Random(0)
    torch.manual_seed(0)
    for _ in range(25):
        routes = {task: draw.choice(["shared", "own", "learned"]) for task in "abcde"}
        unit = make_unit(kind, routes).double()
        unit.shared_samples = True
        segments = random_parts(draw)
        logits = {task: torch.randn(2, requires_grad=True) for task in "abcde"}
        weights_T2 = {task: straight_through(logit) for task, logit in logits.items()}
        x_ND = torch.randn(sum(s.rows for s in segments), UNITS[kind][1], dtype=torch.float64, requires_grad=True)
        choices = {
            task: Choice(bool(weight[1] > 0.5), weight, scale)
            for task, weight in weights_T2.items()
            if routes[task] == "learned"
        }
        found = unit(x_ND, segments, choices)
        wanted = per_image(unit, x_ND, segments, weights_T2, scale)
        assert found.shape == wanted.shape
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
        upstream_ND = torch.randn(found.shape, dtype=torch.float64)
        (found * upstream_ND).sum().backward(retain_graph=True)
        found_gradients = gradients(unit, x_ND, logits)
        # A sum over everything gives those that the loop does not use a gradient as well.
        nothing = sum(0.0 * logit.sum() for logit in logits.values())
        ((wanted * upstream_ND).sum() + nothing).backward()
        for name, gradient in gradients(unit, x_ND, logits).items():
            if not gradient.any():
                assert not found_gradients[name].any(), name
            torch.testing.assert_close(found_gradients[name], gradient, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("kind", UNITS)
def test_the_copy_not_chosen_sees_the_probed_rows_alone_and_without_gradient(kind, own):
    torch.manual_seed(0)
    unit = make_unit(kind, {"a": "learned", "b": "shared", "c": "own", "d": "learned", "e": "own"})
    unit.shared_samples = True
    images = {"a": [1, 2, 3, 2], "b": [1, 0, 3, 2], "c": [1, 1, 1, 0], "d": [0, 0, 0, 1]}
    segments = [
        Segment(task, n, 5, (2, 2), part=part) for task in images for n, part in zip(images[task], PARTS, strict=True)
    ]
    x_ND = torch.randn(sum(s.rows for s in segments), UNITS[kind][1])
    pieces = dict(zip([(s.task, i % 4) for i, s in enumerate(segments)], split(x_ND, segments), strict=True))
    calls = calls_of({"shared": unit.shared, **{task: unit.own[task] for task in "abcde"}})
    choice = Choice(own, torch.tensor([0.0, 1.0] if own else [1.0, 0.0], requires_grad=True), 5.0)
    unit(x_ND, segments, {"a": choice, "d": choice})

    def rows(*places):
        return torch.cat([pieces[place] for place in places])

    always = [("a", 0), *(("b", i) for i in range(4)), ("c", 0), ("d", 0)]  # to the shared copy
    others = [(task, i) for task in "ad" for i in (1, 2, 3)]
    to_shared = rows(*sorted(always if own else always + others))
    wanted = {"shared": [(to_shared, True)], "b": [], "e": [], "c": [(rows(("c", 1), ("c", 2), ("c", 3)), True)]}
    if own:
        wanted["shared"].append((rows(("a", 2), ("d", 2)), False))
        wanted |= {task: [(rows(*((task, i) for i in (1, 2, 3))), True)] for task in "ad"}
    else:
        wanted["shared"].append((x_ND[:0], False))
        wanted |= {task: [(rows((task, 2)), False)] for task in "ad"}
    if own:  # the call of no rows, by which all processes call the same modules
        wanted["a"].append((x_ND[:0], False))
    assert {name: len(found) for name, found in calls.items()} == {name: len(found) for name, found in wanted.items()}
    for name, of_one in wanted.items():
        for (found, differentiated), (rows_ND, wanted_differentiated) in zip(calls[name], of_one, strict=True):
            assert torch.equal(found, rows_ND), name
            assert differentiated == wanted_differentiated, name


@pytest.mark.parametrize("kind", UNITS)
@pytest.mark.parametrize("part", PARTS[:3])
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("tasks", ["", "ab"])
def test_no_rows_give_no_rows_and_zero_gradients(kind, tasks, part, own):
    unit = make_unit(kind, {"a": "own", "b": "learned", "c": "shared", "d": "shared", "e": "own"})
    unit.shared_samples = True
    grids = {"a": (2, 2), "b": (2, 3)}
    segments = [Segment(task, 0, 1 + math.prod(grids[task]), grids[task], part=part) for task in tasks]
    weights_2 = torch.tensor([0.0, 1.0] if own else [1.0, 0.0], requires_grad=True)
    y_ND = unit(torch.zeros(0, UNITS[kind][1]), segments, {"b": Choice(own, weights_2, 2.0)})
    assert y_ND.shape == (0, 8)
    y_ND.sum().backward()
    chosen = [unit.own[s.task] for s in segments if s.part != "shared" and (s.task == "a" or own)]
    for module in [unit.shared, *chosen]:
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None, name
            assert not parameter.grad.any(), name
    if segments and part == "probe":
        assert weights_2.grad.tolist() == [0.0, 0.0]


def test_a_task_without_images_gets_zero_gradients_and_the_others_theirs():
    unit = make_unit("ffn", dict.fromkeys("abcde", "own"))
    unit(torch.randn(6, 8), [Segment("a", 2, 3, (1, 2)), Segment("b", 0, 3, (1, 2))]).sum().backward()
    assert all(parameter.grad.any() for parameter in unit.own["a"].parameters())
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in unit.own["b"].parameters())


@pytest.mark.parametrize(
    ("routes", "rows", "more"),  # of the calls for 3 x 2 rows of task a; in training for the probe as well
    [
        ({"a": "shared", "b": "shared"}, {"shared": [6], "own": []}, {"shared": [], "own": []}),
        ({"a": "own", "b": "own"}, {"shared": [], "own": [6]}, {"shared": [], "own": []}),
        ({"a": "shared", "b": "own"}, {"shared": [6], "own": [0]}, {"shared": [], "own": []}),
        ({"a": "own", "b": "shared"}, {"shared": [0], "own": [6]}, {"shared": [], "own": []}),
        ({"a": "shared", "b": "learned"}, {"shared": [6], "own": [0]}, {"shared": [0], "own": [0]}),
        ({"a": "own", "b": "learned"}, {"shared": [0], "own": [6]}, {"shared": [0], "own": [0]}),
        ({"a": "learned", "b": "learned"}, {"shared": [0], "own": [6]}, {"shared": [6], "own": [0]}),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_a_copy_is_called_if_any_task_of_the_model_uses_it(routes, rows, more, training):
    unit = make_unit("ffn", routes).train(training)
    calls = calls_of({"shared": unit.shared, "own": unit.own})
    choice = Choice(True, torch.tensor([0.0, 1.0]), 1.0)
    unit(torch.randn(6, 8), [Segment("a", 2, 3, (1, 2), part="probe")], {"a": choice, "b": choice})
    assert rows_of(calls) == ({name: rows[name] + more[name] for name in rows} if training else rows)


def test_with_shared_samples_the_shared_copy_is_called_in_training_even_where_all_routes_are_own():
    unit = make_unit("ffn", {"a": "own", "b": "own"})
    unit.shared_samples = True
    calls = calls_of({"shared": unit.shared, "own": unit.own})
    segments = [Segment("a", 1, 3, (1, 2), part="shared"), Segment("a", 2, 3, (1, 2))]
    unit(torch.randn(9, 8), segments)
    unit(torch.randn(6, 8), segments[1:])
    unit.eval()(torch.randn(6, 8), segments[1:])
    assert rows_of(calls) == {"shared": [3, 0], "own": [6, 6, 6]}
