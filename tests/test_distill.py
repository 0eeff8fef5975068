"""``ufo distill`` from end to end, and what it refuses."""

import fcntl
import io
import json
import resource
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel

from tests import ranks
from tests.image_folder import make_folder
from tests.small_run import make_images, make_model, make_recipe, write_checkpoint
from ufo_ds import distill, errors, latency
from ufo_ds.data.transforms import evaluation_transform
from ufo_ds.distillation import writing
from ufo_ds.distillation.trainee import new_student
from ufo_ds.errors import UserError
from ufo_ds.subnets.task_model import open_model

SHORT = ["--student", "resnet18", "--width", "0.05", "--steps", "12", "--batch_size", "8", "--views", "2"]
SHORT += ["--label_weight", "1"]


def run_verb(capsys, *arguments):
    distill.main([*map(str, arguments), "--device", "cpu", "--json"])
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("task", ["digits", "glyphs"])
@pytest.mark.parametrize("kind", ["run", "model"])
def test_a_student_is_a_model(run, extracted, tmp_path, capsys, task, kind):
    """open_model has what transformers and the stock processor have; and so has the trainee's own head."""
    folder = make_folder(tmp_path / "images", 24)
    teacher = [run, "--task", task] if kind == "run" else [extracted / task]
    result = run_verb(capsys, *teacher, *SHORT, "--data", folder, "--out", tmp_path / "out")
    assert set(result["losses"]) == {"logits", "feature", "relation", "label"} - (
        {"logits"} if (task, kind) == ("glyphs", "model") else set()
    )
    assert not list(tmp_path.glob("out.*"))
    model = open_model(tmp_path / "out")
    assert (model.task, model.classes) == (task, ["zero", "one", "two"] if task == "digits" else [])
    images = make_images()
    found = model.embed(torch.from_numpy(np.stack([evaluation_transform(image, model.input) for image in images])))
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    pixels = processor(images=[Image.open(io.BytesIO(image)) for image in images], return_tensors="pt").pixel_values
    with torch.no_grad():
        wanted = AutoModel.from_pretrained(tmp_path / "out").eval()(pixels)
    assert torch.allclose(found.embedding, wanted.pooler_output, rtol=1e-4, atol=1e-4)
    if task == "digits":
        assert torch.allclose(found.logits, wanted.logits, rtol=1e-4, atol=1e-4)
    assert result["parameters"] == sum(v.numel() for v in model.network.parameters())
    card = (tmp_path / "out" / "README.md").read_text()
    assert "resnet18" in card
    assert writing.licences_behind([tmp_path / "out"], task) == {
        **writing.licences_behind([run if kind == "run" else extracted / task], task), "distilled on": ["unknown"],
    }  # fmt: skip
    with pytest.raises(UserError, match="exists"):
        run_verb(capsys, *teacher, *SHORT, "--data", folder, "--out", tmp_path / "out")


def test_it_learns_what_the_teacher_says(run, tmp_path, capsys):
    """Without labels; a student of a student too. Closer to the teacher than one that was hardly trained."""
    folder = make_folder(tmp_path / "images", 24, ())
    arguments = [run, "--task", "digits", "--data", folder, "--student", "resnet18", "--width", "0.1"]
    short = run_verb(capsys, *arguments, "--steps", "2", "--batch_size", "24", "--views", "2", "--out", tmp_path / "a")
    arguments += ["--batch_size", "24", "--views", "2", "--lr", "0.01"]
    long = run_verb(capsys, *arguments, "--steps", "80", "--out", tmp_path / "b")
    assert set(long["losses"]) == {"logits", "feature", "relation"}
    assert long["losses"]["feature"] < 0.5 * short["losses"]["feature"]
    assert long["losses"]["logits"] < 0.5 * short["losses"]["logits"]
    again = run_verb(capsys, tmp_path / "b", *SHORT, "--data", folder, "--out", tmp_path / "c")
    assert again["teacher_parameters"] == long["parameters"]


