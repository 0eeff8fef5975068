"""A path cut out of a checkpoint is a stock model with the supernet's outputs; what was tampered with is found out."""

import dataclasses
import io
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification, ViTConfig, ViTModel

from ufo_ds import checkpoint, extract
from ufo_ds import recipe as recipes
from ufo_ds.checkpoint import Index, Parameter, Reader
from ufo_ds.data.mixing import Batch, TaskBatch
from ufo_ds.data.transforms import evaluation_transform
from ufo_ds.errors import UserError
from ufo_ds.model.dense import pretrained_values
from ufo_ds.model.loading import load_supernet, spec_of
from ufo_ds.model.spec import SubnetSpec
from ufo_ds.model.supernet import Supernet, init_weights
from ufo_ds.subnets import extraction

CLASSES = {"digits": ["zero", "one", "two"], "glyphs": ["A", "B", "C", "D"]}
PATHS = {
    "digits": {"embed": ["own"], "norm": ["shared"] * 3, "attn": ["shared"] * 2, "ffn": ["own", "shared"]},
    "glyphs": {"embed": ["shared"], "norm": ["shared"] * 3, "attn": ["shared"] * 2, "ffn": ["shared", "own"]},
}


def make_recipe(**model):
    return recipes.parse(
        {
            "name": "test",
            "model": {
                "backbone": {"dim": 16, "depth": 2, "heads": 2, "patch_size": 8},
                "experts": ["embed", "ffn"],
                **model,
            },
            "tasks": [
                {
                    "name": "digits",
                    "head": {"type": "linear"},
                    "loss": {"cross_entropy": {}},
                    "input": [16, 16],
                    "samples_per_step": 8,
                    "routes": {"ffn": ["own", "shared"]},
                },
                {
                    "name": "glyphs",
                    "head": {"type": "margin"},
                    "loss": {"cosface": {}},
                    "input": [24, 16],
                    "samples_per_step": 8,
                    "routes": {"embed": "shared", "ffn": ["shared", "own"]},
                },
            ],
            "data": {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25]},
            "schedule": {"steps": 10},
        },
        "test",
    )


