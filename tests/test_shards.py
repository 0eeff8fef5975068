"""Shards: written by us, read by stock webdataset; every fault found; nothing half-written."""

import hashlib
import json
import multiprocessing
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image
from safetensors.numpy import load_file, save

from ufo_ds import shards as command
from ufo_ds.data import shards
from ufo_ds.data.evaluation_set import EvaluationSet
from ufo_ds.data.layouts import Layout, Pair, Sample, read_csv, read_folder
from ufo_ds.data.shard_writer import write
from ufo_ds.data.shards import ShardSet, verify
from ufo_ds.errors import UserError


def save_image(path: Path, seed: int, size: tuple[int, int] = (9, 7)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes of 2, 3 and 4 images, in JPEG and PNG."""
    for label, name in enumerate(["ant", "bee", "cat"]):
        for n in range(label + 2):
            save_image(tmp_path / "images" / name / f"{n}.{'JPG' if n % 2 else 'png'}", seed=10 * label + n)
    return tmp_path / "images"


@pytest.fixture
def written(folder: Path, tmp_path: Path) -> ShardSet:
    return write(read_folder(folder), tmp_path / "out", source="test", licence="CC0-1.0", shard_size=4)


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


def test_stock_webdataset_reads_what_the_index_reads(folder: Path, written: ShardSet) -> None:
    urls = sorted(str(path) for path in written.directory.glob("*.tar"))
    assert [Path(url).name for url in urls] == [f"shard-{n:06d}.tar" for n in range(3)]  # 4 + 4 + 1 samples
    stock = list(webdataset.WebDataset(urls, shardshuffle=False))
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    assert len(stock) == len(written) == len(files) == 9
    assert len({sample["__key__"] for sample in stock}) == 9
    for index, (sample, file) in enumerate(zip(stock, files, strict=True)):
        assert sample[file.suffix[1:].lower()] == file.read_bytes() == written.read(index)
        assert written.classes[int(sample["cls"])] == file.parent.name
        assert written.labels[index] == int(sample["cls"])
        assert json.loads(sample["json"]) == {"label": file.parent.name}
    decoded = next(iter(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8").to_tuple("png", "cls")))
    np.testing.assert_array_equal(decoded[0], np.asarray(Image.open(files[0])))
    assert decoded[1] == 0


def test_manifest_says_what_is_there(written: ShardSet) -> None:
    manifest = json.loads((written.directory / "manifest.json").read_text())
    assert manifest["samples"] == 9
    assert manifest["classes"] == [{"name": n, "samples": c} for n, c in (("ant", 2), ("bee", 3), ("cat", 4))]
    assert [shard["samples"] for shard in manifest["shards"]] == [4, 4, 1]
    assert (manifest["licence"], manifest["source"], manifest["corrupt"]) == ("CC0-1.0", "test", 0)
    assert len({path.stat().st_mode for path in written.directory.iterdir()}) == 1, "others cannot read some files"
    assert written.camera_ids.tolist() == [-1] * 9
    assert written.pairs is None
    verify(written.directory)


def test_same_input_same_bytes(folder: Path, written: ShardSet, tmp_path: Path) -> None:
    for file in folder.rglob("*.png"):
        file.touch()
    write(read_folder(folder), tmp_path / "again", source="test", licence="CC0-1.0", shard_size=4, workers=3)
    first = {path.name: path.read_bytes() for path in written.directory.iterdir()}
    assert first == {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()}


def test_csv_with_cameras(folder: Path, tmp_path: Path) -> None:
    (folder / "list.csv").write_text("path,id,camera\nbee/0.png,x,c2\nant/1.JPG,y,c1\nant/0.png,x,\n")
    benchmark = EvaluationSet(write(read_csv(folder / "list.csv"), tmp_path / "out", source="test"))
    assert benchmark.label_names == ["x", "y", "x"]
    assert benchmark.camera_names == ["c2", "c1", None]
    assert benchmark.load(0, (5, 6)).shape == (3, 5, 6)
    (sample, *_) = webdataset.WebDataset(str(tmp_path / "out" / "shard-000000.tar"), shardshuffle=False)
    assert json.loads(sample["json"]) == {"label": "x", "camera": "c2"}


def test_csv_of_classes_equals_folder(folder: Path) -> None:
    layout = read_folder(folder)
    lines = [f"{sample.path.relative_to(folder)},{sample.label}\n" for sample in layout.samples]
    (folder / "list.csv").write_text("path,class\n" + "".join(lines))
    assert read_csv(folder / "list.csv") == layout


def test_pair_list(folder: Path, tmp_path: Path) -> None:
    (folder / "pairs.csv").write_text("fold,path1,path2,same\n0,ant/0.png,ant/1.JPG,1\n1,bee/0.png,ant/0.png,0\n")
    shard_set = write(read_csv(folder / "pairs.csv"), tmp_path / "out", source="test")
    assert shard_set.pairs is not None
    assert shard_set.pairs.tolist() == [[0, 0, 1, 1], [1, 2, 0, 0]]
    assert shard_set.read(2) == (folder / "bee/0.png").read_bytes()
    verify(tmp_path / "out")


def test_corrupt_images_are_counted_and_their_pairs_dropped(folder: Path, tmp_path: Path) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    whole = files[1].read_bytes()
    files[1].write_bytes(whole[: len(whole) // 2])
    samples = [Sample(path, path.parent.name) for path in files]
    layout = Layout(samples, [Pair(0, 0, 1, True), Pair(3, 2, 8, False)])
    with pytest.raises(UserError, match=r"ant/1.JPG is corrupt .*--max_corrupt") as error:
        write(layout, tmp_path / "none", source="test")
    assert "number 1 of 9" in one_line(error)
    shard_set = write(layout, tmp_path / "out", source="test", max_corrupt=1 / 9)
    assert len(shard_set) == 8
    assert shard_set.manifest.corrupt == shard_set.manifest.dropped_pairs == 1
    assert shard_set.pairs is not None
    assert shard_set.pairs.tolist() == [[3, 1, 7, 0]]
    assert shard_set.read(7) == files[8].read_bytes()
    verify(tmp_path / "out")
    files[0].write_bytes(b"")
    with pytest.raises(UserError, match="number 2 of 9"):
        write(layout, tmp_path / "more", source="test", max_corrupt=1 / 9)


@pytest.mark.parametrize("fault", ["full", "corrupt", "gone", "parent is a file"])
def test_failed_write_leaves_nothing(folder: Path, tmp_path: Path, fault: str) -> None:
    layout, out = read_folder(folder), tmp_path / "new" / "out"
    if fault == "corrupt":
        layout.samples[-1].path.write_bytes(b"no image")
    elif fault == "gone":
        layout.samples[-1].path.unlink()
    elif fault == "parent is a file":
        out.parent.write_text("")
    before = sorted(tmp_path.rglob("*"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if fault == "full":
        resource.setrlimit(resource.RLIMIT_FSIZE, (2048, hard))
    try:
        with pytest.raises(UserError) as error:
            write(layout, out, source="test", shard_size=4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(layout.samples[-1].path if fault in ("corrupt", "gone") else out) in one_line(error)
    assert sorted(tmp_path.rglob("*")) == before


def test_existing_out_is_kept(folder: Path, written: ShardSet) -> None:
    with pytest.raises(UserError, match=r"out exists: remove it or choose another"):
        write(read_folder(folder), written.directory, source="test")
    verify(written.directory)


def flip_byte(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("shard", [0, 1, 2])
def test_verify_finds_any_flipped_byte(written: ShardSet, shard: int) -> None:
    path = written.directory / f"shard-{shard:06d}.tar"
    size = path.stat().st_size
    for position in np.random.default_rng(shard).integers(0, size, 5):
        flip_byte(path, int(position))
        with pytest.raises(UserError, match=f"shard-{shard:06d}.tar has another sha256"):
            verify(written.directory)
        flip_byte(path, int(position))
    verify(written.directory)


@pytest.mark.parametrize(
    ("column", "value", "fault"),
    [
        ("offset", 512, "sample 1 .* has another image than the one at its offset"),
        ("offset", 10**9, "sample 1 .* is corrupt .*ends inside image 1"),
        ("label", 1, "sample 1 .* has cls b'0', the index says 1"),
        ("label", 3, "sample 1 .* has label 3, out of range for 3 classes"),
    ],
)
def test_verify_compares_the_index_with_the_tars(written: ShardSet, column: str, value: int, fault: str) -> None:
    """An index whose checksum is right, but which says something else than the shards."""
    index = load_file(written.directory / "index.safetensors")
    index[column][1] = value
    (written.directory / "index.safetensors").write_bytes(save(index))
    manifest = json.loads((written.directory / "manifest.json").read_text())
    manifest["index_sha256"] = hashlib.sha256(save(index)).hexdigest()
    (written.directory / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=fault) as error:
        verify(written.directory)
    one_line(error)


def test_truncated_missing_or_exchanged_files_are_found(written: ShardSet, tmp_path: Path) -> None:
    def damaged(name: str) -> Path:
        return shutil.copytree(written.directory, tmp_path / name)

    directory = damaged("truncated")
    with (directory / "shard-000001.tar").open("r+b") as file:
        file.truncate(5000)
    with pytest.raises(UserError, match=r"shard-000001.tar has 5000 bytes, expected \d+"):
        ShardSet.open(directory)

    directory = damaged("missing")
    (directory / "shard-000002.tar").unlink()
    with pytest.raises(UserError, match=r"shard-000002.tar is missing"):
        ShardSet.open(directory)

    directory = damaged("index")
    flip_byte(directory / "index.safetensors", -1)
    with pytest.raises(UserError, match=r"index.safetensors is missing or not the one"):
        ShardSet.open(directory)

    directory = damaged("manifest")
    text = (directory / "manifest.json").read_text()
    (directory / "manifest.json").write_text(text.replace('"version": 1', '"version": 7'))
    with pytest.raises(UserError, match=r"manifest.json: version"):
        ShardSet.open(directory)
    (directory / "manifest.json").write_text(text[:-20])
    with pytest.raises(UserError, match=r"manifest.json"):
        ShardSet.open(directory)
    (directory / "manifest.json").write_text(text.replace('"name": "ant"', '"name": "cow"'))
    with pytest.raises(UserError, match=r"another label name than 'cow'"):
        verify(directory)

    with pytest.raises(UserError, match=r"nowhere.*ufo shards"):
        ShardSet.open(tmp_path / "nowhere")


def test_every_process_reads_for_itself(written: ShardSet) -> None:
    expected = [written.read(index) for index in range(len(written))]
    for method in ("fork", "spawn"):
        with multiprocessing.get_context(method).Pool(1) as pool:
            assert pool.map(written.read, range(len(written))) == expected


def test_more_shards_than_a_process_may_open(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "MAX_OPEN", 10)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    layout = Layout([Sample(path, "any") for path in files] * 3)
    shard_set = write(layout, tmp_path / "out", source="test", shard_size=1)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for index in [*range(27), *range(0, 27, 7)]:
        assert shard_set.read(index) == files[index % 9].read_bytes()
    assert len(list(Path("/proc/self/fd").iterdir())) == before + 10
    del shard_set
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "list.csv:1: header '' is not known"),
        ("file,label\n", "list.csv:1: header 'file,label' is not known"),
        ("path,id\n", "list.csv lists no image"),
        ("path,id\nant/0.png\n", "list.csv:2: 1 values"),
        ("path,id\n\nant/0.png,\n", "list.csv:3: 'ant/0.png' has an empty id"),
        ("path,class\nant/0.png,a\nant/9.png,a\n", "list.csv:3: .*ant/9.png does not exist"),
        ("path,class\nant/0.gif,a\n", "list.csv:2: 'ant/0.gif' is not an image"),
        ("fold,path1,path2,same\n-1,ant/0.png,ant/1.JPG,1\n", "list.csv:2: fold '-1' is not a number"),
        ("fold,path1,path2,same\n0,ant/0.png,ant/1.JPG,yes\n", "list.csv:2: same is 'yes'"),
        ("path,id\n\udcff,a\n", "list.csv is not a CSV file in UTF-8"),
    ],
)
def test_wrong_csv(folder: Path, text: str, fault: str) -> None:
    (folder / "list.csv").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=fault) as error:
        read_csv(folder / "list.csv")
    one_line(error)


def test_wrong_folder(folder: Path) -> None:
    with pytest.raises(UserError, match="nowhere is not a directory"):
        read_folder(folder / "nowhere")
    with pytest.raises(UserError, match="ant has no sub-folder"):
        read_folder(folder / "ant")
    (folder / "dog").mkdir()
    with pytest.raises(UserError, match="dog holds no image"):
        read_folder(folder)


def test_unreadable_benchmark_image_is_named(folder: Path, written: ShardSet) -> None:
    data = written.read(0)
    path = written.directory / "shard-000000.tar"
    path.write_bytes(path.read_bytes().replace(data, bytes(len(data))))
    with pytest.raises(UserError, match=r"image 0 of .*out \(ant\) cannot be read") as error:
        EvaluationSet.open(written.directory).load(0, (8, 8))
    one_line(error)


def test_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    command.main(["folder", str(folder), out, "--licence", "CC0-1.0", "--shard_size", "5", "--json"])
    summary = json.loads(capsys.readouterr().out)
    assert summary == {
        "directory": out, "samples": 9, "classes": 3, "cameras": 0, "shards": 2, "corrupt": 0, "licence": "CC0-1.0",
    }  # fmt: skip
    command.main(["verify", out])
    printed = capsys.readouterr().out
    assert printed.startswith(f"{out}: verified, 9 samples, 3 classes")
    assert printed.count("\n") == 1
    with pytest.raises(UserError, match="--max_corrupt"):
        command.main(["folder", str(folder), out, "--max_corrupt", "many"])
    with pytest.raises(SystemExit, match="0"):
        command.main(["csv", "--help"])
    assert "examples:" in capsys.readouterr().out


def test_index_needs_only_seek_and_read(folder: Path, written: ShardSet) -> None:
    index = load_file(written.directory / "index.safetensors")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for shard, offset, length, file in zip(index["shard"], index["offset"], index["length"], files, strict=True):
        with (written.directory / f"shard-{shard:06d}.tar").open("rb") as tar:
            tar.seek(offset)
            assert tar.read(length) == file.read_bytes()
    dtypes = {name: column.dtype.name for name, column in index.items()}
    assert dtypes == {"shard": "int32", "offset": "int64", "length": "int64", "label": "int64", "camera": "int64"}
