"""Students: sizes of the published networks, inputs small and odd, and the same outputs wherever they are loaded."""

import json

import pytest
import torch
from transformers import AutoModel, AutoModelForImageClassification

from tests.small_run import CLASSES, make_recipe
from ufo_ds.checkpoint import write_text
from ufo_ds.errors import UserError
from ufo_ds.model.mobilenet_v3 import LARGE, SMALL, MobileNetV3, SqueezeExcite
from ufo_ds.model.students import (
    STUDENTS,
    UfoStudentConfig,
    UfoStudentModel,
    patch_of,
    stride_of,
    unfit,
)
from ufo_ds.recipe import only
from ufo_ds.recipe_file import to_yaml
from ufo_ds.subnets.extraction import image_processor
from ufo_ds.subnets.student_model import StudentModel


def make(backbone, **values):
    torch.manual_seed(0)
    return UfoStudentModel(UfoStudentConfig(backbone=backbone, **values)).eval()


def parameters(model):
    return sum(p.numel() for p in model.parameters())


# --- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("table", "published"), [(SMALL, 2_542_856), (LARGE, 5_483_032)])
def test_mobilenet_v3_has_the_published_parameters(table, published):
    """2.5 M and 5.5 M in the paper, to the parameter those of torchvision's, with 1000 classes."""
    network = MobileNetV3(table)
    assert parameters(network) + 1000 * (network.features + 1) == published


@pytest.mark.parametrize(
    ("backbone", "published", "features"),
    [("resnet18", 11_689_512, 512), ("resnet50", 25_557_032, 2048), ("mobilenet_v2", 3_504_872, 1280)],
)
def test_others_have_the_published_parameters(backbone, published, features):
    """Those of torchvision's models, with 1000 classes: the projector stands for their classifier."""
    student = make(backbone, embedding_size=1000)
    assert student.projector.in_features == features
    assert parameters(student) == published


def test_mobilenet_v3_by_the_tables_of_the_paper():
    """Sizes of the maps behind each block for 224 pixels; a squeeze to a quarter, nearly; residual where equal."""
    for table, sizes, squeezed in (
        (LARGE, [112, 56, 56, 28, 28, 28, 14, 14, 14, 14, 14, 14, 7, 7, 7], [24, 32, 32, 120, 168, 168, 240, 240]),
        (SMALL, [56, 28, 28, 14, 14, 14, 14, 14, 7, 7, 7], [8, 24, 64, 64, 32, 40, 72, 144, 144]),
    ):
        network = MobileNetV3(table).eval()
        found = [layer.reduce.out_channels for layer in network.modules() if isinstance(layer, SqueezeExcite)]
        assert found == squeezed
        with torch.no_grad():
            x = network.stem(torch.randn(1, 3, 224, 224))
            assert x.shape[1:] == (16, 112, 112)
            for block, row, size in zip(network.blocks, table, sizes, strict=True):
                before, x = x, block(x)
                assert x.shape[1:] == (row.channels, size, size)
                assert block.residual == (before.shape == x.shape)
                squeezes = [layer for layer in block.layers if isinstance(layer, SqueezeExcite)]
                assert len(squeezes) == row.squeeze


def test_squeeze_excite_by_hand():
    """Two channels, means 1 and 3: reduced to 8 by a matrix that takes their sum, 4; hard sigmoid (4 w + 3) / 6."""
    layer = SqueezeExcite(2)
    for parameter in layer.parameters():
        torch.nn.init.zeros_(parameter)
    layer.reduce.weight.data[0] = 1.0
    layer.expand.weight.data[:, 0, 0, 0] = torch.tensor([0.25, 2.0])  # (1 + 3) / 6; 8 is beyond 3: 1
    x = torch.tensor([[[[0.0, 2.0]], [[3.0, 3.0]]]])
    assert torch.allclose(layer(x), torch.tensor([[[[0.0, 2.0 * 4 / 6]], [[3.0, 3.0]]]]))


@pytest.mark.parametrize("backbone", STUDENTS)
def test_width_multiplies(backbone):
    whole, half = make(backbone), make(backbone, width=0.5)
    # Of two factors that halve nearly all; a ViT's heads are 3 and 2, or 6 and 3.
    assert 0.2 < parameters(half) / parameters(whole) < 0.5
    if not backbone.startswith("vit"):
        convolutions = [module for module in half.modules() if isinstance(module, torch.nn.Conv2d)]
        assert all(module.out_channels % 8 == 0 for module in convolutions)
    tiny = make(backbone, width=0.01)
    assert parameters(tiny) < parameters(half)
    assert tiny(torch.zeros(1, 3, 224, 224)).pooler_output.shape == (1, 192)


