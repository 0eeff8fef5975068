"""Small networks that learn from larger ones, as Hugging Face models: a backbone of transformers' parts, a linear
projector to the embedding and, for tasks with classes, a classifier.

Importing this module registers them, so that ``AutoModel`` and ``AutoModelForImageClassification`` load what ``ufo
distill`` wrote. The batch norm of a neck is folded into the projector.
"""

from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    MobileNetV2Config,
    MobileNetV2Model,
    PreTrainedConfig,
    PreTrainedModel,
    ResNetConfig,
    ResNetModel,
    ViTConfig,
    ViTModel,
    initialization,
)
from transformers.models.mobilenet_v2.modeling_mobilenet_v2 import make_divisible
from transformers.utils.generic import ModelOutput, can_return_tuple

from ufo_ds.model.mobilenet_v3 import LARGE, SMALL, MobileNetV3
from ufo_ds.recipe_model import BACKBONES
from ufo_ds.recipe_task import Size

STUDENTS = (
    "resnet18", "resnet50", "mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large", "vit_tiny", "vit_small",
)  # fmt: skip
ALIASES = {"mobilenet": "mobilenet_v3_small"}
STRIDES = (32, 16, 8)  # of a CNN's last feature map
POSITIONS = 4  # that a CNN's last map has at least along the shorter side, if one of the strides leaves as many
PATCHES = (16, 8, 4)  # sides of a ViT's patches
TOKENS = 8  # that a ViT has at least along the shorter side, if one of the patches leaves as many
SMALLEST = 16  # side of an image for a CNN


@strict
class UfoStudentConfig(PreTrainedConfig):
    """
    Attributes:
        backbone: one of :data:`STUDENTS`.
        width: multiplier of a CNN's channels or a ViT's heads.
        image_size: height, width.
        embedding_size: channels of the embedding.
        classify: whether there is a classifier, for the classes of ``id2label``.
    """

    model_type = "ufo_student"

    backbone: str = "mobilenet_v3_small"
    width: float | int = 1.0
    image_size: list[int] | tuple[int, ...] = (224, 224)
    embedding_size: int = 192
    classify: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.backbone not in STUDENTS:
            raise ValueError(f"no backbone {self.backbone!r}: one of {', '.join(STUDENTS)}")
        if self.width <= 0:
            raise ValueError(f"width {self.width}: give one above 0")
        if len(self.image_size) != 2 or min(self.image_size) < 1:
            raise ValueError(f"image_size {self.image_size}: give height and width")
        if fault := unfit(self.backbone, (self.image_size[0], self.image_size[1])):
            raise ValueError(fault)


def unfit(backbone: str, input_hw: Size) -> str | None:
    """Why a student cannot take images of this size; None if it can."""
    height, width = input_hw
    if backbone.startswith("vit"):
        least = PATCHES[-1]
        if height % least or width % least:
            return f"{backbone} takes images whose sides are multiples of {least} pixels, not {height}x{width}"
    elif min(input_hw) < SMALLEST:
        return f"{backbone} takes images of {SMALLEST}x{SMALLEST} pixels and more, not {height}x{width}"
    return None


