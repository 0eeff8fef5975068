"""All tasks of a trained model at once: every image has what its task's model says of it, in whatever company; no other
path is computed, and none other is read; a model that is spread says the same to the bit."""

import gc
import io
import itertools
import subprocess
import sys

import pytest
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.elastic_run import SPACES, drawn, open_run, write_shards
from tests.elastic_run import make_recipe as make_elastic_recipe
from tests.small_run import CLASSES, make_images, make_model, make_recipe, make_transparent_image, relative
from tests.small_run import write_checkpoint as write
from ufo_ds import UfoModel
from ufo_ds.checkpoint import Reader
from ufo_ds.errors import UserError
from ufo_ds.model.cost import subnet_cost
from ufo_ds.model.dense import path_names
from ufo_ds.model.loading import spec_of
from ufo_ds.subnets import joint, recalibration
from ufo_ds.subnets.task_model import open_model


@pytest.fixture(scope="module")
def whole(run):
    return UfoModel.from_pretrained(run)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards"))


def pixels_for(model, task, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, *model.input[task]), generator=generator).to(torch.uint8)


def mixture(model, count, seed):
    """Images of tasks in random order."""
    names = [model.tasks[i] for i in torch.randint(len(model.tasks), (count,), generator=torch.manual_seed(seed))]
    return [pixels_for(model, name, 1, 1000 * seed + i)[0] for i, name in enumerate(names)], names


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def assert_mixed_is_single(model, seed, count=13):
    images, names = mixture(model, count, seed)
    for image, name, found in zip(images, names, model(images, task=names), strict=True):
        wanted = model(image[None], task=name)
        assert relative(found.embedding, wanted.embedding[0]) < 1e-5
        assert found.logits.shape == (len(model.classes[name]),)
        if len(found.logits):
            assert relative(found.logits, wanted.logits[0]) < 1e-5


# --- outputs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", CLASSES)
@pytest.mark.parametrize("loaded", ["all", "one"])
def test_outputs_are_the_task_models(run, extracted, whole, task, loaded):
    model = whole if loaded == "all" else UfoModel.from_pretrained(run, tasks=[task])
    images = pixels_for(model, task, 9)
    found = model(images, task=task)
    assert not found.embedding.requires_grad
    for opened in (open_model(run, task), open_model(extracted / task)):
        wanted = opened.embed(images)
        assert relative(found.embedding, wanted.embedding) < 1e-5
        if task == "digits":
            assert relative(found.logits, wanted.logits) < 1e-5
    assert found.logits.shape == (9, 3 if task == "digits" else 0)
    assert model.classes[task] == (CLASSES[task] if task == "digits" else [])
    assert model.input[task] == {"digits": (16, 16), "glyphs": (24, 16)}[task]
    assert model.tasks == ([*CLASSES] if loaded == "all" else [task])


@pytest.mark.parametrize("seed", range(5))
def test_a_mixed_call_says_of_every_image_what_a_single_one_does(whole, seed):
    assert_mixed_is_single(whole, seed)


def test_a_batch_of_one_size_takes_several_tasks(tmp_path):
    write(tmp_path / "checkpoints", make_model(make_recipe(((16, 16), (16, 16)))))
    model = UfoModel.from_pretrained(tmp_path)
    images, names = (
        pixels_for(model, "digits", 7),
        ["glyphs", "digits", "digits", "glyphs", "glyphs", "digits", "glyphs"],
    )
    assert all(map(same, model(images, task=names), model([*images], task=names)))
    assert all(map(same, model(images, task=["digits"] * 7), zip(*model(images, task="digits"), strict=True)))


def test_all_forms_of_an_image_are_the_pixels_of_evaluation(whole, tmp_path):
    files = [*make_images(), make_transparent_image()]
    for task in CLASSES:
        wanted = whole(files, task=task)
        paths = [tmp_path / f"{i}.image" for i in range(len(files))]
        for path, data in zip(paths, files, strict=True):
            path.write_bytes(data)
        for images in (paths, [*map(str, paths)], [Image.open(io.BytesIO(data)) for data in files]):
            assert same(whole(images, task=task), wanted)
        assert same(whole(paths[0], task=task), whole(paths[:1], task=task))


