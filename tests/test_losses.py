"""Losses equal hand-computed numbers, torch's own and slow loops; a head's losses are shares of the global mean."""

import math
import random

import pytest
import torch
import torch.nn.functional as F
from transformers import get_cosine_with_min_lr_schedule_with_warmup

from ufo_ds import losses
from ufo_ds.model.heads import LOSSES, BatchNormNeck, TaskHead
from ufo_ds.recipe import CosFace, CrossEntropy, Head, Loss, Optimizer, Schedule, Triplet
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


# --- the neck ---------------------------------------------------------------------------------------------------------


def make_necks(dim=5):
    """Ours and torch's, whose shift is zero, with the same weights."""
    ours, theirs = BatchNormNeck(dim), torch.nn.BatchNorm1d(dim)
    with torch.no_grad():
        ours.weight.copy_(theirs.weight.copy_(1 + randn(dim)))
    return ours, theirs


def test_the_neck_is_batch_norm_over_several_batches():
    ours, theirs = make_necks()
    for seed, count in enumerate([8, 2, 5, 31]):
        x = (3 + 2 * randn(count, 5, seed=seed)).requires_grad_()
        weight = randn(count, 5, seed=100 + seed)
        results = []
        for neck in (ours, theirs):
            neck.zero_grad()
            y = neck(x)
            (grad,) = torch.autograd.grad((y * weight).sum(), x, retain_graph=True)
            (y * weight).sum().backward()
            results.append((y, grad, neck.weight.grad, neck.running_mean.clone(), neck.running_var.clone()))
        for found, wanted in zip(*results, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    ours.eval(), theirs.eval()
    x = randn(4, 5, seed=9)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours(x[:1]), theirs(x[:1]), rtol=1e-5, atol=1e-5)


def test_the_necks_statistics_do_not_cancel_far_from_zero():
    ours, theirs = make_necks()
    x = 4096 + randn(16, 5)
    torch.testing.assert_close(ours(x).double(), theirs.double()(x.double()), rtol=1e-2, atol=1e-2)


def test_evaluation_leaves_the_running_statistics_alone():
    neck, _ = make_necks()
    neck(randn(6, 5))
    mean, var = neck.running_mean.clone(), neck.running_var.clone()
    neck.eval()
    neck(100 * randn(6, 5))
    assert torch.equal(neck.running_mean, mean)
    assert torch.equal(neck.running_var, var)


def test_one_sample_becomes_zero_and_its_gradients_are_finite():
    neck, _ = make_necks()
    x = randn(1, 5).requires_grad_()
    y = neck(x)
    assert not y.any()
    (y * randn(1, 5, seed=1)).sum().backward()
    assert not x.grad.any()
    assert not neck.weight.grad.any()
    torch.testing.assert_close(neck.running_mean, 0.1 * x[0].detach())  # 0.9 x 0 + 0.1 x


def test_one_sample_says_nothing_about_the_running_variance():
    neck, _ = make_necks()
    neck(randn(1, 5))
    assert neck.running_var.tolist() == [1.0] * 5


def test_no_samples_give_none_and_zero_gradients():
    neck, _ = make_necks()
    y = neck(torch.zeros(0, 5))
    assert y.shape == (0, 5)
    y.sum().backward()
    assert not neck.weight.grad.any()


def test_no_samples_leave_the_running_statistics_alone():
    neck, _ = make_necks()
    neck(3 + randn(6, 5))
    mean, var = neck.running_mean.clone(), neck.running_var.clone()
    neck(torch.zeros(0, 5))
    assert torch.equal(neck.running_mean, mean)
    assert torch.equal(neck.running_var, var)


# --- heads ------------------------------------------------------------------------------------------------------------


def make_head(kind, **loss):
    head = TaskHead(Head(type=kind), 6, 4, Loss(**loss))
    with torch.no_grad():
        for i, tensor in enumerate([*head.parameters(), *head.buffers()]):
            tensor.copy_(randn(*tensor.shape, seed=i).abs() + 0.1)
        head.classifier.weight.copy_(randn(4, 6, seed=7))
    return head


