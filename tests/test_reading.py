"""Shards of others and from elsewhere: the right bytes from tars of stock webdataset, real servers and real commands,
through a cache that stays within its bound; every fault is one line, or an unreadable image once training has begun."""

import io
import json
import multiprocessing
import os
import pickle
import shutil
import tarfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from tests.test_bad_input import outcome
from tests.test_mixing import linear_task, make_shards
from ufo_ds import shards as command
from ufo_ds.data import download, shard_cache, tar_index
from ufo_ds.data import shards as shards_module
from ufo_ds.data.evaluation_set import EvaluationSet
from ufo_ds.data.shard_cache import Store, Tar
from ufo_ds.data.shard_specs import tars_of
from ufo_ds.data.shards import ShardSet, verify
from ufo_ds.data.source import TrainSource
from ufo_ds.data.transforms import CorruptImage, decode
from ufo_ds.errors import UserError
from ufo_ds.recipe import ShardCache

PER_TAR = 6


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("UFO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(download, "BACK_OFF_S", 0.01)
    monkeypatch.setattr(download, "READ_TIMEOUT_S", 0.4)


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


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    state = Server(tmp_path / "served")
    http = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, state))
    http.daemon_threads = True
    state.url = f"http://127.0.0.1:{http.server_port}"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield state
    http.shutdown()
    thread.join()
    http.server_close()


def test_one_string_names_a_directory_or_tars(tmp_path: Path) -> None:
    assert tars_of("/d/t-{00..02}.tar") == ["/d/t-00.tar", "/d/t-01.tar", "/d/t-02.tar"]
    assert tars_of("a.tar::b-{0..1}.tar") == ["a.tar", "b-0.tar", "b-1.tar"]
    assert tars_of("pipe:cat x{1,2} | awk '{print $1}'") == [f"pipe:cat x{n} | awk '{{print $1}}'" for n in (1, 2)]
    assert tars_of("https://h/t.tar?key=1") == ["https://h/t.tar?key=1"]
    assert tars_of("https://h/set?key=a.tar") is None
    assert tars_of("data/flowers") is None
    (tmp_path / "a{1..2}.tar").mkdir()
    assert tars_of(str(tmp_path / "a{1..2}.tar")) is None
    for spec, words in [("a{0..9.tar", "a brace"), ("a.tar.gz", "pipe:gzip -dc"), ("s3://b/a.tar", "pipe:aws"),
                        ("a.tar::", "empty"), ("http://[/a.tar", "Invalid")]:  # fmt: skip
        assert words in refused(spec)


def test_tars_of_stock_webdataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = make_tars(tmp_path / "data", 4)
    spec = f"{tmp_path}/data/train-{{00000..00003}}.tar"
    shards = ShardSet.open(spec)
    assert [shards.read(n) for n in range(len(shards))] == images
    assert shards.classes == [str(3 * n) for n in range(11)]  # by value: "12" after "9"
    assert shards.labels.tolist() == [n % 11 for n in range(24)]
    assert (shards.cameras, shards.pairs, shards.licence, shards.name) == ([], None, "unknown", spec)
    assert shards.camera_ids.tolist() == [-1] * 24
    verify(spec)
    # From now on nothing is scanned, by whatever process; a changed tar is, alone.
    scanned: list[str] = []
    scan = tar_index.scan
    monkeypatch.setattr(tar_index, "scan", lambda file, name: scanned.append(name) or scan(file, name))
    again = ShardSet.open(spec)
    assert scanned == []
    for name in ("labels", "camera_ids", "_shard", "_offset", "_length"):
        np.testing.assert_array_equal(getattr(again, name), getattr(shards, name))
    last = tmp_path / "data" / "train-00003.tar"
    os.utime(last, ns=(0, 0))
    ShardSet.open(spec)
    assert scanned == [str(last)]
    # An index that was not written out is made again.
    for path in (tmp_path / "cache" / "indices").iterdir():
        path.write_bytes(path.read_bytes()[:-9])
    assert ShardSet.open(spec).read(23) == images[23]
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.suffix in (".part", ".tar")]


