"""This rank's part of a model, made without the rest: under ZeRO-3 no rank ever holds more than its own part and one
parameter.

Private names of DeepSpeed 0.19.8 (``runtime/zero/partition_parameters.py``) are used here: its own way to a partitioned
parameter draws all of it on every rank and sends rank 0's values to the others.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from deepspeed import zero
from torch import nn

from ufo_ds.model import classifiers
from ufo_ds.model.initialization import Pretrained, fill, start_values
from ufo_ds.model.parameters import check_rules
from ufo_ds.model.supernet import Supernet, init_weights
from ufo_ds.parallel.experts import expert_sizes, mark_expert, parallelize
from ufo_ds.parallel.placement import Placement
from ufo_ds.recipe import Recipe


def outline(
    recipe: Recipe,
    num_classes: Mapping[str, int],
    placement: Placement,
    rank: int,
    samples: dict[str, int],
    exchange: str,
) -> Supernet:
    """The modules of a rank, on the meta device. Arguments as of :func:`parallelize`."""
    with torch.device("meta"):
        model = Supernet(recipe, num_classes)
    check_rules(recipe, [name for name, _ in model.named_parameters()])
    return parallelize(model, placement, rank, samples, exchange)


def materialize(model: Supernet, deepspeed_config: dict[str, Any], pretrained: Pretrained | None = None) -> None:
    """Give the parameters of an :func:`outline` their initial values, and the marks by which DeepSpeed knows experts.

    Under ZeRO-3 parameters come out partitioned, in the precision of training and where it keeps them; otherwise whole,
    in fp32, on the CPU.

    Args:
        deepspeed_config: what ``deepspeed.initialize`` will get.
    """
    sizes = expert_sizes(model, dist.get_world_size())
    if deepspeed_config["zero_optimization"]["stage"] == 3:
        _partition(model, sizes, deepspeed_config, pretrained)
    else:
        init_weights(model, pretrained=pretrained)
        for name, parameter in model.named_parameters():
            mark_expert(parameter, sizes.get(name))


def _partition(
    model: Supernet, sizes: Mapping[str, int], deepspeed_config: dict[str, Any], pretrained: Pretrained | None
) -> None:
    maker = zero.Init(config_dict_or_path=deepspeed_config)
    if maker.mem_efficient_linear:
        maker._enable_mem_efficient_linear()  # as it does for a model that it partitions itself
    device = maker.local_device
    parts, values = classifiers.parts(model), start_values(model.recipe, pretrained)
    # One parameter after the other takes it. Of it no more than this rank's parts are written to.
    room = torch.empty(max(p.numel() for p in model.parameters()), dtype=maker.dtype, device=device)
    for prefix, module in model.named_modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype, device=device))
        for name, on_meta in list(module.named_parameters(recurse=False)):
            parameter: Any = nn.Parameter(room[: on_meta.numel()].view(on_meta.shape))
            full_name = f"{prefix}.{name}"
            mark_expert(parameter, sizes.get(full_name))
            maker._convert_to_deepspeed_param(parameter)
            length = -(-parameter.ds_numel // parameter.ds_zero_partition_world_size)
            start = parameter.ds_zero_partition_rank * length
            whole = classifiers.Part(on_meta.shape, range(len(on_meta)))
            mine = parameter.detach().view(-1)[start : start + length]
            fill(mine, start, full_name, parts.get(full_name, whole), values)
            parameter.partition()
            setattr(module, name, parameter)
    model.fill_constants()
