"""Exported models against torch, and int8 against fp32, on six small public data sets.

    export OPEN_SMALL=data_shards/open_small/test      # made by: ufo shards open_small SOURCE data_shards/open_small
    python benchmarks/open_small.py --seeds 3          # the runs
    python benchmarks/export.py --seeds 3              # --quick: one task of one run

Every task of every run of ``open_small`` (arm "learned routes") is exported with ``--int8``: the largest difference of
ONNX Runtime in batches of 1 to 17 real image files, preprocessing included, from torch in double precision, of the
largest output; and of int8 the size, the time of one image on one thread (torch, fp32 and int8 called in turns), and
the metric of the test set before and after. What is done is kept and not repeated. Prints the table as Markdown, and as
its last line one JSON object.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from open_small import TASKS, place
from subnets import METRICS, ufo

from ufo_ds.subnets import timing
from ufo_ds.subnets.agreement import TOLERANCE
from ufo_ds.subnets.latency import Target

QUICK = ["faces"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/open_small"), help="where those of open_small.py live")
    parser.add_argument("--out_runs", type=Path, default=Path("runs/export"), help="where exported models go")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one task of one run")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    options = parser.parse_args()
    tasks, seeds = (QUICK, 1) if options.quick else (list(TASKS), options.seeds)
    made = {task: [exported(options, task, seed) for seed in range(seeds)] for task in tasks}
    figures = {task: figures_of(task, of_task) for task, of_task in made.items()}
    print("\n".join(table(figures)))
    largest = max(value for of_task in figures.values() for value in of_task["max_difference"])
    result = {
        "benchmark": "export",
        "machine": f"one thread of an {timing.machine(Target())['cpu']}",
        "figures": figures,
        "bars": {"max_difference": {"value": largest, "bar": TOLERANCE, "ok": largest <= TOLERANCE}},
    }
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


def exported(options: argparse.Namespace, task: str, seed: int) -> dict[str, Any]:
    """What ``ufo export`` says, now or before."""
    directory = options.out_runs / f"{task}-{seed}"
    kept = directory / "exported.json"
    if not kept.exists():
        run = place(options.runs, "learned routes", seed)
        kept.write_text(ufo("export", str(run), "--task", task, "--out", str(directory), "--int8", "--json"))
    return json.loads(kept.read_text())


def figures_of(task: str, made: list[dict[str, Any]]) -> dict[str, list[float]]:
    """By seed."""
    int8, key = [one["int8"] for one in made], f"{task}/{task}/{METRICS[task]}"
    return {
        "max_difference": [one["max_difference"] for one in made],
        "rank_inversion": [one["rank_inversion"] for one in made],
        "before": [one["before"][key] for one in int8],
        "after": [one["after"][key] for one in int8],
        **{f"ms_{name}": [one["ms"][name] for one in int8] for name in ("torch", "fp32", "int8")},
        **{f"mb_{name}": [one["bytes"][name] / 1e6 for one in int8] for name in ("fp32", "int8")},
    }


def table(figures: dict[str, dict[str, list[float]]]) -> Iterator[str]:
    """Markdown: means over seeds, of the difference the largest."""
    yield "| task | largest difference | MB, fp32 -> int8 | ms: torch, fp32, int8 | metric, fp32 -> int8 (seeds) |"
    yield "|---|---|---|---|---|"
    for task, found in figures.items():
        mean = {name: float(np.mean(values)) for name, values in found.items()}
        change = np.subtract(found["after"], found["before"])
        yield (
            f"| {task}, {METRICS[task]} | {max(found['max_difference']):.1e} | {mean['mb_fp32']:.2f} -> "
            f"{mean['mb_int8']:.2f} | {mean['ms_torch']:.2f}, {mean['ms_fp32']:.2f}, {mean['ms_int8']:.2f} | "
            f"{mean['before']:.4f} -> {mean['after']:.4f} ({change.min():+.4f} .. {change.max():+.4f}) |"
        )


if __name__ == "__main__":
    main()
