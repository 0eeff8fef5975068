"""Pixels: equal to those of transformers' own processor."""

import io
import math
import zlib

import numpy as np
import pytest
import simplejpeg
from PIL import Image
from transformers import ViTImageProcessorPil

from ufo_ds.data import transforms
from ufo_ds.data.transforms import CorruptImage, decode, decode_pixels, evaluation_transform, image_size, resize_image


def make_image(mode: str, width: int, height: int, seed: int = 0) -> Image.Image:
    generator = np.random.default_rng(seed)
    if mode == "I;16":
        return Image.fromarray(generator.integers(0, 65536, (height, width), dtype=np.uint16))
    channels = {"LA": 2, "RGBA": 4}.get(mode, 3)
    image = Image.fromarray(generator.integers(0, 256, (height, width, channels), dtype=np.uint8))
    return image.convert(mode)


def encode(image: Image.Image, format: str = "png", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def processed(image: Image.Image, input_hw: tuple[int, int]) -> np.ndarray:
    """uint8 [3, H, W] as transformers makes them."""
    processor = ViTImageProcessorPil(
        size={"height": input_hw[0], "width": input_hw[1]},
        resample=Image.Resampling.BILINEAR,
        do_convert_rgb=True,
        do_rescale=False,
        do_normalize=False,
    )
    return processor(image, return_tensors="np")["pixel_values"][0]


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "LA", "RGBA", "CMYK", "I;16"])
@pytest.mark.parametrize(("width", "height"), [(31, 47), (5, 3), (64, 64), (1, 9)])
def test_evaluation_pixels_are_those_of_transformers(mode: str, width: int, height: int) -> None:
    image = make_image(mode, width, height)
    assert image.mode == mode
    data = encode(image, "jpeg" if mode == "CMYK" else "png")
    for input_hw in ((32, 48), (7, 5), (64, 64)):
        pixels = evaluation_transform(data, input_hw)
        assert pixels.dtype == np.uint8
        assert pixels.flags.c_contiguous
        assert pixels.tobytes() == processed(Image.open(io.BytesIO(data)), input_hw).tobytes()
        assert pixels.shape == (3, *input_hw)


def test_transparent_palette_is_laid_over_white() -> None:
    image = make_image("P", 13, 11)
    data = encode(image, transparency=int(np.asarray(image)[4, 5]))
    pixels = evaluation_transform(data, (11, 13))
    assert pixels[:, 4, 5].tolist() == [255, 255, 255]
    assert pixels.tobytes() == processed(Image.open(io.BytesIO(data)), (11, 13)).tobytes()


def test_resize_takes_height_first() -> None:
    assert resize_image(make_image("RGB", 20, 10), (30, 40)).size == (40, 30)


JPEG, PNG = encode(make_image("RGB", 40, 30), "jpeg"), encode(make_image("RGB", 40, 30))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not an image",
        JPEG[:2],
        JPEG[: len(JPEG) // 2],
        PNG[:40],
        PNG[: len(PNG) // 2],
        PNG[:60] + b"\xff" * 40 + PNG[100:],
    ],
)
def test_broken_bytes_are_corrupt_images(data: bytes) -> None:
    for read in (decode, image_size if len(data) < 41 else decode, lambda data: decode_pixels(data, (1, 1))):
        with pytest.raises(CorruptImage) as error:
            read(data)
        assert "BytesIO" not in str(error.value)


# --- decoding for training --------------------------------------------------------------------------------------------


