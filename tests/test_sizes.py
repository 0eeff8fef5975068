"""Parameters of the same sizes on all ranks: padded heads compute what others do, tasks that share a slot are of
similar sizes, gradients go out in one order, and "auto" goes by sizes and memory."""

import copy
import random

import pytest
import torch

from tests.test_losses import randn, random_labels
from ufo_ds import recipe_file
from ufo_ds.model.classifiers import parts
from ufo_ds.model.heads import TaskHead
from ufo_ds.parallel import config as configs
from ufo_ds.parallel.order import OrderedReduction
from ufo_ds.parallel.placement import Work, place
from ufo_ds.parallel.rank_model import RankModels
from ufo_ds.recipe_task import CosFace, CrossEntropy, Head, Loss

HEADS = {
    "linear": (Head(type="linear"), Loss(cross_entropy=CrossEntropy(label_smoothing=0.1))),
    "linear with neck": (Head(type="linear", neck=True), Loss(cross_entropy=CrossEntropy())),
    "margin": (Head(type="margin"), Loss(cosface=CosFace(scale=8.0))),
}


@pytest.mark.parametrize("kind", HEADS)
def test_padding_is_not_computed_with(kind):
    """Rows of numbers that would show, behind the head's own."""
    options, loss = HEADS[kind]
    head = TaskHead(options, 6, 5, loss)
    with torch.no_grad():
        for i, parameter in enumerate(head.parameters()):
            parameter.copy_(randn(*parameter.shape, seed=i))
    padded = copy.deepcopy(head)
    padded.pad(rows=9, entries=11)
    held = parts(padded)
    assert [tuple(p.shape) for p in padded.parameters()] == [(9, 6), (11,)]
    with torch.no_grad():
        for name, parameter in padded.named_parameters():
            assert held[name].shape == head.get_parameter(name).shape
            parameter.fill_(1e3)
            parameter[: len(held[name].rows)] = head.get_parameter(name)
    x, labels = randn(7, 6, seed=8), random_labels(7, 5)
    for of_head in (head, padded):
        of_head.train()(x, labels, 7).sum().backward()
        of_head.eval()
    assert torch.equal(padded(x).logits, head(x).logits)
    assert torch.equal(padded(x).embedding, head(x).embedding)
    for name, parameter in padded.named_parameters():
        rows = len(held[name].rows)
        assert torch.equal(parameter.grad[:rows], head.get_parameter(name).grad)
        assert not parameter.grad[rows:].any()


def test_heads_of_a_slot_are_of_similar_sizes():
    classes = {"a": 3, "b": 1000, "c": 10, "d": 900, "e": 50, "f": 4}
    placement = place({name: Work(1, 1, number) for name, number in classes.items()}, 2, 2)
    for tasks in placement.tasks_of:
        assert [classes[task] for task in tasks] == sorted((classes[task] for task in tasks), reverse=True)
    spread = place({name: Work(1, 1, number, name in "ac") for name, number in classes.items()}, 2, 2)
    for tasks in spread.tasks_of:
        assert [task in "ac" for task in tasks] == sorted((task in "ac" for task in tasks), reverse=True)


@pytest.mark.parametrize(("world_size", "ep_size"), [(2, 2), (4, 2), (48, 6), (64, 4)])
@pytest.mark.parametrize("sharded", ["false", "true"])
def test_ranks_of_the_published_tasks_are_alike(world_size, ep_size, sharded):
    """Sizes, positions and the groups that share them, of 26 heads of two kinds with 2 to 93,431 classes."""
    small = [("model.backbone", "{dim: 64, depth: 1, heads: 2, patch_size: 32}"), ("tasks.face.head.sharded", sharded)]
    recipe = recipe_file.load("ufo2_17b", small)
    models = RankModels(recipe, {task.name: task.num_classes or 0 for task in recipe.tasks})
    of_ranks = models.of(models.placement(world_size, ep_size, 4))
    first, *others = [[(p.numel, p.experts, p.calls > 0) for p in model.parameters] for model in of_ranks]
    assert len(of_ranks) == ep_size
    assert all(other == first for other in others)


