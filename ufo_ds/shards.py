"""``ufo shards``: make shards of a public data set, or verify them."""

import argparse
import json
import os
from pathlib import Path
from typing import NoReturn

from ufo_ds.data import open_small, shards
from ufo_ds.data.layouts import read_csv, read_folder
from ufo_ds.errors import UserError, run

EXAMPLES = """examples:
  ufo shards folder clothing/train data_shards/clothing-train --licence CC0-1.0
  ufo shards csv market1501/query.csv data_shards/market1501-query
  ufo shards open_small ~/data data_shards/open_small
  ufo shards verify data_shards/clothing-train
"""
RAW = argparse.RawDescriptionHelpFormatter
COUNTS = ("samples", "classes", "cameras", "shards", "pairs", "dropped_pairs", "corrupt")
FOLDER = "a sub-folder of images for each class"
CSV = "a CSV with header path,id[,camera] or path,class or fold,path1,path2,same"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message}: see {self.prog} --help")


def main(argv: list[str] | None = None) -> None:
    """Run ``ufo shards`` and print one line about every directory of shards, or JSON.

    Raises:
        UserError: wrong arguments, input that cannot be used, or shards with a fault.
    """
    arguments = _parser().parse_args(argv)
    if arguments.verb == "open_small":
        summaries = [_summary(shard_set) for shard_set in open_small.make(arguments.source, arguments.out)]
        print(json.dumps(summaries) if arguments.json else "\n".join(_line(each, "written") for each in summaries))
        return
    if arguments.verb == "verify":
        shards.verify(arguments.directory)
        shard_set = shards.ShardSet.open(arguments.directory)
    else:
        read = read_folder if arguments.verb == "folder" else read_csv
        shard_set = shards.write(
            read(arguments.source),
            arguments.out,
            source=str(arguments.source),
            licence=arguments.licence,
            shard_size=arguments.shard_size,
            max_corrupt=arguments.max_corrupt,
            workers=len(os.sched_getaffinity(0)),
        )
    verdict = "verified" if arguments.verb == "verify" else "written"
    print(json.dumps(_summary(shard_set)) if arguments.json else _line(_summary(shard_set), verdict))


def _line(summary: dict[str, str | int], verdict: str) -> str:
    numbers = ", ".join(f"{value} {name.replace('_', ' ')}" for name, value in summary.items() if name in COUNTS)
    return f"{summary['directory']}: {verdict}, {numbers}"


def _summary(shard_set: shards.ShardSet) -> dict[str, str | int]:
    manifest = shard_set.manifest
    summary: dict[str, str | int] = {
        "directory": str(shard_set.directory),
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
    parser = _Parser(
        prog="ufo shards",
        description="Make WebDataset shards of a public data set, or verify them.",
        epilog=EXAMPLES,
        formatter_class=RAW,
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="{folder,csv,open_small,verify}")
    for verb, metavar, text in (("folder", "SOURCE", FOLDER), ("csv", "FILE", CSV)):
        maker = verbs.add_parser(verb, help=f"shards of {text}", epilog=EXAMPLES, formatter_class=RAW)
        maker.add_argument("source", metavar=metavar, type=Path, help=text)
        maker.add_argument("out", metavar="OUT", type=Path, help="directory to make")
        maker.add_argument("--licence", default="unknown", help="of the images, for the manifest")
        maker.add_argument("--shard_size", type=int, default=10_000, help="samples per shard (default 10000)")
        maker.add_argument("--max_corrupt", type=float, default=0.0, help="share of images that may be left out (0)")
        maker.add_argument("--json", action="store_true", help="print JSON")
    six = verbs.add_parser(
        "open_small", help="shards of six small public data sets", epilog=EXAMPLES, formatter_class=RAW,
        description=open_small.__doc__,
    )  # fmt: skip
    six.add_argument("source", metavar="SOURCE", type=Path, help=f"holds {', '.join(open_small.ORIGINS)}")
    six.add_argument("out", metavar="OUT", type=Path, help="directory to make: OUT/test and OUT/val")
    six.add_argument("--json", action="store_true", help="print JSON")
    verifier = verbs.add_parser("verify", help="check shards completely", epilog=EXAMPLES, formatter_class=RAW)
    verifier.add_argument("directory", metavar="DIR", type=Path)
    verifier.add_argument("--json", action="store_true", help="print JSON")
    return parser


if __name__ == "__main__":
    raise SystemExit(run(main))
