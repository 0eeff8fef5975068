"""The images of a benchmark, in the order of its shards."""

import hashlib
import json
from pathlib import Path

import numpy as np

from ufo_ds.data.shards import DEFAULT_CACHE, ShardSet
from ufo_ds.data.transforms import CorruptImage, evaluation_transform
from ufo_ds.errors import UserError
from ufo_ds.recipe import ShardCache


class EvaluationSet:
    """A benchmark's samples.

    Attributes:
        label_names: the label of each sample, by name, so that the ids of query and gallery compare.
        camera_names: the camera of each sample, None where it has none.
        pairs: int64 [M, 4] of fold, first sample, second sample, same identity (0 or 1); or None.
        templates: sets of images to be compared as one; or None.
    """

    def __init__(self, shards: ShardSet):
        self._shards = shards
        self.label_names: list[str] = [shards.classes[label] for label in shards.labels]
        self.camera_names: list[str | None] = [
            shards.cameras[camera] if camera >= 0 else None for camera in shards.camera_ids
        ]
        self.pairs = shards.pairs
        self.templates = shards.templates

    @classmethod
    def open(cls, spec: str | Path, shard_cache: ShardCache = DEFAULT_CACHE) -> "EvaluationSet":
        """Open shards; for the errors see :meth:`ShardSet.open`."""
        return cls(ShardSet.open(spec, shard_cache))

    def __len__(self) -> int:
        return len(self._shards)

    def load(self, index: int, input_hw: tuple[int, int]) -> np.ndarray:
        """Read one image.

        Returns:
            uint8 [3, H, W].

        Raises:
            UserError: it cannot be read; a benchmark with an image left out would be another benchmark.
        """
        try:
            return evaluation_transform(self._shards.read(index), input_hw)
        except CorruptImage as error:
            raise UserError(
                f"image {index} of {self._shards.name} ({self.label_names[index]}) cannot be read ({error}): "
                f"check the shards with `ufo shards verify`"
            ) from None


def digest(*sets: EvaluationSet) -> str:
    """A digest of the names of labels and cameras, and of the pairs: alike for the same data alone."""
    names = [[s.label_names, s.camera_names, None if s.pairs is None else s.pairs.tolist()] for s in sets]
    return hashlib.sha256(json.dumps(names).encode()).hexdigest()
