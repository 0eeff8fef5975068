"""A cache that many processes share: the right bytes within its bound, also in mid-training when shards are lost."""

import json
import multiprocessing
import os
import pickle
import shutil
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest

from tests.elsewhere.served import PER_TAR, Server, make_tar, make_tars, png, read_all, refused
from tests.test_bad_input import outcome
from tests.test_mixing import linear_task
from ufo_ds import shards as command
from ufo_ds.data import download, shard_cache
from ufo_ds.data import shards as shards_module
from ufo_ds.data.evaluation_set import EvaluationSet
from ufo_ds.data.shard_cache import Store, Tar
from ufo_ds.data.shards import ShardSet
from ufo_ds.data.source import TrainSource
from ufo_ds.data.transforms import CorruptImage, decode
from ufo_ds.errors import UserError
from ufo_ds.recipe import ShardCache


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
