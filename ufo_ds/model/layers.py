"""The replaceable units of a block: each maps packed rows to packed rows, ``unit(x_ND, segments) -> y_ND``.

Any unit may be given no rows: it then returns none, and its parameters still get a (zero) gradient. Rows of a segment
with an ``architecture`` go through the leading slices that it keeps; behind its ``dim`` columns they are zero.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ufo_ds.model.elastic import Conv2d, GroupNorm, LayerNorm, Linear, QKVLinear, Run, narrow, same_sizes, widen
from ufo_ds.model.packing import Segment, alike, concatenate, patchify, split, unpatchify
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
        self.patch = Linear(channels * side**2, dim)
        self.cls = nn.Parameter(torch.empty(prefix, dim)) if prefix else None
        self.position = nn.Parameter(torch.empty(prefix + grid_hw[0] * grid_hw[1], dim))

    def forward(self, x_NP: Tensor, segments: Sequence[Segment]) -> Tensor:
        """``x_NP``: pixels of patches, as :func:`patchify` cuts them. Returns ``[N, dim]``, whatever the subnets."""
        if self.stem is not None:
            x_NP = self.stem(x_NP, segments)
        dim = self.patch.out_features
        columns = same_sizes(segments, self._columns, like=(x_NP.shape[1], dim))
        patch_ND = self.patch(x_NP, [Run(rows, *of_run) for rows, of_run in columns])
        runs = alike(segments, key=lambda segment: (segment.grid_hw, self._columns(segment)[1]))
        if not runs:
            return patch_ND + self.position[:1] + (0 if self.cls is None else self.cls)
        pieces = []
        for x_ND, run in zip(split(patch_ND, runs), runs, strict=True):
            width = self._columns(run)[1]
            x_BLD = narrow(x_ND, width).unflatten(0, (run.images, run.tokens))
            if self.cls is not None:
                x_BLD = torch.cat([narrow(self.cls, width).expand(run.images, 1, -1), x_BLD[:, 1:]], dim=1)
            x_BLD = x_BLD + resize_position(narrow(self.position, width), self.grid_hw, run.grid_hw)
            pieces.append(widen(x_BLD.flatten(0, 1), dim))
        return concatenate(pieces, patch_ND)

    def _columns(self, segment: Segment) -> tuple[int, int]:
        """Of what the projection reads and makes for a segment."""
        read, made = self.patch.in_features, self.patch.out_features
        if segment.architecture is None:
            return read, made
        if self.stem is not None:
            read = read // self.stem.channels[-1] * segment.architecture.stem[-1]
        return read, segment.architecture.dim


class Stem(nn.Sequential):
    """The layers of a stem; pixels of patches to what there is of each patch behind them.

    Images of one size are one call of the layers, whatever their tasks. ``grids`` are those of all tasks of the model:
    the layers are called for each, without images if need be, as ranks must not differ in how often they call them.
    """

    def __init__(self, patch_size: int, channels: Sequence[int], grids: Sequence[tuple[int, int]]):
        super().__init__(*(StemLayer(a, b) for a, b in pairwise([3, *channels])))
        self.patch_size, self.channels, self.grids = patch_size, channels, grids
        self.rest = patch_size // stem_stride(channels)

    def forward(self, x_NP: Tensor, segments: Sequence[Segment]) -> Tensor:  # type: ignore[override]
        rows, prefix = split(x_NP, segments), segments[0].prefix if segments else 0
        pieces: list[Tensor] = [x_NP] * len(segments)
        idle: list[Tensor] = []
        for h, w in dict.fromkeys([*self.grids, *(segment.grid_hw for segment in segments)]) or [(1, 1)]:
            indices = [i for i, segment in enumerate(segments) if segment.grid_hw == (h, w)]
            nothing = x_NP.new_zeros(0, 3, h * self.patch_size, w * self.patch_size)
            images = concatenate([unpatchify(rows[i], segments[i], self.patch_size) for i in indices], nothing)
            y_BCHW = self._layers(images, [segments[i].per_image() for i in indices])
            y_NP = patchify(widen(y_BCHW, self.channels[-1]), self.rest, prefix)
            if not indices:
                idle.append(y_NP)
                continue
            for i, piece in zip(indices, y_NP.split([segments[i].rows for i in indices]), strict=True):
                pieces[i] = piece
        return concatenate(pieces + idle, x_NP)

    def _layers(self, x_BCHW: Tensor, segments: Sequence[Segment]) -> Tensor:
        """``segments`` have one row per image."""
        stems = same_sizes(
            segments, lambda s: s.architecture.stem if s.architecture else tuple(self.channels), tuple(self.channels)
        )
        for i, layer in enumerate(self):
            x_BCHW = layer(x_BCHW, [Run(images, ([3, *stem])[i], stem[i]) for images, stem in stems])
        return x_BCHW


class StemLayer(nn.Module):
    """3x3 convolution, group norm, ReLU (Xiao et al., 2021, with a norm that does not mix the samples of a batch).

    A layer that changes the number of channels has stride 2: it halves height and width, rounded up. One that does not
    keeps them and adds its input to its output.
    """

    def __init__(self, channels_in: int, channels: int):
        super().__init__()
        self.residual = channels_in == channels
        self.conv = Conv2d(channels_in, channels, 3, stride=1 if self.residual else 2, padding=1, bias=False)
        self.norm = GroupNorm(channels)

    def forward(self, x_BCHW: Tensor, runs: Sequence[Run] | None = None) -> Tensor:
        """``runs`` of images; default: one of all channels."""
        runs = runs or [Run(len(x_BCHW), self.conv.in_channels, self.conv.out_channels)]
        y_BCHW = self.conv(x_BCHW, runs)
        y_BCHW = F.relu(self.norm(y_BCHW, [Run(run.rows, run.width, run.width) for run in runs]))
        return x_BCHW + y_BCHW if self.residual else y_BCHW


def resize_position(position_LD: Tensor, grid_hw: tuple[int, int], to_hw: tuple[int, int]) -> Tensor:
    """Resize the grid part of a position embedding; a class token's row before it stays."""
    if grid_hw == to_hw:
        return position_LD
    prefix = len(position_LD) - grid_hw[0] * grid_hw[1]
    grid_1Dhw = position_LD[prefix:].unflatten(0, grid_hw).permute(2, 0, 1)[None].float()
    grid_1Dhw = F.interpolate(grid_1Dhw, size=to_hw, mode="bicubic", align_corners=False)
    return torch.cat([position_LD[:prefix], grid_1Dhw[0].flatten(1).T.to(position_LD.dtype)])


