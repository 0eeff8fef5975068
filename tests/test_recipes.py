"""The shipped recipes load and hold the published numbers; wrong input ends in one line that says what to do."""

import pytest
import yaml

from ufo_ds import recipe_file
from ufo_ds.data.open_small import ORIGINS
from ufo_ds.errors import UserError

OPEN_SMALL = "data_shards/open_small/val"
SHIPPED = sorted(path.stem for path in recipe_file.RECIPES.glob("*.yaml"))


@pytest.fixture(autouse=True)
def place_of_open_small(monkeypatch):
    monkeypatch.setenv("OPEN_SMALL", OPEN_SMALL)


def test_the_recipes_that_are_promised_are_shipped():
    assert {"demo", "open_small", "allinone_vit_l", "ufo2_17b"} <= set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes_load_and_survive_printing(name):
    loaded = recipe_file.load(name)
    assert loaded.name == name
    assert recipe_file.parse(yaml.safe_load(recipe_file.to_yaml(loaded)), "printed") == loaded


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes_open_with_their_command(name):
    text = (recipe_file.RECIPES / f"{name}.yaml").read_text()
    assert text.startswith("#")
    assert "# Command: deepspeed ufo_ds/train.py" in text
    assert "# Result" in text


def test_allinone_is_as_published():
    loaded = recipe_file.load("allinone_vit_l")
    batches = {task.name: task.samples_per_step for task in loaded.tasks}
    assert batches == {"face": 1024, "person": 512, "products": 512, "vehicle": 512}
    assert loaded.model.backbone.name == "vit_large"
    assert loaded.model.experts == []
    assert loaded.model.drop_path == 0.2
    assert {task.input for task in loaded.tasks} == {(384, 384)}
    assert {task.name: len(task.train) for task in loaded.tasks} == {
        "face": 1,
        "person": 3,
        "products": 1,
        "vehicle": 3,
    }
    assert sum(len(task.benchmarks) for task in loaded.tasks) == 17  # 13 published, of two sets all three lists
    assert {task.name for task in loaded.tasks if task.loss.triplet} == {"person", "products", "vehicle"}
    assert (loaded.optimizer.type, loaded.optimizer.lr, loaded.schedule.steps) == ("sgd", 0.2, 100_000)


def test_ufo2_is_as_published():
    loaded = recipe_file.load("ufo2_17b")
    tasks = {task.name: task for task in loaded.tasks}
    assert len(tasks) == 26
    batches = {name: task.samples_per_step for name, task in tasks.items() if task.samples_per_step != 144}
    assert batches == {
        "face": 1152, "imagenet": 1152, "person": 576, "vehicle": 576, "products": 576, "cifar10": 256,
    }  # fmt: skip
    margins = {name: (task.loss.cosface.scale, task.loss.cosface.margin) for name, task in tasks.items()
               if task.loss.cosface}  # fmt: skip
    assert margins == {"face": (50, 0.3), "person": (30, 0.2), "vehicle": (20, 0.2), "products": (30, 0.2)}
    lr_scales = {name: task.lr_scale for name, task in tasks.items() if task.lr_scale != 0.25}
    assert lr_scales == {"face": 2, "vehicle": 2, "person": 1, "products": 1, "imagenet": 0.5}
    for name in ("person", "vehicle", "products"):
        assert tasks[name].samples_per_step == 4 * tasks[name].identities_per_step
    optimizer, schedule = loaded.optimizer, loaded.schedule
    assert (optimizer.type, optimizer.lr, optimizer.momentum, optimizer.weight_decay) == ("sgd", 0.2, 0.0, 1e-4)
    assert optimizer.gradient_clipping == 5
    assert (schedule.steps, schedule.warmup_steps, schedule.min_lr) == (60_000, 6_000, 0.004)
    assert all(task.num_classes for task in loaded.tasks)


