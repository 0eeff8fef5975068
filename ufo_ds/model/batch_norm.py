"""Batch normalisation over all samples of a micro-batch, wherever they are.

torch's own SyncBatchNorm runs on GPUs alone, and its BatchNorm refuses a single sample; here a process may have none.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ufo_ds.model.classifiers import HolderGroup


class BatchNorm(nn.Module):
    """For features ``[B, C]`` or maps ``[B, C, H, W]``, with fp32 statistics.

    Attributes:
        group: the processes whose samples are normalised together.
    """

    momentum = 0.1
    eps = 1e-5
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, bias: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.group = HolderGroup()

    def forward(self, x: Tensor) -> Tensor:
        """Without gradients (of probes) the running statistics stay as they are."""
        if not self.training:
            return self._normalised(x, self.running_mean, self.running_var)
        if self.group.size == 1 and x.dim() > 2 and len(x):  # the same by a fused kernel
            mean, var = (self.running_mean, self.running_var) if torch.is_grad_enabled() else (None, None)
            return F.batch_norm(x, mean, var, self.weight, self.bias, True, self.momentum, self.eps)
        return self._normalised(x, *self._batch_statistics(x.float()))

    def _normalised(self, x: Tensor, mean_C: Tensor, var_C: Tensor) -> Tensor:
        scale_C = torch.rsqrt(var_C + self.eps) * self.weight.float()
        shape = (-1, *[1] * (x.dim() - 2))
        y = (x.float() - mean_C.view(shape)) * scale_C.view(shape)
        return y if self.bias is None else y + self.bias.float().view(shape)

    def _batch_statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        # Two passes: the mean of squares minus the square of the mean cancels where features hardly differ.
        x_NC = x.movedim(1, -1).flatten(0, -2)
        total = self.group.all_reduce(torch.cat([x_NC.sum(0), x_NC.new_tensor([float(len(x_NC))])]))
        found = total[-1].detach()
        count = found.clamp(min=1.0)
        mean_C = total[:-1] / count
        var_C = self.group.all_reduce((x_NC - mean_C).square().sum(0)) / count
        if torch.is_grad_enabled():
            with torch.no_grad():
                unbiased_C = var_C * (count / (count - 1).clamp(min=1.0))
                # No sample says nothing about the mean, one nothing about the variance. As a factor, to not ask the
                # device.
                self.running_mean.lerp_(mean_C, self.momentum * (found >= 1))
                self.running_var.lerp_(unbiased_C, self.momentum * (found >= 2))
        return mean_C, var_C
