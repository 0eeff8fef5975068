"""The replaceable units of a block: each maps packed rows to packed rows, ``unit(x_ND, segments) -> y_ND``.

Any unit may be given no rows: it then returns none, and its parameters still get a (zero) gradient.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ufo_ds.model.packing import Segment, buckets, concatenate


class Embedding(nn.Module):
    """Patch projection, class token and position embedding (``[1 + h * w, D]``, class token first).

    A segment with another grid than the unit's gets the position embedding resized bicubically, as
    ``transformers.ViTModel(interpolate_pos_encoding=True)`` does.
    """

    def __init__(self, patch_size: int, dim: int, grid_hw: tuple[int, int]):
        super().__init__()
        self.grid_hw = grid_hw
        self.patch = nn.Linear(3 * patch_size**2, dim)
        self.cls = nn.Parameter(torch.empty(1, dim))
        self.position = nn.Parameter(torch.empty(1 + grid_hw[0] * grid_hw[1], dim))

    def forward(self, x_NP: Tensor, segments: Sequence[Segment]) -> Tensor:
        patch_ND = self.patch(x_NP)
        if not segments:
            return patch_ND + self.cls + self.position[:1]
        pieces, row = [], 0
        for segment in segments:
            patch_BLD = patch_ND[row : row + segment.rows].unflatten(0, (segment.images, segment.tokens))
            cls_B1D = self.cls.expand(segment.images, 1, -1)
            x_BLD = torch.cat([cls_B1D, patch_BLD[:, 1:]], dim=1) + resize_position(
                self.position, self.grid_hw, segment.grid_hw
            )
            pieces.append(x_BLD.flatten(0, 1))
            row += segment.rows
        return concatenate(pieces, patch_ND)


def resize_position(position_LD: Tensor, grid_hw: tuple[int, int], to_hw: tuple[int, int]) -> Tensor:
    """Resize the grid part of a position embedding; the class token's row stays."""
    if grid_hw == to_hw:
        return position_LD
    cls_1D, rest = position_LD[:1], position_LD[1:]
    grid_1Dhw = rest.unflatten(0, grid_hw).permute(2, 0, 1)[None].float()
    grid_1Dhw = F.interpolate(grid_1Dhw, size=to_hw, mode="bicubic", align_corners=False)
    return torch.cat([cls_1D, grid_1Dhw[0].flatten(1).T.to(position_LD.dtype)])


class Norm(nn.LayerNorm):
    def forward(self, x_ND: Tensor, segments: Sequence[Segment]) -> Tensor:  # type: ignore[override]
        return super().forward(x_ND)


class Attention(nn.Module):
    """Multi-head self-attention inside each image; one kernel call per run of images of equal length."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x_ND: Tensor, segments: Sequence[Segment]) -> Tensor:
        qkv = self.qkv(x_ND)
        outputs, row = [], 0
        for images, tokens in buckets(segments):
            rows = images * tokens
            q, k, v = qkv[row : row + rows].view(images, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(q, k, v)
            outputs.append(y.transpose(1, 2).reshape(rows, -1))
            row += rows
        # Without rows the values stand in, which keeps both projections in the graph.
        return self.proj(concatenate(outputs, qkv) if outputs else qkv.chunk(3, dim=-1)[2])


class FFN(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x_ND: Tensor, segments: Sequence[Segment]) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x_ND)))
