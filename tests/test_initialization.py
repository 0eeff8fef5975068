"""Initial values by ranges: a part is what the whole has there, and each kind has its distribution."""

import random

import numpy as np
import pytest
import torch

from tests.test_model import build, make_recipe
from ufo_ds.model.classifiers import Part
from ufo_ds.model.initialization import fill, start_values
from ufo_ds.seeding import CHUNK, normal_elements, numpy_generator, uniform_elements

KEY = (7, "init", "blocks.0.ffn.shared.fc1.weight")


@pytest.mark.parametrize("draw", [uniform_elements, normal_elements])
def test_elements_do_not_depend_on_what_else_is_drawn(draw):
    whole = draw(range(10_007), *KEY)
    pick = random.Random(0)
    spans = [sorted(pick.choices(range(10_008), k=2)) for _ in range(200)] + [[5, 5], [0, 1], [10_006, 10_007]]
    for start, stop in spans:
        assert torch.equal(draw(range(start, stop), *KEY), whole[start:stop]), (start, stop)
    assert not torch.equal(draw(range(8), *KEY), draw(range(8), 8, *KEY[1:]))


def test_normal_elements_across_a_chunk_and_far_away():
    whole = normal_elements(range(CHUNK + 100), "far")
    assert torch.equal(normal_elements(range(CHUNK - 7, CHUNK + 9), "far"), whole[CHUNK - 7 : CHUNK + 9])
    far = 10**12 + 3  # elements before it would take hours
    assert torch.equal(
        normal_elements(range(far, far + 5), "far"), normal_elements(range(far - 8, far + 8), "far")[8:13]
    )


def test_elements_are_those_of_numpys_philox():
    raw = numpy_generator(*KEY).bit_generator.random_raw(500)  # 64 bits are two numbers, the lower half first
    words = [half for number in raw.tolist() for half in (number & 0xFFFFFFFF, number >> 32)]
    signed = [word - 2**32 if word >= 2**31 else word for word in words]
    found = uniform_elements(range(3, 1000), *KEY).numpy()
    np.testing.assert_array_equal(found, np.array(signed[3:], np.float32) / np.float32(2**31))
    radius = (-2 * np.log((np.array(words[0::2]) + 1) / 2**32)) ** 0.5
    angle = 2 * np.pi * (np.array(words[1::2]) + 1) / 2**32
    wanted = np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1).flatten()
    np.testing.assert_allclose(normal_elements(range(1000), *KEY).numpy(), wanted, rtol=1e-6, atol=1e-7)


def test_moments():
    number = 400_000
    uniform, normal = uniform_elements(range(number), "moments"), normal_elements(range(number), "moments")
    for values, variance, fourth in ((uniform, 1 / 3, 1 / 5), (normal, 1.0, 3.0)):
        # Four standard deviations of each mean: of x it is sqrt(E x^2 / n), and so on.
        assert abs(values.mean().item()) < 4 * (variance / number) ** 0.5
        assert values.pow(2).mean().item() == pytest.approx(variance, abs=4 * ((fourth - variance**2) / number) ** 0.5)
        neighbours = (values[1:] * values[:-1]).mean().item()
        assert abs(neighbours) < 4 * variance / number**0.5
    assert uniform.abs().max() <= 1.0


@pytest.mark.parametrize("parts", [1, 3, 7])
def test_a_parameter_filled_in_parts_is_the_whole_one(parts):
    """Every kind of parameter, cut into equal parts of which the last ends in padding, as ZeRO-3 cuts it."""
    recipe = make_recipe({"ffn": "learned"})
    model = build(recipe)
    values = start_values(recipe)
    kinds = set()
    for name, parameter in model.named_parameters():
        length = -(-parameter.numel() // parts)
        pieces = torch.full((parts, length), float("nan"))
        for i in range(parts):
            fill(pieces[i], i * length, name, Part(parameter.shape, range(len(parameter))), values)
        flat = pieces.flatten()
        assert torch.equal(flat[: parameter.numel()], parameter.flatten()), name
        assert not flat[parameter.numel() :].any(), name
        kinds.add(name.split(".")[-2])
    assert {"classifier", "qkv", "fc1", "patch", "shared", "neck", "logits"} <= kinds


@pytest.mark.parametrize(("classes", "parts"), [(10_000, 3), (7, 4), (3, 4)])
def test_rows_of_a_classifier_drawn_apart_are_those_of_the_whole(classes, parts):
    values, shape, each = start_values(make_recipe()), torch.Size([classes, 5]), -(-classes // parts)
    name = "heads.a.classifier.weight"
    whole = values(name, shape, range(shape.numel())).view(shape)
    assert whole.std().item() == pytest.approx(0.01, rel=0.5 if classes < 10 else 0.02)
    pieces = torch.full((parts, each, 5), float("nan"))
    for i in range(parts):
        fill(pieces[i].view(-1), 0, name, Part(shape, range(classes)[i * each : (i + 1) * each]), values)
    assert torch.equal(pieces.flatten(0, 1)[:classes], whole)
    assert not pieces.flatten(0, 1)[classes:].any()
