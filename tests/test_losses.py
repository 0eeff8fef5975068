"""Losses equal hand-computed numbers, torch's own and slow loops."""

import math
import random

import pytest
import torch
import torch.nn.functional as F
from transformers import get_cosine_with_min_lr_schedule_with_warmup

from ufo_ds import losses
from ufo_ds.recipe import Optimizer, Schedule
from ufo_ds.training.schedule import learning_rate


def random_labels(count, classes, seed=0):
    return torch.randint(0, classes, (count,), generator=torch.Generator().manual_seed(seed))


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- cross entropy and CosFace ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_label_smoothing_is_cross_entropy_with_soft_targets(smoothing):
    logits, labels = randn(7, 5), random_labels(7, 5)
    targets = (1 - smoothing) * F.one_hot(labels, 5) + smoothing / 5
    wanted = -(targets * logits.log_softmax(1)).sum(1)
    found = losses.cross_entropy(logits, labels, smoothing)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(found.mean(), torch.nn.CrossEntropyLoss(label_smoothing=smoothing)(logits, labels))


def test_cosface_by_hand():
    cosines = torch.tensor([[0.8, 0.3, -0.5], [0.1, 0.6, 0.2]])
    found = losses.cosface(cosines, torch.tensor([0, 2]), scale=10, margin=0.2)
    # First: 10 x (0.8 - 0.2) = 6 against 3 and -5: ln(1 + e^-3 + e^-11) = ln 1.0498038 = 0.0486033.
    # Second: 10 x (0.2 - 0.2) = 0 against 1 and 6: ln(1 + e + e^6) = ln 407.1470753 = 6.0091745.
    assert found.tolist() == pytest.approx([0.0486033, 6.0091745], abs=1e-6)


def test_cosface_is_cross_entropy_with_a_margin_on_the_right_class():
    cosines = 2 * torch.rand(9, 6, generator=torch.Generator().manual_seed(0)) - 1
    labels = random_labels(9, 6)
    wanted = F.cross_entropy(30 * (cosines - 0.35 * F.one_hot(labels, 6)), labels, reduction="none")
    torch.testing.assert_close(losses.cosface(cosines, labels, scale=30, margin=0.35), wanted)


def test_cosface_of_no_samples_is_empty():
    assert losses.cosface(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), 30, 0.2).shape == (0,)


# --- attributes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attributes", [1, 5, 63])
@pytest.mark.parametrize("count", [0, 1, 7])
def test_binary_cross_entropy_is_torchs_on_the_bits(attributes, count):
    logits = 3 * randn(count, attributes)
    targets = (randn(count, attributes, seed=1) > 0.5).float()
    labels = torch.tensor([sum(2**i for i in row.nonzero()[:, 0].tolist()) for row in targets], dtype=torch.int64)
    found = losses.binary_cross_entropy(logits, labels)
    wanted = torch.nn.BCEWithLogitsLoss(reduction="none")(logits, targets).mean(1)
    assert found.shape == (count,)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(losses.binary_cross_entropy(logits.bfloat16(), labels), wanted, rtol=0.05, atol=0.05)


def test_binary_cross_entropy_by_hand():
    # Has attributes 0 and 2, of logits ln 3, 0, -ln 3: -ln 3/4, -ln 1/2, -ln 1/4, in all ln(4/3 x 2 x 4).
    logits = torch.tensor([[math.log(3), 0, -math.log(3)]])
    assert losses.binary_cross_entropy(logits, torch.tensor([0b101])).item() == pytest.approx(math.log(32 / 3) / 3)


# --- margins ----------------------------------------------------------------------------------------------------------


