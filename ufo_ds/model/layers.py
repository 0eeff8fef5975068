"""The replaceable units of a block: each maps packed rows to packed rows, ``unit(x_ND, segments) -> y_ND``.

Any unit may be given no rows: it then returns none, and its parameters still get a (zero) gradient.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ufo_ds.model.packing import Segment, buckets, concatenate, patchify, same_grid, split, unpatchify
from ufo_ds.recipe_model import stem_stride


class Embedding(nn.Module):
    """Images to tokens: a stem, a patch projection, class token and position embedding.

    Without ``stem`` the projection sees the pixels of each patch, as in the plain ViT. ``stem`` are the channels of
    :class:`StemLayer` s before it; the projection then sees what they leave of a patch.

    The position embedding is ``[prefix + h * w, D]``, class token first. A segment with another grid than the unit's
    gets it resized bicubically, as ``transformers.ViTModel(interpolate_pos_encoding=True)`` does.
    """

    def __init__(
        self,
        patch_size: int,
        dim: int,
        grid_hw: tuple[int, int],
        prefix: int = 1,
        stem: Sequence[int] = (),
        grids: Sequence[tuple[int, int]] = (),
    ):
        """``grid_hw`` is that of the position embedding, ``grids`` are those of all tasks (see :class:`Stem`)."""
        super().__init__()
        self.grid_hw = grid_hw
        self.stem = Stem(patch_size, stem, grids) if stem else None
        channels, side = (stem[-1], patch_size // stem_stride(stem)) if stem else (3, patch_size)
        self.patch = nn.Linear(channels * side**2, dim)
        self.cls = nn.Parameter(torch.empty(prefix, dim)) if prefix else None
        self.position = nn.Parameter(torch.empty(prefix + grid_hw[0] * grid_hw[1], dim))

    def forward(self, x_NP: Tensor, segments: Sequence[Segment]) -> Tensor:
        """``x_NP``: pixels of patches, as :func:`patchify` cuts them."""
        if self.stem is not None:
            x_NP = self.stem(x_NP, segments)
        patch_ND = self.patch(x_NP)
        if not segments:
            return patch_ND + self.position[:1] + (0 if self.cls is None else self.cls)
        pieces, runs = [], same_grid(segments)
        for x_ND, run in zip(split(patch_ND, runs), runs, strict=True):
            x_BLD = x_ND.unflatten(0, (run.images, run.tokens))
            if self.cls is not None:
                x_BLD = torch.cat([self.cls.expand(run.images, 1, -1), x_BLD[:, 1:]], dim=1)
            x_BLD = x_BLD + resize_position(self.position, self.grid_hw, run.grid_hw)
            pieces.append(x_BLD.flatten(0, 1))
        return concatenate(pieces, patch_ND)


class Stem(nn.Sequential):
    """The layers of a stem; pixels of patches to what there is of each patch behind them.

    Images of one size are one call of the layers, whatever their tasks. ``grids`` are those of all tasks of the model:
    the layers are called for each, without images if need be, as ranks must not differ in how often they call them.
    """

    def __init__(self, patch_size: int, channels: Sequence[int], grids: Sequence[tuple[int, int]]):
        super().__init__(*(StemLayer(a, b) for a, b in pairwise([3, *channels])))
        self.patch_size, self.grids = patch_size, grids
        self.rest = patch_size // stem_stride(channels)

    def forward(self, x_NP: Tensor, segments: Sequence[Segment]) -> Tensor:  # type: ignore[override]
        rows, prefix = split(x_NP, segments), segments[0].prefix if segments else 0
        pieces: list[Tensor] = [x_NP] * len(segments)
        idle: list[Tensor] = []
        for h, w in dict.fromkeys([*self.grids, *(segment.grid_hw for segment in segments)]) or [(1, 1)]:
            indices = [i for i, segment in enumerate(segments) if segment.grid_hw == (h, w)]
            nothing = x_NP.new_zeros(0, 3, h * self.patch_size, w * self.patch_size)
            images = concatenate([unpatchify(rows[i], segments[i], self.patch_size) for i in indices], nothing)
            y_NP = patchify(super().forward(images), self.rest, prefix)
            if not indices:
                idle.append(y_NP)
                continue
            for i, piece in zip(indices, y_NP.split([segments[i].rows for i in indices]), strict=True):
                pieces[i] = piece
        return concatenate(pieces + idle, x_NP)


class StemLayer(nn.Module):
    """3x3 convolution, group norm, ReLU (Xiao et al., 2021, with a norm that does not mix the samples of a batch).

    A layer that changes the number of channels has stride 2: it halves height and width, rounded up. One that does not
    keeps them and adds its input to its output.
    """

    def __init__(self, channels_in: int, channels: int):
        super().__init__()
        self.residual = channels_in == channels
        self.conv = nn.Conv2d(channels_in, channels, 3, stride=1 if self.residual else 2, padding=1, bias=False)
        groups = channels // 16 if channels % 16 == 0 else 1  # 16 channels each, as Wu and He (2018) advise
        self.norm = nn.GroupNorm(groups, channels)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y_BCHW = F.relu(self.norm(self.conv(x_BCHW)))
        return x_BCHW + y_BCHW if self.residual else y_BCHW


def resize_position(position_LD: Tensor, grid_hw: tuple[int, int], to_hw: tuple[int, int]) -> Tensor:
    """Resize the grid part of a position embedding; a class token's row before it stays."""
    if grid_hw == to_hw:
        return position_LD
    prefix = len(position_LD) - grid_hw[0] * grid_hw[1]
    grid_1Dhw = position_LD[prefix:].unflatten(0, grid_hw).permute(2, 0, 1)[None].float()
    grid_1Dhw = F.interpolate(grid_1Dhw, size=to_hw, mode="bicubic", align_corners=False)
    return torch.cat([position_LD[:prefix], grid_1Dhw[0].flatten(1).T.to(position_LD.dtype)])


class Norm(nn.LayerNorm):
    def forward(self, x_ND: Tensor, segments: Sequence[Segment]) -> Tensor:  # type: ignore[override]
        return super().forward(x_ND)


class Attention(nn.Module):
    """Multi-head self-attention inside each image; one kernel call per run of images of equal length."""

    def __init__(self, dim: int, heads: int, head_width: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * heads * head_width)
        self.proj = nn.Linear(heads * head_width, dim)

    def forward(self, x_ND: Tensor, segments: Sequence[Segment]) -> Tensor:
        qkv = self.qkv(x_ND)
        outputs, runs = [], list(buckets(segments))
        for x, (images, tokens) in zip(qkv.split([i * t for i, t in runs]) if runs else [], runs, strict=True):
            q, k, v = x.view(images, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            y = attend(q, k, v)
            outputs.append(y.transpose(1, 2).reshape(images * tokens, -1))
        # Without rows the values stand in, which keeps both projections in the graph.
        return self.proj(concatenate(outputs, qkv) if outputs else qkv.chunk(3, dim=-1)[2])


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scaled dot-product attention of ``[images, heads, tokens, head dim]``."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        # The backward pass of the fused kernel is three to five times slower there than the formula itself.
        return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v)


class FFN(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x_ND: Tensor, segments: Sequence[Segment]) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x_ND)))