def test_names_of_classes_and_cameras_from_json(tmp_path: Path) -> None:
    def sample(key: str, seed: int, fields: object) -> list[tuple[str, bytes]]:
        return [(f"{key}.JPEG", png(seed)), (f"{key}.json", json.dumps(fields).encode()), (f"{key}.txt", b"a caption")]

    first = make_tar(tmp_path / "a.tar", *sample("./x/1", 0, {"label": "p2", "camera": "c9"}),
                     *sample("x/2.left", 1, {"cls": 7}), ("__meta__/a.json", b"?"), ("README", b"?"))  # fmt: skip
    fields = {"label": "p10", "camera": 4}
    second = make_tar(tmp_path / "b.tar", *sample("1", 2, fields), ("1.cls", b"5"), ("2.png", png(3)), ("2.cls", b"7"))
    # "x/2.left.JPEG" is no image by itself: the extension is all behind the first dot.
    assert "sample 'x/2' has 0 images" in refused(f"{first}::{second}")
    first = make_tar(tmp_path / "a.tar", *sample("./x/1", 0, {"label": "p2", "camera": "c9"}),
                     *sample("x/2", 1, {"cls": 7}), ("__meta__/a.json", b"?"), ("README", b"?"))  # fmt: skip
    shards = ShardSet.open(f"{first}::{second}")
    assert shards.classes == ["7", "p10", "p2"]
    assert shards.labels.tolist() == [2, 0, 1, 0]
    assert shards.cameras == ["4", "c9"]
    assert shards.camera_ids.tolist() == [1, -1, 0, -1]
    assert [shards.read(n) for n in range(4)] == [png(n) for n in range(4)]
    verify(f"{first}::{second}")
    benchmark = EvaluationSet.open(f"{first}::{second}")
    assert benchmark.label_names == ["p2", "7", "p10", "7"]
    assert benchmark.camera_names == ["c9", None, "4", None]


def test_tars_of_our_own_directory_have_its_names(tmp_path: Path) -> None:
    directory = make_shards(tmp_path, {"bee": 4, "ant": 3})
    whole, tars = ShardSet.open(directory), ShardSet.open(f"{directory}/shard-00000{{0..1}}.tar")
    assert tars.classes == whole.classes == ["ant", "bee"]
    np.testing.assert_array_equal(tars.labels, whole.labels)
    assert [tars.read(n) for n in range(7)] == [whole.read(n) for n in range(7)]


def special(kind: bytes) -> Callable[[tarfile.TarFile], None]:
    def write(tar: tarfile.TarFile) -> None:
        member = tarfile.TarInfo("b.png")
        member.type, member.linkname = kind, "/etc/passwd"
        tar.addfile(member)

    return write


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (lambda tar: add(tar, "/etc/b.png", b""), "'/etc/b.png' points outside"),
        (lambda tar: add(tar, "x/../../b.png", b""), "'x/../../b.png' points outside"),
        (special(tarfile.SYMTYPE), "'b.png' is not a plain file"),
        (special(tarfile.LNKTYPE), "'b.png' is not a plain file"),
        (special(tarfile.CHRTYPE), "'b.png' is not a plain file"),
        (special(tarfile.FIFOTYPE), "'b.png' is not a plain file"),
        (lambda tar: add(tar, "a.jpg", b""), "sample 'a' has 2 images among cls, png, jpg"),
        (lambda tar: add(tar, "a.cls", b"1"), "sample 'a' has two files of one name"),
        (lambda tar: add(tar, "b.cls", b"1"), "sample 'b' has 0 images among cls"),
        (lambda tar: add(tar, "b.png", b""), "sample 'b' has no label: add"),
        (lambda tar: (add(tar, "b.png", b""), add(tar, "b.json", b"{}")), "sample 'b' has no label: add"),
        (lambda tar: (add(tar, "b.png", b""), add(tar, "b.json", b"{")), "sample 'b' has no label: "),
        (lambda tar: (add(tar, "b.png", b""), add(tar, "b.json", b'{"label": [1]}')), "sample 'b' has '[1]' for a"),
        (lambda tar: (add(tar, "b.png", b""), add(tar, "b.cls", b"\xff\x00")), "sample 'b' has no label: "),
        (lambda tar: (add(tar, "b.png", b""), add(tar, "b.cls", bytes(2**20 + 1))), "too many for a label"),
    ],
)
def test_a_tar_that_is_not_made_of_samples(
    tmp_path: Path, write: Callable[[tarfile.TarFile], object], words: str
) -> None:
    path = tmp_path / "bad.tar"
    with tarfile.open(path, "w") as tar:
        add(tar, "a.cls", b"0")
        add(tar, "a.png", png(0))
        write(tar)
    message = refused(str(path))
    assert words in message
    assert str(path) in message


