"""Look at a recipe's data: its figures, a batch as training sees it, and test images that training has seen.

ufo data demo
ufo data mine.yaml --tasks.person.augment.erasing 0.2 --out pictures
ufo data mine.yaml --audit --out audit

Any value of the recipe can be set, as in training. The picture is data-NAME.png in the folder --out; above, images as
evaluation sees them, below the same in step 0 of training.

--audit compares every training set of all tasks with every benchmark of all tasks. It writes audit.json, for `ufo
evaluate RUN --audit`, and audit.html with the pictures. Found are equal images, and those that were encoded again or
resized; not those that were cropped, mirrored or turned.
"""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ufo_ds import checkpoint, recipe_file
from ufo_ds.data import audit_page, batch_picture, demo_shards, summary
from ufo_ds.data.audit import Audit, BenchmarkPart, TrainPart, audit, counts_of
from ufo_ds.data.source import open_sources
from ufo_ds.errors import ArgumentParser, UserError
from ufo_ds.recipe import Recipe


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(
        prog="ufo data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        usage="ufo data RECIPE [--section.key VALUE ...] [--audit] [--out DIR] [--json]",
    )  # fmt: skip
    parser.add_argument("recipe", metavar="RECIPE", help="a shipped recipe or a YAML file")
    parser.add_argument("--audit", action="store_true", help="find test images among the training images instead")
    parser.add_argument("--out", type=Path, default=Path(), metavar="DIR", help="where files go (default: here)")
    parser.add_argument("--json", action="store_true", help="print all as JSON")
    options, rest = parser.parse_known_args(argv)
    recipe = recipe_file.load(options.recipe, recipe_file.overrides_of(rest))
    _make_writable(options.out)
    if demo_shards.reads_demo(recipe):
        demo_shards.make_if_absent()
    values, lines = _audit(recipe, options.out) if options.audit else _figures(recipe, options.out)
    print(json.dumps(values) if options.json else "\n".join(lines))


def _figures(recipe: Recipe, out: Path) -> tuple[dict[str, Any], Iterator[str]]:
    recipe, sources = open_sources(recipe, accumulation=1)
    tasks, benchmarks = summary.task_figures(recipe, sources), summary.benchmark_figures(recipe)
    title = f"{recipe.name}: the first images of training, seed {recipe.seed}"
    picture = batch_picture.draw(recipe.tasks, sources, title)
    path = out / f"data-{recipe.name}.png"
    picture.save(path)
    print(path, file=sys.stderr)
    values = {
        "tasks": [dataclasses.asdict(figures) for figures in tasks],
        "benchmarks": [dataclasses.asdict(figures) for figures in benchmarks],
        "picture": str(path),
    }
    return values, summary.report(tasks, benchmarks)


def _audit(recipe: Recipe, out: Path) -> tuple[dict[str, Any], Iterator[str]]:
    found = audit(recipe)
    checkpoint.write_text(out / "audit.json", found.to_json())
    checkpoint.write_text(out / "audit.html", audit_page.page(found, recipe.data.shard_cache))
    print(f"{out / 'audit.json'}, {out / 'audit.html'}", file=sys.stderr)
    overlaps = []
    for train, test, pairs in found.overlaps():
        exact, near = counts_of(pairs)
        overlaps.append(
            {"task": train.task, "shards": train.shards, "benchmark": test.benchmark, "part": test.part,
             "samples": test.samples, "exact": exact, "near": near}
        )  # fmt: skip
    values = {"audit": str(out / "audit.json"), "page": str(out / "audit.html"), "overlaps": overlaps}
    return values, _overlap_table(found)


def _overlap_table(found: Audit) -> Iterator[str]:
    """Lines of a table of test images that training has seen; sets that share none are only counted."""
    rows = [["training set", "benchmark", "", "images", "exact", "near"]]
    clean = 0
    for train, test, pairs in found.overlaps():
        exact, near = counts_of(pairs)
        clean += not pairs
        if pairs:
            part = "" if test.part == "shards" else test.part
            rows.append(
                [f"{train.task}: {train.shards}", test.benchmark, part, f"{test.samples:,}", f"{exact:,}", f"{near:,}"]
            )
    if len(rows) > 1:
        yield from summary.aligned(rows, left=3)
        yield ""
    yield f"{clean} of {clean + len(rows) - 1} combinations of a training set with test images share none."
    entries: list[TrainPart | BenchmarkPart] = [*found.train, *found.test]
    for entry in entries:
        if entry.unreadable:
            yield f"{entry.shards}: {entry.unreadable} of {entry.samples} images cannot be read, and were left out."


def _make_writable(folder: Path) -> None:
    """
    Raises:
        UserError: files cannot be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {folder}: {error.strerror}: choose a folder you can write to") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"--out {folder}: no permission to write there: choose another folder")
