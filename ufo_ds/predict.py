"""What a model says of an image, or of two.

ufo predict digits-vit 7.png                              # its classes, of a classifier; or its attributes
ufo predict glyphs-vit a.png --index photos-index         # the images most like it; see `ufo index`
ufo predict faces-vit a.jpg b.jpg                         # how alike two are, and whether they show the same

A run directory and --task NAME do in place of an extracted model.
"""

import argparse
import json
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ufo_ds.data.image_files import read_image
from ufo_ds.data.transforms import CorruptImage, evaluation_transform
from ufo_ds.errors import ArgumentParser, UserError

if TYPE_CHECKING:  # transformers and faiss take seconds to import
    from ufo_ds.evaluation.search_index import SearchIndex
    from ufo_ds.subnets.task_model import TaskModel

BAR = 30  # characters of a probability of 1


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(
        prog="ufo predict", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="a model, or a run directory or checkpoint with --task")
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help="one, or two to compare")
    parser.add_argument("--task", help="of a run with several")
    parser.add_argument("--index", type=Path, help="of `ufo index` with this model: show what is nearest")
    parser.add_argument("--top", type=int, default=5, help="classes, attributes or images to show (default 5)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    options = parser.parse_args(argv)
    if len(options.images) > 2:
        raise UserError(f"{len(options.images)} images: give one, or two to compare")
    if len(options.images) == 2 and options.index:
        raise UserError(f"--index {options.index} is for one image: leave it out to compare two")
    if options.top < 1:
        raise UserError(f"--top {options.top}: give 1 or more")
    files = [_read(path) for path in options.images]

    from ufo_ds.subnets.task_model import open_model

    model = open_model(options.model, options.task, options.device)
    pixels = torch.from_numpy(np.stack([_decode(*file, model.input) for file in files]))
    if len(files) == 2:
        result = compare(model, pixels)
    elif options.index:
        result = nearest(model, open_index(model, options.index), pixels, options.top)
    elif model.recipe.tasks[0].loss.multi_label:
        result = attributes(model, pixels, options.top)
    elif model.classes:
        result = classify(model, pixels, options.top)
    else:
        raise UserError(
            f"{model.name} has no classes, its task {model.task!r} compares images: give a second one, or --index"
        )
    names = [str(path) for path in options.images]
    if options.json:
        about = {"model": model.name, "fingerprint": model.fingerprint, "task": model.task, "images": names}
        print(json.dumps(about | result))
    else:
        encoding = sys.stdout.encoding or "utf-8"  # may lack the bars, or what a file's name has
        print("\n".join(_lines(model, names, result)).encode(encoding, "replace").decode(encoding))


def classify(model: "TaskModel", pixels: torch.Tensor, top: int) -> dict[str, Any]:
    """The most probable classes of the image, by the softmax of the classifier."""
    probabilities_C = _finite(model, model.embed(pixels).logits)[0].double().softmax(0)
    values, labels = probabilities_C.topk(min(top, len(probabilities_C)))
    pairs = zip(labels.tolist(), values.tolist(), strict=True)
    return {"classes": [{"class": model.classes[label], "probability": value} for label, value in pairs]}


def attributes(model: "TaskModel", pixels: torch.Tensor, top: int) -> dict[str, Any]:
    """The most probable attributes of the image, by the sigmoid of the classifier, and all above 0.5."""
    probabilities_A = _finite(model, model.embed(pixels).logits)[0].double().sigmoid()
    values, order = probabilities_A.sort(descending=True, stable=True)
    count = max(top, int((values > 0.5).sum()))
    pairs = zip(order.tolist()[:count], values.tolist()[:count], strict=True)
    return {"attributes": [{"attribute": model.classes[i], "probability": value} for i, value in pairs]}


def nearest(model: "TaskModel", index: "SearchIndex", pixels: torch.Tensor, top: int) -> dict[str, Any]:
    """The images of an index most like the image, and how many of them have which label: most first, and of labels
    with as many the one whose nearest is nearer."""
    [found] = index.search(_finite(model, model.embed(pixels).embedding).numpy(), top)
    votes = Counter(neighbour.label for neighbour in found if neighbour.label is not None)
    return {
        "nearest": [neighbour._asdict() for neighbour in found],
        "vote": [{"label": label, "votes": count} for label, count in votes.most_common()],
        "searched": index.about.count,
    }


def open_index(model: "TaskModel", directory: Path) -> "SearchIndex":
    """
    Raises:
        UserError: no index is there, or it is of another model or preprocessing.
    """
    from ufo_ds.evaluation.search_index import SearchIndex

    index = SearchIndex(directory)
    made_by = index.about
    if made_by.fingerprint != model.fingerprint:
        raise UserError(
            f"--index {directory} was made with {made_by.model} (task {made_by.task}, {made_by.fingerprint[:12]}), not "
            f"with {model.name} (task {model.task}, {model.fingerprint[:12]}), whose weights or preprocessing are "
            "others: make it again with `ufo index`"
        )
    return index


def compare(model: "TaskModel", pixels: torch.Tensor) -> dict[str, Any]:
    """The cosine similarity of two images and, of a calibrated model, whether they show the same."""
    from ufo_ds.subnets import calibration as calibrations

    calibration = calibrations.read(model.calibration, model.fingerprint)
    flip = calibration is not None and calibration.flip
    embeddings_2D = _finite(model, model.embed(pixels, flip).embedding).double()
    cosine = float(torch.nn.functional.cosine_similarity(embeddings_2D[0], embeddings_2D[1], dim=0))
    if calibration is None:
        return {"cosine": cosine}
    verdicts = [{"same": cosine >= t.threshold, **asdict(t)} for t in calibration.thresholds]
    return {
        "cosine": cosine,
        "same": verdicts[0]["same"],
        "probability": float(calibration.probability.of(cosine)),
        "benchmark": calibration.benchmark,
        "thresholds": verdicts,
    }


def _lines(model: "TaskModel", names: list[str], result: dict[str, Any]) -> list[str]:
    if answers := result.get("classes") or result.get("attributes"):
        pairs = [tuple(answer.values()) for answer in answers]
        width = max(len(name) for name, _ in pairs)
        return [
            f"{names[0]}, {model.task}:",
            *(f"  {name:<{width}}  {value:.4f}  {_bar(value)}".rstrip() for name, value in pairs),
        ]
    if "nearest" in result:
        found = result["nearest"]
        width = max((len(neighbour["file"]) for neighbour in found), default=0)
        rows = [f"  {n['cosine']:7.4f}  {n['file']:<{width}}  {n['label'] or ''}".rstrip() for n in found]
        vote = ", ".join(f"{vote['label']} {vote['votes']} of {len(found)}" for vote in result["vote"])
        return [
            f"{names[0]}, nearest of {result['searched']} images by cosine:",
            *rows,
            *([f"vote of labels: {vote}"] if vote else []),
        ]
    heading = f"{names[0]} and {names[1]}, {model.task}: cosine {result['cosine']:.4f}"
    if "same" not in result:
        return [
            heading,
            "whether that is the same is known once a threshold is measured: "
            f"ufo evaluate {model.name} --far 0.001",
        ]  # fmt: skip
    probability = result["probability"]
    return [
        heading,
        f"{_verdict(result['same'])}, probability of the same {probability:.4f}, where that is as likely as not before",
        *(
            f"  {_verdict(t['same'])} by the threshold {t['threshold']:.4f}, FAR {t['far']:g} "
            f"({t['far_interval'][0]:.2g} .. {t['far_interval'][1]:.2g} on {result['benchmark']}), TAR {t['tar']:.4f}"
            for t in result["thresholds"]
        ),
    ]


def _verdict(same: bool) -> str:
    return "same" if same else "different"


def _bar(share: float) -> str:
    """A bar in steps of an eighth of a character."""
    eighths = round(share * BAR * 8)
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


def _read(path: Path) -> tuple[Path, bytes]:
    try:
        return path, read_image(path)
    except CorruptImage as error:
        raise UserError(f"{path} cannot be read ({error}): give an image file") from None


def _decode(path: Path, data: bytes, input_hw: tuple[int, int]) -> np.ndarray:
    try:
        return evaluation_transform(data, input_hw)
    except CorruptImage as error:
        raise UserError(f"{path} is no image that can be read ({error}): give another") from None


def _finite(model: "TaskModel", values: torch.Tensor) -> torch.Tensor:
    """
    Raises:
        UserError: a value is no number.
    """
    if not values.isfinite().all():
        raise UserError(f"{model.name} gives values that are no numbers: train or make it again")
    return values
