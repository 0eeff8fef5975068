"""Losses as plain functions: one value per sample, so that a caller can sum over ranks and divide by a global count."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_entropy(logits_BC: Tensor, labels_B: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy with label smoothing (Szegedy et al., 2016). Returns ``[B]``."""
    return F.cross_entropy(logits_BC.float(), labels_B, reduction="none", label_smoothing=label_smoothing)


def cosface(cosines_BC: Tensor, labels_B: Tensor, scale: float, margin: float) -> Tensor:
    """CosFace, or AM-softmax: the margin is taken off the cosine of the right class (Wang et al., 2018, eq. 4).

    Returns ``[B]``.
    """
    cosines_BC = cosines_BC.float()
    margin_B1 = cosines_BC.new_full((len(labels_B), 1), -margin)
    return F.cross_entropy(scale * cosines_BC.scatter_add(1, labels_B[:, None], margin_B1), labels_B, reduction="none")


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
    distance_BM = torch.cdist(anchors_BD.float(), features_MD.float(), compute_mode="donot_use_mm_for_euclid_dist")
    same_BM = anchor_labels_B[:, None] == labels_M[None, :]
    positive_B = distance_BM.masked_fill(~same_BM, -torch.inf).amax(1)
    negative_B = distance_BM.masked_fill(same_BM, torch.inf).amin(1)
    gap_B = positive_B - negative_B
    loss_B = F.softplus(gap_B) if margin == "soft" else F.relu(gap_B + margin)
    return torch.where(torch.isfinite(gap_B), loss_B, torch.zeros_like(loss_B))
