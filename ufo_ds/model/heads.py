"""What a task adds behind the backbone: a neck, a classifier and its losses.

All heads have two parameters, a matrix and then a vector, so that ranks which hold different tasks stay alike (ZeRO-3
counts), and both may be padded to the sizes of other ranks'.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ufo_ds import losses
from ufo_ds.model.classifiers import Classifier, CosineClassifier, HolderGroup, LinearClassifier, Padded, Part
from ufo_ds.model.packing import Segment, split
from ufo_ds.recipe_task import ArcFace, BinaryCrossEntropy, Circle, CosFace, CrossEntropy, Head, Loss
from ufo_ds.seeding import torch_generator

LOSSES = ("cross_entropy", "binary_cross_entropy", "cosface", "am_softmax", "arcface", "circle", "triplet")
Moment = tuple[int, int]  # step, micro-step
Mix = tuple[Tensor, Tensor]  # labels of the images that samples are mixed with, weights of the samples' own, each [B]


class BatchNormNeck(Padded):
    """Batch normalisation of the feature before a margin classifier, without a shift (BNNeck, Luo et al., 2019).

    Statistics are those of all samples of the task in the micro-batch, wherever they are; none or one is fine.
    """

    momentum = 0.1
    eps = 1e-5
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, dim: int, scale: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim)) if scale else None
        self.register_buffer("running_mean", torch.zeros(dim))
        self.register_buffer("running_var", torch.ones(dim))
        self.group = HolderGroup()

    def held(self) -> dict[str, Part]:
        shape = self.running_mean.shape
        return {} if self.weight is None else {"weight": Part(shape, range(len(self.running_mean)))}

    def forward(self, x_BD: Tensor) -> Tensor:
        x_BD = x_BD.float()
        if self.training:
            mean_D, var_D = self._batch_statistics(x_BD)
        else:
            mean_D, var_D = self.running_mean, self.running_var
        y_BD = (x_BD - mean_D) * torch.rsqrt(var_D + self.eps)
        return y_BD if self.weight is None else y_BD * self.weight[: len(mean_D)].float()

    def _batch_statistics(self, x_BD: Tensor) -> tuple[Tensor, Tensor]:
        # Two passes: the mean of squares minus the square of the mean cancels where features hardly differ.
        total = self.group.all_reduce(torch.cat([x_BD.sum(0), x_BD.new_full((1,), float(len(x_BD)))]))
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


class Outputs(NamedTuple):
    """What a head says of images: ``embedding`` [B, D] and ``logits`` [B, C], fp32.

    A sharded margin head is there for its embedding: its logits are [B, 0].
    """

    embedding: Tensor
    logits: Tensor


class TaskHead(nn.Module):
    """``linear``: logits of the feature. ``margin``: BN neck, then cosines. The embedding is the feature after the
    neck, if there is one. A triplet loss sees the one before it, or normalised what is compared in the end.

    Args:
        key: of the random stream by which sampled negatives are drawn, with the step.
    """

    def __init__(self, options: Head, dim: int, num_classes: int, loss: Loss, key: tuple[int | str, ...] = ()):
        super().__init__()
        margin = options.type == "margin"
        self.classifier: Classifier = (CosineClassifier if margin else LinearClassifier)(dim, num_classes)
        # A linear classifier needs no scale before it, and then all heads have two parameters.
        self.neck = BatchNormNeck(dim, scale=margin) if margin or options.neck else nn.Identity()
        self.options, self.loss, self.key = options, loss, key
        self.group = HolderGroup()

    def set_group(self, group: HolderGroup, sharded: bool = False) -> None:
        """The processes that hold the task; ``sharded``: each keeps its part of the classifier's rows."""
        self.group = group
        if isinstance(self.neck, BatchNormNeck):
            self.neck.group = group
        if sharded:
            self.classifier.keep(group)

    @property
    def entries(self) -> int:
        """Of the head's vector, the classifier's bias or the neck's scale."""
        return self.classifier.num_classes if isinstance(self.classifier, LinearClassifier) else self.classifier.dim

    def pad(self, rows: int, entries: int) -> None:
        """Make room for as many rows in the classifier's matrix, and entries in the head's vector."""
        self.classifier.pad(rows)
        if isinstance(self.classifier, LinearClassifier):
            self.classifier.bias = nn.Parameter(self.classifier.bias.new_empty(entries))
        elif isinstance(self.neck, BatchNormNeck):
            self.neck.weight = nn.Parameter(self.classifier.weight.new_empty(entries))

    def forward(
        self,
        features_BD: Tensor,
        labels_B: Tensor | None = None,
        global_count: int = 0,
        moment: Moment = (0, 0),
        mix: Mix | None = None,
    ) -> Tensor | Outputs:
        """With labels the losses, without them the outputs.

        Args:
            features_BD: this process's samples of the task.
            labels_B: their classes, or sets of attributes as of ``ufo_ds.data.attributes``.
            global_count: samples of the task in the micro-batch on all processes.
            moment: of training.
            mix: of samples that are mixed, for a linear head: its loss is then the weighted mean of those of both
                labels, which is cross-entropy with soft targets.

        Returns:
            One value for each of :data:`LOSSES` (0 where the task has none): the weighted sum over this process's
            samples / ``global_count``, so that the sum over processes is the global mean. It is one tensor, because
            ZeRO-3 counts the outputs of a module and wants them alike on all ranks.
        """
        embedding_BD = self.neck(features_BD)
        if labels_B is None:
            embedding_BD = embedding_BD.float()
            if self.options.sharded and self.options.type == "margin":
                return Outputs(embedding_BD, embedding_BD[:, :0])
            return Outputs(embedding_BD, self.classifier(embedding_BD))
        values = self._classification(embedding_BD, labels_B, global_count, moment, mix)
        if (triplet := self.loss.triplet) is not None:
            features_BD = F.normalize(embedding_BD.float()) if triplet.normalize else features_BD.float()
            counts = self.group.counts(global_count)
            everyone_MD, labels_M = [self.group.all_gather(x, counts) for x in (features_BD, labels_B)]
            values["triplet"] = triplet.weight * losses.batch_hard_triplet(
                features_BD, labels_B, everyone_MD, labels_M, triplet.margin
            )
        zero = embedding_BD.new_zeros(1, dtype=torch.float32)
        return torch.stack([values.get(name, zero).sum() for name in LOSSES]) / max(global_count, 1)

    def _classification(
        self, embedding_BD: Tensor, labels_B: Tensor, global_count: int, moment: Moment, mix: Mix | None
    ) -> dict[str, Tensor]:
        """Weighted losses ``[B]`` by the classifier. Where its rows are spread, every process computes the logits of
        all samples for its rows, and takes the losses of its own samples."""
        sharded, counts = self.classifier.is_spread, self.group.counts(global_count)
        samples_XD, labels_X = embedding_BD, labels_B  # X: own samples, or all where rows are spread
        if sharded:
            samples_XD = self.group.all_gather(embedding_BD, counts)
            labels_X = self.group.all_gather(labels_B, counts)
        chosen, position_C = None, None
        if self.options.sampled_negatives < 1.0:
            present = labels_X if sharded else self.group.all_gather(labels_B, counts)
            chosen, position_C = self._sample(present, moment)
        logits_XC = self.classifier.logits(samples_XD, chosen)

        def loss_of(
            options: CrossEntropy | BinaryCrossEntropy | CosFace | ArcFace | Circle, labels_X: Tensor
        ) -> Tensor:
            if isinstance(options, BinaryCrossEntropy):  # of a head that is neither sharded nor sampled
                return options.weight * losses.binary_cross_entropy(logits_XC, labels_X)
            columns_X = self._columns(labels_X, position_C)
            loss_X = losses.cross_entropy(
                _with_margin(options, logits_XC, columns_X),
                columns_X,
                options.label_smoothing if isinstance(options, CrossEntropy) else 0.0,
                self.group if sharded else None,
            )
            return options.weight * (loss_X.split(counts)[self.group.part] if sharded else loss_X)

        values = {}
        for name in LOSSES:
            options = getattr(self.loss, name)
            if options is None or name == "triplet":
                continue
            values[name] = loss_of(options, labels_X)
            if mix is not None:
                others_B, weight_B = mix
                others_X = self.group.all_gather(others_B, counts) if sharded else others_B
                values[name] = weight_B * values[name] + (1 - weight_B) * loss_of(options, others_X)
        return values

    def _columns(self, labels_X: Tensor, position_C: Tensor | None) -> Tensor:
        """Where the logits of these classes are; -1 for those whose rows are not here."""
        rows = self.classifier.rows
        here_X = (labels_X >= rows.start) & (labels_X < rows.stop)
        columns_X = labels_X - rows.start
        if position_C is not None and len(rows):
            columns_X = position_C[columns_X.clamp(0, len(rows) - 1)]
        return columns_X.masked_fill(~here_X, -1)

    def _sample(self, present_M: Tensor, moment: Moment) -> tuple[Tensor, Tensor]:
        """The classes of the whole batch, and each other one with a probability of ``sampled_negatives`` (Partial FC:
        An et al., 2021), the same however rows are spread: positions among the rows here, and where each row is then.
        """
        rows, generator = self.classifier.rows, torch_generator(*self.key, *moment)
        draws_C = torch.rand(self.classifier.num_classes, generator=generator)[rows.start : rows.stop]
        used_C = (draws_C < self.options.sampled_negatives).to(present_M.device, non_blocking=True)
        here_M = (present_M >= rows.start) & (present_M < rows.stop)
        # Classes that are elsewhere fall behind the end. Picked by a mask, the others would be waited for.
        used_C = F.pad(used_C, (0, 1)).scatter_(0, torch.where(here_M, present_M - rows.start, len(rows)), True)[:-1]
        return used_C.nonzero()[:, 0], used_C.cumsum(0) - 1  # the host waits: how many there are shapes the logits


