"""The supernet on several ranks: built, spread by DeepSpeed (expert parallelism + ZeRO), and stepped."""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import groups, safe_get_full_fp32_param, set_z3_leaf_modules
from torch import Tensor

from ufo_ds.data.mixing import Batch, Positions
from ufo_ds.errors import UserError
from ufo_ds.evaluation.features import FeatureFiles, TaskImages, predict
from ufo_ds.model.heads import LOSSES, TaskHead
from ufo_ds.model.initialization import Pretrained
from ufo_ds.model.parameters import unused, update_rule
from ufo_ds.parallel import ranks
from ufo_ds.parallel.averages import BufferAverages, averaged
from ufo_ds.parallel.batches import exchange_samples
from ufo_ds.parallel.config import DistributedConfig, decides_by_size
from ufo_ds.parallel.construction import materialize, outline
from ufo_ds.parallel.guard import Guard
from ufo_ds.parallel.optimizers import OPTIMIZERS
from ufo_ds.parallel.order import OrderedReduction, gather_in_order
from ufo_ds.parallel.placement import place, work_of
from ufo_ds.parallel.rank_model import Calls
from ufo_ds.parallel.shards import parameter_slices
from ufo_ds.parallel.sizes import sizes_of_ranks, smallest_memory
from ufo_ds.recipe import Recipe


