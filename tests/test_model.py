"""The supernet is transformers' ViT along every path, whatever is packed together; its draws and its initial values
are functions of their keys alone."""

import itertools

import pytest
import torch
from transformers import ViTConfig, ViTModel

from ufo_ds import recipe_file
from ufo_ds.data.mixing import Batch, TaskBatch
from ufo_ds.errors import UserError
from ufo_ds.model.architecture import Architecture
from ufo_ds.model.dense import vit_config, vit_weights
from ufo_ds.model.heads import LOSSES
from ufo_ds.model.packing import split
from ufo_ds.model.supernet import Supernet, init_weights

LINEAR = {"head": {"type": "linear"}, "loss": {"cross_entropy": {}}}
MARGIN = {"head": {"type": "margin"}, "loss": {"cosface": {"scale": 8}}}
# a and b have images of equal length and other grids, as do c and d; the sizes of d are no multiples of the patch.
TASKS = [
    {"name": "a", "input": [16, 16], "samples_per_step": 4, **LINEAR},
    {"name": "b", "input": [8, 32], "samples_per_step": 4, **MARGIN},
    {"name": "c", "input": [24, 16], "samples_per_step": 4, **LINEAR},
    {"name": "d", "input": [20, 27], "samples_per_step": 4, **MARGIN},
]
CLASSES = {"a": 3, "b": 5, "c": 4, "d": 2, "e": 6}
GRIDS = {"a": (2, 2), "b": (1, 4), "c": (3, 2), "d": (2, 3)}  # of patches of 8 pixels
EVERYTHING = ["embed", "norm", "attn", "ffn"]
MIXED = {
    "a": {"embed": "own", "norm": ["own", "shared", "own", "shared"], "attn": "own", "ffn": ["own", "shared", "own"]},
    "b": {"embed": "own", "norm": "shared", "attn": ["shared", "own", "own"], "ffn": ["shared", "shared", "own"]},
    "c": {"embed": "shared", "norm": ["shared", "own", "own", "own"], "attn": "shared", "ffn": "own"},
    "d": {"embed": "shared", "norm": "own", "attn": ["own", "shared", "own"], "ffn": "shared"},
}


def make_recipe(routes="own", tasks=TASKS, seed=0, **model):
    """``routes``: one route for everything, a route per unit, or "mixed"."""
    if routes == "mixed":
        tasks = [{**task, "routes": MIXED[task["name"]]} for task in tasks]
        routes = "own"
    if isinstance(routes, str):
        routes = dict.fromkeys(EVERYTHING, routes)
    values = {
        "backbone": {"dim": 16, "depth": 3, "heads": 2, "patch_size": 8, "mlp_ratio": 3},
        "experts": EVERYTHING,
        "routes": routes,
        **model,
    }
    data = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25]}
    return recipe_file.parse(
        {"name": "test", "model": values, "tasks": tasks, "data": data, "schedule": {"steps": 1}, "seed": seed}, "test"
    )


def build(recipe):
    """A supernet with its initial values."""
    with torch.device("meta"):
        model = Supernet(recipe, {task.name: CLASSES[task.name] for task in recipe.tasks})
    init_weights(model)
    return model


def scrambled(recipe):
    """A supernet in which no two copies are alike."""
    model = build(recipe)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
            if name in ("mean", "std"):
                continue
            tensor.normal_(std=0.2, generator=generator)
            if "norm" in name or "neck" in name:
                tensor.abs_().add_(0.5)
    return model


def make_images(recipe, count=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return {
        task.name: torch.randint(0, 256, (count + i, 3, *task.input), generator=generator).to(torch.uint8)
        for i, task in enumerate(recipe.tasks)
    }


def make_batch(images, step=0, micro_step=0, part=slice(None)):
    """Part of a micro-batch; a label is its sample's position, modulo the classes."""
    tasks = {}
    for name, image in images.items():
        positions = range(len(image))[part]
        labels = torch.tensor([i % CLASSES[name] for i in positions], dtype=torch.int64)
        tasks[name] = TaskBatch(image[part], labels, positions, len(image))
    return Batch(step, micro_step, tasks, {})


def pixels_of(images):
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.25])
    return ((images.double() / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)).float()


