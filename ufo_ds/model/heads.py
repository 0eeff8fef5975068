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
from ufo_ds.model.elastic import narrow
from ufo_ds.model.experts import by_task
from ufo_ds.model.packing import Segment
from ufo_ds.recipe_task import ArcFace, BinaryCrossEntropy, Circle, CosFace, CrossEntropy, Head, Loss
from ufo_ds.seeding import torch_generator

LABEL_LOSSES = ("cross_entropy", "binary_cross_entropy", "cosface", "am_softmax", "arcface", "circle", "triplet")
LOSSES = (*LABEL_LOSSES, "distillation")
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

    def forward(self, x_BD: Tensor, track: bool = True) -> Tensor:
        """``x_BD`` may have the leading columns only. ``track``: of training, whether the running statistics follow."""
        x_BD = x_BD.to(torch.promote_types(x_BD.dtype, torch.float32))
        if self.training:
            mean_D, var_D = self._batch_statistics(x_BD, track)
        else:
            mean_D, var_D = narrow(self.running_mean, x_BD.shape[1], 0), narrow(self.running_var, x_BD.shape[1], 0)
        y_BD = (x_BD - mean_D) * torch.rsqrt(var_D + self.eps)
        return y_BD if self.weight is None else y_BD * self.weight[: len(mean_D)].float()

    def _batch_statistics(self, x_BD: Tensor, track: bool) -> tuple[Tensor, Tensor]:
        # Two passes: the mean of squares minus the square of the mean cancels where features hardly differ.
        total = self.group.all_reduce(torch.cat([x_BD.sum(0), x_BD.new_full((1,), float(len(x_BD)))]))
        found = total[-1].detach()
        count = found.clamp(min=1.0)
        mean_D = total[:-1] / count
        var_D = self.group.all_reduce((x_BD - mean_D).square().sum(0)) / count
        if track:
            with torch.no_grad():
                unbiased_D = var_D * (count / (count - 1).clamp(min=1.0))
                # No sample says nothing about the mean, one nothing about the variance. As a factor, to not ask the
                # device.
                for running_D, now_D, least in ((self.running_mean, mean_D, 1), (self.running_var, unbiased_D, 2)):
                    moved = self.momentum * (found >= least)
                    narrow(running_D, len(now_D), 0).lerp_(now_D.to(running_D.dtype), moved.to(running_D.dtype))
        return mean_D, var_D


class Outputs(NamedTuple):
    """What a head says of images: ``embedding`` [B, D] and ``logits`` [B, C], fp32.

    A sharded margin head is there for its embedding: its logits are [B, 0].
    """

    embedding: Tensor
    logits: Tensor

    def cosine(self, other: "Outputs") -> Tensor:
        """How alike images are: of every embedding here with each of the other's, [B, B of the other]."""
        return torch.inner(F.normalize(self.embedding, dim=-1), F.normalize(other.embedding, dim=-1))


class _Scores(NamedTuple):
    """Of the samples X, this process's own or all where the classifier's rows are spread: logits of the classes that
    are here, labels, and where each class's column is if they are sampled."""

    logits_XC: Tensor
    labels_X: Tensor
    position_C: Tensor | None


