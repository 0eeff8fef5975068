"""Packed tokens: all images of a batch one after another, sorted by task, without padding.

Axes: N tokens (rows of the packed batch), D width, B images, L tokens of one image, P values of one patch
(channel, row, column). ``x_ND`` is a tensor of N rows and D columns.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Literal

import torch
from torch import Tensor

from ufo_ds.model.architecture import Architecture

Part = Literal["plain", "probe", "shared"]


@dataclass(frozen=True)
class Segment:
    """Rows of one task in a packed tensor: ``images`` of ``tokens`` rows each, the first ``prefix`` of which (the class
    token) come before the ``grid_hw`` patches.

    A task has one segment, or in training several neighbouring ones: ``part`` says whether its samples take the task's
    path (``plain``), do so and are shown to the copies not chosen as well (``probe``; see :mod:`ufo_ds.model.router`),
    or take the shared path throughout (``shared``). ``span`` is the range of the task's global micro-batch that such a
    part makes up over all processes, of which ``images`` samples are here; it is alike on all processes.

    In a step of an elastic model the same samples go through several subnets: ``subnet`` counts them, and
    ``architecture`` is what the segment uses of its units; None: all.
    """

    task: str
    images: int
    tokens: int
    grid_hw: tuple[int, int]
    prefix: int = 1
    part: Part = "plain"
    span: range = range(0)
    subnet: int = 0
    architecture: Architecture | None = None

    @property
    def rows(self) -> int:
        return self.images * self.tokens

    def per_image(self) -> "Segment":
        """The segment of the same images with one row each (features, samples)."""
        return replace(self, tokens=1)


def join(segments: Iterable[Segment]) -> list[Segment]:
    """One segment for each run of neighbouring ones of a task and subnet; their rows are one slice anyhow."""
    joined: list[Segment] = []
    for segment in segments:
        if joined and (joined[-1].task, joined[-1].subnet) == (segment.task, segment.subnet):
            last = joined[-1]
            span = range(last.span.start, segment.span.stop)
            joined[-1] = replace(last, images=last.images + segment.images, part="plain", span=span)
        else:
            joined.append(segment)
    return joined


def overlap(a: range, b: range) -> range:
    """What two ranges of step 1 have in common."""
    start = max(a.start, b.start)
    return range(start, max(start, min(a.stop, b.stop)))


def split(x_ND: Tensor, segments: Sequence[Segment]) -> list[Tensor]:
    """Views of the rows of every segment."""
    return list(torch.split(x_ND, [segment.rows for segment in segments]))


def alike(segments: Sequence[Segment], key: Callable[[Segment], Any]) -> list[Segment]:
    """Neighbouring segments of equal key joined, whatever their tasks (the first one's stands for them); those without
    images are left out."""
    runs = [list(run) for _, run in groupby((s for s in segments if s.images), key=key)]
    return [replace(run[0], images=sum(segment.images for segment in run)) for run in runs]


def concatenate(pieces: Iterable[Tensor], like: Tensor) -> Tensor:
    """``torch.cat`` that is free for one piece and gives no rows for none."""
    pieces = list(pieces)
    if len(pieces) == 1:
        return pieces[0]
    return torch.cat(pieces) if pieces else like[:0]


def patchify(images_BCHW: Tensor, patch_size: int, prefix: int) -> Tensor:
    """Cut images into rows of patch values, as a convolution of stride ``patch_size`` would see them.

    Pixels right and below of the last whole patch are left out. The ``prefix`` rows before the patches of an image (of
    the class token) are zero, so that every unit of the network maps a row to a row.

    Returns:
        ``[B * (prefix + h * w), C * patch_size ** 2]``
    """
    b, c, height, width = images_BCHW.shape
    h, w = height // patch_size, width // patch_size
    x = images_BCHW[:, :, : h * patch_size, : w * patch_size]
    x = x.reshape(b, c, h, patch_size, w, patch_size).permute(0, 2, 4, 1, 3, 5)
    x_BLP = x.reshape(b, h * w, c * patch_size**2)
    if prefix:
        x_BLP = torch.cat([x_BLP.new_zeros(b, prefix, x_BLP.shape[2]), x_BLP], dim=1)
    return x_BLP.flatten(0, 1)


def unpatchify(x_NP: Tensor, segment: Segment, patch_size: int) -> Tensor:
    """The images ``[B, C, h * patch_size, w * patch_size]`` that :func:`patchify` cut."""
    (h, w), channels = segment.grid_hw, x_NP.shape[1] // patch_size**2
    x_BLP = x_NP.unflatten(0, (segment.images, segment.tokens))[:, segment.prefix :]
    x = x_BLP.reshape(segment.images, h, w, channels, patch_size, patch_size).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(segment.images, channels, h * patch_size, w * patch_size)
