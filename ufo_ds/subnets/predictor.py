"""How good subnets are that were never evaluated, from a few that were: a Gaussian process over their choices.

An architecture is a list of ordered choices, some made once (depth, width) and some in every layer (heads, FFN width).
Each choice is written as steps: step k is 1 where the choice is at least the k-th larger one, so that equal steps need
not do equal good. The covariance of two architectures adds up

    a constant, the steps of what is chosen once, each with a variance of its own,
    and for every unit and step   x^T A (exp(-|i - j| / length) + share * 1[i = j]) A x'

over layers i and j, with A = exp(-((i - centre) / width)^2) on the diagonal: some layers matter more than others, and
neighbours matter alike. With K this sum, K + pairs * K^2 (elementwise) lets choices also work in pairs.

All of these numbers are learned by maximum marginal likelihood (Rasmussen and Williams, 2006, 5.4.1) under broad
priors, over all tasks together; each task has a scale and a noise of its own. Labels are replaced by their normal
scores, so that only their order matters (van der Waerden, 1952) and intervals hold whatever the labels' distribution.
"""

from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.stats import norm
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

PRIOR = 1.5  # standard deviation of the logarithm of every learned number
JITTER = 1e-5
ITERATIONS = 60  # of L-BFGS-B
NODES = 32  # of a quadrature
PART = 64  # architectures whose covariance is made at once


@dataclass(frozen=True)
class Choices:
    """N architectures. Levels count from 0, the smallest choice.

    Attributes:
        once_NC: levels of what is chosen once.
        layers_NUL: levels of every unit in every layer; -1 where the layer is left out.
        steps_once: of each of C, the highest level there can be.
        steps_layers: the same of each of U.
    """

    once_NC: np.ndarray
    layers_NUL: np.ndarray
    steps_once: tuple[int, ...]
    steps_layers: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.once_NC)

    def __getitem__(self, rows: np.ndarray | slice) -> "Choices":
        return Choices(self.once_NC[rows], self.layers_NUL[rows], self.steps_once, self.steps_layers)

    def once(self) -> Tensor:
        """Steps ``[N, all steps]`` of what is chosen once."""
        columns = [self.once_NC[:, c] >= step for c, most in enumerate(self.steps_once) for step in range(1, most + 1)]
        return torch.tensor(np.stack(columns, 1) if columns else np.zeros((len(self), 0)), dtype=torch.float64)

    def unit(self, unit: int) -> Tensor:
        """Steps ``[step, N, L]`` of a unit; the first is that the layer is there at all."""
        levels_NL = self.layers_NUL[:, unit]
        return torch.tensor(
            np.stack([levels_NL >= step for step in range(self.steps_layers[unit] + 1)]), dtype=torch.float64
        )


class ArchitectureKernel(nn.Module):
    """The covariance of two architectures; the logarithms of all its numbers are parameters."""

    def __init__(self, choices: Choices):
        super().__init__()
        units, layers = len(choices.steps_layers), choices.layers_NUL.shape[2]

        def number(value: float, *shape: int) -> nn.Parameter:
            return nn.Parameter(torch.full(shape, value, dtype=torch.float64).log())

        self.constant = number(0.5)
        self.once = number(0.1, sum(choices.steps_once))
        self.centre = nn.Parameter(torch.zeros(units, dtype=torch.float64))  # the logit of a relative depth
        self.width = number(0.5, units)  # of the depth
        self.length = number(3.0, units)  # in layers
        self.share = number(0.2, units)
        self.steps = nn.ParameterList(number(0.03, most + 1) for most in choices.steps_layers)
        self.pairs = number(0.1)
        self.depth_L = torch.linspace(0, 1, layers, dtype=torch.float64)

    def forward(self, a: Choices, b: Choices) -> Tensor:
        """``[len(a), len(b)]``"""
        sum_NM = self.constant.exp() + (a.once() * self.once.exp()) @ b.once().T
        layer = torch.arange(len(self.depth_L), dtype=torch.float64)
        apart_LL = (layer[:, None] - layer).abs()
        for unit, steps in enumerate(self.steps):
            weight_L = torch.exp(-(((self.depth_L - self.centre[unit].sigmoid()) / self.width[unit].exp()) ** 2))
            alike_LL = torch.exp(-apart_LL / self.length[unit].exp())
            alike_LL = alike_LL + self.share[unit].exp() * torch.eye(len(layer), dtype=torch.float64)
            covariance_LL = weight_L[:, None] * alike_LL * weight_L
            products = a.unit(unit) @ covariance_LL @ b.unit(unit).transpose(1, 2)  # [step, N, M]
            sum_NM = sum_NM + (steps.exp()[:, None, None] * products).sum(0)
        return sum_NM + self.pairs.exp() * sum_NM**2


