"""Compares a head whose samples and classes are spread over ranks with one process that has them all.

    torchrun --nproc_per_node 3 tests/distributed/holders.py RESULTS.json

Without DeepSpeed: of a parameter that is whole on every rank, the gradients are added up here. The results are, for
every case, the largest relative difference (max |d| / max |reference|) of anything that a head gives.
"""

import itertools
import json
import sys

import torch
import torch.distributed as dist

from ufo_ds.model.heads import BatchNormNeck, TaskHead
from ufo_ds.parallel.collectives import RankGroup
from ufo_ds.parallel.placement import share
from ufo_ds.recipe_task import AMSoftmax, ArcFace, Circle, CosFace, CrossEntropy, Head, Loss, Triplet
from ufo_ds.seeding import torch_generator

DIM = 6
LOSSES = {
    "linear": Loss(cross_entropy=CrossEntropy(label_smoothing=0.1, weight=2.0), triplet=Triplet(normalize=True)),
    "cosface": Loss(cosface=CosFace(scale=8), triplet=Triplet(margin=0.3, weight=0.5)),
    "arcface": Loss(arcface=ArcFace(scale=8, margin=1.2)),
    "circle": Loss(circle=Circle(scale=8)),
    "all": Loss(
        cross_entropy=CrossEntropy(label_smoothing=0.2, scale=4.0), cosface=CosFace(scale=4), am_softmax=AMSoftmax(),
        arcface=ArcFace(scale=4), circle=Circle(scale=4),
    ),
}  # fmt: skip


class Worst(dict):
    """The largest relative difference of each kind, and of all."""

    def note(self, kind: str, found: torch.Tensor, wanted: torch.Tensor, scale: float | None = None) -> None:
        assert found.shape == wanted.shape, (kind, found.shape, wanted.shape)
        if not wanted.numel():
            return
        scale = wanted.abs().max().item() if scale is None else scale
        difference = (found.detach() - wanted.detach()).abs().max().item()
        assert difference == difference, kind
        # What cancels to zero or nearly (the loss of a single class, a gradient through a batch norm over two samples)
        # is compared on the scale of what it is the difference of, about 1.
        self[kind] = max(self.get(kind, 0.0), difference / max(scale, 0.1))


def random(*shape: int, key: tuple) -> torch.Tensor:
    return torch.randn(shape, generator=torch_generator(*key))


def make(head: TaskHead, whole: TaskHead | None = None) -> TaskHead:
    """Fill a head with values; with those of the whole one, where it has a part."""
    with torch.no_grad():
        for i, (name, parameter) in enumerate(head.named_parameters()):
            if whole is None:
                parameter.copy_(random(*parameter.shape, key=("value", i)))
            else:
                value = whole.get_parameter(name)
                rows = head.classifier.rows if name == "classifier.weight" else range(len(value))
                parameter.zero_()
                parameter[: len(rows)] = value[rows.start : rows.stop]
    return head


def compare_heads(group: RankGroup, kind: str, classes: int, total: int, sampled: float, sharded: bool) -> Worst:
    options = Head(type="linear" if kind == "linear" else "margin", sampled_negatives=sampled)
    arguments = (options, DIM, classes, LOSSES[kind], ("key",))
    whole = make(TaskHead(*arguments))
    ours = TaskHead(*arguments)
    ours.set_group(group, sharded)
    make(ours, whole)
    worst, rows = Worst(), ours.classifier.rows
    for step in range(2):
        features = random(total, DIM, key=("features", step, total)).requires_grad_()
        labels = torch.randint(0, classes, (total,), generator=torch_generator("labels", step, total))
        mine = share(range(total), group.size, group.part)
        local = features.detach()[mine.start : mine.stop].requires_grad_()
        for head in (whole, ours):
            head.zero_grad()
        wanted = whole(features, labels, total, (step, 1))
        wanted.sum().backward()
        part = ours(local, labels[mine.start : mine.stop], total, (step, 1))
        part.sum().backward()
        worst.note("loss", group.all_reduce(part.detach()), wanted)
        if total:
            scale = features.grad.abs().max().item()
            worst.note("features", local.grad, features.grad[mine.start : mine.stop], scale)
        for name, parameter in ours.named_parameters():
            reference = whole.get_parameter(name).grad
            scale = reference.abs().max().item()
            if name == "classifier.weight" and sharded:
                assert not parameter.grad[len(rows) :].any()
                worst.note(name, parameter.grad[: len(rows)], reference[rows.start : rows.stop], scale)
            else:
                worst.note(name, group.all_reduce(parameter.grad), reference, scale)
        for name, buffer in ours.named_buffers():
            worst.note(name, buffer, whole.get_buffer(name))
    whole.eval(), ours.eval()
    # In evaluation the ranks' numbers of images are any.
    counts = [0, 3, 1][: group.size]
    images = random(counts[group.part], DIM, key=("evaluation", group.part))
    for found, expected in zip(ours(images), whole(images), strict=True):
        worst.note("evaluation", found, expected)
    return worst


