"""Small students with a teacher against the same students without, on small public data sets.

    export OPEN_SMALL=data_shards/open_small/test      # made by: ufo shards open_small SOURCE data_shards/open_small
    python benchmarks/open_small.py --seeds 3          # the runs that the teachers are tasks of
    python benchmarks/distill.py --seeds 3

Of each run of ``open_small`` (arm "learned routes") one task is taken as the teacher for each kind of use:
classification, retrieval, verification. A student of less than a tenth of its parameters learns from it by ``ufo
distill`` as it is by default; the same student, with the same start, images, augmentation and steps, learns from the
labels alone by the recipe's losses. Both on all images that the teacher was trained on, and on a quarter of them, as
when the model is at hand and its training data is not. Those that are finished are not repeated, and one that was
killed goes on. Latency is of one image on one thread, teacher and student in turn. Prints the table as Markdown, and as
its last line one JSON object.
"""

import argparse
import json
import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from open_small import place
from subnets import ufo

from ufo_ds import recipe_file
from ufo_ds.data.image_files import open_images

KINDS = {"clothing": "classification", "vehicles": "retrieval", "faces": "verification"}
METRICS = {"clothing": ["top1"], "vehicles": ["mAP"], "faces": ["accuracy", "auc"]}
ARMS = {
    "labels alone": ["--label_weight", "1", "--logits_weight", "0", "--feature_weight", "0", "--relation_weight", "0"],
    "distilled": [],
}
SHARES = {"all": 1.0, "a quarter": 0.25}  # of the images
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
    jobs = [(seed, task, share, arm) for seed in range(options.seeds) for task in KINDS for share in SHARES
            for arm in ARMS]  # fmt: skip
    for seed, task, share in {job[:3] for job in jobs if SHARES[job[2]] < 1}:
        folder = part_of(options, seed, task, share)
        if not folder.exists():
            write_part(folder, place(options.runs, "learned routes", seed), task, SHARES[share], seed)
    with ThreadPoolExecutor(options.jobs) as pool:
        results = dict(zip(jobs, pool.map(lambda job: student(options, *job), jobs), strict=True))
    figures = {
        f"{task}, {metric}, {share}": figures_of(task, share, metric, results, options.seeds)
        for task in KINDS for metric in METRICS[task] for share in SHARES
    }  # fmt: skip
    sizes = {task: sizes_of(results[0, task, "all", "distilled"], latencies(options, task)) for task in KINDS}
    print("\n".join(table(figures, sizes)))
    result = {"benchmark": "distill", "figures": figures, "sizes": sizes, "bars": bars(figures, sizes)}
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


def student(options: argparse.Namespace, seed: int, task: str, share: str, arm: str) -> dict:
    """What ``ufo distill`` says, kept beside the student."""
    out = place(options.out_runs, f"{arm} {share}", seed, task)
    kept = out.with_suffix(".json")
    if not kept.exists():
        data = [] if SHARES[share] == 1 else ["--data", str(part_of(options, seed, task, share))]
        text = ufo(
            "distill", str(place(options.runs, "learned routes", seed)), "--task", task, *data, "--out", str(out),
            "--student", options.student, "--width", options.width, "--steps", options.steps, "--seed", str(seed),
            "--device", "cpu", "--json", "--cache", str(options.out_runs / "cache"), *ARMS[arm],
        )  # fmt: skip
        kept.write_text(text)
        print(f"{out.name}: {value_of(json.loads(text), task, METRICS[task][0]):.3f}", flush=True)
    return json.loads(kept.read_text())


def part_of(options: argparse.Namespace, seed: int, task: str, share: str) -> Path:
    return place(options.out_runs, f"images {share}", seed, task)


