"""Six small public data sets as shards: for final training, and once more with a part of train held out.

``OUT/test/SET`` holds a set's own split: ``train`` beside what is tested on. ``OUT/val/SET`` holds the same names, all
made of the images that train a model (only clothing brings a validation split of its own), so settings are chosen on
``OUT/val`` and the chosen ones tested once on ``OUT/test``, with one recipe.

The sets, each in a folder of SOURCE with the lists named below, whose paths are relative to the folder:

- ``omniglot``: handwritten characters, https://github.com/brendenlake/omniglot at 057f034, images_background_small1
  and _small2, MIT licence. Identity: alphabet and character. Train: Balinese, Early_Aramaic, Greek, Korean, Latin,
  Sanskrit; test: Japanese_katakana, Tagalog.
- ``vehicle_reid``: vehicles seen by two cameras, https://github.com/Khoa-Nguyen-Truong/Vehicle-Re-ID-Dataset at
  3d129a2, Apache-2.0. Its train.txt and, for test, its val.txt; longest side reduced to 256 pixels.
- ``grocery_products``: groceries in shops, https://github.com/marcusklasson/GroceryStoreDataset at fc80ba9, MIT. Split
  by class, 45 to train and 21 to test; at most 27 images a class, longest side reduced to 224 pixels.
- ``faces_orl``: faces, the AT&T (ORL) Database of Faces, https://github.com/JFonseca25/eigenfaces at 9b7490c,
  resources/att_faces; no formal licence, credit asked for. Split by person, 19 to train and 9 to test.
- ``clothing``: https://github.com/alexeygrigorev/clothing-dataset-small at 1196151, CC0 1.0. Its own split, at most
  200 train images a class, longest side reduced to 224 pixels.
- ``sign_digits``: hands showing digits, https://github.com/ardamavi/Sign-Language-Digits-Dataset at 4b09433,
  Apache-2.0. The last quarter, by the running number in the file name, is for test.

Lists: ``train.csv`` everywhere; ``query.csv`` and ``gallery.csv`` (path,id[,camera]) of the first four; ``pairs.csv``
(fold,path1,path2,same) of the faces; ``test.csv`` (path,class) of the last two; ``val.csv`` of clothing.
"""

import re
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

from ufo_ds.data import shard_writer
from ufo_ds.data.layouts import Layout, Pair, Sample, read_csv
from ufo_ds.data.shards import ShardSet
from ufo_ds.errors import UserError
from ufo_ds.seeding import numpy_generator

Splits = dict[str, dict[str, Layout]]  # "test" or "val" -> "train", "query", ... -> samples

ORIGINS = {  # repository at commit; licence
    "omniglot": ("https://github.com/brendenlake/omniglot at 057f034baf2ecb8530bc5710e5a23584d2a519cc", "MIT"),
    "vehicle_reid": (
        "https://github.com/Khoa-Nguyen-Truong/Vehicle-Re-ID-Dataset at 3d129a213dff61460212bb94a9037bfa98ddda4c",
        "Apache-2.0",
    ),
    "grocery_products": (
        "https://github.com/marcusklasson/GroceryStoreDataset at fc80ba90f803d79d0383df52c5a4ac5de99ff6fc",
        "MIT",
    ),
    "faces_orl": (
        "https://github.com/JFonseca25/eigenfaces at 9b7490c5cdf13fd4be0184b557b928a5a12101d1",
        "AT&T (ORL) Database of Faces: no formal licence, credit to AT&T Laboratories Cambridge",
    ),
    "clothing": (
        "https://github.com/alexeygrigorev/clothing-dataset-small at 11961516512414bf9f6c150a832cfd21b54a6b54",
        "CC0 1.0",
    ),
    "sign_digits": (
        "https://github.com/ardamavi/Sign-Language-Digits-Dataset at 4b09433ef9d5c60602e8805bb54b8aa2428527f8",
        "Apache-2.0",
    ),
}

_OMNIGLOT_VAL, _OMNIGLOT_EVERY = "Korean-", 4  # every 4th image of a character is a query
_VEHICLES_VAL = 80  # identities
_GROCERIES_EVERY, _GROCERY_QUERIES = 5, 6  # every 5th class; images per class
_FACES_VAL, _FACE_QUERIES, _FACE_FOLDS = 5, 3, 10  # persons; images per person; folds of pairs
_PUPILS_VAL = 0.2  # share of the pupils


def make(source: Path, out: Path, *, workers: int = 1) -> list[ShardSet]:
    """Write the shards of all six sets, ``out/{test,val}/SET/{train,query,gallery,pairs,test}``.

    The same source gives the same bytes. ``out`` appears as a whole or not at all; an interrupted run can go on.

    Args:
        source: holds the folders of the sets.
        out: a directory that does not exist yet.
        workers: threads that read and decode.

    Returns:
        The shard sets, in the order in which they were written.

    Raises:
        UserError: ``out`` exists or cannot be written; a set, a list or an image is missing or of another form.
    """
    source, out = Path(source), Path(out)
    for name in ORIGINS:
        if not (source / name).is_dir():
            raise UserError(f"{source} has no folder {name}: it needs {', '.join(ORIGINS)}")
    parts = {}
    for name, (origin, licence) in ORIGINS.items():
        for stage, layouts in _splits(name, source / name).items():
            for part, layout in layouts.items():
                place = f"{stage}/{name}/{part}"
                if not layout.samples:
                    raise UserError(f"{source / name} has no image for {place}: is it the data set of this name?")
                parts[place] = shard_writer.Part(layout, origin, licence)
    return shard_writer.write_sets(parts, out, workers=workers)


