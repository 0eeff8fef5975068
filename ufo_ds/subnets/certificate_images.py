"""Image files on which a model is compared with what it was made from."""

import io
from pathlib import Path

from ufo_ds.data.image_files import read_image
from ufo_ds.data.shard_specs import is_here
from ufo_ds.data.shards import ShardSet
from ufo_ds.data.transforms import CorruptImage, decode
from ufo_ds.errors import UserError
from ufo_ds.recipe import Recipe
from ufo_ds.recipe_task import Size


def certificate_images(recipe: Recipe, task: str, files: list[Path] | None, count: int = 32) -> list[bytes]:
    """Files to compare with: those given, or some that the recipe knows for this task; such as preprocessing has to
    resize.

    Raises:
        UserError: a file that is no image, or none was given and none is here.
    """
    found = next(t for t in recipe.tasks if t.name == task)
    if files:
        images = [_read(file) for file in files]
    else:
        directories = [d for b in found.benchmarks for d in b.parts.values()] + [s.shards for s in found.train]
        images = _some(directories, recipe, count)
        if not images:
            where = ", ".join(dict.fromkeys(directories)) or "no shards"
            raise UserError(f"--verify needs images: none of {where} is here; give --images")
    return with_one_to_resize(images, found.input)


def with_one_to_resize(images: list[bytes], input_hw: Size) -> list[bytes]:
    """Images that have the size of the input already show nothing of the filter by which others are resized: then half
    of them without a quarter of their rows and columns are there as well."""
    if any(decode(image).size != input_hw[::-1] for image in images):
        return images
    return [*images, *(_cropped(image) for image in images[::2])]


def _cropped(data: bytes) -> bytes:
    image = decode(data)
    width, height = image.size
    out = io.BytesIO()
    image.crop((0, 0, width - width // 4, height - height // 4)).save(out, "PNG")
    return out.getvalue()


def _read(file: Path) -> bytes:
    try:
        data = read_image(file)
        decode(data)
    except CorruptImage as error:
        raise UserError(f"--images {file} cannot be read ({error}): give image files") from None
    return data


def _some(directories: list[str], recipe: Recipe, count: int) -> list[bytes]:
    """Evenly spaced over the first that is here, unreadable ones left out."""
    for directory in directories:
        if is_here(directory):
            shards = ShardSet.open(directory, recipe.data.shard_cache)
            tried = [shards.read(i) for i in range(0, len(shards), max(1, len(shards) // count))][:count]
            return [image for image in tried if _is_readable(image)]
    return []


def _is_readable(data: bytes) -> bool:
    try:
        decode(data)
    except CorruptImage:
        return False
    return True