def test_ufo2_has_17_billion_parameters():
    loaded = recipe_file.load("ufo2_17b")
    vit = loaded.model.backbone
    assert set(loaded.model.experts) == {"embed", "norm", "attn", "ffn"}
    assert not loaded.model.routes  # own, where there are experts
    assert {task.input for task in loaded.tasks} == {(256, 256)}
    tokens = (256 // vit.patch_size) ** 2 + 1
    norm = 2 * vit.dim
    attention = 4 * (vit.dim**2 + vit.dim)
    ffn = 2 * vit.mlp_ratio * vit.dim**2 + (vit.mlp_ratio + 1) * vit.dim
    embedding = (3 * vit.patch_size**2 + 1) * vit.dim + vit.dim + tokens * vit.dim
    path = vit.depth * (attention + ffn + 2 * norm) + norm + embedding
    assert path / 1e6 == pytest.approx(630.9, abs=0.05)
    assert (len(loaded.tasks) + 1) * path / 1e9 == pytest.approx(17.03, abs=0.005)
    smaller = path + len(loaded.tasks) * (vit.depth * ffn + embedding)
    assert smaller / 1e9 == pytest.approx(11.57, abs=0.005)
    overrides = [("model.experts", "[embed, ffn]")]
    assert recipe_file.load("ufo2_17b", overrides).model.experts == ["embed", "ffn"]


def test_one_variable_moves_open_small_from_validation_to_test(monkeypatch):
    """All its shards, and only they, and they are those that `ufo shards open_small` makes."""

    def directories():
        tasks = recipe_file.load("open_small").tasks
        return [entry.shards for task in tasks for entry in task.train] + [
            directory
            for task in tasks
            for benchmark in task.benchmarks
            for directory in (benchmark.shards, benchmark.query, benchmark.gallery)
            if directory is not None
        ]

    val = directories()
    monkeypatch.setenv("OPEN_SMALL", "elsewhere/test")
    assert [f"elsewhere/test{directory.removeprefix(OPEN_SMALL)}" for directory in val] == directories()
    assert all(directory.startswith(f"{OPEN_SMALL}/") for directory in val)
    assert {directory.split("/")[-2] for directory in val} == set(ORIGINS)
    monkeypatch.delenv("OPEN_SMALL")
    with pytest.raises(UserError, match="needs the environment variable OPEN_SMALL: set it to a directory"):
        recipe_file.load("open_small")


def test_recipes_load_from_a_file_and_fill_in_defaults(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text((recipe_file.RECIPES / "demo.yaml").read_text())
    loaded = recipe_file.load(str(file))
    assert loaded == recipe_file.load("demo")
    assert loaded.optimizer.momentum == 0.9


def test_overrides_address_tasks_by_name():
    overrides = [("tasks.glyphs.samples_per_step", "64"), ("optimizer.lr", "1e-4")]
    loaded = recipe_file.load("demo", overrides)
    assert {task.name: task.samples_per_step for task in loaded.tasks} == {"digits": 32, "glyphs": 64}
    assert loaded.optimizer.lr == 1e-4


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([("optimizer.speed", "3")], "unknown key optimizer.speed = 3: remove it"),
        ([("tasks.glyphs.speed", "3")], "unknown key tasks.glyphs.speed = 3"),
        ([("optimizer.lr", "fast")], "optimizer.lr = 'fast'"),
        ([("schedule.steps", "0")], "schedule.steps = 0"),
        ([("tasks.faces.weight", "1")], "no 'faces' there; known: digits, glyphs"),
        ([("tasks.glyphs.identities_per_step", "96")], "glyphs: samples_per_step 128 is smaller than P x K = 96 x 2"),
        ([("model.experts", "[embed]")], "model.experts lacks 'ffn'"),
    ],
)
def test_wrong_values_end_in_one_line(overrides, message):
    with pytest.raises(UserError) as caught:
        recipe_file.load("demo", overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("head", "loss", "message"),
    [
        ({"type": "linear"}, {}, "a linear head goes with cross_entropy without scale, and needs it"),
        ({"type": "linear"}, {"cosface": {}}, "a linear head goes with cross_entropy"),
        ({"type": "linear"}, {"cross_entropy": {}, "arcface": {}}, "a linear head goes with cross_entropy"),
        ({"type": "linear"}, {"cross_entropy": {"scale": 30}}, "a linear head goes with cross_entropy without scale"),
        ({"type": "linear", "sampled_negatives": 0.5}, {"cross_entropy": {}}, "sampled_negatives is for margin heads"),
        ({"type": "margin"}, {}, "a margin head needs cosface, am_softmax, arcface, circle or cross_entropy"),
        ({"type": "margin"}, {"cross_entropy": {}}, "cross_entropy of a margin head needs the scale of its cosines"),
        ({"type": "margin", "sampled_negatives": 0}, {"cosface": {}}, "sampled_negatives = 0"),
        ({"type": "margin"}, {"arcface": {"margin": 2}}, "loss.arcface.margin = 2"),
        (
            {"type": "linear"},
            {"cross_entropy": {}, "binary_cross_entropy": {}},
            "only loss: remove it or cross_entropy",
        ),
        ({"type": "margin"}, {"binary_cross_entropy": {}}, "binary_cross_entropy is for a linear head"),
        ({"type": "linear", "sharded": True}, {"binary_cross_entropy": {}}, "for a linear head that is not sharded"),
        ({"type": "linear", "sampled_negatives": 0.5}, {"binary_cross_entropy": {}}, "sampled_negatives is for margin"),
    ],
)
def test_heads_and_losses_must_fit(head, loss, message):
    with pytest.raises(UserError) as caught:
        recipe_file.load("demo", [("tasks.digits.head", str(head)), ("tasks.digits.loss", str(loss))])
    assert message in str(caught.value)
    assert "digits" in str(caught.value)


def test_attributes_are_no_identities():
    changes = [
        ("tasks.digits.loss", "{binary_cross_entropy: {}}"),
        ("tasks.digits.identities_per_step", "4"),
    ]
    with pytest.raises(UserError, match="digits: attributes are no identities: remove identities_per_step"):
        recipe_file.load("demo", changes)


def test_a_sharded_margin_head_cannot_classify():
    changes = [("tasks.digits.head", "{type: margin, sharded: true}"), ("tasks.digits.loss", "{cosface: {}}")]
    with pytest.raises(UserError, match="digits: a sharded margin head gives no logits"):
        recipe_file.load("demo", changes)


def test_losses_combine_with_weights_of_their_own():
    loss = "{arcface: {weight: 3}, am_softmax: {}, circle: {}, cross_entropy: {scale: 16}, triplet: {normalize: true}}"
    task = recipe_file.load("demo", [("tasks.glyphs.loss", loss)]).tasks[1]
    assert (task.loss.arcface.scale, task.loss.arcface.margin, task.loss.arcface.weight) == (64, 0.5, 3)
    assert (task.loss.am_softmax.scale, task.loss.am_softmax.margin) == (30, 0.35)
    assert (task.loss.circle.scale, task.loss.circle.margin) == (128, 0.25)
    assert task.loss.triplet.normalize


def test_an_unknown_recipe_names_those_that_exist():
    with pytest.raises(UserError, match=r"no recipe 'dmeo'.*allinone_vit_l, demo"):
        recipe_file.load("dmeo")
