"""What a search has found: a table, JSON, specs and a picture."""

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import norm

from ufo_ds import checkpoint
from ufo_ds.errors import UserError
from ufo_ds.subnets import search
from ufo_ds.subnets.search import Known, Space
from ufo_ds.subnets.search_journal import Record
from ufo_ds.subnets.search_space import COSTS, ElasticSpace

LEVEL = 0.9  # of intervals


def report(
    run: Path, out: Path, space: ElasticSpace, searched: Space, known: Known, records: Sequence[Record],
    limits: Mapping[str, float], seed: int, as_json: bool,
) -> None:  # fmt: skip
    """Write all of it into ``out``, and print the front.

    Raises:
        UserError: it cannot be written.
    """
    front = search.front(searched, known, seed)
    values = _values(space, front, records)
    try:
        (out / "front").mkdir(parents=True, exist_ok=True)
        for row in front.levels_NG:
            for spec in space.specs(row):
                checkpoint.write_text(out / "front" / f"{spec.name}.json", spec.to_json() + "\n")
        checkpoint.write_text(out / "front.json", json.dumps(values, indent=1) + "\n")
        _draw(out / "front.png", space, searched, known, front, values["accuracy"], limits, seed)
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}: choose one you can write to") from None
    if as_json:
        print(json.dumps(values))
        return
    print("\n".join(_table(values)))
    best = values["front"][-1]["subnets"]
    last = [word for subnet in best for word in ("--task", subnet["task"], "--spec", str(out / subnet["spec"]))]
    found = f"{len(front)} on the front of {len(records)} evaluated"
    if len(best) > 1:  # each step evaluates a subnet of every task, and any of these go together
        found = f"{len(front)} combinations on the front, of {len(records)} evaluated subnets of each task"
    print(f"{found}, drawn in {out / 'front.png'}; the last as a model:")
    print(shlex.join(["ufo", "extract", str(run), *last, "--out", "DIR"]))


def _values(space: ElasticSpace, front: Known, records: Sequence[Record]) -> dict[str, Any]:
    """Of ``front.json``."""
    first = records[0].subnets
    found = {s.spec.name: s for record in records for s in record.subnets}
    members = []
    for row, accuracy, costs_A in zip(front.levels_NG, front.accuracy_N, front.costs_NA, strict=True):
        subnets = []
        for spec, whole in zip(space.specs(row), first, strict=True):
            mine = found[spec.name]
            subnets.append({
                "task": spec.task, "name": spec.name, "spec": f"front/{spec.name}.json", "value": mine.value,
                "of_whole": mine.value / whole.value if whole.value else None, "metrics": mine.metrics,
            })  # fmt: skip
        costs = dict(zip(space.cost_names, costs_A.tolist(), strict=True))
        members.append({"accuracy": float(accuracy), "costs": costs, "subnets": subnets})
    single = f"{first[0].metric} of {first[0].spec.task}"
    return {
        "accuracy": single if len(first) == 1 else "mean of metrics relative to whole paths",
        "metrics": {s.spec.task: s.metric for s in first},
        "whole": {
            "values": {s.spec.task: s.value for s in first},
            "costs": records[0].costs,
        },
        "evaluated": len(records),
        "front": members,
    }


def in_units(name: str, value: float) -> str:
    """A cost for people."""
    if name == "latency":
        return f"{value:.2f} ms"
    scale, letter = next((s for s in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if value >= s[0]), (1.0, ""))
    return f"{value / scale:.3g} {letter}"


def _table(values: dict[str, Any]) -> Iterator[str]:
    """A line for the whole, and one for each on the front."""
    tasks = list(values["metrics"])
    costs = [name for name in COSTS if name in values["whole"]["costs"]]
    header = [f"{task} {metric}" for task, metric in values["metrics"].items()]
    header = [*header, "of whole", *costs, "subnet" if len(tasks) == 1 else "subnets"]
    whole = values["whole"]
    rows = [header, [
        *(f"{whole['values'][task]:.4f}" for task in tasks), "",
        *(in_units(name, whole["costs"][name]) for name in costs), "the whole" if len(tasks) == 1 else "all whole",
    ]]  # fmt: skip
    for member in values["front"]:
        of_whole = member["accuracy"] if len(tasks) > 1 else member["subnets"][0]["of_whole"]
        rows.append([
            *(f"{subnet['value']:.4f}" for subnet in member["subnets"]), "" if of_whole is None else f"{of_whole:.1%}",
            *(in_units(name, member["costs"][name]) for name in costs),
            " ".join(subnet["name"] for subnet in member["subnets"]),
        ])  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(header) - 1)]
    for row in rows:
        yield "  ".join([*(f"{text:>{width}}" for text, width in zip(row, widths, strict=False)), row[-1]])


def _draw(
    path: Path, space: ElasticSpace, searched: Space, known: Known, front: Known, label: str,
    limits: Mapping[str, float], seed: int,
) -> None:  # fmt: skip
    from ufo_ds.subnets import front_chart  # matplotlib takes a second to import
    from ufo_ds.subnets.front_chart import Points

    objectives = list(searched.objectives)
    model = search.Model(searched, known)
    levels_NG = model.front(seed)
    mean_N, std_N = model.accuracy(levels_NG) if len(levels_NG) else (np.zeros(0), np.zeros(0))
    costs_NA = searched.costs(levels_NG) if len(levels_NG) else np.zeros((0, len(space.cost_names)))
    front_chart.draw(
        path,
        [space.cost_names[i] for i in objectives],
        dict(limits),
        label,
        Points(known.accuracy_N, known.costs_NA[:, objectives]),
        Points(front.accuracy_N, front.costs_NA[:, objectives]),
        Points(mean_N, costs_NA[:, objectives], float(norm.ppf(0.5 + LEVEL / 2)) * std_N),
    )