def _splits(name: str, folder: Path) -> Splits:
    if name == "omniglot":
        return _retrieval(
            folder,
            lambda ids: [identity for identity in ids if identity.startswith(_OMNIGLOT_VAL)],
            lambda position, _: position % _OMNIGLOT_EVERY == 0,
        )
    if name == "vehicle_reid":
        return _retrieval(folder, lambda ids: ids[-_VEHICLES_VAL:], lambda _, sample: sample.camera == "cam1")
    if name == "grocery_products":
        return _retrieval(
            folder,
            lambda ids: ids[_GROCERIES_EVERY - 1 :: _GROCERIES_EVERY],
            lambda position, _: position < _GROCERY_QUERIES,
        )
    if name == "faces_orl":
        return _faces(folder)
    if name == "clothing":
        train = read_csv(folder / "train.csv")
        return {
            "test": {"train": train, "test": read_csv(folder / "test.csv")},
            "val": {"train": train, "test": read_csv(folder / "val.csv")},
        }
    return _sign_digits(folder)


def _retrieval(
    folder: Path, held_out: Callable[[list[str]], list[str]], is_query: Callable[[int, Sample], bool]
) -> Splits:
    """Hold out whole identities of train.

    Args:
        held_out: from all train identities, sorted, to those of the validation.
        is_query: from an image's position among those of its identity, sorted by path, and the image; the others are
            the gallery.
    """
    train = read_csv(folder / "train.csv").samples
    new = set(held_out(sorted({sample.label for sample in train})))
    query: list[Sample] = []
    gallery: list[Sample] = []
    for identity in sorted(new):
        images = sorted((sample for sample in train if sample.label == identity), key=_path)
        for position, sample in enumerate(images):
            (query if is_query(position, sample) else gallery).append(sample)
    return {
        "test": {
            "train": Layout(train),
            "query": read_csv(folder / "query.csv"),
            "gallery": read_csv(folder / "gallery.csv"),
        },
        "val": {
            "train": Layout([sample for sample in train if sample.label not in new]),
            "query": Layout(query),
            "gallery": Layout(gallery),
        },
    }


def _faces(folder: Path) -> Splits:
    splits = _retrieval(folder, lambda ids: ids[-_FACES_VAL:], lambda position, _: position < _FACE_QUERIES)
    held_out = splits["val"]["query"].samples + splits["val"]["gallery"].samples
    samples = sorted(held_out, key=_path)
    splits["test"]["pairs"] = read_csv(folder / "pairs.csv")
    splits["val"]["pairs"] = Layout(samples, _all_pairs(samples))
    return splits


def _path(sample: Sample) -> Path:
    return Path(str(sample.path))


def _all_pairs(samples: list[Sample]) -> list[Pair]:
    """Every pair of one person and as many, drawn without replacement, of two; dealt to the folds in turn."""
    same: list[tuple[int, int]] = []
    other: list[tuple[int, int]] = []
    for pair in combinations(range(len(samples)), 2):
        (same if samples[pair[0]].label == samples[pair[1]].label else other).append(pair)
    drawn = numpy_generator(0, "open_small", "faces_orl").permutation(len(other))[: len(same)]
    return [
        Pair(fold=number % _FACE_FOLDS, first=first, second=second, same=is_same)
        for pairs, is_same in ((same, True), ([other[index] for index in drawn], False))
        for number, (first, second) in enumerate(pairs)
    ]


def _sign_digits(folder: Path) -> Splits:
    """Hold out the last pupils: a pupil showed 0 to 9 in turn, so the next one begins where the digit falls."""
    train = read_csv(folder / "train.csv").samples
    pupils: list[list[Sample]] = []
    for sample in sorted(train, key=_number):
        if not pupils or int(sample.label) < int(pupils[-1][-1].label):
            pupils.append([])
        pupils[-1].append(sample)
    kept = len(pupils) - round(_PUPILS_VAL * len(pupils))
    return {
        "test": {"train": Layout(train), "test": read_csv(folder / "test.csv")},
        "val": {
            "train": Layout([sample for pupil in pupils[:kept] for sample in pupil]),
            "test": Layout([sample for pupil in pupils[kept:] for sample in pupil]),
        },
    }


def _number(sample: Sample) -> int:
    numbers = re.findall(r"\d+", _path(sample).stem)
    if not numbers or not sample.label.isdecimal():
        raise UserError(f"{sample.path} (class {sample.label}): expected a file with a running number and a digit")
    return int(numbers[-1])
