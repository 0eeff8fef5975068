"""Sort the heads and channels of a run by importance, so that leading slices keep what matters most.

ufo order runs/mine --out runs/mine-ordered
ufo order runs/mine --out runs/mine-ordered --images 512

Writes a checkpoint whose paths compute what those of the run do, without states of the optimizer: training of subnets
starts from it. Importance is measured on training images of every task, the same ones every time. importance.json says
how much of it the leading members of every layer keep. Subnets of a run that has trained some are not those of the
ordered one: order first, then train subnets.
"""

import argparse
import json
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ufo_ds import checkpoint
from ufo_ds.checkpoint import Reader, write_text
from ufo_ds.data.shards import ShardSet
from ufo_ds.data.source import open_sets
from ufo_ds.data.spaced_images import spaced_images
from ufo_ds.devices import check_device
from ufo_ds.errors import ArgumentParser, UserError
from ufo_ds.model.loading import load_supernet, spec_of
from ufo_ds.model.parameters import address_of
from ufo_ds.progress import Progress
from ufo_ds.recipe_task import Size
from ufo_ds.subnets.importance import kept, measure
from ufo_ds.subnets.ordering import DIM, by_importance, plain_buffers, rewrite

BATCH = 16  # images in a forward pass
SHARES = (0.25, 0.5, 0.75)
RESULT = "importance.json"


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(prog="ufo order", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run directory (its best checkpoint), or one checkpoint")
    parser.add_argument("--out", type=Path, required=True, help="directory to make: a checkpoint")
    parser.add_argument("--images", type=int, default=256, help="of each task, to measure on (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", action="store_true", help="print what importance.json says")
    options = parser.parse_args(argv)
    if options.images < 1:
        raise UserError(f"--images {options.images}: give at least 1")
    check_device(options.device)
    reader = Reader(checkpoint.of_run(options.run))
    result = order(reader, options.out, options.images, options.device)
    if options.json:
        print(json.dumps(result))
    else:
        print("\n".join(table(result)))
        print(f"{options.out}: step {reader.index.step} of {options.run}, its heads and channels by importance")


def order(reader: Reader, out: Path, images: int, device: str) -> dict[str, Any]:
    """Measure and write, as :func:`main` does; what ``importance.json`` says.

    Raises:
        UserError: ``out`` exists or cannot be written; training images that are not here; a damaged checkpoint, or one
            of subnets.
    """
    if reader.index.specs:
        raise UserError(
            f"{reader.directory} holds subnets of {', '.join(reader.index.specs)}, no whole model: order the run that "
            f"they are of"
        )
    partial = out.parent / f".{out.name}.partial"
    try:
        if out.exists():
            raise UserError(f"--out {out} exists: choose another directory or delete it")
        shutil.rmtree(partial, ignore_errors=True)
        (partial / "tensors").mkdir(parents=True)
        counts, scores = importance(reader, images, device)
        orders = by_importance(scores)
        result = summary(counts, scores, orders)
        tensors = len(reader.index.parameters) + len(plain_buffers(reader))
        with Progress(2 * tensors, unit="tensors", name="write") as progress:
            index = rewrite(reader, orders, partial / "tensors", progress.update)
        write_text(partial / "tensors" / RESULT, json.dumps(result, indent=1) + "\n")
        checkpoint.publish(partial / "tensors", index, index.files).rename(out)
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}: choose a directory with room that you can write to") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return result


def importance(reader: Reader, images: int, device: str) -> tuple[dict[str, int], dict[str, Tensor]]:
    """Measure every task's path, one after the other.

    Returns:
        Images of each task, and by group the importance of its members: the sum over them.

    Raises:
        UserError: training images that are missing or cannot be read; activations that are no numbers.
    """
    recipe = reader.recipe
    sets = {task.name: open_sets(task, recipe.data.shard_cache) for task in recipe.tasks}
    counts: dict[str, int] = {}
    total: dict[str, Tensor] = {}
    expected = sum(min(images, sum(map(len, of_task))) for of_task in sets.values())
    with Progress(expected, unit="images", name="measure") as progress:
        for task in recipe.tasks:
            model = load_supernet(reader, [spec_of(reader, task.name)], device)
            batches = _batches(sets[task.name], images, task.input, progress)
            counts[task.name], found = measure(model, batches)
            if not counts[task.name]:
                raise UserError(f"task {task.name}: no training image can be read: check them with `ufo shards verify`")
            for group, scores_G in found.items():
                if not scores_G.isfinite().all():
                    raise UserError(f"task {task.name}: what {group} computes is not finite: use another checkpoint")
                total[group] = total[group] + scores_G if group in total else scores_G
    return counts, total


def _batches(sets: Sequence[ShardSet], images: int, input_hw: Size, progress: Progress) -> Iterator[Tensor]:
    """Images at equal distances, uint8 ``[B, 3, H, W]``; those that cannot be read are left out."""
    batch: list[np.ndarray] = []
    for image in spaced_images(sets, images, input_hw):
        progress.update()
        if image is not None:
            batch.append(image)
        if len(batch) == BATCH:
            yield torch.from_numpy(np.stack(batch))
            batch.clear()
    if batch:
        yield torch.from_numpy(np.stack(batch))


def summary(counts: Mapping[str, int], scores: Mapping[str, Tensor], orders: Mapping[str, Tensor]) -> dict[str, Any]:
    """What ``importance.json`` says: images measured on, and the share of importance that the leading members of every
    group have, as they were and as they are now::

        {"images": {"person": 256}, "groups": [{"group": "blocks.3.ffn.shared", "kind": "hidden", "layer": 3,
         "members": 1536, "before": {"25%": 0.26, "50%": 0.51, "75%": 0.75}, "after": {"25%": 0.55, ...}}]}
    """
    groups = []
    for group, scores_G in sorted(scores.items()):
        kind, layer = _place(group)
        shares = {
            moment: {f"{share:.0%}": round(kept(values_G, share), 4) for share in SHARES}
            for moment, values_G in (("before", scores_G), ("after", scores_G[orders[group]]))
        }
        groups.append({"group": group, "kind": kind, "layer": layer, "members": len(scores_G), **shares})
    return {"images": dict(counts), "groups": groups}


def _place(group: str) -> tuple[str, int | None]:
    """Kind and layer of a group."""
    if group == DIM:
        return "dim", None
    if ".stem." in group:
        return "stem", int(group.rpartition(".")[2])
    address = address_of(f"{group}.weight")
    return {"attn": "heads", "ffn": "hidden"}[address.unit], address.layer


def table(result: Mapping[str, Any]) -> Iterator[str]:
    """Lines for people: of every kind and layer the mean of its copies."""
    heads = [f"{share:.0%}" for share in SHARES]
    yield "importance that the leading members keep, before -> after"
    yield f"{'':<10}" + "".join(f"{head:>18}" for head in heads)
    rows = defaultdict(list)
    for entry in result["groups"]:
        rows[entry["kind"], -1 if entry["layer"] is None else entry["layer"]].append(entry)
    for kind, layer in sorted(rows):
        entries = rows[kind, layer]
        name = kind if layer < 0 else f"{kind} {layer}"
        line = ""
        for head in heads:
            before, after = (sum(e[moment][head] for e in entries) / len(entries) for moment in ("before", "after"))
            line += f"{f'{before:.3f} -> {after:.3f}':>18}"
        yield f"{name:<10}{line}"
