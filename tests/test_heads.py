"""Necks are torch's batch norm; a head's losses are shares of the global mean, of all classes or of some."""

import pytest
import torch
import torch.nn.functional as F

from tests.test_losses import randn, random_labels, slow_triplet
from ufo_ds import losses
from ufo_ds.model.heads import LOSSES, BatchNormNeck, TaskHead
from ufo_ds.recipe_task import (
    AMSoftmax,
    ArcFace,
    BinaryCrossEntropy,
    Circle,
    CosFace,
    CrossEntropy,
    Head,
    Loss,
    Triplet,
)
from ufo_ds.seeding import torch_generator

# --- the neck ---------------------------------------------------------------------------------------------------------


def make_necks(dim=5):
    """Ours and torch's, whose shift is zero, with the same weights."""
    ours, theirs = BatchNormNeck(dim, scale=True), torch.nn.BatchNorm1d(dim)
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
        ("linear", {"binary_cross_entropy": BinaryCrossEntropy(weight=2.0)}),
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


def test_mixed_attributes_are_soft_targets():
    head = make_head("linear", binary_cross_entropy=BinaryCrossEntropy(weight=2.0))
    features, labels, others = randn(9, 6), random_labels(9, 16), random_labels(9, 16, seed=1)
    weight = torch.rand(9, generator=torch.Generator().manual_seed(2))
    one, other = [((x[:, None] & torch.tensor([1, 2, 4, 8])) > 0).float() for x in (labels, others)]
    logits = features @ head.classifier.weight.T + head.classifier.bias
    found = dict(zip(LOSSES, head(features, labels, 9, mix=(others, weight)).tolist(), strict=True))
    targets = weight[:, None] * one + (1 - weight[:, None]) * other
    wanted = 2.0 * F.binary_cross_entropy_with_logits(logits, targets).item()
    assert found == dict.fromkeys(LOSSES, 0.0) | {"binary_cross_entropy": pytest.approx(wanted)}


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


def test_normalised_triplets_are_between_directions_of_embeddings():
    features, labels = randn(8, 6), random_labels(8, 3)
    head = make_head("margin", cosface=CosFace(), triplet=Triplet(normalize=True))
    found = head(features, labels, 8)[LOSSES.index("triplet")]
    embeddings = (features - features.mean(0)) / (features.var(0, unbiased=False) + 1e-5).sqrt() * head.neck.weight
    unit = embeddings / embeddings.norm(dim=1, keepdim=True)
    assert found.item() == pytest.approx(sum(slow_triplet(unit, labels, unit, labels, "soft")) / 8, rel=1e-5)


def test_every_loss_of_a_margin_head_is_on_its_cosines():
    given = {
        "cross_entropy": CrossEntropy(scale=6, label_smoothing=0.1, weight=0.5),
        "cosface": CosFace(scale=8, margin=0.1),
        "am_softmax": AMSoftmax(scale=5, weight=2.0),
        "arcface": ArcFace(scale=7, margin=0.4, weight=3.0),
        "circle": Circle(scale=9, margin=0.2),
    }
    head = make_head("margin", **given)
    features, labels = randn(9, 6), random_labels(9, 4)
    norm = torch.nn.BatchNorm1d(6)
    norm.weight.data.copy_(head.neck.weight)
    x = cosines(norm(features), head.classifier.weight)
    wanted = {
        "cross_entropy": 0.5 * F.cross_entropy(6 * x, labels, label_smoothing=0.1),
        "cosface": losses.cosface(x, labels, 8, 0.1).mean(),
        "am_softmax": 2 * losses.cosface(x, labels, 5, 0.35).mean(),
        "arcface": 3 * losses.arcface(x, labels, 7, 0.4).mean(),
        "circle": losses.circle(x, labels, 9, 0.2).mean(),
    }
    found = dict(zip(LOSSES, head(features, labels, 9).tolist(), strict=True))
    assert found == dict.fromkeys(LOSSES, 0.0) | {
        name: pytest.approx(value.item(), rel=1e-5) for name, value in wanted.items()
    }


@pytest.mark.parametrize("share", [0.05, 0.5, 1.0])
def test_sampled_negatives_are_a_softmax_over_the_sampled_classes(share):
    classes = 60
    head = TaskHead(Head(type="margin", sampled_negatives=share), 6, classes, Loss(arcface=ArcFace(scale=8)), (3, "a"))
    with torch.no_grad():
        head.classifier.weight.copy_(randn(classes, 6, seed=7))
        head.neck.weight.fill_(1.0)
    features, labels = randn(9, 6), random_labels(9, classes)
    seen = set()
    for step in range(3):
        head.zero_grad()
        found = head(features, labels, 9, (step, 0)).sum()
        found.backward()
        draws = torch.rand(classes, generator=torch_generator(3, "a", step, 0)).tolist()
        used = [c for c in range(classes) if draws[c] < share or c in labels.tolist()]
        seen.add(tuple(used))
        weight = head.classifier.weight.detach().clone().requires_grad_()
        x = cosines(torch.nn.BatchNorm1d(6)(features), weight[used])
        wanted = losses.arcface(x, torch.tensor([used.index(label) for label in labels.tolist()]), 8, 0.5).mean()
        wanted.backward()
        torch.testing.assert_close(found, wanted)
        torch.testing.assert_close(head.classifier.weight.grad, weight.grad, rtol=1e-4, atol=1e-6)
        idle = [c for c in range(classes) if c not in used]
        assert not head.classifier.weight.grad[idle].any()
        assert head.classifier.weight.grad[used].any(1).all()
    assert len(seen) == (1 if share == 1.0 else 3)


def test_a_sharded_margin_head_has_no_logits():
    head = TaskHead(Head(type="margin", sharded=True), 6, 4, Loss(cosface=CosFace()))
    with torch.no_grad():
        head.neck.weight.fill_(1.0)
    embedding, logits = head.eval()(randn(3, 6))
    assert (embedding.shape, logits.shape) == ((3, 6), (3, 0))


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


# --- mixed samples ----------------------------------------------------------------------------------------------------


def test_mixed_samples_have_cross_entropy_with_soft_targets():
    head = TaskHead(Head(type="linear"), 6, 5, Loss(cross_entropy=CrossEntropy(label_smoothing=0.1, weight=1.5)))
    with torch.no_grad():
        head.classifier.weight.copy_(randn(5, 6, seed=1))
        head.classifier.bias.copy_(randn(5, seed=2))
    features = randn(9, 6, seed=3).requires_grad_()
    first, second = random_labels(9, 5), random_labels(9, 5).flip(0)
    weight = torch.rand(9, generator=torch_generator("mix"))
    found = head(features, first, 12, mix=(second, weight)).sum()
    targets = weight[:, None] * F.one_hot(first, 5) + (1 - weight[:, None]) * F.one_hot(second, 5)
    logits = features @ head.classifier.weight.T + head.classifier.bias
    expected = 1.5 * F.cross_entropy(logits, targets, label_smoothing=0.1, reduction="sum") / 12
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, features)[0], torch.autograd.grad(expected, features)[0])
    whole = head(features, first, 12, mix=(second, torch.ones(9))).sum()
    torch.testing.assert_close(whole, head(features, first, 12).sum())
