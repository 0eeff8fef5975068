"""Shared and own copies of a unit, and the way of each task's rows through them."""

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn

from ufo_ds.model.packing import Segment, concatenate, split

SHARED, OWN, LEARNED = "shared", "own", "learned"


class TaskExperts(nn.ModuleDict):
    """One unit per task. ``parallel.experts`` replaces it by the layer that holds only this rank's tasks."""

    def forward(self, x_ND: Tensor, segments: Sequence[Segment]) -> Tensor:
        """Each segment through its own task's unit; a task's unit sees one slice."""
        if not segments:
            return next(iter(self.values()))(x_ND, [])  # no rows, of the right width
        rows = split(x_ND, segments)
        return concatenate(
            [self[segment.task](x, [segment]) for x, segment in zip(rows, segments, strict=True)], like=x_ND
        )


class RoutedUnit(nn.Module):
    """A unit with one shared copy and, for each task, one of its own.

    Which copies are called at all depends on the routes of *all* tasks of the model (``routes``), not on those of the
    batch: ranks that hold different tasks then call the same modules in the same order, which ZeRO-3 demands.
    """

    def __init__(self, make: Callable[[str | None], nn.Module], tasks: Sequence[str], routes: Mapping[str, str]):
        """``make(None)`` builds the shared copy, ``make(task)`` a task's own; without ``tasks`` there are no own
        copies. ``routes`` is the route of every task of the model through this unit: shared, own or learned."""
        super().__init__()
        self.shared = make(None)
        self.own = TaskExperts({task: make(task) for task in tasks}) if tasks else None
        self.routes = dict(routes)

    def forward(
        self, x_ND: Tensor, segments: Sequence[Segment], weights_T2: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """``weights_T2[task]`` is the router's ``[2]`` (shared, own) of each task with a learned route here."""
        kinds = set(self.routes.values())
        if kinds == {SHARED}:
            return self.shared(x_ND, segments)
        assert self.own is not None
        if kinds == {OWN}:
            return self.own(x_ND, segments)
        shared, idle_shared = self._through(self.shared, OWN, x_ND, segments)
        own, idle_own = self._through(self.own, SHARED, x_ND, segments)
        merged: list[Tensor] = []
        for segment in segments:
            task = segment.task
            if task in shared and task in own:
                assert weights_T2 is not None
                weight_2 = weights_T2[task].to(own[task].dtype)
                merged.append(weight_2[0] * shared[task] + weight_2[1] * own[task])
            else:
                merged.append(own[task] if task in own else shared[task])
        return concatenate(merged + idle_shared + idle_own, x_ND)

    def _through(
        self, unit: nn.Module, other: str, x_ND: Tensor, segments: Sequence[Segment]
    ) -> tuple[dict[str, Tensor], list[Tensor]]:
        """One call over the segments that are not routed to the ``other`` copy alone: their rows by task. Where there
        are none, the output of no rows comes apart; joined to the others it keeps the unit in the graph."""
        picked = [segment for segment in segments if self.routes[segment.task] != other]
        if len(picked) == len(segments):
            y_ND = unit(x_ND, picked)
        else:
            rows = zip(split(x_ND, segments), segments, strict=True)
            y_ND = unit(concatenate([x for x, segment in rows if segment in picked], x_ND), picked)
        if not picked:
            return {}, [y_ND]
        return dict(zip([segment.task for segment in picked], split(y_ND, picked), strict=True)), []
