"""Shared and own copies of a unit, and the way of each task's rows through them."""

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ufo_ds.model.packing import Segment, concatenate, join, split

SHARED, OWN, LEARNED = "shared", "own", "learned"


class Choice(NamedTuple):
    """This step's decision of a learned route: ``own`` or not, on the host; ``weights_2`` (shared, own), one-hot and
    with a gradient to the router; ``scale``, by which a gradient from the probed samples stands for all of them."""

    own: bool
    weights_2: Tensor
    scale: float


class TaskExperts(nn.ModuleDict):
    """One unit per task. ``parallel.experts`` replaces it by the layer that holds only this rank's tasks."""

    def forward(self, x_ND: Tensor, segments: Sequence[Segment]) -> Tensor:
        """Each task's rows through its own unit, which sees one slice; a task's segments are neighbours."""
        if not segments:
            return next(iter(self.values()))(x_ND, [])  # no rows, of the right width
        return concatenate([self[task](x, of_task) for task, x, of_task in by_task(x_ND, segments)], like=x_ND)


def by_task(x_ND: Tensor, segments: Sequence[Segment]) -> list[tuple[str, Tensor, list[Segment]]]:
    """Each task, its rows and its segments, which are neighbours."""
    runs = [(task, list(run)) for task, run in groupby(segments, key=lambda segment: segment.task)]
    rows = x_ND.split([sum(segment.rows for segment in run) for _, run in runs]) if runs else []
    return [(task, x, run) for (task, run), x in zip(runs, rows, strict=True)]


class RoutedUnit(nn.Module):
    """A unit with one shared copy and, for each task, one of its own.

    Which copies are called at all depends on the routes of *all* tasks of the model (``routes``), not on those of the
    batch: ranks that hold different tasks then call the same modules in the same order, which ZeRO-3 demands.
    """

    def __init__(
        self,
        make: Callable[[str | None], nn.Module],
        tasks: Sequence[str],
        routes: Mapping[str, str],
        shared_samples: bool = False,
    ):
        """``make(None)`` builds the shared copy, ``make(task)`` a task's own; without ``tasks`` there are no own
        copies. ``routes`` is the route of every task of the model through this unit: shared, own or learned.
        ``shared_samples``: in training there are samples that take the shared path, whatever their task's route."""
        super().__init__()
        self.shared = make(None)
        self.own = TaskExperts({task: make(task) for task in tasks}) if tasks else None
        self.routes = dict(routes)
        self.shared_samples = shared_samples

    def drop_unused(self) -> None:
        """Let go of the copies that no route takes, which evaluation does without; routes must have been decided."""
        if self.own is not None:
            for task in [task for task in self.own if self.routes[task] != OWN]:
                del self.own[task]
            if not self.own:
                self.own = None
        if SHARED not in self.routes.values():
            del self.shared

    def forward(self, x_ND: Tensor, segments: Sequence[Segment], choices: Mapping[str, Choice] | None = None) -> Tensor:
        """``choices`` has every task of the segments whose route here is learned."""
        kinds = set(self.routes.values())
        if self.own is None or kinds == {SHARED}:
            return self.shared(x_ND, join(segments))
        if kinds == {OWN} and not (self.training and self.shared_samples) and not any(s.subnet for s in segments):
            return self.own(x_ND, join(segments))
        choices = choices or {}
        rows, goes_own = split(x_ND, segments), [self._goes_own(segment, choices) for segment in segments]
        # Each copy is called even where it has no rows: that keeps it in the graph, and ranks alike.
        outputs, idle = self._sorted(rows, segments, goes_own, range(len(segments)), x_ND)
        if self.training and LEARNED in kinds:
            probes = [i for i, s in enumerate(segments) if s.part == "probe" and self.routes[s.task] == LEARNED]
            with torch.no_grad():  # multiplied by a weight of zero, they would have no gradient anyhow
                others, _ = self._sorted(rows, segments, [not own for own in goes_own], probes, x_ND)
            for i in probes:
                chosen_ND, choice = outputs[i].detach(), choices[segments[i].task]
                own_minus_shared_ND = chosen_ND - others[i] if goes_own[i] else others[i] - chosen_ND
                outputs[i] = _RouteGradient.apply(outputs[i], own_minus_shared_ND, choice.weights_2, choice.scale)
        return concatenate([*outputs.values(), *idle], x_ND)

    def _called(self) -> list[tuple[nn.Module, bool]]:
        """The copies that routes of any task use, and whether they are the own ones."""
        assert self.own is not None
        only_own = set(self.routes.values()) == {OWN} and not (self.training and self.shared_samples)
        return [(self.own, True)] if only_own else [(self.shared, False), (self.own, True)]

    def _goes_own(self, segment: Segment, choices: Mapping[str, Choice]) -> bool:
        if segment.part == "shared":
            return False
        route = self.routes[segment.task]
        return choices[segment.task].own if route == LEARNED else route == OWN

    def _sorted(
        self,
        rows: Sequence[Tensor],
        segments: Sequence[Segment],
        goes_own: Sequence[bool],
        chosen: Sequence[int],
        like: Tensor,
    ) -> tuple[dict[int, Tensor], list[Tensor]]:
        """One call of each copy that the routes use over those of the ``chosen`` segments that go there: their outputs,
        by their place and in its order, and those of calls without rows."""
        outputs, idle = dict.fromkeys(chosen, like), []
        tasks = list(dict.fromkeys(segment.task for segment in segments))
        for unit, own in self._called():
            picked = [i for i in chosen if goes_own[i] == own]
            if own:  # of several subnets those of a task come together, in a stable order
                picked.sort(key=lambda i: tasks.index(segments[i].task))
            y_ND = unit(concatenate([rows[i] for i in picked], like), join(segments[i] for i in picked))
            if picked:
                outputs |= zip(picked, split(y_ND, [segments[i] for i in picked]), strict=True)
            else:
                idle.append(y_ND)
        return outputs, idle


class _RouteGradient(torch.autograd.Function):
    """The identity for ``y_ND``, with a gradient to the weights of ``w[0] * shared + w[1] * own``.

    The weights come from a softmax over the two, to which only the difference of their gradients matters; so the
    second alone gets that of ``own - shared``, times ``scale``.
    """

    @staticmethod
    def forward(ctx: Any, y_ND: Tensor, own_minus_shared_ND: Tensor, weights_2: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(own_minus_shared_ND)
        ctx.scale = scale
        return y_ND.view_as(y_ND)

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None, Tensor, None]:
        (own_minus_shared_ND,) = ctx.saved_tensors
        grad_own = ctx.scale * (grad_ND.float() * own_minus_shared_ND.float()).sum()
        return grad_ND, None, torch.stack([torch.zeros_like(grad_own), grad_own]), None