def test_arcface_by_hand():
    cosines = torch.tensor([[0.6, 0.3, -0.5], [0.8, 0.1, -0.6]])
    found = losses.arcface(cosines, torch.tensor([0, 2]), scale=10, margin=0.5)
    # First: cos 0.5 = 0.8775826, sin 0.5 = 0.4794255: 0.6 x 0.8775826 - 0.8 x 0.4794255 = 0.1430091, so 1.430091
    # against 3 and -5: ln(1 + e^1.569909 + e^-6.430091) = ln 5.8078171 = 1.7592046.
    # Second: -0.6 x 0.8775826 - 0.8 x 0.4794255 = -0.9100900, so -9.100900 against 8 and 1:
    # ln(1 + e^17.1009 + e^10.1009) = 17.1018116.
    assert found.tolist() == pytest.approx([1.7592046, 17.1018116], abs=1e-5)


def test_arcface_adds_the_margin_to_the_angle_and_never_rises_with_it():
    angles = torch.linspace(0, math.pi, 2001, dtype=torch.float64)
    cosines, labels = angles.cos()[:, None], torch.zeros(2001, dtype=torch.int64)
    for margin in (0.1, 0.5, 1.5):
        found = losses.arcface_logits(cosines, labels, 1.0, margin)[:, 0]
        within = angles < math.pi - margin
        torch.testing.assert_close(found[within], (angles + margin).cos()[within], rtol=0, atol=2e-6)
        torch.testing.assert_close(found[~within], angles.cos()[~within] - margin * math.sin(margin))
        assert (found.diff() < 0).all()


@pytest.mark.parametrize("cosine", [1.0, -1.0, 1.0 + 1e-6, -1.0 - 1e-6])
@pytest.mark.parametrize("loss", [losses.arcface, losses.circle, losses.cosface])
def test_margins_at_parallel_features_have_finite_gradients(cosine, loss):
    cosines = torch.tensor([[cosine, 0.2], [0.1, cosine]], requires_grad=True)
    found = loss(cosines, torch.tensor([0, 1]), 64, 0.5)
    assert found.isfinite().all()
    found.sum().backward()
    assert cosines.grad.isfinite().all()
    assert cosines.grad.abs().max() <= 64 * 2.5001  # circle: 1 + margin - cosine


def test_circle_by_hand():
    cosines = torch.tensor([[0.6, 0.3, -0.5]])
    found = losses.circle(cosines, torch.tensor([0]), scale=10, margin=0.25)
    # Right: 10 x (1.25 - 0.6) x (0.6 - 0.75) = -0.975. Others: 10 x 0.55 x 0.05 = 0.275, and 0 where n < -m.
    # ln(1 + e^(0.275 + 0.975) + e^0.975) = ln(1 + 3.4903430 + 2.6511672) = ln 7.1415102 = 1.9659243.
    assert found.tolist() == pytest.approx([1.9659243], abs=1e-6)


def test_circle_is_the_papers_sum_over_pairs_of_similarities():
    cosines, labels = 2 * torch.rand(7, 5, generator=torch.Generator().manual_seed(0)) - 1, random_labels(7, 5)
    gamma, m = 12.0, 0.3
    for found, row, label in zip(
        losses.circle(cosines, labels, gamma, m), cosines.tolist(), labels.tolist(), strict=True
    ):
        total = 0.0
        for n in (value for i, value in enumerate(row) if i != label):
            p = row[label]
            positive = gamma * max(1 + m - p, 0) * (p - (1 - m))
            total += math.exp(gamma * max(n + m, 0) * (n - m) - positive)
        assert found.item() == pytest.approx(math.log1p(total), rel=1e-5)


def test_circles_weights_are_constants():
    p, n, m = 0.4, 0.1, 0.25
    cosines = torch.tensor([[p, n]], dtype=torch.float64, requires_grad=True)
    losses.circle_logits(cosines, torch.tensor([0]), 2.0, m).sum().backward()
    assert cosines.grad[0].tolist() == pytest.approx([2 * (1 + m - p), 2 * (n + m)])