def dense_vit(recipe, task):
    config = vit_config(recipe, task, Architecture.of(recipe.model.backbone))
    config._attn_implementation = "eager"
    return ViTModel(config).eval()


def relative(found, wanted):
    assert found.shape == wanted.shape
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


# --- size -------------------------------------------------------------------------------------------------------------


def count(name, overrides=()):
    with torch.device("meta"):
        return sum(p.numel() for p in Supernet(recipe_file.load(name, list(overrides)), {}).parameters())


def test_ufo2_has_17_billion_parameters():
    # A block: attention 4 x (1280^2 + 1280) = 6,558,720; FFN 2 x 1280 x 5120 + 5120 + 1280 = 13,113,600; norms 5,120.
    # Embedding: (3 x 14^2 + 1) x 1280 + class token 1,280 + (18 x 18 + 1) x 1280 = 1,171,200.
    # A path: 32 x 19,677,440 + 1,171,200 + last norm 2,560 = 630,851,840; 26 own and the shared one, 27 x 630.9 M.
    assert count("ufo2_17b") == 27 * 630_851_840 == 17_032_999_680


def test_ufo2_with_ffn_and_embedding_experts_has_11_billion_parameters():
    overrides = [("model.experts", "[embed, ffn]")]
    # 26 x (32 x 13,113,600 + 1,171,200) = 26 x 420,806,400 beside the shared path.
    assert count("ufo2_17b", overrides) == 630_851_840 + 26 * 420_806_400 == 11_571_818_240


def test_without_experts_one_vit_is_left():
    found = count("ufo2_17b", [("model.experts", "[]"), ("model.routes", "{}")])
    config = ViTConfig(
        hidden_size=1280, num_hidden_layers=32, num_attention_heads=16, intermediate_size=5120, image_size=256,
        patch_size=14,
    )  # fmt: skip
    with torch.device("meta"):
        vit = ViTModel(config, add_pooling_layer=False)
    assert found == sum(p.numel() for p in vit.parameters()) == 630_851_840


def test_allinone_is_one_vit_large():
    # 24 x (4 x (1024^2 + 1024) + 2 x 1024 x 4096 + 4096 + 1024 + 4 x 1024) = 24 x 12,596,224 = 302,309,376;
    # last norm 2,048; embedding (768 + 1) x 1024 + 1024 + (24 x 24 + 1) x 1024 = 1,379,328.
    assert count("allinone_vit_l") == 302_309_376 + 2_048 + 1_379_328


# --- the supernet is a ViT --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("routes", ["shared", "own", "mixed"])
def test_every_path_of_a_packed_batch_is_a_stock_vit(routes):
    recipe = make_recipe(routes)
    model = scrambled(recipe).eval()
    images = make_images(recipe)
    with torch.no_grad():
        features = model.backbone(images)
        outputs = model(make_batch(images))
        for i, (name, image) in enumerate(images.items()):
            vit = dense_vit(recipe, name)
            vit.load_state_dict(dict(vit_weights(recipe, model.spec(name), model.state_dict().__getitem__)))
            wanted = vit(pixels_of(image))
            tokens = split(features.tokens_ND, features.segments)[i].view(wanted.last_hidden_state.shape)
            assert relative(tokens, wanted.last_hidden_state) < 1e-5
            cls = split(features.pooled_BD, [s.per_image() for s in features.segments])[i]
            assert relative(cls, wanted.last_hidden_state[:, 0]) < 1e-5
            assert relative(outputs[name].embedding, wanted.pooler_output) < 1e-5
            h, w = GRIDS[name]
            for y, x in itertools.product(range(h), range(w)):
                assert relative(features.grid(i)[:, :, y, x], wanted.last_hidden_state[:, 1 + y * w + x]) < 1e-5


