"""Pictures that look real enough to a perceptual hash, as files and as shards."""

import io

import numpy as np
from PIL import Image

from ufo_ds.data.layouts import Layout, Sample
from ufo_ds.data.shard_writer import write

SIZE = (72, 60)


def texture(generator, size=SIZE):
    """A smooth random picture with some noise, as photos are: coarse blobs of colour and finer ones."""
    layers = [
        np.asarray(
            Image.fromarray(generator.integers(0, 256, (n, n, 3), dtype=np.uint8)).resize(
                size, Image.Resampling.BICUBIC
            ),
            dtype=float,
        )
        for n in (3, 7, 15)
    ]
    pixels = 0.5 * layers[0] + 0.3 * layers[1] + 0.2 * layers[2] + generator.normal(0, 4, layers[0].shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def strokes(generator, size=SIZE):
    """Black lines on white."""
    pixels = np.full((size[1], size[0], 3), 255, dtype=np.uint8)
    points = np.cumsum(generator.normal(0, 2.5, (60, 2)), axis=0) + 32
    for y, x in points.clip(3, 56).astype(int):
        pixels[y - 2 : y + 2, x - 2 : x + 2] = 0
    return Image.fromarray(pixels)


def noise(generator, size=SIZE):
    return Image.fromarray(generator.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def encode(image, form="PNG", **options):
    data = io.BytesIO()
    image.save(data, form, **options)
    return data.getvalue()


def resized(image, across, down):
    return image.resize((round(image.width * across), round(image.height * down)), Image.Resampling.BICUBIC)


class Bytes:
    """An image file in memory, as a layout takes it."""

    suffix = ".png"  # Pillow looks at the bytes alone

    def __init__(self, data):
        self.data = data

    def read_bytes(self):
        return self.data


def shard_set(directory, images, labels=None):
    samples = [Sample(Bytes(data), labels[n] if labels else f"id{n:04d}") for n, data in enumerate(images)]
    return write(Layout(samples), directory, source="test", licence="none")
