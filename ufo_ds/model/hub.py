"""A dense path that transformers' ``ViTModel`` has no room for, with blocks that differ, a stem or mean pooling, as its
models go.

Importing this module registers the classes, the way transformers documents for models outside of it, so that
``AutoModel`` and ``AutoModelForImageClassification`` load such a directory. Blocks, pooler and parameter names are
those of transformers' ViT; ``embeddings.patch_embeddings.stem`` is what it does not have.
"""

import copy
from itertools import pairwise
from typing import Any, Literal

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, ViTConfig, initialization
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.models.vit.modeling_vit import ViTLayer, ViTPooler, ViTPreTrainedModel
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from ufo_ds.model.layers import StemLayer, resize_position
from ufo_ds.recipe_model import stem_stride


@strict
class UfoViTConfig(ViTConfig):
    """A ``ViTConfig``, and of the recipe's backbone the channels of the ``stem`` and what is pooled.

    Where blocks differ, ``heads`` are their attention heads and ``hidden`` the widths of their FFNs, one of each for
    every block, which count in place of ``num_attention_heads`` and ``intermediate_size``; otherwise both are empty.
    """

    model_type = "ufo_vit"

    patch_size: int = 16
    stem: list[int] | tuple[int, ...] = ()
    pool: Literal["cls", "mean"] = "mean"
    heads: list[int] | tuple[int, ...] = ()
    hidden: list[int] | tuple[int, ...] = ()

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        for name, of_blocks in (("heads", self.heads), ("hidden", self.hidden)):
            if of_blocks and len(of_blocks) != self.num_hidden_layers:
                raise ValueError(f"{len(of_blocks)} {name} for {self.num_hidden_layers} blocks: give one for each")

    def layers(self) -> "list[UfoViTConfig]":
        """Of every block a config of its sizes."""
        blocks = [copy.copy(self) for _ in range(self.num_hidden_layers)]
        for block, heads in zip(blocks, self.heads, strict=False):
            block.num_attention_heads = heads
        for block, hidden in zip(blocks, self.hidden, strict=False):
            block.intermediate_size = hidden
        return blocks


class UfoViTLayer(ViTLayer):
    """A block by a config of its sizes; for what may change later, such as how attention is computed, it asks
    ``model_config``."""

    def __init__(self, config: UfoViTConfig, model_config: UfoViTConfig):
        super().__init__(config)
        self.attention.config = self.mlp.config = model_config


class UfoViTPatchEmbeddings(nn.Module):
    """Pixels ``[B, 3, H, W]`` to ``[B, h * w, D]``: stem, then projection of what it leaves of a patch."""

    def __init__(self, config: UfoViTConfig):
        super().__init__()
        channels = [config.num_channels, *config.stem]
        rest = config.patch_size // stem_stride(config.stem)
        self.patch_size = config.patch_size
        self.stem = nn.Sequential(*(StemLayer(a, b) for a, b in pairwise(channels)))
        self.projection = nn.Conv2d(channels[-1], config.hidden_size, rest, stride=rest)

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        height, width = (side - side % self.patch_size for side in pixels_BCHW.shape[2:])
        x_BDhw = self.projection(self.stem(pixels_BCHW[:, :, :height, :width]))
        return x_BDhw.flatten(2).transpose(1, 2)


