"""What a task adds behind the backbone: a neck, a classifier and its losses.

All heads have two parameters, so that ranks which hold different tasks stay alike (ZeRO-3 counts).
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ufo_ds import losses
from ufo_ds.model.packing import Segment, split
from ufo_ds.recipe import Loss

LOSSES = ("cross_entropy", "cosface", "triplet")


class HolderGroup:
    """The processes that hold the samples of a task: here this one alone.

    ``parallel.exchange`` has the one for several ranks, with gradients through both collectives.
    """

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over the processes."""
        return x

    def all_gather(self, x: Tensor, total: int) -> Tensor:
        """The ``total`` rows of all processes, in the order of the processes; their numbers may differ."""
        return x


class BatchNormNeck(nn.Module):
    """Batch normalisation of the feature before a margin classifier, without a shift (BNNeck, Luo et al., 2019).

    Statistics are those of all samples of the task in the micro-batch, wherever they are; none or one is fine.
    """

    momentum = 0.1
    eps = 1e-5
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.register_buffer("running_mean", torch.zeros(dim))
        self.register_buffer("running_var", torch.ones(dim))
        self.group = HolderGroup()

    def forward(self, x_BD: Tensor) -> Tensor:
        x_BD = x_BD.float()
        if self.training:
            mean_D, var_D = self._batch_statistics(x_BD)
        else:
            mean_D, var_D = self.running_mean, self.running_var
        return (x_BD - mean_D) * torch.rsqrt(var_D + self.eps) * self.weight.float()

    def _batch_statistics(self, x_BD: Tensor) -> tuple[Tensor, Tensor]:
        # Two passes: the mean of squares minus the square of the mean cancels where features hardly differ.
        total = self.group.all_reduce(torch.cat([x_BD.sum(0), x_BD.new_tensor([float(len(x_BD))])]))
        found = total[-1].detach()
        count = found.clamp(min=1.0)
        mean_D = total[:-1] / count
        var_D = self.group.all_reduce((x_BD - mean_D).square().sum(0)) / count
        with torch.no_grad():
            unbiased_D = var_D * (count / (count - 1).clamp(min=1.0))
            # No sample says nothing about the mean, one nothing about the variance. As a factor, to not ask the device.
            self.running_mean.lerp_(mean_D, self.momentum * (found >= 1))
            self.running_var.lerp_(unbiased_D, self.momentum * (found >= 2))
        return mean_D, var_D


class CosineClassifier(nn.Module):
    """Cosine between a feature and each class's weight."""

    def __init__(self, dim: int, num_classes: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_classes, dim))

    def forward(self, x_BD: Tensor) -> Tensor:
        return F.linear(F.normalize(x_BD.float()), F.normalize(self.weight.float()))


class LinearClassifier(nn.Linear):
    def forward(self, x_BD: Tensor) -> Tensor:
        return F.linear(x_BD.float(), self.weight.float(), self.bias.float())


class Outputs(NamedTuple):
    """What a head says of images: ``embedding`` [B, D] and ``logits`` [B, C], fp32."""

    embedding: Tensor
    logits: Tensor


class TaskHead(nn.Module):
    """``kind="linear"``: logits of the feature. ``kind="margin"``: BN neck, then cosines; the embedding is the
    feature after the neck, the triplet loss sees the one before it."""

    def __init__(self, kind: str, dim: int, num_classes: int, loss: Loss):
        super().__init__()
        self.neck = BatchNormNeck(dim) if kind == "margin" else nn.Identity()
        self.classifier = CosineClassifier(dim, num_classes) if kind == "margin" else LinearClassifier(dim, num_classes)
        self.loss = loss
        self.group = HolderGroup()

    def set_group(self, group: HolderGroup) -> None:
        self.group = group
        if isinstance(self.neck, BatchNormNeck):
            self.neck.group = group

    def forward(self, features_BD: Tensor, labels_B: Tensor | None = None, global_count: int = 0) -> Tensor | Outputs:
        """With labels the losses, without them the outputs.

        Args:
            features_BD: this process's samples of the task.
            labels_B: their classes.
            global_count: samples of the task in the micro-batch on all processes.

        Returns:
            One value for each of :data:`LOSSES` (0 where the task has none): the weighted sum over this process's
            samples / ``global_count``, so that the sum over processes is the global mean. It is one tensor, because
            ZeRO-3 counts the outputs of a module and wants them alike on all ranks.
        """
        embedding_BD = self.neck(features_BD)
        logits_BC = self.classifier(embedding_BD)
        if labels_B is None:
            return Outputs(embedding_BD.float(), logits_BC)
        zero = logits_BC.new_zeros(1)
        values = dict.fromkeys(LOSSES, zero)
        if (ce := self.loss.cross_entropy) is not None:
            values["cross_entropy"] = ce.weight * losses.cross_entropy(logits_BC, labels_B, ce.label_smoothing)
        if (cos := self.loss.cosface) is not None:
            values["cosface"] = cos.weight * losses.cosface(logits_BC, labels_B, cos.scale, cos.margin)
        if (triplet := self.loss.triplet) is not None:
            features_BD = features_BD.float()
            everyone_MD, labels_M = [self.group.all_gather(x, global_count) for x in (features_BD, labels_B)]
            values["triplet"] = triplet.weight * losses.batch_hard_triplet(
                features_BD, labels_B, everyone_MD, labels_M, triplet.margin
            )
        return torch.stack([values[name].sum() for name in LOSSES]) / max(global_count, 1)


class TaskHeads(nn.ModuleDict):
    """One head per task; ``parallel.experts`` replaces it by the layer that holds only this rank's tasks."""

    def forward(
        self,
        features_BD: Tensor,
        segments: Sequence[Segment],
        labels: Mapping[str, Tensor] | None = None,
        global_counts: Mapping[str, int] | None = None,
    ) -> Tensor | dict[str, Outputs]:
        """``segments`` have one row per image. With ``labels`` and ``global_counts`` the losses of every segment's
        task ``[tasks, len(LOSSES)]``, without them its outputs."""
        rows = dict(zip([s.task for s in segments], split(features_BD, segments), strict=True))
        if labels is None or global_counts is None:
            return {task: self[task](x_BD) for task, x_BD in rows.items()}
        return torch.stack([self[task](x_BD, labels[task], global_counts[task]) for task, x_BD in rows.items()])
