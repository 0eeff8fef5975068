"""What a student is taught by: teachers, what is kept of them, and a trainee's losses."""

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.image_folder import make_folder
from tests.small_run import make_images, make_model, make_recipe, write_checkpoint
from ufo_ds.data.image_files import FolderImages
from ufo_ds.data.transforms import evaluation_transform
from ufo_ds.data.views import Views
from ufo_ds.distillation import losses
from ufo_ds.distillation.cache import cache_of
from ufo_ds.distillation.corrupt import Corrupt
from ufo_ds.distillation.settings import Settings
from ufo_ds.distillation.teachers import Taught, Teachers, combined, open_teachers
from ufo_ds.distillation.trainee import Trainee, new_student
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


def filled(directory, run, sources, views, task="digits", mixup_prob=0.0):
    teachers = open_teachers([run], task, "cpu")
    made = Views(teachers.recipe, sources, teachers.classes, views, mixup_prob)
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
    places.add(filled(tmp_path / "cache", run, sources, 2, mixup_prob=0.5)[0].directory)
    (folder / "zero" / "000.png").write_bytes(make_images()[0])
    places.add(filled(tmp_path / "cache", run, [FolderImages(folder)], 2)[0].directory)
    assert len(places) == 5


# --- trainee ----------------------------------------------------------------------------------------------------------

PLAIN = Settings(
    logits_weight=1.0, feature_weight=1.0, relation_weight=1.0, label_weight=1.0, temperature=2.0,
    feature_loss="cosine", steps=1, batch_size=8, views=1, mixup_prob=0.0, lr=0.1, seed=0,
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
