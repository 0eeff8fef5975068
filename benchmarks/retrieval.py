"""Retrieval metrics at the sizes of real test sets: time against what it cannot do without, memory, growth.

    python benchmarks/retrieval.py [--quick]

On one thread, with random features, the worst case for counting: right images rank anywhere, so hardly any wrong one
can be passed over. At the size of Market-1501 (3368 queries, 15913 gallery images, 2048 dimensions), in the same run:

    ours          CMC, mAP and mINP by the package's protocol, and its rank lists
    product       the matrix product of the same blocks of features alone, into memory that is there
    argsort       that product, numpy's argsort of each block as it is usually written, and the same metrics
    argsort_rows  the same query by query: a row stays in the cache, and no block of indices is held

Memory, above the features: in files, read where they lie, at the sizes of MSMT17 (11659 x 82161) and, by recall, of
Stanford Online Products (60502 x 60502), the whole protocols. It is anonymous memory: pages of the files are not in it.
Growth: the time for a gallery four times Market's, divided by four times that for Market's, with as many queries as are
one block of the larger.

Seconds are CPU seconds, which other processes on the machine distort least. The kinds take turns, each round in another
order; a ratio is of one round, and the median over rounds is reported. --quick has fewer rounds, not argsort_rows; 2000
of MSMT17's queries and 20000 of SOP's images; and at these two 64 dimensions, on which that memory hardly depends.
"""

import argparse
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

from ufo_ds.evaluation import ranking, recall, retrieval
from ufo_ds.seeding import numpy_generator

MARKET, MSMT17, SOP = (3368, 15913, 751), (11659, 82161, 3060), (60502, 60502, 11316)  # queries, gallery, identities
CAMERAS, DIMENSIONS = 6, 2048
BARS = {"to_product": 1.25, "argsort_to_ours": 1.25, "memory_gib": 1.0, "growth": 1.2}

Side = tuple[np.ndarray, np.ndarray, np.ndarray]  # features, identities, cameras


def side(name: str, number: int, identities: int, dimensions: int, directory: Path | None = None) -> Side:
    """Random features, in a file that is mapped read-only if there is a directory for it."""
    generator = numpy_generator("retrieval", name)
    ids, cameras = generator.integers(0, identities, number), generator.integers(0, CAMERAS, number)
    shape = (number, dimensions)
    if directory is None:
        return generator.standard_normal(shape, dtype=np.float32), ids, cameras
    path = directory / f"{name}.npy"
    written = np.lib.format.open_memmap(path, "w+", np.float32, shape)
    for begin in range(0, number, 4096):
        generator.standard_normal(out=written[begin : begin + 4096], dtype=np.float32)
    written.flush()
    return np.load(path, mmap_mode="r"), ids, cameras


# --- speed ------------------------------------------------------------------------------------------------------------


class Product:
    """The similarities of blocks of queries, as many as the package takes, of features that are normalised already."""

    def __init__(self, query: np.ndarray, gallery: np.ndarray):
        self.query, self.gallery = retrieval.normalise(query), retrieval.normalise(gallery)
        self.step = ranking.block_rows(gallery.shape)
        self.buffer = np.zeros((min(self.step, len(query)), len(gallery)), np.float32)

    def run(self, use: Callable[[int, np.ndarray], None] = lambda begin, block: None) -> None:
        for begin in range(0, len(self.query), self.step):
            rows = self.query[begin : begin + self.step]
            use(begin, np.matmul(rows, self.gallery.T, out=self.buffer[: len(rows)]))


def argsort_metrics(product: Product, query: Side, gallery: Side, rows: int) -> dict[str, float]:
    """The metrics by sorting the gallery for so many queries at a time."""
    found: dict[str, list[float]] = {"average_precision": [], "inverse_penalty": [], "first_rank": []}
    (_, query_ids, query_cameras), (_, gallery_ids, gallery_cameras) = query, gallery

    def use(begin: int, block: np.ndarray) -> None:
        for first in range(0, len(block), rows):
            part_RG = block[first : first + rows]
            which = slice(begin + first, begin + first + len(part_RG))
            order_RG = np.argsort(np.negative(part_RG, out=part_RG), axis=1)
            same_RG = gallery_ids[order_RG] == query_ids[which, None]
            kept_RG = ~(same_RG & (gallery_cameras[order_RG] == query_cameras[which, None]))
            for same, kept in zip(same_RG, kept_RG, strict=True):
                ranks = np.cumsum(kept)[same & kept]
                if len(ranks):
                    found["average_precision"].append(float(np.mean(np.arange(1, len(ranks) + 1) / ranks)))
                    found["inverse_penalty"].append(len(ranks) / ranks[-1])
                    found["first_rank"].append(ranks[0])

    product.run(use)
    return retrieval.metrics({name: np.array(values) for name, values in found.items()})


def seconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def measure_speed(rounds: int, rows: bool) -> dict[str, float]:
    query, gallery = (side(n, m, MARKET[2], DIMENSIONS) for n, m in (("query", MARKET[0]), ("gallery", MARKET[1])))
    product = Product(query[0], gallery[0])
    ways: dict[str, Callable[[], object]] = {
        "ours": lambda: retrieval.evaluate(*query, *gallery),
        "product": product.run,
        "argsort": lambda: argsort_metrics(product, query, gallery, product.step),
    }
    if rows:
        ways["argsort_rows"] = lambda: argsort_metrics(product, query, gallery, 1)
    ours, theirs = retrieval.evaluate(*query, *gallery), argsort_metrics(product, query, gallery, 1)  # code is warm
    difference = max(abs(ours[name] - theirs[name]) for name in ours)
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for r in range(rounds):
        names = list(ways)
        for name in names[r % len(names) :] + names[: r % len(names)]:
            taken[name].append(seconds(ways[name]))
    ratios = {
        "to_product": [a / b for a, b in zip(taken["ours"], taken["product"], strict=True)],
        "argsort_to_ours": [a / b for a, b in zip(taken["argsort"], taken["ours"], strict=True)],
    }
    if rows:
        pairs = zip(taken["argsort_rows"], taken["ours"], strict=True)
        ratios["argsort_rows_to_ours"] = [a / b for a, b in pairs]
    for name, values in (taken | ratios).items():
        print(f"{name:24}{statistics.median(values):9.3f}{min(values):9.3f}{max(values):9.3f}", flush=True)
    return {
        **{f"{name}_s": statistics.median(values) for name, values in taken.items()},
        **{name: statistics.median(values) for name, values in ratios.items()},
        "difference_from_argsort": difference,
    }


def measure_growth(rounds: int) -> float:
    many = side("growth", 4 * MARKET[1], MARKET[2], DIMENSIONS)
    query = side("query", ranking.block_rows(many[0].shape), MARKET[2], DIMENSIONS)
    few = tuple(array[: MARKET[1]] for array in many)
    ratios = []
    for r in range(rounds + 1):
        taken = {}
        for gallery in (few, many) if r % 2 else (many, few):
            taken[len(gallery[0])] = seconds(lambda gallery=gallery: retrieval.evaluate(*query, *gallery))
        ratios.append(taken[4 * MARKET[1]] / (4 * taken[MARKET[1]]))
    print(f"{'growth':24}{statistics.median(ratios[1:]):9.3f}{min(ratios[1:]):9.3f}{max(ratios[1:]):9.3f}", flush=True)
    return statistics.median(ratios[1:])  # the first round is for warming up


# --- memory -----------------------------------------------------------------------------------------------------------


def anonymous_gib() -> float:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["RssAnon"].split()[0]) / 2**20


def peak_gib(run: Callable[[], object]) -> float:
    """The most anonymous memory of this process while something runs, above what it has before: looked at every 5 ms,
    and a block of similarities lasts for seconds."""
    before, peak, stop = anonymous_gib(), 0.0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not stop.wait(0.005):
            peak = max(peak, anonymous_gib() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    run()
    stop.set()
    watcher.join()
    return peak


def measure_memory(name: str, size: tuple[int, int, int], queries: int, dimensions: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as directory:
        gallery = side("gallery", size[1], size[2], dimensions, Path(directory))
        if name == "sop":
            work = partial(recall.evaluate, gallery[0], gallery[1])
        else:
            query = side("query", queries, size[2], dimensions, Path(directory))
            work = partial(retrieval.evaluate, *query, *gallery)
        start = time.perf_counter()
        peak = peak_gib(work)
        took = time.perf_counter() - start
    print(f"{name + ', GiB above features':24}{peak:9.3f}    {took:.0f} s", flush=True)
    return {f"{name}_memory_gib": peak, f"{name}_s": took, f"{name}_features_gib": gallery[0].nbytes / 2**30}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="within a minute on one core: fewer queries, dimensions")
    quick = parser.parse_args().quick
    print(f"{'':24}{'median':>9}{'min':>9}{'max':>9}")
    with threadpool_limits(1):
        # First, as what other parts leave to the allocator would be used again and not counted.
        dimensions = 64 if quick else DIMENSIONS
        figures = measure_memory("msmt17", MSMT17, 2000 if quick else MSMT17[0], dimensions)
        figures |= measure_memory("sop", (20000, 20000, 4000) if quick else SOP, 0, dimensions)
        figures |= measure_speed(3 if quick else 9, rows=not quick)
        figures["growth"] = measure_growth(2 if quick else 7)
    figures["memory_gib"] = max(figures["msmt17_memory_gib"], figures["sop_memory_gib"])
    figures = {"dimensions": DIMENSIONS, "memory_dimensions": dimensions, **figures}
    bars = {}
    for name, bar in BARS.items():
        value = figures[name]
        bars[name] = {
            "value": round(value, 4),
            "bar": bar,
            "ok": value >= bar if name == "argsort_to_ours" else value <= bar,
        }
    rounded = {name: round(value, 6) for name, value in figures.items()}
    print(json.dumps({"benchmark": "retrieval", "figures": rounded, "bars": bars}))


if __name__ == "__main__":
    main()
