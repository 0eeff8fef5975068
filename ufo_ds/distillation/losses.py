"""What a student is taught by, as plain functions of its outputs and its teacher's: one value per sample.

Axes: B samples, C classes, D width. No gradient goes to the teacher.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def symmetric_divergence(logits_BC: Tensor, teacher_BC: Tensor, temperature: float) -> Tensor:
    """Mean of the Kullback-Leibler divergences in both directions (Jeffreys, 1946, halved) between the softmax of both
    logits / T, times T^2, which keeps its gradient as large at any T (Hinton et al., 2015, section 2).

    Returns ``[B]``.
    """
    student_BC = (logits_BC.float() / temperature).log_softmax(1)
    teacher_BC = (teacher_BC.detach().float() / temperature).log_softmax(1)
    # sum p (log p - log q) + sum q (log q - log p) = sum (p - q) (log p - log q)
    both_B = ((teacher_BC.exp() - student_BC.exp()) * (teacher_BC - student_BC)).sum(1)
    return temperature**2 * both_B / 2


def binary_symmetric_divergence(logits_BC: Tensor, teacher_BC: Tensor, temperature: float) -> Tensor:
    """The same of each attribute by itself, the mean over attributes. Returns ``[B]``."""
    student_BC, teacher_BC = logits_BC.float() / temperature, teacher_BC.detach().float() / temperature
    # of a sigmoid p of logit x, log p - log(1 - p) = x
    both_BC = (teacher_BC.sigmoid() - student_BC.sigmoid()) * (teacher_BC - student_BC)
    return temperature**2 * both_BC.mean(1) / 2


def cosine(features_BD: Tensor, teacher_BD: Tensor) -> Tensor:
    """1 - the cosine of both features. Returns ``[B]``."""
    return 1 - F.cosine_similarity(features_BD.float(), teacher_BD.detach().float())


def mean_squared_error(features_BD: Tensor, teacher_BD: Tensor) -> Tensor:
    """Of the features as they are (FitNets: Romero et al., 2015, eq. 3), the mean over channels. Returns ``[B]``."""
    return (features_BD.float() - teacher_BD.detach().float()).square().mean(1)


def relational_distance(features_BD: Tensor, teacher_BD: Tensor) -> Tensor:
    """Distances between samples, as shares of their mean, are to be those of the teacher: RKD-D (Park et al., 2019,
    eqs. 5 and 6, with the Huber loss of eq. 4), between features of length 1, as they are compared.

    Returns ``[B]``: of each sample the mean over its pairs; 0 of a sample alone.
    """
    if len(features_BD) < 2:
        return 0 * features_BD.float().sum(1)
    student_BB, teacher_BB = _relative_distances(features_BD), _relative_distances(teacher_BD.detach())
    return F.huber_loss(student_BB, teacher_BB, reduction="none").sum(1) / (len(features_BD) - 1)


def _relative_distances(features_BD: Tensor) -> Tensor:
    unit_BD = F.normalize(features_BD.float())
    squared_BB = (2 - 2 * unit_BD @ unit_BD.T).clamp(min=0)
    apart_BB = ~torch.eye(len(unit_BD), dtype=torch.bool, device=unit_BD.device)
    # The root has no derivative at 0, where samples are alike.
    distance_BB = torch.where(apart_BB, squared_BB, 1.0).clamp(min=1e-8).sqrt() * apart_BB
    mean = distance_BB.sum() / apart_BB.sum()
    return distance_BB / mean
