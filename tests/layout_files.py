"""Images for the fixtures of layouts, and what their tests have in common."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ufo_ds import shards as command
from ufo_ds.data.shards import ShardSet, verify
from ufo_ds.errors import UserError


def encoded(seed: int, form: str = "JPEG", hw: tuple[int, int] = (8, 8)) -> bytes:
    out = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (*hw, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(out, form)
    return out.getvalue()


def converted(layout: str, source: Path, out: Path, *options: str) -> ShardSet:
    command.main([layout, str(source), str(out), *options])
    verify(out)
    return ShardSet.open(out)


def contents(shard_set: ShardSet) -> list[bytes]:
    return [shard_set.read(index) for index in range(len(shard_set))]


def fault(read: Any, source: Path) -> str:
    with pytest.raises(UserError) as error:
        read(source)
    message = str(error.value)
    assert "\n" not in message
    assert source.name in message
    return message
