"""Writing shards: interrupted anywhere it goes on and ends with the same bytes; every fault is one line."""

import json
import multiprocessing
import os
import random
import re
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ufo_ds import progress
from ufo_ds.data.layouts import Layout, Sample, read_folder
from ufo_ds.data.shard_writer import write, write_parts
from ufo_ds.data.shards import ShardSet, verify
from ufo_ds.errors import UserError

Parts = dict[str, Layout]
OPTIONS = {"source": "test", "licence": "CC0-1.0", "shard_size": 5, "max_corrupt": 0.5}


class Gated:
    """An image that is read only when a file is gone: who is to be killed cannot be done before."""

    def __init__(self, file: Path, closed: Path):
        self.file, self.closed, self.suffix = file, closed, file.suffix

    def __str__(self) -> str:
        return str(self.file)

    def read_bytes(self) -> bytes:
        while self.closed.exists():
            time.sleep(0.01)
        return self.file.read_bytes()


@pytest.fixture
def parts(tmp_path: Path) -> Parts:
    """41 images of noise, which take milliseconds each, some of them corrupt; and 7 more. While there is a file
    "closed" no more than 5 shards can be made."""
    rng = np.random.default_rng(0)
    layouts = {}
    for name, count in (("train", 41), ("query", 7)):
        for number in range(count):
            path = tmp_path / "images" / name / str(number % 3) / f"{number:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (160, 160, 3), dtype=np.uint8)).save(path, compress_level=1)
            if number in (4, 5, 6, 13, 40):
                path.write_bytes(path.read_bytes()[:-9000])
        layouts[name] = read_folder(tmp_path / "images" / name)
    gated = layouts["train"].samples[30]
    layouts["train"].samples[30] = Sample(Gated(gated.path, tmp_path / "closed"), gated.label)
    return layouts


