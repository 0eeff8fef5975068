"""Run the benchmarks of a trained run.

ufo evaluate runs/demo
ufo evaluate runs/demo --task glyphs --pixels
ufo evaluate runs/demo --audit audit/audit.json     # also without the test images that training has seen

What it finds item by item is kept in the run directory, where it may write there, for `ufo compare`.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from ufo_ds import checkpoint
from ufo_ds.data.mixing import Batch
from ufo_ds.data.source import TrainSource
from ufo_ds.errors import UserError
from ufo_ds.evaluation import benchmarks, outcomes, overlap
from ufo_ds.evaluation.benchmarks import Predictions, TaskImages
from ufo_ds.evaluation.outcomes import Outcomes
from ufo_ds.evaluation.pixels import nearest_neighbour_scores, pixel_features
from ufo_ds.model.heads import Outputs
from ufo_ds.model.loading import load_supernet, spec_of
from ufo_ds.model.supernet import Supernet
from ufo_ds.recipe import Recipe, only


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="ufo evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="a run directory (its best checkpoint), or one checkpoint")
    parser.add_argument("--task", action="append", help="only this task (may be given several times)")
    parser.add_argument("--last", action="store_true", help="the last checkpoint instead of the best")
    parser.add_argument("--pixels", action="store_true", help="the floor instead: matching of 32x32 grey pixels")
    parser.add_argument(
        "--audit", type=Path, metavar="JSON", help="of `ufo data --audit`: every metric without overlapping images too"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", action="store_true", help="print the metrics as JSON")
    options = parser.parse_args(argv)

    reader = checkpoint.Reader(checkpoint.of_run(options.run, "last" if options.last else "best"))
    recipe = only(reader.recipe, options.task) if options.task else reader.recipe
    left_out = overlap.left_out(options.audit, reader.recipe, recipe) if options.audit else {}
    found: dict[str, Outcomes] = {}
    without: dict[str, Outcomes | None] = {}
    for of_task in of_pixels(recipe) if options.pixels else of_model(reader, recipe, options.device):
        found |= benchmarks.score(*of_task)
        without |= overlap.score_without(*of_task, left_out)
    metrics = outcomes.flatten(found)
    if options.json:
        print(json.dumps(overlap.as_values(metrics, without, left_out) if options.audit else metrics))
    else:
        what = "pixel matching" if options.pixels else f"step {reader.index.step}"
        print(f"{options.run}, {what}", file=sys.stderr)
        lines = overlap.table(metrics, without, left_out) if options.audit else benchmarks.table(metrics)
        print("\n".join(lines))
    checkpoints = reader.directory.resolve().parent
    if not options.pixels and checkpoints.name == "checkpoints":  # not of one that was copied elsewhere
        try:
            outcomes.store(checkpoints.parent, reader.index.step, found)
        except UserError as error:  # somebody else's run, mostly
            print(error, file=sys.stderr)


# A recipe of one task, its images, what was predicted for them and the names behind the logits: what `score` takes.
ToScore = tuple[Recipe, dict[str, TaskImages], Predictions, dict[str, list[str]]]


def of_model(reader: checkpoint.Reader, recipe: Recipe, device: str) -> Iterator[ToScore]:
    """What a run predicts for its benchmarks, task by task: one dense path is in memory at a time.

    Raises:
        UserError: shards or a checkpoint file that is missing or damaged.
    """
    reader.verify()
    for name, images in benchmarks.open_images(recipe).items():
        model = load_supernet(reader, [spec_of(reader, name)], device)
        size = recipe.evaluation.batch_size

        def forward(batch: Batch, model: Supernet = model) -> dict[str, Outputs]:
            return model(batch.to(device))

        predictions = benchmarks.predict(
            forward,
            {name: images},
            {name: range(len(images))},
            -(-len(images) // size),
            size,
            recipe.data.workers,
        )
        yield only(recipe, [name]), {name: images}, predictions, reader.index.classes


def of_pixels(recipe: Recipe) -> Iterator[ToScore]:
    """The same by pixel matching; classification by the nearest training image."""
    for name, images in benchmarks.open_images(recipe).items():
        task = next(t for t in recipe.tasks if t.name == name)
        features = pixel_features(np.stack([images.load(i) for i in range(len(images))]))
        scores, classes = np.zeros((len(features), 1), dtype=np.float32), [""]
        if task.head.type == "linear":
            source = TrainSource.open(task, recipe.seed, shard_cache=recipe.data.shard_cache)
            train = pixel_features(np.stack([source.pixels(i) for i in range(len(source))]))
            classes = source.classes
            scores = nearest_neighbour_scores(features, train, source.labels, len(classes))
        yield only(recipe, [name]), {name: images}, {name: (0, features, scores)}, {name: classes}
