"""What lies behind a benchmark's metric, as plain values: curves, distributions, confusions, and which images to show.

What a protocol's outcomes hold decides what is shown of it. Ties are broken as in the protocols: pessimistically.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ufo_ds.evaluation import roc
from ufo_ds.evaluation.outcomes import Outcomes

Arrays = Mapping[str, np.ndarray]
Values = dict[str, Any]

_BINS = 30
_POINTS = 60  # of a curve
_RANKS = 20  # of a CMC
_MATRIX = 30  # classes up to which all confusions are shown
_CONFUSED = 8  # pairs of classes


def of_benchmark(found: Outcomes, names: Mapping[int, str], lists: int) -> Values:
    """
    Args:
        names: of the classes, by label; of those that are known.
        lists: rank lists, and pairs or images of each kind, to be shown.
    """
    arrays = found.arrays
    values: Values = {}
    if "first_rank" in arrays:
        values["cmc"] = cmc(arrays)
    if found.protocol == "retrieval":
        values["average_precisions"] = histogram({"queries": arrays["average_precision"]}, 0.0, 1.0, 20)
    if "shown" in arrays:
        values["rank_lists"] = rank_lists(arrays, lists)
    if found.protocol == "verification":
        same = arrays["same"].astype(bool)
        values["roc"] = accept_rates(roc.impostors_above(arrays["similarity"], same), int((~same).sum()))
        pairs = {"same": arrays["similarity"][same], "different": arrays["similarity"][~same]}
        values["similarities"] = histogram(pairs, *_range(arrays["similarity"]), _BINS)
        values["hardest"] = hardest(arrays, lists)
    if found.protocol == "templates":
        values["tar"] = accept_rates(arrays["impostors_above"], int(arrays["impostors"][0]), roc.RESOLVED)
    if found.protocol == "classification":
        values |= confusions(arrays, names)
        values["mistakes"] = mistakes(arrays, names, lists)
    if found.protocol == "attributes":
        values["attributes"] = attributes(arrays["right"], arrays["target"], names)
    if found.protocol == "one_shot":
        values["episodes"] = {"count": len(arrays["right"]), "ways": int(arrays["ways"].flat[0])}
    return values


def cmc(arrays: Arrays) -> Values:
    """Cumulated match characteristic: the share of queries whose first right image is at rank k or before."""
    first_rank = arrays["first_rank"].astype(float)
    if "relevant" in arrays:
        first_rank[arrays["relevant"] == 0] = np.inf
    last = max(_RANKS, int(arrays["at"].max())) if "at" in arrays else _RANKS
    ranks = np.unique(np.geomspace(1, last, _POINTS).round().astype(int)) if last > _RANKS else np.arange(1, last + 1)
    return {"rank": ranks.tolist(), "share": [float(np.mean(first_rank <= rank)) for rank in ranks]}


def histogram(series: Mapping[str, np.ndarray], low: float, high: float, bins: int) -> Values:
    """Of each series the share of its values in each of equal bins; values that are no number are left out."""
    edges = np.linspace(low, high, bins + 1)
    shares = {}
    for name, values in series.items():
        numbers = np.clip(values[np.isfinite(values)], low, high)
        shares[name] = (np.histogram(numbers, edges)[0] / max(1, len(values))).tolist()
    return {"edges": edges.tolist(), "shares": shares}


def _range(values: np.ndarray) -> tuple[float, float]:
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
    return (low, high) if high > low else (low, low + 1.0)


def accept_rates(impostors_above: np.ndarray, impostors: int, least: int = 1) -> Values:
    """True accept rate over false accept rate, from ``least`` false accepts on."""
    far, tar = roc.points(impostors_above, impostors, _POINTS)
    shown = far * impostors > least - 0.5
    return {"far": far[shown].tolist(), "tar": tar[shown].tolist()}


def rank_lists(arrays: Arrays, count: int) -> list[Values]:
    """Of the queries that the protocol chose to show, the worst and then some evenly from the others.

    Positions are those of the query and gallery shards; the score is the average precision or the first right rank.
    """
    row_of = {int(query): row for row, query in enumerate(arrays["query"])}
    by_precision = "average_precision" in arrays
    found = []
    for query, top, right in zip(arrays["shown"], arrays["shown_top"], arrays["shown_right"], strict=True):
        row = row_of.get(int(query))
        if row is None:
            continue
        filled = top >= 0
        found.append({
            "query": int(query),
            "top": top[filled].tolist(),
            "right": right[filled].astype(bool).tolist(),
            "relevant": int(arrays["relevant"][row]),
            "first_rank": int(arrays["first_rank"][row]),
            "average_precision": float(arrays["average_precision"][row]) if by_precision else None,
        })  # fmt: skip
    found.sort(key=lambda v: (v["average_precision"] if by_precision else -v["first_rank"], v["query"]))
    return _some(found, count)


def _some(found: list[Values], count: int) -> list[Values]:
    """A quarter of ``count`` from the front, the others evenly from what follows, up to the last."""
    if len(found) <= count:
        return found
    front = (count + 3) // 4
    rest = found[front:]
    return found[:front] + [rest[i] for i in np.linspace(0, len(rest) - 1, count - front).round().astype(int)]


def hardest(arrays: Arrays, count: int) -> Values:
    """The different pairs that look most alike, and the same ones that look least alike."""
    same, similarity = arrays["same"].astype(bool), arrays["similarity"]

    def chosen(of: np.ndarray, sign: int) -> list[Values]:
        rows = np.flatnonzero(of & np.isfinite(similarity))
        rows = rows[np.argsort(sign * similarity[rows], kind="stable")][:count]
        return [
            {"first": int(arrays["first"][r]), "second": int(arrays["second"][r]), "similarity": float(similarity[r])}
            for r in rows
        ]

    return {"different": chosen(~same, -1), "same": chosen(same, 1)}


def confusions(arrays: Arrays, names: Mapping[int, str]) -> Values:
    """The whole matrix where there are few classes, and the pairs of classes most often confused."""
    label, predicted = arrays["label"].astype(int), arrays["predicted"].astype(int)
    wrong = label != predicted
    pairs, counts = np.unique(np.stack([label[wrong], predicted[wrong]]), axis=1, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:_CONFUSED]
    of_class = np.bincount(label)
    values: Values = {
        "confused": [
            {
                "label": _name(names, a),
                "predicted": _name(names, b),
                "count": int(count),
                "of": int(of_class[a]),
            }
            for (a, b), count in zip(pairs[:, order].T, counts[order], strict=True)
        ]
    }
    present = np.unique(np.concatenate([label, predicted]))
    if len(present) <= _MATRIX:
        matrix = np.zeros((len(present), len(present)), dtype=int)
        np.add.at(matrix, (np.searchsorted(present, label), np.searchsorted(present, predicted)), 1)
        values["confusion"] = {"classes": [_name(names, c) for c in present], "counts": matrix.tolist()}
    return values


def mistakes(arrays: Arrays, names: Mapping[int, str], count: int) -> list[Values]:
    """Images that were taken for something else, those first whose right class ranked lowest."""
    label, predicted = arrays["label"].astype(int), arrays["predicted"].astype(int)
    rank = arrays["rank"].astype(int)
    rows = np.flatnonzero(label != predicted)
    rows = rows[np.argsort(-rank[rows], kind="stable")][:count]
    return [
        {
            "image": int(r),
            "label": _name(names, label[r]),
            "predicted": _name(names, predicted[r]),
            "rank": int(rank[r]),
        }
        for r in rows
    ]


def _name(names: Mapping[int, str], label: int) -> str:
    return names.get(int(label), f"class {label}")


def attributes(right: np.ndarray, target: np.ndarray, names: Mapping[int, str]) -> list[Values]:
    """Of each attribute how many images have it, and the shares of those with and without it that are told rightly."""
    right, target = right.astype(bool), target.astype(bool)
    return [
        {
            "attribute": names.get(a, f"attribute {a}"),
            "positive": int(target[:, a].sum()),
            "negative": int((~target[:, a]).sum()),
            "right_of_positive": _share(right[:, a], target[:, a]),
            "right_of_negative": _share(right[:, a], ~target[:, a]),
        }
        for a in range(target.shape[1])
    ]


def _share(right: np.ndarray, of: np.ndarray) -> float | None:
    return float(right[of].mean()) if of.any() else None
