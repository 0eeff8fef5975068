r"""What one large GPU does with ufo_ds: is it right, how fast, and does the 17 billion parameter model train on it.

    python benchmarks/gpu.py [--out DIR] [--quick]

Four parts, one after another, each a process of its own with a time limit, under 9 minutes in all:
  equality    a small model in fp32 against the CPU
  engine      the same through DeepSpeed with ZeRO-3 on one rank against the plain model, fp32 and bf16
  throughput  ViT-H/14 at 256 and 384 pixels: images a second and share of the measured matrix peak, dense and with
              8 and 26 tasks
  ufo2_17b    the whole recipe, 26 tasks, on one GPU of 139 GiB: 20 steps
What a part found is written to DIR/gpu-NAME.json (default: beside this file in results/) whenever there is more of it;
a part that fails or is stopped leaves one line there, and the next one runs.

--quick, or no GPU: the same with tiny models and on the CPU where there is no GPU. That shows that everything runs; it
measures nothing, and writes no file.

On a bare machine nothing needs to be installed but torch, numpy, PyYAML, scikit-learn (the images) and pydantic; the
part `engine` alone also needs deepspeed and what reads data. Where no package index is reached, wheels can be carried,
fetched for that machine's Python (here 3.12) with

    python -m pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
        --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
        -d wheels pydantic==2.14.3 \
        pydantic-core==2.50.4 annotated-types typing-inspection typing-extensions hjson webdataset braceexpand \
        simplejpeg
    python -m pip wheel --no-deps -w wheels deepspeed==0.19.8

and there, from the repository, with the folder `wheels` beside benchmarks/:

    python3 -m pip install -q --no-index --no-deps --target /tmp/site wheels/*.whl && \
        PYTHONPATH=/tmp/site python3 benchmarks/gpu.py --out "$OUT"
"""

import argparse
import contextlib
import importlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
# Seconds of a part: 515 together. The engine compiles a small C++ extension at its first start.
LIMITS = {"equality": 45, "engine": 100, "throughput": 175, "ufo2_17b": 195}
QUICK_LIMIT_S = 300  # of each part: there is no hurry, and machines without a GPU may be busy
FAILED = "failed: "  # what a part's own note of that begins with
START_S = 15  # of a part's limit, for the start of its process and of the GPU


class Report:
    """What a part found so far; kept in a file."""

    def __init__(self, file: Path | None):
        self.file = file
        self.content: dict[str, Any] = {"figures": {}, "bars": {}, "notes": []}

    def __call__(self, figures: dict | None = None, bars: dict | None = None, notes: list[str] | None = None) -> None:
        """``bars``: name -> value and the most that it may be."""
        self.content["figures"] |= {name: _plain(value) for name, value in (figures or {}).items()}
        for name, (value, most) in (bars or {}).items():
            self.content["bars"][name] = {"value": _plain(value), "bar": most, "ok": bool(value <= most)}
        self.content["notes"] += notes or []
        if self.file is not None:
            write(self.file, self.content)


def write(file: Path, content: dict[str, Any]) -> None:
    """As a whole or not at all."""
    temporary = file.with_name(f"{file.name}.part")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(file)


def _plain(value: Any) -> Any:
    """For JSON, with five digits that count; what is no number as a word."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, int | str):
        return value
    return float(f"{float(value):.5g}") if math.isfinite(value) else str(float(value))


def run_part(name: str, file: Path, quick: bool) -> None:
    """In a process of its own; a failure is noted and shown."""
    import torch

    report = Report(file)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        report(figures={"device": torch.cuda.get_device_name(), "torch": torch.__version__})
    else:
        torch.set_num_threads(1)
    try:
        part = importlib.import_module(f"benchmarks.gpu_{name}")
        part.measure(device, quick or device.type == "cpu", LIMITS[name] - START_S, report)
    except Exception as error:
        traceback.print_exc()
        report(notes=[f"{FAILED}{type(error).__name__}: {error}".partition("\n")[0]])
        sys.exit(1)


def start(name: str, file: Path, quick: bool) -> subprocess.Popen:
    command = [sys.executable, __file__, "--part", name, "--report", str(file), *(["--quick"] if quick else [])]
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(command, env=environment, cwd=REPOSITORY, process_group=0, stdout=sys.stderr)


def outcomes(process: subprocess.Popen, file: Path, limit_s: float) -> Iterator[dict[str, Any]]:
    """What a part has found so far, about once a second until it ends or has used up its time."""
    end, stopped = time.monotonic() + limit_s, False
    try:
        while process.poll() is None and time.monotonic() < end:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(min(1.0, max(end - time.monotonic(), 0.0)))
            if process.poll() is None:
                yield _read(file)
        stopped = process.poll() is None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    found = _read(file)
    if stopped:
        found["notes"].append(f"stopped after {limit_s} s")
    elif process.returncode and not any(note.startswith(FAILED) for note in found["notes"]):
        found["notes"].append(f"ended with status {process.returncode}")
    yield found


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text()) if file.exists() else Report(None).content


class Results:
    """Of all parts, in a file named after the GPU; without one, or of tiny models, in no file."""

    def __init__(self, directory: Path | None):
        self.directory = directory
        self.by_part: dict[str, dict[str, Any]] = {}
        self.file: Path | None = None

    def note(self, part: str, found: dict[str, Any], taken_s: float) -> None:
        self.by_part[part] = {**found, "figures": {**found["figures"], "s": _plain(taken_s)}}
        device = found["figures"].get("device")
        if self.directory is not None and device is not None:
            self.directory.mkdir(parents=True, exist_ok=True)
            short = device.lower().removeprefix("nvidia ").replace(" ", "-")
            self.file = self.directory / f"gpu-{short}.json"
            write(self.file, self.content)

    @property
    def content(self) -> dict[str, Any]:
        """The object of the last line; names begin with that of their part."""
        content: dict[str, Any] = {"benchmark": "gpu", "figures": {}, "bars": {}, "notes": []}
        for part, found in self.by_part.items():
            for kind in ("figures", "bars"):
                content[kind] |= {f"{part}_{name}": value for name, value in found[kind].items()}
            content["notes"] += [f"{part}: {note}" for note in found["notes"]]
        return content


def measure(parts: list[str], quick: bool, out: Path) -> Results:
    results = Results(None if quick else out)
    with tempfile.TemporaryDirectory() as directory:
        for name in parts:
            limit_s = QUICK_LIMIT_S if quick else LIMITS[name]
            print(f"{name}, at most {limit_s} s", file=sys.stderr, flush=True)
            began, file = time.monotonic(), Path(directory, f"{name}.json")
            for found in outcomes(start(name, file, quick), file, limit_s):
                results.note(name, found, time.monotonic() - began)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=REPOSITORY / "benchmarks" / "results", help="directory of results")
    parser.add_argument(
        "--quick", action="store_true", help="tiny models: shows that everything runs, measures nothing"
    )
    parser.add_argument("--parts", nargs="+", choices=LIMITS, default=list(LIMITS), help="default: all")
    parser.add_argument("--part", choices=LIMITS, help=argparse.SUPPRESS)
    parser.add_argument("--report", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        run_part(options.part, options.report, options.quick)
        return
    results = measure(options.parts, options.quick, options.out)
    for note in results.content["notes"]:
        print(note)
    if results.file is None:
        print("Tiny models, no file written: these figures say nothing about any GPU.")
    print(json.dumps(results.content))


if __name__ == "__main__":
    main()
