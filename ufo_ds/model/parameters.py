"""What a parameter's name says of it, and what follows for its updates."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ufo_ds.errors import UserError
from ufo_ds.model.experts import LEARNED, OWN, SHARED
from ufo_ds.recipe import Recipe, Rule

Routes = Mapping[str, Mapping[str, Sequence[str]]]  # [task][unit][layer]


@dataclass(frozen=True)
class Address:
    """Where a parameter lives: ``unit`` is one of embed, norm, attn, ffn, head, neck, router; ``owner`` the task whose
    own it is, None for the shared copies."""

    unit: str
    layer: int  # index into the unit's routes
    owner: str | None
    bias: bool


def address_of(name: str) -> Address:
    """``blocks.7.ffn.own.person.fc1.bias`` -> ffn, 7, person, True."""
    parts = name.split(".")
    bias = parts[-1] == "bias"
    if parts[0] == "heads":
        return Address("neck" if parts[2] == "neck" else "head", 0, parts[1], bias)
    if parts[0] == "router":
        return Address("router", 0, parts[2], bias)
    layer, rest = (int(parts[1]), parts[2:]) if parts[0] == "blocks" else (-1, parts)
    unit = "norm" if rest[0].startswith("norm") else rest[0]
    return Address(unit, layer, rest[2] if rest[1] == "own" else None, bias)


@dataclass(frozen=True)
class UpdateRule:
    """How an optimizer treats a parameter; ``adapted``: with a rate of its own in the layer-wise optimizers."""

    lr_scale: float
    weight_decay: float
    adapted: bool


def update_rule(name: str, recipe: Recipe) -> UpdateRule:
    """The rule that a recipe gives a parameter.

    Weight decay and layer-wise rates are for matrices; norms, necks, biases, tokens, position embeddings and the
    router have neither, unless a rule of the recipe gives them a weight decay.
    """
    optimizer, address = recipe.optimizer, address_of(name)
    matrix = name.endswith(".weight") and address.unit not in ("norm", "neck", "router") and ".norm." not in name
    decay = optimizer.weight_decay if matrix else 0.0
    scale = 1.0
    if address.unit != "router":
        scale = next((task.lr_scale for task in recipe.tasks if task.name == address.owner), 1.0)
    for rule in optimizer.rules:
        if _matches(rule, address):
            scale *= rule.lr_scale
            decay = decay if rule.weight_decay is None else rule.weight_decay
    return UpdateRule(scale, decay, matrix)


def unused(names: Iterable[str], routes: Routes, shared_samples: float = 0.0) -> set[str]:
    """Those of the named parameters that no path goes through: own copies of tasks routed to the shared one, shared
    copies that no task takes, logits of routes that are decided, and whatever belongs to a task without routes.

    Args:
        routes: of all tasks, per unit and layer: shared, own or learned.
        shared_samples: share of the samples that take the shared copies whatever their task's routes are.
    """

    def is_used(address: Address) -> bool:
        if address.owner is None:
            tasks = [of_task[address.unit][address.layer] for of_task in routes.values()]
            return shared_samples > 0 or any(route != OWN for route in tasks)
        if address.owner not in routes:
            return False
        of_task = routes[address.owner]
        if address.unit == "router":
            return any(LEARNED in layers for layers in of_task.values())
        return address.unit in ("head", "neck") or of_task[address.unit][address.layer] != SHARED

    return {name for name in names if not is_used(address_of(name))}


def without_effect(name: str, shape: Sequence[int]) -> range:
    """The elements of a flattened parameter on which no output depends: a bias of the keys adds the same to all logits
    of a query, and softmax takes it away. Its gradient is rounding noise, which Adam would turn into steps as large as
    any, another way on every topology; so it stays as it is."""
    if not name.endswith(".qkv.bias"):
        return range(0)  # a slice then ends before it, or begins behind it
    return range(shape[0] // 3, shape[0] // 3 * 2)


def used_together(names: Iterable[str], routes: Routes, shared_samples: float = 0.0) -> set[str]:
    """Those of the named parameters of shared copies that the paths of several tasks go through, or may go through.
    Arguments as of :func:`unused`."""

    def users(address: Address) -> int:
        return sum(shared_samples > 0 or of_task[address.unit][address.layer] != OWN for of_task in routes.values())

    addresses = {name: address_of(name) for name in names}
    return {name for name, address in addresses.items() if address.owner is None and users(address) > 1}


def check_rules(recipe: Recipe, names: Iterable[str]) -> None:
    """
    Raises:
        UserError: a rule of the recipe that no parameter of the model (``names``) matches.
    """
    addresses = {address_of(name) for name in names}
    for i, rule in enumerate(recipe.optimizer.rules):
        if not any(_matches(rule, address) for address in addresses):
            given = {key: getattr(rule, key) for key in ("task", "unit", "bias") if getattr(rule, key) is not None}
            raise UserError(
                f"optimizer.rules.{i}: no parameter of this model matches {given}: remove the rule or correct it"
            )


def _matches(rule: Rule, address: Address) -> bool:
    return (
        (rule.task is None or address.owner in rule.task)
        and (rule.unit is None or rule.unit == address.unit)
        and (rule.bias is None or rule.bias == address.bias)
    )
