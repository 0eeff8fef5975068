"""Where DeepSpeed keeps what belongs to a parameter: this rank's flat slice of its fp32 value and optimizer state.

Private names of DeepSpeed 0.19.8 (``runtime/zero/stage3.py``, ``stage_1_and_2.py``) are used here and nowhere else.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from deepspeed.runtime.utils import combine_grad_norm_groups
from deepspeed.utils import groups
from torch import Tensor

from ufo_ds.model import classifiers

if TYPE_CHECKING:
    from ufo_ds.parallel.engine import Engine


@dataclass
class Slice:
    """Elements ``start .. start + length`` of the flattened parameter ``name``; ``length`` may be 0.

    They lie at ``offset`` in ``flat``, the fp32 partition that the optimizer steps, and in every tensor of its state
    that has the same size. The ranks of ``group`` hold the rest of the parameter.
    """

    name: str
    shape: tuple[int, ...]
    flat: Tensor
    offset: int
    start: int
    length: int
    group: dist.ProcessGroup

    def of(self, tensor: Tensor) -> Tensor:
        return tensor.detach().narrow(0, self.offset, self.length)


def parameter_slices(engine: "Engine") -> Iterator[Slice]:
    """This rank's slice of every parameter, empty slots included."""
    parts = classifiers.parts(engine.model)
    holders = groups._get_expert_data_parallel_group(f"ep_size_{engine.placement.ep_size}")
    for piece in _slices(engine):
        if (part := parts.get(piece.name)) is not None:  # rows of a head's parameter, then padding
            row = part.shape[1:].numel()
            start, size = part.rows.start * row, len(part.rows) * row
            length = max(0, min(piece.length, size - piece.start))
            piece = replace(piece, shape=tuple(part.shape), start=start + piece.start, length=length, group=holders)
        yield piece


def _slices(engine: "Engine") -> Iterator[Slice]:
    """The same, but a part of a parameter is counted from its own first row on, padding included."""
    optimizer = engine.deepspeed.optimizer
    parameter: Any  # with DeepSpeed's attributes
    if engine.config.stage == 3:
        for name, parameter in engine.model.named_parameters():
            group, offset, length = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start = dist.get_rank(parameter.ds_process_group) * length
            real = max(0, min(length, parameter.ds_numel - start))  # padding sits behind the end
            flat = optimizer.fp32_partitioned_groups_flat[group]
            yield Slice(name, tuple(parameter.ds_shape), flat, offset, start, real, parameter.ds_process_group)
        return
    group_of = {id(p): i for i, params in enumerate(optimizer.bit16_groups) for p in params}
    for name, parameter in engine.model.named_parameters():
        flat = optimizer.single_partition_of_fp32_groups[group_of[id(parameter)]]
        ranks = optimizer.real_dp_process_group[group_of[id(parameter)]]
        mapping = parameter._hp_mapping
        if mapping is None:  # nothing of it on this rank
            yield Slice(name, tuple(parameter.shape), flat, 0, 0, 0, ranks)
        else:
            high, low = mapping.hp_fragment_address, mapping.lp_fragment_address
            yield Slice(name, tuple(parameter.shape), flat, high.start, low.start, high.numel, ranks)


def optimizer_state(engine: "Engine", flat: Tensor) -> dict[str, Any]:
    """The optimizer's state of a partition: tensors as large as that, and numbers."""
    return engine.optimizer.state[flat]


def refresh_low_precision(engine: "Engine") -> None:
    """Make the parameters that the forward pass sees follow the fp32 partitions, after those were overwritten."""
    optimizer = engine.deepspeed.optimizer
    if engine.config.stage == 3:
        # A forward pass may leave parameters gathered for the next one, which would then not see the new values.
        optimizer.empty_partition_cache()
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        if persistent := optimizer.persistent_parameters:
            persistent[0].all_gather(persistent)
    else:
        optimizer.update_lp_params()


def weigh_gradient_norm(engine: "Engine", weight: Callable[[Tensor], Tensor]) -> None:
    """From now on the norm by which DeepSpeed clips, and leaves out a step where it is not finite, is multiplied by
    ``weight`` of the global norm."""
    optimizer = engine.deepspeed.optimizer
    if engine.config.stage == 3:
        of_groups = optimizer._get_norm_groups

        def weighted() -> list[Tensor]:
            norms = of_groups()
            factor = weight(combine_grad_norm_groups(norms))
            return [norm * factor for norm in norms]

        optimizer._get_norm_groups = weighted
    else:
        of_all = optimizer.scaled_global_norm

        def weighted_global(norm_type: int = 2) -> Tensor:
            norm = of_all(norm_type)
            return norm * weight(norm)

        optimizer.scaled_global_norm = weighted_global


def make_state(engine: "Engine", flat: Tensor, key: str) -> Tensor:
    """A zero state tensor as large as the partition, where there is none yet."""
    state = optimizer_state(engine, flat)
    if state.get(key) is None:
        state[key] = torch.zeros_like(flat, requires_grad=False)
    return state[key]
