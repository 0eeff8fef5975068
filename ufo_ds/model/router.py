"""Learned routes: for every task, unit and layer a choice between the shared and the task's own copy.

Two logits per choice, initially equal and independent of the input; hard in the forward pass and soft in the backward
pass (straight-through Gumbel-softmax; Jang et al., 2017). The noise belongs to (seed, step, task, unit, layer), so a
step's path is one dense network, the same on every rank and in recomputation.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ufo_ds.seeding import torch_generator

Choice = tuple[str, int]  # unit and layer
Weights = dict[Choice, dict[str, Tensor]]  # the [2] weights (shared, own) of every task


class Router(nn.Module):
    """Holds one ``[R, 2]`` parameter per task that has R learned routes."""

    def __init__(self, choices: Mapping[str, list[Choice]], temperature: float, seed: int):
        super().__init__()
        self.choices = {task: list(items) for task, items in choices.items() if items}
        self.logits = nn.ParameterDict({task: nn.Parameter(torch.empty(len(c), 2)) for task, c in self.choices.items()})
        self.temperature = temperature
        self.seed = seed

    def forward(self, step: int | None) -> Tensor:
        """Weights ``[sum of R, 2]`` of all tasks' choices, one-hot.

        Args:
            step: draws the noise of this step; None takes the more probable branch, without noise.
        """
        logits_R2 = torch.cat([self.logits[task] for task in self.choices]).float()
        if step is not None:
            logits_R2 = (logits_R2 + self._noise(step).to(logits_R2.device)) / self.temperature
        soft_R2 = logits_R2.softmax(-1)
        hard_R2 = torch.zeros_like(soft_R2).scatter_(1, soft_R2.argmax(-1, keepdim=True), 1.0)
        return hard_R2 if step is None else hard_R2 + soft_R2 - soft_R2.detach()

    def by_choice(self, weights_R2: Tensor) -> Weights:
        """Sort the rows of :meth:`forward` by unit and layer."""
        weights: Weights = {}
        rows = iter(weights_R2.unbind(0))
        for task, choices in self.choices.items():
            for choice in choices:
                weights.setdefault(choice, {})[task] = next(rows)
        return weights

    def _noise(self, step: int) -> Tensor:
        """Gumbel noise; the rows of a task do not depend on which other tasks there are."""
        draws = [
            torch.rand(len(choices), 2, generator=torch_generator(self.seed, "router", step, task))
            for task, choices in self.choices.items()
        ]
        return -torch.log(-torch.log(torch.cat(draws).clamp(1e-6, 1 - 1e-6)))
