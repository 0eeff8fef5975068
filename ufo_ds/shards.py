"""``ufo shards``: make shards of a public data set, or verify them."""

import argparse
import inspect
import json
import os
import sys
import warnings
from pathlib import Path

from PIL import Image

from ufo_ds.data import open_small, shard_writer
from ufo_ds.data.layouts import READERS, Layout
from ufo_ds.data.shard_journal import check_absent
from ufo_ds.data.shards import ShardSet, verify
from ufo_ds.errors import ArgumentParser, run

EXAMPLES = """examples:
  ufo shards folder clothing/train data_shards/clothing-train --licence CC0-1.0
  ufo shards csv market1501/query.csv data_shards/market1501-query
  ufo shards market1501 data/Market-1501-v15.09.15 data_shards/market1501
  ufo shards open_small ~/data data_shards/open_small
  ufo shards verify data_shards/clothing-train
  ufo shards verify 'https://host/train-{000..099}.tar'
"""
UNKNOWN = "unknown"  # licence
RAW = argparse.RawDescriptionHelpFormatter
COUNTS = ("samples", "classes", "cameras", "shards", "pairs", "dropped_pairs", "corrupt")


def main(argv: list[str] | None = None) -> None:
    """Run ``ufo shards`` and print one line about every directory of shards, or JSON.

    Raises:
        UserError: wrong arguments, input that cannot be used, or shards with a fault.
    """
    arguments = _parser().parse_args(argv)
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # what is too large raises
    if arguments.layout == "verify":
        verify(arguments.directory)
        written, verdict = [ShardSet.open(arguments.directory)], "verified"
    else:
        try:
            written, verdict = _make(arguments), "written"
        except KeyboardInterrupt:
            print("stopped: the same command goes on after the last whole shard", file=sys.stderr)
            raise SystemExit(130) from None  # as a shell has it for Ctrl-C
    summaries = [_summary(shard_set) for shard_set in written]
    if arguments.json:
        print(json.dumps(summaries if len(summaries) > 1 else summaries[0]))
    else:
        print("\n".join(_line(summary, verdict) for summary in summaries))


def _make(arguments: argparse.Namespace) -> list[ShardSet]:
    if arguments.layout == "open_small":
        return open_small.make(arguments.source, arguments.out, workers=arguments.workers)
    options = {
        "source": str(arguments.source),
        "licence": arguments.licence,
        "shard_size": arguments.shard_size,
        "max_corrupt": arguments.max_corrupt,
        "workers": arguments.workers,
    }
    check_absent(arguments.out)  # before the time that reading takes
    read = READERS[arguments.layout](arguments.source)
    if arguments.licence == UNKNOWN:
        print("the licence of the images is noted as unknown: give it with --licence", file=sys.stderr)
    if isinstance(read, Layout):
        return [shard_writer.write(read, arguments.out, **options)]
    return shard_writer.write_parts(read, arguments.out, **options)


def _line(summary: dict[str, str | int], verdict: str) -> str:
    counts = {name.replace("_", " "): value for name, value in summary.items() if name in COUNTS}
    numbers = ", ".join(f"{value} {_one(name) if value == 1 else name}" for name, value in counts.items())
    return f"{summary['directory']}: {verdict}, {numbers}"


def _one(plural: str) -> str:
    return plural.removesuffix("es" if plural == "classes" else "s")


def _summary(shard_set: ShardSet) -> dict[str, str | int]:
    manifest = shard_set.manifest
    summary: dict[str, str | int] = {
        "directory": shard_set.name,
        "samples": manifest.samples,
        "classes": len(manifest.classes),
        "cameras": len(manifest.cameras),
        "shards": len(manifest.shards),
        "corrupt": manifest.corrupt,
        "licence": manifest.licence,
    }
    if manifest.pairs is not None:
        summary |= {"pairs": manifest.pairs, "dropped_pairs": manifest.dropped_pairs}
    return summary


def _parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(
        prog="ufo shards",
        description="Make WebDataset shards of a public data set, or verify them.",
        epilog=EXAMPLES,
        formatter_class=RAW,
    )
    verbs = parser.add_subparsers(dest="layout", required=True, metavar=f"{{{','.join(READERS)},open_small,verify}}")
    for layout, reader in READERS.items():
        text = (inspect.getdoc(reader) or "").partition("\n\nRaises:")[0]
        maker = verbs.add_parser(
            layout, help=text.partition("\n")[0], description=text, epilog=EXAMPLES, formatter_class=RAW
        )
        maker.add_argument("source", metavar="SOURCE", type=Path, help="file or directory of the data set")
        maker.add_argument("out", metavar="OUT", type=Path, help="directory to make")
        maker.add_argument("--licence", default=UNKNOWN, help="of the images, for the manifest")
        maker.add_argument("--shard_size", type=int, default=10_000, help="samples per shard (default 10000)")
        maker.add_argument("--max_corrupt", type=float, default=0.0, help="share of images that may be left out (0)")
        _add_common(maker)
    six = verbs.add_parser(
        "open_small", help="shards of six small public data sets", epilog=EXAMPLES, formatter_class=RAW,
        description=open_small.__doc__,
    )  # fmt: skip
    six.add_argument("source", metavar="SOURCE", type=Path, help=f"holds {', '.join(open_small.ORIGINS)}")
    six.add_argument("out", metavar="OUT", type=Path, help="directory to make: OUT/test and OUT/val")
    _add_common(six)
    verifier = verbs.add_parser("verify", help="check shards completely", epilog=EXAMPLES, formatter_class=RAW)
    verifier.add_argument("directory", metavar="SHARDS", help="a directory or tars, as a recipe names them")
    verifier.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _add_common(maker: argparse.ArgumentParser) -> None:
    cores = len(os.sched_getaffinity(0))
    maker.add_argument(
        "--workers", type=int, default=cores, help=f"threads that read and decode (default: the {cores} cores at hand)"
    )
    maker.add_argument("--json", action="store_true", help="print JSON")


if __name__ == "__main__":
    raise SystemExit(run(main))