def _with_margin(options: CrossEntropy | CosFace | ArcFace | Circle, x_BC: Tensor, columns_B: Tensor) -> Tensor:
    """Logits of a loss from cosines, or from the logits of a linear head."""
    match options:
        case CrossEntropy():
            return x_BC if options.scale is None else options.scale * x_BC
        case ArcFace():
            return losses.arcface_logits(x_BC, columns_B, options.scale, options.margin)
        case Circle():
            return losses.circle_logits(x_BC, columns_B, options.scale, options.margin)
        case _:
            return losses.cosface_logits(x_BC, columns_B, options.scale, options.margin)


class TaskHeads(nn.ModuleDict):
    """One head per task; ``parallel.experts`` replaces it by the layer that holds only this rank's tasks."""

    def forward(
        self,
        features_BD: Tensor,
        segments: Sequence[Segment],
        labels: Mapping[str, Tensor] | None = None,
        global_counts: Mapping[str, int] | None = None,
        moment: Moment = (0, 0),
        mixes: Mapping[str, Mix] | None = None,
    ) -> Tensor | dict[str, Outputs]:
        """``segments`` have one row per image. With ``labels`` and ``global_counts`` the losses of every segment's
        task ``[tasks, len(LOSSES)]``, without them its outputs. ``mixes``: of the tasks that mix samples."""
        rows = dict(zip([s.task for s in segments], split(features_BD, segments), strict=True))
        if labels is None or global_counts is None:
            return {task: self[task](x_BD) for task, x_BD in rows.items()}
        return torch.stack([
            self[task](x_BD, labels[task], global_counts[task], moment, (mixes or {}).get(task))
            for task, x_BD in rows.items()
        ])  # fmt: skip