class Norm(LayerNorm):
    def forward(self, x_ND: Tensor, segments: Sequence[Segment]) -> Tensor:  # type: ignore[override]
        dim = x_ND.shape[1]
        widths = same_sizes(segments, lambda s: s.architecture.dim if s.architecture else dim, dim)
        return widen(super().forward(x_ND, [Run(rows, width, width) for rows, width in widths]), dim)


class Attention(nn.Module):
    """Multi-head self-attention inside each image; one kernel call per run of images of equal length."""

    def __init__(self, dim: int, heads: int, head_width: int, layer: int):
        """``layer``: which block's it is, by which a subnet says how many heads it keeps."""
        super().__init__()
        self.heads, self.head_width, self.layer = heads, head_width, layer
        self.qkv = QKVLinear(dim, 3 * heads * head_width)
        self.proj = Linear(heads * head_width, dim)

    def forward(self, x_ND: Tensor, segments: Sequence[Segment]) -> Tensor:
        dim = x_ND.shape[1]

        def sizes(segment: Segment) -> tuple[int, int]:
            kept = segment.architecture
            return (dim, self.heads) if kept is None else (kept.dim, kept.heads[self.layer])

        runs = [
            (rows, d, heads * self.head_width) for rows, (d, heads) in same_sizes(segments, sizes, (dim, self.heads))
        ]
        qkv = self.qkv(x_ND, [Run(rows, d, 3 * width) for rows, d, width in runs])
        outputs, images = [], alike(segments, key=lambda segment: (segment.tokens, sizes(segment)[1]))
        for x, run in zip(split(qkv, images) if images else [], images, strict=True):
            heads = sizes(run)[1]
            x_BLQHC = narrow(x, 3 * heads * self.head_width).unflatten(1, (3, heads, -1)).unflatten(0, (run.images, -1))
            y_BHLC = attend(*x_BLQHC.permute(2, 0, 3, 1, 4))
            outputs.append(y_BHLC.transpose(1, 2).reshape(run.rows, -1))
        # Without rows the values stand in, which keeps both projections in the graph.
        y = concatenate([widen(y, qkv.shape[1] // 3) for y in outputs], qkv) if outputs else qkv.chunk(3, dim=-1)[2]
        return widen(self.proj(y, [Run(rows, width, d) for rows, d, width in runs]), dim)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scaled dot-product attention of ``[images, heads, tokens, head dim]``."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        # The backward pass of the fused kernel is three to five times slower there than the formula itself.
        return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v)


class FFN(nn.Module):
    def __init__(self, dim: int, hidden: int, layer: int):
        """``layer``: which block's it is, by which a subnet says how much of the hidden layer it keeps."""
        super().__init__()
        self.layer = layer
        self.fc1 = Linear(dim, hidden)
        self.fc2 = Linear(hidden, dim)

    def forward(self, x_ND: Tensor, segments: Sequence[Segment]) -> Tensor:
        dim, hidden = x_ND.shape[1], self.fc1.out_features

        def sizes(segment: Segment) -> tuple[int, int]:
            kept = segment.architecture
            return (dim, hidden) if kept is None else (kept.dim, kept.hidden[self.layer])

        runs = same_sizes(segments, sizes, (dim, hidden))
        y = F.gelu(self.fc1(x_ND, [Run(rows, d, width) for rows, (d, width) in runs]))
        return widen(self.fc2(y, [Run(rows, width, d) for rows, (d, width) in runs]), dim)
