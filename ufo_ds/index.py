"""Make an index of images, in which a model finds those most like another.

ufo index glyphs-vit photos --out photos-index
ufo index runs/demo data_shards/demo/glyphs/gallery --task glyphs --out glyphs-index --type hnsw

Then ufo predict MODEL IMAGE --index DIR. The label of an image is the first-level folder that it is in.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ufo_ds.data.image_files import Images, batches, open_images
from ufo_ds.errors import ArgumentParser, UserError
from ufo_ds.evaluation import search_index
from ufo_ds.progress import Progress

if TYPE_CHECKING:  # transformers takes seconds to import
    from ufo_ds.subnets.task_model import TaskModel

SHOWN = 5  # names of images that cannot be read


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(prog="ufo index", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="one task's model, or a run directory or checkpoint with --task")
    parser.add_argument("folder", help="images, in folders or not, or shards")
    parser.add_argument("--out", type=Path, required=True, help="directory to make")
    parser.add_argument("--task", help="of a run with several")
    parser.add_argument(
        "--type", choices=search_index.KINDS, default="flat",
        help="flat compares with all (default); ivf and hnsw are faster with 100,000 and more, and may miss some",
    )  # fmt: skip
    parser.add_argument("--batch_size", type=int, default=64, help="images in a forward pass (default 64)")
    parser.add_argument("--workers", type=int, default=1, help="processes that decode images (default 1)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", action="store_true", help="print what was made as JSON")
    options = parser.parse_args(argv)
    if options.batch_size < 1:
        raise UserError(f"--batch_size {options.batch_size}: give 1 or more")
    if options.workers < 0:
        raise UserError(f"--workers {options.workers}: give 0 or more")
    search_index.check_absent(options.out)
    images = open_images(options.folder)
    search_index.check_kind(options.type, len(images.names))

    from ufo_ds.subnets.task_model import open_model

    model = open_model(options.model, options.task, options.device)
    embeddings_ND, kept, faults = embed(model, images, options.batch_size, options.workers)
    _report(faults, images, options.folder)
    about = search_index.write(
        options.out,
        embeddings_ND,
        [(images.names[position], images.labels[position]) for position in kept],
        options.type,
        model=model.name,
        fingerprint=model.fingerprint,
        task=model.task,
        input=model.input,
        source=options.folder,
        left_out=len(faults),
    )
    if options.json:
        print(json.dumps({"out": str(options.out), **asdict(about)}))
    else:
        with_parameters = "".join(f", {name} {value}" for name, value in about.parameters.items())
        left_out = f", {about.left_out} left out" if about.left_out else ""
        print(f"{options.out}: {about.count} images of {about.dim} numbers, {about.type}{with_parameters}{left_out}")


def embed(
    model: "TaskModel", images: Images, batch_size: int, workers: int
) -> tuple[np.ndarray, list[int], dict[int, str]]:
    """Embeddings float32 [N, D] of the images that can be read, which these are, and what is wrong with the others.

    Raises:
        UserError: none can be read, or the model gives what is no number.
    """
    found: list[np.ndarray] = []
    kept: list[int] = []
    faults: dict[int, str] = {}
    with Progress(len(images.names), unit="images", name="embed") as progress:
        for read in batches(images, model.input, batch_size, workers):
            if read.positions:
                found.append(model.embed(read.pixels).embedding.numpy())
            kept += read.positions
            faults |= read.faults
            for _ in range(len(read.positions) + len(read.faults)):
                progress.update()
    if not found:
        position, fault = next(iter(faults.items()))
        raise UserError(f"none of {len(faults)} images can be read, {images.names[position]} because: {fault}")
    embeddings_ND = np.concatenate(found)
    if not np.isfinite(embeddings_ND).all():
        bad = kept[int(np.nonzero(~np.isfinite(embeddings_ND).all(1))[0][0])]
        raise UserError(f"{model.name} gives an embedding of {images.names[bad]} that is no number: train it again")
    return embeddings_ND, kept, faults


def _report(faults: dict[int, str], images: Images, source: str) -> None:
    for position, fault in list(faults.items())[:SHOWN]:
        print(f"left out {images.names[position]}: {fault}", file=sys.stderr)
    if len(faults) > SHOWN:
        print(f"left out {len(faults)} of {len(images.names)} images of {source} in all", file=sys.stderr)
