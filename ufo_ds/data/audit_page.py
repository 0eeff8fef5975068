"""An audit as a page: one HTML file with the pictures of all pairs in it."""

import base64
import html
import io
from collections.abc import Iterator

from PIL import Image

from ufo_ds.data.audit import Audit, BenchmarkPart, Pair, TrainPart, counts_of
from ufo_ds.data.shards import DEFAULT_CACHE, ShardSet
from ufo_ds.data.transforms import decode
from ufo_ds.recipe import ShardCache

_SHOWN = 60  # pairs of a training set with a part of a benchmark, the nearest ones; each test image once
_SIDE = 160  # of a picture, in pixels

_STYLE = """
body { font: 15px/1.45 system-ui, "DejaVu Sans", sans-serif; color: #1a202c; max-width: 1100px; margin: 2em auto;
  padding: 0 1.5em; }
h1 { font-size: 1.6em; margin-bottom: 0.1em; }
h2 { font-size: 1.1em; margin: 2em 0 0.3em; border-top: 1px solid #cbd5e0; padding-top: 0.8em; break-after: avoid; }
p, figcaption { color: #4a5568; }
table { border-collapse: collapse; margin: 1em 0; }
th, td { text-align: left; padding: 0.25em 1.2em 0.25em 0; border-bottom: 1px solid #e2e8f0; }
th { font-weight: 600; } td.n, th.n { text-align: right; }
.pairs { display: flex; flex-wrap: wrap; gap: 14px; }
figure { margin: 0; padding: 8px; border: 1px solid #e2e8f0; border-radius: 6px; break-inside: avoid; }
.two { display: flex; gap: 6px; height: 160px; align-items: center; }
.two img { max-width: 160px; max-height: 160px; border: 1px solid #e2e8f0; }
figcaption { font-size: 0.8em; max-width: 330px; overflow-wrap: anywhere; }
@media print { body { margin: 0; max-width: none; font-size: 11px; } }
"""


def page(audit: Audit, cache: ShardCache = DEFAULT_CACHE) -> str:
    """A complete HTML document; the images are read again from their shards.

    Raises:
        UserError: shards that are missing or damaged.
    """
    return "\n".join(_lines(audit, cache)) + "\n"


def _lines(audit: Audit, cache: ShardCache) -> Iterator[str]:
    title = f"Training images in the tests of {html.escape(audit.recipe)}"
    yield f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
    yield f"<style>{_STYLE}</style></head><body>"
    yield f"<h1>{title}</h1>"
    overlaps = list(audit.overlaps())
    found = [entry for entry in overlaps if entry[2]]
    yield (
        f"<p>{len(audit.train)} training sets against {len(audit.test)} sets of test images: "
        f"{len(found)} of {len(overlaps)} combinations share images. <b>Exact</b>: the same file or the same pixels. "
        f"<b>Near</b>: probably copies that were encoded again or resized. Counted are test images.</p>"
    )
    if found:
        yield from _table(found)
    shards: dict[str, ShardSet] = {}
    for train, test, pairs in found:
        for path in (train.shards, test.shards):
            shards.setdefault(path, ShardSet.open(path, cache))
        yield from _section(train, test, pairs, shards[train.shards], shards[test.shards])
    if clean := [entry for entry in overlaps if not entry[2]]:  # too many to read where there are many tasks
        yield f"<h2>Without overlap</h2><details><summary>{len(clean)} combinations</summary>"
        yield from _table(clean)
        yield "</details>"
    yield "</body></html>"


def _table(overlaps: list[tuple[TrainPart, BenchmarkPart, list[Pair]]]) -> Iterator[str]:
    yield '<table><tr><th>training set</th><th>benchmark</th><th></th><th class="n">images</th>'
    yield '<th class="n">exact</th><th class="n">near</th></tr>'
    for train, test, pairs in overlaps:
        exact, near = counts_of(pairs)
        yield (
            f"<tr><td>{_name(train)}</td><td>{html.escape(test.benchmark)}</td>"
            f'<td>{_part(test)}</td><td class="n">{test.samples}</td><td class="n">{exact}</td>'
            f'<td class="n">{near}</td></tr>'
        )
    yield "</table>"


def _section(
    train: TrainPart, test: BenchmarkPart, pairs: list[Pair], of_train: ShardSet, of_test: ShardSet
) -> Iterator[str]:
    nearest: dict[int, Pair] = {}
    for pair in pairs:
        nearest.setdefault(pair.index, pair)
    shown = list(nearest.values())[:_SHOWN]
    yield f"<h2>{_name(train)} and {html.escape(test.benchmark)} {_part(test)}</h2>"
    exact, near = counts_of(pairs)
    more = f"; the {len(shown)} nearest are shown" if len(shown) < len(nearest) else ""
    yield f"<p>{exact} exact, {near} near of {test.samples} test images{more}. Left training, right test.</p>"
    yield '<div class="pairs">'
    for pair in shown:
        kind = "near" if pair.kind == "near" else f"same {pair.kind}"
        how = f", {pair.bits} bits, difference {pair.difference:.3f}" if pair.kind == "near" else ""
        labels = [s.classes[s.labels[i]] for s, i in ((of_train, pair.train_index), (of_test, pair.index))]
        left, right = _picture(of_train, pair.train_index), _picture(of_test, pair.index)
        yield (
            f'<figure><div class="two">{left}{right}</div><figcaption><b>{kind}</b>{how}<br>'
            f"{pair.train_index} ({html.escape(labels[0])}) – {pair.index} ({html.escape(labels[1])})"
            "</figcaption></figure>"
        )
    yield "</div>"


def _name(train: TrainPart) -> str:
    return f"{html.escape(train.task)}: {html.escape(train.shards)}"


def _part(test: BenchmarkPart) -> str:
    return "" if test.part == "shards" else test.part


def _picture(shards: ShardSet, index: int) -> str:
    image = decode(shards.read(index))
    scale = _SIDE / max(image.size)
    size = tuple(max(1, round(side * scale)) for side in image.size)
    data = io.BytesIO()
    image.resize((size[0], size[1]), Image.Resampling.LANCZOS).save(data, "JPEG", quality=85)
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}">'
