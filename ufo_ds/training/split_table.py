"""The lines at the start of a run that say what each task trains on, and which rank reads how much of it."""

from collections.abc import Mapping, Sequence

from ufo_ds.data.source import TrainSource
from ufo_ds.parallel.placement import Placement

_HEADER = ("task", "images", "classes", "shards", "samples a step", "steps an epoch", "read by", "trained on")


def split_table(
    sources: Mapping[str, TrainSource],
    placement: Placement,
    reads: Sequence[Mapping[str, range]],
    accumulation: int,
    workers: int,
) -> list[str]:
    """A header, a line for each task, and one for how loader processes share the work.

    ``samples a step`` are P x K with PK sampling. ``read by`` are the ranks that read some of them, and how many each;
    ``trained on`` the ranks with the task's experts and head, where others read.

    Args:
        reads: of each rank, the positions that it reads in a micro-batch.
        accumulation: micro-batches per step.
        workers: loader processes per rank.
    """
    rows: list[tuple[str, ...]] = [_HEADER]
    moved = False
    for name, source in sources.items():
        task = source.task
        p, n = task.identities_per_step, task.samples_per_step
        counts = [accumulation * len(read.get(name, ())) for read in reads]
        owners = [rank for rank in range(len(reads)) if name in placement.tasks_of[placement.ep_rank(rank)]]
        moved |= any(count > 0 and rank not in owners for rank, count in enumerate(counts))
        rows.append((
            name,
            f"{len(source):,}",
            f"{source.num_classes:,}",
            f"{source.shards:,}",
            f"{n:,}" if p is None else f"{p:,} x {n // p:,}",
            f"{source.steps_per_epoch:,.1f}",
            _readers(counts),
            _ranks(owners),
        ))  # fmt: skip
    if not moved:
        rows = [row[:-1] for row in rows]
    return [*_aligned(rows), _loading(workers, sources)]


def _readers(samples: Sequence[int]) -> str:
    """Samples that each rank reads in a step -> "ranks 0, 2: 16 each"."""
    ranks = [rank for rank, count in enumerate(samples) if count]
    counts = sorted({samples[rank] for rank in ranks})
    number = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"{_ranks(ranks)}: {number}" + (" each" if len(ranks) > 1 else "")


def _ranks(ranks: Sequence[int]) -> str:
    """Short if at equal distances: "ranks 0-7", "ranks 1, 5 .. 29"; else by their number: "6 ranks of 2-14"."""
    first, last = ranks[0], ranks[-1]
    if len(ranks) <= 2:
        return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
    stride = ranks[1] - first
    if list(ranks) != list(range(first, last + 1, stride)):
        return f"{len(ranks)} ranks of {first}-{last}"
    return f"ranks {first}-{last}" if stride == 1 else f"ranks {first}, {ranks[1]} .. {last}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns two blanks apart, those of numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    left = {_HEADER.index(name) for name in ("task", "read by", "trained on")}
    lines = []
    for row in rows:
        cells = zip(row, widths, strict=True)
        lines.append("  ".join(c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(cells)).rstrip())
    return lines


def _loading(workers: int, sources: Mapping[str, TrainSource]) -> str:
    if workers == 0:
        return "images are loaded between steps (data.workers 0)"
    if workers == 1:
        return "1 loader process a rank"
    line = f"{workers} loader processes a rank take its micro-batches in turn, from any shard"
    task, shards = min(((name, source.shards) for name, source in sources.items()), key=lambda found: found[1])
    return f"{line}, also where shards are fewer ({task}: {shards})" if shards < workers else line