def make_model(recipe):
    """A supernet in which no two copies are alike, with running statistics of some batches."""
    with torch.device("meta"):
        model = Supernet(recipe, {name: len(names) for name, names in CLASSES.items()})
    init_weights(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
        for step in range(5):
            images = {task.name: torch.randint(0, 256, (8, 3, *task.input), generator=generator).to(torch.uint8)
                      for task in recipe.tasks}  # fmt: skip
            labels = torch.zeros(8, dtype=torch.int64)
            model.train()(Batch(step, 0, {n: TaskBatch(x, labels, range(8), 8) for n, x in images.items()}, {}))
    return model.eval()


def write_checkpoint(directory, model, step=10, apart=None, **about):
    """Weights in two files, most parameters cut in two of random sizes; those of the task ``apart`` in a third."""
    unfinished = directory / "unfinished"
    unfinished.mkdir(parents=True)
    routes = {task: {unit: list(layers) for unit, layers in by_unit.items()} for task, by_unit in model.routes.items()}
    index = Index(step, recipes.dump(model.recipe), CLASSES, routes, **about)
    draw = np.random.default_rng(step)
    files = [{}, {}, {}]
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        if apart is not None and apart in name.split("."):
            cuts = [(2, 0, len(flat))]
        else:
            first = int(draw.integers(0, len(flat) + 1))
            one, other = draw.permutation(2).tolist()
            cuts = [(one, 0, first), (other, first, len(flat) - first)]
        cuts = [cut for cut in cuts if cut[2]]
        for number, start, length in cuts:
            files[number][f"{name}|weight"] = flat[start : start + length].clone()
        index.parameters[name] = Parameter(list(parameter.shape), ["weight"], cuts)
    for name, buffer in model.named_buffers():
        if name.startswith("heads."):
            index.buffers[name] = 2 if apart is not None and apart in name.split(".") else 1
            files[index.buffers[name]][name] = buffer.clone()
    for number, tensors in enumerate(files):
        save_file(tensors, unfinished / f"rank-{number}.safetensors")
    entries = [checkpoint.entry_of(unfinished / f"rank-{number}.safetensors") for number in range(3)]
    return checkpoint.publish(unfinished, index, entries)


def encode(image, form):
    data = io.BytesIO()
    image.save(data, form)
    return data.getvalue()


def make_images(seed=0):
    """Files of odd sizes: colour and grey, PNG and JPEG, a palette, a fully opaque alpha channel, a single pixel."""
    draw = np.random.default_rng(seed)

    def noise(*shape):
        return Image.fromarray(draw.integers(0, 256, shape, dtype=np.uint8))

    opaque = noise(33, 21, 3)
    opaque.putalpha(255)
    return [
        encode(noise(31, 17, 3), "PNG"),
        encode(noise(45, 61, 3), "JPEG"),
        encode(noise(16, 16, 3), "PNG"),
        encode(noise(23, 29), "PNG"),
        encode(noise(40, 9), "JPEG"),
        encode(noise(19, 27, 3).quantize(16), "PNG"),
        encode(opaque, "PNG"),
        encode(noise(1, 1, 3), "PNG"),
    ]


def make_transparent_image():
    draw = np.random.default_rng(1)
    return encode(Image.fromarray(draw.integers(0, 256, (27, 35, 4), dtype=np.uint8), "RGBA"), "PNG")


def outputs_of(model, task, images):
    size = next(t.input for t in model.recipe.tasks if t.name == task)
    pixels = torch.from_numpy(np.stack([evaluation_transform(image, size) for image in images]))
    labels = torch.zeros(len(pixels), dtype=torch.int64)
    with torch.no_grad():
        return model(Batch(0, 0, {task: TaskBatch(pixels, labels, range(len(pixels)), len(pixels))}, {}))[task]


def relative(found, wanted):
    assert found.shape == wanted.shape
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


@pytest.fixture(scope="module")
def model():
    return make_model(make_recipe())


@pytest.fixture(scope="module")
def run(tmp_path_factory, model):
    """A run directory with one checkpoint."""
    run = tmp_path_factory.mktemp("run")
    write_checkpoint(run / "checkpoints", model, metrics={"digits/digits/top1": 0.9})
    return run


@pytest.fixture
def reader(run):
    return Reader(checkpoint.of_run(run))


@pytest.fixture(scope="module")
def extracted(tmp_path_factory, run):
    """Both tasks cut out: not to be changed."""
    directory = tmp_path_factory.mktemp("extracted")
    reader = Reader(checkpoint.of_run(run))
    for task in CLASSES:
        extraction.extract(reader, spec_of(reader, task), directory / task)
    return directory


# --- reading a checkpoint ---------------------------------------------------------------------------------------------


def test_parameters_are_put_together_from_their_pieces(model, reader):
    pieces = [parameter.pieces for parameter in reader.index.parameters.values()]
    assert sum(len({file for file, _, _ in piece}) == 2 for piece in pieces) > 40
    for name, parameter in model.named_parameters():
        assert torch.equal(reader.parameter(name), parameter), name
    for name in ("heads.glyphs.neck.running_mean", "heads.glyphs.neck.running_var"):
        assert torch.equal(reader.buffer(name), model.get_buffer(name))


def test_any_range_of_a_parameter_can_be_read(model, reader):
    draw = np.random.default_rng(0)
    parameters = dict(model.named_parameters())
    for name in draw.choice(list(parameters), 100):
        flat = parameters[name].flatten()
        start, stop = np.sort(draw.integers(0, len(flat) + 1, 2)).tolist()
        assert torch.equal(reader.read(name, "weight", start, stop), flat[start:stop])


def test_a_supernet_of_one_task_is_that_part_of_the_whole(model, reader):
    for task in CLASSES:
        alone = load_supernet(reader, [spec_of(reader, task)])
        wanted = outputs_of(model, task, make_images())
        found = outputs_of(alone, task, make_images())
        assert relative(found.embedding, wanted.embedding) < 1e-6
        assert relative(found.logits, wanted.logits) < 1e-6


def test_the_spec_of_a_run_is_its_routes(reader):
    for task, routes in PATHS.items():
        assert spec_of(reader, task) == SubnetSpec(task, {unit: tuple(layers) for unit, layers in routes.items()})
    with pytest.raises(UserError, match=r"no task 'faces' in test; it has digits, glyphs"):
        spec_of(reader, "faces")


def test_routes_still_being_learned_go_to_the_more_probable_copy(tmp_path):
    learning = make_recipe(experts=["attn", "embed", "ffn"], routes={"attn": "learned"})
    model = make_model(learning)
    with torch.no_grad():
        model.router.logits["digits"].copy_(torch.tensor([[0.0, 1.0], [2.0, 1.0]]))
        model.router.logits["glyphs"].copy_(torch.tensor([[0.0, 0.0], [-2.0, -1.0]]))
    reader = Reader(write_checkpoint(tmp_path, model))
    assert spec_of(reader, "digits").routes["attn"] == ("own", "shared")
    assert spec_of(reader, "glyphs").routes["attn"] == ("shared", "own")
    for task in CLASSES:
        found = outputs_of(load_supernet(reader, [spec_of(reader, task)]), task, make_images())
        assert relative(found.logits, outputs_of(model, task, make_images()).logits) < 1e-6


@pytest.mark.parametrize("position", [0.01, 0.5, 0.99])
def test_a_flipped_byte_is_found(tmp_path, run, position):
    copied = shutil.copytree(checkpoint.of_run(run), tmp_path / "copied")
    Reader(copied).verify()
    file = copied / "rank-1.safetensors"
    data = bytearray(file.read_bytes())
    data[int(position * len(data))] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match=r"^[^\n]*rank-1\.safetensors changed since it was written[^\n]*$"):
        Reader(copied).verify()
    Reader(copied).verify(0, 2)  # the first and the last of three files
    with pytest.raises(UserError):
        Reader(copied).verify(1, 2)


