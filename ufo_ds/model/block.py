"""A block of the transformer, of units with shared and own copies."""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from ufo_ds.model.experts import RoutedUnit
from ufo_ds.model.layers import FFN, Attention, Norm
from ufo_ds.model.packing import Segment, concatenate, split
from ufo_ds.model.router import Choices
from ufo_ds.recipe_model import Backbone

Build = Callable[[str, int, Callable[[str | None], nn.Module]], RoutedUnit]  # (unit, layer, make)


class Block(nn.Module):
    """One transformer block; both norms share the route of the unit ``norm``."""

    def __init__(self, build: Build, layer: int, backbone: Backbone):
        super().__init__()
        dim, eps = backbone.dim, backbone.layer_norm_eps
        self.layer = layer
        self.norm1 = build("norm", layer, lambda _: Norm(dim, eps=eps))
        self.attn = build("attn", layer, lambda _: Attention(dim, backbone.heads_L[layer], backbone.head_width, layer))
        self.norm2 = build("norm", layer, lambda _: Norm(dim, eps=eps))
        self.ffn = build("ffn", layer, lambda _: FFN(dim, backbone.hidden_L[layer], layer))

    def forward(
        self, x_ND: Tensor, segments: Sequence[Segment], choices: Choices, drop_path_N2: Tensor | None
    ) -> Tensor:
        """Rows of subnets that leave this block out stay as they are."""
        here = [i for i, s in enumerate(segments) if s.architecture is None or s.architecture.depth > self.layer]
        if len(here) == len(segments):
            return self._all(x_ND, segments, choices, drop_path_N2)
        rows = split(x_ND, segments)
        if drop_path_N2 is not None:
            factors = split(drop_path_N2, segments)
            drop_path_N2 = concatenate([factors[i] for i in here], drop_path_N2)
        kept = [segments[i] for i in here]
        y_ND = self._all(concatenate([rows[i] for i in here], x_ND), kept, choices, drop_path_N2)
        pieces = {**dict(enumerate(rows)), **dict(zip(here, split(y_ND, kept) if kept else [], strict=True))}
        return concatenate([*pieces.values()] + ([] if kept else [y_ND]), x_ND)  # in the graph without rows too

    def _all(self, x_ND: Tensor, segments: Sequence[Segment], choices: Choices, drop_path_N2: Tensor | None) -> Tensor:
        i = self.layer
        y_ND = self.norm1(x_ND, segments, choices.get(("norm", i)))
        y_ND = self.attn(y_ND, segments, choices.get(("attn", i)))
        x_ND = x_ND + (y_ND if drop_path_N2 is None else y_ND * drop_path_N2[:, :1].to(y_ND.dtype))
        y_ND = self.norm2(x_ND, segments, choices.get(("norm", i)))
        y_ND = self.ffn(y_ND, segments, choices.get(("ffn", i)))
        return x_ND + (y_ND if drop_path_N2 is None else y_ND * drop_path_N2[:, 1:].to(y_ND.dtype))
