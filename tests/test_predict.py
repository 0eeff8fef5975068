"""What is said of images: the supernet's classes, neighbours and similarities, and one line where nothing can be."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from tests.small_run import CLASSES, make_images, outputs_of
from ufo_ds import cli, index, predict
from ufo_ds.errors import run as run_entry
from ufo_ds.evaluation.thresholds import Probability, Threshold
from ufo_ds.subnets import calibration as calibrations
from ufo_ds.subnets.calibration import Calibration
from ufo_ds.subnets.task_model import open_model


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for i, image in enumerate(make_images()):
        (folder / "ab"[i % 2]).mkdir(exist_ok=True)
        (folder / "ab"[i % 2] / f"{i}.png").write_bytes(image)
    return folder


def files_of(folder):
    return [folder / "ab"[i % 2] / f"{i}.png" for i in range(8)]


@pytest.fixture(scope="module")
def indexes(tmp_path_factory, extracted, photos):
    directory = tmp_path_factory.mktemp("indexes")
    for task in CLASSES:
        index.main([str(extracted / task), str(photos), "--out", str(directory / task)])
    return directory


def said(capsys, *arguments):
    capsys.readouterr()
    predict.main([str(argument) for argument in arguments])
    text = capsys.readouterr().out
    predict.main([*(str(argument) for argument in arguments), "--json"])
    return text, json.loads(capsys.readouterr().out)


def error_of(capsys, *arguments):
    assert run_entry(predict.main, [str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize("number", range(8))
def test_classes_are_the_supernets(extracted, run, model, photos, capsys, number):
    file = files_of(photos)[number]
    wanted = outputs_of(model, "digits", [file.read_bytes()]).logits[0].softmax(0)
    text, result = said(capsys, extracted / "digits", file)
    assert [found["class"] for found in result["classes"]] == [CLASSES["digits"][i] for i in wanted.argsort().flip(0)]
    np.testing.assert_allclose(
        [found["probability"] for found in result["classes"]], wanted.sort(descending=True).values, atol=1e-5
    )
    assert result["images"] == [str(file)]
    assert text.splitlines()[0] == f"{file}, digits:"
    assert [line.split()[0] for line in text.splitlines()[1:]] == [found["class"] for found in result["classes"]]
    _, of_run = said(capsys, run, file, "--task", "digits", "--top", "2")
    assert of_run["fingerprint"] == result["fingerprint"]
    assert [found["class"] for found in of_run["classes"]] == [found["class"] for found in result["classes"][:2]]


@pytest.mark.parametrize("task", CLASSES)
def test_the_nearest_are_those_of_comparing_with_all(tmp_path, extracted, model, photos, indexes, capsys, task):
    query = tmp_path / "query.png"
    query.write_bytes(make_images(seed=5)[0])
    embeddings = outputs_of(model, task, [file.read_bytes() for file in [query, *files_of(photos)]]).embedding
    embeddings = torch.nn.functional.normalize(embeddings)
    cosines = embeddings[1:] @ embeddings[0]
    order = cosines.argsort(descending=True)[:3].tolist()
    text, result = said(capsys, extracted / task, query, "--index", indexes / task, "--top", "3")
    assert [found["file"] for found in result["nearest"]] == [f"{'ab'[i % 2]}/{i}.png" for i in order]
    np.testing.assert_allclose([found["cosine"] for found in result["nearest"]], cosines[order], atol=1e-5)
    labels = ["ab"[i % 2] for i in order]
    assert [found["label"] for found in result["nearest"]] == labels
    assert {vote["label"]: vote["votes"] for vote in result["vote"]} == {name: labels.count(name) for name in labels}
    assert result["vote"][0]["votes"] == max(labels.count(name) for name in labels)
    assert "nearest of 8 images" in text
    assert f"vote of labels: {result['vote'][0]['label']} {result['vote'][0]['votes']} of 3" in text


def test_labels_with_as_many_votes_are_in_the_order_of_their_nearest(extracted, photos, indexes, capsys):
    _, result = said(capsys, extracted / "glyphs", files_of(photos)[3], "--index", indexes / "glyphs", "--top", "8")
    assert [vote["votes"] for vote in result["vote"]] == [4, 4]
    assert result["vote"][0]["label"] == result["nearest"][0]["label"] == "b"
    assert result["nearest"][0]["file"] == "b/3.png"
    assert abs(result["nearest"][0]["cosine"] - 1) < 1e-5


def test_an_index_serves_the_run_that_its_model_was_cut_out_of(run, photos, indexes, capsys):
    _, result = said(capsys, run, files_of(photos)[2], "--task", "glyphs", "--index", indexes / "glyphs")
    assert result["nearest"][0]["file"] == "a/2.png"


def cosine_of(model, task, files, flip=False):
    images = [Image.open(file).convert("RGB") for file in files]
    embeddings = outputs_of(model, task, [file.read_bytes() for file in files]).embedding
    if flip:
        mirrored = []
        for i, image in enumerate(images):
            file = files[i].parent.parent / f"mirrored{i}.png"
            image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(file)
            mirrored.append(file.read_bytes())
            file.unlink()
        embeddings = (embeddings + outputs_of(model, task, mirrored).embedding) / 2
    embeddings = torch.nn.functional.normalize(embeddings)
    return float(embeddings[0] @ embeddings[1])


@pytest.mark.parametrize("task", CLASSES)
def test_two_images_are_compared_by_cosine(extracted, model, photos, capsys, task):
    files = files_of(photos)[1:3]
    text, result = said(capsys, extracted / task, *files)
    assert abs(result["cosine"] - cosine_of(model, task, files)) < 1e-5
    assert set(result) == {"model", "fingerprint", "task", "images", "cosine"}
    assert f"ufo evaluate {extracted / task} --far 0.001" in text


def calibrate(extracted, run, task, thresholds, flip=False):
    calibration = Calibration(
        model=open_model(extracted / task).fingerprint,
        task=task,
        benchmark="pairs",
        flip=flip,
        probability=Probability(slope=4.0, intercept=-1.0),
        thresholds=[
            Threshold(far, threshold, far, (far / 2, 2 * far), 0.9, (0.8, 0.95), 60, 30, 20)
            for far, threshold in thresholds
        ],
    )
    for file in (extracted / task / "calibration.json", run / f"calibration-{task}.json"):
        calibrations.write(file, calibration)


@pytest.fixture
def cut_out(tmp_path, extracted, run):
    """Copies of the models and of the run, to be calibrated."""
    return shutil.copytree(extracted, tmp_path / "extracted"), shutil.copytree(run, tmp_path / "run")


@pytest.mark.parametrize("flip", [False, True])
def test_a_calibrated_model_says_whether_two_show_the_same(cut_out, model, photos, capsys, flip):
    models, run = cut_out
    files = files_of(photos)[:2]
    cosine = cosine_of(model, "glyphs", files, flip)
    calibrate(models, run, "glyphs", [(0.1, cosine - 0.01), (0.001, cosine + 0.01)], flip)
    for place in ([models / "glyphs", *files], [run, *files, "--task", "glyphs"]):
        text, result = said(capsys, *place)
        assert abs(result["cosine"] - cosine) < 1e-5
        assert result["same"] is True
        assert abs(result["probability"] - 1 / (1 + np.exp(-(4 * cosine - 1)))) < 1e-5
        assert [(found["far"], found["same"]) for found in result["thresholds"]] == [(0.1, True), (0.001, False)]
        lines = text.splitlines()
        assert lines[1].startswith(f"same, probability of the same {result['probability']:.4f}")
        assert lines[2].startswith("  same by the threshold ")
        assert ", FAR 0.1 (0.05 .. 0.2 on pairs), TAR 0.9000" in lines[2]
        assert lines[3].startswith("  different by the threshold ")


def test_a_pair_at_the_threshold_is_the_same(cut_out, photos, capsys):
    models, run = cut_out
    files = files_of(photos)[:2]
    cosine = said(capsys, models / "digits", *files)[1]["cosine"]
    for threshold, same in ((cosine, True), (np.nextafter(cosine, 2), False)):
        calibrate(models, run, "digits", [(0.01, threshold)])
        assert said(capsys, models / "digits", *files)[1]["same"] is same


def test_a_terminal_without_the_characters_is_no_fault(tmp_path, extracted, photos):
    file = tmp_path / os.fsdecode(b"\xff.png")
    file.write_bytes(files_of(photos)[0].read_bytes())
    command = [sys.executable, "-c", "from ufo_ds.cli import main; raise SystemExit(main())", "predict"]
    done = subprocess.run(
        [*command, extracted / "digits", file], env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True,
        timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert sorted(line.split()[0] for line in done.stdout.decode().splitlines()[1:]) == sorted(CLASSES["digits"])


# --- wrong input ------------------------------------------------------------------------------------------------------


def test_an_index_of_another_model_is_refused_by_both_names(extracted, run, indexes, photos, capsys):
    file = files_of(photos)[0]
    error = error_of(capsys, extracted / "digits", file, "--index", indexes / "glyphs")
    for name in (extracted / "glyphs", extracted / "digits"):
        assert f"{name} (task {name.name}, {open_model(name).fingerprint[:12]})" in error
    assert str(run) in error_of(capsys, run, file, "--task", "glyphs", "--index", indexes / "digits")


def test_a_calibration_of_another_model_is_refused(cut_out, photos, capsys):
    models, run = cut_out
    calibrate(models, run, "glyphs", [(0.1, 0.5)])
    (models / "glyphs" / "calibration.json").rename(models / "digits" / "calibration.json")
    assert "is the calibration of model" in error_of(capsys, models / "digits", *files_of(photos)[:2])


def test_bad_input_ends_in_one_line(tmp_path, extracted, run, indexes, photos, capsys):
    one, two, three = files_of(photos)[:3]
    broken = tmp_path / "broken.png"
    broken.write_bytes(one.read_bytes()[:50])
    model = extracted / "digits"
    for arguments, words in [
        ((model, tmp_path / "none.png"), ["none.png cannot be read", "No such file"]),
        ((model, tmp_path), ["cannot be read", "Is a directory"]),
        ((model, broken), ["broken.png is no image that can be read"]),
        ((model, one, broken), ["broken.png is no image that can be read"]),
        ((model, one, two, three), ["3 images"]),
        ((model, one, two, "--index", indexes / "digits"), ["is for one image"]),
        ((model, one, "--top", "0"), ["--top 0"]),
        ((model, one, "--task", "glyphs"), ["--task glyphs", "'digits'"]),
        ((model, one, "--index", photos), ["is no index of `ufo index`"]),
        ((model, one, "--index", one), ["is no index of `ufo index`"]),
        ((extracted / "glyphs", one), ["has no classes", "'glyphs'", "--index"]),
        ((run, one), ["digits, glyphs", "--task"]),
        ((photos, one), ["neither a model"]),
    ]:
        error = error_of(capsys, *arguments)
        assert all(word in error for word in words), error


def test_the_commands_are_verbs(capsys):
    for verb in ("index", "predict"):
        with pytest.raises(SystemExit) as end:
            cli._dispatch([verb, "--help"])
        assert end.value.code == 0
        assert f"ufo {verb} " in capsys.readouterr().out