def test_after_a_kill_it_goes_on_to_the_same_bits(run, tmp_path, capsys, monkeypatch):
    from ufo_ds.distillation import loop

    folder = make_folder(tmp_path / "images", 16)
    arguments = [run, "--task", "glyphs", *SHORT, "--data", folder]
    run_verb(capsys, *arguments, "--out", tmp_path / "whole")
    monkeypatch.setattr(loop, "SAVE_EVERY", 5)
    rate = loop.rate

    def killed(settings, step):
        if step == 8:
            raise KeyboardInterrupt
        return rate(settings, step)

    monkeypatch.setattr(loop, "rate", killed)
    with pytest.raises(KeyboardInterrupt):
        run_verb(capsys, *arguments, "--out", tmp_path / "cut")
    assert not (tmp_path / "cut").exists()
    shutil.copytree(tmp_path / "cut.partial", tmp_path / "other.partial")
    steps = []
    monkeypatch.setattr(loop, "rate", lambda settings, step: steps.append(step) or rate(settings, step))
    run_verb(capsys, *arguments, "--out", tmp_path / "cut")
    assert sorted(set(steps)) == list(range(5, 12))
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    # With other settings it starts over.
    steps.clear()
    run_verb(capsys, *arguments, "--lr", "0.1", "--out", tmp_path / "other")
    assert min(steps) == 0


def test_two_processes_are_one(run, tmp_path):
    """Of a student without batch norm and losses that are of single samples; of others each has statistics of its
    own."""
    folder = make_folder(tmp_path / "images", 16)
    arguments = ["--task", "digits", "--student", "vit_tiny", "--width", "0.1", "--relation_weight", "0"]
    arguments += ["--views", "2", "--steps", "6", "--batch_size", "8", "--lr", "0.0005"]
    for count, out in ((1, tmp_path / "one"), (2, tmp_path / "two")):
        words = [run, *arguments, "--data", folder, "--out", out, "--device", "cpu", "--json"]
        ranks.run(count, distill.main, [str(word) for word in words])
        assert not out.with_name(f"{out.name}.partial").exists()
    one, other = (AutoModel.from_pretrained(tmp_path / name).state_dict() for name in ("one", "two"))
    task = open_model(run, "digits").recipe.tasks[0]
    start = new_student("vit_tiny", 0.1, task, ["zero", "one", "two"], 16, 0).state_dict()
    moved = {name: (value - start[name]).abs().max().item() for name, value in one.items()}
    apart = {name: (value - other[name]).abs().max().item() for name, value in one.items()}
    assert max(moved.values()) > 1e-3
    assert max(apart.values()) < 1e-5


def test_labels_alone_are_the_baseline(run, tmp_path, capsys):
    folder = make_folder(tmp_path / "images", 12)
    off = ["--logits_weight", "0", "--feature_weight", "0", "--relation_weight", "0"]
    result = run_verb(capsys, run, "--task", "digits", *SHORT, *off, "--data", folder, "--out", tmp_path / "out")
    assert set(result["losses"]) == {"label"}
    assert result["settings"]["mixup_prob"] == 0  # or labels would be lost
    assert "none: labels alone" in (tmp_path / "out" / "README.md").read_text()


def test_latency_of_a_student(run, tmp_path, capsys, monkeypatch):
    from ufo_ds.subnets import timing

    monkeypatch.setattr(timing, "SECONDS", 0.1)
    folder = make_folder(tmp_path / "images", 12)
    run_verb(capsys, run, "--task", "digits", *SHORT, "--data", folder, "--out", tmp_path / "out")
    latency.main([str(tmp_path / "out"), "--json"])
    assert json.loads(capsys.readouterr().out)["images_per_second"] > 0


def with_small_files(words: list[str]) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
    distill.main(words)


def test_a_full_disk_is_one_line_and_it_goes_on_with_room(run, tmp_path):
    folder = make_folder(tmp_path / "images", 12)
    words = [run, "--task", "digits", *SHORT, "--data", folder, "--out", tmp_path / "out", "--device", "cpu", "--json"]
    status, output = ranks.launch(1, errors.run, with_small_files, [str(word) for word in words])
    assert status == 2
    assert "could not be written: File too large: make room" in output
    assert "Traceback" not in output
    assert not (tmp_path / "out").exists()
    assert ranks.launch(1, errors.run, distill.main, [str(word) for word in words])[0] == 0
    assert (tmp_path / "out").exists()


