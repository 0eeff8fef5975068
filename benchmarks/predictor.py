"""How well the order of subnets is predicted from a few that were evaluated, beside ridge regression.

python benchmarks/predictor.py --data architectures.json           # or GP_NAS_TRACK2; --quick: within a minute
python benchmarks/predictor.py --train some.json --test others.json

The data are those of the performance prediction track of the CVPR 2022 NAS challenge: subnets of a ViT-B supernet and
their ranks on eight tasks. Each file is an object of architectures, each with the ranks ``<task>_rank`` and a code
``arch``: the depth (j, k, l: 10, 11, 12), then for each layer the levels (from 1, the largest) of heads, FFN and width;
0 past the depth. Kendall's tau (b) between predicted and true ranks of the architectures held back, mean over tasks;
``coverage`` is how many of their ranks lie in the 90% intervals. The last line is one JSON object.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import kendalltau
from sklearn.linear_model import RidgeCV

from ufo_ds.errors import UserError
from ufo_ds.subnets.predictor import Choices, NormalScores, Predictor, one_hot

DEPTHS, LAYERS, UNITS = "jkl", 12, 2  # the third number of a layer, its width, is the same everywhere
BARS = {100: 0.73, 300: 0.78}  # tau by number of labelled ones
COVERAGE = (0.85, 0.95)
RIDGE = np.logspace(-1, 3, 13)


def load(path: str) -> tuple[Choices, np.ndarray, list[str]]:
    """Architectures, their ranks ``[N, T]`` and the names of the T tasks."""
    try:
        found = list(json.loads(Path(path).read_text()).values())
        tasks = sorted(key for key in found[0] if key.endswith("_rank"))
        codes = [of_one["arch"] for of_one in found]
        once_NC = np.array([[DEPTHS.index(code[0])] for code in codes])
        layers = np.array([[int(digit) for digit in code[1:]] for code in codes]).reshape(-1, LAYERS, 3)
        labels_NT = np.array([[float(of_one[task]) for task in tasks] for of_one in found])
    except (OSError, ValueError, KeyError, IndexError, AttributeError) as error:
        raise UserError(f"{path} is no file of architectures and their ranks: {error}") from None
    layers_NUL = np.where(layers > 0, 3 - layers, -1)[:, :, :UNITS].transpose(0, 2, 1)
    return Choices(once_NC, layers_NUL, (len(DEPTHS) - 1,), (2,) * UNITS), labels_NT, tasks


def by_ridge(choices: Choices, labels_NT: np.ndarray, others: Choices) -> np.ndarray:
    """Ridge regression on one-hot codes, on normal scores, its strength by leave-one-out."""
    columns = []
    for labels_N in labels_NT.T:
        model = RidgeCV(RIDGE).fit(one_hot(choices), NormalScores(labels_N).of_training)
        columns.append(model.predict(one_hot(others)))
    return np.stack(columns, 1)


def tau(predicted_NT: np.ndarray, labels_NT: np.ndarray) -> np.ndarray:
    return np.array([kendalltau(a, b).statistic for a, b in zip(predicted_NT.T, labels_NT.T, strict=True)])


def measure(train: tuple[Choices, np.ndarray], test: tuple[Choices, np.ndarray]) -> dict[str, Any]:
    found = Predictor(*train).predict(test[0])
    return {
        "tau": tau(found.median, test[1]),
        "ridge": tau(by_ridge(*train, test[0]), test[1]),
        "coverage": ((found.low <= test[1]) & (test[1] <= found.high)).mean(0),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=os.environ.get("GP_NAS_TRACK2"), help="architectures, for random splits")
    parser.add_argument("--train", help="labelled architectures; needs --test")
    parser.add_argument("--test", help="architectures to predict")
    parser.add_argument("--labelled", type=int, nargs="+", default=list(BARS), help="numbers (default: 100 300)")
    parser.add_argument("--splits", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="two splits with the fewest labelled")
    options = parser.parse_args()
    if (options.train is None) != (options.test is None) or (options.train is None and options.data is None):
        parser.error("give --data FILE (or set GP_NAS_TRACK2), or --train FILE --test FILE")
    torch.set_num_threads(1)
    figures: dict[str, Any] = {}
    bars: dict[str, Any] = {}

    def report(name: str, rounds: list[dict[str, Any]], tasks: list[str], bar: float | None) -> None:
        means = {key: np.mean([found[key] for found in rounds], axis=0) for key in rounds[0]}
        print(f"{name}: {'task':<16} {'tau':>6} {'ridge':>6} {'in the interval':>16}")
        for i, task in enumerate(tasks):
            values = "{:6.3f} {:6.3f} {:15.1%}".format(*(means[key][i] for key in ("tau", "ridge", "coverage")))
            print(f"{'':{len(name)}}  {task.removesuffix('_rank'):<16} {values}")
        for key, values in means.items():
            figures[f"{key}_{name}"] = round(float(values.mean()), 4)
        figures[f"tau_{name}_by_split"] = [round(float(found["tau"].mean()), 4) for found in rounds]
        covered = figures[f"coverage_{name}"]
        bars[f"coverage_{name}"] = {"value": covered, "bar": COVERAGE, "ok": COVERAGE[0] <= covered <= COVERAGE[1]}
        if bar is not None:
            reached = figures[f"tau_{name}"]
            bars[f"tau_{name}"] = {"value": reached, "bar": bar, "ok": reached >= bar}
        summary = "{:6.3f} {:6.3f} {:15.1%}".format(*(figures[f"{key}_{name}"] for key in ("tau", "ridge", "coverage")))
        print(f"{'':{len(name)}}  {'mean':<16} {summary}", flush=True)

    if options.train is not None:
        *train, tasks = load(options.train)
        *test, _ = load(options.test)
        report(str(len(train[0])), [measure(tuple(train), tuple(test))], tasks, None)
    else:
        choices, labels_NT, tasks = load(options.data)
        for labelled in options.labelled[:1] if options.quick else options.labelled:
            rounds = []
            for seed in range(2 if options.quick else options.splits):
                order = np.random.default_rng(seed).permutation(len(choices))
                known, held_back = order[:labelled], order[labelled:]
                rounds.append(measure(*((choices[rows], labels_NT[rows]) for rows in (known, held_back))))
            report(str(labelled), rounds, tasks, BARS.get(labelled))
    print(json.dumps({"benchmark": "predictor", "figures": figures, "bars": bars}))


if __name__ == "__main__":
    main()
