"""The predictor against slow formulas, scikit-learn's Gaussian process, sampling, and its own claims of coverage."""

import json
import sys

import numpy as np
import pytest
import torch
from scipy.stats import norm
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel

from benchmarks import predictor as benchmark
from ufo_ds.subnets.predictor import ArchitectureKernel, Choices, NormalScores, Predictor, one_hot

LAYERS = 4


def draw(count: int, seed: int, layers: int = LAYERS) -> Choices:
    """Depths of ``layers`` - 1 and ``layers``, two units of three and two levels."""
    generator = np.random.default_rng(seed)
    depth = generator.integers(0, 2, (count, 1))
    levels = np.stack([generator.integers(0, 3, (count, layers)), generator.integers(0, 2, (count, layers))], axis=1)
    levels[depth[:, 0] == 0, :, -1] = -1
    return Choices(depth, levels, (1,), (2, 1))


def slow_kernel(kernel: ArchitectureKernel, a: Choices, b: Choices) -> np.ndarray:
    """Sums over pairs of architectures, units, steps and layers, one at a time."""
    found = np.zeros((len(a), len(b)))
    for n in range(len(a)):
        for m in range(len(b)):
            total = kernel.constant.exp().item()
            column = 0
            for c, most in enumerate(a.steps_once):
                for step in range(1, most + 1):
                    total += kernel.once[column].exp().item() * (a.once_NC[n, c] >= step) * (b.once_NC[m, c] >= step)
                    column += 1
            for unit, most in enumerate(a.steps_layers):
                centre, width = kernel.centre[unit].sigmoid().item(), kernel.width[unit].exp().item()
                length, share = kernel.length[unit].exp().item(), kernel.share[unit].exp().item()
                for step in range(most + 1):
                    for i in range(LAYERS):
                        for j in range(LAYERS):
                            if a.layers_NUL[n, unit, i] >= step and b.layers_NUL[m, unit, j] >= step:
                                weights = [np.exp(-(((k / (LAYERS - 1) - centre) / width) ** 2)) for k in (i, j)]
                                alike = np.exp(-abs(i - j) / length) + share * (i == j)
                                total += kernel.steps[unit][step].exp().item() * weights[0] * weights[1] * alike
            found[n, m] = total + kernel.pairs.exp().item() * total**2
    return found


def test_kernel_is_the_sum_it_says():
    a, b = draw(6, 0), draw(5, 1)
    kernel = ArchitectureKernel(a)
    with torch.no_grad():
        for parameter in kernel.parameters():
            parameter += 0.5 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
        assert np.allclose(kernel(a, b).numpy(), slow_kernel(kernel, a, b), rtol=1e-12)
        assert np.linalg.eigvalsh(kernel(a, a).numpy()).min() > -1e-10


def test_posterior_is_scikit_learns():
    choices, others = draw(20, 2), draw(7, 3)
    labels_NT = np.random.default_rng(4).normal(size=(20, 2)) + one_hot(choices)[:, :2]
    found = Predictor(choices, labels_NT)
    mean_TM, covariance = found.posterior(others)
    both = Choices(
        np.concatenate([choices.once_NC, others.once_NC]), np.concatenate([choices.layers_NUL, others.layers_NUL]),
        choices.steps_once, choices.steps_layers,
    )  # fmt: skip
    for task in range(2):
        gram = (found.scale_T[task].exp() * found.kernel(both, both)).detach().numpy()

        class Known(ConstantKernel):
            """Looks covariances up by the architectures' numbers."""

            gram_: np.ndarray = gram

            def __call__(self, X, Y=None, eval_gradient=False):
                Y = X if Y is None else Y
                return self.gram_[np.ix_(X[:, 0].astype(int), Y[:, 0].astype(int))]

            def diag(self, X):
                return self.gram_[X[:, 0].astype(int), X[:, 0].astype(int)]

        alpha = float(found.noise_T[task].detach().exp()) + 1e-5
        peer = GaussianProcessRegressor(Known(1.0, "fixed"), alpha=alpha, optimizer=None)
        peer.fit(np.arange(20)[:, None], NormalScores(labels_NT[:, task]).of_training)
        mean, cov = peer.predict(np.arange(20, 27)[:, None], return_cov=True)
        assert np.allclose(mean_TM[task], mean, atol=1e-8)
        assert np.allclose(covariance[task], cov, atol=1e-8)


def test_learning_raises_the_likelihood_and_finds_the_noise():
    """Labels of half signal, half noise, and labels without noise."""
    choices = draw(150, 5)
    generator = np.random.default_rng(6)
    signal = one_hot(choices) @ generator.normal(size=one_hot(choices).shape[1])
    signal = (signal - signal.mean()) / signal.std()
    found = Predictor(choices, np.stack([signal, signal + generator.normal(size=150)], 1))
    clean, noisy = found.noise_T.detach().exp().tolist()
    assert clean < 0.05
    assert 0.3 < noisy < 0.7


