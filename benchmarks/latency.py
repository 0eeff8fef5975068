"""How well the latency of subnets is predicted from 40 that were measured, on one CPU thread of this machine.

python benchmarks/latency.py                    # some minutes; --quick: within one
python benchmarks/latency.py --settings plain   # or one of the settings

In each setting 40 subnets, chosen as `ufo latency` does, and 100 others, drawn at random, are called in turn in many
rounds. What the first 40 took in every other round makes the profile, which predicts the others; the truth is what they
took in the remaining rounds. ``repeat`` is how far their own times in the one half are from those in the other: the
error of measuring the same subnet twice. Beside it a line through the FLOPs, fitted to the same 40. Errors are means of
|predicted / measured - 1|. The last line is one JSON object.
"""

import argparse
import json
import time
from typing import Any

import numpy as np
import torch
from scipy.stats import kendalltau

from ufo_ds import recipe_file
from ufo_ds.model.architecture import SearchSpace
from ufo_ds.model.cost import path_cost
from ufo_ds.model.dense import network
from ufo_ds.subnets import timing
from ufo_ds.subnets.latency import Target, fit, left_out_errors, to_measure, work

MEASURED = 40
ERROR, REPEATS, TAU = 0.08, 1.5, 0.9  # bars; of the error the larger of the first and so many times the repeat's
SIDE = 64  # of the images, in pixels
ROUNDS = 24
_BACKBONE: dict[str, Any] = {"dim": 192, "depth": 12, "heads": 6, "patch_size": 16}
_ELASTIC = {
    "depth": [4, 6, 8, 10, 12],
    "dim": [96, 128, 160, 192],
    "heads": [2, 4, 6],
    "mlp_ratio": [1.0, 2.0, 3.0, 4.0],
}
_STEM = {"stem": [24, 48, 48, 96, 96, 192, 192], "pool": "mean"}  # that of open_small
# Backbone and its elastic sizes.
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": (_BACKBONE, _ELASTIC),
    "stem": (_BACKBONE | _STEM, _ELASTIC | {"stem": [0.5, 0.75, 1.0]}),
}


def run(name: str, others: int, rounds: int) -> tuple[dict[str, float], dict[str, Any]]:
    """Figures and bars of one setting."""
    backbone, elastic = SETTINGS[name]
    task = {"name": "task", "head": {"type": "margin"}, "loss": {"cosface": {}}, "input": [SIDE, SIDE],
            "samples_per_step": 1}  # fmt: skip
    values = {"name": name, "model": {"backbone": backbone, "elastic": elastic}, "tasks": [task],
              "schedule": {"steps": 1}}  # fmt: skip
    recipe = recipe_file.parse(values, name)
    space, target = SearchSpace.of(recipe.model), Target()
    chosen = to_measure(space, MEASURED)
    drawn = dict.fromkeys(space.draw("others", i) for i in range(2 * others))
    subnets = [*chosen, *[subnet for subnet in drawn if subnet not in chosen][:others]]
    assert len(subnets) == MEASURED + others
    with torch.device("meta"):
        models = [network(recipe, "task", subnet) for subnet in subnets]
    timing.with_random_weights(models, target)
    times_RNC = timing.measure(timing.prepare(models, (SIDE, SIDE), target), target, rounds)
    once_N, again_N = (1e3 * timing.typical(times_RNC[first::2]) for first in (0, 1))
    truth_N = again_N[MEASURED:]

    def errors(work_NW: np.ndarray) -> tuple[float, float]:
        predicted_N = work_NW[MEASURED:] @ fit(work_NW[:MEASURED], once_N[:MEASURED])
        return float(np.abs(predicted_N / truth_N - 1).mean()), float(kendalltau(predicted_N, truth_N).statistic)

    work_NW = work(recipe.model.backbone, (SIDE, SIDE), 1, subnets)
    flops_N = [path_cost(recipe.model.backbone, subnet, (SIDE, SIDE)).flops for subnet in subnets]
    error, tau = errors(work_NW)
    by_flops, tau_by_flops = errors(np.array([[1.0, 1e-9 * flops] for flops in flops_N]))
    repeat = float(np.abs(once_N[MEASURED:] / truth_N - 1).mean())
    bar = max(ERROR, REPEATS * repeat)
    figures = {
        "error": error,
        "left_out_error": float(left_out_errors(work_NW[:MEASURED], once_N[:MEASURED]).mean()),
        "repeat_error": repeat,
        "tau": tau,
        "repeat_tau": float(kendalltau(once_N[MEASURED:], truth_N).statistic),
        "error_by_flops": by_flops,
        "tau_by_flops": tau_by_flops,
        "fastest_ms": truth_N.min(),
        "slowest_ms": truth_N.max(),
    }
    print(
        f"{name}: {others} subnets of {figures['fastest_ms']:.2f} .. {figures['slowest_ms']:.2f} ms predicted from "
        f"{MEASURED} others to {error:.1%}, tau {tau:.3f}; measured again {repeat:.1%}, tau "
        f"{figures['repeat_tau']:.3f}; by FLOPs alone {by_flops:.1%}, tau {tau_by_flops:.3f}",
        flush=True,
    )
    bars = {
        f"{name}_error": {"value": round(error, 4), "bar": round(bar, 4), "ok": error <= bar},
        f"{name}_tau": {"value": round(tau, 4), "bar": TAU, "ok": tau >= TAU},
    }
    return {f"{name}_{key}": round(float(value), 4) for key, value in figures.items()}, bars


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--quick", action="store_true", help="the first setting, fewer others and rounds")
    options = parser.parse_args()
    began = time.monotonic()
    machine = timing.machine(Target())
    figures: dict[str, Any] = {"cpu": machine["cpu"], "measured": MEASURED, "others": 30 if options.quick else 100}
    bars: dict[str, Any] = {}
    for name in options.settings[:1] if options.quick else options.settings:
        found, of_setting = run(name, figures["others"], 12 if options.quick else ROUNDS)
        figures |= found
        bars |= of_setting
    figures["minutes"] = round((time.monotonic() - began) / 60, 1)
    print(json.dumps({"benchmark": "latency", "figures": figures, "bars": bars}))


if __name__ == "__main__":
    main()