def test_nothing_of_no_images(whole):
    assert whole([], task=[]) == []
    assert [x.shape for x in whole([], task="digits")] == [(0, 16), (0, 3)]


def test_cosines_are_of_every_pair(whole):
    a, b = (whole(pixels_for(whole, "glyphs", count, count), task="glyphs") for count in (3, 5))
    found = a.cosine(b)
    for i, j in itertools.product(range(3), range(5)):
        x, y = a.embedding[i].double(), b.embedding[j].double()
        assert found[i, j] == pytest.approx(float(x @ y / (x.norm() * y.norm())), abs=1e-5)


def test_parameters_of_another_type(run, whole):
    model = UfoModel.from_pretrained(run, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {b.dtype for b in model.buffers()} == {torch.float32}
    images = pixels_for(whole, "glyphs", 8)
    found, wanted = model(images, task="glyphs"), whole(images, task="glyphs")
    assert found.embedding.dtype == torch.float32
    assert relative(found.embedding, wanted.embedding) < 0.1


def test_it_is_in_evaluation_mode_and_stays_there(whole):
    assert not any(module.training for module in whole.modules())
    assert whole.eval() is whole
    with pytest.raises(UserError, match=r"^a UfoModel is for use: [^\n]*$"):
        whole.train()
    assert whole.to("cpu").device == torch.device("cpu")


# --- subnets of several tasks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", SPACES)
def test_subnets_of_several_tasks_in_one_directory(tmp_path, root, space):
    write(tmp_path / "checkpoints", make_model(make_elastic_recipe(root, space)))
    reader = open_run(tmp_path)
    for n in range(4):
        specs = [drawn(reader, task, "joint", n, task) for task in CLASSES]
        statistics = {}
        for spec in specs:
            statistics |= recalibration.statistics(reader, spec)
        joint.extract(reader, specs, tmp_path / str(n), statistics)
        model = UfoModel.from_pretrained(tmp_path / str(n))
        for task in CLASSES:
            images = pixels_for(model, task, 5)
            found, wanted = model(images, task=task), open_model(tmp_path / str(n), task).embed(images)
            assert relative(found.embedding, wanted.embedding) < 1e-5
        assert_mixed_is_single(model, n)


def test_statistics_that_belong_to_the_path_are_found(tmp_path, root):
    write(tmp_path / "checkpoints", make_model(make_elastic_recipe(root, sampling="random")))
    model = UfoModel.from_pretrained(tmp_path)
    for task in CLASSES:
        images = pixels_for(model, task, 5)
        found, wanted = model(images, task=task), open_model(tmp_path, task).embed(images)
        assert relative(found.embedding, wanted.embedding) < 1e-5


# --- what is computed and read ----------------------------------------------------------------------------------------


def flops(model, images, task):
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # of which products are counted
        model(images, task=task)
    return counter.get_total_flops()


@pytest.mark.parametrize("seed", range(3))
def test_only_the_paths_of_the_tasks_are_computed(whole, reader, seed):
    """Formulas of dense paths; the packed projection has one row more, of the class token: 2 x 3 x 8 x 8 x 16."""
    each = {
        task: 6144 + subnet_cost(reader.recipe, spec_of(reader, task), len(CLASSES[task])).flops for task in CLASSES
    }
    images, names = mixture(whole, 11, seed)
    assert flops(whole, images, names) == sum(each[name] for name in names)
    for task in CLASSES:
        assert flops(whole, pixels_for(whole, task, 4), task) == 4 * each[task]


@pytest.mark.parametrize("task", CLASSES)
def test_only_what_the_path_needs_is_read(tmp_path, model, task, monkeypatch):
    """The other task's file is damaged, and names and elements that are read are counted."""
    [other] = {*CLASSES} - {task}
    step = write(tmp_path / "checkpoints", model, apart=other)
    file = step / "rank-2.safetensors"
    file.write_bytes(bytes(file.stat().st_size))
    read, elements = Reader.read, {}

    def counted(self, name, kind, start, stop):
        elements[name] = elements.get(name, 0) + stop - start
        return read(self, name, kind, start, stop)

    monkeypatch.setattr(Reader, "read", counted)
    loaded = UfoModel.from_pretrained(tmp_path, tasks=[task])
    units = [f"{unit}." for unit, _ in path_names(spec_of(Reader(step), task))]
    units += ["heads.digits.classifier"] if task == "digits" else ["heads.glyphs.neck"]
    wanted = {name: p.numel() for name, p in model.named_parameters() if name.startswith(tuple(units))}
    assert elements == wanted
    assert {name: p.numel() for name, p in loaded.supernet.named_parameters() if p.numel()} == wanted
    with pytest.raises(UserError, match="no readable header"):
        UfoModel.from_pretrained(tmp_path)


# --- spread -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "device_map",
    [
        {"": "cpu", "blocks.1": "disk"},
        {"embed": "disk", "blocks": "cpu", "norm": "disk", "heads": "cpu", "heads.digits": "disk"},
        {"": "disk"},
        {"": "cpu"},
        "auto",
    ],
)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_spread_model_is_the_same_to_the_bit(tmp_path, run, device_map, dtype):
    plain = UfoModel.from_pretrained(run, dtype=dtype)
    folder = tmp_path / "offloaded"
    model = UfoModel.from_pretrained(run, device_map=device_map, offload_folder=folder, dtype=dtype)
    images, names = mixture(model, 9, 0)
    assert all(map(same, model(images, task=names), plain(images, task=names)))
    assert all(same(model(images[:1], task=names[0]), plain(images[:1], task=names[0])) for _ in range(2))
    on_disk = {name.split(".")[1] for name, p in model.named_parameters() if p.device.type == "meta"}
    wanted = set() if device_map == "auto" else {name.split(".")[0] for name, to in device_map.items() if to == "disk"}
    assert on_disk == ({"embed", "blocks", "norm", "heads"} if wanted == {""} else wanted)
    assert sorted(folder.glob("*/*.dat")) or not wanted
    del model
    gc.collect()
    assert not folder.exists() or not [*folder.iterdir()]


