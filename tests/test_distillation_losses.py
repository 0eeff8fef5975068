"""Losses of distillation: by hand, by torch's own, and by slow loops."""

import math

import pytest
import torch
import torch.nn.functional as F

from ufo_ds.distillation import losses


def test_symmetric_divergence_by_hand():
    """p = (3/4, 1/4), q = (1/2, 1/2): KL(p|q) + KL(q|p) = (3/4 - 1/2) ln(3/2) + (1/4 - 1/2) ln(1/2) = ln(3) / 4."""
    teacher, student = torch.tensor([[math.log(3.0), 0.0]]), torch.zeros(1, 2)
    assert losses.symmetric_divergence(student, teacher, 1.0).item() == pytest.approx(math.log(3) / 8)
    # Logits twice as large at twice the temperature: the same distributions, times T squared.
    assert losses.symmetric_divergence(2 * student, 2 * teacher, 2.0).item() == pytest.approx(math.log(3) / 2)


def test_divergences_are_torchs_in_both_directions():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 5, 7, generator=generator)
    one = F.kl_div((student / 3).log_softmax(1), (teacher / 3).softmax(1), reduction="none").sum(1)
    other = F.kl_div((teacher / 3).log_softmax(1), (student / 3).softmax(1), reduction="none").sum(1)
    assert torch.allclose(losses.symmetric_divergence(student, teacher, 3.0), 9 * (one + other) / 2, atol=1e-6)
    # Of an attribute it is that of two classes with logits x and 0.
    of_each = [losses.symmetric_divergence(*(torch.stack([x[:, i], 0 * x[:, i]], 1) for x in (student, teacher)), 2.0)
               for i in range(7)]  # fmt: skip
    found = losses.binary_symmetric_divergence(student, teacher, 2.0)
    assert torch.allclose(found, torch.stack(of_each).mean(0), atol=1e-6)


def test_feature_losses_by_hand():
    one, other = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[4.0, 3.0], [0.0, 2.0]])
    assert losses.cosine(one, other).tolist() == pytest.approx([1 - 24 / 25, 1.0])
    assert losses.mean_squared_error(one, other).tolist() == pytest.approx([1.0, 2.5])


def test_relational_distance_by_hand():
    """At 0, 90 and 180 degrees: distances sqrt(2), sqrt(2), 2; at 0, 90 and 0 degrees: sqrt(2), sqrt(2), 0."""
    student = torch.tensor([[1.0, 0.0], [0.0, 5.0], [-2.0, 0.0]])
    teacher = torch.tensor([[1.0, 0.0], [0.0, 1.0], [3.0, 0.0]])
    root = math.sqrt(2)
    of_student, of_teacher = (2 * root + 2) / 3, 2 * root / 3
    near = (root / of_student - root / of_teacher) ** 2 / 2  # Huber: below 1
    far = 2 / of_student - 0.5  # and beyond
    assert 2 / of_student > 1
    wanted = [(near + far) / 2, near, (near + far) / 2]
    assert losses.relational_distance(student, teacher).tolist() == pytest.approx(wanted, rel=1e-3)


def test_relational_distance_is_the_slow_one():
    generator = torch.Generator().manual_seed(1)
    student, teacher = torch.randn(6, 4, generator=generator), torch.randn(6, 9, generator=generator)

    def relative(x):
        found = [[(F.normalize(a, dim=0) - F.normalize(b, dim=0)).norm().item() for b in x] for a in x]
        mean = sum(map(sum, found)) / 30
        return [[value / mean for value in row] for row in found]

    one, other, wanted = relative(student), relative(teacher), []
    for i in range(6):
        terms = [abs(one[i][j] - other[i][j]) for j in range(6) if j != i]
        wanted.append(sum(d * d / 2 if d < 1 else d - 0.5 for d in terms) / 5)
    assert losses.relational_distance(student, teacher).tolist() == pytest.approx(wanted, rel=1e-4)


def test_relational_distance_of_few_and_equal_samples_has_a_gradient():
    for count in (0, 1, 3):
        student = torch.ones(count, 4, requires_grad=True)
        found = losses.relational_distance(student, torch.randn(count, 4))
        found.sum().backward()
        assert torch.isfinite(student.grad).all()
        assert found.shape == (count,)


@pytest.mark.parametrize("loss", [losses.cosine, losses.mean_squared_error, losses.relational_distance])
def test_nothing_goes_to_the_teacher(loss):
    student, teacher = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    loss(student, teacher).sum().backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0
