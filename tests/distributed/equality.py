"""Compares a DeepSpeed run with one process over the same micro-batches.

The reference is the plain single-device model: batch norm and triplet over the global micro-batch, torch's own
optimizer and clipping; torch leaves alone what has no gradient, as copies that no path uses. For every case the result
holds the largest relative difference (max |d| / max |reference|) of the losses, of the gradient of every parameter over
all ranks, of the weights and their averages after the last step, of the logits that the averages give, and
with fixed routes of the tasks' gradient norms and cosines.
"""

import dataclasses

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

from tests.layerwise import Lamb, Lars
from ufo_ds import recipe as recipes
from ufo_ds import recipe_file
from ufo_ds.data.mixing import Batch, TaskBatch
from ufo_ds.model import classifiers
from ufo_ds.model.parameters import unused
from ufo_ds.model.supernet import Supernet, init_weights
from ufo_ds.parallel import config as configs
from ufo_ds.parallel.averages import averaged
from ufo_ds.parallel.conflict import gradient_conflict
from ufo_ds.parallel.engine import Engine
from ufo_ds.parallel.experts import EMPTY
from ufo_ds.seeding import torch_generator

STEPS = 3
MEASURES = ("loss", "gradient", "weight", "average", "output", "norm", "conflict")
CLASSES = {"a": 5, "b": 7, "c": 3, "d": 4}
MANY_CLASSES = {"a": 1003, "b": 1001, "c": 97, "d": 4}  # of cases with sharded heads; most do not divide


def make_recipe(case: dict) -> recipes.Recipe:
    """Four tasks of 8:4:2:1 (or half of the last, then absent on most ranks) samples, of two kinds, of three input
    sizes. Batch norm over fewer than eight samples would be compared at the edge of fp32."""
    gas = case["accumulation"]
    linear = {"head": {"type": "linear"}, "loss": {"cross_entropy": {"label_smoothing": 0.1}}}
    several = {"loss": {"binary_cross_entropy": {}}} if case["multi_label"] else {}  # labels 0, 1, 2: none, one, one
    mixing = {"augment": {"mixup": {"probability": 1.0}}} if case["mixing"] else {}
    margin = {"head": {"type": "margin"}, "loss": {"cosface": {"scale": 8}, "triplet": {"weight": 0.5}}}
    sizes = [[16, 16]] * 4 if case["one_input"] else [[16, 16], [24, 16], [16, 16], [16, 32]]
    tasks = [
        {"name": "a", "input": sizes[0], "samples_per_step": 16 * gas, "identities_per_step": 4 * gas, **margin},
        {"name": "b", "input": sizes[1], "samples_per_step": 8 * gas, "identities_per_step": 2 * gas, **margin},
        {"name": "c", "input": sizes[2], "samples_per_step": 4 * gas, **linear, **several, **mixing, "weight": 2.0},
        {"name": "d", "input": sizes[3], "samples_per_step": case["last"] * gas, **linear, "lr_scale": 0.5},
    ]
    # Before a neck's batch norm a bias has a true gradient of zero, and comparing noise says nothing: the margin tasks
    # share the last norm with a linear one.
    for task in tasks:
        task["head"] = {**task["head"], "sharded": task["name"] in case["sharded"]}
        if task["name"] in case["sampled"]:
            task["head"]["sampled_negatives"] = 0.3
    if case["sharded"]:
        tasks[1]["loss"] = {"arcface": {"scale": 8}, "circle": {"scale": 4}, "triplet": {"normalize": True}}
    for task in tasks[:3]:
        task["routes"] = {"norm": ["own", "own", "shared"]}
    routes = {"ffn": "learned", "attn": "learned"}
    if case["routes"] == "frozen":
        routes = {"ffn": ["own", "shared"], "attn": ["shared", "own"], "embed": "own", "norm": "own"}
        tasks[1]["routes"] = {"ffn": ["shared", "own"], "norm": ["own", "shared", "shared"]}
        tasks[3]["routes"] = {"attn": "shared", "embed": "shared"}

    def possible(routes: dict) -> dict:
        return {unit: route for unit, route in routes.items() if unit in case["experts"]}

    return recipe_file.parse(
        {
            "name": "equality",
            "model": {
                "backbone": {"dim": 16, "depth": 2, "heads": 2, "patch_size": 8, **case["backbone"]},
                "experts": case["experts"],
                "routes": possible(routes),
                "router": {"probe": case["probe"]},
                "shared_samples": case["shared_samples"],
                "drop_path": case["drop_path"],
                "activation_checkpointing": case["recompute"],
                "elastic": case["elastic"],
            },
            "tasks": [{**task, "routes": possible(task.get("routes", {}))} for task in tasks[: case["tasks"]]],
            "optimizer": {
                "type": case["optimizer"],
                "lr": {"sgd": 1e-2, "adamw": 1e-3, "lars": 1e-2, "lamb": 1e-3}[case["optimizer"]],
                "weight_decay": 0.01,
                "trust": 0.1,
                "gradient_clipping": case["clipping"],
                "rules": [{"bias": True, "lr_scale": 2.0}],
                "average": 0.15,
            },
            "schedule": {"steps": STEPS},
        },
        "equality.py",
    )