def test_a_file_that_is_cut_short_or_missing_is_found(tmp_path, run):
    copied = shutil.copytree(checkpoint.of_run(run), tmp_path / "copied")
    reader = Reader(copied)
    file = copied / "rank-0.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"^[^\n]*rank-0\.safetensors is missing or cut short[^\n]*$"):
        Reader(copied)
    with pytest.raises(UserError, match=r"^[^\n]*rank-0\.safetensors changed since it was written[^\n]*$"):
        reader.verify()
    file.unlink()
    with pytest.raises(UserError, match=r"^[^\n]*rank-0\.safetensors is missing or cut short[^\n]*$"):
        Reader(copied)


def test_a_directory_without_an_index_is_no_checkpoint(tmp_path, run):
    copied = shutil.copytree(run / "checkpoints", tmp_path / "checkpoints")
    [whole] = checkpoint.find(copied)
    shutil.copytree(whole, copied / "step-00000020")
    (copied / "step-00000020" / "index.json").unlink()
    assert checkpoint.find(copied) == [whole]
    assert checkpoint.of_run(tmp_path) == whole
    with pytest.raises(UserError, match="is no checkpoint"):
        Reader(copied / "step-00000020")
    with pytest.raises(UserError, match="is no run directory with a checkpoint"):
        checkpoint.of_run(tmp_path / "elsewhere")


@pytest.mark.parametrize("content", ["", "{", "{}", "[]", "null", '{"parameters": []}', '{"parameters": {"a": {}}}'])
def test_an_index_that_is_none_ends_in_one_line(tmp_path, content):
    (tmp_path / "index.json").write_text(content)
    with pytest.raises(UserError, match=r"^[^\n]*is no checkpoint[^\n]*$"):
        Reader(tmp_path)


def test_a_checkpoint_of_another_version_is_refused(tmp_path, run):
    copied = shutil.copytree(checkpoint.of_run(run), tmp_path / "copied")
    values = json.loads((copied / "index.json").read_text())
    (copied / "index.json").write_text(json.dumps({**values, "version": 2}))
    with pytest.raises(UserError, match="version 2, expected 1"):
        Reader(copied)


# --- publishing and keeping checkpoints -------------------------------------------------------------------------------