# --- inputs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", STUDENTS)
@pytest.mark.parametrize("size", [(16, 16), (64, 64), (112, 112), (128, 64), (224, 224)])
def test_it_takes_images_of_many_sizes(backbone, size):
    student = make(backbone, width=0.25, image_size=size, embedding_size=24, classify=True)
    outputs = student(torch.randn(2, 3, *size))
    assert outputs.pooler_output.shape == (2, 24)
    assert outputs.logits.shape == (2, 2)
    assert torch.isfinite(outputs.logits).all()


@pytest.mark.parametrize(
    "backbone", ["resnet18", "resnet50", "mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large"]
)
@pytest.mark.parametrize(("side", "positions"), [(16, 2), (32, 4), (64, 4), (112, 7), (128, 4), (224, 7)])
def test_the_last_map_of_a_small_image_has_positions(backbone, side, positions):
    student = make(backbone, width=0.1, image_size=(side, side))
    maps = []
    for module in student.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda module, inputs, output: maps.append(output.shape[2:]))
    student(torch.zeros(1, 3, side, side))
    spatial = [size for size in maps if tuple(size) != (1, 1)]  # without squeezes
    assert tuple(spatial[-1]) == (positions, positions)
    assert side // stride_of((side, side)) == positions


def test_patches():
    wanted = {(224, 224): 16, (256, 128): 16, (64, 64): 8, (112, 112): 8, (16, 16): 4, (24, 16): 4, (36, 36): 4}
    assert {size: patch_of(size) for size in wanted} == wanted


@pytest.mark.parametrize(
    ("backbone", "size"), [("vit_tiny", (50, 64)), ("vit_small", (64, 31)), ("resnet18", (64, 15))]
)
def test_sizes_that_it_cannot_take(backbone, size):
    assert f"not {size[0]}x{size[1]}" in unfit(backbone, size)
    with pytest.raises(ValueError, match="takes images"):
        UfoStudentConfig(backbone=backbone, image_size=size)


def test_a_backbone_that_there_is_not():
    with pytest.raises(ValueError, match="no backbone 'alexnet'"):
        UfoStudentConfig(backbone="alexnet")


def test_running_statistics_are_of_more_than_the_last_batch():
    student = make("mobilenet_v2", width=0.1, image_size=(32, 32)).train()
    norm = student.backbone.conv_stem.first_conv.normalization
    student(torch.full((2, 3, 32, 32), 1.0) + torch.randn(2, 3, 32, 32))
    first = norm.running_mean.clone()
    student(torch.zeros(2, 3, 32, 32))  # its mean is 0 before the norm
    assert torch.allclose(norm.running_mean, 0.9 * first)


# --- saved ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", STUDENTS)
def test_saved_and_loaded_it_says_the_same_to_the_bit(tmp_path, backbone):
    names = {0: "a", 1: "b", 2: "c"}
    student = make(backbone, width=0.1, image_size=(32, 32), embedding_size=16, classify=True, id2label=names)
    with torch.no_grad():
        student.train()(torch.randn(8, 3, 32, 32))  # statistics of its own
    student.eval().save_pretrained(tmp_path)
    x = torch.randn(3, 3, 32, 32)
    for auto in (AutoModel, AutoModelForImageClassification):
        loaded, info = auto.from_pretrained(tmp_path, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        found, wanted = loaded.eval()(x), student(x)
        assert torch.equal(found.pooler_output, wanted.pooler_output)
        assert torch.equal(found.logits, wanted.logits)
        assert found.logits.shape == (3, 3)
        assert loaded.config.id2label == {0: "a", 1: "b", 2: "c"}


@pytest.mark.parametrize(
    ("key", "value"),
    [("width", 1e6), ("width", float("inf")), ("width", float("nan")), ("width", -1), ("embedding_size", 10**12),
     ("embedding_size", -1), ("backbone", "vit_small"), ("backbone", "gpt"), ("image_size", [16]),
     ("image_size", [10**6, 10**6]), ("image_size", "x"), ("id2label", {"0": "zero"}), ("id2label", {"5": "zero"}),
     ("classify", False)],
)  # fmt: skip
def test_a_config_of_other_sizes_than_the_weights_is_refused_before_anything_is_made(tmp_path, key, value):
    recipe = only(make_recipe(), ["digits"])
    names = dict(enumerate(CLASSES["digits"]))
    student = make("mobilenet_v3_small", width=0.25, image_size=[16, 16], embedding_size=16, classify=True,
                   id2label=names, label2id={name: i for i, name in names.items()})  # fmt: skip
    student.save_pretrained(tmp_path)
    image_processor(recipe, recipe.tasks[0]).save_pretrained(tmp_path)
    write_text(tmp_path / "recipe.yaml", to_yaml(recipe))
    assert StudentModel.load(tmp_path).classes == CLASSES["digits"]
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(UserError) as error:
        StudentModel.load(tmp_path)
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value)
