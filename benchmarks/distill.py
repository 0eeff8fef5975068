"""Small students with a teacher against the same students without, on small public data sets.

    export OPEN_SMALL=data_shards/open_small/test      # made by: ufo shards open_small SOURCE data_shards/open_small
    python benchmarks/open_small.py --seeds 3          # the runs that the teachers are tasks of
    python benchmarks/distill.py --seeds 3

Of each run of ``open_small`` (arm "learned routes") one task is taken as the teacher for each kind of use:
classification, retrieval, verification. A student of less than a tenth of its parameters learns from it by ``ufo
distill`` as it is by default; the same student, with the same start, images, augmentation, order and steps, learns from
the labels alone by the recipe's losses. Those that are finished are not repeated, and one that was killed goes on.
Latency is of one image on one thread, teacher and student in turn. Prints the table as Markdown, and as its last line
one JSON object.
"""

import argparse
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from open_small import place
from subnets import METRICS, ufo

KINDS = {"clothing": "classification", "vehicles": "retrieval", "faces": "verification"}
ARMS = {
    "labels alone": ["--logits_weight", "0", "--feature_weight", "0", "--relation_weight", "0"],
    "distilled": [],
}
MOST = 0.1  # of the teacher's parameters


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/open_small"), help="where those of open_small.py live")
    parser.add_argument("--out_runs", type=Path, default=Path("runs/distill"), help="where the students go")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--student", default="resnet18")
    parser.add_argument("--width", default="0.125")
    parser.add_argument("--steps", default="1000")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="trainings at a time")
    parser.add_argument("--quick", action="store_true", help="a few steps of one seed: figures without a meaning")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    options = parser.parse_args()
    if options.quick:
        options.seeds, options.steps, options.out_runs = 1, "2", options.out_runs / "quick"
    jobs = [(seed, task, arm) for seed in range(options.seeds) for task in KINDS for arm in ARMS]
    with ThreadPoolExecutor(options.jobs) as pool:
        results = dict(zip(jobs, pool.map(lambda job: student(options, *job), jobs), strict=True))
    times = {task: latencies(options, task) for task in KINDS}
    figures = {task: figures_of(task, results, times[task], options.seeds) for task in KINDS}
    print("\n".join(table(figures)))
    result = {"benchmark": "distill", "figures": figures, "bars": bars(figures)}
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


def student(options: argparse.Namespace, seed: int, task: str, arm: str) -> dict:
    """What ``ufo distill`` says, kept beside the student."""
    out = place(options.out_runs, arm, seed, task)
    kept = out.with_suffix(".json")
    if not kept.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        text = ufo(
            "distill", str(place(options.runs, "learned routes", seed)), "--task", task, "--out", str(out),
            "--student", options.student, "--width", options.width, "--steps", options.steps, "--seed", str(seed),
            "--device", "cpu", "--json", "--cache", str(options.out_runs / "cache"), *ARMS[arm],
        )  # fmt: skip
        kept.write_text(text)
        print(f"{out.name}: {main_metric(json.loads(text), task):.3f}", flush=True)
    return json.loads(kept.read_text())


def main_metric(result: dict, task: str, whose: str = "metrics") -> float:
    return result[whose][f"{task}/{task}/{METRICS[task]}"]


def latencies(options: argparse.Namespace, task: str) -> dict[str, float]:
    """Milliseconds of one image."""
    from transformers import AutoModel, AutoModelForImageClassification
    from transformers.utils import logging

    from ufo_ds.model import hub, students  # noqa: F401  (they register their models)
    from ufo_ds.subnets import timing
    from ufo_ds.subnets.latency import Target
    from ufo_ds.subnets.task_model import open_model

    logging.set_verbosity_error()  # it reports the half of a file that the other class reads
    logging.disable_progress_bar()
    teacher = options.out_runs / f"teacher-{task}"
    if not teacher.exists():
        ufo("extract", str(place(options.runs, "learned routes", 0)), "--task", task, "--out", str(teacher))
    paths = [teacher, place(options.out_runs, "distilled", 0, task)]
    auto = AutoModelForImageClassification if KINDS[task] == "classification" else AutoModel
    target = Target(backend="torch", device="cpu", batch_size=1, threads=1, dtype="fp32")
    calls = timing.prepare([auto.from_pretrained(path) for path in paths], open_model(teacher).input, target)
    rounds = 3 if options.quick else 50
    return dict(zip(("teacher", "student"), 1e3 * timing.typical(timing.measure(calls, target, rounds)), strict=True))


def figures_of(task: str, results: dict, ms: dict[str, float], seeds: int) -> dict:
    of_arm = {arm: [main_metric(results[seed, task, arm], task) for seed in range(seeds)] for arm in ARMS}
    first = results[0, task, "distilled"]
    return {
        "kind": KINDS[task], "metric": METRICS[task], **of_arm,
        "teacher": [main_metric(results[seed, task, "distilled"], task, "teacher_metrics") for seed in range(seeds)],
        "parameters": first["parameters"], "teacher_parameters": first["teacher_parameters"],
        "megabytes": first["megabytes"], "teacher_megabytes": first["teacher_megabytes"],
        "ms": ms["student"], "teacher_ms": ms["teacher"],
    }  # fmt: skip


def table(figures: dict[str, dict]) -> Iterator[str]:
    """Markdown: means over seeds, with their range."""
    yield "| task, measure | labels alone | distilled | teacher | parameters | MB | ms an image |"
    yield "|---" * 7 + "|"
    for task, of in figures.items():
        cells = [_range(of[arm]) for arm in (*ARMS, "teacher")]
        cells += [
            f"{of['parameters'] / 1e6:.2f} M of {of['teacher_parameters'] / 1e6:.2f} M",
            f"{of['megabytes']:.2f} of {of['teacher_megabytes']:.2f}",
            f"{of['ms']:.2f} of {of['teacher_ms']:.2f}",
        ]
        yield f"| {task} ({of['kind']}), {of['metric']} | {' | '.join(cells)} |"


def _range(values: list[float]) -> str:
    return f"{np.mean(values):.3f} ({min(values):.3f} .. {max(values):.3f})"


def bars(figures: dict[str, dict]) -> dict[str, dict]:
    """By how many points a student with a teacher is ahead, and its size."""
    result = {}
    for of in figures.values():
        ahead = 100 * float(np.mean(of["distilled"]) - np.mean(of["labels alone"]))
        result[f"points_ahead_{of['kind']}"] = {"value": round(ahead, 2), "bar": 0.0, "ok": ahead > 0}
    share = max(of["parameters"] / of["teacher_parameters"] for of in figures.values())
    result["share_of_parameters"] = {"value": round(share, 4), "bar": MOST, "ok": share <= MOST}
    return result


if __name__ == "__main__":
    main()
