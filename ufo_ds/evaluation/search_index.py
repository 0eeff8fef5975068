"""An index of embeddings on disk, in which the nearest ones are found by cosine similarity.

::

    index.faiss      faiss's index of the embeddings, each divided by its length; its metric is the inner product
    embeddings.npy   float32 [N, D], as the model gives them
    entries.jsonl    one line for each: {"file": ..., "label": ... or null}
    about.json       the model's fingerprint, the task, what kind of index it is and how it searches

``flat`` compares with every embedding. ``ivf`` compares with those of the ``nprobe`` nearest of ``nlist`` k-means cells
(Jégou et al., 2011, "Product quantization for nearest neighbor search", without the quantization); ``hnsw`` walks a
graph of neighbours (Malkov and Yashunin, 2018), which comes out alike twice when it is built by one thread
(``OMP_NUM_THREADS=1``). These two are faster and may miss some.

faiss parses its file in C++ and was not made for hostile ones: open an index only if you trust who made it. What is
checked before it is parsed, that it has the checksum of ``about.json`` and begins as one of the three kinds, finds
damage and mistakes, no malice.
"""

import json
import math
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import faiss
import numpy as np
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from ufo_ds.checkpoint import sha256, write_text
from ufo_ds.errors import UserError

Kind = Literal["flat", "ivf", "hnsw"]
KINDS: tuple[Kind, ...] = get_args(Kind)
INDEX, EMBEDDINGS, ENTRIES, ABOUT = "index.faiss", "embeddings.npy", "entries.jsonl", "about.json"
_FIRST_BYTES = {"flat": b"IxFI", "ivf": b"IwFl", "hnsw": b"IHNf"}  # by which faiss knows the kind of an index

POINTS_PER_CELL = 39  # below which faiss finds that k-means has too little to learn from
LEAST_IVF = 10 * POINTS_PER_CELL
NEIGHBOURS, WIDTH_BUILT, WIDTH_SEARCHED = 32, 200, 128  # of HNSW: M, efConstruction, efSearch


@dataclass(config=ConfigDict(extra="forbid"), frozen=True)
class About:
    """
    Attributes:
        model: where the model was.
        fingerprint: of the model and its preprocessing.
        input: height and width of its images.
        source: where the images were.
        count: embeddings.
        left_out: images that could not be read.
        parameters: of an approximate kind.
        faiss: the version that wrote it.
        sha256: of the file ``index.faiss``.
    """

    model: str
    fingerprint: str
    task: str
    input: tuple[int, int]
    source: str
    type: Kind
    parameters: dict[str, int]
    metric: Literal["cosine"]
    dim: int
    count: int
    left_out: int
    faiss: str
    sha256: str


class Neighbour(NamedTuple):
    file: str
    label: str | None
    cosine: float


def normalised(embeddings_ND: np.ndarray) -> np.ndarray:
    """float32 [N, D], each row of length 1; one of length 0 stays."""
    lengths_N1 = np.linalg.norm(embeddings_ND.astype(np.float64), axis=1, keepdims=True)
    return (embeddings_ND / np.where(lengths_N1 > 0, lengths_N1, 1)).astype(np.float32)


def check_kind(kind: Kind, count: int) -> None:
    """
    Raises:
        UserError: too few embeddings for this kind.
    """
    if kind == "ivf" and count < LEAST_IVF:
        raise UserError(f"--type ivf needs {LEAST_IVF} images or more to find its cells, here are {count}: use flat")