def test_a_tar_cut_anywhere_is_refused(tmp_path: Path) -> None:
    """At every block, and within: only the padding after the end's first block of zeros may lack."""
    make_tars(tmp_path / "data", 1, per_tar=2)
    whole = (tmp_path / "data" / "train-00000.tar").read_bytes()
    end = len(whole.rstrip(b"\0"))
    end += -end % 512 + 512
    path = tmp_path / "cut.tar"
    for size in [*range(0, len(whole), 512), 1, 300, 700, end - 1]:
        path.write_bytes(whole[:size])
        if size >= end:
            assert len(ShardSet.open(str(path))) == 2
        else:
            message = refused(str(path))
            assert f"{path} is not a whole tar" in message, size
            assert "copy or make it again" in message
    for at in range(0, end - 512, 512):  # a damaged header
        if whole[at + 257 : at + 262] == b"ustar":
            path.write_bytes(whole[: at + 100] + b"\xff" * 60 + whole[at + 160 :])
            assert f"{path} is not a whole tar" in refused(str(path))
    assert "correct its path or range" in refused(str(tmp_path / "none.tar"))
    assert "is not a file" in refused(f"{path}::{tmp_path}")
    make_tar(path)
    assert "holds no sample" in refused(str(path))


def read_all(spec: str, gib: float = 1.0) -> list[bytes]:
    shards = ShardSet.open(spec, ShardCache(gib=gib))
    return [shards.read(n) for n in range(len(shards))]


def test_many_processes_at_once_index_and_fetch_once(tmp_path: Path, server: Server) -> None:
    images = make_tars(server.root, 3)
    counted = f"pipe:echo once >>{tmp_path}/count; cat {server.root}/train-{{00000..00002}}.tar"
    specs = [f"{server.url}/train-{{00000..00002}}.tar", counted, f"{server.root}/train-{{00000..00002}}.tar"]
    with multiprocessing.get_context("fork").Pool(6) as pool:
        for spec in specs:
            assert pool.map(read_all, [spec] * 6) == [images] * 6
    assert (tmp_path / "count").read_text() == "once\n" * 3
    assert len(list((tmp_path / "cache" / "indices").iterdir())) == 9
    assert len(list((tmp_path / "cache" / "shards").iterdir())) == 6
    shards = ShardSet.open(specs[0])
    shards.read(0)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.map(shards.read, range(len(shards))) == images


