"""How often the intervals of a chosen threshold hold the true rates of false and of true accepts.

python benchmarks/threshold_intervals.py            # about a quarter of an hour; --quick: within one

Identities are drawn anew again and again, and pairs of them: the similarity of an impostor pair is an effect of either
identity (a share of its variance) and noise, that of a genuine pair twice the effect of its identity and noise, and in
some designs each image has an effect too. A threshold is chosen for a FAR; what it does to all identities there could
be is known. Beside it stands the interval of Clopper and Pearson, for which all pairs are independent. The last line
is one JSON object.
"""

import argparse
import json
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import beta, norm

from ufo_ds.errors import UserError
from ufo_ds.evaluation import thresholds

LEVEL = (0.93, 0.97)  # between which the coverage of a 95% interval is to be


@dataclass(frozen=True)
class Design:
    """
    Attributes:
        pairs: "all" pairs of identities, four genuine ones each; "folds", ten impostor and ten genuine pairs for each
            identity, drawn within ten folds that share none, as LFW's; "images", all of one query and three gallery
            images of each identity, as in retrieval.
        share: of the variance of impostor pairs that is due to the two identities.
    """

    pairs: str
    identities: int
    share: float
    far: float

    def __str__(self) -> str:
        return f"{self.pairs}, {self.identities} identities, share {self.share:g}, FAR {self.far:g}"

    def pairs_of_identities(self, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Identities [M, 2] and images [M, 2]; whether the pair is genuine, [M]."""
        count = self.identities
        everybody = np.arange(count)
        if self.pairs == "folds":
            fold = np.arange(10 * count) % 10
            of_fold = count // 10
            first = generator.integers(0, of_fold, len(fold))
            second = (first + generator.integers(1, of_fold, len(fold))) % of_fold
            genuine = generator.integers(0, count, len(fold))
            identity = np.stack([first * 10 + fold, second * 10 + fold], axis=1)
            identity = np.concatenate([identity, np.stack([genuine, genuine], axis=1)])
        elif self.pairs == "all":
            genuine = np.repeat(everybody, 4)
            identity = np.concatenate([np.stack(np.triu_indices(count, 1), 1), np.stack([genuine, genuine], 1)])
        else:
            query, gallery = np.meshgrid(everybody, np.tile(everybody, 3), indexing="ij")
            identity = np.stack([query.ravel(), gallery.ravel()], axis=1)
            image = np.stack(np.meshgrid(everybody, count + np.arange(3 * count), indexing="ij"), axis=-1)
            return identity, image.reshape(-1, 2), identity[:, 0] == identity[:, 1]
        return identity, np.arange(2 * len(identity)).reshape(-1, 2), identity[:, 0] == identity[:, 1]

    def draw(self, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Similarities [M], genuine [M] and identities [M, 2]; impostors are standard normal."""
        identity, image, same = self.pairs_of_identities(generator)
        of_image = 0.2 if self.pairs == "images" else 0.0
        similarity = (self.share / 2) ** 0.5 * generator.standard_normal(self.identities)[identity].sum(1)
        similarity += (of_image / 2) ** 0.5 * generator.standard_normal(image.max() + 1)[image].sum(1)
        similarity += (1 - self.share - of_image) ** 0.5 * generator.standard_normal(len(same))
        return similarity + self.distance * same, same, identity

    @property
    def distance(self) -> float:
        """Of genuine pairs from impostors: at FAR .01 eight of ten are accepted."""
        return float(norm.isf(0.01) + norm.isf(0.2) * (1 + self.share) ** 0.5)

    def true_far(self, threshold: float) -> float:
        return float(norm.sf(threshold))

    def true_tar(self, threshold: float) -> float:
        return float(norm.sf((threshold - self.distance) / (1 + self.share) ** 0.5))


QUICK = [
    Design("all", 100, 0.1, 1e-1),
    Design("all", 100, 0.3, 1e-2),
    Design("all", 150, 0.1, 1e-3),
    Design("folds", 100, 0.3, 1e-1),
    Design("folds", 300, 0.3, 1e-2),
    Design("folds", 500, 0.1, 1e-2),
]
FULL = [
    *(Design("all", 100, share, far) for share in (0.1, 0.3, 0.5) for far in (1e-1, 1e-2)),
    *(Design("all", 200, share, far) for share in (0.1, 0.5) for far in (1e-2, 1e-3)),
    Design("all", 500, 0.3, 1e-3),
    *(Design("folds", n, share, far) for n in (100, 300, 500) for share in (0.1, 0.5) for far in (1e-1, 1e-2)),
    *(Design("images", 100, share, far) for share, far in ((0.1, 1e-2), (0.3, 1e-2), (0.1, 1e-3))),
]
WITHOUT_EFFECTS = [Design("all", 100, 0.0, 1e-1), Design("all", 200, 0.0, 1e-3), Design("folds", 300, 0.0, 1e-2)]


@dataclass(frozen=True)
class Coverage:
    """Shares of the draws that were not refused; ``below``: the true FAR is above the interval."""

    far: float
    below: float
    tar: float
    independent: float
    width: float  # upper over lower end, geometric mean
    refused: float


def coverage(design: Design, replicas: int, generator: np.random.Generator) -> Coverage:
    found = []
    for _ in range(replicas):
        similarity, same, identity = design.draw(generator)
        try:
            chosen = thresholds.choose(similarity, same, identity, design.far)
        except UserError:
            continue
        far, tar = design.true_far(chosen.threshold), design.true_tar(chosen.threshold)
        accepted, impostors = round(chosen.expected_far * chosen.impostors), chosen.impostors
        (low, high), (low_tar, high_tar) = chosen.far_interval, chosen.tar_interval
        exact = beta.ppf([0.025, 0.975], [accepted, accepted + 1], [impostors - accepted + 1, impostors - accepted])
        held, width = low <= far <= high, np.log(high / low)
        found.append([held, far > high, low_tar <= tar <= high_tar, exact[0] <= far <= exact[1], width])
    if not found:
        return Coverage(0, 0, 0, 0, 0, 1)
    *shares, width = np.mean(np.array(found, dtype=np.float64), axis=0).tolist()
    return Coverage(*shares, float(np.exp(width)), 1 - len(found) / replicas)


def simulate(quick: bool) -> tuple[dict[str, float], dict[str, Any]]:
    generator = np.random.default_rng(0)
    figures: dict[str, float] = {}
    ends: dict[str, list[float]] = {"far": [], "tar": [], "independent": []}
    replicas = 400 if quick else 2000
    designs = QUICK if quick else [*FULL, *WITHOUT_EFFECTS]
    for design in designs:
        found = coverage(design, replicas, generator)
        print(
            f"{design!s:46} FAR {found.far:.3f} (true FAR above {found.below:.3f})  TAR {found.tar:.3f}  as if "
            f"independent {found.independent:.3f}  upper / lower {found.width:5.1f}  refused {found.refused:.3f}",
            flush=True,
        )
        figures[f"coverage of FAR, {design}"] = found.far
        figures[f"coverage of TAR, {design}"] = found.tar
        figures[f"refused, {design}"] = found.refused
        if design.share > 0 and found.refused < 0.5:
            ends["far"].append(found.far)
            ends["tar"].append(found.tar)
            ends["independent"].append(found.independent)
    figures["least coverage as if pairs were independent"] = min(ends["independent"])
    # A few hundred draws are 95% +- 2.2%, which is not the method's.
    slack = 2 * (0.05 * 0.95 / replicas) ** 0.5 if quick else 0.0
    bars: dict[str, Any] = {}
    for name in ("far", "tar"):
        least, most = min(ends[name]), max(ends[name])
        low, high = LEVEL[0] - slack, LEVEL[1] + slack
        bars[f"least coverage of {name.upper()}"] = {"value": least, "bar": low, "ok": bool(least >= low)}
        bars[f"most coverage of {name.upper()}"] = {"value": most, "bar": high, "ok": bool(most <= high)}
    return figures, bars


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer designs and draws: within a minute")
    options = parser.parse_args()
    start = time.perf_counter()
    figures, bars = simulate(options.quick)
    figures["seconds"] = time.perf_counter() - start
    print(json.dumps({"benchmark": "threshold_intervals", "figures": figures, "bars": bars}))


if __name__ == "__main__":
    main()