def start_value(name: str, shape: torch.Size, span: range) -> torch.Tensor:
    """Weights large enough that samples differ: batch norm over nearly equal features would only amplify noise."""
    value = 0.3 * torch.randn(shape, generator=torch_generator("start", name)).flatten()[span.start : span.stop]
    return value + 1.0 if "norm" in name or "neck" in name else value


def task_steps(batches: str, step: int, number: int, tasks: int) -> int:
    """How many of its own steps the task of this number is trained in."""
    if batches == "isomorphic":
        return int(number == step % tasks)
    return (number + step) % 3 if batches == "balanced" else 1


def global_batch(
    recipe: recipes.Recipe, step: int, micro_step: int, samples: dict[str, int], classes: dict[str, int],
    batches: str = "heterogeneous",
) -> Batch:  # fmt: skip
    tasks = {}
    for number, task in enumerate(recipe.tasks):
        generator = torch_generator("batch", step, micro_step, task.name)
        n = samples[task.name] * task_steps(batches, step, number, len(recipe.tasks))
        images = torch.randint(0, 256, (n, 3, *task.input), generator=generator).to(torch.uint8)
        labels = torch.randint(0, classes[task.name], (n,), generator=generator)
        tasks[task.name] = TaskBatch(images, labels, range(n), n)
        if task.augment.mixes:
            tasks[task.name].mix_labels = torch.randint(0, classes[task.name], (n,), generator=generator)
            tasks[task.name].mix_weight = torch.rand(n, generator=generator)
    return Batch(step, micro_step, tasks, {})


def part_of(batch: Batch, positions: dict[str, range]) -> Batch:
    """The samples at these positions."""
    tasks = {}
    for name, chosen in positions.items():
        whole = batch.tasks[name]
        rows = slice(chosen.start, chosen.stop)
        mix = [None if x is None else x[rows] for x in (whole.mix_labels, whole.mix_weight)]
        tasks[name] = TaskBatch(whole.images[rows], whole.labels[rows], chosen, whole.global_count, *mix)
    return Batch(batch.step, batch.micro_step, tasks, {})


def reference_groups(model: Supernet, recipe: recipes.Recipe) -> list[dict]:
    """One group a parameter, written down anew from the recipe's words."""
    scales = {task.name: task.lr_scale for task in recipe.tasks}
    groups = []
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        owner = parts[1] if parts[0] == "heads" else parts[parts.index("own") + 1] if "own" in parts else None
        scale = scales.get(owner, 1.0) * (2.0 if parts[-1] == "bias" else 1.0)
        decay = parts[-1] == "weight" and not any(p in parts for p in ("norm", "norm1", "norm2", "neck"))
        groups.append({
            "params": [parameter],
            "lr": recipe.optimizer.lr * scale,
            "weight_decay": recipe.optimizer.weight_decay if decay else 0.0,
            "adapted": decay,
        })  # fmt: skip
    return groups


def reference_optimizer(groups: list[dict], options: recipes.Optimizer) -> torch.optim.Optimizer:
    if options.type == "adamw":
        return torch.optim.AdamW(groups, betas=options.betas)
    if options.type == "sgd":
        return torch.optim.SGD(groups, momentum=options.momentum)
    if options.type == "lars":
        return Lars(groups, options.momentum, options.trust)
    return Lamb(groups, options.betas, options.norm_bounds)