class UfoViTEmbeddings(nn.Module):
    """Pixels to tokens, with a class token before them if that is what is pooled, and position embeddings."""

    def __init__(self, config: UfoViTConfig):
        super().__init__()
        size = config.image_size
        self.image_size = (size, size) if isinstance(size, int) else tuple(size)
        self.patch_embeddings = UfoViTPatchEmbeddings(config)
        prefix = 1 if config.pool == "cls" else 0
        grid = self._grid(*self.image_size)
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.hidden_size)) if prefix else None
        self.position_embeddings = nn.Parameter(torch.empty(1, prefix + grid[0] * grid[1], config.hidden_size))

    def forward(self, pixels_BCHW: Tensor, interpolate_pos_encoding: bool) -> Tensor:
        size = pixels_BCHW.shape[2], pixels_BCHW.shape[3]
        if size != self.image_size and not interpolate_pos_encoding:
            raise ValueError(
                f"images of {size[0]}x{size[1]} pixels, this model takes {self.image_size[0]}x{self.image_size[1]}: "
                "resize them or give interpolate_pos_encoding=True"
            )
        x_BLD = self.patch_embeddings(pixels_BCHW)
        if self.cls_token is not None:
            x_BLD = torch.cat([self.cls_token.expand(len(x_BLD), -1, -1), x_BLD], dim=1)
        return x_BLD + resize_position(self.position_embeddings[0], self._grid(*self.image_size), self._grid(*size))

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        return height // self.patch_embeddings.patch_size, width // self.patch_embeddings.patch_size


class UfoViTPreTrainedModel(ViTPreTrainedModel):
    config: UfoViTConfig
    _no_split_modules = ["UfoViTEmbeddings", "UfoViTLayer"]  # noqa: RUF012 (as transformers declares it)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, UfoViTEmbeddings):
            initialization.trunc_normal_(module.position_embeddings, std=self.config.initializer_range)
            if module.cls_token is not None:
                initialization.trunc_normal_(module.cls_token, std=self.config.initializer_range)

    def pooled(self, tokens_BLD: Tensor) -> Tensor:
        """The feature ``[B, D]`` of an image: its class token, or the mean of its tokens."""
        return tokens_BLD[:, 0] if self.config.pool == "cls" else tokens_BLD.mean(1)


class UfoViTModel(UfoViTPreTrainedModel):
    """``pooler_output`` is the embedding, ``last_hidden_state`` the tokens, after the last norm."""

    def __init__(self, config: UfoViTConfig, add_pooling_layer: bool = True):
        super().__init__(config)
        self.embeddings = UfoViTEmbeddings(config)
        self.layers = nn.ModuleList(UfoViTLayer(layer, config) for layer in config.layers())
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.pooler = ViTPooler(config) if add_pooling_layer else None
        self.post_init()

    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self, pixel_values: Tensor, interpolate_pos_encoding: bool = False, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """``pixel_values`` ``[B, 3, H, W]`` as the image processor gives them.

        Raises:
            ValueError: images of another size than the model's, without ``interpolate_pos_encoding``.
        """
        x_BLD = self.embeddings(pixel_values.to(self.dtype), interpolate_pos_encoding)
        for layer in self.layers:
            x_BLD = layer(x_BLD, **kwargs)
        x_BLD = self.layernorm(x_BLD)
        # The pooler takes the first token: it is given the feature as the only one.
        pooled_BD = self.pooler(self.pooled(x_BLD)[:, None]) if self.pooler is not None else None
        return BaseModelOutputWithPooling(last_hidden_state=x_BLD, pooler_output=pooled_BD)


class UfoViTForImageClassification(UfoViTPreTrainedModel):
    """``logits`` of the feature; with ``labels`` ``[B]`` their cross entropy as ``loss``."""

    def __init__(self, config: UfoViTConfig):
        super().__init__(config)
        self.vit = UfoViTModel(config, add_pooling_layer=False)
        assert config.num_labels is not None
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Any,
    ) -> ImageClassifierOutput:
        outputs = self.vit(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, **kwargs)
        logits_BC = self.classifier(self.pooled(outputs.last_hidden_state))
        return ImageClassifierOutput(
            loss=None if labels is None else self.loss_function(labels, logits_BC, self.config),
            logits=logits_BC,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


AutoConfig.register(UfoViTConfig.model_type, UfoViTConfig)
AutoModel.register(UfoViTConfig, UfoViTModel)
AutoModelForImageClassification.register(UfoViTConfig, UfoViTForImageClassification)