def photo(mode: str, width: int, height: int, seed: int = 0) -> Image.Image:
    """Coarse and fine structure, as in photographs: no JPEG quantisation leaves it untouched."""
    generator = np.random.default_rng(seed)
    coarse = Image.fromarray(generator.integers(0, 256, (7, 7, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(float)
    pixels = smooth + generator.normal(0, 12, (height, width, 1))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert(mode)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("size", [(1, 1), (3, 5), (17, 9), (33, 31), (101, 77), (160, 128)])
def test_whole_jpegs_are_decoded_as_by_pillow(mode: str, subsampling: int, size: tuple[int, int]) -> None:
    for quality, progressive in ((30, False), (90, True), (100, False)):
        data = encode(photo(mode, *size), "jpeg", quality=quality, subsampling=subsampling, progressive=progressive)
        expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        assert image_size(data) == expected.shape[:2]
        # Without the restriction to a fraction: nothing is as large as the image itself but the image.
        np.testing.assert_array_equal(decode_pixels(data, expected.shape[:2]), expected)


def test_jpegs_in_rgb_and_ones_that_simplejpeg_refuses_are_decoded_as_by_pillow() -> None:
    kept = encode(photo("RGB", 40, 30), "jpeg", keep_rgb=True)
    assert simplejpeg.decode_jpeg_header(kept)[2] == "RGB"
    plain = encode(photo("RGB", 40, 30), "jpeg")
    stray = plain[:-2] + bytes(9) + plain[-2:]  # before the last marker: libjpeg warns and goes on
    with pytest.raises(ValueError, match="extraneous"):
        simplejpeg.decode_jpeg(stray)
    for data in (kept, stray):
        np.testing.assert_array_equal(decode_pixels(data, (30, 40)), np.asarray(Image.open(io.BytesIO(data))))


def test_every_cut_of_a_jpeg_is_corrupt_for_both_decoders() -> None:
    data = encode(photo("RGB", 33, 29), "jpeg")
    for length in range(0, len(data) - 2, 7):
        for read in (decode, lambda data: decode_pixels(data, (29, 33)), lambda data: decode_pixels(data, (3, 3))):
            with pytest.raises(CorruptImage):
                read(data[:length])


@pytest.mark.parametrize(
    ("least_hw", "expected_hw"),
    [((150, 100), (152, 200)), ((152, 200), (152, 200)), ((153, 1), (304, 400)), ((1, 201), (304, 400)),
     ((100, 1), (114, 150)), ((75, 50), (76, 100)), ((1, 1), (38, 50)), ((500, 500), (304, 400))],
)  # fmt: skip
def test_jpegs_are_decoded_at_the_smallest_fraction_that_is_enough(
    least_hw: tuple[int, int], expected_hw: tuple[int, int]
) -> None:
    """Of k/8 with k = 1 to 4, or whole: an image of 400 x 304."""
    image = photo("RGB", 400, 304)
    found = decode_pixels(encode(image, "jpeg", quality=95), least_hw)
    assert found.shape == (*expected_hw, 3)
    averaged = np.asarray(image.resize(found.shape[1::-1], Image.Resampling.BOX)).astype(int)
    assert np.abs(found - averaged).mean() < 3  # of the 12 that the noise moves a pixel


def test_images_other_than_jpeg_are_decoded_whole() -> None:
    for mode in ("RGB", "RGBA", "P", "I;16"):
        data = encode(make_image(mode, 40, 30))
        assert image_size(data) == (30, 40)
        np.testing.assert_array_equal(decode_pixels(data, (4, 4)), np.asarray(decode(data)))


def bombs() -> dict[str, bytes]:
    """Small files whose headers say 60000 x 60000."""
    side = (60000).to_bytes(4, "big")
    jpeg = encode(make_image("RGB", 16, 16), "jpeg")
    frame = jpeg.index(b"\xff\xc0")
    png = encode(make_image("RGB", 16, 16))
    header = png[12:16] + side + side + png[24:29]
    bmp = encode(make_image("RGB", 16, 16), "bmp")
    return {
        "jpeg": jpeg[: frame + 5] + side[2:] + side[2:] + jpeg[frame + 9 :],
        "png": png[:12] + header + zlib.crc32(header).to_bytes(4, "big") + png[33:],
        "bmp": bmp[:18] + side[::-1] + side[::-1] + bmp[26:],
    }


@pytest.mark.parametrize("kind", ["jpeg", "png", "bmp"])
def test_enormous_images_are_refused_by_their_header(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = bombs()[kind]
    # Whoever asks for the pixels gets this.
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("pixels were allocated"))
    monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda *_, **__: pytest.fail("pixels were allocated"))
    for read in (decode, image_size, lambda data: decode_pixels(data, (8, 8))):
        with pytest.raises(CorruptImage, match=r"60000 x 60000|3600000000 pixels") as error:
            read(data)
        assert "\n" not in str(error.value)


def test_the_limit_is_on_pixels_and_the_same_for_both_decoders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transforms, "MAX_PIXELS", 40 * 30)
    for format in ("jpeg", "png"):
        assert decode(encode(make_image("RGB", 40, 30), format)).size == (40, 30)
        assert decode_pixels(encode(make_image("RGB", 30, 40), format), (40, 30)).shape == (40, 30, 3)
        larger = encode(make_image("RGB", 1201, 1), format)
        for read in (decode, image_size, lambda data: decode_pixels(data, (8, 8))):
            with pytest.raises(CorruptImage, match="1201 x 1 pixels are more than the 1200 allowed"):
                read(larger)


# --- resizing for training --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(
    ("size", "hw"),
    [((50, 37), (38, 38)), ((64, 128), (256, 128)), ((31, 7), (8, 40)), ((1, 1), (4, 3)), ((9, 9), (9, 9))],
)
def test_fast_resize_is_that_of_pillow_up_to_one(
    interpolation: str, size: tuple[int, int], hw: tuple[int, int]
) -> None:
    data = encode(photo("RGB", *size))
    found = transforms.resized_pixels(data, hw, interpolation)
    expected = decode(data).resize(hw[::-1], Image.Resampling[interpolation.upper()])
    assert (found.dtype, found.shape) == (np.uint8, (*hw, 3))
    assert np.abs(found.astype(int) - np.asarray(expected)).max() <= 1