def build(embeddings_ND: np.ndarray, kind: Kind) -> tuple[faiss.Index, dict[str, int]]:
    """An index of embeddings and its parameters, which follow from their number.

    Args:
        embeddings_ND: float32 [N, D], normalised here.

    Raises:
        UserError: too few embeddings for this kind.
    """
    features_ND = normalised(embeddings_ND)
    count, dim = features_ND.shape
    check_kind(kind, count)
    parameters: dict[str, int] = {}
    index: Any
    if kind == "flat":
        index = faiss.IndexFlatIP(dim)
    elif kind == "ivf":
        nlist = min(round(4 * math.sqrt(count)), count // POINTS_PER_CELL)
        parameters = {"nlist": nlist, "nprobe": min(nlist, max(8, nlist // 16))}
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(dim), dim, nlist, faiss.METRIC_INNER_PRODUCT)
        index.train(features_ND)
        index.nprobe = parameters["nprobe"]
    else:
        parameters = {"M": NEIGHBOURS, "efConstruction": WIDTH_BUILT, "efSearch": WIDTH_SEARCHED}
        index = faiss.IndexHNSWFlat(dim, NEIGHBOURS, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction, index.hnsw.efSearch = WIDTH_BUILT, WIDTH_SEARCHED
    index.add(features_ND)
    return index, parameters


def write(
    directory: Path,
    embeddings_ND: np.ndarray,
    entries: list[tuple[str, str | None]],
    kind: Kind,
    **about: Any,
) -> About:
    """Build an index and write it; the directory gets its name last, when it is whole.

    Args:
        directory: to make.
        embeddings_ND: float32 [N, D].
        entries: file and label of each.
        about: the rest of :class:`About`: model, fingerprint, task, input, source, left_out.

    Raises:
        UserError: the directory exists or cannot be written, or there are too few embeddings.
    """
    check_absent(directory)
    index, parameters = build(embeddings_ND, kind)
    unfinished = directory.with_name(f".{directory.name}.unfinished")
    try:
        if unfinished.exists():
            shutil.rmtree(unfinished)
        unfinished.mkdir(parents=True)
        faiss.write_index(index, str(unfinished / INDEX))
        np.save(unfinished / EMBEDDINGS, embeddings_ND)
        lines = (json.dumps({"file": file, "label": label}) for file, label in entries)
        write_text(unfinished / ENTRIES, "".join(f"{line}\n" for line in lines))
        count, dim = embeddings_ND.shape
        made = About(
            type=kind, parameters=parameters, metric="cosine", dim=dim, count=count, faiss=faiss.__version__,
            sha256=sha256(unfinished / INDEX), **about,
        )  # fmt: skip
        write_text(unfinished / ABOUT, json.dumps(asdict(made), indent=2) + "\n")
        unfinished.rename(directory)
    except (OSError, RuntimeError) as error:  # the latter of faiss, where its file cannot be written
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UserError(f"--out {directory}: {reason}: choose a directory with room that you can write to") from None
    return made


def check_absent(directory: Path) -> None:
    """
    Raises:
        UserError: the directory exists.
    """
    if directory.exists():
        raise UserError(f"--out {directory} exists: choose another directory or delete it")


class SearchIndex:
    """An index read from disk.

    Attributes:
        about: what it says of itself.
        entries: file and label of each embedding.
    """

    def __init__(self, directory: Path):
        """
        Raises:
            UserError: no such directory, or what it holds is no index, or not whole.
        """
        self.about = _read_about(directory)
        try:
            self.entries = [_entry(line) for line in (directory / ENTRIES).read_text().splitlines()]
            with (directory / INDEX).open("rb") as file:
                kind = file.read(4)
            if kind != _FIRST_BYTES[self.about.type] or sha256(directory / INDEX) != self.about.sha256:
                raise ValueError(f"{INDEX} is not the file that {ABOUT} tells of")
            self._index = faiss.read_index(str(directory / INDEX))
            found = self._index.ntotal, self._index.d, len(self.entries)
            if found != (self.about.count, self.about.dim, self.about.count):
                raise ValueError(f"{INDEX} and {ENTRIES} have not the size that {ABOUT} tells")
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise UserError(f"{directory} is damaged ({_line(error)}): make it again with `ufo index`") from None

    def search(self, embeddings_QD: np.ndarray, count: int) -> list[list[Neighbour]]:
        """The nearest entries of each query, nearest first; an approximate index may find fewer.

        Args:
            embeddings_QD: float32 [Q, D], normalised here.
            count: of entries for each query, at most.
        """
        count = min(count, self.about.count)
        cosines_QK, positions_QK = self._index.search(normalised(embeddings_QD), count)
        neighbours = []
        for cosines, found in zip(cosines_QK.tolist(), positions_QK.tolist(), strict=True):
            entries = [(*self.entries[i], cosine) for cosine, i in zip(cosines, found, strict=True) if i >= 0]
            neighbours.append([Neighbour(file, label, cosine) for file, label, cosine in entries])
        return neighbours


def _read_about(directory: Path) -> About:
    try:
        return TypeAdapter(About).validate_json((directory / ABOUT).read_bytes())
    except OSError as error:
        raise UserError(f"{directory} is no index of `ufo index` ({ABOUT}: {error.strerror}): give one") from None
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(map(str, fault["loc"])) or "all of it"
        raise UserError(
            f"{directory} is no index of `ufo index` ({ABOUT}, {where}: {fault['msg']}): give one"
        ) from None


def _entry(line: str) -> tuple[str, str | None]:
    values = json.loads(line)
    return values["file"], values["label"]


def _line(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error).splitlines()[0]
