"""A report as one HTML page that needs nothing else: no network, no script, no other file."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from ufo_ds import __version__
from ufo_ds.reporting import charts
from ufo_ds.reporting.charts import Axis, Series
from ufo_ds.reporting.figures import AllPictures, Values

# What a protocol does, and what its items are.
PROTOCOLS = {
    "classification": ("Classification", "images", "The share of images whose right class scores highest."),
    "attributes": ("Attributes", "images", "Each image has or has not each of several attributes."),
    "retrieval": (
        "Retrieval", "queries",
        "Each query ranks the gallery by similarity; images of its own identity from its own camera do not count.",
    ),
    "recall": ("Retrieval", "queries", "Each query ranks all images; is its own identity among the first k?"),
    "random_gallery": (
        "Retrieval", "queries", "One image of each identity, drawn at random, is the gallery; averaged over ten draws.",
    ),
    "verification": (
        "Verification", "pairs",
        "Are two images of the same identity? Each fold's threshold is chosen on the other folds.",
    ),
    "templates": ("Verification of templates", "pairs", "Are two sets of images of the same identity?"),
    "identification": ("Identification", "probes", "Each probe ranks the identities of the gallery."),
    "one_shot": ("One-shot classification", "episodes", "Which of several new classes, each shown once, is it?"),
}  # fmt: skip
_METRICS = {"top1": "top-1", "top5": "top-5", "rank1": "rank-1", "rank5": "rank-5", "rank10": "rank-10",
            "auc": "AUC", "eer": "EER", "f1": "F1", "accuracy_std": "accuracy, std of folds",
            "mean_per_class": "mean per class"}  # fmt: skip
_UNITS = {"embed": "Embedding", "norm": "Norms", "attn": "Attention", "ffn": "FFN"}
_NO_SHARES = ("threshold",)  # metrics that are no part of one

FORMS: dict[str, Callable[[Any], str]] = {
    "percent": lambda v: f"{100 * v:.1f}",
    "percent2": lambda v: f"{100 * v:.2f}",
    "signed": lambda v: f"{100 * v:+.1f}".replace("-", "\N{MINUS SIGN}"),
    "count": lambda v: f"{v:,}",
    "decimals": lambda v: f"{v:.3f}",
    "millions": lambda v: f"{v / 1e6:,.2f}" if v >= 1e5 else f"{v / 1e6:.2g}",
    "billions": lambda v: f"{v / 1e9:,.3g}" if v < 1e12 else f"{v / 1e9:,.0f}",
    "text": str,
}


@dataclass
class Chart:
    title: str
    svg: Markup
    legend: Sequence[Series] = ()
    wide: bool = False  # of a width of its own


def render(figures: Values, pictures: AllPictures) -> str:
    """The page of ``figures.of_runs``; pictures are read again from the benchmarks' shards."""
    environment = Environment(
        loader=PackageLoader("ufo_ds.reporting", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.globals |= {"charts": charts, "zip": zip, "enumerate": enumerate}
    return environment.get_template("page.html.jinja").render(
        runs=figures["runs"],
        benchmarks=figures["benchmarks"],
        several=len(figures["runs"]) > 1,
        letters=_letters(len(figures["runs"])),
        show=_Shown(figures),
        metric=metric_name,
        metric_form=lambda name: "decimals" if name in _NO_SHARES else "percent2",
        protocols=PROTOCOLS,
        pictures=pictures,
        date=lambda text: f"{datetime.fromisoformat(text):%-d %B %Y}",
        strip=_strip,
        best=_best,
        course=_course(figures),
        training=_training(figures),
        behind=lambda key: _behind(figures["runs"], figures["benchmarks"][key]),
        all_own=[_all_own(run["routes"]) for run in figures["runs"]],
        maps=[_maps(run["routes"]) for run in figures["runs"]],
        route_courses=[_route_courses(run["routes"]) for run in figures["runs"]],
        figures_json=as_json(figures),
        version=__version__,
    )


def as_json(figures: Values) -> Markup:
    """JSON that may stand inside a script element."""
    return Markup(json.dumps(figures).replace("<", "\\u003c"))


def metric_name(name: str) -> str:
    head, at, rate = name.partition("@")
    if at and "=" in rate:
        kind, _, value = rate.partition("=")
        return f"{head.upper()} at {kind.upper()} {value}"
    return _METRICS.get(name, name.replace("_", " "))


class _Shown:
    """``show(form, *path)``: a figure as text, with the JSON pointer to it, so that what is shown can be checked."""

    def __init__(self, figures: Values):
        self.figures = figures

    def __call__(self, form: str, *path: str | int) -> Markup:
        value: Any = self.figures
        for part in path:
            value = value[part]
        pointer = "".join("/" + str(part).replace("~", "~0").replace("/", "~1") for part in path)
        text = "\N{EN DASH}" if value is None else FORMS[form](value)
        return Markup('<span data-figure="{}" data-form="{}">{}</span>').format(pointer, form, text)


def _letters(count: int) -> list[str]:
    return [chr(ord("A") + i) if count <= 26 else str(i + 1) for i in range(count)]


def _line(runs: Sequence[Values], run: int, kind: int, name: str, x: Sequence[float], y: Sequence[Any]) -> Series:
    """With one run colours tell kinds apart; with several they tell runs, and dashes kinds."""
    if len(runs) == 1:
        return Series(name, x, y, kind, kind // charts.COLOURS)
    return Series(f"{_letters(len(runs))[run]} {name}".strip(), x, y, run, kind)


def _strip(benchmark: Values) -> Markup:
    rows = [r and (r["value"], r["low"], r["high"], i) for i, r in enumerate(benchmark["runs"])]
    chance = next((r["chance"].get(benchmark["metric"]) for r in benchmark["runs"] if r), None)
    others = [float(entry["value"]) / 100 for entry in benchmark["published"].get(benchmark["metric"], [])]
    return charts.strip(rows, chance, others)


def _best(benchmark: Values) -> int | None:
    """Which of the figures published of the main metric is highest."""
    entries = benchmark["published"].get(benchmark["metric"], [])
    return max(range(len(entries)), key=lambda i: float(entries[i]["value"]), default=None)


def _course(figures: Values) -> list[Chart]:
    """Metrics over the evaluations of the runs, where there were several: of one run all, of several the main one."""
    runs, found = figures["runs"], []
    for key, benchmark in figures["benchmarks"].items():
        lines = []
        for number, result in enumerate(benchmark["runs"]):
            if not result or len(result["course"]["step"]) < 2:
                continue
            metrics = result["course"]["metrics"]
            names = [n for n in metrics if n not in _NO_SHARES and not n.endswith("_std") and n != "eer"]
            names.sort(key=lambda n: n != benchmark["metric"])
            for kind, name in enumerate(names[:4] if len(runs) == 1 else names[:1]):
                label = metric_name(name) if len(runs) == 1 else ""
                lines.append(_line(runs, number, kind, label, result["course"]["step"], metrics[name]))
        if lines:
            alone = len(runs) > 1 or len(lines) == 1
            title = benchmark["benchmark"] + (f", {metric_name(benchmark['metric'])}" if alone else "")
            svg = charts.line_chart(lines, Axis("step"), Axis(percent=True), f"course of {key}")
            found.append(Chart(title, svg, lines if len(lines) > 1 else ()))
    return found


def _training(figures: Values) -> list[Chart]:
    """Losses of every task, then what all tasks have in common."""
    runs, found = figures["runs"], []
    for task in dict.fromkeys(name for run in runs for name in run["tasks"]):
        lines = [
            _line(runs, number, kind, loss.replace("_", " "), run["training"]["step"], values)
            for number, run in enumerate(runs)
            for kind, (loss, values) in enumerate(run["training"]["tasks"].get(task, {}).items())
        ]
        if lines:
            svg = charts.line_chart(lines, Axis("step"), Axis(low=0.0), f"losses of {task}")
            alone = len(lines) == 1
            found.append(Chart(f"{task}, {lines[0].name}" if alone else task, svg, () if alone else lines))
    for key, title, low in [("loss", "Loss, all tasks", 0.0), ("learning_rate", "Learning rate", 0.0),
                            ("gradient_norm", "Norm of the gradient", 0.0),
                            ("images_per_second", "Images a second", 0.0)]:  # fmt: skip
        lines = [
            _line(runs, number, 0, "", run["training"]["step"], run["training"][key])
            for number, run in enumerate(runs)
            if key in run["training"]
        ]
        if lines:
            svg = charts.line_chart(lines, Axis("step"), Axis(low=low), title)
            found.append(Chart(title, svg, lines if len(runs) > 1 else ()))
    for group, inner, title in [("conflict", "cosine", "Gradient of a task and the others': cosine"),
                                ("rates", "tasks", "Rate of sampling")]:  # fmt: skip
        for number, run in enumerate(runs):
            course = run["training"][group]
            lines = [
                Series(n, course["step"], v, k, k // charts.COLOURS) for k, (n, v) in enumerate(course[inner].items())
            ]
            if lines:
                whose = "" if len(runs) == 1 else f" ({_letters(len(runs))[number]})"
                found.append(Chart(title + whose, charts.line_chart(lines, Axis("step"), Axis(), title), lines))
    return found


def _behind(runs: Sequence[Values], benchmark: Values) -> list[Chart]:
    """Curves, distributions and matrices of a benchmark: curves of all runs in one chart, the others one a run."""
    results, letters = benchmark["runs"], _letters(len(runs))
    charts_of: list[Chart] = []

    def curves(key: str, x_key: str, y_key: str, title: str, x: Axis, y: Axis) -> None:
        lines = [
            _line(runs, number, 0, "", r[key][x_key], r[key][y_key])
            for number, r in enumerate(results) if r and r.get(key, {}).get(x_key)
        ]  # fmt: skip
        if lines:
            charts_of.append(Chart(title, charts.line_chart(lines, x, y, title), lines if len(runs) > 1 else ()))

    share = Axis(high=1.0, percent=True)
    last = max((r["cmc"]["rank"][-1] for r in results if r and "cmc" in r), default=1)
    curves("cmc", "rank", "share", "Found at rank k or before", Axis("k", 1, last, log=last > 50), Axis(percent=True))
    for key, title in (
        ("roc", "True accept rate over false accept rate"),
        ("tar", "True accept rate over false accept rate"),
    ):
        curves(key, "far", "tar", title, Axis("false accept rate", log=True), share)
    precisions = [
        _line(runs, number, 0, "", r["average_precisions"]["edges"][1:], r["average_precisions"]["shares"]["queries"])
        for number, r in enumerate(results) if r and "average_precisions" in r
    ]  # fmt: skip
    if precisions:
        edges = next(r["average_precisions"]["edges"] for r in results if r and "average_precisions" in r)
        title = "Queries by average precision"
        svg = charts.histogram_chart(edges, precisions, Axis("average precision"), title)
        charts_of.append(Chart(title, svg, precisions if len(runs) > 1 else ()))
    for number, result in enumerate(results):
        whose = "" if len(runs) == 1 else f" ({letters[number]})"
        if result and "similarities" in result:
            edges = result["similarities"]["edges"]
            lines = [Series(n, edges[1:], v, k, k) for k, (n, v) in enumerate(result["similarities"]["shares"].items())]
            title = f"Pairs by similarity{whose}"
            svg = charts.histogram_chart(edges, lines, Axis("cosine similarity"), title)
            charts_of.append(Chart(title, svg, lines))
        if result and "confusion" in result:
            svg = charts.confusion_matrix(result["confusion"]["classes"], result["confusion"]["counts"])
            charts_of.append(Chart("Shown (rows), taken for (columns)" + whose, svg, wide=True))
    return charts_of


def _all_own(routes: Values) -> list[str]:
    """Units of which every task has its own copy in all layers: nothing to draw."""
    everyone = list(routes["of_tasks"].values())
    return [
        name for unit, name in _UNITS.items()
        if all(route == "own" for by_unit in everyone for route in by_unit[unit])
    ]  # fmt: skip


def _maps(routes: Values) -> list[Chart]:
    """A map for every unit in which tasks differ, or share in some layers."""
    found = []
    of_tasks = routes["of_tasks"]
    for unit in next(iter(of_tasks.values())):
        rows = {task: by_unit[unit] for task, by_unit in of_tasks.items()}
        if {route for layers in rows.values() for route in layers} not in ({"shared"}, {"own"}):

            def own(task: str, layer: int, unit: str = unit) -> charts.Number:
                course = routes["own"].get(task, {}).get(unit)
                return course[layer][-1] if course else None

            found.append(Chart(_UNITS[unit], charts.route_map(unit, rows, own), wide=True))
    return found


def _route_courses(routes: Values) -> list[Chart]:
    """How the probability of each own copy came about, a chart for each task; colours and dashes are units."""
    found = []
    for task, by_unit in routes["own"].items():
        lines = [
            Series(_UNITS[unit], routes["step"], values, kind, kind)
            for kind, (unit, layers) in enumerate(by_unit.items())
            for values in layers if any(value is not None for value in values)
        ]  # fmt: skip
        if lines:
            y = Axis(low=0.0, high=1.0, percent=True)
            legend = list({line.name: line for line in lines}.values())
            found.append(Chart(task, charts.line_chart(lines, Axis("step"), y, f"routes of {task}"), legend))
    return found