def publish(directory, step, pieces=((0, 0, 6),), shape=(2, 3)):
    """A checkpoint of one parameter without files."""
    unfinished = directory / f"unfinished-{step}"
    unfinished.mkdir(parents=True)
    parameter = Parameter(list(shape), ["weight"], list(pieces))
    return checkpoint.publish(unfinished, Index(step, {}, {}, {}, parameters={"w": parameter}), [])


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ([(0, 0, 2), (1, 3, 3)], "w has a gap or an overlap at element 2"),
        ([(0, 0, 3), (1, 2, 4)], "w has a gap or an overlap at element 3"),
        ([(0, 1, 5)], "w has a gap or an overlap at element 0"),
        ([(0, 0, 6), (1, 0, 6)], "w has a gap or an overlap at element 6"),
        ([(0, 0, 5)], "w ends at element 5"),
        ([(0, 0, 7)], "w ends at element 7"),
        ([], "w ends at element 0"),
    ],
)
def test_gaps_and_overlaps_are_refused(tmp_path, pieces, message):
    with pytest.raises(RuntimeError, match=message):
        publish(tmp_path, 1, pieces)
    assert checkpoint.find(tmp_path) == []


def test_pieces_may_come_in_any_order(tmp_path):
    final = publish(tmp_path, 3, [(1, 4, 2), (2, 0, 1), (0, 1, 3)])
    assert final == tmp_path / "step-00000003"
    assert Reader(final).index.parameters["w"].pieces == [[2, 0, 1], [0, 1, 3], [1, 4, 2]]
    assert not list(tmp_path.glob("unfinished*"))


def test_a_step_may_be_published_again(tmp_path):
    old = publish(tmp_path, 3)
    (old / "left-over").touch()
    assert publish(tmp_path, 3) == old
    assert [path.name for path in old.iterdir()] == ["index.json"]


def test_the_newest_and_the_best_are_kept(tmp_path):
    for step in (5, 30, 100, 20, 10):
        publish(tmp_path, step)
    assert [path.name for path in checkpoint.find(tmp_path)] == [f"step-{s:08d}" for s in (5, 10, 20, 30, 100)]
    checkpoint.write_best(tmp_path, 10, "top1", 0.75)
    checkpoint.prune(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "best.json", "step-00000010", "step-00000030", "step-00000100",
    ]  # fmt: skip
    checkpoint.write_best(tmp_path, 100, "top1", 0.8)
    checkpoint.prune(tmp_path, 2)
    assert [path.name for path in checkpoint.find(tmp_path)] == ["step-00000030", "step-00000100"]
    checkpoint.prune(tmp_path, 5)
    assert len(checkpoint.find(tmp_path)) == 2


def test_a_run_stands_for_its_best_or_its_last_checkpoint(tmp_path):
    steps = {step: publish(tmp_path / "checkpoints", step) for step in (1, 2, 3)}
    assert checkpoint.of_run(tmp_path) == steps[3]  # no best yet
    checkpoint.write_best(tmp_path / "checkpoints", 2, "top1", 0.5)
    assert checkpoint.read_best(tmp_path / "checkpoints") == (2, 0.5)
    assert checkpoint.of_run(tmp_path) == steps[2]
    assert checkpoint.of_run(tmp_path, "last") == steps[3]
    assert checkpoint.of_run(steps[1]) == steps[1]
    shutil.rmtree(steps[2])
    assert checkpoint.of_run(tmp_path) == steps[3]


# --- extraction -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", CLASSES)
def test_an_extracted_model_is_certified_on_image_files(tmp_path, reader, extracted, task):
    copied = shutil.copytree(extracted / task, tmp_path / task)
    certificate = extraction.verify(reader, spec_of(reader, task), copied, make_images())
    assert json.loads((copied / "certificate.json").read_text()) == certificate
    assert certificate["passed"] is True
    assert certificate["max_difference"] <= 1e-5
    assert (certificate["task"], certificate["step"], certificate["images"]) == (task, 10, 8)


@pytest.mark.parametrize("task", CLASSES)
def test_transparent_images_are_certified_too(tmp_path, reader, extracted, task):
    copied = shutil.copytree(extracted / task, tmp_path / task)
    images = [*make_images(), make_transparent_image()]
    assert extraction.verify(reader, spec_of(reader, task), copied, images)["passed"] is True


def test_stock_transformers_loads_an_embedding_model(model, extracted):
    directory = extracted / "glyphs"
    for stock in (AutoModel, ViTModel):
        vit, info = stock.from_pretrained(directory, output_loading_info=True)
        assert not any(info.values()), info
    assert type(vit) is ViTModel
    images = [Image.open(io.BytesIO(image)).convert("RGB") for image in make_images()]
    pixels = AutoImageProcessor.from_pretrained(directory)(images=images, return_tensors="pt").pixel_values
    with torch.no_grad():
        found = vit.eval()(pixels).pooler_output
    assert relative(found, outputs_of(model, "glyphs", make_images()).embedding) < 1e-5


