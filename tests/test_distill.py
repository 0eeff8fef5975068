"""Distillation: teachers, what is kept of a teacher, and the verb from end to end."""

import dataclasses
import io
import json
import math
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel

from tests import ranks
from tests.image_folder import make_folder
from tests.small_run import make_images, make_model, make_recipe, write_checkpoint
from ufo_ds import distill, latency
from ufo_ds.data.image_files import FolderImages
from ufo_ds.data.transforms import evaluation_transform
from ufo_ds.data.views import Views
from ufo_ds.distillation import losses, writing
from ufo_ds.distillation.cache import cache_of
from ufo_ds.distillation.corrupt import Corrupt
from ufo_ds.distillation.settings import Settings
from ufo_ds.distillation.teachers import Taught, Teachers, combined, open_teachers
from ufo_ds.distillation.trainee import Trainee, new_student
from ufo_ds.errors import UserError
from ufo_ds.losses import cosface
from ufo_ds.recipe_task import Head
from ufo_ds.subnets.task_model import open_model

# --- teachers ---------------------------------------------------------------------------------------------------------


def test_combined_logits_are_those_of_the_mean_probability():
    generator = torch.Generator().manual_seed(2)
    one, other = torch.randn(2, 5, 3, generator=generator)
    mean = (one.softmax(1) + other.softmax(1)) / 2
    assert torch.allclose(combined([one, other], multi_label=False).softmax(1), mean, atol=1e-6)
    mean = (one.sigmoid() + other.sigmoid()) / 2
    assert torch.allclose(combined([one, other], multi_label=True).sigmoid(), mean, atol=1e-6)
    assert combined([one], multi_label=False) is one


@pytest.fixture(scope="module")
def other_run(tmp_path_factory):
    """A run of other weights."""
    model = make_model(make_recipe())
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)), alpha=0.3)
    run = tmp_path_factory.mktemp("other")
    write_checkpoint(run / "checkpoints", model)
    return run


def test_two_teachers_count_as_one(run, other_run):
    """Products of features are the mean of their cosines; so are those with the classifier."""
    models = [open_model(path, "glyphs") for path in (run, other_run)]
    teachers = Teachers(models)
    pixels = torch.from_numpy(np.stack([evaluation_transform(image, teachers.recipe.tasks[0].input)
                                        for image in make_images()]))  # fmt: skip
    unit = teachers.unit(teachers.of(pixels).features)
    each = [F.normalize(model.embed(pixels).embedding) for model in models]
    assert torch.allclose(unit @ unit.T, sum(x @ x.T for x in each) / 2, atol=1e-5)
    cosines = sum(model.embed(pixels).logits for model in models) / 2
    assert torch.allclose(unit @ teachers.classifier.T, cosines, atol=1e-5)


def test_an_extracted_teacher_of_a_margin_head_has_no_classifier(extracted, run):
    assert open_teachers([extracted / "glyphs"], None, "cpu").classifier is None
    assert open_teachers([extracted / "glyphs", run], "glyphs", "cpu").classifier is None


# --- cache ------------------------------------------------------------------------------------------------------------


def filled(directory, run, sources, views, task="digits", mixed=0.0):
    teachers = open_teachers([run], task, "cpu")
    made = Views(teachers.recipe, sources, teachers.classes, views, mixed)
    cache = cache_of(directory, teachers, sources, made)
    cache.fill(teachers, made, 0, Corrupt(made.images, 0.0))
    return cache, teachers, made


@pytest.mark.parametrize("task", ["digits", "glyphs"])
def test_what_is_kept_is_what_the_teacher_says(run, tmp_path, task):
    sources = [FolderImages(make_folder(tmp_path / "images"))]
    cache, teachers, views = filled(tmp_path / "cache", run, sources, 7, task)
    numbers = np.array([83, 0, 5, 64])
    pixels = torch.from_numpy(np.stack([views.load(number)[0] for number in numbers.tolist()]))
    fresh, kept = teachers.of(pixels), cache.read(numbers)
    assert torch.allclose(kept.features, fresh.features, atol=1e-5)
    assert torch.allclose(kept.logits, fresh.logits, atol=1e-5)
    assert kept.logits.shape == (4, 3 if task == "digits" else 0)
    # A batch as it was made: to the bit.
    pixels = torch.from_numpy(np.stack([views.load(number)[0] for number in range(64)]))
    assert torch.equal(cache.read(np.arange(64)).features, teachers.of(pixels).features)


def test_an_interrupted_cache_goes_on_to_the_same_bits(run, tmp_path):
    sources = [FolderImages(make_folder(tmp_path / "images", 20))]
    whole, teachers, views = filled(tmp_path / "whole", run, sources, 10)
    wanted = (whole.directory / "features.f32").read_bytes()
    cut = cache_of(tmp_path / "cut", teachers, sources, views)
    assert cut.directory.name == whole.directory.name
    cut.directory.mkdir(parents=True)
    (cut.directory / "features.f32").write_bytes(wanted[: 150 * 16 * 4 + 3])
    (cut.directory / "logits.f32").write_bytes((whole.directory / "logits.f32").read_bytes()[: 140 * 3 * 4 + 1])
    assert cut.done == 140
    calls = []
    teachers.of, of = lambda pixels: calls.append(len(pixels)) or of(pixels), teachers.of
    cut.fill(teachers, views, 0, Corrupt(20, 0.0))
    assert calls == [64, 8]  # from the batch of row 128 on
    assert (cut.directory / "features.f32").read_bytes() == wanted
    cut.fill(teachers, views, 0, Corrupt(20, 0.0))
    assert calls == [64, 8]