def test_gradients_of_a_packed_batch_are_those_of_the_stock_vits():
    recipe = make_recipe("mixed")
    model = scrambled(recipe)
    images = make_images(recipe)
    named = dict(model.named_parameters())
    everything = named | dict(model.named_buffers())
    generator = torch.Generator().manual_seed(2)
    features = model.backbone(images)
    weight_ND = torch.randn(features.tokens_ND.shape, generator=generator)
    (features.tokens_ND * weight_ND).sum().backward()
    found = {name: p.grad for name, p in named.items()}
    model.zero_grad()
    for weight, segment in zip(split(weight_ND, features.segments), features.segments, strict=True):
        # functional_call: the state still depends on the supernet's parameters, so that gradients arrive at these.
        state = dict(vit_weights(recipe, model.spec(segment.task), everything.__getitem__))
        vit = dense_vit(recipe, segment.task)
        hidden = torch.func.functional_call(vit, state, pixels_of(images[segment.task])).last_hidden_state
        (hidden * weight.view(hidden.shape)).sum().backward()
    used = 0
    for name, parameter in named.items():
        if parameter.grad is None:
            assert found[name] is None or not found[name].any(), name
        else:
            # The bias of the keys has a true gradient of zero, so it is compared with that of queries and values.
            assert relative(found[name], parameter.grad) < 1e-5, name
            used += 1
    assert used > 50


@pytest.mark.parametrize("routes", ["own", "mixed"])
def test_a_task_alone_gives_what_it_gives_among_others(routes):
    recipe = make_recipe(routes)
    model = scrambled(recipe).eval()
    images = make_images(recipe)
    with torch.no_grad():
        together = model(make_batch(images))
        for order in (["b"], ["d", "a"], ["c", "b", "d"]):
            some = model(make_batch({name: images[name] for name in order}))
            assert list(some) == order
            for name in order:
                assert relative(some[name].embedding, together[name].embedding) < 1e-5
                assert relative(some[name].logits, together[name].logits) < 1e-5