class NormalScores:
    """A label as the normal quantile of its rank among those it was made from; linear between and beyond them."""

    def __init__(self, labels_N: np.ndarray):
        self.labels, inverse, counts = np.unique(labels_N, return_inverse=True, return_counts=True)
        ranks = np.cumsum(counts) - (counts + 1) / 2  # equal labels share the mean of theirs, from 0
        self.scores = norm.ppf((ranks + 0.5) / len(labels_N))
        self.of_training = self.scores[inverse]
        # Beyond the ends the line goes on with the slope of the whole.
        spread = self.scores.std()
        self.slope = self.labels.std() / spread if spread else 1.0

    def labels_of(self, scores: np.ndarray) -> np.ndarray:
        inside = np.interp(scores, self.scores, self.labels)
        beyond = np.maximum(scores - self.scores[-1], 0) - np.maximum(self.scores[0] - scores, 0)
        return inside + self.slope * beyond


@dataclass(frozen=True)
class Prediction:
    """Labels ``[N, T]``: the median, and an interval that the label one would measure lies in."""

    median: np.ndarray
    low: np.ndarray
    high: np.ndarray


class Predictor:
    """Fitted to labels ``[N, T]`` of T tasks, higher or lower being better, as they come.

    Raises:
        ValueError: fewer than two architectures, or labels that are not finite.
    """

    def __init__(self, choices: Choices, labels_NT: np.ndarray):
        if len(choices) < 2 or not np.isfinite(labels_NT).all():
            raise ValueError("a predictor needs two architectures or more, and finite labels")
        self.choices = choices
        self.warps = [NormalScores(labels_N) for labels_N in labels_NT.T]
        scores = np.stack([warp.of_training for warp in self.warps])
        self._scores_TN = torch.tensor(scores, dtype=torch.float64)
        tasks = len(self.warps)
        self.kernel = ArchitectureKernel(choices)
        self.scale_T = nn.Parameter(torch.zeros(tasks, dtype=torch.float64))
        self.noise_T = nn.Parameter(torch.full((tasks,), 0.3, dtype=torch.float64).log())
        self._maximise_likelihood()
        with torch.no_grad():
            self._cholesky_TNN = torch.linalg.cholesky(self._covariance())
            self._weights_TN1 = torch.cholesky_solve(self._scores_TN[..., None], self._cholesky_TNN)

    def _covariance(self) -> Tensor:
        """Of the training labels, noise included, ``[T, N, N]``."""
        eye = torch.eye(len(self.choices), dtype=torch.float64)
        kernel_NN = self.kernel(self.choices, self.choices)
        return self.scale_T.exp()[:, None, None] * kernel_NN + (self.noise_T.exp() + JITTER)[:, None, None] * eye

    def _maximise_likelihood(self) -> None:
        learned = [*self.kernel.parameters(), self.scale_T, self.noise_T]
        start = parameters_to_vector(learned).detach().clone()

        def loss(values: np.ndarray) -> tuple[float, np.ndarray]:
            vector_to_parameters(torch.from_numpy(values), learned)
            lower_TNN = torch.linalg.cholesky(self._covariance())
            whitened = torch.linalg.solve_triangular(lower_TNN, self._scores_TN[..., None], upper=False)
            logdet = lower_TNN.diagonal(dim1=1, dim2=2).log().sum()
            prior = ((parameters_to_vector(learned) - start) ** 2).sum() / PRIOR**2
            total = 0.5 * whitened.square().sum() + logdet + 0.5 * prior
            return float(total.detach()), parameters_to_vector(torch.autograd.grad(total, learned)).numpy()

        # Bounded, so that no step of the line search makes the covariance singular.
        bounds = [(float(value) - 3 * PRIOR, float(value) + 3 * PRIOR) for value in start]
        found = minimize(loss, start.numpy(), jac=True, bounds=bounds, options={"maxiter": ITERATIONS})
        vector_to_parameters(torch.from_numpy(found.x), learned)

    @torch.no_grad()
    def posterior(self, choices: Choices) -> tuple[Tensor, Tensor]:
        """Mean ``[T, M]`` and covariance ``[T, M, M]`` of the normal scores, without the noise of a measurement."""
        scale = self.scale_T.exp()[:, None, None]
        between_TMN = scale * self.kernel(choices, self.choices)
        mean_TM = (between_TMN @ self._weights_TN1)[..., 0]
        explained = torch.linalg.solve_triangular(self._cholesky_TNN, between_TMN.transpose(1, 2), upper=False)
        return mean_TM, scale * self.kernel(choices, choices) - explained.transpose(1, 2) @ explained

    def _marginals(self, choices: Choices) -> tuple[np.ndarray, np.ndarray]:
        """Mean and variance ``[T, N]`` of :meth:`posterior`, without the covariance of all with all."""
        found = [self.posterior(choices[start : start + PART]) for start in range(0, max(1, len(choices)), PART)]
        variances = [covariance.diagonal(dim1=1, dim2=2).clamp_min(0) for _, covariance in found]
        return torch.cat([mean for mean, _ in found], 1).numpy(), torch.cat(variances, 1).numpy()

    def _measured(self, choices: Choices) -> tuple[np.ndarray, np.ndarray]:
        """Mean and variance ``[T, N]`` of the normal scores that measurements would give."""
        mean_TM, variance_TM = self._marginals(choices)
        return mean_TM, variance_TM + self.noise_T.detach().exp().numpy()[:, None]

    def predict(self, choices: Choices, level: float = 0.9) -> Prediction:
        """Labels that measurements of these architectures would give, with an interval for each."""
        mean_TM, variance_TM = self._measured(choices)
        half_width = float(norm.ppf(0.5 + level / 2)) * np.sqrt(variance_TM)
        low, median, high = (
            np.stack([warp.labels_of(row) for warp, row in zip(self.warps, scores, strict=True)], 1)
            for scores in (mean_TM - half_width, mean_TM, mean_TM + half_width)
        )
        return Prediction(median, low, high)

    def moments(self, choices: Choices) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation ``[N, T]`` of the labels that measurements of these architectures would give, by
        Gauss-Hermite quadrature over their normal scores."""
        mean_TM, variance_TM = self._measured(choices)
        nodes, weights = np.polynomial.hermite_e.hermegauss(NODES)
        scores_TMQ = mean_TM[..., None] + np.sqrt(variance_TM)[..., None] * nodes
        labels_NTQ = np.stack([warp.labels_of(of) for warp, of in zip(self.warps, scores_TMQ, strict=True)], 1)
        mean_NT = np.average(labels_NTQ, 2, weights)
        return mean_NT, np.sqrt(np.average((labels_NTQ - mean_NT[..., None]) ** 2, 2, weights))

    def information(self, choices: Choices) -> np.ndarray:
        """How much the label of each ``[N]`` would say of what it measures, over all tasks: their mutual information,
        in nats (Krause, Singh and Guestrin, 2008). The next one with the most of it makes a greedy choice of those that
        say most together, once it is fitted in."""
        noise_T = self.noise_T.detach().exp().numpy()
        return 0.5 * np.log1p(self._marginals(choices)[1] / noise_T[:, None]).sum(0)


def one_hot(choices: Choices) -> np.ndarray:
    """Every level of every choice as a column of its own, ``[N, all levels]``: what linear baselines see."""
    columns: list[np.ndarray] = [
        choices.once_NC[:, c] == level for c, most in enumerate(choices.steps_once) for level in range(most + 1)
    ]
    for unit, most in enumerate(choices.steps_layers):
        columns += [(choices.layers_NUL[:, unit] == level)[:, i]
                    for i in range(choices.layers_NUL.shape[2]) for level in range(most + 1)]  # fmt: skip
    return np.stack(columns, 1).astype(float)
