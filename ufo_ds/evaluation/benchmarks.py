"""From a recipe's benchmarks, and what a model says of their images, to outcomes: which protocol gets which arrays."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ufo_ds.data.attributes import from_bits, names_in, to_bits
from ufo_ds.data.evaluation_set import EvaluationSet, digest
from ufo_ds.data.layouts.layout import Templates
from ufo_ds.errors import UserError
from ufo_ds.evaluation import (
    attributes,
    classification,
    identification,
    one_shot,
    query_expansion,
    random_gallery,
    recall,
    reranking,
    retrieval,
    templates,
    thresholds,
    verification,
)
from ufo_ds.evaluation.features import Predictions, TaskImages
from ufo_ds.evaluation.outcomes import Outcomes
from ufo_ds.recipe import Recipe
from ufo_ds.recipe_benchmark import OF_LOGITS, Benchmark
from ufo_ds.recipe_task import Task

LeftOut = Mapping[str, set[int]]  # directory -> positions of images that are not counted


def check(recipe: Recipe, images: Mapping[str, TaskImages], classes: Mapping[str, list[str]]) -> None:
    """Whether all benchmarks can be scored, before hours are spent on what they would score.

    Raises:
        UserError: a protocol that does not go with the loss, a class or attribute that the head lacks, pairs that the
            shards lack, or an ``evaluation.best`` that none yields.
    """
    names = []
    for task in recipe.tasks:
        for benchmark in task.benchmarks:
            names.append(f"{task.name}/{benchmark.name}/")
            _check_protocol(task, benchmark)
            for directory in benchmark.parts.values():
                _check_data(benchmark, directory, images[task.name].sets[directory], classes[task.name])
    best = recipe.evaluation.best
    if best is not None and not best.startswith(tuple(names)):
        raise UserError(f"evaluation.best {best!r}: use a metric of one of {', '.join(names)}")


def _check_protocol(task: Task, benchmark: Benchmark) -> None:
    wanted = "attributes" if task.loss.multi_label else "classification"
    if benchmark.protocol in OF_LOGITS and benchmark.protocol != wanted:
        raise UserError(
            f"benchmark {task.name}/{benchmark.name}: protocol {benchmark.protocol} is for tasks "
            f"{'without' if task.loss.multi_label else 'with'} binary_cross_entropy: use {wanted}"
        )


def _check_data(benchmark: Benchmark, directory: str, data: EvaluationSet, classes: list[str]) -> None:
    if benchmark.protocol == "classification":
        class_labels(data, classes, benchmark.name)
    if benchmark.protocol == "attributes" and not attribute_targets(data, classes, benchmark.name).any():
        raise UserError(f"benchmark {benchmark.name}: no image of {directory} has any attribute: check its labels")
    if benchmark.protocol == "verification" and data.pairs is None:
        raise UserError(f"benchmark {benchmark.name}: {directory} has no pairs: make it from a pair list")
    if benchmark.protocol == "templates" and data.templates is None:
        raise UserError(f"benchmark {benchmark.name}: {directory} has no templates: make it with `ufo shards ijb`")


def score(
    recipe: Recipe,
    images: Mapping[str, TaskImages],
    predictions: Predictions,
    classes: Mapping[str, list[str]],
    without: Mapping[str, LeftOut] | None = None,
    part: int = 0,
    parts: int = 1,
) -> dict[str, Outcomes]:
    """Outcomes of all benchmarks, by ``task/benchmark``, or of every ``parts``-th of them.

    Args:
        classes: per task, the names behind the columns of the logits.
        without: per ``task/benchmark`` and directory the images, by position, that are left out, and with them every
            pair that one of them is in.

    Raises:
        UserError: a benchmark that cannot be scored, with its name.
    """
    everything = [(task, benchmark) for task in recipe.tasks for benchmark in task.benchmarks]
    outcomes = {}
    for task, benchmark in everything[part::parts]:
        key = f"{task.name}/{benchmark.name}"
        scored = _Scored(benchmark, images[task.name], predictions[task.name], (without or {}).get(key, {}))
        try:
            arrays = scored.arrays(classes[task.name])
        except UserError as error:
            raise UserError(f"benchmark {key}: {error}") from None
        outcomes[key] = Outcomes(benchmark.protocol, benchmark.settings, digest(*scored.sets), arrays)
    return outcomes


def without_match(recipe: Recipe, images: Mapping[str, TaskImages], found: Mapping[str, Outcomes]) -> Iterator[str]:
    """Lines about queries that count for nothing: as is usual, the metrics of retrieval are over the others."""
    for task in recipe.tasks:
        for benchmark in task.benchmarks:
            if benchmark.protocol == "retrieval" and benchmark.query is not None:
                queries = len(images[task.name].sets[benchmark.query])
                left = len(found[f"{task.name}/{benchmark.name}"].arrays["query"])
                if left < queries:
                    yield (
                        f"benchmark {task.name}/{benchmark.name}: {queries - left} of {queries} queries are left out: "
                        f"they have no match in the gallery by another camera"
                    )


def pairs(
    benchmark: Benchmark, images: TaskImages, predictions: Mapping[Any, np.ndarray], found: Outcomes
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Pairs of images for :func:`thresholds.choose`: similarity, whether they show the same, and both identities.

    Args:
        found: the benchmark's outcomes.

    Returns:
        Those of a verification benchmark, or drawn from one that searches; None of a benchmark without either.
    """
    if benchmark.protocol == "verification":
        return found.arrays["similarity"], found.arrays["same"], found.arrays["identity"]
    if "embedding" not in predictions or benchmark.protocol in ("classification", "templates"):
        return None
    sides = _Scored(benchmark, images, predictions, {}).identified()
    if len(sides) == 1:
        features, ids, _ = sides[0]
        sides = [(features, ids, np.arange(len(ids)))] * 2  # an image is no pair with itself
    return thresholds.pairs_of(*sides[0], *sides[1])