def test_two_that_make_the_same(run, tmp_path, capsys):
    folder = make_folder(tmp_path / "images", 12)
    (tmp_path / "out.partial").mkdir()
    with (tmp_path / "out.partial" / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process makes it"):
            run_verb(capsys, run, "--task", "digits", *SHORT, "--data", folder, "--out", tmp_path / "out")


def test_two_at_once_share_what_the_teacher_says(run, tmp_path):
    """One asks it, the other waits; what is kept, and both students, are as of one alone."""
    words = [run, "--task", "digits", *SHORT, "--data", make_folder(tmp_path / "images", 12), "--device", "cpu"]
    words += ["--views", "80"]  # several batches, which two at once would mix up

    def job(cache: str, out: str) -> ranks.Ranks:
        more = ["--cache", tmp_path / cache, "--out", tmp_path / out]
        return ranks.Ranks(1, distill.main, [str(word) for word in [*words, *more]])

    with job("shared", "one") as first, job("shared", "other") as second:
        for each in (first, second):
            assert each.first_failure(240) == 0, each.output()
    with job("own", "alone") as third:
        assert third.first_failure(240) == 0, third.output()
    shared, own = (
        {path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name).rglob("*.f32")}
        for name in ("shared", "own")
    )
    assert shared == own
    one, other, alone = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "other", "alone"))
    for name, value in alone.items():
        assert torch.equal(one[name], value)
        assert torch.equal(other[name], value)


WEIGHTS = ["--label_weight", "--logits_weight", "--feature_weight", "--relation_weight"]

# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--student": "alexnet"}, "--student 'alexnet': one of resnet18"),
        ({"--width": "0"}, "--width 0: give a number above 0"),
        ({"--label_weight": "-1"}, "--label_weight -1: give 0 or more"),
        ({"--temperature": "nan"}, "--temperature nan"),
        ({"--steps": "0"}, "--steps 0"),
        ({"--mixup_prob": "1.5"}, "--mixup_prob 1.5: give a share"),
        ({"--mixup_prob": "nan"}, "--mixup_prob nan"),
        ({"--mixup_prob": "1", "--label_weight": "1"}, "--mixup_prob 1 leaves no view with a label"),
        ({"--epochs": "3"}, "exclude each other"),
        ({"--task": "faces"}, "faces"),
        ({"--data": "EMPTY"}, "holds no image"),
        ({"--data": "NONE"}, "is no directory"),
        ({"--data": None}, "has no train set"),
        ({"--logits_weight": "0"}, "the classifier of digits learns from logits or labels"),
        (dict.fromkeys(WEIGHTS, "0"), "nothing is left"),
    ],
)  # fmt: skip
def test_wrong_input(run, tmp_path, capsys, change, message):
    (tmp_path / "EMPTY").mkdir()
    values = {"--task": "digits", "--student": "resnet18", "--steps": "2", "--out": str(tmp_path / "out")}
    values |= {"--data": str(make_folder(tmp_path / "images", 6))}
    values |= {key: str(tmp_path / value) if value in ("EMPTY", "NONE") else value for key, value in change.items()}
    with pytest.raises(UserError) as error:
        run_verb(capsys, run, *[word for key, value in values.items() if value is not None for word in (key, value)])
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_inputs_that_a_student_cannot_take(tmp_path, capsys):
    model = make_model(make_recipe(((18, 18), (24, 16))))
    write_checkpoint(tmp_path / "run" / "checkpoints", model)
    arguments = [tmp_path / "run", "--task", "digits", "--student", "vit_tiny", "--out", tmp_path / "out"]
    with pytest.raises(UserError, match="multiples of 4 pixels, not 18x18"):
        run_verb(capsys, *arguments)


def test_teachers_that_do_not_go_together(run, extracted, tmp_path, capsys):
    with pytest.raises(UserError, match=r"teachers differ in task: digits of .*, glyphs of"):
        run_verb(capsys, extracted / "digits", extracted / "glyphs", *SHORT, "--out", tmp_path / "out")
    with pytest.raises(UserError, match="neither a model"):
        run_verb(capsys, tmp_path, *SHORT, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
