"""Shards from real servers and real commands: the right bytes, or one line that says what was wrong."""

import io
import shutil
from pathlib import Path

import pytest

from tests.elsewhere.served import Server, make_tars, read_all, refused
from tests.test_mixing import make_shards
from ufo_ds.data import download
from ufo_ds.data.shards import ShardSet, verify
from ufo_ds.data.transforms import CorruptImage
from ufo_ds.errors import UserError


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
