"""A recipe: *what* is trained, as typed dataclasses; its model is in ``ufo_ds.recipe_model``, its tasks are in
``ufo_ds.recipe_task``.

``ufo_ds.recipe_file`` reads it from YAML and prints it back.
"""

import dataclasses
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from ufo_ds.errors import UserError
from ufo_ds.recipe_model import Model, number_of_routes
from ufo_ds.recipe_task import STRICT, Positive, Share, Task


@dataclass(config=STRICT, kw_only=True, frozen=True)
class Balance:
    """Tasks that learn slowly are sampled more often; see ``ufo_ds.training.balance``. A step then holds none, one or
    several times a task's samples_per_step; the logged loss of a task that it does not hold is 0."""

    every: Positive  # steps of a phase: rates are 1 in the first two, and found anew for each later one
    strength: Annotated[float, Field(ge=0)] = 1.0  # rates go with (mean loss of a phase / of the first) ** strength
    largest: Annotated[float, Field(gt=1, allow_inf_nan=False)] = 2.0  # rates lie between 1 / largest and largest


@dataclass(config=STRICT, kw_only=True, frozen=True)
class ShardCache:
    """Where shards from http(s):// and pipe: are kept once fetched, and what is known of tars without a manifest; one
    directory for all processes of a machine, best on a disk of its own."""

    directory: str | None = None  # default: the environment variable UFO_CACHE, else ~/.cache/ufo_ds
    gib: Annotated[float, Field(gt=0)] = 50.0  # of shards at most; those least recently used make room


@dataclass(config=STRICT, kw_only=True, frozen=True)
class Data:
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)  # of pixel values in 0..1, per channel
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    workers: Annotated[int, Field(ge=0)] = 1  # loader processes per rank
    max_corrupt: Share = 0.001  # share of a task's images that may be unreadable before training stops
    # Keep every training image once decoded and resized: height x width x 3 bytes each, in each loader process.
    cache: bool = False
    shard_cache: ShardCache = dataclasses.field(default_factory=ShardCache)
    # "isomorphic": each step trains one task alone, the tasks in turn; the losses of the others are 0 in that step.
    batches: Literal["heterogeneous", "isomorphic"] = "heterogeneous"
    # Samples of all tasks in a step, where tasks have none of their own: split by their `share`, or by `temperature`.
    samples_per_step: Positive | None = None
    # T: samples go with (images of the task) ** (1 / T): 1 is in proportion, larger is more even.
    temperature: Annotated[float, Field(ge=1, allow_inf_nan=False)] | None = None
    # Without PK sampling: the samples of so many shards, drawn anew each epoch, are mixed before the next ones come.
    # For sets larger than the local cache, which needs room for twice as many to fetch them ahead. Default: all.
    shuffle_shards: Positive | None = None
    # Loader processes start anew with every phase of it, and `cache` with them.
    balance: Balance | None = None

    @model_validator(mode="after")
    def _balance_needs_all_tasks(self) -> "Data":
        if self.balance is not None and self.batches == "isomorphic":
            raise ValueError('balance is for heterogeneous batches, but batches is "isomorphic": remove one of them')
        return self


