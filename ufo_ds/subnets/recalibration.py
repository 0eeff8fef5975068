"""Statistics of the neck for a path whose features are not those that training took them from.

Mean and variance of a feature change with the depth and widths of a subnet, so they are found anew, from training
images as evaluation sees them (the post-statistics of Yu and Huang, 2019). With them a subnet is complete: what is cut
out, compared with the supernet and evaluated has the same ones.
"""

from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor

from ufo_ds.checkpoint import Reader
from ufo_ds.data.image_files import Images, open_images
from ufo_ds.data.shard_specs import is_here
from ufo_ds.data.shards import ShardSet
from ufo_ds.data.source import open_sets
from ufo_ds.data.spaced_images import spaced_images
from ufo_ds.errors import UserError
from ufo_ds.model.loading import check_path, spec_of
from ufo_ds.model.spec import SubnetSpec
from ufo_ds.progress import Progress
from ufo_ds.recipe import Recipe
from ufo_ds.subnets.dense_network import with_weights
from ufo_ds.subnets.weights import Statistics, state_of

IMAGES = 1024
BATCH = 64


def is_needed(reader: Reader, spec: SubnetSpec) -> bool:
    """Whether the statistics in the checkpoint, if its head has any, are of another path."""
    task = next(task for task in reader.recipe.tasks if task.name == spec.task)
    if task.head.type != "margin" and not task.head.neck:
        return False
    elastic = reader.recipe.model.elastic
    of_all_sizes = elastic is not None and elastic.sampling == "random"
    return of_all_sizes or spec.architecture != spec_of(reader, spec.task).architecture


@torch.no_grad()
def statistics(
    reader: Reader,
    spec: SubnetSpec,
    pixels: Tensor | None = None,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> Statistics:
    """Mean and unbiased variance of the neck's input, each [dim], if those in the checkpoint are of another path.

    Args:
        pixels: uint8 [N, 3, H, W], as :func:`training_pixels` gives them; default: those of the task's train sets.
        progress: show how far it is.

    Raises:
        UserError: the path does not fit the model, or there are no images.
    """
    check_path(reader, spec)
    if not is_needed(reader, spec):
        return {}
    if pixels is None:
        pixels = training_pixels(reader.recipe, spec.task)
    network = with_weights(reader.recipe, spec, state_of(reader, spec)).to(device)
    batches, features = pixels.split(BATCH), []
    with (
        Progress(len(batches), unit="batches", name=f"statistics of {spec.task}") if progress else nullcontext() as bar
    ):
        for images in batches:
            features.append(network.feature(images.to(device)).double().cpu())
            if bar is not None:
                bar.update()
    features_ND = torch.cat(features)
    neck = f"heads.{spec.task}.neck"
    return {
        f"{neck}.running_mean": features_ND.mean(0).float(),
        f"{neck}.running_var": features_ND.var(0, unbiased=True).float(),
    }


def training_pixels(recipe: Recipe, task: str, source: str | None = None) -> Tensor:
    """Up to :data:`IMAGES` images, evenly spaced over the training set, uint8 [N, 3, H, W]; unreadable ones left out.

    Args:
        source: shards or a folder of images to take in place of the task's train sets.

    Raises:
        UserError: they are not here, or fewer than two can be read.
    """
    found = next(t for t in recipe.tasks if t.name == task)
    sets: list[Images | ShardSet]
    if source is not None:
        sets = [open_images(source)]
    else:
        for entry in found.train:
            if not is_here(entry.shards):
                raise UserError(
                    f"a subnet of {task} needs training images for the statistics of its neck, and {entry.shards} is "
                    f"not here: give shards or a folder of such images with --statistics"
                )
        sets = [*open_sets(found, recipe.data.shard_cache)]
    tried = list(spaced_images(sets, IMAGES, found.input))
    pixels = [image for image in tried if image is not None]
    if len(pixels) < 2:
        where = source or ", ".join(entry.shards for entry in found.train)
        raise UserError(
            f"{where}: {len(pixels)} of {len(tried)} images can be read, the statistics of the neck of {task} need "
            f"two: give others with --statistics"
        )
    return torch.from_numpy(np.stack(pixels))
