"""Small pictures of a benchmark's images, as data URIs."""

import base64
import io

import numpy as np
from PIL import Image

from ufo_ds.data.shards import ShardSet
from ufo_ds.data.transforms import CorruptImage, decode
from ufo_ds.errors import UserError
from ufo_ds.recipe import ShardCache
from ufo_ds.recipe_task import Benchmark

_SIDE = 104  # of the longer side, in pixels: shown at about 80, on fine screens too


class Pictures:
    """The images behind one benchmark, as far as its shards are still there.

    Attributes:
        query, gallery: the shards by position; the same ones where the benchmark has but one set.
        missing: why there are none, or None.
    """

    def __init__(self, benchmark: Benchmark, cache: ShardCache):
        self.query: ShardSet | None = None
        self.gallery: ShardSet | None = None
        self.missing: str | None = None
        self._made: dict[tuple[str, int], str | None] = {}
        specs = [benchmark.query or benchmark.shards, benchmark.gallery or benchmark.shards]
        try:
            opened = {spec: ShardSet.open(spec, cache) for spec in dict.fromkeys(specs) if spec}
        except UserError as error:
            self.missing = str(error)
            return
        self.query, self.gallery = (opened.get(spec) if spec else None for spec in specs)

    def uri(self, position: int, part: str = "query") -> str | None:
        """Of an image of ``query`` or ``gallery``; None where it cannot be read."""
        shards = self.query if part == "query" else self.gallery
        if shards is None or not 0 <= position < len(shards):
            return None
        key = shards.name, position
        if key not in self._made:
            try:
                self._made[key] = thumbnail(decode(shards.read(position)))
            except CorruptImage:
                self._made[key] = None
        return self._made[key]

    def name(self, position: int, part: str = "query") -> str:
        """The label of an image."""
        shards = self.query if part == "query" else self.gallery
        if shards is None or not 0 <= position < len(shards):
            return ""
        return shards.classes[shards.labels[position]]

    def class_names(self, label: np.ndarray) -> dict[int, str]:
        """Names by label of the head, from the outcomes' ``label`` [N] of every image."""
        if self.query is None or len(label) != len(self.query):
            return {}
        return {int(a): self.query.classes[b] for a, b in zip(label, self.query.labels, strict=True)}


def thumbnail(image: Image.Image) -> str:
    """A data URI of a small JPEG."""
    scale = min(1.0, _SIDE / max(image.size))
    width, height = (max(1, round(side * scale)) for side in image.size)
    data = io.BytesIO()
    image.resize((width, height), Image.Resampling.LANCZOS).save(data, "JPEG", quality=80, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"
