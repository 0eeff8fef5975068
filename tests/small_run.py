"""A small supernet with two tasks, its checkpoint in two files, and images: what several test files start from."""

import io

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from ufo_ds import checkpoint, recipe_file
from ufo_ds.checkpoint import Index, Parameter
from ufo_ds.data.mixing import Batch, TaskBatch
from ufo_ds.data.transforms import evaluation_transform
from ufo_ds.model.supernet import Supernet, init_weights

CLASSES = {"digits": ["zero", "one", "two"], "glyphs": ["A", "B", "C", "D"]}
PATHS = {
    "digits": {"embed": ["own"], "norm": ["shared"] * 3, "attn": ["shared"] * 2, "ffn": ["own", "shared"]},
    "glyphs": {"embed": ["shared"], "norm": ["shared"] * 3, "attn": ["shared"] * 2, "ffn": ["shared", "own"]},
}


def make_recipe(inputs=((16, 16), (24, 16)), backbone=None, **model):
    return recipe_file.parse(
        {
            "name": "test",
            "model": {
                "backbone": {"dim": 16, "depth": 2, "heads": 2, "patch_size": 8, **(backbone or {})},
                "experts": ["embed", "ffn"],
                **model,
            },
            "tasks": [
                {
                    "name": "digits",
                    "head": {"type": "linear"},
                    "loss": {"cross_entropy": {}},
                    "input": inputs[0],
                    "samples_per_step": 8,
                    "routes": {"ffn": ["own", "shared"]},
                },
                {
                    "name": "glyphs",
                    "head": {"type": "margin"},
                    "loss": {"cosface": {}},
                    "input": inputs[1],
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
    index = Index(step, recipe_file.dump(model.recipe), CLASSES, routes, **about)
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
        checksums = {key: checkpoint.checksum(tensor) for key, tensor in tensors.items()}
        save_file(tensors, unfinished / f"rank-{number}.safetensors", checksums)
    paths = [unfinished / f"rank-{number}.safetensors" for number in range(3)]
    entries = [{"name": p.name, "bytes": p.stat().st_size, "sha256": checkpoint.sha256(p)} for p in paths]
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
