"""What a run would need: memory of every part, FLOPs, traffic and time a step, on any number of GPUs, without one.

ufo plan --recipe ufo2_17b --deepspeed ds_configs/moe_17b.json --world_size 64
ufo plan --recipe mine.yaml --deepspeed ds_configs/moe.json --world_size 8 --gpu a100-40 --optimizer.type lamb

Bytes of parameters, gradients and optimizer state are DeepSpeed's own, padding included. Activations and time follow
from formulas and published figures, which are printed. Any value of the recipe can be set, as in training. Where a
recipe does not say how many classes its tasks have, they are counted in its shards.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from ufo_ds import recipe_file
from ufo_ds.data import demo_shards
from ufo_ds.data.source import open_sources
from ufo_ds.errors import ArgumentParser, UserError
from ufo_ds.model.architecture import Architecture
from ufo_ds.model.cost import head_cost, path_cost
from ufo_ds.model.starting import opening, starts_from_run
from ufo_ds.parallel import config as configs
from ufo_ds.parallel import machines
from ufo_ds.parallel.machines import GIB, GPUS
from ufo_ds.parallel.planning import BACKWARD, Plan, Planner, RankPlan, on_gpus
from ufo_ds.parallel.traffic import KINDS
from ufo_ds.recipe import Recipe

MEMORY_PARTS = {
    "parameters": "parameters",
    "master": "fp32 master copies",
    "gradients": "gradients",
    "reduction_buffer": "reduction buffer",
    "optimizer_state": "optimizer state",
    "averages": "moving averages",
    "buffers": "buffers",
}


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(
        prog="ufo plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--recipe", default="demo", help="a shipped recipe or a YAML file (default: demo)")
    parser.add_argument("--deepspeed", default="ds_configs/moe.json", metavar="JSON", help="how it is spread")
    parser.add_argument("--world_size", default="1", metavar="N", help="number of GPUs, one a rank (default: 1)")
    parser.add_argument("--gpus_per_node", default="8", metavar="N", help="default: 8")
    parser.add_argument("--gpu", default="h200", help=f"one of {', '.join(GPUS)} (default: h200)")
    parser.add_argument("--json", action="store_true", help="print all as JSON")
    options, rest = parser.parse_known_args(argv)
    overrides = recipe_file.overrides_of(rest)
    if options.gpu not in GPUS:
        raise UserError(f"--gpu {options.gpu!r} is not known: use one of {', '.join(GPUS)}")
    world_size = _positive("--world_size", options.world_size)
    gpus_per_node = _positive("--gpus_per_node", options.gpus_per_node)
    if world_size > gpus_per_node and world_size % gpus_per_node:
        raise UserError(f"--world_size {world_size} is not a multiple of --gpus_per_node {gpus_per_node}: change one")
    recipe, values = recipe_file.load(options.recipe, overrides), configs.load(options.deepspeed)
    config = configs.resolve(on_gpus(values), options.deepspeed, recipe, world_size)
    recipe, num_classes = _with_classes(recipe, config.accumulation)
    if starts_from_run(recipe):  # its routes are found
        recipe, _ = opening(recipe, num_classes)
    planner = Planner(recipe, num_classes, values, options.deepspeed, GPUS[options.gpu], gpus_per_node)
    plan = planner.plan(world_size)
    remedies = [] if plan.fits else planner.what_fits(world_size)
    figures = _figures(recipe, num_classes, planner, plan, options.gpu, remedies)
    if options.json:
        print(json.dumps(figures))
        return
    nodes = -(-world_size // gpus_per_node)
    title = f"{recipe.name} on {world_size} x {options.gpu}, {nodes} node{'s' * (nodes > 1)}, {options.deepspeed}"
    print("\n".join([title, *_lines(recipe, plan, figures, options.gpu)]))


def _positive(name: str, text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"{name} {text!r}: give a positive whole number")
    return int(text)


def _with_classes(recipe: Recipe, accumulation: int) -> tuple[Recipe, dict[str, int]]:
    """The recipe with samples of every task, and the outputs of every head: from the recipe, or from its shards.

    Raises:
        UserError: they are in neither.
    """
    if all(task.num_classes and task.samples_per_step for task in recipe.tasks):
        return recipe, {t.name: (t.num_classes or 0) * (4 if t.quarter_turns else 1) for t in recipe.tasks}
    if demo_shards.reads_demo(recipe):
        demo_shards.make_if_absent()
    recipe, sources = open_sources(recipe, accumulation)
    return recipe, {name: source.num_classes for name, source in sources.items()}


def _figures(
    recipe: Recipe, num_classes: dict[str, int], planner: Planner, plan: Plan, gpu: str, remedies: list[str]
) -> dict[str, Any]:
    """All that is printed, and more, as plain values; bytes, FLOPs and seconds."""
    backbone, counts = recipe.model.backbone, planner.models.whole
    tasks = {}
    for task in recipe.tasks:
        path = path_cost(backbone, Architecture.of(backbone), task.input)
        head = head_cost(task, backbone.dim, num_classes[task.name])
        tasks[task.name] = {
            "own_parameters": counts.get(f"own {task.name}", 0),
            "head_parameters": counts.get(f"heads {task.name}", 0),
            "path_parameters": path.parameters,
            "flops_per_image": path.flops + head.flops,
            "images_per_step": task.samples_per_step,
        }
    heads = sum(of_task["head_parameters"] for of_task in tasks.values())
    routers = sum(count for key, count in counts.items() if key.startswith("router"))
    config = plan.config
    return {
        "recipe": recipe.name,
        "world_size": plan.placement.world_size,
        "gpus_per_node": planner.gpus_per_node,
        "gpu": {"name": gpu, **asdict(planner.gpu)},
        "zero_stage": config.stage,
        "precision": config.precision,
        "ep_size": plan.placement.ep_size,
        "exchange": config.exchange,
        "gradient_accumulation_steps": config.accumulation,
        "zero_optimization": config.deepspeed["zero_optimization"],
        "recomputed_blocks": len(recipe.model.recomputed_blocks),
        "parameters": {
            "all": sum(counts.values()),
            "without_heads": sum(counts.values()) - heads - routers,
            "shared": counts["shared"],
            "heads": heads,
            "routers": routers,
        },
        "tasks": tasks,
        "ranks": [_rank_figures(rank) for rank in plan.ranks],
        "images_per_step": plan.images,
        "flops_per_step": sum(planner.flops[name] * of_task["images_per_step"] for name, of_task in tasks.items()),
        "imbalance": plan.imbalance,
        "memory_peak": plan.peak,
        "memory_usable": plan.usable,
        "fits": plan.fits,
        "what_fits": remedies,
        "seconds": {
            "compute": plan.compute_seconds,
            "inside_nodes": plan.inside_seconds,
            "between_nodes": plan.between_seconds,
            "step": plan.step_seconds,
            "overlap": plan.overlaps,
        },
        "bound_by": plan.bound_by,
        "assumptions": {
            "share_of_link": machines.SHARE_OF_LINK,
            "share_of_memory": machines.SHARE_OF_MEMORY,
            "context_gib": machines.CONTEXT_GIB,
            "flops_of_backward": BACKWARD,
        },
    }


def _rank_figures(rank: RankPlan) -> dict[str, Any]:
    held = rank.memory
    return {
        **asdict(rank),
        "memory": {**asdict(held), "resident": held.resident, "phases": held.phases, "peak": held.peak},
    }


def _lines(recipe: Recipe, plan: Plan, figures: dict[str, Any], gpu: str) -> Iterator[str]:
    config, placement = plan.config, plan.placement
    yield (
        f"ZeRO-{config.stage}, {config.precision}, expert parallel {placement.ep_size} x data parallel "
        f"{placement.replicas}, exchange {config.exchange},"
    )
    recomputed, depth = len(recipe.model.recomputed_blocks), recipe.model.backbone.depth
    checkpointing = f", {recomputed} of {depth} blocks computed again" if recomputed else ""
    yield f"gradient accumulation {config.accumulation}, {recipe.optimizer.type}{checkpointing}"
    if plan.overlaps:
        zero, words = config.deepspeed["zero_optimization"], ""
        if config.stage == 3:
            whole = zero["stage3_max_live_parameters"]
            most = f"at most {_millions(whole)}" if whole < 10**15 else "all"
            words = f", {_millions(zero['stage3_prefetch_bucket_size'])} gathered ahead and {most} whole"
        yield f"parameters reduced at once: {_millions(zero['reduce_bucket_size'])}{words}"
    yield from _parameter_lines(figures)
    yield from _placement_lines(plan)
    yield from _memory_lines(plan)
    yield from _traffic_lines(plan)
    yield from _time_lines(plan, figures, gpu)
    yield from _verdict_lines(plan, figures)


def _parameter_lines(figures: dict[str, Any]) -> Iterator[str]:
    counts, tasks = figures["parameters"], figures["tasks"]
    width = max(map(len, tasks))
    yield ""
    yield f"parameters: {_millions(counts['without_heads'])} and {_millions(counts['heads'])} of heads"
    yield f"  {'task':<{width}}  {'own':>9}  {'head':>9}  {'on a path':>9}  {'GFLOP/image':>11}  {'images/step':>11}"
    yield f"  {'(shared)':<{width}}  {_millions(counts['shared']):>9}"
    for name, of_task in tasks.items():
        yield (
            f"  {name:<{width}}  {_millions(of_task['own_parameters']):>9}  "
            f"{_millions(of_task['head_parameters']):>9}  {_millions(of_task['path_parameters']):>9}  "
            f"{of_task['flops_per_image'] / 1e9:>11.1f}  {of_task['images_per_step']:>11}"
        )


def _placement_lines(plan: Plan) -> Iterator[str]:
    total = sum(rank.flops for rank in plan.ranks)
    yield ""
    yield f"placement: busiest rank {plan.imbalance:.2f} x the mean; images of a step, of the fullest rank of each row"
    yield f"  {'EP rank':>7}  {'images':>7}  {'FLOPs':>6}  {'peak GiB':>8}  tasks"
    for rank in plan.ranks:
        first, *rest = _wrapped(", ".join(rank.tasks), 60)
        share, peak = rank.flops / total, rank.memory.peak / GIB
        yield f"  {rank.ep_rank:>7}  {rank.images:>7}  {share:>6.1%}  {peak:>8.1f}  {first}"
        yield from (" " * 36 + line for line in rest)


def _memory_lines(plan: Plan) -> Iterator[str]:
    fullest = max(plan.ranks, key=lambda rank: rank.memory.peak)
    held = fullest.memory
    yield ""
    yield f"memory of the fullest rank (EP rank {fullest.ep_rank}), GiB"
    for key, words in MEMORY_PARTS.items():
        if getattr(held, key):
            yield f"  {words:<42} {_gib(getattr(held, key))}"
    yield f"  {'held throughout':<42} {_gib(held.resident)}"
    phases = held.phases
    yield f"  {'+ forward and backward':<42} {_gib(phases['forward and backward'])}"
    yield f"      {'activations':<38} {_gib(held.activations)}"
    if held.gathered:
        yield f"      {'parameters that are whole':<38} {_gib(held.gathered)}"
        yield f"      {'the largest gather':<38} {_gib(held.largest_gather)}"
    if held.whole_gradients:
        yield f"      {'in place of them: whole gradients':<38} {_gib(held.whole_gradients)}"
    yield f"  {'or + reduction: a copy of its gradients':<42} {_gib(phases['reduction'])}"
    yield f"  {'or + step: gradients of a group in fp32':<42} {_gib(phases['step'])}"
    yield f"  {'peak':<42} {_gib(held.peak)}  of {plan.usable / GIB:.1f} that a run can have"


def _traffic_lines(plan: Plan) -> Iterator[str]:
    busiest = max(plan.ranks, key=lambda rank: sum(rank.traffic.of(kind) for kind in KINDS))
    yield ""
    if not any(busiest.traffic.of(kind) for kind in KINDS):
        yield "sent in a step: nothing, as no two ranks share a parameter that is used or a task"
        return
    yield f"sent in a step by the busiest rank (EP rank {busiest.ep_rank})"
    yield f"  {'':<16} {'inside a node':>14} {'between nodes':>14}"
    for kind in KINDS:
        if busiest.traffic.of(kind):
            inside, between = busiest.traffic.inside[kind], busiest.traffic.between[kind]
            yield f"  {kind:<16} {_decimal(inside):>14} {_decimal(between):>14}"


def _time_lines(plan: Plan, figures: dict[str, Any], gpu: str) -> Iterator[str]:
    found = GPUS[gpu]
    fp32 = plan.config.precision == "fp32"
    yield ""
    yield (
        f"time of a step: {plan.step_seconds:.2f} s, {plan.images / plan.step_seconds:.0f} images/s "
        f"({plan.images} images, {figures['flops_per_step'] / 1e15:.2f} PFLOP in all)"
    )
    yield (
        f"  busiest rank: compute {plan.compute_seconds:.2f} s; links inside nodes {plan.inside_seconds:.2f} s, "
        f"between {plan.between_seconds:.2f} s;"
    )
    reason = "as no overlap is configured" if plan.sizes_agree else "as ranks have parameters of different sizes"
    yield f"  {'one hides behind the other' if plan.overlaps else f'one after the other, {reason}'}"
    yield (
        f"  assumed: {found.share_of_peak:.0%} of {found.fp32 if fp32 else found.bf16:g} TFLOP/s, "
        f"backward {BACKWARD} x forward;"
    )
    yield (
        f"  {machines.SHARE_OF_LINK:.0%} of {found.inside:g} GB/s inside and {found.between:g} GB/s between nodes for "
        "each GPU; loading hides"
    )


def _verdict_lines(plan: Plan, figures: dict[str, Any]) -> Iterator[str]:
    yield ""
    if plan.fits:
        yield f"fits, with {(plan.usable - plan.peak) / GIB:.1f} GiB to spare; bound by {plan.bound_by}"
        return
    yield f"DOES NOT FIT: {(plan.peak - plan.usable) / GIB:.1f} GiB too much; what would fit, each alone:"
    for words in figures["what_fits"] or ["nothing that was tried: more ranks and micro-batches, ZeRO-3"]:
        yield f"  {words}"


def _wrapped(text: str, width: int) -> list[str]:
    lines = [""]
    for word in text.split(" "):
        if len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] += f" {word}" if lines[-1] else word
    return lines


def _millions(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e10 else f"{count / 1e6:.1f} M"


def _decimal(nbytes: float) -> str:
    unit, size = next(
        (unit, size) for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if nbytes >= size or size == 1e3
    )
    return f"{nbytes / size:.1f} {unit}"


def _gib(nbytes: int) -> str:
    return f"{nbytes / GIB:>8.2f}"