def test_another_teacher_or_image_or_augmentation_is_kept_elsewhere(run, other_run, tmp_path):
    folder = make_folder(tmp_path / "images", 6)
    sources = [FolderImages(folder)]
    first = filled(tmp_path / "cache", run, sources, 2)[0]
    places = {first.directory}
    places.add(filled(tmp_path / "cache", other_run, sources, 2)[0].directory)
    places.add(filled(tmp_path / "cache", run, sources, 3)[0].directory)
    places.add(filled(tmp_path / "cache", run, sources, 2, mixed=0.5)[0].directory)
    (folder / "zero" / "000.png").write_bytes(make_images()[0])
    places.add(filled(tmp_path / "cache", run, [FolderImages(folder)], 2)[0].directory)
    assert len(places) == 5


# --- trainee ----------------------------------------------------------------------------------------------------------

PLAIN = Settings(
    logits_weight=1.0, feature_weight=1.0, relation_weight=1.0, label_weight=1.0, temperature=2.0,
    feature_loss="cosine", steps=1, batch_size=8, views=1, mixed=0.0, lr=0.1, seed=0,
)  # fmt: skip


@pytest.mark.parametrize("neck", [True, False])
@pytest.mark.parametrize("task", ["digits", "glyphs"])
def test_a_finished_student_says_what_the_trainee_does(run, task, neck):
    """Its neck, whose statistics and scale are not those of the start, is folded in."""
    teachers = open_teachers([run], task, "cpu")
    of_task = dataclasses.replace(
        teachers.recipe.tasks[0], head=Head(type=teachers.recipe.tasks[0].head.type, neck=neck)
    )
    student = new_student("resnet18", 0.05, of_task, teachers.classes, 16, 0)
    trainee = Trainee(student, of_task, 3, teachers, PLAIN)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(8, 3, *of_task.input, generator=generator)
    with torch.no_grad():
        for parameter in trainee.head.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
        for _ in range(3):
            trainee.train().head.neck(student.embed(pixels))
        trainee.eval()
        embedding = trainee.head.neck(student.embed(pixels))
        found = trainee.finished()(pixels)
        assert torch.allclose(found.pooler_output, embedding, rtol=1e-4, atol=1e-5)
        assert (found.logits is None) == (task == "glyphs")
        if task == "digits":
            assert torch.allclose(found.logits, trainee.head.classifier(embedding), rtol=1e-4, atol=1e-5)


def test_losses_of_a_trainee_are_those_of_its_outputs(run, other_run):
    """Two teachers of a task that compares: through a projector, and by the cosines to both classifiers."""
    teachers = Teachers([open_model(path, "glyphs") for path in (run, other_run)])
    (task,) = teachers.recipe.tasks
    trainee = Trainee(new_student("resnet18", 0.05, task, [], 16, 0), task, 4, teachers, PLAIN).eval()
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(6, 3, *task.input, generator=generator)
    features = torch.randn(6, 32, generator=generator)
    unit = teachers.unit(features)
    labels = torch.tensor([0, 3, -1, 1, 1, -1])
    with torch.no_grad():
        found = trainee(pixels, labels, Taught(features, features[:, :0]), unit)
        embedding = trainee.head.neck(trainee.student.embed(pixels))
        projected = trainee.to_teacher(embedding)
        halves = torch.cat([F.normalize(half) for half in projected.split(16, 1)], 1) / math.sqrt(2)
        scale = task.loss.cosface.scale
        logits = [scale * x @ teachers.classifier.T for x in (halves, unit)]
        known = labels >= 0
        cosines = F.normalize(embedding[known]) @ F.normalize(trainee.head.classifier.weight).T
        of_labels = cosface(cosines, labels[known], scale, task.loss.cosface.margin)
        wanted = [
            losses.symmetric_divergence(*logits, 2.0).mean(),
            losses.cosine(projected, unit).mean(),
            losses.relational_distance(embedding, unit).mean(),
            of_labels.sum() / 6,
        ]
    assert torch.allclose(found, torch.stack(wanted), rtol=1e-4)


# --- the verb ---------------------------------------------------------------------------------------------------------

SHORT = ["--student", "resnet18", "--width", "0.05", "--steps", "12", "--batch_size", "8", "--views", "2"]


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
    assert result["settings"]["mixed"] == 0  # or labels would be lost
    assert "none: labels alone" in (tmp_path / "out" / "README.md").read_text()


def test_latency_of_a_student(run, tmp_path, capsys, monkeypatch):
    from ufo_ds.subnets import timing

    monkeypatch.setattr(timing, "SECONDS", 0.1)
    folder = make_folder(tmp_path / "images", 12)
    run_verb(capsys, run, "--task", "digits", *SHORT, "--data", folder, "--out", tmp_path / "out")
    latency.main([str(tmp_path / "out"), "--json"])
    assert json.loads(capsys.readouterr().out)["images_per_second"] > 0


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
        ({"--mixed": "1.5"}, "--mixed 1.5: give a share"),
        ({"--mixed": "nan"}, "--mixed nan"),
        ({"--epochs": "3"}, "exclude each other"),
        ({"--task": "faces"}, "faces"),
        ({"--data": "EMPTY"}, "holds no image"),
        ({"--data": "NONE"}, "is no directory"),
        ({"--data": None}, "has no train set"),
        ({"--label_weight": "0", "--logits_weight": "0"}, "the classifier of digits learns from logits or labels"),
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