def content(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def noted(partial: Path) -> list[tuple[str, int]]:
    """Part and number of every shard that the journal has."""
    try:
        found = json.loads((partial / "journal.json").read_text())["parts"]
    except FileNotFoundError:
        return []
    return [(name, number) for name, whole in found.items() for number in range(len(whole))]


def kill_when(due: Callable[[], bool], parts: Parts, out: Path, workers: int) -> bool:
    """Write in a process that is killed once it is due; whether it came to that."""
    process = multiprocessing.get_context("fork").Process(
        target=write_parts, args=(parts, out), kwargs={**OPTIONS, "workers": workers}
    )
    process.start()
    while process.is_alive() and not due():
        time.sleep(0.0005)
    process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("seed", range(2))
def test_killed_anywhere_it_goes_on_and_ends_with_the_same_bytes(parts: Parts, tmp_path: Path, seed: int) -> None:
    write_parts(parts, tmp_path / "whole", **OPTIONS)
    assert len(ShardSet.open(tmp_path / "whole/train")) == 36
    draws, out, partial = random.Random(seed), tmp_path / "out", tmp_path / ".out.partial"
    kills, written_at = 0, dict[Path, int]()
    (tmp_path / "closed").touch()
    while True:
        if kills >= 3 and len(written_at) >= 3:
            (tmp_path / "closed").unlink(missing_ok=True)
        shards = len(noted(partial)) + draws.choice([0, 1, 1, 2])
        if (tmp_path / "closed").exists():
            shards = min(shards, 4)
        pause = draws.choice([0, 0, draws.uniform(0, 0.03)])  # at a shard's end, or somewhere in the next

        def due(shards: int = shards, pause: float = pause) -> bool:
            if len(noted(partial)) < shards:
                return False
            time.sleep(pause)
            return True

        killed = kill_when(due, parts, out, workers=draws.choice([1, 2, 5]))
        if out.exists() or not killed:  # a kill can come behind the last act
            break
        kills += 1
        for name, number in noted(partial):
            path = partial / "out" / name / f"shard-{number:06d}.tar"
            assert written_at.setdefault(path, path.stat().st_mtime_ns) == path.stat().st_mtime_ns, "written again"
    assert kills >= 3
    assert len(written_at) >= 3
    assert content(out) == content(tmp_path / "whole")
    assert killed or not partial.exists()
    verify(out / "train")


def interrupted(parts: Parts, out: Path, shards: int = 4) -> Path:
    """The partial directory of a run killed after 4 shards or 5."""
    partial, closed = out.with_name(f".{out.name}.partial"), out.with_name("closed")
    closed.touch()
    assert kill_when(lambda: len(noted(partial)) >= shards, parts, out, workers=1)
    closed.unlink()
    return partial


def test_what_an_interruption_left_is_taken_only_if_it_is_sound(
    parts: Parts, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_parts(parts, tmp_path / "whole", **OPTIONS)

    def finish(name: str, **options: object) -> str:
        write_parts(parts, tmp_path / name, **{**OPTIONS, **options})
        assert not (tmp_path / f".{name}.partial").exists()
        return capsys.readouterr().err

    interrupted(parts, tmp_path / "a")
    assert re.search(r"a.partial: going on after [45] whole shards\n", finish("a"))

    shard = interrupted(parts, tmp_path / "b") / "out/train/shard-000001.tar"
    data = bytearray(shard.read_bytes())
    data[1000] ^= 1
    shard.write_bytes(data)
    assert "shard-000001.tar is not as the interrupted run left it: going on before it\n" in finish("b")

    (interrupted(parts, tmp_path / "c") / "out/train/shard-000000.tar").unlink()
    assert "shard-000000.tar is not as" in finish("c")

    (interrupted(parts, tmp_path / "d") / "journal.json").write_text("{")
    assert "starting anew\n" in finish("d")
    for name in "abcd":
        assert content(tmp_path / name) == content(tmp_path / "whole")

    interrupted(parts, tmp_path / "e")
    assert "of other input or other options than this run's: starting anew\n" in finish("e", shard_size=6)
    assert [entry.samples for entry in ShardSet.open(tmp_path / "e/train").manifest.shards] == [6] * 6


def test_changed_input_is_not_mixed_with_the_old(
    parts: Parts, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes: dict[str, Callable[[Sample], Sample]] = {
        "content": lambda sample: (sample.path.write_bytes(parts["query"].samples[0].path.read_bytes()), sample)[1],
        "label": lambda sample: Sample(sample.path, "2"),
        "camera": lambda sample: Sample(sample.path, sample.label, "c1"),
        "order": lambda sample: parts["train"].samples[1],
    }
    for name, change in changes.items():
        interrupted(parts, tmp_path / name)
        parts["train"].samples[0] = change(parts["train"].samples[0])
        write_parts(parts, tmp_path / name, **OPTIONS)
        assert "starting anew" in capsys.readouterr().err
        write_parts(parts, tmp_path / f"{name} at once", **OPTIONS)
        assert content(tmp_path / name) == content(tmp_path / f"{name} at once")


def command(*arguments: object) -> subprocess.Popen[str]:
    def hear_ctrl_c() -> None:  # a shell has what it runs in the background ignore it
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    line = [sys.executable, "-m", "ufo_ds.shards", *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(line, stdout=pipe, stderr=pipe, text=True, preexec_fn=hear_ctrl_c)


def test_second_process_is_refused_and_ctrl_c_says_how_to_go_on(parts: Parts, tmp_path: Path) -> None:
    images, out, partial = tmp_path / "images" / "query", tmp_path / "out", tmp_path / ".out.partial"
    pipe = images / "2" / "last.png"
    os.mkfifo(pipe)  # who reads it waits until somebody writes
    make = ("folder", images, out, "--shard_size", 2, "--max_corrupt", 0.8, "--workers", 2)
    first = command(*make)
    while len(noted(partial)) < 1:  # 7 images: 2 of them corrupt, 4 in whole shards, 1 before the pipe
        assert first.poll() is None
        time.sleep(0.01)
    second = command(*make)
    assert second.wait(60) == 2
    _, errors = second.communicate()
    assert errors.splitlines()[-1] == (f"error: another process is at work in {partial}: wait for it or end it"), errors
    first.send_signal(signal.SIGINT)
    time.sleep(1)  # else it may find the pipe closed before it hears the signal
    descriptor = os.open(pipe, os.O_WRONLY)
    os.close(descriptor)
    said, errors = first.communicate(timeout=60)
    assert (first.returncode, said) == (130, "")
    assert errors == (
        "the licence of the images is noted as unknown: give it with --licence\n"
        "stopped: the same command goes on after the last whole shard\n"
    )
    assert noted(partial)
    pipe.unlink()
    write(read_folder(images), out, source="test", max_corrupt=0.8, shard_size=2)
    assert not partial.exists()


class Vanishing:
    """An image that is deleted just before it is read."""

    def __init__(self, file: Path):
        self.file, self.suffix = file, file.suffix

    def __str__(self) -> str:
        return str(self.file)

    def read_bytes(self) -> bytes:
        self.file.unlink()
        return self.file.read_bytes()


def enormous_png(side: int = 60_000) -> bytes:
    """The header of a PNG of 3.6 gigapixels, with no pixels behind it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.mark.parametrize("fault", ["vanishes", "no byte", "enormous"])
@pytest.mark.parametrize("workers", [1, 3])
def test_a_fault_is_one_line_and_leaves_nothing(
    parts: Parts, tmp_path: Path, fault: str, workers: int, recwarn: pytest.WarningsRecorder
) -> None:
    sound = parts["query"].samples[:2] + parts["query"].samples[3:4]
    whole, last = Layout(sound[:2]), sound[-1].path
    if fault == "vanishes":
        sound[-1] = Sample(Vanishing(last), sound[-1].label)
    else:
        last.write_bytes(b"" if fault == "no byte" else enormous_png())
    before = sorted(path for path in tmp_path.rglob("*") if path.is_dir())
    with pytest.raises(UserError) as error:
        write_parts({"one": whole, "two": Layout(sound)}, tmp_path / "new/out", source="test", workers=workers)
    reason = {"vanishes": "No such file or directory", "no byte": "not an image", "enormous": "3600000000|60000"}[fault]
    assert re.search(f"{last} (is corrupt|cannot be read) .*({reason})", str(error.value))
    assert "\n" not in str(error.value)
    assert sorted(path for path in tmp_path.rglob("*") if path.is_dir()) == before
    assert not recwarn.list


def peak() -> int:
    """Of this process's memory since it was last asked, in bytes."""
    status = Path("/proc/self/status").read_text()
    Path("/proc/self/clear_refs").write_text("5")
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])


def test_large_images_are_not_decoded_all_at_once(tmp_path: Path) -> None:
    samples = []
    for number in range(4):
        path = tmp_path / f"{number}.png"
        if number == 0:
            Image.new("RGB", (4200, 4200)).save(path, compress_level=1)
        else:
            path.write_bytes(samples[0].path.read_bytes())
        samples.append(Sample(path, "black"))

    def rise(count: int, workers: int) -> int:
        peak()
        before = peak()
        write(Layout(samples[:count]), tmp_path / f"out{count}", source="test", workers=workers)
        return peak() - before

    alone = rise(1, 1)
    assert alone >= 4 * 4200 * 4200
    assert rise(4, 4) < 1.5 * alone


def test_progress_is_a_plain_line_where_there_is_no_terminal(
    parts: Parts, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_parts(parts, tmp_path / "quick", **OPTIONS)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    write_parts(parts, tmp_path / "slow", **OPTIONS)
    lines = capsys.readouterr().err.splitlines()
    pattern = r"(train|query): (\d+) of (\d+) images, \d+ images/s, \d\d:\d\d left"
    found = [re.fullmatch(pattern, line).groups() for line in lines]
    assert found == [(n, str(i + 1), str(c)) for n, c in (("train", 41), ("query", 7)) for i in range(c)]


def test_options_are_checked(parts: Parts, tmp_path: Path) -> None:
    for wrong in ({"workers": 0}, {"shard_size": 0}, {"max_corrupt": 1.5}):
        ((name, value),) = wrong.items()
        with pytest.raises(UserError, match=f"{name} {value}: give"):
            write_parts(parts, tmp_path / "out", source="test", **wrong)
    assert not list(tmp_path.glob("*out*"))
