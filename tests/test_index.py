"""An index holds what the model makes of the images, finds what comparing with all of them finds, and is refused where
it is not whole."""

import json
import os
import shutil

import faiss
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.small_run import CLASSES, make_images, outputs_of
from ufo_ds import index
from ufo_ds.data.image_files import batches, open_images
from ufo_ds.data.layouts import read_folder
from ufo_ds.data.shard_writer import write as write_shards
from ufo_ds.data.transforms import evaluation_transform
from ufo_ds.errors import UserError
from ufo_ds.errors import run as run_entry
from ufo_ds.evaluation import search_index
from ufo_ds.evaluation.search_index import SearchIndex


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Images in two folders, one of them nested, and one image in none; among them a corrupt one and other files."""
    folder = tmp_path_factory.mktemp("photos")
    names = ["b/1.png", "b/2.jpg", "b/3.png", "a/deep/4.png", "a/5.jpg", "a/6.png", "7.png", "b/8.png"]
    for name, image in zip(names, make_images(), strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(image)
    (folder / "a" / "broken.png").write_bytes(make_images()[0][:60])
    (folder / "a" / "notes.txt").write_text("no image")
    return folder


KEPT = ["7.png", "a/5.jpg", "a/6.png", "a/deep/4.png", "b/1.png", "b/2.jpg", "b/3.png", "b/8.png"]
LABELS = [None, "a", "a", "a", "b", "b", "b", "b"]


def wanted_embeddings(model, task, folder):
    return outputs_of(model, task, [(folder / name).read_bytes() for name in KEPT]).embedding.numpy()


def unit(features):
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def error_of(capsys, *arguments):
    assert run_entry(index.main, [str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    return error


# --- what the command makes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("task", CLASSES)
def test_an_index_holds_the_supernets_embeddings(tmp_path, extracted, model, photos, capsys, task, workers):
    out = tmp_path / "index"
    options = ["--out", str(out), "--batch_size", "3", "--workers", str(workers), "--json"]
    index.main([str(extracted / task), str(photos), *options])
    printed, errors = capsys.readouterr()
    assert "left out a/broken.png: " in errors
    about = json.loads(printed)
    assert about.pop("out") == str(out)
    assert json.loads((out / "about.json").read_text()) == about
    assert (about["count"], about["left_out"], about["dim"], about["type"]) == (8, 1, 16, "flat")
    assert (about["task"], about["faiss"], about["metric"]) == (task, faiss.__version__, "cosine")
    entries = [json.loads(line) for line in (out / "entries.jsonl").read_text().splitlines()]
    assert entries == [{"file": file, "label": label} for file, label in zip(KEPT, LABELS, strict=True)]
    wanted = wanted_embeddings(model, task, photos)
    found = np.load(out / "embeddings.npy")
    assert found.dtype == np.float32
    assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()
    stored = faiss.read_index(str(out / "index.faiss")).reconstruct_n(0, 8)
    np.testing.assert_allclose(stored, unit(wanted), atol=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index"]


def test_a_run_and_its_extracted_model_make_the_same_index(tmp_path, run, extracted, photos, capsys):
    index.main([str(run), str(photos), "--task", "glyphs", "--out", str(tmp_path / "run")])
    index.main([str(extracted / "glyphs"), str(photos), "--out", str(tmp_path / "model")])
    one, other = (SearchIndex(tmp_path / name) for name in ("run", "model"))
    assert one.about.fingerprint == other.about.fingerprint
    assert one.entries == other.entries
    found, wanted = (np.load(tmp_path / name / "embeddings.npy") for name in ("run", "model"))
    assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()
    assert "8 images of 16 numbers, flat, 1 left out" in capsys.readouterr().out


def test_shards_are_indexed_in_their_order(tmp_path, extracted, model, photos):
    shutil.copytree(photos, tmp_path / "photos", ignore=lambda *_: ["7.png", "broken.png"])
    layout = read_folder(tmp_path / "photos")
    write_shards(layout, tmp_path / "shards", source="test", licence="none", shard_size=4)
    index.main([str(extracted / "digits"), str(tmp_path / "shards"), "--out", str(tmp_path / "index")])
    made = SearchIndex(tmp_path / "index")
    assert [label for _, label in made.entries] == [sample.label for sample in layout.samples]
    assert len({file for file, _ in made.entries}) == 7
    assert made.entries[5][0].endswith(".tar:1")
    wanted = outputs_of(model, "digits", [sample.path.read_bytes() for sample in layout.samples]).embedding.numpy()
    np.testing.assert_allclose(np.load(tmp_path / "index" / "embeddings.npy"), wanted, atol=1e-5)


def test_what_a_killed_one_has_left_is_no_index_and_in_nobodys_way(tmp_path, extracted, photos):
    left = tmp_path / ".index.unfinished"
    left.mkdir()
    (left / "index.faiss").write_bytes(b"half")
    index.main([str(extracted / "glyphs"), str(photos), "--out", str(tmp_path / "index")])
    assert SearchIndex(tmp_path / "index").about.count == 8
    assert not left.exists()


def test_names_that_are_no_text_are_indexed_too(tmp_path, extracted, capsys):
    folder = tmp_path / os.fsdecode(b"photos/caf\xe9")
    folder.mkdir(parents=True)
    (folder / os.fsdecode(b"\xff.png")).write_bytes(make_images()[0])
    index.main([str(extracted / "glyphs"), str(tmp_path / "photos"), "--out", str(tmp_path / "index")])
    assert SearchIndex(tmp_path / "index").entries == [("caf\ufffd/\ufffd.png", "caf\ufffd")]


# --- searching --------------------------------------------------------------------------------------------------------


def clustered(count, dim=24, clusters=60, seed=0, queries=0):
    """Points around centres, as embeddings of classes lie; the last are queries."""
    draw = np.random.default_rng(seed)
    centres = draw.normal(size=(clusters, dim))
    points = centres[draw.integers(0, clusters, count + queries)] + 0.35 * draw.normal(size=(count + queries, dim))
    points *= draw.uniform(0.1, 10, (count + queries, 1))  # lengths do not matter
    return points[:count].astype(np.float32), points[count:].astype(np.float32)


def made_of(tmp_path, embeddings, kind, labels=None):
    entries = [(f"{i}.png", None if labels is None else labels[i]) for i in range(len(embeddings))]
    about = {"model": "m", "fingerprint": "f", "task": "t", "input": (8, 8), "source": "s", "left_out": 0}
    search_index.write(tmp_path / kind, embeddings, entries, kind, **about)
    return SearchIndex(tmp_path / kind)


@pytest.mark.parametrize("seed", range(5))
def test_flat_finds_what_comparing_with_all_finds(tmp_path, seed):
    embeddings, queries = clustered(50 + 30 * seed, seed=seed, queries=12)
    found = made_of(tmp_path, embeddings, "flat").search(queries, 7)
    cosines = unit(queries.astype(np.float64)) @ unit(embeddings.astype(np.float64)).T
    for row, neighbours in zip(cosines, found, strict=True):
        order = np.argsort(-row)[:7]
        assert [neighbour.file for neighbour in neighbours] == [f"{i}.png" for i in order]
        np.testing.assert_allclose([neighbour.cosine for neighbour in neighbours], row[order], atol=1e-6)


def test_no_more_is_found_than_there_is(tmp_path):
    embeddings, queries = clustered(3, queries=2)
    for kind in ("flat", "hnsw"):
        assert [len(found) for found in made_of(tmp_path, embeddings, kind).search(queries, 10)] == [3, 3]


@pytest.mark.parametrize("count", [400, 3000])
@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
def test_approximate_kinds_find_nearly_all_that_flat_finds(tmp_path, kind, count):
    embeddings, queries = clustered(count, queries=200)
    exact, approximate = (made_of(tmp_path, embeddings, k).search(queries, 10) for k in ("flat", kind))
    shares = []
    for one, other in zip(exact, approximate, strict=True):
        assert [n.cosine for n in other] == sorted((n.cosine for n in other), reverse=True)
        shares.append(len({n.file for n in one} & {n.file for n in other}) / 10)
    assert np.mean(shares) >= 0.98


def test_parameters_follow_from_the_number_of_images(tmp_path):
    made = made_of(tmp_path, clustered(3000)[0], "ivf")
    assert made.about.parameters == {"nlist": 76, "nprobe": 8}  # 3000 // 39, less than 4 x 54.8
    assert search_index.build(clustered(30_000, dim=4)[0], "ivf")[1] == {"nlist": 693, "nprobe": 43}  # 4 x 173.2
    index = faiss.read_index(str(tmp_path / "ivf" / "index.faiss"))
    assert (index.nlist, index.nprobe) == (76, 8)
    made_of(tmp_path, clustered(100)[0], "hnsw")
    assert faiss.read_index(str(tmp_path / "hnsw" / "index.faiss")).hnsw.efSearch == 128


def test_an_embedding_of_nothing_is_like_nothing(tmp_path):
    embeddings = np.eye(3, dtype=np.float32)
    embeddings[1] = 0
    [found] = made_of(tmp_path, embeddings, "flat").search(np.ones((1, 3), np.float32), 3)
    assert [n.file for n in found][2] == "1.png"
    assert found[2].cosine == 0.0


# --- wrong input ------------------------------------------------------------------------------------------------------


def test_bad_input_ends_in_one_line(tmp_path, run, extracted, photos, capsys):
    model, out = extracted / "digits", tmp_path / "out"
    (tmp_path / "empty").mkdir()
    (tmp_path / "corrupt").mkdir()
    (tmp_path / "corrupt" / "1.png").write_bytes(b"\x89PNG")
    (tmp_path / "there").mkdir()
    file = tmp_path / "file"
    file.write_text("")
    for arguments, words in [
        ((model, tmp_path / "nowhere", "--out", out), ["nowhere is no directory"]),
        ((model, tmp_path / "empty", "--out", out), ["empty holds no image", "jpg"]),
        ((model, tmp_path / "corrupt", "--out", out), ["none of 1 images can be read, 1.png"]),
        ((model, photos, "--out", tmp_path / "there"), ["there exists"]),
        ((model, photos, "--out", file / "index"), ["--out", "Not a directory"]),
        ((model, photos, "--out", out, "--type", "ivf"), ["--type ivf needs 390", "here are 9", "use flat"]),
        ((model, photos, "--out", out, "--batch_size", 0), ["--batch_size 0"]),
        ((model, photos, "--out", out, "--workers", -1), ["--workers -1"]),
        ((model, photos, "--out", out, "--task", "glyphs"), ["--task glyphs", "'digits'"]),
        ((run, photos, "--out", out), ["digits, glyphs", "--task"]),
        ((photos, photos, "--out", out), ["neither a model"]),
    ]:
        error = error_of(capsys, *arguments)
        assert all(word in error for word in words), error
    assert not out.exists()


def test_embeddings_that_are_no_numbers_are_refused(tmp_path, extracted, photos, capsys):
    copied = shutil.copytree(extracted / "glyphs", tmp_path / "glyphs")
    state = load_file(copied / "model.safetensors")
    state["pooler.dense.bias"][0] = torch.nan
    save_file(state, copied / "model.safetensors", {"format": "pt"})
    error = error_of(capsys, copied, photos, "--out", tmp_path / "out")
    assert "gives an embedding of 7.png that is no number" in error
    assert not (tmp_path / "out").exists()


def replace_about(**values):
    def change(directory):
        file = directory / "about.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    return change


def drop_entry(directory):
    file = directory / "entries.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[1:]))


def write_pretransformed(directory):
    """A kind that is not ours, though its checksum is told rightly."""
    index = faiss.index_factory(24, "PCA8,Flat", faiss.METRIC_INNER_PRODUCT)
    index.train(clustered(50)[0])
    faiss.write_index(index, str(directory / "index.faiss"))
    replace_about(sha256=search_index.sha256(directory / "index.faiss"))(directory)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "is no index of"),
        (lambda directory: (directory / "about.json").write_text("[]"), "is no index of"),
        (replace_about(type="pq"), "is no index of .*about.json, type"),
        (lambda directory: (directory / "index.faiss").write_bytes(b"IxFI"), "not the file that about.json tells of"),
        (lambda directory: (directory / "index.faiss").unlink(), "is damaged .No such file"),
        (replace_about(type="ivf"), "not the file that about.json tells of"),
        (write_pretransformed, "not the file that about.json tells of"),
        (replace_about(count=49), "have not the size"),
        (drop_entry, "have not the size"),
        (lambda directory: (directory / "entries.jsonl").write_text("[]\n"), "is damaged"),
    ],
)
def test_what_is_no_whole_index_is_refused(tmp_path, damage, message):
    made_of(tmp_path, clustered(50)[0], "flat")
    damage(tmp_path / "flat")
    with pytest.raises(UserError, match=rf"^[^\n]*{message}[^\n]*$"):
        SearchIndex(tmp_path / "flat")


def test_a_file_is_no_index(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"^[^\n]*a.png is no index of [^\n]*$"):
        SearchIndex(tmp_path / "a.png")


def test_the_pixels_are_those_of_evaluation(photos):
    images = open_images(str(photos))
    read = list(batches(images, (24, 16), 4, 0))
    assert [position for batch in read for position in batch.positions] == [0, 1, 2, 4, 5, 6, 7, 8]
    assert [list(batch.faults) for batch in read] == [[3], [], []]
    wanted = np.stack([evaluation_transform((photos / name).read_bytes(), (24, 16)) for name in KEPT])
    assert np.array_equal(np.concatenate([batch.pixels.numpy() for batch in read]), wanted)
