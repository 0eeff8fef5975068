"""A supernet larger than one device: spread over several by accelerate, with what does not fit on the host's disk.

Units are whole: a block, the embedding, the last norm and a task's head are each on one device. Every parameter is read
from the checkpoint straight to its place, so that the whole model is never in one memory.
"""

import shutil
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import dispatch_model, infer_auto_device_map
from accelerate.utils import get_balanced_memory, offload_weight, save_offload_index, set_module_tensor_to_device

from ufo_ds.checkpoint import Reader
from ufo_ds.devices import check_device
from ufo_ds.errors import UserError
from ufo_ds.model.block import Block
from ufo_ds.model.experts import RoutedUnit
from ufo_ds.model.heads import TaskHead
from ufo_ds.model.loading import fill, fill_buffers, values
from ufo_ds.model.supernet import Supernet

WHOLE = [module.__name__ for module in (Block, RoutedUnit, TaskHead)]
Place = int | str | torch.device  # of a device, or "disk"
DISK = "disk"


def spread(
    reader: Reader,
    model: Supernet,
    device_map: str | Mapping[str, Place],
    max_memory: Mapping[int | str, int | str] | None,
    offload_folder: str | Path | None,
) -> Supernet:
    """Give a model of :func:`ufo_ds.model.loading.meta_supernet` its values, each where it belongs.

    Args:
        device_map: "auto", or the place of every module (``embed``, ``blocks.7``, ``norm``, ``heads.person``; "" is
            the rest): a device, or "disk".
        max_memory: of each device for "auto", as accelerate takes it: ``{0: "10GiB", "cpu": "30GiB"}``.
        offload_folder: for what goes to disk; it is gone again when the model is.

    Raises:
        UserError: a module or device is not there, a module has no place, or there is no folder to offload to.
    """
    given = _infer(model, max_memory) if device_map == "auto" else _checked(model, device_map)
    places: dict[str, Place] = {name: _place(name, given) for name in _modules(model)}
    devices = [place for place in places.values() if place != DISK]
    main = next((device for device in devices if device != "cpu"), "cpu")  # images go there
    if set(places.values()) == {main}:
        return fill(reader, model, torch.device(main))
    folder = _folder(places, offload_folder)
    if folder is not None:
        weakref.finalize(model, shutil.rmtree, folder, ignore_errors=True)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty_like(buffer, device="cpu"))
    fill_buffers(reader, model)
    offloaded: dict[str, Any] = {}
    for name, value in values(reader, model):
        place, value = _place(name, places), value.to(model.get_parameter(name).dtype)
        if place == DISK:
            offload_weight(value, name, folder, offloaded)
        else:
            set_module_tensor_to_device(model, name, place, value)
    if folder is not None:
        save_offload_index(offloaded, folder)
    return dispatch_model(model, places, main_device=main, offload_dir=folder)


def _infer(model: Supernet, max_memory: Mapping[int | str, int | str] | None) -> dict[str, Place]:
    try:
        limits = get_balanced_memory(model, None if max_memory is None else dict(max_memory), WHOLE)
        return dict(infer_auto_device_map(model, limits, WHOLE))
    except ValueError as error:
        raise UserError(f"max_memory {max_memory}: {error}") from None


def _checked(model: Supernet, device_map: str | Mapping[str, Place]) -> dict[str, Place]:
    if isinstance(device_map, str):
        raise UserError(f'device_map {device_map!r}: give "auto", or a place for every module')
    names = ["", "blocks", "heads", *_modules(model)]
    for name, place in device_map.items():
        if name not in names:
            raise UserError(f"device_map: {name!r} cannot be placed; these can: {', '.join(filter(None, names))}")
        if place != DISK:
            check_device(place, f"device_map: {name!r}:")
    for name in _modules(model):
        if _place(name, device_map) is None:
            raise UserError(f"device_map has no place for {name!r}: add it, or '' for all the rest")
    return dict(device_map)


def _modules(model: Supernet) -> list[str]:
    """What is placed as a whole."""
    blocks, heads = ([name for name, _ in module.named_children()] for module in (model.blocks, model.heads))
    return ["embed", *(f"blocks.{name}" for name in blocks), "norm", *(f"heads.{name}" for name in heads)]


def _place(name: str, places: Mapping[str, Place]) -> Any:
    """Where a module or parameter goes: to the place of the nearest one above it that has any."""
    parts = name.split(".")
    above = (".".join(parts[:count]) for count in range(len(parts), -1, -1))
    return next((places[module] for module in above if module in places), None)


def _folder(places: Mapping[str, Place], offload_folder: str | Path | None) -> Path | None:
    """A new folder of this model alone: another process may offload the same names."""
    offloaded = [name for name, place in places.items() if place == DISK]
    if not offloaded:
        return None
    if offload_folder is None:
        raise UserError(f"{', '.join(offloaded)} go to disk: give offload_folder, a directory with room for them")
    try:
        Path(offload_folder).mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix="ufo-", dir=offload_folder))
    except OSError as error:
        raise UserError(f"offload_folder {offload_folder}: {error.strerror}: choose another directory") from None
