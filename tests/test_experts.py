"""Packing of tokens, and the way of each task's rows through shared and own copies."""

import itertools
import random

import pytest
import torch
import torch.nn.functional as F

from ufo_ds.model.experts import RoutedUnit
from ufo_ds.model.layers import FFN, Attention, Embedding, Norm
from ufo_ds.model.packing import Segment, buckets, concatenate, patchify, split


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


@pytest.mark.parametrize(("size", "patch"), [((16, 16), 8), ((8, 24), 8), ((19, 30), 7), ((5, 5), 5)])
def test_patches_are_those_of_a_convolution(size, patch):
    images = torch.randn(3, 3, *size)
    h, w = size[0] // patch, size[1] // patch
    x_BLP = patchify(images, patch).view(3, 1 + h * w, 3 * patch**2)
    assert not x_BLP[:, 0].any()
    whole = images[:, :, : h * patch, : w * patch]
    assert torch.equal(x_BLP[:, 1:], F.unfold(whole, patch, stride=patch).transpose(1, 2))
    weight = torch.randn(4, 3, patch, patch)
    wanted = F.conv2d(images, weight, stride=patch).flatten(2).transpose(1, 2)
    assert relative(x_BLP[:, 1:] @ weight.flatten(1).T, wanted) < 1e-5


def test_buckets_are_runs_of_images_of_equal_length():
    draw = random.Random(0)
    for _ in range(300):
        segments = random_segments(draw, tasks=5, dim_hw=2)
        lengths = [s.tokens for s in segments for _ in range(s.images)]  # of every image
        assert list(buckets(segments)) == [(len(list(run)), length) for length, run in itertools.groupby(lengths)]


def test_split_gives_each_segment_its_rows():
    draw = random.Random(0)
    for _ in range(50):
        segments = random_segments(draw, tasks=5)
        owners = [s.task for s in segments for _ in range(s.images * s.tokens)]
        rows = torch.arange(len(owners))[:, None]
        pieces = split(rows, segments)
        assert [len(piece) for piece in pieces] == [owners.count(s.task) for s in segments]
        assert torch.equal(concatenate(pieces, like=rows), rows)


# --- experts ----------------------------------------------------------------------------------------------------------

UNITS = {
    "ffn": (lambda _: FFN(8, 12), 8),
    "attn": (lambda _: Attention(8, 2), 8),
    "norm": (lambda _: Norm(8), 8),
    "embed": (lambda task: Embedding(2, 8, {None: (2, 2), "a": (1, 2)}.get(task, (2, 3))), 12),
}


def make_unit(kind, routes):
    """A routed unit whose copies all differ."""
    unit = RoutedUnit(UNITS[kind][0], "abcde", routes)
    with torch.no_grad():
        for parameter in unit.parameters():
            parameter.normal_()
    return unit


def calls_of(modules):
    """The number of rows of every call of the modules, as they come."""
    calls = {name: [] for name in modules}
    for name, module in modules.items():
        module.register_forward_pre_hook(lambda _, args, name=name: calls[name].append(len(args[0])))
    return calls


def per_image(unit, x_ND, segments, weights_T2):
    """The obvious way: every image on its own, through the copies that its task's route says."""
    rows, row = [], 0
    for segment in segments:
        one = Segment(segment.task, 1, segment.tokens, segment.grid_hw)
        own = unit.own[segment.task] if unit.own is not None else None
        for _ in range(segment.images):
            x_LD = x_ND[row : row + segment.tokens]
            row += segment.tokens
            match unit.routes[segment.task]:
                case "shared":
                    rows.append(unit.shared(x_LD, [one]))
                case "own":
                    rows.append(own(x_LD, [one]))
                case "learned":
                    weight = weights_T2[segment.task]
                    rows.append(weight[0] * unit.shared(x_LD, [one]) + weight[1] * own(x_LD, [one]))
    return torch.cat(rows) if rows else x_ND.new_zeros(0, 8)


@pytest.mark.parametrize("kind", UNITS)
def test_routed_units_equal_a_loop_over_images(kind):
    draw = random.Random(0)
    torch.manual_seed(0)
    for _ in range(40):
        routes = {task: draw.choice(["shared", "own", "learned"]) for task in "abcde"}
        unit = make_unit(kind, routes)
        segments = random_segments(draw, tasks=5)
        weights_T2 = {task: torch.randn(2) for task in "abcde"}
        x_ND = torch.randn(sum(s.rows for s in segments), UNITS[kind][1])
        found = unit(x_ND, segments, weights_T2)
        wanted = per_image(unit, x_ND, segments, weights_T2)
        assert found.shape == wanted.shape
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", UNITS)
@pytest.mark.parametrize("segments", [[], [Segment("a", 0, 5, (2, 2)), Segment("b", 0, 7, (2, 3))]])
def test_no_rows_give_no_rows_and_zero_gradients(kind, segments):
    unit = make_unit(kind, {"a": "own", "b": "learned", "c": "shared", "d": "shared", "e": "own"})
    own = [unit.own[segment.task] for segment in segments]
    y_ND = unit(torch.zeros(0, UNITS[kind][1]), segments, {"b": torch.ones(2)})
    assert y_ND.shape == (0, 8)
    y_ND.sum().backward()
    for module in [unit.shared, *own]:
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None, name
            assert not parameter.grad.any(), name


def test_a_task_without_images_gets_zero_gradients_and_the_others_theirs():
    unit = make_unit("ffn", dict.fromkeys("abcde", "own"))
    unit(torch.randn(6, 8), [Segment("a", 2, 3, (1, 2)), Segment("b", 0, 3, (1, 2))]).sum().backward()
    assert all(parameter.grad.any() for parameter in unit.own["a"].parameters())
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in unit.own["b"].parameters())


@pytest.mark.parametrize(
    ("routes", "rows"),  # of the calls for 3 x 2 rows of task a
    [
        ({"a": "shared", "b": "shared"}, {"shared": [6], "own": []}),
        ({"a": "own", "b": "own"}, {"shared": [], "own": [6]}),
        ({"a": "shared", "b": "own"}, {"shared": [6], "own": [0]}),
        ({"a": "own", "b": "shared"}, {"shared": [0], "own": [6]}),
        ({"a": "shared", "b": "learned"}, {"shared": [6], "own": [0]}),
        ({"a": "learned", "b": "learned"}, {"shared": [6], "own": [6]}),
    ],
)
def test_a_copy_is_called_if_any_task_of_the_model_uses_it(routes, rows):
    unit = make_unit("ffn", routes)
    calls = calls_of({"shared": unit.shared, "own": unit.own})
    unit(torch.randn(6, 8), [Segment("a", 2, 3, (1, 2))], {"a": torch.ones(2), "b": torch.ones(2)})
    assert calls == rows