@pytest.mark.parametrize("format", ["jpeg", "png"])
def test_default_resize_is_that_of_evaluation(format: str) -> None:
    data = encode(photo("RGB", 50, 37), format)
    for hw in ((38, 38), (26, 20), (60, 70)):
        found = transforms.channels_first(transforms.resized_pixels(data, hw))
        np.testing.assert_array_equal(found, evaluation_transform(data, hw))


def test_a_box_is_cut_out_and_resized_at_once() -> None:
    for format in ("jpeg", "png"):
        data = encode(photo("RGB", 90, 70), format)
        for top, left, height, width in ((0, 0, 70, 90), (10, 20, 40, 41), (69, 0, 1, 90), (30, 89, 5, 1)):
            found = transforms.cropped_pixels(data, (top, left, height, width), (48, 56), "bicubic")
            part = decode(data).crop((left, top, left + width, top + height))
            expected = np.asarray(part.resize((56, 48), Image.Resampling.BICUBIC))
            assert np.abs(found.astype(int) - expected).max() <= 1


def test_a_box_of_a_large_jpeg_is_the_same_place_in_the_smaller_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the box of the whole image: one decoded pixel, of 8 here, is the most that it may be off."""
    image = photo("RGB", 801, 603)
    data = encode(image, "jpeg", quality=95)
    shapes = []

    def noted(data: bytes, **options: int) -> np.ndarray:
        shapes.append(decode_jpeg(data, **options).shape)
        return decode_jpeg(data, **options)

    decode_jpeg = simplejpeg.decode_jpeg
    monkeypatch.setattr(simplejpeg, "decode_jpeg", noted)
    for box, k in (((0, 0, 603, 801), 1), ((100, 301, 400, 333), 2), ((402, 0, 201, 201), 3)):
        top, left, height, width = box
        found = transforms.cropped_pixels(data, box, (60, 70), "bilinear")
        assert shapes.pop() == (math.ceil(603 * k / 8), math.ceil(801 * k / 8), 3)
        part = image.crop((left, top, left + width, top + height))
        expected = np.asarray(part.resize((70, 60), Image.Resampling.BILINEAR)).astype(int)
        assert np.abs(found - expected).mean() < 4
        flipped = np.abs(found[:, ::-1] - expected).mean()
        assert flipped > 15  # what another place would give