@pytest.mark.parametrize("logits", [losses.cosface_logits, losses.arcface_logits])
def test_gradients_of_margins_are_those_of_finite_differences(logits):
    cosines = (
        1.8 * torch.rand(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 0.9
    ).requires_grad_()
    labels = random_labels(5, 4)
    assert torch.autograd.gradcheck(lambda x: losses.cross_entropy(logits(x, labels, 5.0, 0.4), labels), [cosines])


class Alone:
    """A process that has all classes."""

    def all_reduce(self, x):
        return x

    def all_max(self, x):
        return x


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_spread_cross_entropy_of_one_process_is_torchs(smoothing):
    logits, labels = (50 * randn(7, 5)).double().requires_grad_(), random_labels(7, 5)
    found = losses.cross_entropy(logits, labels, smoothing, Alone())
    torch.testing.assert_close(found, F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing))
    assert torch.autograd.gradcheck(lambda x: losses.cross_entropy(x / 20, labels, smoothing, Alone()), [logits])


@pytest.mark.parametrize("logits", [losses.cosface_logits, losses.arcface_logits, losses.circle_logits])
def test_margins_of_some_columns_are_those_columns_of_all(logits):
    cosines, labels = 2 * torch.rand(9, 6, generator=torch.Generator().manual_seed(0)) - 1, random_labels(9, 6)
    wanted = logits(cosines, labels, 10.0, 0.3)
    for start, stop in [(0, 2), (2, 5), (5, 6), (3, 3)]:
        here = (labels >= start) & (labels < stop)
        found = logits(cosines[:, start:stop], (labels - start).masked_fill(~here, -1), 10.0, 0.3)
        assert torch.equal(found, wanted[:, start:stop])


# --- triplet ----------------------------------------------------------------------------------------------------------


def slow_triplet(anchors, anchor_labels, features, labels, margin):
    result = []
    for anchor, label in zip(anchors.tolist(), anchor_labels.tolist(), strict=True):
        farthest, nearest = -math.inf, math.inf
        for other, other_label in zip(features.tolist(), labels.tolist(), strict=True):
            distance = math.dist(anchor, other)
            if label == other_label:
                farthest = max(farthest, distance)
            else:
                nearest = min(nearest, distance)
        gap = farthest - nearest
        if math.isinf(gap):
            result.append(0.0)
        else:
            result.append(math.log1p(math.exp(gap)) if margin == "soft" else max(gap + margin, 0.0))
    return result


@pytest.mark.parametrize("margin", ["soft", 0.0, 0.3, 2.0])
def test_triplet_equals_a_double_loop(margin):
    draw = random.Random(0)
    for seed in range(30):
        features = randn(draw.randint(2, 12), 3, seed=seed)
        labels = random_labels(len(features), draw.randint(1, 5), seed)
        chosen = torch.tensor(draw.sample(range(len(features)), draw.randint(1, len(features))))
        found = losses.batch_hard_triplet(features[chosen], labels[chosen], features, labels, margin)
        wanted = slow_triplet(features[chosen], labels[chosen], features, labels, margin)
        assert found.tolist() == pytest.approx(wanted, rel=1e-5, abs=1e-6)


def test_triplet_by_hand():
    features = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 1.0], [6.0, 8.0]])
    labels = torch.tensor([0, 0, 1, 2])
    # From (0, 0): farthest positive 5, nearest negative 1. From (3, 4): positive 5, negatives sqrt(9 + 9) = 4.2426 and
    # 5. (0, 1) and (6, 8) are alone, positive 0: nearest negatives 1 and 5.
    gaps = [4.0, 5 - 18**0.5, -1.0, -5.0]
    found = losses.batch_hard_triplet(features, labels, features, labels, 1.5)
    assert found.tolist() == pytest.approx([max(gap + 1.5, 0) for gap in gaps])
    soft = losses.batch_hard_triplet(features, labels, features, labels, "soft")
    assert soft.tolist() == pytest.approx([math.log(1 + math.exp(gap)) for gap in gaps])


