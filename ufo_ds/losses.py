"""Losses as plain functions: one value per sample, so that a caller can sum over ranks and divide by a global count.

Axes: B samples, C classes, D width, M samples of all ranks. The margin losses are softmax cross-entropy over logits in
which the right class has a margin. Where the classes are spread over processes, C are those that are here, and the
label of a sample whose class is elsewhere is -1.
"""

import math
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

# --- softmax ----------------------------------------------------------------------------------------------------------


class Spread(Protocol):
    """The processes that hold a part of the classes each, and the same samples."""

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over processes; gradients are summed too."""

    def all_max(self, x: Tensor) -> Tensor:
        """The maximum over processes, without a gradient."""


def cross_entropy(
    logits_BC: Tensor, labels_B: Tensor, label_smoothing: float = 0.0, spread: Spread | None = None
) -> Tensor:
    """Cross-entropy with label smoothing (Szegedy et al., 2016).

    Where classes are ``spread``, the sum of exponentials and the right class's logit are summed over processes, as in
    Megatron-LM's vocabulary-parallel cross-entropy (Shoeybi et al., 2019), and every process gets all losses.

    Returns ``[B]``.
    """
    logits_BC = _precise(logits_BC)
    if spread is None:
        return F.cross_entropy(logits_BC, labels_B, reduction="none", label_smoothing=label_smoothing)
    right_B = spread.all_reduce(_of_labels(logits_BC, labels_B))
    loss_B = _LogSumExp.apply(logits_BC, spread) - (1 - label_smoothing) * right_B
    if label_smoothing:
        classes = spread.all_reduce(logits_BC.new_full((), float(logits_BC.shape[1])))
        loss_B = loss_B - label_smoothing / classes * spread.all_reduce(logits_BC.sum(1))
    return loss_B


def binary_cross_entropy(logits_BC: Tensor, labels_B: Tensor) -> Tensor:
    """Of each attribute whether a sample has it, averaged over attributes.

    Args:
        labels_B: int64, bit i of which says that the sample has attribute i; C is at most 63.

    Returns ``[B]``.
    """
    logits_BC = _precise(logits_BC)
    targets_BC = labels_B[:, None] >> torch.arange(logits_BC.shape[1], device=labels_B.device) & 1
    return F.binary_cross_entropy_with_logits(logits_BC, targets_BC.to(logits_BC.dtype), reduction="none").mean(1)


def divergence(logits_BC: Tensor, teacher_BC: Tensor, spread: Spread | None = None) -> Tensor:
    """Kullback-Leibler divergence of the softmax of a teacher's logits from that of a student's (Hinton et al., 2015);
    no gradient goes to the teacher.

    Returns ``[B]``.
    """
    logits_BC, teacher_BC = _precise(logits_BC), _precise(teacher_BC.detach())
    if spread is None:
        return F.kl_div(logits_BC.log_softmax(1), teacher_BC.log_softmax(1), reduction="none", log_target=True).sum(1)
    teacher_B = _LogSumExp.apply(teacher_BC, spread)
    expected_B = spread.all_reduce(((teacher_BC - teacher_B[:, None]).exp() * (teacher_BC - logits_BC)).sum(1))
    return expected_B - teacher_B + _LogSumExp.apply(logits_BC, spread)


def binary_divergence(logits_BC: Tensor, teacher_BC: Tensor) -> Tensor:
    """The same of each attribute by itself, averaged over attributes. Returns ``[B]``."""
    logits_BC, teacher_BC = _precise(logits_BC), _precise(teacher_BC.detach())
    targets_BC = teacher_BC.sigmoid()
    cross_BC = F.binary_cross_entropy_with_logits(logits_BC, targets_BC, reduction="none")
    return (cross_BC - F.binary_cross_entropy_with_logits(teacher_BC, targets_BC, reduction="none")).mean(1)


class _LogSumExp(torch.autograd.Function):
    """Over spread columns. All it keeps for the gradient is the softmax of the columns that are here."""

    @staticmethod
    def forward(ctx: Any, logits_BC: Tensor, spread: Spread) -> Tensor:
        lowest = torch.finfo(logits_BC.dtype).min
        here_B = logits_BC.amax(1) if logits_BC.shape[1] else logits_BC.new_full((len(logits_BC),), lowest)
        largest_B = spread.all_max(here_B)
        softmax_BC = (logits_BC - largest_B[:, None]).exp_()
        total_B = spread.all_reduce(softmax_BC.sum(1))
        ctx.save_for_backward(softmax_BC.div_(total_B[:, None]))
        ctx.spread = spread
        return largest_B + total_B.log()

    @staticmethod
    def backward(ctx: Any, grad_B: Tensor) -> tuple[Tensor, None]:
        (softmax_BC,) = ctx.saved_tensors
        return softmax_BC * ctx.spread.all_reduce(grad_B)[:, None], None


# --- margins: cosines -> logits ---------------------------------------------------------------------------------------


def cosface_logits(cosines_BC: Tensor, labels_B: Tensor, scale: float, margin: float) -> Tensor:
    """``scale * (cos - margin)`` for the right class, ``scale * cos`` for the others: CosFace (H. Wang et al., 2018,
    eq. 4), and the same formula as AM-softmax (F. Wang et al., 2018, eq. 6)."""
    cosines_BC = _precise(cosines_BC)
    if cosines_BC.shape[1]:
        margin_B = -margin * (labels_B >= 0).to(cosines_BC.dtype)
        cosines_BC = cosines_BC.scatter_add(1, labels_B.clamp(min=0)[:, None], margin_B[:, None])
    return scale * cosines_BC


def arcface_logits(cosines_BC: Tensor, labels_B: Tensor, scale: float, margin: float) -> Tensor:
    """``scale * cos(angle + margin)`` for the right class, ``scale * cos`` for the others (ArcFace: Deng et al., 2019,
    eq. 3).

    Beyond ``pi - margin``, where the cosine would rise again, ``cos - margin * sin(margin)`` takes its place, as in the
    authors' code: the logit keeps falling with the angle. At angle 0 the derivative by the cosine is infinite; there
    the sine counts as a constant.
    """
    cosines_BC = _precise(cosines_BC)
    cos_B = _of_labels(cosines_BC, labels_B)
    sin_B = (1 - cos_B.square()).clamp(min=1e-12).sqrt()
    shifted_B = cos_B * math.cos(margin) - sin_B * math.sin(margin)
    beyond_B = cos_B <= math.cos(math.pi - margin)
    right_B = torch.where(beyond_B, cos_B - margin * math.sin(margin), shifted_B)
    return scale * _with_labels(cosines_BC, labels_B, right_B)


def circle_logits(cosines_BC: Tensor, labels_B: Tensor, scale: float, margin: float) -> Tensor:
    """Circle loss with class-level labels (Sun et al., 2020, eqs. 5 to 8): with p the cosine to the right class, n to
    another, ``scale * [1 + margin - p]+ * (p - (1 - margin))`` and ``scale * [n + margin]+ * (n - margin)``. The
    bracketed weights count as constants for the gradient."""
    cosines_BC = _precise(cosines_BC)
    right_B = _of_labels(cosines_BC, labels_B)
    right_B = F.relu(1 + margin - right_B.detach()) * (right_B - (1 - margin))
    others_BC = F.relu(cosines_BC.detach() + margin) * (cosines_BC - margin)
    return scale * _with_labels(others_BC, labels_B, right_B)


def cosface(cosines_BC: Tensor, labels_B: Tensor, scale: float, margin: float) -> Tensor:
    """Cross-entropy of :func:`cosface_logits`. Returns ``[B]``."""
    return cross_entropy(cosface_logits(cosines_BC, labels_B, scale, margin), labels_B)


def arcface(cosines_BC: Tensor, labels_B: Tensor, scale: float, margin: float) -> Tensor:
    """Cross-entropy of :func:`arcface_logits`. Returns ``[B]``."""
    return cross_entropy(arcface_logits(cosines_BC, labels_B, scale, margin), labels_B)


def circle(cosines_BC: Tensor, labels_B: Tensor, scale: float, margin: float) -> Tensor:
    """Cross-entropy of :func:`circle_logits`, which is Sun et al.'s eq. 6 with one positive. Returns ``[B]``."""
    return cross_entropy(circle_logits(cosines_BC, labels_B, scale, margin), labels_B)


