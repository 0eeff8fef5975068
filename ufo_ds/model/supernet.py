"""The Task-MoE vision transformer: a pre-norm ViT in which every unit has a shared copy and, where the recipe says so,
one per task. Single-device code; ``parallel`` swaps the distributed expert layers in.

A parameter's name says where it lives: ``blocks.7.ffn.shared.fc1.weight``, ``blocks.7.ffn.own.person.fc1.weight``,
``heads.person.classifier.weight``.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ufo_ds.data.mixing import Batch, TaskBatch
from ufo_ds.errors import UserError
from ufo_ds.model import classifiers
from ufo_ds.model.architecture import Architecture, subnets_of_step
from ufo_ds.model.block import Block
from ufo_ds.model.elastic import narrow
from ufo_ds.model.experts import LEARNED, OWN, SHARED, RoutedUnit
from ufo_ds.model.heads import BatchNormNeck, Outputs, TaskHead, TaskHeads
from ufo_ds.model.initialization import Pretrained, fill, start_values
from ufo_ds.model.layers import Embedding, Norm
from ufo_ds.model.packing import Part, Segment, concatenate, join, overlap, patchify, split
from ufo_ds.model.recomputation import recomputed
from ufo_ds.model.router import Choices, Place, Router
from ufo_ds.model.spec import UNITS, SubnetSpec, routes_of
from ufo_ds.recipe import Recipe
from ufo_ds.recipe_task import Size
from ufo_ds.seeding import torch_generator


@dataclass
class Features:
    """What the backbone returns: ``pooled_BD`` (the class token after the last norm, or the mean of the tokens) and all
    ``tokens_ND``."""

    segments: list[Segment]
    tokens_ND: Tensor
    pooled_BD: Tensor

    def grid(self, index: int) -> Tensor:
        """The feature map ``[B, D, h, w]`` of a segment, for heads that need one."""
        segment = self.segments[index]
        x_BLD = split(self.tokens_ND, self.segments)[index].unflatten(0, (segment.images, segment.tokens))
        return x_BLD[:, segment.prefix :].unflatten(1, segment.grid_hw).permute(0, 3, 1, 2)


class Supernet(nn.Module):
    """All tasks of a recipe.

    Args:
        recipe: what to build.
        num_classes: classes of every task's head; a task that is not there gets no head.

    Built on the meta device it takes no memory; :func:`init_weights` then gives it values.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, recipe: Recipe, num_classes: Mapping[str, int]):
        super().__init__()
        self.recipe = recipe
        model, backbone = recipe.model, recipe.model.backbone
        self.tasks = {task.name: task for task in recipe.tasks}
        self.routes = self.routes_of_recipe()
        self.architectures: dict[str, Architecture] = {}  # of tasks that in evaluation take less than their whole path
        self.register_buffer("mean", torch.empty(3, 1, 1), persistent=False)  # of pixels in 0..255
        self.register_buffer("std", torch.empty(3, 1, 1), persistent=False)

        def build(unit: str, layer: int, make: Callable[[str | None], nn.Module]) -> RoutedUnit:
            routes = {name: self.routes[name][unit][layer] for name in self.tasks}
            tasks = list(self.tasks) if unit in model.experts else []
            return RoutedUnit(make, tasks, routes, shared_samples=model.shared_samples > 0)

        shared_input = model.input or recipe.tasks[0].input
        self.embed = build("embed", 0, lambda name: Embedding(
            backbone.patch_size, backbone.dim, self.grid_hw(shared_input if name is None else self.tasks[name].input),
            backbone.prefix, backbone.stem, [self.grid_hw(task.input) for task in recipe.tasks],
        ))  # fmt: skip
        self.blocks = nn.ModuleList(Block(build, i, backbone) for i in range(backbone.depth))
        self.norm = build("norm", backbone.depth, lambda _: Norm(backbone.dim, eps=backbone.layer_norm_eps))
        self.heads = TaskHeads({
            name: TaskHead(
                task.head, backbone.dim, num_classes[name], task.loss, (recipe.seed, "negatives", name),
                0.0 if model.elastic is None else model.elastic.distillation,
            ) for name, task in self.tasks.items() if name in num_classes
        })  # fmt: skip
        router = model.router
        self.router = Router(
            self._learned_places(),
            router.temperature,
            router.final_temperature or router.temperature,
            router.freeze_at or recipe.schedule.steps,
            router.probe,
            recipe.seed,
        )

    def fill_constants(self) -> None:
        """Set all buffers, which a model that comes from the meta device has only room for."""
        with torch.no_grad():
            self.mean.copy_(torch.tensor(self.recipe.data.mean)[:, None, None] * 255)
            self.std.copy_(torch.tensor(self.recipe.data.std)[:, None, None] * 255)
            for module in self.modules():
                if isinstance(module, BatchNormNeck):
                    module.running_mean.zero_()
                    module.running_var.fill_(1.0)

    def grid_hw(self, size: Size) -> tuple[int, int]:
        patch = self.recipe.model.backbone.patch_size
        return size[0] // patch, size[1] // patch

    # --- routes ---------------------------------------------------------------------------------------------------

    def routes_of_recipe(self) -> dict[str, dict[str, tuple[str, ...]]]:
        return {name: routes_of(self.recipe, name) for name in self.tasks}

    def share_everything(self) -> None:
        """Let all tasks take the shared path, as they do until they branch."""
        shared = {unit: (SHARED,) * len(layers) for unit, layers in next(iter(self.routes.values())).items()}
        self.set_routes(dict.fromkeys(self.tasks, shared))

    def _learned_places(self) -> dict[str, list[Place]]:
        return {
            name: [(unit, i) for unit in UNITS for i, route in enumerate(routes[unit]) if route == LEARNED]
            for name, routes in self.routes.items()
        }

    @property
    def learns_routes(self) -> bool:
        return any(self._learned_places().values())

    def set_routes(self, routes: Mapping[str, Mapping[str, Sequence[str]]]) -> None:
        """Replace the routes of the given tasks, as freezing and loading do."""
        for name, by_unit in routes.items():
            self.routes[name] = {unit: tuple(by_unit[unit]) for unit in UNITS}
        depth = len(self.blocks)
        for unit, layer, module in [
            ("embed", 0, self.embed),
            ("norm", depth, self.norm),
            *((unit, i, getattr(block, attribute)) for i, block in enumerate(self.blocks)
              for unit, attribute in (("norm", "norm1"), ("norm", "norm2"), ("attn", "attn"), ("ffn", "ffn"))),
        ]:  # fmt: skip
            module.routes.update({name: self.routes[name][unit][layer] for name in routes})

    def decided_routes(self, own_is_likelier: Mapping[str, Sequence[bool]]) -> dict[str, dict[str, tuple[str, ...]]]:
        """Every task's routes with the learned ones decided; ``own_is_likelier[task]`` is in the router's order."""
        decided = {}
        for name, places in self._learned_places().items():
            routes = {unit: list(layers) for unit, layers in self.routes[name].items()}
            if places:
                rows = dict(zip(self.router.places[name], own_is_likelier[name], strict=True))
                for unit, layer in places:
                    routes[unit][layer] = OWN if rows[unit, layer] else SHARED
            decided[name] = {unit: tuple(layers) for unit, layers in routes.items()}
        return decided

    def spec(self, task: str) -> SubnetSpec:
        """The dense path of a task; learned routes must have been decided.

        Raises:
            UserError: the model has no such task.
        """
        if task not in self.tasks:
            raise UserError(f"no task {task!r} in this model; it has {', '.join(self.tasks)}")
        assert not any(LEARNED in layers for layers in self.routes[task].values())
        whole = SubnetSpec(task, self.routes[task], Architecture.of(self.recipe.model.backbone))
        return whole.sliced(self.architectures[task]) if task in self.architectures else whole

    # --- forward --------------------------------------------------------------------------------------------------

    def forward(self, batch: Batch) -> Tensor | dict[str, Outputs]:
        """In training the losses ``[tasks, len(LOSSES)]``, each the sum over this process's samples / the task's
        global count; in evaluation the outputs of every task's head."""
        routed_R3 = None
        if self.learns_routes:
            routed_R3 = self.router(batch.step if self.training else None)
        subnets = self.subnets(batch.step) if self.training else [self.architectures]
        segments = [
            segment for i, architectures in enumerate(subnets) for name, task in batch.tasks.items()
            for segment in self._cut(name, task, batch.step, i, architectures.get(name))
        ]  # fmt: skip
        drop_path = self._drop_path(batch, len(subnets)) if self.training and self.recipe.model.drop_path else None
        images = {name: task.images for name, task in batch.tasks.items()}
        features = self.backbone(images, segments, batch.step, routed_R3, drop_path)
        pooled_BD, rows = _task_by_task(features.pooled_BD, [segment.per_image() for segment in join(segments)])
        if not self.training:
            return self.heads(pooled_BD, rows)
        return self.heads(
            pooled_BD,
            rows,
            {name: task.labels for name, task in batch.tasks.items()},
            {name: task.global_count for name, task in batch.tasks.items()},
            (batch.step, batch.micro_step),
            {
                name: (task.mix_labels, task.mix_weight)
                for name, task in batch.tasks.items()
                if task.mix_labels is not None and task.mix_weight is not None
            },
        )

    def subnets(self, step: int) -> list[dict[str, Architecture]]:
        """See :func:`subnets_of_step`."""
        return subnets_of_step(self.recipe.model, self.tasks, self.recipe.seed, step)

    def segment(self, task: str, images: Tensor) -> Segment:
        """Of all images ``[B, 3, H, W]`` of a task, on its path."""
        grid, prefix = self.grid_hw((images.shape[2], images.shape[3])), self.recipe.model.backbone.prefix
        return Segment(task, len(images), prefix + grid[0] * grid[1], grid, prefix, span=range(len(images)))

    def _cut(
        self, name: str, task: TaskBatch, step: int, subnet: int = 0, architecture: Architecture | None = None
    ) -> list[Segment]:
        """Segments of a task's samples; in training those that take the shared path and those that are probed apart."""
        everything = range(task.global_count)
        whole = dataclasses.replace(
            self.segment(name, task.images), span=everything, subnet=subnet, architecture=architecture
        )
        model = self.recipe.model
        if not self.training or not model.experts:
            return [whole]
        shared = math.ceil(round(model.shared_samples * task.global_count, 6))  # 0.07 * 100 is 7.000000000000001
        spans: list[tuple[Part, range]] = [("shared", range(shared))]
        rest = everything[shared:]
        if any(LEARNED in layers for layers in self.routes[name].values()):
            blocks, block = self.router.blocks, self.router.probed_block(step, name)
            probed = rest[len(rest) * block // blocks : len(rest) * (block + 1) // blocks]
            spans += [
                ("plain", range(rest.start, probed.start)), ("probe", probed), ("plain", range(probed.stop, rest.stop))
            ]  # fmt: skip
        else:
            spans += [("plain", rest)]
        return [
            dataclasses.replace(whole, images=len(overlap(task.positions, span)), part=part, span=span)
            for part, span in spans
            if span
        ] or [whole]

    def backbone(
        self,
        images: Mapping[str, Tensor],
        segments: Sequence[Segment] | None = None,
        step: int | None = None,
        routed_R3: Tensor | None = None,
        drop_path_B: Tensor | None = None,
    ) -> Features:
        """Features of uint8 images ``[B, 3, H, W]`` of each task, as wide as the widest subnet.

        Args:
            segments: their parts, for each of several subnets the parts of all; default: one segment a task, on the
                task's path.
            step: of training, where routes are learned.
            routed_R3: the router's output there.
            drop_path_B: ``[B, depth, 2]`` factors of the residual branches.
        """
        if segments is None:
            segments = [self.segment(name, image) for name, image in images.items()]
        choices: Choices = {}
        if routed_R3 is not None:
            choices = self.router.choices(routed_R3, step if self.training else None)
        patches = [self._patches(image) for image in images.values()]
        if not patches:  # a process without any task takes part in every call all the same
            patches.append(self._patches(torch.empty(0, 3, *self.recipe.tasks[0].input)))
        patches *= 1 + max((segment.subnet for segment in segments), default=0)
        x_ND = self.embed(torch.cat(patches), segments, choices.get(("embed", 0)))
        dim = x_ND.shape[1]
        widths = [dim if segment.architecture is None else segment.architecture.dim for segment in segments]
        x_ND = narrow(x_ND, max(widths, default=dim))
        drop_path_N = None
        if drop_path_B is not None:
            by_segment = drop_path_B.split([s.images for s in segments])
            drop_path_N = concatenate(
                [d.repeat_interleave(s.tokens, dim=0) for d, s in zip(by_segment, segments, strict=True)], drop_path_B
            )
        again = self.recipe.model.recomputed_blocks if self.training else ()
        for i, block in enumerate(self.blocks):
            arguments = x_ND, segments, choices, None if drop_path_N is None else drop_path_N[:, i]
            x_ND = recomputed(block, *arguments) if i in again else block(*arguments)
        x_ND = self.norm(x_ND, segments, choices.get(("norm", len(self.blocks))))
        pooled_BD = self._pool(x_ND, segments)
        if routed_R3 is not None:
            pooled_BD = pooled_BD + 0.0 * routed_R3.sum()  # a process without samples of a task still has its gradient
        return Features(list(segments), x_ND, pooled_BD)

    def _pool(self, x_ND: Tensor, segments: Sequence[Segment]) -> Tensor:
        if self.recipe.model.backbone.pool == "cls":
            pieces = [x[:: s.tokens] for x, s in zip(split(x_ND, segments), segments, strict=True)]
        else:
            runs = join(segments)
            pieces = [
                x.unflatten(0, (s.images, s.tokens)).mean(1) for x, s in zip(split(x_ND, runs), runs, strict=True)
            ]
        return concatenate(pieces, x_ND)

    def _patches(self, images: Tensor) -> Tensor:
        pixels = (images.to(self.mean.device).float() - self.mean) / self.std  # parameters may be on a disk
        backbone = self.recipe.model.backbone
        return patchify(pixels, backbone.patch_size, backbone.prefix).to(next(self.parameters()).dtype)

    def _drop_path(self, batch: Batch, subnets: int = 1) -> Tensor:
        """Factors ``[subnets * B, depth, 2]`` of the residual branches: 0 or 1 / keep (Huang et al., 2016); only the
        first subnet, in the sandwich the largest, needs to be regularised (Yu et al., 2020).

        Drawn for the task's whole micro-batch by (seed, step, task), so that a sample's draw does not depend on the
        process that holds it.
        """
        depth = len(self.blocks)
        keep_L1 = 1.0 - self.recipe.model.drop_path * torch.arange(depth)[:, None] / max(depth - 1, 1)
        factors = []
        for name, task in batch.tasks.items():
            generator = torch_generator(self.recipe.seed, "drop_path", batch.step, batch.micro_step, name)
            draws = torch.rand(task.global_count, depth, 2, generator=generator)
            factors.append(((draws < keep_L1) / keep_L1)[task.positions.start : task.positions.stop])
        drawn = concatenate(factors, like=torch.empty(0, depth, 2))
        drawn = torch.cat([drawn, torch.ones((subnets - 1) * len(drawn), depth, 2)])
        return drawn.to(next(self.parameters()).device, non_blocking=True)


def _task_by_task(x_ND: Tensor, segments: Sequence[Segment]) -> tuple[Tensor, list[Segment]]:
    """Rows and segments with those of a task together, in the order of its subnets."""
    if not any(segment.subnet for segment in segments):
        return x_ND, list(segments)
    tasks = list(dict.fromkeys(segment.task for segment in segments))
    order = sorted(range(len(segments)), key=lambda i: tasks.index(segments[i].task))
    rows = split(x_ND, segments)
    return concatenate([rows[i] for i in order], x_ND), [segments[i] for i in order]


def init_weights(model: Supernet, device: torch.device | str = "cpu", pretrained: Pretrained | None = None) -> None:
    """Give every parameter its initial value, the same wherever and whenever it is built.

    Args:
        model: on the meta device.
        pretrained: the values to start from where there are some.
    """
    model.to_empty(device=device)
    model.fill_constants()
    parts, values = classifiers.parts(model), start_values(model.recipe, pretrained)
    for name, parameter in model.named_parameters():
        whole = classifiers.Part(parameter.shape, range(len(parameter)))
        fill(parameter.detach().view(-1), 0, name, parts.get(name, whole), values)