def test_a_directory_of_ours_behind_a_url(tmp_path: Path, server: Server) -> None:
    directory = Path(make_shards(tmp_path, {"bee": 4, "ant": 3}))
    shutil.copytree(directory, server.root / "sets" / "bees")
    here, there = ShardSet.open(directory), ShardSet.open(f"{server.url}/sets/bees/?key=1")
    assert server.tars() == []
    assert there.manifest == here.manifest
    assert [there.read(n) for n in range(7)] == [here.read(n) for n in range(7)]
    verify(f"{server.url}/sets/bees")
    assert len(server.tars()) == 2
    ShardSet.open(f"{server.url}/sets/bees")
    assert [path.rpartition("/")[2] for path, _ in server.asked].count("index.safetensors") == 1

    other = server.root / "other"
    shutil.copytree(directory, other)
    (other / "shard-000001.tar").write_bytes(b"short")
    text = (other / "manifest.json").read_text().replace(there.manifest.shards[1].sha256, "0" * 64)
    (other / "manifest.json").write_text(text)
    with pytest.raises(CorruptImage, match=r"shard-000001.tar has 5 bytes, expected \d+: copy it again"):
        ShardSet.open(f"{server.url}/other").read(6)
    (other / "manifest.json").write_text(text.replace('"shard-000001.tar"', '"../bees/shard-000001.tar"'))
    assert "'../bees/shard-000001.tar' is not the name of a file" in refused(f"{server.url}/other")
    (other / "manifest.json").write_text("{")
    assert f"{server.url}/other/manifest.json: " in refused(f"{server.url}/other")
    assert "none/manifest.json cannot be fetched: the server answers 404" in refused(f"{server.url}/none")


@pytest.mark.parametrize("ranges", [True, False])
def test_a_transfer_that_breaks_off_goes_on(server: Server, monkeypatch: pytest.MonkeyPatch, ranges: bool) -> None:
    monkeypatch.setattr(download, "CHUNK", 512)
    images = make_tars(server.root, 1)
    size = (server.root / "train-00000.tar").stat().st_size
    server.ranges, server.breaks = ranges, 1
    assert read_all(f"{server.url}/train-00000.tar") == images
    assert server.asked == [("/train-00000.tar", wanted) for wanted in (None, None, f"bytes={size // 2}-")]


def test_a_file_exchanged_while_it_is_fetched_is_not_mixed(server: Server, tmp_path: Path) -> None:
    make_tars(server.root, 1)
    path = server.root / "train-00000.tar"
    version = download.version_of(f"{server.url}/train-00000.tar")
    path.write_bytes(bytes(reversed(path.read_bytes())))
    with pytest.raises(UserError, match=r"train-00000.tar has changed since it was first read"):
        download.fetch(f"{server.url}/train-00000.tar", io.BytesIO(), lambda size: None, version)


def test_servers_that_do_not_give_a_shard(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_tars(server.root, 2)
    tar = f"{server.url}/train-00000.tar"
    assert "missing.tar cannot be fetched: the server answers 404 Not Found" in refused(f"{server.url}/missing.tar")
    assert len(server.asked) == 1
    server.stalls = ("/train-00000.tar",)
    message = refused(tar)
    assert message.startswith(f"{tar} cannot be fetched: no byte for 0.4 s, 5 attempts")
    server.stalls, server.fails = (), ("/train-00000.tar",)
    assert f"{tar} cannot be fetched: the server answers 503 Service Unavailable, 5 attempts" in refused(tar)
    server.fails, server.breaks, server.ranges = (), 99, False
    monkeypatch.setattr(download, "ATTEMPTS", 1)
    server.asked.clear()
    assert f"{tar} cannot be fetched: it broke off" in refused(tar)
    assert "cannot be fetched: Connection refused, 1 attempts" in refused("http://127.0.0.1:1/a.tar")
    assert "http:///a.tar is not a URL" in refused("http:///a.tar")
    assert list((tmp_path / "cache" / "shards").iterdir()) == []
    assert list((tmp_path / "cache" / "indices").iterdir()) == []


@pytest.mark.parametrize(
    ("pipe", "words"),
    [
        ("pipe:cat {tar}; echo it went wrong >&2; exit 3", "failed with status 3 (it went wrong)"),
        ("pipe:head -c 3000 {tar}", "is not a whole tar"),
        ("pipe:true", "is not a whole tar (empty file)"),
        ("pipe:head -c 3000 {tar}; sleep 30", "no byte for 1 s"),
        ("pipe:cat {tar}; exec >&-; sleep 30", "does not end after its output"),
    ],
)
def test_commands_that_do_not_give_a_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pipe: str, words: str
) -> None:
    monkeypatch.setattr(download, "PIPE_TIMEOUT_S", 1.0)
    make_tars(tmp_path / "data", 1)
    assert words in refused(pipe.format(tar=tmp_path / "data" / "train-00000.tar"))
    assert list((tmp_path / "cache" / "shards").iterdir()) == []
    assert list((tmp_path / "cache" / "indices").iterdir()) == []