def test_intervals_hold_what_they_say():
    held = []
    for seed in range(12):
        choices, others = draw(40, 10 + seed), draw(200, 100 + seed)
        generator = np.random.default_rng(seed)
        effect = generator.normal(size=one_hot(choices).shape[1])

        def label(of: Choices, effect: np.ndarray = effect, generator=generator) -> np.ndarray:
            return np.exp(0.5 * one_hot(of) @ effect + 0.3 * generator.normal(size=len(of)))[:, None]

        found, truth = Predictor(choices, label(choices)).predict(others), label(others)
        assert (found.low <= found.median).all()
        assert (found.median <= found.high).all()
        held.append(((found.low <= truth) & (truth <= found.high)).mean())
    assert 0.82 < np.mean(held) < 0.97


def test_moments_are_those_of_drawn_labels():
    choices, others = draw(15, 7), draw(6, 8)
    found = Predictor(choices, np.random.default_rng(9).normal(size=(15, 2)) ** 3)
    mean_NT, std_NT = found.moments(others)
    mean_TM, covariance = found.posterior(others)
    std_TM = (covariance.diagonal(dim1=1, dim2=2) + found.noise_T.detach().exp()[:, None]).sqrt().numpy()
    normal = np.random.default_rng(0).standard_normal(200_000)
    for task in range(2):
        for i in range(6):
            labels = found.warps[task].labels_of(mean_TM[task, i].item() + std_TM[task, i] * normal)
            assert mean_NT[i, task] == pytest.approx(labels.mean(), abs=0.1 * labels.std())
            assert std_NT[i, task] == pytest.approx(labels.std(), rel=0.2)


def test_information_is_what_the_label_lowers_the_entropy_by():
    """Entropies of what it measures, with and without the label, by the variance once it is conditioned on."""
    choices, others = draw(10, 11), draw(8, 12)
    found = Predictor(choices, np.random.default_rng(13).normal(size=(10, 2)))
    noise_T = found.noise_T.detach().exp().numpy()
    variance_TM = found.posterior(others)[1].diagonal(dim1=1, dim2=2).numpy()
    after_TM = variance_TM - variance_TM**2 / (variance_TM + noise_T[:, None])
    assert np.allclose(found.information(others), 0.5 * np.log(variance_TM / after_TM).sum(0))


def test_normal_scores():
    scores = NormalScores(np.array([30.0, 10.0, 20.0, 20.0]))
    quantiles = norm.ppf([0.125, 0.5, 0.875])  # the two 20s share ranks 1 and 2
    assert np.allclose(scores.of_training, quantiles[[2, 0, 1, 1]])
    assert np.allclose(scores.labels_of(quantiles), [10, 20, 30])
    assert np.allclose(scores.labels_of(quantiles[1:].mean(keepdims=True)), [25])
    slope = np.std([10, 20, 30]) / quantiles.std()
    assert np.allclose(scores.labels_of(quantiles[[0, 2]] + [-1, 1]), [10 - slope, 30 + slope])
    assert NormalScores(np.array([5.0, 5.0])).labels_of(np.array([0.0]))[0] == 5


@pytest.mark.parametrize("labels", [np.zeros((1, 1)), np.array([[1.0], [np.nan]])])
def test_what_cannot_be_learned_from_is_refused(labels):
    with pytest.raises(ValueError, match="two architectures"):
        Predictor(draw(len(labels), 0), labels)


def test_benchmark_reads_files_of_the_contests_form(tmp_path, monkeypatch, capsys):
    """Made-up subnets whose rank is their size: found in good order, from two files."""
    generator = np.random.default_rng(0)
    codes = []
    for _ in range(60):
        depth = int(generator.integers(10, 13))
        layers = "".join(f"{generator.integers(1, 4)}{generator.integers(1, 4)}1" for _ in range(depth))
        codes.append("jkl"[depth - 10] + layers.ljust(36, "0"))
    size = [sum(6 - int(a) - int(b) for a, b in zip(code[1::3], code[2::3], strict=True) if a != "0") for code in codes]
    rank = np.argsort(np.argsort(size))
    for name, part in (("train", range(40)), ("test", range(40, 60))):
        values = {f"arch{i}": {"size_rank": int(rank[i]), "arch": codes[i]} for i in part}
        (tmp_path / f"{name}.json").write_text(json.dumps(values))
    files = ["--train", str(tmp_path / "train.json"), "--test", str(tmp_path / "test.json")]
    monkeypatch.setattr(sys, "argv", ["predictor.py", *files])
    benchmark.main()
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["figures"]["tau_40"] > 0.8