def test_what_has_no_room_goes_to_disk_in_whole_blocks(tmp_path, run, whole):
    """25 kB of embeddings and two blocks of 22 kB each, for one of which accelerate leaves room."""
    model = UfoModel.from_pretrained(run, device_map="auto", max_memory={"cpu": 60_000}, offload_folder=tmp_path)
    places = {"embed": "cpu", "blocks.0": "disk", "blocks.1": "disk", "norm": "disk"}
    assert model.supernet.hf_device_map == {**places, "heads.digits": "disk", "heads.glyphs": "disk"}
    images, names = mixture(model, 9, 0)
    assert all(map(same, model(images, task=names), whole(images, task=names)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device_map": {"": "disk"}}, r"go to disk: give offload_folder"),
        ({"device_map": {"": "disk"}, "offload_folder": "/dev/null/x"}, "offload_folder /dev/null/x: "),
        ({"device_map": {"blocks.0": "cpu"}}, "device_map has no place for 'embed'"),
        ({"device_map": {"": "cpu", "blocks.1.ffn": "disk"}}, "'blocks.1.ffn' cannot be placed; these can: "),
        ({"device_map": {"": "toaster"}}, "device_map: '': 'toaster' cannot be used"),
        ({"device_map": {"": "cpu", "blocks.0": 7}}, "device_map: 'blocks.0': '7' cannot be used"),
        ({"device_map": "balanced"}, "device_map 'balanced': give \"auto\""),
        ({"device_map": "auto", "max_memory": {"cpu": "much"}}, "max_memory .*much"),
        ({"device_map": "auto", "max_memory": {"toaster": 1}}, "max_memory .*toaster"),
    ],
)
def test_a_model_that_cannot_be_spread_so_is_refused(run, arguments, message):
    with pytest.raises(UserError, match=rf"^[^\n]*{message}[^\n]*$"):
        UfoModel.from_pretrained(run, **arguments)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "task", "message"),
    [
        (torch.zeros(2, 3, 16, 16, dtype=torch.uint8), "letters", "no task 'letters' in this model: .* digits, glyphs"),
        (torch.zeros(2, 3, 16, 16, dtype=torch.uint8), ["digits", "x"], "no task 'x' in this model"),
        (torch.zeros(2, 3, 16, 16, dtype=torch.uint8), ["digits"], "2 images and 1 tasks: give one task an image"),
        (torch.zeros(2, 3, 16, 16), "digits", r"float32 \[2, 3, 16, 16\]: digits takes uint8 \[B, 3, 16, 16\]"),
        (torch.zeros(2, 3, 16, 24, dtype=torch.uint8), "glyphs", r"\[2, 3, 16, 24\]: glyphs takes .* \[B, 3, 24, 16\]"),
        (torch.zeros(3, 16, 16, dtype=torch.uint8), "digits", r"\[3, 16, 16\]: digits takes uint8 \[B, 3, 16, 16\]"),
        (torch.zeros(2, 3, 16, 16, dtype=torch.uint8), ["digits", "glyphs"], r"glyphs takes uint8 \[B, 3, 24, 16\]"),
        ([torch.zeros(3, 16, 16, dtype=torch.uint8)] * 2, ["digits", "glyphs"], r"image 1 is uint8 .* \[3, 24, 16\]"),
        ([torch.zeros(1, 16, 16, dtype=torch.uint8)], "digits", r"image 0 is uint8 \[1, 16, 16\]"),
        (["nowhere.png"], "digits", r"nowhere.png is no image that can be read \(No such file"),
        ([make_images()[0], make_images()[0][:60]], "digits", "image 1 is no image that can be read"),
        ([b"text"], "digits", r"image 0 is no image that can be read \(not an image\)"),
        ([7], "digits", "image 0 is a int: give a file, bytes, a PIL image or a uint8 tensor"),
    ],
)  # fmt: skip
def test_images_and_tasks_that_do_not_fit_are_refused(whole, images, task, message):
    with pytest.raises(UserError, match=rf"^[^\n]*{message}[^\n]*$"):
        whole(images, task=task)


