"""Patches of no image, and neighbouring segments of one grid as one."""

import random
from itertools import groupby

import torch

from ufo_ds.model.layers import Embedding
from ufo_ds.model.packing import Segment, alike, unpatchify


def test_no_images_have_no_patches():
    segment = Segment("a", 0, 7, (2, 3))
    assert unpatchify(torch.zeros(0, 48), segment, 4).shape == (0, 3, 8, 12)


def test_runs_of_one_grid_are_one_segment():
    draw = random.Random(0)
    for _ in range(200):
        segments = []
        for task in "abcdef"[: draw.randint(0, 6)]:
            h, w = draw.choice([(1, 2), (2, 1), (2, 2)])
            segments.append(Segment(task, draw.randint(0, 3), 1 + h * w, (h, w)))
        found = [(s.images, s.tokens, s.grid_hw) for s in alike(segments, key=lambda segment: segment.grid_hw)]
        wanted = []
        for grid_hw, run in groupby([s.grid_hw for s in segments for _ in range(s.images)]):
            wanted.append((len(list(run)), 1 + grid_hw[0] * grid_hw[1], grid_hw))
        assert found == wanted


def test_embedding_of_many_tasks_equals_that_of_each_alone():
    torch.manual_seed(0)
    unit = Embedding(4, 8, (2, 3))
    for parameter in unit.parameters():
        torch.nn.init.normal_(parameter)
    grids = [(2, 3), (2, 3), (1, 2), (2, 3), (1, 2), (1, 2)]
    segments = [
        Segment(t, n, 1 + h * w, (h, w)) for t, n, (h, w) in zip("abcdef", [2, 0, 1, 1, 3, 0], grids, strict=True)
    ]
    rows = [torch.randn(s.rows, 48) for s in segments]
    alone = torch.cat([unit(x, [s]) for x, s in zip(rows, segments, strict=True)])
    together = unit(torch.cat(rows), segments)
    torch.testing.assert_close(together, alone)
    weights = torch.randn_like(alone)
    wanted = torch.autograd.grad((alone * weights).sum(), list(unit.parameters()))
    found = torch.autograd.grad((together * weights).sum(), list(unit.parameters()))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
