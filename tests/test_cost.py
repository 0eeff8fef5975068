"""Parameters and FLOPs by formula, against the modules built on the meta device and torch's own count."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ufo_ds import recipe_file
from ufo_ds.model.architecture import Architecture
from ufo_ds.model.cost import head_cost, path_cost, supernet_parameters
from ufo_ds.model.dense import network
from ufo_ds.model.supernet import Supernet


@pytest.mark.parametrize("name", ["demo", "open_small", "allinone_vit_l", "ufo2_17b"])
def test_as_built(name, monkeypatch):
    """Of the shipped recipes the dense model of every input size, all copies and all heads."""
    monkeypatch.setenv("OPEN_SMALL", "nowhere")
    recipe = recipe_file.load(name)
    backbone = recipe.model.backbone
    for task in {task.input: task for task in recipe.tasks}.values():
        with torch.device("meta"):
            path = network(recipe, task.name, Architecture.of(backbone))
            path.pooler = None
            image = torch.empty(1, 3, *task.input)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            path(image)
        cost = path_cost(backbone, task.input)
        assert cost.parameters == sum(parameter.numel() for parameter in path.parameters())
        assert cost.flops == counter.get_total_flops()
    with torch.device("meta"):
        supernet = Supernet(recipe, {task.name: 7 for task in recipe.tasks})
    parts = {name: p.numel() for name, p in supernet.named_parameters()}
    of_copies = sum(count for name, count in parts.items() if name.split(".")[0] not in ("heads", "router"))
    assert supernet_parameters(recipe) == of_copies
    for task in recipe.tasks:
        head = sum(count for name, count in parts.items() if name.startswith(f"heads.{task.name}."))
        assert head_cost(task, backbone.dim, 7).parameters == head
        assert head_cost(task, backbone.dim, 7).flops == 2 * 7 * backbone.dim
