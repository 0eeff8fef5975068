"""A report of one run, or of several side by side, as one HTML page that anybody can open.

ufo report runs/mine --out mine.html
ufo report runs/mine runs/before runs/other     # the first is the subject, the others stand beside it

It needs no evaluation of its own: it shows what the runs recorded and what their last evaluations found. Pictures come
from the benchmarks' shards, where these are still there.
"""

import argparse
import json
import sys
from pathlib import Path

from ufo_ds.checkpoint import write_text
from ufo_ds.errors import ArgumentParser, UserError
from ufo_ds.reporting import figures, page
from ufo_ds.reporting.pictures import Pictures
from ufo_ds.reporting.runs import read


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(
        prog="ufo report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directories, the subject first")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the page; default: report.html in the first run")
    parser.add_argument("--json", action="store_true", help="print every figure of the page as JSON")
    options = parser.parse_args(argv)

    out = options.out or options.runs[0] / "report.html"
    if out.is_dir():
        raise UserError(f"--out {out} is a directory: give the name of a file")
    runs = [read(path) for path in options.runs]
    pictures = {
        (number, key): Pictures(found.benchmark, run.recipe.data.shard_cache)
        for number, run in enumerate(runs)
        for key, found in run.benchmarks.items()
    }
    values = figures.of_runs(runs, pictures)
    try:
        write_text(out, page.render(values, pictures))
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}: choose a file in a directory you can write to") from None
    if options.json:
        print(json.dumps(values))
    print(out, file=sys.stderr if options.json else sys.stdout)