def test_triplet_tells_small_distances_apart_far_from_the_origin():
    # In fp32 the squares (1000^2 = 1e6, spacing 0.06) would swallow distances of 1/16 and 1/8.
    features = torch.tensor([[1000.0], [1000.0625], [1000.125]])
    labels = torch.tensor([0, 0, 1])
    found = losses.batch_hard_triplet(features, labels, features, labels, 1.0)
    assert found.tolist() == [1 + 0.0625 - 0.125, 1 + 0.0625 - 0.0625, 1 + 0.0 - 0.0625]


@pytest.mark.parametrize("margin", ["soft", 0.3])
def test_an_anchor_without_negatives_counts_zero(margin):
    features, labels = randn(4, 3).requires_grad_(), torch.zeros(4, dtype=torch.int64)
    found = losses.batch_hard_triplet(features, labels, features, labels, margin)
    assert found.tolist() == [0.0] * 4
    found.sum().backward()
    assert not features.grad.any()


@pytest.mark.parametrize("others", [0, 3])
def test_no_anchors_give_no_losses_that_stay_in_the_graph(others):
    anchors, none = torch.zeros(0, 3, requires_grad=True), torch.zeros(0, dtype=torch.int64)
    found = losses.batch_hard_triplet(anchors, none, randn(others, 3), torch.arange(others), "soft")
    assert found.shape == (0,)
    found.sum().backward()
    assert anchors.grad.shape == (0, 3)


@pytest.mark.parametrize("margin", ["soft", 0.3])
def test_identical_features_have_finite_gradients(margin):
    features, labels = torch.ones(4, 3, requires_grad=True), torch.tensor([0, 0, 1, 1])
    found = losses.batch_hard_triplet(features, labels, features, labels, margin)
    assert found.tolist() == pytest.approx([math.log(2) if margin == "soft" else margin] * 4)
    found.sum().backward()
    assert features.grad.isfinite().all()


def test_triplet_gradients_are_those_of_finite_differences():
    features, labels = randn(6, 3).double().requires_grad_(), torch.tensor([0, 0, 1, 1, 2, 2])

    def loss(x):
        return losses.batch_hard_triplet(x, labels, x, labels, "soft").sum()

    loss(features).backward()
    step = 1e-2  # the loss is fp32
    for i, j in [(0, 0), (2, 1), (5, 2)]:
        shift = torch.zeros_like(features)
        shift[i, j] = step
        wanted = (loss(features.detach() + shift) - loss(features.detach() - shift)) / (2 * step)
        assert features.grad[i, j].item() == pytest.approx(wanted.item(), abs=2e-3)


# --- the learning rate ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "warmup", "lr", "min_lr"),
    [(50, 0, 1e-3, 0.0), (50, 10, 0.2, 0.004), (7, 6, 1.0, 0.5), (1, 0, 1e-3, 0.0), (5, 5, 1e-3, 1e-4)],
)
def test_the_learning_rate_is_transformers_cosine(steps, warmup, lr, min_lr):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    theirs = get_cosine_with_min_lr_schedule_with_warmup(optimizer, warmup, steps, min_lr=min_lr)
    schedule = Schedule(steps=steps, warmup_steps=warmup, min_lr=min_lr)
    for step in range(steps):
        optimizer.step()
        theirs.step()
        assert learning_rate(step, Optimizer(lr=lr), schedule) == pytest.approx(theirs.get_last_lr()[0], rel=1e-6)


def test_the_learning_rate_by_hand():
    schedule, optimizer = Schedule(steps=12, warmup_steps=4, min_lr=0.2), Optimizer(lr=1.0)
    found = [learning_rate(step, optimizer, schedule) for step in (0, 3, 5, 7, 11)]
    # A quarter of the way up; the top; a quarter, half and the whole of the way down: 0.2 + 0.8 x (1 + cos) / 2.
    assert found == pytest.approx([0.25, 1.0, 0.2 + 0.8 * (1 + 0.5**0.5) / 2, 0.6, 0.2])