def cosines(features, weight):
    return torch.stack([torch.stack([F.cosine_similarity(x, w, dim=0) for w in weight]) for x in features])


@pytest.mark.parametrize(
    ("kind", "loss"),
    [
        ("linear", {"cross_entropy": CrossEntropy(label_smoothing=0.1, weight=2.0)}),
        ("margin", {"cosface": CosFace(scale=8, margin=0.2)}),
    ],
)
@pytest.mark.parametrize("cut", [0, 1, 5, 9])
def test_losses_and_gradients_of_two_parts_add_up_to_the_whole(kind, loss, cut):
    head = make_head(kind, **loss).eval()  # the neck's statistics are those of the whole batch otherwise
    features, labels = randn(9, 6), random_labels(9, 4)
    wanted = head(features, labels, 9)
    wanted.sum().backward()
    gradients = [parameter.grad.clone() for parameter in head.parameters()]
    head.zero_grad()
    found = head(features[:cut], labels[:cut], 9) + head(features[cut:], labels[cut:], 9)
    found.sum().backward()
    torch.testing.assert_close(found, wanted)
    for parameter, gradient in zip(head.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-5, atol=1e-6)


def test_a_linear_heads_losses_are_the_weighted_mean():
    head = make_head("linear", cross_entropy=CrossEntropy(label_smoothing=0.1, weight=2.0))
    features, labels = randn(9, 6), random_labels(9, 4)
    logits = features @ head.classifier.weight.T + head.classifier.bias
    found = dict(zip(LOSSES, head(features, labels, 9).tolist(), strict=True))
    wanted = 2.0 * F.cross_entropy(logits, labels, label_smoothing=0.1).item()
    assert found == dict.fromkeys(LOSSES, 0.0) | {"cross_entropy": pytest.approx(wanted)}


def test_a_margin_heads_losses_see_the_neck_and_the_triplet_does_not():
    head = make_head("margin", cosface=CosFace(scale=8, margin=0.2, weight=3.0), triplet=Triplet(weight=0.5))
    features, labels = randn(9, 6), random_labels(9, 4)
    norm = torch.nn.BatchNorm1d(6)
    norm.weight.data.copy_(head.neck.weight)
    found = dict(zip(LOSSES, head(features, labels, 9).tolist(), strict=True))
    logits = 8 * (cosines(norm(features), head.classifier.weight) - 0.2 * F.one_hot(labels, 4))
    triplet = sum(slow_triplet(features, labels, features, labels, "soft")) / 9
    assert found["cross_entropy"] == 0.0
    assert found["cosface"] == pytest.approx(3.0 * F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert found["triplet"] == pytest.approx(0.5 * triplet, rel=1e-5)


def test_without_labels_a_head_gives_the_embedding_and_the_logits():
    features = randn(3, 6)
    head = make_head("margin", cosface=CosFace()).eval()
    embedding, logits = head(features)
    wanted = (features - head.neck.running_mean) / (head.neck.running_var + 1e-5).sqrt() * head.neck.weight
    torch.testing.assert_close(embedding, wanted)
    torch.testing.assert_close(logits, cosines(embedding, head.classifier.weight))
    head = make_head("linear", cross_entropy=CrossEntropy()).eval()
    embedding, logits = head(features)
    assert torch.equal(embedding, features)
    torch.testing.assert_close(logits, features @ head.classifier.weight.T + head.classifier.bias)


@pytest.mark.parametrize("training", [True, False])
def test_a_task_without_samples_has_zero_losses_and_gradients(training):
    for head in (
        make_head("linear", cross_entropy=CrossEntropy()),
        make_head("margin", cosface=CosFace(), triplet=Triplet()),
    ):
        features = torch.zeros(0, 6, requires_grad=True)
        found = head.train(training)(features, torch.zeros(0, dtype=torch.int64), 0)
        assert found.tolist() == [0.0] * len(LOSSES)
        found.sum().backward()
        assert all(parameter.grad is not None and not parameter.grad.any() for parameter in head.parameters())


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
