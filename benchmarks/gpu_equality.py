"""Part of gpu.py: a small model on the GPU against the same on the CPU, in fp32 without TF32.

Four tasks of three input sizes, with own copies of everything, learned routes (attention and FFN), margin, circle and
triplet losses, a BN neck, sampled negatives, label smoothing, mixed samples and drop path: losses and gradients of
every step, weights and running statistics after the last, and what evaluation then says. And SGD in the backward pass
against torch.optim.SGD on fp32 masters on the GPU, where not one bit may differ.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ufo_ds import recipe_file
from ufo_ds.data.mixing import Batch, TaskBatch
from ufo_ds.model.parameters import UpdateRule, update_rule
from ufo_ds.model.supernet import Supernet, init_weights
from ufo_ds.recipe import Recipe
from ufo_ds.seeding import torch_generator
from ufo_ds.training.optimizer_in_backward import SGDInBackward, split_master

STEPS = 3
CLASSES = {"a": 5, "b": 40, "c": 3, "d": 4}
# Largest relative differences: of a tensor max |d| / max |reference|, of all gradients together the norms' ratio.
BARS = {"loss": 1e-5, "all_gradients": 1e-5, "gradient": 1e-4, "weight": 1e-5, "statistics": 1e-5, "output": 1e-4}


def measure(device: torch.device, small: bool, limit_s: float, report: Callable[..., None]) -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    differing = update_bits(device)
    report(bars={"bits_of_masters_differing": (differing, 0)})
    expected, found = train(torch.device("cpu")), train(device)
    worst = dict.fromkeys(BARS, 0.0)
    for key, wanted in expected.items():
        kind = key.partition(" ")[0]
        worst[kind] = max(worst[kind], difference(found[key], wanted))
    norm = {key: float(x.norm()) for key, x in expected.items() if key.startswith("gradient ")}
    off = sum(float((found[key].cpu() - expected[key]).norm()) ** 2 for key in norm)
    worst["all_gradients"] = (off / sum(n**2 for n in norm.values())) ** 0.5
    report(bars={f"{kind}_to_cpu": (worst[kind], bar) for kind, bar in BARS.items()})


def difference(found: Tensor, wanted: Tensor) -> float:
    """Infinite where one is NaN."""
    off = (found.cpu().float() - wanted.cpu().float()).abs().amax()
    scale = wanted.abs().amax().item() or 1.0
    return off.nan_to_num(float("inf")).item() / scale


def make_recipe() -> Recipe:
    """Where a neck's batch norm follows, the last norm is shared with a linear head: a bias before it alone has a
    true gradient of zero, and comparing noise says nothing."""
    linear = {"head": {"type": "linear"}, "loss": {"cross_entropy": {"label_smoothing": 0.1}}}
    margin = {"head": {"type": "margin"}, "loss": {"cosface": {"scale": 8}, "triplet": {"weight": 0.5}}}
    other = {
        "head": {"type": "margin", "sampled_negatives": 0.3},
        "loss": {"arcface": {"scale": 8}, "circle": {"scale": 4}, "triplet": {"normalize": True}},
    }
    norms = {"routes": {"norm": ["own", "own", "shared"]}}
    return recipe_file.parse(
        {
            "name": "gpu_equality",
            "model": {
                "backbone": {"dim": 32, "depth": 2, "heads": 2, "patch_size": 8},
                "experts": ["embed", "norm", "attn", "ffn"],
                "routes": {"ffn": "learned", "attn": "learned"},
                "router": {"probe": 0.5},
                "drop_path": 0.3,
            },
            "tasks": [
                {"name": "a", "input": [16, 16], "samples_per_step": 16, "identities_per_step": 4, **margin, **norms},
                {"name": "b", "input": [24, 16], "samples_per_step": 16, "identities_per_step": 4, **other, **norms},
                {"name": "c", "input": [16, 16], "samples_per_step": 4, **linear, **norms,
                 "augment": {"mixup": {"probability": 1.0}}},
                {"name": "d", "input": [16, 32], "samples_per_step": 4, **linear, "lr_scale": 0.5},
            ],
            "optimizer": {"type": "sgd", "lr": 0.01, "momentum": 0.9, "weight_decay": 0.01,
                          "rules": [{"bias": True, "lr_scale": 2.0}]},
            "schedule": {"steps": STEPS},
        },
        "gpu_equality.py",
    )  # fmt: skip


def start_value(name: str, shape: torch.Size, span: range) -> Tensor:
    """Weights large enough that samples differ: batch norm over nearly equal features would only amplify noise."""
    value = 0.3 * torch.randn(shape, generator=torch_generator("start", name)).flatten()[span.start : span.stop]
    return value + 1.0 if "norm" in name or "neck" in name else value


def make_batch(recipe: Recipe, step: int) -> Batch:
    tasks = {}
    for task in recipe.tasks:
        generator, n = torch_generator("batch", step, task.name), task.samples_per_step
        images = torch.randint(0, 256, (n, 3, *task.input), generator=generator).to(torch.uint8)
        labels = torch.randint(0, CLASSES[task.name], (n,), generator=generator)
        tasks[task.name] = TaskBatch(images, labels, range(n), n)
        if task.augment.mixes:
            tasks[task.name].mix_labels = torch.randint(0, CLASSES[task.name], (n,), generator=generator)
            tasks[task.name].mix_weight = torch.rand(n, generator=generator)
    return Batch(step, 0, tasks, {})


def make_model(recipe: Recipe, device: torch.device) -> Supernet:
    with torch.device("meta"):
        model = Supernet(recipe, CLASSES)
    init_weights(model, device, pretrained=start_value)
    return model.train()


def train(device: torch.device) -> dict[str, Tensor]:
    """Everything worth comparing, each named by its kind first."""
    recipe = make_recipe()
    model, notes = make_model(recipe, device), {}
    optimizer = torch.optim.SGD(parameter_groups(model, recipe), momentum=recipe.optimizer.momentum)
    for step in range(STEPS):
        optimizer.zero_grad()
        losses_TK = model(make_batch(recipe, step).to(device))
        losses_TK.sum().backward()
        notes[f"loss {step}"] = losses_TK.detach()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None and not name.endswith("qkv.bias"):  # the keys' true gradient is zero
                notes[f"gradient {step} {name}"] = parameter.grad.clone()
        optimizer.step()
    notes |= {f"weight {name}": parameter.detach() for name, parameter in model.named_parameters()}
    notes |= {f"statistics {name}": buffer for name, buffer in model.named_buffers()}
    with torch.no_grad():
        for name, outputs in model.eval()(make_batch(recipe, STEPS).to(device)).items():
            notes |= {f"output {name} embedding": outputs.embedding, f"output {name} logits": outputs.logits}
    return {key: value.cpu() for key, value in notes.items()}


def parameter_groups(model: Supernet, recipe: Recipe) -> list[dict]:
    """One a parameter, with its rate and weight decay."""
    groups = []
    for name, parameter in model.named_parameters():
        rule = update_rule(name, recipe)
        rate = recipe.optimizer.lr * rule.lr_scale
        groups.append({"params": [parameter], "lr": rate, "weight_decay": rule.weight_decay})
    return groups


def update_bits(device: torch.device) -> int:
    """Elements of the masters that differ in any bit after a few steps, with momentum, decay and clipping. Gradients
    are given, since those of a network may be summed in another order the next time."""
    rate, momentum, decay, max_norm = 0.1, 0.9, 0.01, 2.0
    torch.manual_seed(0)
    master = nn.Parameter(torch.randn(1000, 33, device=device))
    expected = torch.optim.SGD([master], lr=rate, momentum=momentum, weight_decay=decay, foreach=False)
    weight = nn.Parameter(split_master(master.detach())[0])
    optimizer = SGDInBackward({"w": weight}, {"w": UpdateRule(1.0, decay, False)}, momentum, max_norm)
    optimizer.assign("w", master.detach())
    optimizer.learning_rate = rate
    differing = 0
    for _ in range(5):
        gradient = torch.randn(1000, 33, device=device).bfloat16()
        (weight * gradient).sum().backward()
        master.grad = gradient.float()
        torch.nn.utils.clip_grad_norm_([master], max_norm, foreach=False)
        expected.step()
        buffer = expected.state[master]["momentum_buffer"]
        buffer.copy_(buffer.bfloat16())
        bits = optimizer.master("w").view(torch.int32) != master.detach().view(torch.int32)
        differing += int(bits.sum())
    return differing
