"""MobileNetV3 (Howard et al., 2019), which transformers lacks, of the convolution layers of its MobileNetV2.

With a classifier of 1000 classes behind it, it has the published 2.5 M (small) and 5.5 M (large) parameters.
"""

from typing import Literal, NamedTuple

from torch import Tensor, nn
from transformers import MobileNetV2Config
from transformers.models.mobilenet_v2.modeling_mobilenet_v2 import MobileNetV2ConvLayer, make_divisible

Activation = Literal["relu", "hardswish"]


class Row(NamedTuple):
    """Of a table of the paper: a bottleneck block."""

    kernel: int
    expanded: int  # channels
    channels: int
    squeeze: bool
    activation: Activation
    stride: int


SMALL = (  # table 2
    Row(3, 16, 16, True, "relu", 2),
    Row(3, 72, 24, False, "relu", 2),
    Row(3, 88, 24, False, "relu", 1),
    Row(5, 96, 40, True, "hardswish", 2),
    Row(5, 240, 40, True, "hardswish", 1),
    Row(5, 240, 40, True, "hardswish", 1),
    Row(5, 120, 48, True, "hardswish", 1),
    Row(5, 144, 48, True, "hardswish", 1),
    Row(5, 288, 96, True, "hardswish", 2),
    Row(5, 576, 96, True, "hardswish", 1),
    Row(5, 576, 96, True, "hardswish", 1),
)
LARGE = (  # table 1
    Row(3, 16, 16, False, "relu", 1),
    Row(3, 64, 24, False, "relu", 2),
    Row(3, 72, 24, False, "relu", 1),
    Row(5, 72, 40, True, "relu", 2),
    Row(5, 120, 40, True, "relu", 1),
    Row(5, 120, 40, True, "relu", 1),
    Row(3, 240, 80, False, "hardswish", 2),
    Row(3, 200, 80, False, "hardswish", 1),
    Row(3, 184, 80, False, "hardswish", 1),
    Row(3, 184, 80, False, "hardswish", 1),
    Row(3, 480, 112, True, "hardswish", 1),
    Row(3, 672, 112, True, "hardswish", 1),
    Row(5, 672, 160, True, "hardswish", 2),
    Row(5, 960, 160, True, "hardswish", 1),
    Row(5, 960, 160, True, "hardswish", 1),
)
FIRST = 16  # channels
FEATURES = {SMALL: 1024, LARGE: 1280}  # of the layer behind the pooling

_CONFIG = MobileNetV2Config(tf_padding=False, layer_norm_eps=0.001)  # what the layers ask it for


class SqueezeExcite(nn.Module):
    """Channels are scaled by what all positions say of them (Hu et al., 2018), with a hard sigmoid and, as section 5.3
    has it, a quarter of the expanded channels between."""

    def __init__(self, channels: int):
        super().__init__()
        squeezed = make_divisible(channels // 4)
        self.reduce = nn.Conv2d(channels, squeezed, 1)
        self.expand = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        scale_BC11 = self.reduce(x_BCHW.mean((2, 3), keepdim=True))
        return x_BCHW * nn.functional.hardsigmoid(self.expand(scale_BC11.relu()))


class Block(nn.Module):
    """Expand, filter each channel, weigh the channels, project; residual where nothing changes in size."""

    def __init__(self, channels_in: int, row: Row):
        super().__init__()
        self.residual = row.stride == 1 and channels_in == row.channels
        layers: list[nn.Module] = []
        if row.expanded != channels_in:
            layers.append(MobileNetV2ConvLayer(_CONFIG, channels_in, row.expanded, 1, use_activation=row.activation))
        layers.append(
            MobileNetV2ConvLayer(
                _CONFIG, row.expanded, row.expanded, row.kernel, row.stride, row.expanded, use_activation=row.activation
            )
        )
        if row.squeeze:
            layers.append(SqueezeExcite(row.expanded))
        layers.append(MobileNetV2ConvLayer(_CONFIG, row.expanded, row.channels, 1, use_activation=False))
        self.layers = nn.Sequential(*layers)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y_BCHW = self.layers(x_BCHW)
        return x_BCHW + y_BCHW if self.residual else y_BCHW


class MobileNetV3(nn.Module):
    """Pixels [B, 3, H, W] to features [B, ``features``], those that the paper's classifier is given.

    Args:
        table: :data:`SMALL` or :data:`LARGE`.
        width: multiplier of all channels, which are rounded to multiples of 8.
    """

    def __init__(self, table: tuple[Row, ...], width: float = 1.0):
        super().__init__()

        def scaled(channels: int) -> int:
            return make_divisible(round(channels * width))

        channels = scaled(FIRST)
        self.stem = MobileNetV2ConvLayer(_CONFIG, 3, channels, 3, 2, use_activation="hardswish")
        blocks = []
        for row in table:
            # A block whose first layer the table leaves out, as it would not expand, has none at any width.
            expanded = channels if row.expanded == FIRST else scaled(row.expanded)
            blocks.append(Block(channels, row._replace(expanded=expanded, channels=scaled(row.channels))))
            channels = scaled(row.channels)
        self.blocks = nn.Sequential(*blocks)
        last = scaled(6 * table[-1].channels)
        self.last = MobileNetV2ConvLayer(_CONFIG, channels, last, 1, use_activation="hardswish")
        self.features = scaled(FEATURES[table])
        self.hidden = nn.Linear(last, self.features)

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        x_BCHW = self.last(self.blocks(self.stem(pixels_BCHW)))
        return nn.functional.hardswish(self.hidden(x_BCHW.mean((2, 3))))
