"""SGD inside the backward pass, for a model that alone fills its one device.

A parameter is updated as soon as its gradient is whole, and the gradient is freed at once: there is never more than one
of them (LOMO; Lv et al., 2023, "Full Parameter Fine-tuning for Large Language Models with Limited Resources"). The
weights are bf16, and what an exact fp32 master has beyond them is kept in 16 bits more (Split-SGD-BF16; Kalamkar et
al., 2020, "Optimizing Deep Learning Recommender Systems Training on CPU Cluster Architectures", with rounded weights
instead of truncated ones). So weights and optimizer state take 4 bytes a parameter, 6 with momentum.

The price: one backward pass is one step, so a step is a single batch of all tasks; and a gradient's global norm is
known only when all gradients are gone, so clipping is to each parameter's own norm.
"""

import re
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from ufo_ds.model.classifiers import parts
from ufo_ds.model.initialization import initial_values
from ufo_ds.model.parameters import UpdateRule, update_rule
from ufo_ds.model.supernet import Supernet


def split_master(master: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 -> the nearest bf16 and an int16 residual, of the same shape; nothing is lost.

    Of the 32 bits, read as an integer, the bf16 weight is the upper half, rounded by the lower one (halfway cases away
    from zero), and the residual the signed difference. So a weight is where rounding puts it, within half a unit of its
    last place, also where the mantissa carries into the exponent; and the sum of the two is the master's bits again.
    """
    bits = master.contiguous().view(torch.int32)
    upper = (bits + 0x8000) >> 16  # arithmetic: the sign stays; only a NaN's bits could overflow
    residual = (bits - (upper << 16)).to(torch.int16)
    return upper.to(torch.int16).view(torch.bfloat16), residual


def join_master(weight: Tensor, residual: Tensor) -> Tensor:
    """The fp32 master of a bf16 weight and its residual: the inverse of :func:`split_master`."""
    bits = weight.contiguous().view(torch.int16).to(torch.int32)
    return bits.bitwise_left_shift_(16).add_(residual).view(torch.float32)


class SGDInBackward:
    """``torch.optim.SGD`` on fp32 masters, by hooks: after ``loss.backward()`` the step has been taken.

    A parameter that gets no gradient (of a copy on no path) is left alone. What several tasks share must see all of
    them in one backward pass, as it does in a batch of all tasks.

    Args:
        parameters: of a model in bf16, by name; their present values are the masters until :meth:`assign`.
        rules: how each is updated.
        momentum: its buffer is kept in bf16, rounded after each step; 0 keeps none.
        max_norm: a gradient of a larger norm is scaled down to it, each parameter by itself.

    Raises:
        ValueError: a parameter is not bf16.

    Attributes:
        learning_rate: of the next backward pass, before the rules' scale.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        rules: Mapping[str, UpdateRule],
        momentum: float = 0.0,
        max_norm: float | None = None,
    ):
        for name, parameter in parameters.items():
            if parameter.dtype != torch.bfloat16:
                raise ValueError(f"{name} is {parameter.dtype}: convert the parameters to bfloat16 first")
        self.parameters, self.rules = dict(parameters), dict(rules)
        self.momentum, self.max_norm = momentum, max_norm
        self.learning_rate = 0.0
        self.residuals = {name: torch.zeros_like(p, dtype=torch.int16) for name, p in parameters.items()}
        self.momenta = {name: torch.zeros_like(p) for name, p in parameters.items()} if momentum else {}
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(partial(self._update, name))
            for name, parameter in parameters.items()
        ]

    def master(self, name: str) -> Tensor:
        """The fp32 value of a parameter, a new tensor."""
        return join_master(self.parameters[name].detach(), self.residuals[name])

    @torch.no_grad()
    def assign(self, name: str, master: Tensor) -> None:
        """Set a parameter to an fp32 value on its device."""
        weight, residual = split_master(master)
        self.parameters[name].copy_(weight)
        self.residuals[name].copy_(residual)

    def state_bytes(self) -> dict[str, int]:
        """Bytes of the weights, the residuals and the momentum."""
        kinds: dict[str, Mapping[str, Tensor]] = {
            "weights": self.parameters, "residuals": self.residuals, "momentum": self.momenta
        }  # fmt: skip
        return {kind: sum(t.numel() * t.element_size() for t in of_kind.values()) for kind, of_kind in kinds.items()}

    def remove(self) -> None:
        """Take the hooks away: later backward passes leave gradients and weights alone."""
        for hook in self._hooks:
            hook.remove()

    @torch.no_grad()
    def _update(self, name: str, parameter: Tensor) -> None:
        assert parameter.grad is not None
        rule, direction = self.rules[name], parameter.grad.float()
        parameter.grad = None
        if self.max_norm is not None:
            norm = torch.linalg.vector_norm(direction)
            direction.mul_((self.max_norm / (norm + 1e-6)).clamp(max=1.0))  # as clip_grad_norm_, without asking for it
        master = self.master(name)
        if rule.weight_decay:
            direction.add_(master, alpha=rule.weight_decay)
        if self.momentum:
            direction = self.momenta[name].float().mul_(self.momentum).add_(direction)
            self.momenta[name].copy_(direction)
        self.assign(name, master.add_(direction, alpha=-self.learning_rate * rule.lr_scale))


def to_device(model: Supernet, device: torch.device | str) -> Supernet:
    """A model on the meta device gets memory: bf16 parameters, without values yet, and its buffers, in fp32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    model.to_empty(device=device)
    model.fill_constants()
    return model


def assign_initial_values(optimizer: SGDInBackward, model: Supernet) -> None:
    """The values of :func:`ufo_ds.model.supernet.init_weights`, whose bf16 roundings are the first weights.

    Own copies start as the shared one does: each value is drawn once, and copied on the device.
    """
    assert not parts(model)  # of a classifier that is spread over processes
    drawn: dict[tuple[str, torch.Size], Tensor] = {}
    for name, parameter in optimizer.parameters.items():
        key = re.sub(r"\.own\.[a-z0-9_]+\.", ".shared.", name), parameter.shape
        if key not in drawn:
            values = initial_values(key[0], parameter.shape, range(parameter.numel()), model.recipe)
            drawn[key] = values.view(parameter.shape).to(parameter.device)
        optimizer.assign(name, drawn[key])


def rules_of(model: Supernet) -> dict[str, UpdateRule]:
    """The recipe's rule of every parameter."""
    return {name: update_rule(name, model.recipe) for name, _ in model.named_parameters()}