def write_part(folder: Path, run: Path, task: str, share: float, seed: int) -> None:
    """A folder of some of the task's training images: of each class, or all of some identities."""
    recipe = recipe_file.load(str(run / "recipe.yaml"))
    images = open_images(next(of.train[0].shards for of in recipe.tasks if of.name == task))
    labels, generator = np.array(images.labels), np.random.default_rng(seed)
    names = generator.permutation(np.unique(labels))
    if KINDS[task] == "classification":
        groups = [generator.permutation(np.flatnonzero(labels == name)) for name in names]
        chosen = np.concatenate([group[: math.ceil(share * len(group))] for group in groups])
    else:
        chosen = np.flatnonzero(np.isin(labels, names[: math.ceil(share * len(names))]))
    unfinished = folder.with_suffix(".partial")
    for i in chosen.tolist():
        place_of_class = unfinished / labels[i]
        place_of_class.mkdir(parents=True, exist_ok=True)
        (place_of_class / f"{i:05}.png").write_bytes(images.read(i))
    unfinished.rename(folder)


def value_of(result: dict, task: str, metric: str, whose: str = "metrics") -> float:
    return result[whose][f"{task}/{task}/{metric}"]


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
    paths = [teacher, place(options.out_runs, "distilled all", 0, task)]
    auto = AutoModelForImageClassification if KINDS[task] == "classification" else AutoModel
    target = Target(backend="torch", device="cpu", batch_size=1, threads=1, dtype="fp32")
    calls = timing.prepare([auto.from_pretrained(path) for path in paths], open_model(teacher).input, target)
    rounds = 3 if options.quick else 50
    return dict(zip(("teacher", "student"), 1e3 * timing.typical(timing.measure(calls, target, rounds)), strict=True))


def sizes_of(result: dict, ms: dict[str, float]) -> dict[str, dict[str, float]]:
    prefix = {"student": "", "teacher": "teacher_"}
    return {
        who: {"parameters": result[f"{before}parameters"], "megabytes": result[f"{before}megabytes"], "ms": ms[who]}
        for who, before in prefix.items()
    }


def figures_of(task: str, share: str, metric: str, results: dict, seeds: int) -> dict:
    of_arm = {arm: [results[seed, task, share, arm] for seed in range(seeds)] for arm in ARMS}
    return {
        "task": task, "kind": KINDS[task], "metric": metric, "images": [r["images"] for r in of_arm["distilled"]],
        **{arm: [value_of(result, task, metric) for result in of] for arm, of in of_arm.items()},
        "teacher": [value_of(result, task, metric, "teacher_metrics") for result in of_arm["distilled"]],
    }  # fmt: skip


def table(figures: dict[str, dict], sizes: dict[str, dict]) -> Iterator[str]:
    """Markdown: means over seeds, with their range; and what student and teacher need."""
    yield "| task, metric | images | labels alone | distilled | teacher |"
    yield "|---" * 5 + "|"
    for of in figures.values():
        cells = [_range(of[arm]) for arm in (*ARMS, "teacher")]
        yield f"| {of['task']} ({of['kind']}), {of['metric']} | {max(of['images']):,} | {' | '.join(cells)} |"
    yield ""
    yield "| | parameters | MB | ms an image |"
    yield "|---" * 4 + "|"
    for task, of in sizes.items():
        student, teacher = of["student"], of["teacher"]
        cells = [f"{student[name]:.3g} of {teacher[name]:.3g}" for name in ("megabytes", "ms")]
        share = f"{student['parameters']:,} of {teacher['parameters']:,}"
        yield f"| {task} | {share} | {' | '.join(cells)} |"


def _range(values: list[float]) -> str:
    return f"{np.mean(values):.3f} ({min(values):.3f} .. {max(values):.3f})"


def bars(figures: dict[str, dict], sizes: dict[str, dict]) -> dict[str, dict]:
    """By how many points a student with a teacher is ahead, and its size."""
    result = {}
    for name, of in figures.items():
        ahead = 100 * float(np.mean(of["distilled"]) - np.mean(of["labels alone"]))
        result[f"points_ahead, {name}"] = {"value": round(ahead, 2), "bar": 0.0, "ok": ahead > 0}
    share = max(of["student"]["parameters"] / of["teacher"]["parameters"] for of in sizes.values())
    result["share_of_parameters"] = {"value": round(share, 4), "bar": MOST, "ok": share <= MOST}
    return result


if __name__ == "__main__":
    main()
