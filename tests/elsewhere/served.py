"""Tars of others and a real server of them, with faults: what the tests of reading from elsewhere share."""

import io
import tarfile
import time
from dataclasses import dataclass, field
from http.server import SimpleHTTPRequestHandler
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from ufo_ds.data.shards import ShardSet
from ufo_ds.errors import UserError
from ufo_ds.recipe import ShardCache

PER_TAR = 6


def png(seed: int, size: tuple[int, int] = (9, 7)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def make_tars(directory: Path, count: int, per_tar: int = PER_TAR) -> list[bytes]:
    """Tars of stock webdataset, ``train-00000.tar`` and so on, labels 0, 3, 6, ... 30 in turn; their images."""
    directory.mkdir(parents=True, exist_ok=True)
    images = [png(seed) for seed in range(count * per_tar)]
    with webdataset.ShardWriter(str(directory / "train-%05d.tar"), maxcount=per_tar, verbose=0) as writer:
        for n, image in enumerate(images):
            writer.write({"__key__": f"{n:06d}", "png": image, "cls": 3 * (n % 11)})
    return images


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def make_tar(path: Path, *files: tuple[str, bytes]) -> str:
    with tarfile.open(path, "w") as tar:
        for name, content in files:
            add(tar, name, content)
    return str(path)


def refused(spec: str, **settings: float) -> str:
    with pytest.raises(UserError) as error:
        ShardSet.open(spec, ShardCache(**settings))
    message = str(error.value)
    assert "\n" not in message
    return message


@dataclass
class Server:
    """A real server of a directory, with faults.

    Attributes:
        breaks: so many answers to GET of a tar break off in the middle.
        stalls, fails: paths that are never answered to the end; that are answered with status 503.
        ranges: whether it understands Range.
        asked: path and Range of every request, in order.
    """

    root: Path
    url: str = ""
    breaks: int = 0
    ranges: bool = True
    stalls: tuple[str, ...] = ()
    fails: tuple[str, ...] = ()
    asked: list[tuple[str, str | None]] = field(default_factory=list)

    def tars(self) -> list[str]:
        return [path for path, _ in self.asked if path.endswith(".tar")]


class Handler(SimpleHTTPRequestHandler):
    def __init__(self, server_state: Server, *arguments: object):
        self.state = server_state
        super().__init__(*arguments, directory=str(server_state.root))  # type: ignore[arg-type]

    def log_message(self, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.state.asked.append((path, self.headers.get("Range")))
        file = self.state.root / path.lstrip("/")
        if not file.is_file() or path in self.state.fails:
            return self.send_error(503 if path in self.state.fails else 404)
        content = file.read_bytes()
        start = 0
        if self.state.ranges and self.headers.get("Range"):
            start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.send_header("ETag", f'"{hash(content)}"')
        self.end_headers()
        part = content[start:]
        try:
            if path in self.state.stalls:
                self.wfile.write(part[: len(part) // 2])
                time.sleep(2)
            elif self.state.breaks > 0 and path.endswith(".tar") and len(self.state.tars()) % 2 == 0:
                self.state.breaks -= 1
                self.wfile.write(part[: len(part) // 2])
            else:
                self.wfile.write(part)
        except OSError:  # the client has left
            pass
        self.close_connection = True
        return None


def read_all(spec: str, gib: float = 1.0) -> list[bytes]:
    shards = ShardSet.open(spec, ShardCache(gib=gib))
    return [shards.read(n) for n in range(len(shards))]