def taken(directory: Path) -> int:
    """Bytes that the shards in a cache take, those being fetched included."""
    sizes = []
    for path in (directory / "shards").iterdir():
        try:
            sizes.append(path.stat().st_size)
        except FileNotFoundError:
            continue
    return sum(sizes)


def read_at_random(spec: str, gib: float, seed: int) -> list[tuple[int, bytes]]:
    shards = ShardSet.open(spec, ShardCache(gib=gib))
    return [(int(n), shards.read(n)) for n in np.random.default_rng(seed).integers(0, len(shards), 40)]


@pytest.mark.parametrize("kind", ["http", "pipe"])
def test_a_bounded_cache_gives_the_right_bytes_within_its_bound(tmp_path: Path, server: Server, kind: str) -> None:
    images = make_tars(server.root, 5)
    bound = 2 * max(path.stat().st_size for path in server.root.iterdir())
    gib = (bound + 0.5) / 2**30
    where = server.url if kind == "http" else f"pipe:cat {server.root}"
    spec = f"{where}/train-{{00000..00004}}.tar"
    largest, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            if (tmp_path / "cache" / "shards").is_dir():
                largest.append(taken(tmp_path / "cache"))

    watcher = threading.Thread(target=watch)
    with multiprocessing.get_context("fork").Pool(3) as pool:
        watcher.start()
        try:
            for found in pool.starmap(read_at_random, [(spec, gib, seed) for seed in range(3)]):
                assert all(image == images[n] for n, image in found)
        finally:
            done.set()
            watcher.join()
    assert bound / 2 <= max(largest) <= bound
    shards = ShardSet.open(spec, ShardCache(gib=gib))
    for n in np.random.default_rng(9).permutation(30):
        assert shards.read(n) == images[n]
        assert taken(tmp_path / "cache") <= bound
        assert len(shards._descriptors) <= 3, "dropped shards still take room on the disk"


def test_the_least_recently_used_shard_makes_room(tmp_path: Path, server: Server) -> None:
    images = make_tars(server.root, 3)
    gib = 2.5 * (server.root / "train-00000.tar").stat().st_size / 2**30
    shards = ShardSet.open(f"{server.url}/train-{{00000..00002}}.tar", ShardCache(gib=gib))
    shutil.rmtree(tmp_path / "cache" / "shards")
    server.asked.clear()
    for n in (0, 1, 0, 2, 0, 1):  # when 2 comes, 1 has not been used for the longest time
        time.sleep(0.02)  # times of modification are as coarse as the kernel's clock
        reader = pickle.loads(pickle.dumps(shards))  # as in another process, without open files
        assert reader.read(n * PER_TAR) == images[n * PER_TAR]
    assert server.tars() == [f"/train-0000{n}.tar" for n in (0, 1, 2, 1)]


def test_a_reader_reads_on_when_its_shard_has_gone(tmp_path: Path, server: Server) -> None:
    images = make_tars(server.root, 1)
    shards = ShardSet.open(f"{server.url}/train-00000.tar")
    shards.read(0)
    (path,) = (tmp_path / "cache" / "shards").iterdir()
    path.unlink()
    asked = len(server.asked)
    assert shards.read(1) == images[1]
    assert len(server.asked) == asked
    assert read_all(f"{server.url}/train-00000.tar") == images  # fetched again
    with next((tmp_path / "cache" / "shards").iterdir()).open("r+b") as file:
        file.truncate(100)  # as after a power cut
    assert read_all(f"{server.url}/train-00000.tar") == images


