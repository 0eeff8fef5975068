"""How often `ufo compare` sees a difference where there is none, and how often it finds one that is there.

python benchmarks/compare_null.py                          # simulated runs, some minutes; --quick: within one
python benchmarks/compare_null.py --runs runs/demo-*       # real runs that differ only in the seed, split in all ways

Simulated runs have effects of the identity, the item, the seed and of seeds on both; arms differ in what they do to
single identities and items ("sampled": no difference on average over all there could be) or not at all ("alike").
Beside it stand two usual ways: a t-test over the runs' metrics, blind to the sampling of test items, and an interval
over test items, blind to seeds. The last line is one JSON object.
"""

import argparse
import itertools
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binom

from ufo_ds import recipe_file
from ufo_ds.compare import Arm, Run, compare, read_run
from ufo_ds.evaluation import statistics
from ufo_ds.evaluation.outcomes import Outcomes
from ufo_ds.evaluation.statistics import ALPHA, Difference
from ufo_ds.recipe_benchmark import Protocol

PROTOCOLS: tuple[Protocol, ...] = ("retrieval", "verification", "classification")
DEMO = recipe_file.load("demo")  # simulated runs need some recipe
SEEDS = ((3, 3), (5, 5), (2, 2))


class Population:
    """A test set of one protocol, drawn anew, and runs of two arms on it.

    Args:
        sampled: spread of what the arms do differently to single identities and items.
        seed: spread of the runs' overall quality; of an arm's metric it makes about a fifth of this.
        effect: by how much arm A is better, on the scale before the squashing to 0..1.
    """

    def __init__(
        self,
        protocol: Protocol,
        generator: np.random.Generator,
        sampled: float = 0.0,
        seed: float = 0.1,
        effect: float = 0.0,
        identities: int = 60,
        items: int = 300,
    ):
        self.protocol, self.generator = protocol, generator
        self.seed, self.effect = seed, effect
        if protocol == "verification":  # ten folds that share no identity, as LFW's
            fold = np.arange(items) % 10
            first, other = generator.integers(0, identities // 10, (2, items)) * 10 + fold
            other = np.where(generator.random(items) < 0.5, first, other)
            self.pairs = np.stack([first, other], 1)
            self.arrays = {"fold": fold, "identity": self.pairs, "threshold": np.ones(items)}
        else:  # identities with few items and with many
            share = generator.gamma(2.0, size=identities)
            identity = generator.choice(identities, items, p=share / share.sum())
            identity = np.arange(items) if protocol == "classification" else identity
            self.pairs = np.stack([identity, identity], 1)
            self.arrays = {"identity": identity}
        self.difficulty = 1 + self._draw(1.0)
        self.of_arm = [self._draw(sampled) for _ in range(2)]

    def _draw(self, spread: float) -> np.ndarray:
        """An effect of each item and one of its identities."""
        of_identity = self.generator.normal(0, spread, self.pairs.max() + 1)[self.pairs].mean(1)
        return of_identity + self.generator.normal(0, spread, len(self.pairs))

    def run(self, arm: int) -> Outcomes:
        level = self.difficulty + self.of_arm[arm] + self.effect * (arm == 0) + self._draw(0.4)
        level = level + self.generator.normal(0, self.seed)
        arrays = self.arrays | {"right": level > 0, "average_precision": 1 / (1 + np.exp(-2 * level))}
        return Outcomes(self.protocol, {}, "simulated", arrays)

    def difference(self, seeds: tuple[int, int]) -> Difference:
        a, b = ([self.run(arm) for _ in range(seeds[arm])] for arm in (0, 1))
        return statistics.compare(np.stack([r.scores for r in a]), np.stack([r.scores for r in b]), a[0].items)


def any_verdict(generator: np.random.Generator, seeds: tuple[int, int], sampled: float) -> bool:
    """Whether a comparison on benchmarks of all three protocols and on their mean calls any of them a difference."""
    populations = {f"{protocol}/test": Population(protocol, generator, sampled) for protocol in PROTOCOLS}
    arms = []
    for arm in (0, 1):
        found = {seed: {key: p.run(arm) for key, p in populations.items()} for seed in range(seeds[arm])}
        runs = [Run(Path(f"{arm}-{seed}"), DEMO, of_seed) for seed, of_seed in found.items()]
        arms.append(Arm(str(arm), runs, found))
    return any(row.verdict.endswith("better") for row in compare(*arms))


def seeds_alone(difference: Difference) -> bool:
    """Whether a t-test over the runs' metrics sees a difference."""
    assert difference.seeds is not None
    return Difference(difference.value, [[(0.0, 0.0, 1)]], difference.seeds).half_width() < abs(difference.value)


def items_alone(difference: Difference) -> bool:
    """Whether an interval over test items sees one."""
    return Difference(difference.value, difference.items, None).half_width() < abs(difference.value)


def found(difference: Difference) -> bool:
    return difference.half_width() < abs(difference.value)


def most_alarms(replicas: int) -> int:
    """With a true rate of 5% there are more in one of a thousand experiments."""
    return int(binom.ppf(0.999, replicas, ALPHA))


def simulate(replicas: int) -> tuple[dict[str, float], dict[str, Any]]:
    generator = np.random.default_rng(0)
    figures: dict[str, float] = {}
    worst, worst_family, least_power = 0.0, 0.0, 1.0
    others = {"t-test over seeds": 0.0, "interval over items": 0.0}
    for protocol, seeds, (name, sampled) in itertools.product(PROTOCOLS, SEEDS, (("alike", 0.0), ("sampled", 0.4))):
        drawn = [Population(protocol, generator, sampled).difference(seeds) for _ in range(replicas)]
        rate = float(np.mean([found(d) for d in drawn]))
        rates = [float(np.mean([check(d) for d in drawn])) for check in (seeds_alone, items_alone)]
        error = float(np.std([d.value for d in drawn]))
        label = f"{protocol}, {seeds[0]} against {seeds[1]} seeds, {name}"
        print(
            f"{label:50} false alarms {rate:.3f}   by seeds alone {rates[0]:.3f}, by items alone {rates[1]:.3f}   true "
            f"standard error {error:.4f}, half-width {np.mean([d.half_width() for d in drawn]):.4f}",
            flush=True,
        )
        figures[f"false alarms, {label}"] = rate
        worst = max(worst, rate)
        others = {key: max(value, new) for (key, value), new in zip(others.items(), rates, strict=True)}
    for seeds, (name, sampled) in itertools.product(SEEDS, (("alike", 0.0), ("sampled", 0.4))):
        rate = float(np.mean([any_verdict(generator, seeds, sampled) for _ in range(replicas // 4)]))
        label = f"any of four verdicts, {seeds[0]} against {seeds[1]} seeds, {name}"
        print(f"{label:50} false alarms {rate:.3f}", flush=True)
        figures[f"false alarms, {label}"] = rate
        worst_family = max(worst_family, rate)
    for protocol in PROTOCOLS:
        drawn = [Population(protocol, generator, 0.2, 0.03, effect=0.5).difference((3, 3)) for _ in range(replicas)]
        errors = np.mean([d.value for d in drawn]) / np.std([d.value for d in drawn])
        power = float(np.mean([found(d) and d.value > 0 for d in drawn]))
        print(f"{protocol}: a difference of {errors:.1f} standard errors is found in {power:.3f}", flush=True)
        figures[f"power, {protocol}"] = power
        figures[f"standard errors of that difference, {protocol}"] = float(errors)
        least_power = min(least_power, power)
    figures |= {f"worst false alarms, {key}": value for key, value in others.items()}
    bar, family_bar = most_alarms(replicas) / replicas, most_alarms(replicas // 4) / (replicas // 4)
    bars = {
        "worst rate of false alarms": {"value": worst, "bar": bar, "ok": worst <= bar},
        "worst rate of any false verdict": {"value": worst_family, "bar": family_bar, "ok": worst_family <= family_bar},
        "least power": {"value": least_power, "bar": 0.8, "ok": least_power >= 0.8},
    }
    return figures, bars


def split(paths: list[Path]) -> tuple[dict[str, float], dict[str, Any]]:
    """All ways to make two arms of real runs: any difference that is found is none."""
    runs = {run.recipe.seed: run for run in map(read_run, paths)}
    seeds = sorted(runs)
    if len(seeds) < 4:
        raise SystemExit(f"{len(seeds)} seeds: two arms of at least two need four")
    alarms: dict[str, list[bool]] = {}
    for chosen in itertools.combinations(seeds, len(seeds) // 2):
        if len(seeds) % 2 == 0 and seeds[0] not in chosen:
            continue  # the same split, the other way round
        a, b = (
            Arm(which, [runs[seed] for seed in half], {seed: runs[seed].outcomes for seed in half})
            for which, half in (("A", chosen), ("B", [seed for seed in seeds if seed not in chosen]))
        )
        rows = compare(a, b)
        for row in rows:
            alarms.setdefault(row.name, []).append(found(row.difference))
        alarms.setdefault("any verdict", []).append(any(row.verdict.endswith("better") for row in rows))
    figures = {f"false alarms, {name}": float(np.mean(seen)) for name, seen in alarms.items()}
    for name, rate in figures.items():
        print(f"{name}: {rate:.3f} of {len(alarms['any verdict'])} splits")
    rate = figures["false alarms, any verdict"]
    # Splits share runs: their alarms come together, so this says less than as many experiments would.
    return figures, {"rate of false verdicts": {"value": rate, "bar": ALPHA, "ok": rate <= ALPHA}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer replicas: within a minute")
    parser.add_argument("--runs", type=Path, nargs="+", help="real runs that differ only in the seed")
    options = parser.parse_args()
    start = time.perf_counter()
    figures, bars = split(options.runs) if options.runs else simulate(200 if options.quick else 2000)
    figures["seconds"] = time.perf_counter() - start
    print(json.dumps({"benchmark": "compare_null", "figures": figures, "bars": bars}))


if __name__ == "__main__":
    main()