class TaskHead(nn.Module):
    """``linear``: logits of the feature. ``margin``: BN neck, then cosines. The embedding is the feature after the
    neck, if there is one. A triplet loss sees the one before it, or normalised what is compared in the end.

    Args:
        key: of the random stream by which sampled negatives are drawn, with the step.
        distillation: share of a smaller subnet's loss that is the divergence from the largest.
    """

    def __init__(
        self, options: Head, dim: int, num_classes: int, loss: Loss, key: tuple[int | str, ...] = (),
        distillation: float = 0.0,
    ):  # fmt: skip
        super().__init__()
        margin = options.type == "margin"
        self.classifier: Classifier = (CosineClassifier if margin else LinearClassifier)(dim, num_classes)
        # A linear classifier needs no scale before it, and then all heads have two parameters.
        self.neck = BatchNormNeck(dim, scale=margin) if margin or options.neck else nn.Identity()
        self.options, self.loss, self.key, self.distillation = options, loss, key, distillation
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
        widths: Sequence[int] = (),
    ) -> Tensor | Outputs:
        """With labels the losses, without them the outputs.

        Args:
            features_BD: this process's samples of the task; of several subnets those of each, one below the other.
            labels_B: their classes, or sets of attributes as of ``ufo_ds.data.attributes``.
            global_count: samples of the task in the micro-batch on all processes.
            moment: of training.
            mix: of samples that are mixed, for a linear head: its loss is then the weighted mean of those of both
                labels, which is cross-entropy with soft targets.
            widths: leading columns that each subnet has; default: one subnet, all. Others than the first learn from its
                logits too, and leave the neck's running statistics alone.

        Returns:
            One value for each of :data:`LOSSES` (0 where the task has none): the weighted sum over this process's
            samples / ``global_count``, so that the sum over processes is the global mean; and the mean over subnets. It
            is one tensor, because ZeRO-3 counts the outputs of a module and wants them alike on all ranks.
        """
        widths = widths or features_BD.shape[1:]
        each = len(features_BD) // len(widths)
        subnets = [narrow(x, width) for x, width in zip(features_BD.split([each] * len(widths)), widths, strict=True)]
        if labels_B is None:
            embedding_BD = self._embed(subnets[0]).float()
            if self.options.sharded and self.options.type == "margin":
                return Outputs(embedding_BD, embedding_BD[:, :0])
            return Outputs(embedding_BD, self.classifier(embedding_BD))
        total_K, teacher = self._losses(subnets[0], labels_B, global_count, moment, mix, None)
        for features_BD in subnets[1:]:
            total_K = total_K + self._losses(features_BD, labels_B, global_count, moment, mix, teacher)[0]
        return total_K / (len(subnets) * max(global_count, 1))

    def _embed(self, features_BD: Tensor, track: bool = True) -> Tensor:
        return self.neck(features_BD, track) if isinstance(self.neck, BatchNormNeck) else features_BD

    def _losses(
        self,
        features_BD: Tensor,
        labels_B: Tensor,
        global_count: int,
        moment: Moment,
        mix: Mix | None,
        teacher: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """The sums of one subnet's losses over samples, and its logits. ``teacher``: those of the largest subnet."""
        embedding_BD = self._embed(features_BD, track=teacher is None)
        counts = self.group.counts(global_count)
        scores = self._score(embedding_BD, labels_B, counts, moment)
        values, from_labels = {}, 1.0 if teacher is None else 1.0 - self.distillation
        if from_labels:
            values = self._classification(scores, mix, counts)
            if (triplet := self.loss.triplet) is not None:
                features_BD = F.normalize(embedding_BD.float()) if triplet.normalize else features_BD.float()
                everyone_MD, labels_M = [self.group.all_gather(x, counts) for x in (features_BD, labels_B)]
                values["triplet"] = triplet.weight * losses.batch_hard_triplet(
                    features_BD, labels_B, everyone_MD, labels_M, triplet.margin
                )
            values = {name: from_labels * value for name, value in values.items()}
        if teacher is not None and self.distillation:
            values["distillation"] = self.distillation * self._distillation(scores.logits_XC, teacher, counts)
        zero = embedding_BD.new_zeros(1, dtype=torch.float32)
        return torch.stack([values.get(name, zero).sum() for name in LOSSES]), scores.logits_XC.detach()

    def _score(self, embedding_BD: Tensor, labels_B: Tensor, counts: Sequence[int], moment: Moment) -> _Scores:
        """Where the classifier's rows are spread, every process computes the logits of all samples for its rows."""
        samples_XD, labels_X = embedding_BD, labels_B
        if self.classifier.is_spread:
            samples_XD = self.group.all_gather(embedding_BD, counts)
            labels_X = self.group.all_gather(labels_B, counts)
        chosen, position_C = None, None
        if self.options.sampled_negatives < 1.0:
            present = labels_X if self.classifier.is_spread else self.group.all_gather(labels_B, counts)
            chosen, position_C = self._sample(present, moment)
        return _Scores(self.classifier.logits(samples_XD, chosen), labels_X, position_C)

    def _classification(self, scores: _Scores, mix: Mix | None, counts: Sequence[int]) -> dict[str, Tensor]:
        """Weighted losses ``[B]`` of this process's samples by the classifier."""
        sharded = self.classifier.is_spread

        def loss_of(
            options: CrossEntropy | BinaryCrossEntropy | CosFace | ArcFace | Circle, labels_X: Tensor
        ) -> Tensor:
            if isinstance(options, BinaryCrossEntropy):  # of a head that is neither sharded nor sampled
                return options.weight * losses.binary_cross_entropy(scores.logits_XC, labels_X)
            columns_X = self._columns(labels_X, scores.position_C)
            loss_X = losses.cross_entropy(
                _with_margin(options, scores.logits_XC, columns_X),
                columns_X,
                options.label_smoothing if isinstance(options, CrossEntropy) else 0.0,
                self.group if sharded else None,
            )
            return options.weight * self._own(loss_X, counts)

        values = {}
        for name in LABEL_LOSSES:
            options = getattr(self.loss, name)
            if options is None or name == "triplet":
                continue
            values[name] = loss_of(options, scores.labels_X)
            if mix is not None:
                others_B, weight_B = mix
                others_X = self.group.all_gather(others_B, counts) if sharded else others_B
                values[name] = weight_B * values[name] + (1 - weight_B) * loss_of(options, others_X)
        return values

    def _distillation(self, logits_XC: Tensor, teacher_XC: Tensor, counts: Sequence[int]) -> Tensor:
        """``[B]``: divergence from the teacher, without margins, as heavy as the losses of the classifier."""
        given = [getattr(self.loss, name) for name in self.loss.given if name != "triplet"]
        weight = sum(options.weight for options in given)
        if self.loss.multi_label:
            return weight * losses.binary_divergence(logits_XC, teacher_XC)
        scale = given[0].scale or 1.0
        group = self.group if self.classifier.is_spread else None
        return weight * self._own(losses.divergence(scale * logits_XC, scale * teacher_XC, group), counts)

    def _own(self, loss_X: Tensor, counts: Sequence[int]) -> Tensor:
        """This process's samples."""
        return loss_X.split(counts)[self.group.part] if self.classifier.is_spread else loss_X

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
        """``segments`` have one row per image, a task's are neighbours, one for each subnet. With ``labels`` and
        ``global_counts`` the losses of every segment's task ``[tasks, len(LOSSES)]``, without them its outputs.
        ``mixes``: of the tasks that mix samples."""
        rows = {task: (x_BD, widths(x_BD, of_task)) for task, x_BD, of_task in by_task(features_BD, segments)}
        if labels is None or global_counts is None:
            return {task: self[task](x_BD, widths=of_task) for task, (x_BD, of_task) in rows.items()}
        return torch.stack([
            self[task](x_BD, labels[task], global_counts[task], moment, (mixes or {}).get(task), of_task)
            for task, (x_BD, of_task) in rows.items()
        ])  # fmt: skip


def widths(features_BD: Tensor, segments: Sequence[Segment]) -> list[int]:
    """Columns of ``features_BD`` that each segment has."""
    return [features_BD.shape[1] if s.architecture is None else s.architecture.dim for s in segments]
