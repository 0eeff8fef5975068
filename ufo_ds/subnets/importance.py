"""How important each head and channel is: how much what it contributes differs from image to image and token to token.

Minitron (Muralidharan et al., 2024) and Nemotron rank by the mean magnitude of activations. A part of that is the same
for all inputs; it is a bias, which whatever is trained after the cut has anyway, and says nothing of an image. So here
the **variance** counts, over the images and tokens of a task, of

==========  ============================================================================================================
hidden      what a hidden channel of an FFN adds to the residual stream: var(activation) x |column of fc2|^2
heads       what a head adds to it, through its columns of the output projection: E |y - E y|^2
dim         a channel of what units read of the residual stream: the outputs of all norms, summed over them
stem        a channel of the outputs of a stem's layers, summed over those that share it
==========  ============================================================================================================

and, where several tasks use a copy, the sum over their images.

What the order is worth, on two supernets of ``open_small`` (six tasks, no subnets trained; one with everything shared,
one with learned routes and stems of the tasks' own): the leading part of one kind is kept, and nothing trained after.
Figures are 1 - correlation of the cosine similarities between test images before and after, mean of all tasks. Taylor
is |activation x gradient of the loss| (Molchanov et al., 2019), random the mean of three:

==============  ==========  =========  =========  ======  ========
kept            as trained  random     magnitude  Taylor  variance
==============  ==========  =========  =========  ======  ========
half of hidden  .0022       .0023      .0001      .0001   < .0001
half of heads   .081        .079       .092       .073    .061
half of dim     .142        .140       .174       .171    .122
3/4 of stem     .346        .303       .268       .247    .216
half of stem    .525        .494       .426       .399    .414
==============  ==========  =========  =========  ======  ========

On the ``demo`` (class token, no stem) variance is ahead of magnitude for half of hidden (.055 against .086; as trained
.118) and half of dim (.694, .770; .742), and level with it for half of heads (.409, .398; .549).
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ufo_ds.model.layers import FFN, Attention, Norm, StemLayer
from ufo_ds.model.supernet import Supernet
from ufo_ds.subnets.ordering import DIM, stem_group


class _Moments:
    """Of the members of one place: sums over rows, in fp64. Axes: N rows, G members, C channels of a member."""

    def __init__(self) -> None:
        self.rows = 0
        self.sum_GC: Any = 0
        self.products_GCC: Any = 0

    def add(self, x_NGC: Tensor) -> None:
        x_GCN = x_NGC.double().permute(1, 2, 0)
        self.rows += len(x_NGC)
        self.sum_GC = self.sum_GC + x_GCN.sum(2)
        self.products_GCC = self.products_GCC + x_GCN @ x_GCN.mT

    def variance(self, weight_DGC: Tensor | None) -> Tensor:
        """``[G]``: of each member's contribution, its channels times its columns of the weight (default: itself),
        summed over the D outputs."""
        mean_GC = self.sum_GC / self.rows
        covariance_GCC = self.products_GCC / self.rows - mean_GC[:, :, None] * mean_GC[:, None]
        if weight_DGC is not None:
            weight_GDC = weight_DGC.double().transpose(0, 1)
            covariance_GCC = covariance_GCC * (weight_GDC.mT @ weight_GDC)
        return covariance_GCC.sum((1, 2)).clamp(min=0)


def measure(model: Supernet, batches: Iterable[Tensor]) -> tuple[int, dict[str, Tensor]]:
    """Importance of the members of every group on the whole path of a task.

    Args:
        model: with this task alone, in evaluation mode.
        batches: uint8 images ``[B, 3, H, W]`` of the task.

    Returns:
        Number of images; and by group (see :mod:`ufo_ds.subnets.ordering`) fp64 ``[members]`` on the host, variances
        times that number. A copy that the path does not go through has none.
    """
    [task] = model.tasks
    places: list[tuple[str, _Moments, Tensor | None]] = []
    hooks = []

    def watch(group: str, members: Callable[[Tensor], Tensor], weight_DGC: Tensor | None = None) -> Callable[..., None]:
        moments = _Moments()
        places.append((group, moments, weight_DGC))

        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor | None = None) -> None:
            moments.add(members(inputs[0] if output is None else output))

        return hook

    for name, module in model.named_modules():
        if isinstance(module, FFN):
            hook = watch(name, _columns, module.fc2.weight[:, :, None])
            hooks.append(module.fc2.register_forward_pre_hook(hook))
        elif isinstance(module, Attention):
            by_head = partial(torch.Tensor.unflatten, dim=1, sizes=(module.heads, module.head_width))
            hook = watch(name, by_head, by_head(module.proj.weight))
            hooks.append(module.proj.register_forward_pre_hook(hook))
        elif isinstance(module, Norm):
            hooks.append(module.register_forward_hook(watch(DIM, _columns)))
        elif isinstance(module, StemLayer):
            copy, layer = name.split(".stem.")
            group = stem_group(copy, int(layer), model.recipe.model.backbone)
            hooks.append(module.register_forward_hook(watch(group, _pixels)))
    count = 0
    with torch.no_grad():
        for images in batches:
            model.backbone({task: images})
            count += len(images)
        for handle in hooks:
            handle.remove()
        scores: dict[str, Tensor] = {}
        for group, moments, weight_DGC in places:
            if moments.rows:  # else it is not on the path
                scores[group] = scores.get(group, 0) + count * moments.variance(weight_DGC).cpu()
    return count, scores


def _columns(x_NG: Tensor) -> Tensor:
    return x_NG[:, :, None]


def _pixels(x_BGHW: Tensor) -> Tensor:
    return x_BGHW.movedim(1, -1).flatten(0, 2)[:, :, None]


def kept(scores_G: Tensor, share: float) -> float:
    """The part of all importance that the leading members have; ``share`` of them, rounded."""
    total = scores_G.sum()
    return float(scores_G[: round(share * len(scores_G))].sum() / total) if total > 0 else share