def compare_necks(group: RankGroup, counts: list[int]) -> Worst:
    """With torch's batch norm over the gathered batch, where that takes it: it refuses one sample."""
    ours, theirs, worst = BatchNormNeck(DIM, scale=True), torch.nn.BatchNorm1d(DIM), Worst()
    ours.group = group
    with torch.no_grad():
        ours.weight.copy_(theirs.weight.copy_(1 + 0.3 * random(DIM, key=("weight",))))
    start = sum(counts[: group.part])
    for step in range(3):
        # Quarters: two of them may be equal, but no rounding makes the mean of two that differ little.
        x = (3 + (8 * random(sum(counts), DIM, key=("x", step))).round() / 4).requires_grad_()
        weight = random(sum(counts), DIM, key=("w", step))
        rows = slice(start, start + counts[group.part])
        local = x.detach()[rows].requires_grad_()
        ours.zero_grad(), theirs.zero_grad()
        y = ours(local)
        (y * weight[rows]).sum().backward()
        if sum(counts) > 1:
            wanted = theirs(x)
            (wanted * weight).sum().backward()
            worst.note("output", y, wanted[rows])
            scale = max(x.grad.abs().max().item(), ours.weight.abs().max().item())
            worst.note("gradient", local.grad, x.grad[rows], scale)
            worst.note("weight", group.all_reduce(ours.weight.grad), theirs.weight.grad)
        else:
            assert not y.any()
            assert not local.grad.any()
            if sum(counts):
                theirs.running_mean.lerp_(x.detach()[0], 0.1)
        worst.note("running_mean", ours.running_mean, theirs.running_mean)
        worst.note("running_var", ours.running_var, theirs.running_var)
    return worst


def main(results_file: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results = []

    def report(case: list, worst: Worst) -> None:
        everyone: list = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, dict(worst))
        kinds = {kind for other in everyone for kind in other}
        results.append((case, {kind: max(other.get(kind, 0.0) for other in everyone) for kind in sorted(kinds)}))

    for size in (2, 3):
        process_group = dist.new_group(range(size))
        member = dist.get_rank() < size
        group = RankGroup(process_group) if member else None
        # Fewer classes than ranks, and numbers that do not divide.
        heads = [
            (kind, classes, total, sampled, sharded)
            for kind, classes, total, sharded in itertools.product(LOSSES, (1, 4, 103), (0, 1, 9), (True, False))
            for sampled in ((1.0, 0.3) if kind in ("cosface", "all") else (1.0,))
        ]
        for case in heads if size == 3 else []:
            report(["head", size, *case], compare_heads(group, *case) if group is not None else Worst())
        for counts in ([0] * size, [0] * (size - 1) + [1], [1] + [0] * (size - 1), [1] * size, [5, 0, 2][:size]):
            report(["neck", size, counts], compare_necks(group, counts) if group is not None else Worst())
    if dist.get_rank() == 0:
        with open(results_file, "w") as file:
            json.dump(results, file)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
