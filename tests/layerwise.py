"""LARS and LAMB over whole parameters, one at a time, as their papers' pseudo-code has them: what the sharded ones are
compared with. Groups have ``lr``, ``weight_decay`` and ``adapted``."""

import torch


class Lars(torch.optim.Optimizer):
    """You, Gitman and Ginsburg (2017), algorithm 1."""

    def __init__(self, groups, momentum, trust):
        super().__init__(groups, {"momentum": momentum, "trust": trust})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for w in group["params"]:
                if w.grad is None:
                    continue
                decay, rate = group["weight_decay"], 1.0
                w_norm, g_norm = float(w.double().norm()), float(w.grad.double().norm())
                if group["adapted"] and w_norm > 0 and g_norm > 0:
                    rate = group["trust"] * w_norm / (g_norm + decay * w_norm)
                v = self.state[w].setdefault("v", torch.zeros_like(w))
                v.copy_(group["momentum"] * v + group["lr"] * rate * (w.grad + decay * w))
                w.sub_(v)


class Lamb(torch.optim.Optimizer):
    """You et al. (2020), algorithm 2, with phi(z) = min(max(z, low), high)."""

    def __init__(self, groups, betas, bounds, eps=1e-6):
        super().__init__(groups, {"betas": betas, "bounds": bounds, "eps": eps})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for w in group["params"]:
                if w.grad is None:
                    continue
                (beta1, beta2), state = group["betas"], self.state[w]
                state["t"] = state.get("t", 0) + 1
                m = state.setdefault("m", torch.zeros_like(w))
                v = state.setdefault("v", torch.zeros_like(w))
                m.copy_(beta1 * m + (1 - beta1) * w.grad)
                v.copy_(beta2 * v + (1 - beta2) * w.grad**2)
                m_hat, v_hat = m / (1 - beta1 ** state["t"]), v / (1 - beta2 ** state["t"])
                update = m_hat / (v_hat.sqrt() + group["eps"]) + group["weight_decay"] * w
                ratio = 1.0
                if group["adapted"]:
                    phi = min(max(float(w.double().norm()), group["bounds"][0]), group["bounds"][1])
                    size = float(update.double().norm())
                    ratio = phi / size if phi > 0 and size > 0 else 1.0
                w.sub_(group["lr"] * ratio * update)
