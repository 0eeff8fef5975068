"""Put the heads and channels of a trained supernet in another order, its most important ones first.

Every whole path computes the same function before and after: the order of what is summed over does not matter. Leading
slices, which subnets are, then keep what matters most. Once-for-All (Cai et al., 2020) sorts channels before it trains
elastic widths; HydraViT (Haberer et al., 2024) trains for such an order of heads, with their channels; Minitron
(Muralidharan et al., 2024) ranks heads, hidden channels and the residual stream's before it cuts them.

What can only be permuted together is a **group**, named by where it lives:

========================  ==============================================================================================
``dim``                   channels of the residual stream: one order for all tasks, copies and layers
``blocks.3.ffn.shared``   hidden channels of one copy of an FFN; those of a task's own are ``blocks.3.ffn.own.person``
``blocks.3.attn.shared``  heads of one copy of an attention; the channels inside a head keep their order
``embed.shared.stem.1``   channels of layer 1 of a stem, and of the residual layers behind it, whose sums tie them to it
========================  ==============================================================================================
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from ufo_ds.checkpoint import Index, Parameter, Reader, average_of, checksum, write_tensors
from ufo_ds.model.elastic import groups_of
from ufo_ds.model.parameters import address_of
from ufo_ds.recipe_model import Backbone

DIM = "dim"


class Axis(NamedTuple):
    """An axis of a parameter, viewed so that every group has an axis of its own; size -1: whatever is left."""

    size: int
    group: str | None = None


def axes_of(name: str, backbone: Backbone) -> list[Axis]:
    """The view of a parameter or buffer of a supernet in which its groups are permuted.

    Raises:
        ValueError: no supernet has one of this name.
    """
    address = address_of(name)
    dim, rest = Axis(backbone.dim, DIM), Axis(-1)
    if address.unit in ("norm", "neck"):
        return [dim]
    if address.unit == "router":
        return [rest]
    if address.unit == "head":
        copy, last = name.split(".classifier.")
        known = {"weight": [rest, dim], "bias": [rest]}
    else:
        mark = ".shared" if address.owner is None else f".own.{address.owner}"
        before, _, last = name.partition(f"{mark}.")
        copy = before + mark
        if address.unit == "ffn":
            hidden = Axis(backbone.hidden_L[address.layer], copy)
            known = {
                "fc1.weight": [hidden, dim],
                "fc1.bias": [hidden],
                "fc2.weight": [dim, hidden],
                "fc2.bias": [dim],
            }
        elif address.unit == "attn":
            heads, width = Axis(backbone.heads_L[address.layer], copy), Axis(backbone.head_width)
            known = {
                "qkv.weight": [Axis(3), heads, width, dim],
                "qkv.bias": [Axis(3), heads, width],
                "proj.weight": [dim, heads, width],
                "proj.bias": [dim],
            }
        else:
            layers = [Axis(3), *(Axis(c, f"{copy}.{stage}") for c, stage in _stages(backbone))]
            known = {"cls": [rest, dim], "position": [rest, dim]}
            known |= {"patch.weight": [dim, layers[-1], rest], "patch.bias": [dim]}
            for i, layer in enumerate(layers[1:]):
                known[f"stem.{i}.conv.weight"] = [layer, layers[i], rest]
                known |= {f"stem.{i}.norm.{kind}": [layer] for kind in ("weight", "bias")}
    if last not in known:
        raise ValueError(f"{name}: which of its axes belong to which groups is not known")
    return known[last]


def stem_group(copy: str, layer: int, backbone: Backbone) -> str:
    """The group of the channels of a stem's layer; ``copy``: of the embedding, such as ``embed.shared``."""
    return f"{copy}.{_stages(backbone)[layer][1]}"


def _stages(backbone: Backbone) -> list[tuple[int, str]]:
    """Of every layer of a stem: its channels, and the first layer of the residual sums it takes part in."""
    found: list[tuple[int, str]] = []
    for i, channels in enumerate(backbone.stem):
        residual = i > 0 and channels == backbone.stem[i - 1]
        found.append(found[-1] if residual else (channels, f"stem.{i}"))
    return found


def by_importance(scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The order of every group from its most to its least important member; equals stay in the order they have.

    Each group of a stem's group norm is normalised by itself and stays whole: they are sorted by their sums, and the
    channels inside each.
    """
    orders = {}
    for group, scores_G in scores.items():
        parts = groups_of(len(scores_G)) if ".stem." in group else 1
        scores_PC = scores_G.view(parts, -1)
        channels_PC = scores_PC.argsort(dim=1, descending=True, stable=True)
        parts_P = scores_PC.sum(1).argsort(descending=True, stable=True)
        orders[group] = (parts_P[:, None] * scores_PC.shape[1] + channels_PC[parts_P]).flatten()
    return orders


def permuted(name: str, tensor: Tensor, orders: Mapping[str, Tensor], backbone: Backbone) -> Tensor:
    """A parameter or buffer with its groups in new orders: ``orders[group][i]`` is the place of what becomes the i-th.
    A group without an order stays as it is."""
    axes = axes_of(name, backbone)
    view = tensor.reshape([axis.size for axis in axes])
    for i, axis in enumerate(axes):
        if axis.group is not None and axis.group in orders:
            view = view.index_select(i, orders[axis.group])
    return view.reshape(tensor.shape)


def rewrite(
    reader: Reader, orders: Mapping[str, Tensor], directory: Path, written: Callable[[], None] = lambda: None
) -> Index:
    """Write a checkpoint's tensors in new orders into one file of ``directory``; returns the index to publish with it.
    No more than one tensor is in memory at a time.

    A parameter with a moving average becomes that average, which is how the model is meant to be used. States of the
    optimizer are left out; everything else that the index says stays true.

    Args:
        written: called for every tensor, when its checksum is known and when it is written.

    Raises:
        Damaged: a tensor is not as it was written.
        OSError: no room.
    """
    backbone, old = reader.recipe.model.backbone, reader.index
    buffers = dict.fromkeys(plain_buffers(reader), 0)
    shapes: dict[str, Sequence[int]] = {}
    parameters = {}
    for name, parameter in old.parameters.items():
        size = math.prod(parameter.shape)
        shapes[f"{name}|weight"] = [size]
        parameters[name] = Parameter(parameter.shape, ["weight"], [(0, 0, size)])
    shapes |= {name: reader.buffer(name).shape for name in buffers}

    def tensors() -> Iterator[Tensor]:
        for name in parameters:
            yield permuted(name, reader.parameter(name), orders, backbone).flatten()
            written()
        for name in buffers:
            yield permuted(name, reader.buffer(name), orders, backbone)
            written()

    checksums = dict(zip(shapes, map(checksum, tensors()), strict=True))
    entry = write_tensors(directory / "rank-00000.safetensors", shapes, tensors(), checksums)
    return replace(old, parameters=parameters, buffers=buffers, files=[entry])


def plain_buffers(reader: Reader) -> list[str]:
    """Names of a checkpoint's buffers, those of their averages left out."""
    averages = {average_of(name) for name in reader.index.buffers}
    return [name for name in reader.index.buffers if name not in averages]