def _precise(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _of_labels(x_BC: Tensor, labels_B: Tensor) -> Tensor:
    """The value of each sample's class ``[B]``; 0 where that is elsewhere."""
    if not x_BC.shape[1]:
        return x_BC.sum(1)
    return _pick(x_BC, labels_B).masked_fill(labels_B < 0, 0.0)


def _pick(x_BC: Tensor, labels_B: Tensor) -> Tensor:
    # By indices, not by gather, which keeps the whole matrix for its gradient.
    return x_BC[torch.arange(len(x_BC), device=x_BC.device), labels_B.clamp(min=0)]


def _with_labels(x_BC: Tensor, labels_B: Tensor, right_B: Tensor) -> Tensor:
    """``x_BC`` with other values for the samples' classes, where those are here."""
    if not x_BC.shape[1]:
        return x_BC + right_B[:, None]  # no elements, but one graph on all processes
    values_B = torch.where(labels_B < 0, _pick(x_BC, labels_B), right_B)
    return x_BC.scatter(1, labels_B.clamp(min=0)[:, None], values_B[:, None])


# --- between samples --------------------------------------------------------------------------------------------------


def batch_hard_triplet(
    anchors_BD: Tensor,
    anchor_labels_B: Tensor,
    features_MD: Tensor,
    labels_M: Tensor,
    margin: float | Literal["soft"],
) -> Tensor:
    """Farthest positive against nearest negative of each anchor, Euclidean (Hermans et al., 2017, eqs. 5 and 7).

    ``features_MD`` holds the whole batch, the anchors among them: an anchor whose only positive is itself has a
    positive distance of zero. ``margin="soft"`` is the softplus form. An anchor without any negative counts zero.

    Returns ``[B]``.
    """
    if not len(features_MD):
        return anchors_BD.sum(1) + features_MD.sum()  # no samples anywhere; stays in the graph
    # The matrix-product form of cdist loses the small distances that the hardest pairs are about.
    distance_BM = torch.cdist(_precise(anchors_BD), _precise(features_MD), compute_mode="donot_use_mm_for_euclid_dist")
    same_BM = anchor_labels_B[:, None] == labels_M[None, :]
    positive_B = distance_BM.masked_fill(~same_BM, -torch.inf).amax(1)
    negative_B = distance_BM.masked_fill(same_BM, torch.inf).amin(1)
    gap_B = positive_B - negative_B
    loss_B = F.softplus(gap_B) if margin == "soft" else F.relu(gap_B + margin)
    return torch.where(torch.isfinite(gap_B), loss_B, torch.zeros_like(loss_B))