def reference_conflict(model: Supernet, batches: list[Batch], weights: torch.Tensor) -> dict[str, dict[str, float]]:
    """Norm and cosine by one backward pass a task and the definition, on what gets a gradient from several tasks."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gradients: dict[str, dict[str, torch.Tensor]] = {}
    for i, task in enumerate(model.tasks):
        model.zero_grad()
        for batch in batches:
            (model(batch)[i].sum() * weights[i] / len(batches)).backward()
        gradients[task] = {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.load_state_dict(before)  # running statistics
    names = {name for of_task in gradients.values() for name in of_task}
    both = [name for name in sorted(names) if sum(bool(g[name].any()) for g in gradients.values() if name in g) > 1]
    flat = {task: torch.cat([of_task[name].flatten() for name in both]) for task, of_task in gradients.items() if both}
    found = {}
    for task, mine in flat.items():
        others = sum(other for name, other in flat.items() if name != task)
        found[task] = {
            "gradient_norm": float(mine.norm()),
            "gradient_cosine": float(mine @ others / (mine.norm() * others.norm())),
        }
    return found


def evaluated(recipe: recipes.Recipe, classes: dict[str, int], values: dict[str, torch.Tensor], batch: Batch) -> dict:
    model = Supernet(recipe, classes)
    model.fill_constants()
    model.load_state_dict(values)
    with torch.no_grad():
        return model.eval()(batch)


def configure(case: dict, recipe: recipes.Recipe) -> configs.DistributedConfig:
    values = {
        "gradient_accumulation_steps": case["accumulation"],
        "zero_optimization": {"stage": case["stage"], **case["zero"]},
        "expert_parallel": {"autoep_size": case["ep"], "exchange": case["exchange"]},
        "bf16": {"enabled": False},
    }
    return configs.resolve(values, "equality.py", recipe, dist.get_world_size())


def compare(case: dict) -> dict:
    recipe = make_recipe(case)
    names = [task.name for task in recipe.tasks]
    classes = {name: (MANY_CLASSES if case["sharded"] else CLASSES)[name] for name in names}
    engine = Engine(recipe, configure(case, recipe), classes, pretrained=start_value)
    assert engine.sizes_agree == (case["one_input"] or "embed" not in case["experts"] or engine.placement.ep_size == 1)

    without_recomputation = dataclasses.replace(recipe.model, activation_checkpointing="none")
    with torch.device("meta"):
        reference = Supernet(dataclasses.replace(recipe, model=without_recomputation), classes)
    init_weights(reference, pretrained=start_value)
    reference.train()
    optimizer = reference_optimizer(reference_groups(reference, recipe), recipe.optimizer)
    weights = torch.tensor([task.weight for task in recipe.tasks])
    expected = dict(reference.named_parameters())
    averages = {name: value.clone() for name, value in reference.state_dict().items()}
    worst = dict.fromkeys(MEASURES, 0.0)
    spread, padded = classifiers.spread(engine.model), classifiers.parts(engine.model)
    if engine.placement.ep_size == 2 and len(names) == 4:  # 8 : 4 : 2 : 1 samples, and other ranks' slots are empty
        assert [set(tasks) for tasks in engine.placement.tasks_of] == [{"a"}, {"b", "c", "d"}]
    owned = engine.placement.tasks_of[engine.placement.ep_rank(engine.rank)]
    for task in set(owned) & set(case["sharded"]):
        assert (f"heads.{task}.classifier.weight" in spread) == (engine.placement.replicas > 1)

    def note(kind: str, found: torch.Tensor, wanted: torch.Tensor, where: str) -> None:
        scale = wanted.abs().max().item()
        if where.split()[-1] in padded:  # this rank has some rows of it, then padding
            rows = padded[where.split()[-1]].rows
            assert not found[len(rows) :].any()
            found, wanted = found[: len(rows)], wanted[rows.start : rows.stop]
        difference = (found.float() - wanted).abs().amax().item() if len(found.flatten()) else 0.0
        relative = difference / scale if scale else (0.0 if difference == 0 else float("inf"))
        if relative > worst[kind]:
            worst[kind], worst[f"{kind}_at"] = relative, where

    def note_weights(kind: str, wanted: dict[str, torch.Tensor]) -> None:
        for name, parameter in engine.model.named_parameters():
            found = safe_get_full_fp32_param(parameter)
            if EMPTY not in name and not name.endswith("qkv.bias"):  # Adam makes noise of the key bias' zero gradient
                note(kind, found, wanted[name], name)
        for name, buffer in engine.model.named_buffers():
            if name.startswith("heads.") and EMPTY not in name:
                note(kind, buffer, wanted[name], name)

    for step in range(STEPS):
        if step == 1 and case["routes"] == "freezing":
            logits = reference.router.logits
            likelier = {task: (x[:, 1] > x[:, 0]).tolist() for task, x in logits.items()}
            reference.set_routes(reference.decided_routes(likelier))
            assert engine.freeze_routes() == reference.routes
        random = recipe.model.elastic is not None and recipe.model.elastic.sampling == "random"
        if step == 1 and case["routes"] == "frozen" and not random:  # of which only one task may use a shared block
            batches = [global_batch(recipe, step, i, engine.samples, classes) for i in range(case["accumulation"])]
            measured = gradient_conflict(engine, [part_of(batch, engine.positions()) for batch in batches])
            for task, of_task in reference_conflict(reference, batches, weights).items():
                assert measured[task].keys() == of_task.keys()
                for key, wanted in of_task.items():
                    of_one = [1.0] if key == "gradient_cosine" else []  # which is compared with the largest there is
                    pair = torch.tensor([measured[task][key], *of_one]), torch.tensor([wanted, *of_one])
                    note("conflict", *pair, f"{task} {key}")
        optimizer.zero_grad()
        for micro_step in range(case["accumulation"]):
            batch = global_batch(recipe, step, micro_step, engine.samples, classes, case["batches"])
            losses = reference(batch)
            ((losses.sum(1) * weights).sum() / case["accumulation"]).backward()
            counts = {name: part.global_count for name, part in batch.tasks.items()}
            parts = engine.backward(part_of(batch, engine.reads(counts)))
            dist.all_reduce(parts)
            note("loss", parts, losses.detach(), f"step {step}.{micro_step}")
            if micro_step == case["accumulation"] - 1:
                for name, parameter in engine.model.named_parameters():
                    found = safe_get_full_grad(parameter)  # collective: every rank calls it for every slot
                    # Alone in a step, a margin task leaves the bias before its neck the gradient zero, see make_recipe.
                    noise = case["batches"] != "heterogeneous" and name == "norm.shared.bias"
                    if EMPTY not in name and not noise:
                        wanted = expected[name].grad
                        wanted = torch.zeros_like(expected[name]) if wanted is None else wanted
                        found = torch.zeros_like(wanted) if found is None else found
                        note("gradient", found, wanted, f"step {step} {name}")
            engine.update(recipe.optimizer.lr)
        left_out = unused(expected, reference.routes, recipe.model.shared_samples)
        for name, parameter in expected.items():
            if name in left_out:  # called without rows, where the subnets of all others leave the block out
                parameter.grad = None
            elif parameter.grad is None:  # a learned route took the other copy this time
                parameter.grad = torch.zeros_like(parameter)
        if case["clipping"]:
            norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), case["clipping"])
            note("norm", torch.tensor(engine.gradient_norm), norm, f"step {step}")
        optimizer.step()
        decay = min(0.15, (1 + step) / (10 + step))
        for name, value in reference.state_dict().items():
            if name in expected and expected[name].grad is None:
                continue
            averages[name] = decay * averages[name] + (1 - decay) * value
        with averaged(engine):
            note_weights("average", averages)
            batch = global_batch(recipe, STEPS + step, 0, engine.samples, classes)
            owned = engine.placement.owned(engine.rank, engine.samples)
            engine.deepspeed.eval()
            outputs = engine.deepspeed(part_of(batch, owned))
            for name, wanted in evaluated(recipe, classes, averages, batch).items():
                if rows := owned.get(name):
                    note("output", outputs[name].embedding, wanted.embedding[rows.start : rows.stop], name)
        engine.deepspeed.train()
    note_weights("weight", reference.state_dict())
    engine.deepspeed.destroy()
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, worst)
    result = {kind: max(other[kind] for other in everyone) for kind in MEASURES}
    result["at"] = max(everyone, key=lambda other: other["gradient"]).get("gradient_at")
    return {"case": case, **result}