def test_stock_transformers_loads_a_classifier(model, extracted):
    directory = extracted / "digits"
    classifier, info = AutoModelForImageClassification.from_pretrained(directory, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    assert classifier.config.id2label == {0: "zero", 1: "one", 2: "two"}
    assert classifier.config.label2id == {"zero": 0, "one": 1, "two": 2}
    backbone, info = AutoModel.from_pretrained(directory, output_loading_info=True)
    assert not info["missing_keys"]
    images = [Image.open(io.BytesIO(image)).convert("RGB") for image in make_images()]
    pixels = AutoImageProcessor.from_pretrained(directory)(images=images, return_tensors="pt").pixel_values
    wanted = outputs_of(model, "digits", make_images())
    with torch.no_grad():
        assert relative(classifier.eval()(pixels).logits, wanted.logits) < 1e-5
        assert relative(backbone.eval()(pixels).pooler_output, wanted.embedding) < 1e-5


def test_the_model_says_what_it_is(extracted):
    card = (extracted / "digits" / "README.md").read_text()
    assert "pipeline_tag: image-classification" in card
    assert "| digits/digits/top1 | 0.9000 |" in card
    assert "| ffn | own shared |" in card
    assert "pipeline_tag: image-feature-extraction" in (extracted / "glyphs" / "README.md").read_text()
    for task, routes in PATHS.items():
        assert json.loads((extracted / task / "spec.json").read_text()) == {"task": task, "routes": routes}


def test_the_number_of_parameters_is_that_of_the_path(tmp_path, reader):
    # Embedding 192 x 16 + 16 + 16 + 5 x 16 = 3,184; a block 4 x (256 + 16) + 2 x 16 x 64 + 64 + 16 + 4 x 16 = 3,280;
    # last norm 32; pooler 272; classifier 3 x 16 + 3 = 51.
    assert extraction.extract(reader, spec_of(reader, "digits"), tmp_path / "out") == 3184 + 2 * 3280 + 32 + 272 + 51
    assert sum(value.numel() for value in load_file(tmp_path / "out" / "model.safetensors").values()) == 10_099


def test_only_the_paths_units_are_read(tmp_path, run):
    names = set()

    class Recording(Reader):
        def read(self, name, kind, start, stop):
            names.add(name.rsplit(".", 2 if name.split(".")[-2] in ("qkv", "proj", "fc1", "fc2", "patch") else 1)[0])
            return super().read(name, kind, start, stop)

        def buffer(self, name):
            names.add(name)
            return super().buffer(name)

    reader = Recording(checkpoint.of_run(run))
    extraction.extract(reader, spec_of(reader, "glyphs"), tmp_path / "out")
    assert names == {
        "embed.shared", "norm.shared", "heads.glyphs.neck",
        "heads.glyphs.neck.running_mean", "heads.glyphs.neck.running_var",
        "blocks.0.norm1.shared", "blocks.0.attn.shared", "blocks.0.norm2.shared", "blocks.0.ffn.shared",
        "blocks.1.norm1.shared", "blocks.1.attn.shared", "blocks.1.norm2.shared", "blocks.1.ffn.own.glyphs",
    }  # fmt: skip


def test_a_task_is_extracted_though_the_file_of_another_is_gone(tmp_path, model):
    reader = Reader(write_checkpoint(tmp_path / "checkpoints", model, apart="digits"))
    (reader.directory / "rank-2.safetensors").unlink()
    extraction.extract(reader, spec_of(reader, "glyphs"), tmp_path / "glyphs")
    assert extraction.verify(reader, spec_of(reader, "glyphs"), tmp_path / "glyphs", make_images())["passed"] is True


def test_another_path_than_the_runs_can_be_cut(tmp_path, reader):
    routes = {"embed": ("own",), "norm": ("shared",) * 3, "attn": ("shared",) * 2, "ffn": ("own", "own")}
    spec = SubnetSpec("glyphs", routes)
    extraction.extract(reader, spec, tmp_path / "out")
    assert extraction.verify(reader, spec, tmp_path / "out", make_images())["passed"] is True
    with pytest.raises(UserError, match="differs from the supernet"):
        extraction.verify(reader, spec_of(reader, "glyphs"), tmp_path / "out", make_images())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ffn": ("own",)}, "1 routes of ffn, this model has 2"),
        ({"norm": ("shared",) * 2}, "2 routes of norm, this model has 3"),
        ({"attn": ("shared", "own")}, "attn is own, but this model has only a shared attn"),
    ],
)
def test_a_path_that_the_model_lacks_is_refused(tmp_path, reader, change, message):
    spec = spec_of(reader, "glyphs")
    with pytest.raises(UserError, match=message):
        extraction.extract(reader, dataclasses.replace(spec, routes={**spec.routes, **change}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_existing_directory_is_left_as_it_is(tmp_path, reader):
    (tmp_path / "config.json").write_text("mine")
    with pytest.raises(UserError, match=r"^--out [^\n]* exists[^\n]*$"):
        extraction.extract(reader, spec_of(reader, "digits"), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert (tmp_path / "config.json").read_text() == "mine"


def test_the_command_extracts_and_verifies(tmp_path, run, capsys):
    for i, image in enumerate(make_images()):
        (tmp_path / f"{i}.image").write_bytes(image)
    files = [str(path) for path in tmp_path.iterdir()]
    out = tmp_path / "out"
    extract.main([str(run), "--task", "glyphs", "--out", str(out), "--verify", "--json", "--images", *files])
    printed = json.loads(capsys.readouterr().out)
    # Embedding for 3 x 2 patches: 192 x 16 + 16 + 16 + 7 x 16 = 3,216; two blocks, last norm and pooler as above.
    assert printed["parameters"] == 3216 + 2 * 3280 + 32 + 272
    assert (printed["task"], printed["step"], printed["out"]) == ("glyphs", 10, str(out))
    assert printed["max_difference"] <= 1e-5
    assert json.loads((out / "certificate.json").read_text())["passed"] is True


# --- tampering --------------------------------------------------------------------------------------------------------


def change_json(name, **values):
    def change(directory):
        file = directory / name
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    return change


def change_weight(directory):
    """The second matrix of the last FFN."""
    file = directory / "model.safetensors"
    state = load_file(file)
    [key] = [key for key, value in state.items() if "1" in key.split(".") and value.shape == (16, 64)]
    state[key] *= 1.01
    save_file(state, file, {"format": "pt"})


processor = "preprocessor_config.json"
TAMPERED = {
    # ((x - mean) / std - mean) / std = (x - (mean + mean x std)) / std^2
    "normalised twice": change_json(processor, image_mean=[0.48, 0.65, 0.75], image_std=[0.04, 0.09, 0.0625]),
    "not normalised": change_json(processor, do_normalize=False),
    "another mean": change_json(processor, image_mean=[0.4, 0.5, 0.601]),
    "colours in reverse": change_json(processor, image_mean=[0.6, 0.5, 0.4], image_std=[0.25, 0.3, 0.2]),
    "nearest": change_json(processor, resample=0),
    "bicubic": change_json(processor, resample=3),
    "not rescaled": change_json(processor, do_rescale=False),
    "one weight matrix by 1%": change_weight,
    "another epsilon": change_json("config.json", layer_norm_eps=1e-3),
    "another activation": change_json("config.json", hidden_act="gelu_new"),
}


@pytest.mark.parametrize("task", CLASSES)
@pytest.mark.parametrize("what", TAMPERED)
def test_tampering_is_found_out(tmp_path, reader, extracted, what, task):
    copied = shutil.copytree(extracted / task, tmp_path / task)
    TAMPERED[what](copied)
    with pytest.raises(UserError, match=r"^[^\n]* differs from the supernet by [^\n]*$"):
        extraction.verify(reader, spec_of(reader, task), copied, make_images())
    certificate = json.loads((copied / "certificate.json").read_text())
    assert certificate["passed"] is False
    assert certificate["max_difference"] > 1e-5


@pytest.mark.parametrize("name", ["classifier.bias", "classifier.weight", "vit.layernorm.weight"])
def test_outputs_that_are_no_numbers_are_found_out(tmp_path, reader, extracted, name):
    copied = shutil.copytree(extracted / "digits", tmp_path / "digits")
    state = load_file(copied / "model.safetensors")
    state[name] = torch.full_like(state[name], torch.nan)
    save_file(state, copied / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="differs from the supernet"):
        extraction.verify(reader, spec_of(reader, "digits"), copied, make_images())
    assert json.loads((copied / "certificate.json").read_text())["passed"] is False


def test_a_model_that_does_not_run_loses_its_certificate(tmp_path, reader, extracted):
    copied = shutil.copytree(extracted / "glyphs", tmp_path / "glyphs")
    extraction.verify(reader, spec_of(reader, "glyphs"), copied, make_images())
    change_json(processor, size={"height": 16, "width": 16})(copied)
    with pytest.raises(UserError, match=r"^[^\n]* does not run: [^\n]*$"):
        extraction.verify(reader, spec_of(reader, "glyphs"), copied, make_images())
    certificate = copied / "certificate.json"
    assert not certificate.exists() or json.loads(certificate.read_text())["passed"] is False


# --- starting from a pretrained ViT -----------------------------------------------------------------------------------


def save_vit(directory, **changes):
    torch.manual_seed(0)
    values = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
              "image_size": 16, "patch_size": 8, "layer_norm_eps": 1e-6, "initializer_range": 0.3}  # fmt: skip
    vit = ViTModel(ViTConfig(**{**values, **changes}), add_pooling_layer=False)
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    vit.save_pretrained(directory)
    return vit.eval()


@pytest.mark.parametrize("route", ["shared", "own"])
def test_a_model_starts_as_the_pretrained_vit(tmp_path, route):
    vit = save_vit(tmp_path)
    recipe = make_recipe(init=str(tmp_path))
    tasks = [dataclasses.replace(task, routes={"embed": route, "ffn": route}) for task in recipe.tasks]
    recipe = dataclasses.replace(recipe, tasks=tasks)
    with torch.device("meta"):
        model = Supernet(recipe, {"digits": 3})
    init_weights(model, pretrained=pretrained_values(recipe))
    generator = torch.Generator().manual_seed(0)
    for task in recipe.tasks:
        images = torch.randint(0, 256, (3, 3, *task.input), generator=generator).to(torch.uint8)
        mean, std = torch.tensor(recipe.data.mean), torch.tensor(recipe.data.std)
        pixels = (images / 255 - mean[:, None, None]) / std[:, None, None]
        with torch.no_grad():
            wanted = vit(pixels, interpolate_pos_encoding=True).last_hidden_state[:, 0]
            assert relative(model.eval().backbone({task.name: images}).cls_BD, wanted) < 1e-5
    heads = {name for name, _ in model.named_parameters() if name.startswith("heads.")}
    assert heads == {"heads.digits.classifier.weight", "heads.digits.classifier.bias"}
    assert model.heads["digits"].classifier.weight.std().item() == pytest.approx(0.01, rel=0.5)  # drawn


def test_a_task_named_shared_has_a_grid_of_its_own(tmp_path):
    vit = save_vit(tmp_path)
    recipe = make_recipe(init=str(tmp_path))
    recipe = dataclasses.replace(recipe, tasks=[recipe.tasks[0], dataclasses.replace(recipe.tasks[1], name="shared")])
    value = pretrained_values(recipe)
    assert torch.equal(value("embed.shared.position", torch.Size([5, 16])), vit.embeddings.position_embeddings[0])
    assert value("embed.own.shared.position", torch.Size([7, 16])).shape == (7, 16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 32}, "has dim 32, model.backbone 16"),
        ({"num_hidden_layers": 3}, "has depth 3, model.backbone 2"),
        ({"num_attention_heads": 4}, "has heads 4, model.backbone 2"),
        ({"intermediate_size": 48}, "has dim x mlp_ratio 48, model.backbone 64"),
        ({"patch_size": 4}, "has patch_size 4, model.backbone 8"),
    ],
)
def test_a_vit_of_another_size_is_refused(tmp_path, changes, message):
    save_vit(tmp_path, **changes)
    with pytest.raises(UserError, match=f"^model.init [^\n]* {message}[^\n]*$"):
        pretrained_values(make_recipe(init=str(tmp_path)))


def test_what_is_no_vit_checkpoint_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"^model.init [^\n]* is no ViT checkpoint: [^\n]*$"):
        pretrained_values(make_recipe(init=str(tmp_path)))