@pytest.mark.parametrize("routes", ["shared", "own"])
def test_images_of_another_size_get_a_resized_position_embedding(routes):
    recipe = make_recipe(routes, tasks=TASKS[:1])
    model = scrambled(recipe).eval()
    images = torch.randint(0, 256, (2, 3, 24, 40), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    vit = dense_vit(recipe, "a")
    vit.load_state_dict(dict(vit_weights(recipe, model.spec("a"), model.state_dict().__getitem__)))
    with torch.no_grad():
        wanted = vit(pixels_of(images), interpolate_pos_encoding=True).last_hidden_state[:, 0]
        assert relative(model.backbone({"a": images}).pooled_BD, wanted) < 1e-5


def test_a_task_may_be_named_like_a_part_of_the_model():
    recipe = make_recipe(tasks=[{**TASKS[2], "name": "shared"}])
    with torch.device("meta"):
        model = Supernet(recipe, {"shared": 3})
    assert "blocks.0.ffn.own.shared.fc1.weight" in dict(model.named_parameters())


@pytest.mark.parametrize("name", ["train", "values", "type"])
def test_a_task_may_not_be_named_like_an_attribute_of_a_module(name):
    with pytest.raises(UserError, match="taken by PyTorch"):
        make_recipe(tasks=[{**TASKS[2], "name": name}])


# --- drop path --------------------------------------------------------------------------------------------------------


def test_drop_path_keeps_branches_as_often_as_it_says_and_scales_them():
    model = build(make_recipe(drop_path=0.4))
    factors = model._drop_path(make_batch({"a": torch.empty(8000, 0)}))
    assert factors.shape == (8000, 3, 2)
    for layer, keep in enumerate([1.0, 0.8, 0.6]):  # 1 - 0.4 x layer / 2
        kept = factors[:, layer] > 0
        torch.testing.assert_close(factors[:, layer][kept], torch.full((int(kept.sum()),), 1 / keep))
        # 8000 draws: the standard deviation is at most 0.5 / sqrt(8000) = 0.0056, of which this is five.
        assert kept.float().mean(0).tolist() == pytest.approx([keep, keep], abs=0.028)
    both = (factors[:, 2] > 0).all(1).float().mean().item()
    assert both == pytest.approx(0.36, abs=0.028)  # the two branches of a block are drawn apart


def test_a_dropped_branch_adds_nothing_to_its_image_and_the_others_are_scaled():
    recipe = make_recipe("own")
    model = scrambled(recipe)
    images = {name: image for name, image in make_images(recipe, count=2).items() if name in "ac"}
    factors = torch.ones(2 + 4, 3, 2)
    factors[1] = 0.0  # the second image of a
    factors[2, :, 0] = 0.0  # the first image of c, attention
    for block in model.blocks:  # branches twice as strong are what a factor of 2 gives
        torch.nn.init.zeros_(block.ffn.own["c"].fc2.weight)
        torch.nn.init.zeros_(block.ffn.own["c"].fc2.bias)
    with torch.no_grad():
        found = model.backbone(images, drop_path_B=factors)
        plain = model.backbone(images)
        double = model.backbone(images, drop_path_B=torch.full((6, 3, 2), 2.0))
        x_ND = model.embed(torch.cat([model._patches(image) for image in images.values()]), plain.segments)
        bare = model.norm(x_ND, plain.segments)[torch.tensor([0, 5, 10, 17, 24, 31])]  # class tokens; 5 and 7 rows each
        for block in model.blocks:
            for name in "ac":
                block.attn.own[name].proj.weight *= 2
                block.attn.own[name].proj.bias *= 2
                block.ffn.own[name].fc2.weight *= 2
                block.ffn.own[name].fc2.bias *= 2
        stronger = model.backbone(images)
    assert relative(found.pooled_BD[1:3], bare[1:3]) < 1e-6
    others = torch.tensor([0, 3, 4, 5])
    assert relative(found.pooled_BD[others], plain.pooled_BD[others]) < 1e-6
    assert relative(plain.pooled_BD[1:3], bare[1:3]) > 1e-2
    assert relative(double.tokens_ND, stronger.tokens_ND) < 1e-5


def test_evaluation_drops_nothing():
    images = make_images(make_recipe())
    with torch.no_grad():
        found = scrambled(make_recipe(drop_path=0.9)).eval()(make_batch(images))
        wanted = scrambled(make_recipe()).eval()(make_batch(images))
    for name in images:
        assert torch.equal(found[name].embedding, wanted[name].embedding)


def test_a_samples_drop_path_does_not_depend_on_the_split_or_on_other_tasks():
    model = build(make_recipe(drop_path=0.5))
    images = {"a": torch.empty(12, 0), "b": torch.empty(20, 0)}
    whole = model._drop_path(make_batch(images))
    for part in (slice(0, 5), slice(5, 12), slice(3, 4), slice(12, 20), slice(0, 0)):
        pieces = [whole[:12][part], whole[12:][part]]
        assert torch.equal(model._drop_path(make_batch(images, part=part)), torch.cat(pieces))
    assert torch.equal(model._drop_path(make_batch({"b": images["b"]})), whole[12:])
    assert not torch.equal(whole[:12], whole[12:24])
    for other in ({"step": 1}, {"micro_step": 1}):
        assert not torch.equal(model._drop_path(make_batch(images, **other)), whole)
    assert not torch.equal(build(make_recipe(drop_path=0.5, seed=1))._drop_path(make_batch(images)), whole)


def test_losses_and_gradients_of_a_batch_are_the_sums_over_its_parts():
    tasks = [TASKS[0], TASKS[2]]  # linear heads: no statistics over the batch
    recipe = make_recipe({"ffn": "learned", "attn": "own"}, tasks, drop_path=0.5)
    model = scrambled(recipe).train()
    images = make_images(recipe, count=5)
    results = []
    for parts in ([slice(None)], [slice(0, 3), slice(3, 3), slice(3, None)]):
        model.zero_grad()
        losses = sum(model(make_batch(images, step=7, part=part)) for part in parts)
        losses.sum().backward()
        results.append((losses, {name: p.grad for name, p in model.named_parameters()}))
    (wanted, wanted_grads), (found, found_grads) = results
    assert wanted.shape == (2, len(LOSSES))
    assert wanted[:, 0].gt(0).all()
    assert not wanted[:, 1:].any()
    assert relative(found, wanted) < 1e-5
    for name, grad in wanted_grads.items():
        torch.testing.assert_close(found_grads[name], grad, rtol=1e-4, atol=1e-6)


# --- initial values ---------------------------------------------------------------------------------------------------


def test_adding_a_task_changes_no_parameter():
    added = {"name": "e", "input": [40, 32], "samples_per_step": 2, **MARGIN}
    routes = {"attn": "learned", "ffn": "learned"}
    before = dict(build(make_recipe(routes)).named_parameters())
    after = dict(build(make_recipe(routes, [*TASKS, added])).named_parameters())
    assert any("router" in name for name in before)
    assert all("e" in name.split(".") for name in set(after) - set(before))
    for name, parameter in before.items():
        assert torch.equal(after[name], parameter), name


def test_initial_values_are_a_function_of_the_seed():
    torch.manual_seed(0)
    first = build(make_recipe()).state_dict()
    torch.manual_seed(1)
    again, other = build(make_recipe()).state_dict(), build(make_recipe(seed=1)).state_dict()
    assert all(torch.equal(again[name], value) for name, value in first.items())
    assert not torch.equal(first["blocks.0.ffn.shared.fc1.weight"], other["blocks.0.ffn.shared.fc1.weight"])
    assert not torch.equal(first["blocks.0.ffn.shared.fc1.weight"], first["blocks.1.ffn.shared.fc1.weight"])
    assert not torch.equal(first["heads.a.classifier.weight"][:2], first["heads.c.classifier.weight"][:2])


def test_own_copies_start_as_the_shared_one():
    same_input = [{**task, "input": [24, 32]} for task in TASKS]
    parameters = dict(build(make_recipe(tasks=same_input)).named_parameters())
    own = [name for name in parameters if ".own." in name]
    # Per task: embedding 4, last norm 2, and in each of 3 blocks two norms 2 x 2, attention 4, FFN 4.
    assert len(own) == 4 * (4 + 2 + 3 * 12)
    for name in own:
        task = name.split(".own.")[1].split(".")[0]
        assert torch.equal(parameters[name], parameters[name.replace(f".own.{task}.", ".shared.")]), name


def test_initial_values_are_those_of_big_vision():
    values = build(make_recipe({"ffn": "learned"})).state_dict()
    block = "blocks.1"
    for name in (f"{block}.norm1.own.a.weight", "norm.shared.weight", "heads.b.neck.weight"):
        assert values[name].eq(1).all()
    for name in (f"{block}.norm2.own.a.bias", f"{block}.attn.shared.qkv.bias", "heads.a.classifier.bias",
                 "embed.own.c.cls", "router.logits.a"):  # fmt: skip
        assert not values[name].any()
    # Glorot's uniform bound sqrt(6 / (fan in + fan out)): the three matrices 16 x 16 of qkv each count as one.
    for name, fans in {f"{block}.attn.shared.qkv": 32, f"{block}.ffn.own.b.fc1": 64, "embed.shared.patch": 208}.items():
        bound = (6 / fans) ** 0.5
        assert 0.95 * bound < values[f"{name}.weight"].abs().max() <= bound
    # Position embeddings: standard deviation 1 / sqrt(16) over 7 x 16 values, to within four times its own deviation.
    assert values["embed.own.c.position"].std().item() == pytest.approx(0.25, abs=4 * 0.25 / (2 * 112) ** 0.5)