class Engine:
    """This rank's part of a run.

    Args:
        recipe: what is trained.
        config: how it is spread.
        num_classes: classes of every task's head.
        pretrained: initial values that replace the drawn ones.
    """

    def __init__(
        self,
        recipe: Recipe,
        config: DistributedConfig,
        num_classes: Mapping[str, int],
        pretrained: Pretrained | None = None,
    ):
        self.recipe = recipe
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.work = work_of(recipe, num_classes, config.accumulation)
        self.placement = place(self.work, self.world_size, config.ep_size)
        self.samples = {task: work.samples for task, work in self.work.items()}
        groups._create_expert_and_data_parallel(self.placement.ep_size, use_data_before_expert_parallel_=True)
        if any(task.head.sharded for task in recipe.tasks):
            groups._create_expert_and_data_parallel(self.world_size)  # a group for each rank alone
        self.model = outline(recipe, num_classes, self.placement, self.rank, self.samples, config.exchange)
        self.sizes_agree, elements = sizes_of_ranks([p.numel() for p in self.model.parameters()])
        self.config = config.sized(self.sizes_agree, elements, smallest_memory())
        materialize(self.model, self.config.deepspeed, pretrained)
        self.optimizer = OPTIMIZERS[recipe.optimizer.type](self._parameter_groups(), recipe.optimizer)
        self.deepspeed = self._initialize()
        slices = list(parameter_slices(self))
        self.optimizer.prepare(slices, {piece.name: update_rule(piece.name, recipe) for piece in slices})
        self._planned: dict[str, dict[str, tuple[str, ...]]] = {}  # the routes that the optimizer's plans are for
        self.buffer_averages = BufferAverages(self)
        self.guard = Guard(self, recipe.guard)
        self.device = self.deepspeed.device
        names = list(self.samples)
        owned = self.placement.tasks_of[self.placement.ep_rank(self.rank)]
        self._weights_T = torch.tensor([task.weight for task in recipe.tasks], device=self.device)
        rows = [names.index(task) for task in owned]
        weights = [recipe.tasks[row].weight for row in rows]
        self._rows = torch.tensor(rows, dtype=torch.int64, device=self.device)
        self.task_weights = torch.tensor(weights + [1.0] * (self.placement.slots - len(owned)), device=self.device)
        self._assert_alike()

    # --- construction ---------------------------------------------------------------------------------------------

    def _initialize(self) -> deepspeed.DeepSpeedEngine:
        # Ranks hold heads of different kinds at the same place. As a leaf a head is gathered whole, and ZeRO-3 sees
        # its number of parameters, the same for all kinds, but not how they are spread inside.
        set_z3_leaf_modules(self.model, [TaskHead])
        engine, *_ = deepspeed.initialize(
            model=self.model, optimizer=self.optimizer, config=dict(self.config.deepspeed)
        )
        if self.config.stage == 3:
            gather_in_order(self.model.parameters())
        # Backwards, but the router is used from the first layer on.
        named, calls = list(self.model.named_parameters())[::-1], Calls(self.model)
        named.sort(key=lambda item: item[0].startswith("router."))
        OrderedReduction(engine.optimizer, [p for _, p in named], [p for name, p in named if calls.of(name)])
        return engine

    def _parameter_groups(self) -> list[dict[str, Any]]:
        """What DeepSpeed tells apart: shared parameters and experts, by the ranks they are partitioned over. How a
        parameter is updated is the optimizer's matter (:func:`ufo_ds.model.parameters.update_rule`)."""
        found: dict[str, list[torch.nn.Parameter]] = {}
        for parameter in self.model.parameters():
            found.setdefault(getattr(parameter, "group_name", "shared"), []).append(parameter)
        return [{"params": found[name], "name": name, "moe": name != "shared"} for name in sorted(found)]

    def _assert_alike(self) -> None:
        """Ranks that differ in what they have collectives over would wait for each other, at some step, for ever.

        Raises:
            UserError: by values of the DeepSpeed JSON they would.
        """
        optimizer = self.deepspeed.optimizer
        sizes = [int(getattr(p, "ds_numel", p.numel())) for p in self.model.parameters()]
        alike, largest = sizes_of_ranks(sizes)
        counts = {
            "modules": len(list(self.model.modules())),
            "parameters": len(sizes),
            "parameter groups": len(optimizer.param_groups),
            "sub-groups": len(optimizer.fp16_groups) if self.config.stage == 3 else 0,
        }
        everyone = ranks.from_all(counts)
        numbers = {key: sorted({of_rank[key] for of_rank in everyone}) for key in counts}
        zero = self.config.deepspeed["zero_optimization"]
        if len(of_all := numbers.pop("sub-groups")) > 1:
            raise UserError(
                f"zero_optimization.sub_group_size {zero['sub_group_size']} of the DeepSpeed JSON: ranks hold "
                f"parameters of different sizes and would have {of_all[0]} to {of_all[-1]} sub-groups, but need "
                f'equally many: use "auto"'
            )
        if any(len(of_all) > 1 for of_all in numbers.values()):
            raise RuntimeError(f"ranks differ in their numbers of modules, parameters or groups: {numbers}")
        if not alike:
            for key in decides_by_size(zero, largest):
                raise UserError(
                    f"zero_optimization.{key} {zero[key]} of the DeepSpeed JSON: it goes by the sizes of parameters, "
                    f'and ranks hold parameters of different sizes: use "auto"'
                )

    # --- steps ----------------------------------------------------------------------------------------------------

    @property
    def reads(self) -> Positions:
        """What this rank's loader reads; only the aligned exchange can do with other numbers than ``samples``."""
        return self.reads_of(self.rank)

    def reads_of(self, rank: int) -> Positions:
        """What the loader of any rank reads."""
        placement = self.placement
        return partial(placement.owned if self.config.exchange == "aligned" else placement.read_evenly, rank)

    def positions(self) -> dict[str, range]:
        """The positions that this rank's loader reads of a micro-batch with the recipe's samples of every task."""
        return self.reads(self.samples)

    def step(self, batches: Iterable[Batch], learning_rate: float, stop: bool = False) -> Tensor:
        """One optimizer step over ``accumulation`` micro-batches; ``guard.left_out`` says whether it was left out.

        Args:
            stop: this rank cannot go on: no rank takes the step, and all learn of it in this way.

        Returns:
            This rank's part of the mean losses ``[tasks, len(LOSSES)]``, tasks in the recipe's order; the parts add
            up over ranks (:meth:`mean_losses`).
        """
        parts_TK = torch.zeros(len(self.samples), len(LOSSES), device=self.device)
        self.guard.begin(stop)
        for batch in batches:
            parts_TK += self.backward(batch) / self.config.accumulation
            self.guard.note((parts_TK.sum(1) * self._weights_T).sum())
            self.update(learning_rate)
        return parts_TK

    def backward(self, batch: Batch) -> Tensor:
        """Gradients of one micro-batch, added to those before; returns this rank's part of its losses."""
        batch = batch.to(self.device)
        if self.config.exchange == "input" and self.placement.ep_size > 1:
            batch = exchange_samples(batch, self.placement, self.rank, self.samples)
        losses_SK = self.deepspeed(batch)  # of every slot
        total = (losses_SK.sum(1) * self.task_weights).sum()
        # ZeRO averages gradients over all ranks, experts' too; the losses are already parts of a global mean.
        self.deepspeed.backward(total * self.world_size)
        parts_TK = torch.zeros(len(self.samples), len(LOSSES), device=self.device)
        return parts_TK.index_copy_(0, self._rows, losses_SK.detach()[: len(self._rows)])

    def update(self, learning_rate: float) -> None:
        """To be called after every micro-batch; the optimizer steps after the last one of a step."""
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = learning_rate
        last = self.deepspeed.is_gradient_accumulation_boundary()
        if last and self._planned != self.model.routes:
            self._planned = dict(self.model.routes)
            names = [name for name, _ in self.model.named_parameters()]
            self.optimizer.leave_out(unused(names, self._planned, self.recipe.model.shared_samples))
        self.deepspeed.step()
        if last:
            if self.guard.end():
                self.buffer_averages.update()
            self.forget_gradients()

    def forget_gradients(self) -> None:
        """To be called after a step: a parameter without a gradient in the next one (of a unit that no route uses)
        would have this one applied again, for ZeRO-3 only ever overwrites the buffer."""
        if self.config.stage == 3:
            self.deepspeed.optimizer.grad_partitions_flat_buffer.zero_()

    def slot_mask(self, task: str) -> Tensor:
        """1 for the task among the slots of this rank, as ``task_weights`` has them, 0 for the others."""
        owned = self.placement.tasks_of[self.placement.ep_rank(self.rank)]
        mask = torch.tensor([float(name == task) for name in owned], device=self.device)
        return torch.nn.functional.pad(mask, (0, self.placement.slots - len(owned)))

    def mean_losses(self, parts_TK: Tensor) -> dict[str, dict[str, float]]:
        """Global mean losses of a step, the same on every rank."""
        elastic = self.recipe.model.elastic
        distilled = elastic is not None and elastic.sampling == "sandwich" and elastic.distillation > 0
        given = {task.name: [*task.loss.given, *(["distillation"] * distilled)] for task in self.recipe.tasks}
        return {
            task.name: {name: v for name, v in zip(LOSSES, row, strict=True) if name in given[task.name]}
            for task, row in zip(self.recipe.tasks, self.sum_over_ranks(parts_TK).tolist(), strict=True)
        }

    @staticmethod
    def sum_over_ranks(parts: Tensor) -> Tensor:
        """The sum of every rank's part, the same on every rank."""
        total = parts.clone()
        dist.all_reduce(total)
        return total

    @property
    def gradient_norm(self) -> float | None:
        """Global norm of the last step's gradient, before clipping."""
        norm = self.deepspeed.get_global_grad_norm()
        return None if norm is None else float(norm)

    # --- evaluation -----------------------------------------------------------------------------------------------

    def predict(self, images: Mapping[str, TaskImages], batch_size: int, workers: int, files: FeatureFiles) -> None:
        """Write what the model, with the averaged weights if there are any, says of all evaluation images. Each rank
        runs its own tasks' images; all make the same number of forward passes."""
        sizes = {name: len(of_task) for name, of_task in images.items()}
        ranges = self.placement.owned(self.rank, {name: sizes.get(name, 0) for name in self.samples})
        per_rank = max((-(-size // self.placement.replicas) for size in sizes.values()), default=0)
        self.deepspeed.eval()
        with averaged(self):
            predict(
                lambda batch: self.deepspeed(batch.to(self.device)),
                images,
                {name: positions for name, positions in ranges.items() if name in images},
                batch_size,
                workers,
                files,
                rounds=-(-per_rank // batch_size),
                quiet=self.rank != 0,
            )
        self.deepspeed.train()

    # --- routes ---------------------------------------------------------------------------------------------------

    def route_probabilities(self) -> dict[str, dict[str, list[float | None]]]:
        """The probability of the own copy, without noise and temperature, by task, unit and layer; None where a route
        is not learned. Every rank calls it."""
        router = self.model.router
        probabilities: dict[str, dict[str, list[float | None]]] = {}
        for task in router.places:
            own_R = safe_get_full_fp32_param(router.logits[task]).softmax(-1)[:, 1].tolist()
            probabilities[task] = {unit: [None] * len(self.model.routes[task][unit]) for unit, _ in router.places[task]}
            for (unit, layer), own in zip(router.places[task], own_R, strict=True):
                probabilities[task][unit][layer] = own
        return probabilities

    def freeze_routes(self) -> dict[str, dict[str, tuple[str, ...]]]:
        """Decide every learned route for its more probable branch, on all ranks alike."""
        own = {}
        for task, parameter in self.model.router.logits.items():
            logits_R2 = safe_get_full_fp32_param(parameter)
            own[task] = (logits_R2[:, 1] > logits_R2[:, 0]).tolist()
        decided = self.model.decided_routes(own)
        self.model.set_routes(decided)
        return decided