def stride_of(input_hw: Size) -> int:
    """Pixels between positions of a CNN's last feature map: 32, as published, for 128 pixels and more; of smaller
    images the first layers leave out one halving or two, so that something of where things are is left."""
    return next((stride for stride in STRIDES if min(input_hw) // stride >= POSITIONS), STRIDES[-1])


def patch_of(input_hw: Size) -> int:
    """The largest patch that divides both sides and leaves :data:`TOKENS` along the shorter, or else the smallest."""
    fitting = [patch for patch in PATCHES if not input_hw[0] % patch and not input_hw[1] % patch]
    return next((patch for patch in fitting if min(input_hw) // patch >= TOKENS), fitting[-1])


def _backbone(config: UfoStudentConfig) -> tuple[nn.Module, int]:
    """Of a student, and the channels of its feature."""
    name, width = config.backbone, config.width
    input_hw = (config.image_size[0], config.image_size[1])
    if name.startswith("vit"):
        known = BACKBONES[name]
        heads = max(1, round(known["heads"] * width))
        dim = heads * known["dim"] // known["heads"]
        vit = ViTConfig(
            hidden_size=dim, num_hidden_layers=known["depth"], num_attention_heads=heads, intermediate_size=4 * dim,
            image_size=list(input_hw), patch_size=patch_of(input_hw), layer_norm_eps=1e-6,
        )  # fmt: skip
        return ViTModel(vit, add_pooling_layer=False), dim
    if name.startswith("resnet"):
        of_block = (64, 128, 256, 512) if name == "resnet18" else (256, 512, 1024, 2048)
        sizes = [make_divisible(round(channels * width)) for channels in of_block]
        resnet = ResNetConfig(
            embedding_size=make_divisible(round(64 * width)), hidden_sizes=sizes,
            depths=[2, 2, 2, 2] if name == "resnet18" else [3, 4, 6, 3],
            layer_type="basic" if name == "resnet18" else "bottleneck",
        )  # fmt: skip
        network: nn.Module = ResNetModel(resnet)
        channels = sizes[-1]
    elif name == "mobilenet_v2":
        # With finegrained_output the last layer would have 1280 channels at any width below 1.
        mobilenet = MobileNetV2Config(depth_multiplier=width, finegrained_output=False, tf_padding=False)
        network = MobileNetV2Model(mobilenet)
        channels = network.conv_1x1.convolution.out_channels
    else:
        network = MobileNetV3(SMALL if name == "mobilenet_v3_small" else LARGE, width)
        channels = network.features
    _keep_positions(network, STRIDES.index(stride_of(input_hw)))
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.1  # MobileNetV2's is 0.997: of TensorFlow, where it is the share that is kept
    return network, channels


def _keep_positions(network: nn.Module, halvings: int) -> None:
    """Take out the first halvings."""
    for module in network.modules():
        if halvings and isinstance(module, nn.Conv2d | nn.MaxPool2d) and module.stride in (2, (2, 2)):
            module.stride = 1 if module.stride == 2 else (1, 1)
            halvings -= 1


@dataclass
class UfoStudentOutput(ModelOutput):
    """``pooler_output`` [B, D] is the embedding, to be compared by cosine; ``logits`` [B, C] there are of a task with
    classes."""

    pooler_output: Tensor | None = None
    logits: Tensor | None = None


class UfoStudentModel(PreTrainedModel):
    config: UfoStudentConfig
    config_class = UfoStudentConfig
    base_model_prefix = "student"
    main_input_name = "pixel_values"

    def __init__(self, config: UfoStudentConfig):
        super().__init__(config)
        self.backbone, channels = _backbone(config)
        self.projector = nn.Linear(channels, config.embedding_size)
        self.classifier = nn.Linear(config.embedding_size, len(config.id2label or {})) if config.classify else None
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Of what is not of transformers' models, which have their own."""
        if isinstance(module, nn.Conv2d):  # He et al. (2015)
            initialization.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                initialization.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            initialization.normal_(module.weight, std=module.in_features**-0.5)
            initialization.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            initialization.ones_(module.weight)
            initialization.zeros_(module.bias)
            assert module.running_mean is not None
            assert module.running_var is not None
            assert module.num_batches_tracked is not None
            initialization.zeros_(module.running_mean)
            initialization.ones_(module.running_var)
            initialization.zeros_(module.num_batches_tracked)

    def embed(self, pixels_BCHW: Tensor) -> Tensor:
        """The embedding [B, D]."""
        if isinstance(self.backbone, MobileNetV3):
            feature_BF = self.backbone(pixels_BCHW)
        elif isinstance(self.backbone, ViTModel):
            feature_BF = self.backbone(pixels_BCHW).last_hidden_state.mean(1)
        else:
            feature_BF = self.backbone(pixels_BCHW).pooler_output.flatten(1)
        return self.projector(feature_BF)

    @can_return_tuple
    def forward(self, pixel_values: Tensor, **kwargs: Any) -> UfoStudentOutput:
        """``pixel_values`` [B, 3, H, W] as the image processor gives them."""
        embedding_BD = self.embed(pixel_values.to(self.dtype))
        logits_BC = None if self.classifier is None else self.classifier(embedding_BD)
        return UfoStudentOutput(pooler_output=embedding_BD, logits=logits_BC)


AutoConfig.register(UfoStudentConfig.model_type, UfoStudentConfig)
AutoModel.register(UfoStudentConfig, UfoStudentModel)
AutoModelForImageClassification.register(UfoStudentConfig, UfoStudentModel)
