"""Learned routes: for every task, unit and layer a choice between the shared and the task's own copy.

Two logits per choice, initially equal and independent of the input; hard in the forward pass and soft in the backward
pass (straight-through Gumbel-softmax; Jang et al., 2017). The noise belongs to (seed, step, task, unit, layer), so a
step's path is one dense network, the same on every rank and in recomputation.

The weight of the copy not chosen is zero: it is needed for the router's gradient alone, is computed forward only, and
for a block of the task's samples at that (the *probe*; a share of ``Router.probe``, another block at every step), whose
gradient, times the number of blocks, is an unbiased estimate of that of all.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ufo_ds.model.experts import Choice
from ufo_ds.seeding import torch_generator

Place = tuple[str, int]  # unit and layer
Choices = dict[Place, dict[str, Choice]]  # by unit and layer, the choice of every task that learns its route there


class Router(nn.Module):
    """Holds one ``[R, 2]`` parameter per task that has R learned routes.

    Attributes:
        likelier_own: by task, whether the own copy is the more probable one, of every place; as of the last forward.
        changed_at: the last step at which one of these was another than at the step before.
    """

    def __init__(
        self, places: Mapping[str, list[Place]], temperature: float, final_temperature: float, steps: int,
        probe: float, seed: int,
    ):  # fmt: skip
        """``places``: of every task, those where its route is learned, unit by unit. The temperature falls (or rises)
        exponentially to ``final_temperature`` within ``steps``."""
        super().__init__()
        self.places = {task: list(items) for task, items in places.items() if items}
        self.logits = nn.ParameterDict({task: nn.Parameter(torch.empty(len(p), 2)) for task, p in self.places.items()})
        self.temperature, self.final_temperature, self.steps = temperature, final_temperature, steps
        self.blocks = round(1 / probe)
        self.seed = seed
        self.likelier_own: dict[str, list[bool]] = {}
        self.changed_at = 0

    def forward(self, step: int | None) -> Tensor:
        """``[sum of R, 3]``: the one-hot weights (shared, own) of all tasks' choices, and whether the logits, without
        noise, favour the own copy.

        Args:
            step: draws the noise of this step; None takes the more probable branch, without noise.
        """
        logits_R2 = torch.cat([self.logits[task] for task in self.places]).float()
        favours_own_R1 = (logits_R2[:, 1:] > logits_R2[:, :1]).float()
        if step is not None:
            logits_R2 = (logits_R2 + self._noise(step).to(logits_R2.device, non_blocking=True)) / self.temperature_at(
                step
            )
        soft_R2 = logits_R2.softmax(-1)
        hard_R2 = torch.zeros_like(soft_R2).scatter_(1, soft_R2.argmax(-1, keepdim=True), 1.0)
        weights_R2 = hard_R2 if step is None else hard_R2 + soft_R2 - soft_R2.detach()
        return torch.cat([weights_R2, favours_own_R1], dim=1)

    def temperature_at(self, step: int) -> float:
        progress = min(step / self.steps, 1.0)
        return self.temperature * (self.final_temperature / self.temperature) ** progress

    def choices(self, decided_R3: Tensor, step: int | None) -> Choices:
        """Sort the rows of :meth:`forward` by unit and layer, and note what changed since the step before.

        The only place where the host waits for the device: which copies are called is decided here.
        """
        choices: Choices = {}
        decided = decided_R3.detach().round().bool().tolist()
        rows = iter(zip(decided_R3[:, :2].unbind(0), decided, strict=True))
        likelier_own: dict[str, list[bool]] = {}
        for task, places in self.places.items():
            likelier_own[task] = []
            for place in places:
                weights_2, (_, own, favours_own) = next(rows)
                choices.setdefault(place, {})[task] = Choice(own, weights_2, float(self.blocks))
                likelier_own[task].append(favours_own)
        if step is not None:
            if self.likelier_own and likelier_own != self.likelier_own:
                self.changed_at = step
            self.likelier_own = likelier_own
        return choices

    def memory(self) -> dict[str, Any]:
        """What is to be kept beside the logits, so that a resumed run finds routes at rest when an uninterrupted one
        does."""
        return {"likelier_own": self.likelier_own, "changed_at": self.changed_at}

    def remember(self, memory: Mapping[str, Any]) -> None:
        """What :meth:`memory` gave; nothing is remembered of a router that never ran."""
        self.likelier_own, self.changed_at = memory.get("likelier_own", {}), memory.get("changed_at", 0)

    def probed_block(self, step: int, task: str) -> int:
        """Which of the ``blocks`` of a task's samples is probed."""
        return int(torch.randint(self.blocks, (), generator=torch_generator(self.seed, "probe", step, task)))

    def _noise(self, step: int) -> Tensor:
        """Gumbel noise; that of a layer depends neither on what else is learned nor on which other tasks there are."""
        draws = []
        for task, places in self.places.items():
            for unit in dict.fromkeys(unit for unit, _ in places):
                layers = [layer for other, layer in places if other == unit]
                generator = torch_generator(self.seed, "router", step, task, unit)
                draws.append(torch.rand(1 + max(layers), 2, generator=generator)[layers])
        return -torch.log(-torch.log(torch.cat(draws).clamp(1e-6, 1 - 1e-6)))
