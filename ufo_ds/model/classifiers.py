"""The matrix of a head: one row a class, of which a process may hold a part. It may have more rows than that, padding.

Axes: B samples of this process, M of all that hold the task, C classes whose rows are here, D width.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ufo_ds.model.elastic import narrow


class HolderGroup:
    """The processes that hold the samples of a task: here this one alone.

    ``parallel.collectives`` has the one for several ranks. Gradients go through all but ``all_max`` and ``counts``.
    """

    size = 1
    part = 0  # of this process among them

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over the processes."""
        return x

    def all_max(self, x: Tensor) -> Tensor:
        """Maximum over the processes, without a gradient."""
        return x

    def counts(self, total: int) -> list[int]:
        """How many of the ``total`` samples of a training batch each process has."""
        return [total]

    def gathered_counts(self, x: Tensor) -> list[int]:
        """Of how many rows ``x`` is on each process."""
        return [len(x)]

    def all_gather(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        """The rows of all processes, in the order of the processes."""
        return x

    def return_rows(self, x_M: Tensor, counts: Sequence[int]) -> Tensor:
        """The inverse for results: each process gets what the others have for its rows, ``[size, B, ...]``."""
        return x_M[None]


class Part(NamedTuple):
    """``rows`` of a tensor of this ``shape``, which are the first that the parameter has; behind them is padding.

    Padding is zero and stays so: nothing is computed with it, so that its gradient is zero, and no checkpoint has it.
    """

    shape: torch.Size
    rows: range


class Padded(nn.Module):
    """A module whose parameters may be longer than what they hold, so that ranks have parameters of the same sizes."""

    def held(self) -> dict[str, Part]:
        """What each parameter holds."""
        raise NotImplementedError


class Classifier(Padded):
    """Weight ``[C, D]``; :meth:`keep` leaves a part of it here. A bias is small and whole everywhere."""

    def __init__(self, dim: int, num_classes: int):
        super().__init__()
        self.num_classes, self.dim = num_classes, dim
        self.weight = nn.Parameter(torch.empty(num_classes, dim))
        self.rows = range(num_classes)
        self.group = HolderGroup()  # of those that hold the other rows

    @property
    def is_spread(self) -> bool:
        """Whether other processes hold other rows."""
        return self.group.size > 1

    @property
    def rows_each(self) -> int:
        """Rows on every process, the last ones padding."""
        return -(-self.num_classes // self.group.size)

    def held(self) -> dict[str, Part]:
        return {"weight": Part(torch.Size([self.num_classes, self.dim]), self.rows)}

    def keep(self, group: HolderGroup) -> None:
        """Keep this process's share of the rows."""
        self.group = group
        each = self.rows_each
        self.rows = range(self.num_classes)[each * group.part : each * (group.part + 1)]
        self.pad(each)

    def pad(self, rows: int) -> None:
        """Make room for as many rows."""
        self.weight = nn.Parameter(self.weight.new_empty(rows, self.dim))

    def logits(self, x_BD: Tensor, chosen: Tensor | None = None) -> Tensor:
        """Logits ``[B, C]`` of the classes that are here, or of the ``chosen`` ones (positions among ``rows``). Of a
        narrower feature the leading columns of the weight count."""
        raise NotImplementedError

    def _here(self, tensor: Tensor, chosen: Tensor | None) -> Tensor:
        tensor = tensor[: len(self.rows)]
        return tensor if chosen is None else tensor.index_select(0, chosen)

    def forward(self, x_BD: Tensor) -> Tensor:
        """Logits ``[B, num_classes]`` of all classes, wherever their rows are; not for training."""
        if not self.is_spread:
            return self.logits(x_BD)
        counts = self.group.gathered_counts(x_BD)
        logits_MC = self.logits(self.group.all_gather(x_BD, counts))
        padded_MC = F.pad(logits_MC, (0, self.rows_each - logits_MC.shape[1]))
        by_part = self.group.return_rows(padded_MC, counts)
        return by_part.transpose(0, 1).flatten(1)[:, : self.num_classes]


class CosineClassifier(Classifier):
    """Cosine between a feature and each class's weight."""

    def logits(self, x_BD: Tensor, chosen: Tensor | None = None) -> Tensor:
        weight_CD = narrow(self._here(self.weight, chosen), x_BD.shape[1]).float()
        return _precise_linear(F.normalize(x_BD.float()), F.normalize(weight_CD))


class LinearClassifier(Classifier):
    def __init__(self, dim: int, num_classes: int):
        super().__init__(dim, num_classes)
        self.bias = nn.Parameter(torch.empty(num_classes))

    def held(self) -> dict[str, Part]:
        return {**super().held(), "bias": Part(torch.Size([self.num_classes]), range(self.num_classes))}

    def logits(self, x_BD: Tensor, chosen: Tensor | None = None) -> Tensor:
        bias_C = self._here(self.bias[self.rows.start :], chosen).float()
        weight_CD = narrow(self._here(self.weight, chosen), x_BD.shape[1]).float()
        return _precise_linear(x_BD.float(), weight_CD, bias_C)


def _precise_linear(x_BD: Tensor, weight_CD: Tensor, bias_C: Tensor | None = None) -> Tensor:
    """In fp32 under autocast too: in bf16 cosines would be wrong by up to 1/256, and logits of scale 64 by 1/4."""
    with torch.autocast(x_BD.device.type, enabled=False):
        return F.linear(x_BD, weight_CD, bias_C)


def parts(model: nn.Module) -> dict[str, Part]:
    """The parameters of a model that are not whole here, or padded, by name."""
    return {
        f"{prefix}.{name}": part
        for prefix, module in model.named_modules()
        if isinstance(module, Padded)
        for name, part in module.held().items()
        if module.get_parameter(name).shape != part.shape
    }


def spread(model: nn.Module) -> set[str]:
    """The parameters of a model of which other processes hold other rows, by name."""
    return {
        f"{prefix}.weight"
        for prefix, module in model.named_modules()
        if isinstance(module, Classifier) and module.is_spread
    }