def test_a_shard_larger_than_the_cache(tmp_path: Path, server: Server) -> None:
    make_tars(server.root, 1)
    size = (server.root / "train-00000.tar").stat().st_size
    for spec in (f"{server.url}/train-00000.tar", f"pipe:cat {server.root}/train-00000.tar"):
        assert "raise data.shard_cache.gib" in refused(spec, gib=(size - 1) / 2**30)
        assert not list((tmp_path / "cache" / "shards").iterdir())
        read_all(spec)
        assert "raise data.shard_cache.gib" in refused(spec, gib=(size - 1) / 2**30)  # indexed meanwhile
        shutil.rmtree(tmp_path / "cache")


def test_what_a_killed_process_left_makes_room(tmp_path: Path) -> None:
    images = make_tars(tmp_path / "data", 1)
    tar = tmp_path / "data" / "train-00000.tar"
    store = Store.of(ShardCache())
    with store.lock("x"):
        left = tmp_path / "cache" / "shards" / "dead.part"
        left.write_bytes(bytes(tar.stat().st_size))
    assert read_all(f"pipe:cat {tar}", gib=(tar.stat().st_size + 0.5) / 2**30) == images
    assert not left.exists()


def test_downloads_that_leave_no_room_for_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_cache, "ROOM_TIMEOUT_S", 0.3)
    make_tars(tmp_path / "data", 1)
    tar = tmp_path / "data" / "train-00000.tar"
    store = Store(tmp_path / "cache", tar.stat().st_size)
    with store.lock("other"):  # a download that stands still
        (tmp_path / "cache" / "shards" / "other.part").write_bytes(b"x")
        with pytest.raises(UserError, match="no room for the shards that are fetched at the same time"):
            store.fetch(Tar(f"pipe:cat {tar}", "mine", tar.stat().st_size))
    os.close(store.fetch(Tar(f"pipe:cat {tar}", "mine", tar.stat().st_size)))


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    make_tars(tmp_path / "data", 1)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"shard cache .*file/cache cannot be used \(Not a directory\).*UFO_CACHE"):
        ShardSet.open(f"{tmp_path}/data/train-00000.tar", ShardCache(directory=str(tmp_path / "file" / "cache")))


def test_a_command_whose_output_has_changed(tmp_path: Path) -> None:
    make_tars(tmp_path / "data", 1)
    tar = tmp_path / "data" / "train-00000.tar"
    shards = ShardSet.open(f"pipe:cat {tar}")
    shutil.rmtree(tmp_path / "cache" / "shards")
    with tar.open("ab") as file:
        file.write(bytes(512))
    with pytest.raises(CorruptImage, match=r"has \d+ bytes, expected \d+.*remove .*indices"):
        shards.read(0)


