"""Whether a model computes what another one does: the same values, and the same rank lists.

The reference is the model in double precision, so that what differs is the rounding of one implementation and not that
of two. What rounding can do depends on the model (a batch norm that subtracts a large mean multiplies it), so it is
measured, by torch itself in fp32 on the same images. Another implementation takes other orders of sums and approximates
functions otherwise, which is taken to make its rounding :data:`SLACK` times that of torch at most.

**Values** agree where the largest difference is :data:`TOLERANCE` of the largest output at most, or what rounding can
do, where that is more.

**Rank lists**: each image is a query among all others, by the cosine of embeddings; of a classifier, the classes of
each image are ranked by their logits as well. A list is the same if no two of its entries have changed places but such
as are tied, whose scores in the reference lie no further apart than rounding can carry them. With r, the largest change
of any score between torch in fp32 and in double precision, each may be off by SLACK x r, and the difference of two by
2 x SLACK x r: that is the *tie*. For cosines it is mostly a fraction of what the tolerance of values lets pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ufo_ds.model.heads import Outputs

TOLERANCE = 1e-5  # of the largest output, in fp32
SLACK = 2.0  # times the rounding of torch in fp32
_UNIT = 2.0**-24  # rounding of one number in fp32, relative
_WORST = torch.finfo(torch.float32).max  # in place of NaN and infinity, which JSON has not


@dataclass(frozen=True)
class Agreement:
    """
    Attributes:
        max_difference: of any output, relative to the largest of its kind.
        max_absolute_difference: of any output.
        tolerance: of the first.
        rank_lists: their number.
        rank_inversion: the largest distance, in the reference, of two entries of a list that have changed places,
            relative to the tie: 1 and less is rounding, 0 that none has.
        tie: of cosines; see above.
    """

    max_difference: float
    max_absolute_difference: float
    tolerance: float
    rank_lists: int
    rank_inversion: float
    tie: float

    @property
    def passed(self) -> bool:
        return self.max_difference <= self.tolerance and self.rank_inversion <= 1

    @property
    def fault(self) -> str:
        """What does not agree, to follow "differs from ... by"."""
        if self.max_difference > self.tolerance:
            return f"{self.max_difference:.1e} of the largest output, more than {self.tolerance:.2g}"
        return f"another rank list: entries {self.rank_inversion:.1f} times further apart than rounding explains"


def compare(found: Outputs, of_image: Sequence[int], plain: Outputs, exact: Outputs) -> Agreement:
    """
    Args:
        found: of the model in question, M rows, some images more than once.
        of_image: of each row, which of N images it is of; each image has one.
        plain: of the reference in fp32, N rows.
        exact: of the reference in double precision.
    """
    of_image_M = torch.as_tensor(of_image)
    relative, absolute, roundings, inversions, ties, lists = [], [], [], [], [], 0
    first_N = torch.stack([(of_image_M == i).nonzero()[0, 0] for i in range(len(exact.embedding))])
    for kind, found_MX, plain_NX, exact_NX in zip(Outputs._fields, found, plain, exact, strict=True):
        if not exact_NX.shape[1] and not found_MX.shape[1]:
            continue
        found_MX, plain_NX, exact_NX = found_MX.double(), plain_NX.double(), exact_NX.double()
        difference = (found_MX - exact_NX[of_image_M]).abs().max()
        relative.append(difference / exact_NX.abs().max())
        absolute.append(difference)
        roundings.append((plain_NX - exact_NX).abs().max() / exact_NX.abs().max())
        if kind == "embedding":
            exact_NN = _cosines(exact_NX, exact_NX)
            rounding = (_cosines(plain_NX, plain_NX) - exact_NN).abs().max().clamp(min=2 * _UNIT)
            itself_MN = of_image_M[:, None] == torch.arange(len(exact_NX))
            scores_MX, wanted_MX = _cosines(found_MX, found_MX[first_N]), exact_NN[of_image_M]
            scores_MX, wanted_MX = (x.masked_fill(itself_MN, 2.0) for x in (scores_MX, wanted_MX))  # first in both
            ties.append(2 * SLACK * rounding)
        else:
            rounding = roundings[-1].clamp(min=_UNIT) * exact_NX.abs().max()
            scores_MX, wanted_MX = found_MX, exact_NX[of_image_M]
        inversions.append(largest_inversion(scores_MX, wanted_MX) / (2 * SLACK * rounding))
        lists += len(found_MX)
    # torch's maximum keeps a NaN, which then passes no comparison; a model without any number is no model.
    return Agreement(
        max_difference=_number(torch.stack(relative).max()),
        max_absolute_difference=_number(torch.stack(absolute).max()),
        tolerance=max(TOLERANCE, SLACK * float(max(roundings))),
        rank_lists=lists,
        rank_inversion=_number(torch.stack(inversions).max()),
        tie=_number(torch.stack(ties).max()),
    )


def largest_inversion(found_MN: Tensor, wanted_MN: Tensor) -> Tensor:
    """Of all pairs of a row's columns of which ``found`` ranks the one first that ``wanted`` ranks second, the largest
    distance in ``wanted``; where ``found`` has them equal, they count as ranked the wrong way. NaN if there is one."""
    if not bool(found_MN.isfinite().all()):
        return torch.tensor(torch.nan)
    by_wanted_MN = wanted_MN.argsort(dim=1, stable=True)  # the lowest first, which the next sort keeps among equals
    order_MN = found_MN.gather(1, by_wanted_MN).argsort(dim=1, descending=True, stable=True)
    listed_MN = wanted_MN.gather(1, by_wanted_MN.gather(1, order_MN))
    # In a list as wanted, no entry is above the lowest before it.
    return (listed_MN - listed_MN.cummin(dim=1).values).max()


def _cosines(some_MD: Tensor, others_ND: Tensor) -> Tensor:
    return F.normalize(some_MD, dim=1) @ F.normalize(others_ND, dim=1).T


def _number(value: Tensor) -> float:
    return float(torch.nan_to_num(value, nan=_WORST, posinf=_WORST))