class _Scored:
    """A benchmark with what its protocol needs of its images: those that are kept of each directory."""

    def __init__(
        self, benchmark: Benchmark, images: TaskImages, predictions: Mapping[Any, np.ndarray], without: LeftOut
    ):
        self.benchmark, self.images, self.predictions, self.without = benchmark, images, predictions, without
        self.sets = [images.sets[directory] for directory in benchmark.parts.values()]

    def arrays(self, classes: list[str]) -> dict[str, np.ndarray]:
        match self.benchmark.protocol:
            case "classification":
                (directory,), (data,) = self.benchmark.parts.values(), self.sets
                labels = class_labels(data, classes, self.benchmark.name)
                return classification.outcomes(self.rows("logits", directory), labels[self.keep(directory)])
            case "attributes":
                (directory,), (data,) = self.benchmark.parts.values(), self.sets
                targets = attribute_targets(data, classes, self.benchmark.name)
                return attributes.outcomes(self.rows("logits", directory), targets[self.keep(directory)])
            case "retrieval":
                return self._retrieval()
            case "recall":
                return self._recall()
            case "identification":
                (query, ids, _), (gallery, gallery_ids, _) = self.identified()
                return identification.outcomes(query, ids, gallery, gallery_ids)
            case "random_gallery":
                ((features, ids, _),) = self.identified()
                return random_gallery.outcomes(features, ids, **self.benchmark.given("draws"))
            case "one_shot":
                ((features, ids, _),) = self.identified()
                return one_shot.outcomes(features, ids, **self.benchmark.given("ways", "episodes"))
            case "verification":
                return self._verification()
            case "templates":
                return self._templates()

    def rows(self, kind: str, directory: str) -> np.ndarray:
        """Of the images that are kept; memory-mapped where these are all and not averaged with their mirror images."""
        found = self.images.rows(self.predictions[kind], directory, self.benchmark.flip)
        return found[self.keep(directory)] if self.without.get(directory) else found

    def keep(self, directory: str) -> np.ndarray:
        mask = np.ones(len(self.images.sets[directory]), dtype=bool)
        mask[list(self.without.get(directory, []))] = False
        return mask

    def identified(self) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Per directory embeddings, identities and cameras; these numbered alike in all of them."""
        labels = _numbers([data.label_names for data in self.sets], unknown="-1")
        cameras = _numbers([data.camera_names for data in self.sets], unknown=None)
        return [
            (self.rows("embedding", directory), of_label[keep], of_camera[keep])
            for directory, of_label, of_camera in zip(self.benchmark.parts.values(), labels, cameras, strict=True)
            for keep in (self.keep(directory),)
        ]

    def _retrieval(self) -> dict[str, np.ndarray]:
        (query, query_ids, query_cameras), (gallery, ids, cameras) = self.identified()
        expand, rerank = self.benchmark.query_expansion, self.benchmark.rerank
        blocks = None
        if expand is not None or rerank is not None:  # junk has no part in what is a neighbour of what
            kept = np.flatnonzero(ids != retrieval.JUNK)
            gallery, ids, cameras = gallery[kept], ids[kept], cameras[kept]
        if expand is not None:
            query = query_expansion.expand(query, gallery, expand.k, expand.alpha)
        if rerank is not None:
            blocks = reranking.similarities(query, gallery, rerank.k1, rerank.k2, rerank.weight)
        arrays = retrieval.outcomes(query, query_ids, query_cameras, gallery, ids, cameras, blocks)
        if expand is not None or rerank is not None:
            top = arrays["shown_top"]
            arrays["shown_top"] = np.where(top >= 0, kept[top], -1)
        return arrays

    def _recall(self) -> dict[str, np.ndarray]:
        (query, ids, _), *others = self.identified()
        gallery, gallery_ids, _ = others[0] if others else (None, None, None)
        return recall.outcomes(query, ids, gallery, gallery_ids, **self.benchmark.given("at"))

    def _verification(self) -> dict[str, np.ndarray]:
        (directory,), (data,) = self.benchmark.parts.values(), self.sets
        assert data.pairs is not None  # see check
        keep = self.keep(directory)
        pairs = data.pairs[keep[data.pairs[:, 1]] & keep[data.pairs[:, 2]]]
        found = self.images.rows(self.predictions["embedding"], directory, self.benchmark.flip)
        arrays = verification.outcomes(found, pairs)
        # Images of a list of files have no label and are their own identities.
        identities = np.unique(data.label_names, return_inverse=True)[1]
        return arrays | {"identity": identities[pairs[:, 1:3]]}

    def _templates(self) -> dict[str, np.ndarray]:
        (directory,), (data,) = self.benchmark.parts.values(), self.sets
        sets = data.templates
        assert sets is not None  # see check
        keep = self.keep(directory)
        template = sets.template[keep]
        pairs = sets.pairs[np.isin(sets.pairs[:, :2], template).all(axis=1)]
        return templates.outcomes(
            self.rows("embedding", directory), Templates(template, sets.media[keep], sets.score[keep], pairs)
        )


def class_labels(data: EvaluationSet, classes: list[str], where: str) -> np.ndarray:
    """Labels in the head's numbering, by class name.

    Raises:
        UserError: a class that the head was not trained on.
    """
    numbers = {name: i for i, name in enumerate(classes)}
    for name in dict.fromkeys(data.label_names):
        if name not in numbers:
            raise UserError(f"benchmark {where}: label {name!r} out of range: not among the {len(classes)} classes")
    return np.array([numbers[name] for name in data.label_names])


def attribute_targets(data: EvaluationSet, attributes: list[str], where: str) -> np.ndarray:
    """Which of the head's attributes each image has, bool [N, A].

    Raises:
        UserError: an attribute that the head was not trained on.
    """
    for label in dict.fromkeys(data.label_names):
        for name in sorted(names_in(label) - set(attributes)):
            raise UserError(
                f"benchmark {where}: attribute {name!r} of label {label!r} is not among the {len(attributes)} that the "
                f"model was trained on: {', '.join(attributes)}"
            )
    return from_bits(to_bits(data.label_names, attributes), len(attributes))


def _numbers(names: Sequence[Sequence[Any]], unknown: Any) -> list[np.ndarray]:
    """Names of several sets numbered alike in all of them; ``unknown`` is -1."""
    number = {name: i for i, name in enumerate(sorted({name for of_set in names for name in of_set} - {unknown}))}
    return [np.array([number.get(name, -1) for name in of_set], dtype=np.int64) for of_set in names]


def table(metrics: Mapping[str, float]) -> Iterator[str]:
    """Lines of a plain table, one benchmark a line."""
    by_benchmark: dict[str, list[str]] = {}
    for key, value in metrics.items():
        benchmark, name = key.rsplit("/", 1)
        by_benchmark.setdefault(benchmark, []).append(f"{name} {value:.4f}")
    width = max(map(len, by_benchmark), default=0)
    for benchmark, values in by_benchmark.items():
        yield f"{benchmark:<{width}}  {'  '.join(values)}"