def bomb() -> bytes:
    """A PNG of a few bytes whose header declares 60000 x 60000 pixels."""
    data = bytearray(png(0))
    data[16:24] = (60000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


def test_faults_in_mid_training_are_unreadable_images(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 4 shards one vanishes, locally and from server and cache alike; a fifth holds an enormous image."""
    make_tars(server.root, 4)
    large = make_tar(tmp_path / "large.tar", ("0.png", bomb()), ("0.cls", b"3"), ("1.png", png(1)), ("1.cls", b"3"))
    with pytest.raises(CorruptImage, match="pixels"):
        decode(bomb())
    for where in (str(server.root), server.url):
        task = linear_task("things", f"{where}/train-{{00000..00003}}.tar", large)
        source = TrainSource.open(task, seed=0)
        lost = server.root / "train-00001.tar"
        lost.rename(tmp_path / "lost")
        shutil.rmtree(tmp_path / "cache" / "shards", ignore_errors=True)
        server.asked.clear()
        skipped: set[int] = set()
        for draw in range(len(source)):
            _, label, of_draw = source.load(draw)
            skipped.update(of_draw)
            if source.index(draw) in range(PER_TAR, 2 * PER_TAR):
                assert label == source.labels[source.index(draw)]  # another one of its label, from another shard
        assert skipped == {*range(PER_TAR, 2 * PER_TAR), 4 * PER_TAR}
        assert server.tars().count("/train-00001.tar") <= 1, "every image of it waits for the server"
        (tmp_path / "lost").rename(lost)
    monkeypatch.setattr(shards_module, "MAX_IMAGE_BYTES", 10)
    with pytest.raises(CorruptImage, match="more than 10"):
        ShardSet.open(large).read(0)


def test_a_server_that_is_gone_is_not_asked_for_every_image(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_tars(server.root, 5)
    monkeypatch.setattr(download, "ATTEMPTS", 2)
    spec = f"{server.url}/train-{{00000..00004}}.tar"
    shards = ShardSet.open(spec)
    (tmp_path / "cache" / "shards").rename(tmp_path / "kept")
    server.fails = tuple(f"/train-0000{n}.tar" for n in range(5))
    server.asked.clear()
    for n in range(30):
        with pytest.raises(CorruptImage):
            shards.read(n)
    assert len(server.asked) == 3 * 2  # three shards in a row, two attempts each
    # What another process has fetched is read, and after a while the server is asked again.
    shutil.rmtree(tmp_path / "cache" / "shards")
    (tmp_path / "kept").rename(tmp_path / "cache" / "shards")
    assert shards.read(0) == png(0)
    shutil.rmtree(tmp_path / "cache" / "shards")
    monkeypatch.setattr(shards_module, "HOLD_OFF_S", 0.0)
    server.fails = ()
    assert shards.read(29) == png(29)


def test_unreachable_image_of_a_benchmark_is_one_line(tmp_path: Path, server: Server) -> None:
    make_tars(server.root, 1)
    benchmark = EvaluationSet.open(f"{server.url}/train-00000.tar")
    shutil.rmtree(tmp_path / "cache" / "shards")
    (server.root / "train-00000.tar").unlink()
    with pytest.raises(UserError, match=r"image 2 of http.*\(6\) cannot be read .*404") as error:
        benchmark.load(2, (8, 8))
    assert "\n" not in str(error.value)


RECIPE = """
name: elsewhere
model: {{backbone: {{dim: 16, depth: 1, heads: 2, patch_size: 4}}}}
tasks:
  - name: things
    head: {{type: linear}}
    loss: {{cross_entropy: {{}}}}
    input: [8, 8]
    samples_per_step: 12
    train: [{{shards: '{where}/train-{{00000..00003}}.tar'}}]
schedule: {{steps: 4}}
logging: {{every: 1, tensorboard: false}}
data: {{workers: 1, shard_cache: {{directory: {cache}, gib: 0.001}}}}
"""


def test_a_training_goes_on_without_a_shard(tmp_path: Path, server: Server) -> None:
    """One of 4 shards has gone since the set was indexed, so in a loader's process its images are unreadable."""
    make_tars(server.root, 4)
    cache = tmp_path / "cache"
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(where=f"pipe:cat {server.root}", cache=cache))
    ShardSet.open(f"pipe:cat {server.root}/train-{{00000..00003}}.tar")
    shutil.rmtree(cache / "shards")
    (server.root / "train-00002.tar").unlink()
    status, errors = outcome(tmp_path / "recipe.yaml", tmp_path / "run", "--data.max_corrupt", "0.25")
    assert (status, errors) == (0, [])
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["things/unreadable"] for line in lines if "things/unreadable" in line][-1] == PER_TAR


def test_command(tmp_path: Path, server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    make_tars(server.root, 2)
    spec = f"{server.url}/train-{{00000..00001}}.tar"
    command.main(["verify", spec])
    captured = capsys.readouterr()
    assert captured.out == f"{spec}: verified, 12 samples, 11 classes, 0 cameras, 2 shards, 0 corrupt\n"
    assert captured.err.startswith(f"indexing 2 of 2 shards of {spec}, once\n")
    broken = server.root / "train-00001.tar"
    broken.write_bytes(broken.read_bytes().replace(b"\x89PNG", b"\x89PNX"))
    with pytest.raises(UserError, match=r"train-00001.tar: sample 6 \(000006\) is corrupt .*: copy or make the tar"):
        command.main(["verify", spec])
