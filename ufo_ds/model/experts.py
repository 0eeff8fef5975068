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

    def forward(self, x_ND: Tensor, segments: Sequence[Segment], weights_T2: Mapping[str, Tensor] | None = None):
        """``weights_T2[task]`` is the router's ``[2]`` (shared, own) of each task with a learned route here."""
        rows = split(x_ND, segments)

        def through(unit: nn.Module, other: str) -> list[Tensor | None]:
            """One call over the segments that are not routed to the ``other`` copy alone."""
            chosen = [self.routes[segment.task] != other for segment in segments]
            picked = [segment for segment, yes in zip(segments, chosen, strict=True) if yes]
            if all(chosen):
                y_ND = unit(x_ND, picked)
            else:
                y_ND = unit(concatenate([x for x, yes in zip(rows, chosen, strict=True) if yes], x_ND), picked)
            pieces = iter(split(y_ND, picked)) if picked else iter(())
            found = [next(pieces) if yes else None for yes in chosen]
            if not picked:
                spare.append(y_ND)
            return found

        spare: list[Tensor] = []  # outputs of no rows, kept in the graph
        nothing: list[Tensor | None] = [None] * len(segments)
        shared = through(self.shared, OWN) if set(self.routes.values()) != {OWN} else nothing
        own = through(self.own, SHARED) if self.own is not None and set(self.routes.values()) != {SHARED} else nothing
        merged: list[Tensor] = []
        for segment, shared_y, own_y in zip(segments, shared, own, strict=True):
            if shared_y is not None and own_y is not None:
                assert weights_T2 is not None
                weight_2 = weights_T2[segment.task].to(own_y.dtype)
                merged.append(weight_2[0] * shared_y + weight_2[1] * own_y)
            else:
                y = own_y if shared_y is None else shared_y
                assert y is not None
                merged.append(y)
        return concatenate(merged + spare, x_ND)
