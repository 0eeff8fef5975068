"""One model for six tasks against a model for each, on six small public data sets (recipe ``open_small``).

    export OPEN_SMALL=data_shards/open_small/test      # made by: ufo shards open_small SOURCE data_shards/open_small
    python benchmarks/open_small.py --seeds 3

Trains every arm with every seed, one thread each and ``--jobs`` at a time, and compares them with ``ufo compare``'s
intervals: the arms with the single-task twins, the ablations with one path for all. All of a table see the same number
of samples of each task. Runs that are finished are not repeated, and one that was killed goes on. Prints the tables as
Markdown, and as its last line one JSON object.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from ufo_ds import compare

REPOSITORY = Path(__file__).parents[1]
SHARED = ["--model.experts", "[]", "--model.routes", "{}", "--model.branch_at", "null", "--optimizer.rules", "[]"]
TASKS = ("omniglot", "vehicles", "groceries", "faces", "clothing", "digits")
TWINS = "each task alone"
ARMS: dict[str, list[str]] = {  # what differs from the recipe
    "all shared": SHARED,
    "all own FFNs": [*SHARED, "--model.experts", "[ffn]"],
    "learned routes": [],
}
# At half the schedule, each against its first arm.
HALF = [*SHARED, "--schedule.steps", "1000"]
ABLATIONS: dict[str, list[str]] = {
    "half schedule": HALF,
    # One task a step: as many samples of each need as many times the steps.
    "half isomorphic": [*SHARED, "--data.batches", "isomorphic",
                        "--schedule.steps", "6000", "--schedule.warmup_steps", "360"],
    "half drop path 0.1": [*HALF, "--model.drop_path", "0.1"],
    "half drop path 0.2": [*HALF, "--model.drop_path", "0.2"],
}  # fmt: skip
# Chance, and floors without learning of features: nearest neighbours of 32x32 grey pixels; PCA + LDA fitted on train.
FLOORS = {
    "omniglot": (0.022, 0.130, 0.133),
    "vehicles": (0.048, 0.366, 0.484),
    "groceries": (0.060, 0.123, 0.269),
    "faces": (0.500, 0.825, 0.875),
    "clothing": (0.196, 0.347, None),
    "digits": (0.100, 0.761, None),
}
BARS = {"omniglot": 0.28, "vehicles": 0.72, "groceries": 0.38, "faces": 0.89, "clothing": 0.38, "digits": 0.92}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/open_small"), help="where the runs live")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="trainings at a time")
    parser.add_argument("--quick", action="store_true", help="a few steps of two arms, without figures")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    options = parser.parse_args()
    jobs = list(quick_trainings(options.runs) if options.quick else trainings(options.runs, options.seeds))
    with ThreadPoolExecutor(options.jobs) as pool:
        for done, (path, seconds) in enumerate(pool.map(train, jobs), start=1):
            print(f"[{done}/{len(jobs)}] {path.name}: {seconds}", flush=True)
    if options.quick:
        print(json.dumps({"benchmark": "open_small", "figures": {}, "bars": {}}))
        return
    found = figures(options.runs, [*ARMS, TWINS], against=TWINS)
    ablations = figures(options.runs, list(ABLATIONS), against="half schedule")
    print("\n".join([*table(found), "", *table(ablations)]))
    result = {"benchmark": "open_small", "figures": found | ablations, "bars": bars(found)}
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


def place(runs: Path, arm: str, seed: int, task: str | None = None) -> Path:
    return runs / "-".join([arm.replace(" ", "_"), *([task] if task else []), str(seed)])


def trainings(runs: Path, seeds: int) -> Iterator[tuple[Path, list[str]]]:
    """Run directory and arguments of every training: what is compared most first, seed by seed."""
    for seed in range(seeds):
        for task in TASKS:
            yield place(runs, TWINS, seed, task), [*SHARED, "--task", task, "--seed", str(seed)]
        for arm, arguments in ARMS.items():
            yield place(runs, arm, seed), [*arguments, "--seed", str(seed)]
    for seed in range(seeds):
        for arm, arguments in ABLATIONS.items():
            yield place(runs, arm, seed), [*arguments, "--seed", str(seed)]


def quick_trainings(runs: Path) -> Iterator[tuple[Path, list[str]]]:
    short = ["--schedule.steps", "12", "--schedule.warmup_steps", "2"]
    yield place(runs / "quick", "all shared", 0), [*SHARED, *short]
    yield (
        place(runs / "quick", "learned routes", 0),
        [*short, "--model.branch_at", "4", "--model.router.freeze_at", "8"],
    )


def train(job: tuple[Path, list[str]]) -> tuple[Path, str]:
    path, arguments = job
    path.parent.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable, str(REPOSITORY / "ufo_ds" / "train.py"),
        "--deepspeed", str(REPOSITORY / "ds_configs" / "autocast.json"),
        "--recipe", "open_small", "--run_dir", str(path), *arguments,
    ]  # fmt: skip
    output = path.with_name(f"{path.name}.log")
    with output.open("w") as log:
        done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise SystemExit(f"{path} failed: see {output}")
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    speeds = [line["images_per_second"] for line in lines if line["kind"] == "train"]
    return path, f"{np.median(speeds):.0f} images/s"


def figures(runs: Path, arms: list[str], against: str) -> dict[str, dict]:
    """Per arm and benchmark: the metric of every seed and the difference to the arm ``against``, with its interval."""
    read = {arm: compare.read_arm(f"{runs}/{arm.replace(' ', '_')}-*[0-9]") for arm in arms}
    found: dict[str, dict] = {}
    for arm, of_arm in read.items():
        found[arm] = {name.split("/")[0]: {"seeds": of_arm.main_metric(name)} for name in of_arm.benchmarks}
        if arm != against:
            for row in compare.compare(of_arm, read[against]):
                entry = found[arm].setdefault(row.name.split("/")[0], {})
                entry |= {"difference": row.difference.value, "interval": list(row.difference.interval)}
                entry |= {"verdict": row.verdict}
    return found


def table(found: dict[str, dict]) -> Iterator[str]:
    """Markdown: means over seeds, and the 95% interval of the difference where an arm has one."""
    yield "| task | chance | pixels | LDA | " + " | ".join(found) + " |"
    yield "|---" * (4 + len(found)) + "|"
    for task in TASKS:
        floors = ["" if value is None else f"{value:.3f}" for value in FLOORS[task]]
        cells = []
        for of_arm in found.values():
            text = f"{np.mean(of_arm[task]['seeds']):.3f}"
            if "interval" in of_arm[task]:
                low, high = of_arm[task]["interval"]
                text += f" ({100 * low:+.1f} .. {100 * high:+.1f})"
            cells.append(text)
        yield f"| {task} | " + " | ".join(floors + cells) + " |"


def bars(found: dict[str, dict]) -> dict[str, dict]:
    joint, twins = found["learned routes"], found[TWINS]
    result = {}
    for task, bar in BARS.items():
        value = float(np.mean(joint[task]["seeds"]))
        result[task] = {"value": round(value, 4), "bar": bar, "ok": value >= bar}
    behind = max(float(np.mean(twins[task]["seeds"]) - np.mean(joint[task]["seeds"])) for task in TASKS)
    result["points_behind_a_twin"] = {"value": round(100 * behind, 2), "bar": 5.0, "ok": behind <= 0.05}
    return result


if __name__ == "__main__":
    main()
