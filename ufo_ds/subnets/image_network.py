"""A network that takes images as they are stored, and normalises them on its device."""

import torch
from torch import Tensor, nn

from ufo_ds.model.heads import Outputs
from ufo_ds.recipe import Recipe


class ImageNetwork(nn.Module):
    """uint8 [B, 3, H, W], as ``evaluation_transform`` makes them, to embeddings [B, D] and logits [B, C], C = 0 without
    a classifier; fp32. Subclasses say by :meth:`of_pixels` what follows from normalised images.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, recipe: Recipe):
        super().__init__()
        for name, values in (("mean", recipe.data.mean), ("std", recipe.data.std)):
            self.register_buffer(name, 255 * torch.tensor(values)[:, None, None], persistent=False)

    def forward(self, images: Tensor) -> Outputs:
        return self.of_pixels(self.normalize(images))

    def normalize(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] as the stock image processor hands them on."""
        return (images.float() - self.mean) / self.std

    def of_pixels(self, pixels_BCHW: Tensor) -> Outputs:
        raise NotImplementedError