@dataclass(config=STRICT, kw_only=True, frozen=True)
class Rule:
    """What holds for the parameters that match all selectors given: ``task`` (a name or several: own copies, head and
    router logits), ``unit`` and ``bias``. Several rules may match: their ``lr_scale`` multiply, the last
    ``weight_decay`` counts."""

    task: list[str] | None = None
    unit: Literal["embed", "norm", "attn", "ffn", "head", "neck", "router"] | None = None  # head: the classifier
    bias: bool | None = None
    lr_scale: Annotated[float, Field(ge=0)] = 1.0
    weight_decay: Annotated[float, Field(ge=0)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _one_task(cls, value: Any) -> Any:
        fields = dict(value.kwargs or {}) if hasattr(value, "kwargs") else value
        if isinstance(fields, dict) and isinstance(fields.get("task"), str):
            return {**fields, "task": [fields["task"]]}
        return value


@dataclass(config=STRICT, kw_only=True, frozen=True)
class Optimizer:
    type: Literal["adamw", "sgd", "lars", "lamb"] = "adamw"
    lr: Annotated[float, Field(gt=0)] = 1e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.05  # of matrices; not of biases, norms, tokens, positions, router
    betas: tuple[float, float] = (0.9, 0.999)
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    trust: Annotated[float, Field(gt=0)] = 0.001  # lars: a matrix's rate is trust * its norm / its gradient's norm
    norm_bounds: tuple[Annotated[float, Field(ge=0)], Annotated[float, Field(gt=0)]] = (0.0, 10.0)  # lamb: of its norm
    gradient_clipping: Annotated[float, Field(ge=0)] = 0.0  # global norm; 0 is off
    rules: list[Rule] = dataclasses.field(default_factory=list)
    # Decay of a moving average of all weights, e.g. 0.999: evaluation and extraction then use the average.
    average: Annotated[float, Field(gt=0, lt=1)] | None = None


@dataclass(config=STRICT, kw_only=True, frozen=True)
class Guard:
    """Steps whose loss or gradient is not finite are left out, on all ranks: nothing of the model changes, the schedule
    goes on."""

    # So are those whose loss or gradient norm is more than so many times its median over the last 100 steps.
    spike: Annotated[float, Field(gt=1, allow_inf_nan=False)] | None = None
    patience: Positive = 20  # steps left out in a row after which training stops


@dataclass(config=STRICT, kw_only=True, frozen=True)
class Schedule:
    """Linear warm-up to ``optimizer.lr``, then half a cosine down to ``min_lr``."""

    steps: Positive
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    min_lr: Annotated[float, Field(ge=0)] = 0.0


@dataclass(config=STRICT, kw_only=True, frozen=True)
class Evaluation:
    every: Positive | None = None  # steps; the end of training is always evaluated
    batch_size: Positive = 64  # images of one task, per rank
    best: str | None = None  # the metric by which the best checkpoint is kept, e.g. "digits/digits/top1"


@dataclass(config=STRICT, kw_only=True, frozen=True)
class Checkpoint:
    every: Positive = 1000  # steps
    keep: Positive = 2  # newest ones kept, beside the best
    # Where a run goes on whose newest checkpoint is damaged: stop, with a line that names the newest whole one; or set
    # the damaged one aside, renamed to damaged-step-..., and go on from that.
    damaged: Literal["stop", "set_aside"] = "stop"


@dataclass(config=STRICT, kw_only=True, frozen=True)
class Logging:
    every: Positive = 10  # steps
    # Steps between measurements of every task's gradient on what tasks share: its norm, and its cosine with the sum of
    # the others'. One of them takes as long as the step once more for each task, and once for all; default: none.
    conflict_every: Positive | None = None
    tensorboard: bool = True


@dataclass(config=STRICT, kw_only=True, frozen=True)
class Recipe:
    name: str
    model: Model
    tasks: Annotated[list[Task], Field(min_length=1)]
    schedule: Schedule
    optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)
    guard: Guard = dataclasses.field(default_factory=Guard)
    data: Data = dataclasses.field(default_factory=Data)
    evaluation: Evaluation = dataclasses.field(default_factory=Evaluation)
    checkpoint: Checkpoint = dataclasses.field(default_factory=Checkpoint)
    logging: Logging = dataclasses.field(default_factory=Logging)
    seed: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _consistent(self) -> "Recipe":
        names = [task.name for task in self.tasks]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two tasks are named {name!r}")
        for i, rule in enumerate(self.optimizer.rules):
            for name in rule.task or []:
                if name not in names:
                    raise ValueError(f"optimizer.rules.{i}: no task {name!r}; there are {', '.join(names)}")
        patch = self.model.backbone.patch_size
        for task in self.tasks:
            if task.input[0] < patch or task.input[1] < patch:
                raise ValueError(f"{task.name}: input {task.input} is smaller than one patch of {patch}")
            if self.data.cache and task.augment.random_resized_crop:
                raise ValueError(f"{task.name}: data.cache keeps resized images, random_resized_crop needs the "
                                 "original ones: remove one of them")  # fmt: skip
            for unit, route in {**self.model.routes, **task.routes}.items():
                layers = route if isinstance(route, list) else [route]
                if set(layers) != {"shared"} and unit not in self.model.experts:
                    raise ValueError(f"{task.name}: route of {unit!r} is {route}, but model.experts lacks {unit!r}")
                if isinstance(route, list) and len(route) != number_of_routes(unit, self.model.backbone.depth):
                    raise ValueError(f"{task.name}: {len(route)} routes of {unit!r} for "
                                     f"{number_of_routes(unit, self.model.backbone.depth)} layers")  # fmt: skip
        return self

    @model_validator(mode="after")
    def _counted_in_one_way(self) -> "Recipe":
        total, temperature = self.data.samples_per_step, self.data.temperature
        ways: dict[str, str] = {}  # how samples are counted -> where it says so
        if temperature is not None:
            ways["temperature"] = f"data.temperature {temperature}"
        for task in self.tasks:
            if task.samples_per_step:
                ways["own"] = f"samples_per_step {task.samples_per_step} of {task.name}"
            if task.share is not None:
                ways["share"] = f"share {task.share} of {task.name}"
        if len(ways) > 1:
            raise ValueError(f"{' and '.join(ways.values())} exclude each other: keep one way to count samples")
        for task in self.tasks:
            if temperature is None and not task.samples_per_step and task.share is None:
                missing = "share" if "share" in ways else "samples_per_step"
                raise ValueError(f"{task.name}: {missing} is missing: add it, or set data.temperature for all tasks")
        if total is None and "own" not in ways:
            raise ValueError(f"{', '.join(ways.values())} needs data.samples_per_step, the total of a step: add it")
        if total is not None and "own" in ways:
            raise ValueError(f"data.samples_per_step {total} is a total to be split, but there is {ways['own']}: "
                             "remove one of them")  # fmt: skip
        return self


def only(recipe: Recipe, names: list[str]) -> Recipe:
    """The recipe restricted to some of its tasks, for one task's part of a trained model or a single-task run.

    Raises:
        UserError: a name that is not among its tasks.
    """
    for name in names:
        if name not in [task.name for task in recipe.tasks]:
            raise UserError(f"no task {name!r} in {recipe.name}; it has {', '.join(t.name for t in recipe.tasks)}")
    model = dataclasses.replace(recipe.model, input=recipe.model.input or recipe.tasks[0].input)
    rules = []
    for rule in recipe.optimizer.rules:
        kept = None if rule.task is None else [name for name in rule.task if name in names]
        if kept != []:
            rules.append(dataclasses.replace(rule, task=kept))
    optimizer = dataclasses.replace(recipe.optimizer, rules=rules)
    tasks = [task for task in recipe.tasks if task.name in names]
    return dataclasses.replace(recipe, model=model, optimizer=optimizer, tasks=tasks)