def test_the_wrong_place_task_or_device_is_refused(tmp_path, run, extracted):
    for arguments, message in [
        ((tmp_path,), "is no run directory with a checkpoint"),
        ((tmp_path / "nothing",), "is no run directory with a checkpoint"),
        ((extracted / "digits",), "is a model of one task: its README.md says how"),
        ((run, ["digits", "letters"]), "no task 'letters' in test; it has digits, glyphs"),
        ((run, []), "tasks: none"),
        ((run, None, "toaster"), "device 'toaster' cannot be used"),
        ((run, None, "cuda"), "device 'cuda' cannot be used"),
    ]:
        with pytest.raises(UserError, match=rf"^[^\n]*{message}[^\n]*$"):
            UfoModel.from_pretrained(*arguments)


def test_statistics_without_images_to_find_them_from_are_refused(tmp_path, root):
    write(tmp_path / "checkpoints", make_model(make_elastic_recipe(tmp_path / "gone", sampling="random")))
    with pytest.raises(UserError, match=r"^[^\n]*needs training images for the statistics of its neck[^\n]*$"):
        UfoModel.from_pretrained(tmp_path)


def test_the_package_imports_without_torch():
    code = "import sys, ufo_ds; assert 'torch' not in sys.modules; assert not hasattr(ufo_ds, 'nothing')"
    subprocess.run([sys.executable, "-c", code], check=True)
