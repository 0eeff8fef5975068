"""Packed tokens: all images of a batch one after another, sorted by task, without padding.

Axes: N tokens (rows of the packed batch), D width, B images, L tokens of one image, P values of one patch
(channel, row, column). ``x_ND`` is a tensor of N rows and D columns.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segment:
    """The rows of one task in a packed tensor: ``images`` of ``tokens`` rows each, the first ``prefix`` of which
    (the class token) come before the ``grid_hw`` patches."""

    task: str
    images: int
    tokens: int
    grid_hw: tuple[int, int]
    prefix: int = 1

    @property
    def rows(self) -> int:
        return self.images * self.tokens

    def per_image(self) -> "Segment":
        """The segment of the same images with one row each (features, samples)."""
        return replace(self, tokens=1)


def split(x_ND: Tensor, segments: Sequence[Segment]) -> list[Tensor]:
    """Views of the rows of every segment."""
    return list(torch.split(x_ND, [segment.rows for segment in segments]))


def buckets(segments: Sequence[Segment]) -> Iterator[tuple[int, int]]:
    """Neighbouring segments of equal length joined: (images, tokens) of each, in order; empty ones are left out."""
    images, tokens = 0, 0
    for segment in segments:
        if not segment.images:
            continue
        if segment.tokens != tokens and images:
            yield images, tokens
            images = 0
        images, tokens = images + segment.images, segment.tokens
    if images:
        yield images, tokens


def concatenate(pieces: Iterable[Tensor], like: Tensor) -> Tensor:
    """``torch.cat`` that is free for one piece and gives no rows for none."""
    pieces = list(pieces)
    if len(pieces) == 1:
        return pieces[0]
    return torch.cat(pieces) if pieces else like[:0]


def patchify(images_B3HW: Tensor, patch_size: int) -> Tensor:
    """Cut images into rows of patch values, as a convolution of stride ``patch_size`` would see them.

    Pixels right and below of the last whole patch are left out. The row of the class token is zero, so that every
    unit of the network maps a row to a row.

    Returns:
        ``[B * (1 + h * w), 3 * patch_size ** 2]``
    """
    b, c, height, width = images_B3HW.shape
    h, w = height // patch_size, width // patch_size
    x = images_B3HW[:, :, : h * patch_size, : w * patch_size]
    x = x.reshape(b, c, h, patch_size, w, patch_size).permute(0, 2, 4, 1, 3, 5)
    x_BLP = x.reshape(b, h * w, c * patch_size**2)
    return torch.cat([x_BLP.new_zeros(b, 1, x_BLP.shape[2]), x_BLP], dim=1).flatten(0, 1)
