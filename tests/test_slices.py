"""Leading slices of a supernet as a dense model: what a supernet of just these sizes computes, blocks alike or not."""

import pytest
import torch
from transformers import AutoModel, ViTModel

from tests.small_run import CLASSES, make_images, make_model, outputs_of, relative
from ufo_ds import recipe_file
from ufo_ds.model.architecture import Architecture
from ufo_ds.model.dense import classifier_weights, network, vit_weights
from ufo_ds.model.supernet import Supernet
from ufo_ds.subnets.dense_network import DenseNetwork

PLAIN = {"dim": 20, "depth": 3, "heads": [3, 2, 4], "head_dim": 6, "mlp_ratio": [2.0, 3.0, 2.5], "patch_size": 8}
STEM = {**PLAIN, "stem": [8, 12], "pool": "mean"}
ROUTES = {"embed": ("own",), "norm": ("own", "shared", "own", "own"), "attn": ("shared",) * 3,
          "ffn": ("shared", "own", "own")}  # fmt: skip


def make_recipe(backbone, neck, depth):
    """Tasks of two kinds; routes differ by unit and layer, the first one's position embedding is resized."""
    routes = {unit: list(layers[:depth]) for unit, layers in ROUTES.items()}
    routes["norm"] = [*ROUTES["norm"][:depth], "own"]
    common = {"samples_per_step": 8, "routes": routes}
    return recipe_file.parse(
        {
            "name": "test",
            "model": {"backbone": backbone, "experts": ["embed", "norm", "ffn"], "input": (16, 24)},
            "tasks": [
                {"name": "digits", "head": {"type": "linear", "neck": neck}, "loss": {"cross_entropy": {}},
                 "input": (16, 16), **common, "routes": {**routes, "embed": "shared"}},
                {"name": "glyphs", "head": {"type": "margin"}, "loss": {"cosface": {}}, "input": (24, 16), **common},
            ],
            "schedule": {"steps": 10},
        },
        "test",
    )  # fmt: skip


def cut_by_hand(model, recipe):
    """A supernet of a recipe with smaller sizes and the leading slices of another's parameters."""
    with torch.device("meta"):
        small = Supernet(recipe, {name: len(names) for name, names in CLASSES.items()})
    small.to_empty(device="cpu")
    small.fill_constants()
    state, width = model.state_dict(), recipe.model.backbone.head_width
    side = 2 if recipe.model.backbone.stem else 8
    with torch.no_grad():
        for name, value in [*small.named_parameters(), *small.named_buffers()]:
            if name not in state:  # mean and standard deviation of pixels
                continue
            found, wanted = state[name], value.shape
            if ".qkv." in name:  # rows are q, k, v; heads; channels of a head
                found, wanted = found.unflatten(0, (3, -1, width)), (3, wanted[0] // 3 // width, width, *wanted[1:])
            elif ".patch.weight" in name:  # columns are channels; rows and columns of what is left of a patch
                found, wanted = found.unflatten(1, (-1, side, side)), (wanted[0], wanted[1] // side**2, side, side)
            for axis, size in enumerate(wanted):
                found = found.narrow(axis, 0, size)
            value.copy_(found.reshape(value.shape))
    return small.eval()


@pytest.mark.parametrize("neck", [False, True])
@pytest.mark.parametrize(
    ("backbone", "architecture", "stock"),
    [
        (PLAIN, Architecture(20, (), (3, 2, 4), (40, 60, 50)), False),
        (PLAIN, Architecture(12, (), (2, 1), (9, 24)), False),
        (PLAIN, Architecture(20, (), (2, 2), (33, 34)), False),
        (PLAIN, Architecture(20, (), (2, 2), (33, 33)), True),
        (PLAIN, Architecture(12, (), (2, 2, 2), (24, 24, 24)), True),
        (STEM, Architecture(20, (8, 12), (3, 2), (40, 40)), False),
        (STEM, Architecture(7, (5, 6), (1, 1), (14, 14)), False),
    ],
)
def test_slices_are_a_supernet_of_their_sizes(tmp_path, backbone, architecture, stock, neck):
    recipe = make_recipe(backbone, neck, 3)
    model = make_model(recipe)
    sizes = {
        "dim": architecture.dim, "depth": architecture.depth, "heads": list(architecture.heads),
        "mlp_ratio": [hidden / architecture.dim for hidden in architecture.hidden], "stem": list(architecture.stem),
    }  # fmt: skip
    small = cut_by_hand(model, make_recipe({**backbone, **sizes}, neck, architecture.depth))
    for task in recipe.tasks:
        spec = model.spec(task.name).sliced(architecture)
        state, classes = dict(vit_weights(recipe, spec, model.state_dict().__getitem__)), None
        assert all(value.is_contiguous() for value in state.values())
        dense, classifier = network(recipe, task.name, architecture), None
        dense.load_state_dict(state)
        assert (type(dense) is ViTModel) == stock
        if task.head.type == "linear":
            head = classifier_weights(task, architecture.dim, model.state_dict().__getitem__)
            classes = CLASSES[task.name]
            classifier = network(recipe, task.name, architecture, classes).classifier
            classifier.load_state_dict({name.removeprefix("classifier."): value for name, value in head})
        wanted = outputs_of(small, task.name, make_images())
        found = outputs_of(OneTask(recipe, task.name, dense, classifier), task.name, make_images())
        assert relative(found.embedding, wanted.embedding) < 1e-5
        if classes:
            assert relative(found.logits, wanted.logits) < 1e-5
        dense.save_pretrained(tmp_path / task.name)
        again = AutoModel.from_pretrained(tmp_path / task.name)
        found_again = outputs_of(OneTask(recipe, task.name, again, classifier), task.name, make_images())
        assert torch.equal(found_again.embedding, found.embedding)


class OneTask:
    """A dense model, called as a supernet is."""

    def __init__(self, recipe, task, dense, classifier):
        self.recipe, self.task = recipe, task
        self.network = DenseNetwork(recipe, dense.eval(), classifier)

    def __call__(self, batch):
        return {self.task: self.network(batch.tasks[self.task].images)}


def test_the_attention_of_all_blocks_can_be_changed(tmp_path):
    recipe = make_recipe(PLAIN, neck=False, depth=3)
    dense = network(recipe, "digits", Architecture.of(recipe.model.backbone)).eval()
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        fused = dense(pixels).last_hidden_state
        assert dense(pixels, output_attentions=True).attentions in (None, ())
        dense.set_attn_implementation("eager")
        found = dense(pixels, output_attentions=True)
    assert [attention.shape[1] for attention in found.attentions] == [3, 2, 4]
    assert relative(found.last_hidden_state, fused) < 1e-5
