"""A recipe's file: one YAML, read, checked, and printed back as it was resolved.

``load("demo")`` reads a shipped recipe, ``load("my.yaml")`` a file; ``overrides`` are ``("optimizer.lr", "1e-3")``
pairs from a command line, where a task is addressed by its name: ``tasks.glyphs.samples_per_step``.
"""

import contextlib
import dataclasses
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from ufo_ds.errors import UserError
from ufo_ds.recipe import Recipe

RECIPES = Path(__file__).parent / "recipes"


def load(name_or_file: str, overrides: Sequence[tuple[str, str]] = ()) -> Recipe:
    """Read and check a recipe.

    Raises:
        UserError: no such recipe, not YAML, an unknown key, a value of the wrong kind; the message names all three:
            value, place, remedy.
    """
    path = Path(name_or_file)
    if not path.suffix:
        path = RECIPES / f"{name_or_file}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in RECIPES.glob("*.yaml")))
        raise UserError(f"no recipe {name_or_file!r}: give a YAML file or one of {known}")
    try:
        values = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} is not a recipe: expected a mapping, found {type(values).__name__}")
    for key, text in overrides:
        _override(values, key, text)
    return parse(values, str(path))


def overrides_of(words: Sequence[str]) -> list[tuple[str, str]]:
    """What is left of a command line, as overrides: ``--section.key VALUE``, ``--section.key=VALUE``, ``--seed 1``.

    Raises:
        UserError: a word that is no key of a recipe, or one without its value.
    """
    overrides = []
    plain = [f"--{field.name}" for field in dataclasses.fields(Recipe)]  # --seed
    rest = list(words)
    while rest:
        key, *rest = rest
        if not key.startswith("--") or ("." not in key and key.split("=")[0] not in plain):
            raise UserError(f"unknown argument {key!r}: recipe values are set as --section.key VALUE; see --help")
        if "=" in key:
            key, value = key.split("=", 1)
        elif rest:
            value, *rest = rest
        else:
            raise UserError(f"{key} needs a value")
        overrides.append((key[2:], value))
    return overrides


def parse(values: dict[str, Any], source: str) -> Recipe:
    """Check plain values (of a YAML file, of a checkpoint's index) and make them a :class:`Recipe`."""
    try:
        return TypeAdapter(Recipe).validate_python(_expand(values, source))
    except ValidationError as error:
        raise UserError(f"{source}: {_first(error, values)}") from None


def dump(recipe: Recipe) -> dict[str, Any]:
    """The resolved recipe as plain values: ``parse(dump(r), ...) == r``."""
    return TypeAdapter(Recipe).dump_python(recipe, mode="json")


def to_yaml(recipe: Recipe) -> str:
    return yaml.safe_dump(dump(recipe), sort_keys=False, width=120)


def _expand(node: Any, source: str) -> Any:
    """Replace ``${NAME}`` in strings by environment variables."""
    if isinstance(node, dict):
        return {key: _expand(value, source) for key, value in node.items()}
    if isinstance(node, list):
        return [_expand(value, source) for value in node]
    if isinstance(node, str):
        for name in re.findall(r"\$\{(\w+)\}", node):
            if name not in os.environ:
                raise UserError(f"{source}: {node!r} needs the environment variable {name}: set it to a directory")
        return os.path.expandvars(node)
    return node


def _override(values: dict[str, Any], key: str, text: str) -> None:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"--{key} {text!r} is not a value: quote it as YAML") from None
    if isinstance(value, str):  # YAML 1.1 reads 1e-3 as a string
        with contextlib.suppress(ValueError):
            value = float(value)
    node: Any = values
    *parents, last = key.split(".")
    for part in parents:
        if isinstance(node, list):
            named = [item for item in node if isinstance(item, dict) and item.get("name") == part]
            if not named:
                raise UserError(f"--{key}: no {part!r} there; known: {', '.join(str(i.get('name')) for i in node)}")
            node = named[0]
        else:
            if isinstance(node.get(part), str) and part == "backbone":
                node[part] = {"name": node[part]}
            node = node.setdefault(part, {})
        if not isinstance(node, dict | list):
            raise UserError(f"--{key}: {part!r} is a value, not a section")
    if isinstance(node, list):
        raise UserError(f"--{key}: name an entry first, as in tasks.NAME.{last}")
    node[last] = value


def _first(error: ValidationError, values: Any) -> str:
    """The first fault, as one line with the path of the key; a task is named, not numbered."""
    fault = error.errors()[0]
    path, node = [], values
    for part in fault["loc"]:
        if isinstance(node, list) and isinstance(part, int) and part < len(node):
            node = node[part]
            path.append(str(node.get("name", part)) if isinstance(node, dict) else str(part))
        elif isinstance(node, dict) and part in node:
            node = node[part]
            path.append(str(part))
        elif fault["type"] in ("unexpected_keyword_argument", "missing") and part == fault["loc"][-1]:
            path.append(str(part))
    where = ".".join(path) or "recipe"
    if fault["type"] == "unexpected_keyword_argument":
        return f"unknown key {where} = {fault['input']!r}: remove it or correct its name"
    if fault["type"] == "missing":
        return f"missing key {where}: add it"
    if fault["type"] == "value_error":
        return f"{where}: {fault['ctx']['error']}"
    return f"{where} = {fault['input']!r}: {fault['msg'].lower()}"