class Reducer:
    """What of DeepSpeed's optimizer an order is kept of."""

    def __init__(self):
        self.reduced: list = []

    def reduce_ready_partitions_and_remove_grads(self, parameter, group):
        self.reduced.append((parameter, group))

    def independent_gradient_partition_epilogue(self):
        self.reduced.append("end")


def test_gradients_go_out_in_one_order():
    """However they come, and whatever gets none, from the first backward pass on."""
    draw = random.Random(0)
    for _ in range(50):
        parameters = [object() for _ in range(draw.randint(1, 12))]
        expected = draw.sample(parameters, draw.randint(0, len(parameters)))
        ranks = [Reducer() for _ in range(3)]
        for rank in ranks:
            OrderedReduction(rank, parameters, expected)
        for _ in range(3):
            came = draw.sample(parameters, draw.randint(0, len(parameters)))
            for rank in ranks:
                rank.reduced.clear()
                for parameter in draw.sample(came, len(came)):
                    rank.reduce_ready_partitions_and_remove_grads(parameter, parameters.index(parameter))
                rank.independent_gradient_partition_epilogue()
            assert all(rank.reduced == ranks[0].reduced for rank in ranks)
            *reduced, end = ranks[0].reduced
            assert end == "end"
            assert sorted(number for _, number in reduced) == sorted(map(parameters.index, came))
            if set(came) <= set(expected):
                assert reduced == [(p, i) for i, p in enumerate(parameters) if p in came]
            expected = came


def test_a_gradient_goes_out_once_those_before_it_are_there():
    a, b, c, d = (object() for _ in range(4))
    rank = Reducer()
    OrderedReduction(rank, [a, b, c, d], [a, c, d])  # b is on no path
    seen = []
    for parameter in (c, a, d):
        rank.reduce_ready_partitions_and_remove_grads(parameter, 0)
        seen.append([p for p, _ in rank.reduced])
    assert seen == [[], [a, c], [a, c, d]]


ZERO = {"stage3_max_live_parameters": 10**15, "stage3_max_reuse_distance": 10**15}


@pytest.mark.parametrize(
    ("stage", "alike", "elements", "memory", "wanted"),
    [
        (3, True, 10**6, None, ZERO | {"reduce_bucket_size": 10**6, "stage3_prefetch_bucket_size": 10**6}),
        # A quarter of 40 GB is 5e9 elements of two bytes.
        (3, True, 5 * 10**9, 40 * 10**9, ZERO | {"reduce_bucket_size": 2 * 10**8, "overlap_comm": True}),
        (3, True, 6 * 10**9, 40 * 10**9,
         {"stage3_max_live_parameters": 5 * 10**9, "stage3_max_reuse_distance": 10**10, "sub_group_size": 10**8}),
        (3, False, 6 * 10**9, 40 * 10**9,
         ZERO | {"stage3_prefetch_bucket_size": 0, "reduce_bucket_size": 6 * 10**9, "overlap_comm": False}),
        (2, True, 10**9, None, {"reduce_bucket_size": 2 * 10**8, "overlap_comm": True}),
        (1, False, 10**9, None, {"reduce_bucket_size": 10**9, "overlap_comm": False}),
    ],
)  # fmt: skip
def test_auto_goes_by_sizes_and_memory(stage, alike, elements, memory, wanted):
    values = {"zero_optimization": {"stage": stage}, "bf16": {"enabled": True}}
    config = configs.resolve(values, "test", recipe_file.load("ufo2_17b"), 8)
    zero = config.sized(alike, elements, memory).deepspeed["zero_optimization"]
    assert {key: zero[key] for key in wanted} == wanted
    assert stage == 3 or not any(key.startswith("stage3_") for key in zero)
    explicit = {"stage": stage, "reduce_bucket_size": 7, "overlap_comm": "auto"}
    config = configs.resolve({**values, "zero_optimization": explicit}, "test", recipe_file.load("ufo2_17b"), 8)
    zero = config.sized(alike, elements, memory).deepspeed["zero_optimization"]
    assert (zero["reduce_bucket_size"], zero["overlap_comm"]) == (7, alike)
