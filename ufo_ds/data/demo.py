"""The demo's two data sets, made on the spot from what is installed anyway.

``digits``: scikit-learn's 8 x 8 scans of handwritten digits, for classification. ``glyphs``: letters in the fonts that
matplotlib ships, for retrieval and verification: the identity is the character, the camera is the font, and the
characters of the test were never seen in training, as persons and cameras are in re-identification.
"""

import tempfile
from collections import Counter
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from ufo_ds.data.layouts import Layout, Pair, Sample
from ufo_ds.data.shard_writer import Part, write_sets
from ufo_ds.errors import UserError
from ufo_ds.seeding import numpy_generator

DIGITS_LICENCE = "CC BY 4.0 (UCI Optical Recognition of Handwritten Digits)"
GLYPHS_LICENCE = "images of matplotlib's fonts (Bitstream Vera / DejaVu, STIX, BaKoMa licences)"

_DIGITS_TEST = 360  # of 1797 scans
_DIGITS_SIDE = 16  # pixels; the scans have 8

_LATIN_ONLY = ["cmr10", "cmb10", "cmss10", "cmti10", "cmtt10"]  # above ASCII they hold other signs than they declare
_FONTS = [
    *(f"DejaVuSans{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSansMono{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")),
    *_LATIN_ONLY,
]
_ALPHABETS = [(0x30, 0x3A), (0x41, 0x5B), (0x61, 0x7B), (0xC0, 0x250), (0x386, 0x3D0), (0x400, 0x530)]
_MIN_FONTS = 6  # per character
_ALIKE = 0.85  # correlation of two shapes from which they are taken for one character
_MASK_EM = 48  # size in pixels at which a font is rasterised, once per character

_SIDE = 32  # pixels of a glyph image
_TEST_SHARE = 1 / 3  # of the characters
_TRAIN_COPIES = 2  # images per character and font
_QUERY_FONTS = 3  # queries per test character, each of another font
_FOLDS, _PAIRS_PER_FOLD = 10, 60


def make(directory: Path) -> None:
    """Write the demo's shards: ``digits/{train,test}`` and ``glyphs/{train,query,gallery,pairs}``.

    The result is the same every time. It appears as a whole or not at all.

    Raises:
        UserError: ``directory`` exists.
    """
    if directory.exists():
        raise UserError(f"{directory} exists: remove it to make the demo's shards anew")
    with tempfile.TemporaryDirectory() as images:
        parts = {
            f"digits/{name}": Part(layout, "sklearn.datasets.load_digits", DIGITS_LICENCE)
            for name, layout in _digits(Path(images, "digits")).items()
        }
        fonts = f"fonts of matplotlib {matplotlib.__version__}"
        parts |= {
            f"glyphs/{name}": Part(layout, fonts, GLYPHS_LICENCE)
            for name, layout in _glyphs(Path(images, "glyphs")).items()
        }
        write_sets(parts, directory)


def _digits(folder: Path) -> dict[str, Layout]:
    folder.mkdir(parents=True)
    digits = load_digits()
    samples = []
    for index, (scan, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        path = folder / f"{index:04d}.png"
        grey = Image.fromarray((scan * (255 / 16)).astype(np.uint8))
        grey.resize((_DIGITS_SIDE, _DIGITS_SIDE), Image.Resampling.BILINEAR).save(path)
        samples.append(Sample(path=path, label=str(label), camera=None))
    train, test = train_test_split(samples, test_size=_DIGITS_TEST, stratify=digits.target, random_state=0)
    return {"train": Layout(samples=train, pairs=None), "test": Layout(samples=test, pairs=None)}


def _glyphs(folder: Path) -> dict[str, Layout]:
    folder.mkdir(parents=True)
    masks = {font: _masks(font) for font in _FONTS}
    characters = _distinct_characters(masks)
    fonts_of = {character: [font for font in _FONTS if character in masks[font]] for character in characters}

    def render(character: str, font: str, copy: int, purpose: str) -> Sample:
        path = folder / f"{ord(character):04x}-{font}-{purpose}{copy}.png"
        generator = numpy_generator(0, "glyph", purpose, character, font, copy)
        _photograph(masks[font][character], generator).save(path)
        return Sample(path=path, label=f"U+{ord(character):04X}", camera=font)

    generator = numpy_generator(0, "glyphs")
    shuffled = [characters[index] for index in generator.permutation(len(characters))]
    number_of_tests = round(len(shuffled) * _TEST_SHARE)
    test, train = shuffled[:number_of_tests], shuffled[number_of_tests:]
    layouts = {
        "train": [(c, font, copy) for c in train for font in fonts_of[c] for copy in range(_TRAIN_COPIES)],
        "query": [(c, font, 0) for c in test for font in generator.choice(fonts_of[c], _QUERY_FONTS, replace=False)],
        "gallery": [(c, font, 0) for c in test for font in fonts_of[c]],
        "pairs": [(c, font, 0) for c in test for font in fonts_of[c]],
    }
    pairs = _pairs(layouts["pairs"], test, generator)
    return {
        name: Layout(samples=[render(*item, name) for item in items], pairs=pairs if name == "pairs" else None)
        for name, items in layouts.items()
    }


def _masks(font: str) -> dict[str, Image.Image]:
    """The characters that a font has and draws, each cropped to its ink."""
    path = Path(matplotlib.get_data_path(), "fonts", "ttf", f"{font}.ttf")
    declared = FT2Font(str(path)).get_charmap()
    # Without the basic engine the pictures would depend on whether Pillow finds libraqm.
    drawn = ImageFont.truetype(path, _MASK_EM, layout_engine=ImageFont.Layout.BASIC)
    masks = {}
    for code in (code for first, end in _ALPHABETS for code in range(first, end)):
        if code not in declared or not chr(code).isalnum() or (font in _LATIN_ONLY and code > 0x7F):
            continue
        canvas = Image.new("L", (3 * _MASK_EM, 3 * _MASK_EM))
        ImageDraw.Draw(canvas).text((_MASK_EM, _MASK_EM), chr(code), font=drawn, fill=255)
        ink = canvas.getbbox()
        if ink is not None:
            masks[chr(code)] = canvas.crop(ink)
    return masks


def _distinct_characters(masks: dict[str, dict[str, Image.Image]]) -> list[str]:
    """The characters with enough fonts whose shape tells them apart, in the order of their codes.

    Latin, Greek and Cyrillic share shapes (A, Α, А), and so do many upper and lower cases: as identities of their own
    they would be right answers counted as wrong. Of those that look alike in any font, whatever their size and width,
    and of the two cases of a letter, the first is kept.
    """
    number_of_fonts = Counter(character for of_font in masks.values() for character in of_font)
    characters = sorted(character for character, fonts in number_of_fonts.items() if fonts >= _MIN_FONTS)
    number = {character: index for index, character in enumerate(characters)}
    similarity = np.full((len(characters), len(characters)), -1.0, dtype=np.float32)
    for of_font in masks.values():
        have = [character for character in of_font if character in number]
        shapes = np.stack([_shape(of_font[character]) for character in have])
        at = np.ix_([number[c] for c in have], [number[c] for c in have])
        similarity[at] = np.maximum(similarity[at], shapes @ shapes.T)
    kept: list[str] = []
    for character in characters:
        alike = similarity[number[character], [number[other] for other in kept]] >= _ALIKE
        if not alike.any() and character.casefold() not in {other.casefold() for other in kept}:
            kept.append(character)
    return kept


def _shape(mask: Image.Image, side: int = 20) -> np.ndarray:
    """A mask stretched to a square, as a vector [side * side] whose dot product with another is their correlation."""
    square = Image.new("L", (side, side))
    square.paste(mask.resize((side - 2, side - 2)), (1, 1))  # the margin gives an upright bar a shape, too
    vector = np.asarray(square, dtype=np.float32).ravel()
    vector -= vector.mean()
    return vector / np.linalg.norm(vector)


def _photograph(mask: Image.Image, generator: np.random.Generator) -> Image.Image:
    """A glyph at a random size, place, angle and contrast, so that matching pixels alone finds few of its kind."""
    angle = np.radians(generator.uniform(-10, 10))
    scale = generator.uniform(20, 26) / max(mask.size)  # longer side in pixels of the image
    shift = generator.uniform(-1.5, 1.5, size=2)
    ground, ink = generator.uniform(0, 100), generator.uniform(155, 255)
    # Pillow wants the way back, from a place in the picture to one in the mask. Drawn at twice the size and reduced,
    # because its transform does not average over the pixels that it leaves out.
    cos, sin = np.cos(angle) / (2 * scale), np.sin(angle) / (2 * scale)
    x, y = _SIDE + 2 * shift
    matrix = (
        cos, sin, mask.width / 2 - cos * x - sin * y,
        -sin, cos, mask.height / 2 + sin * x - cos * y,
    )  # fmt: skip
    size = (2 * _SIDE, 2 * _SIDE)
    picture = mask.transform(size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR).reduce(2)
    grey = ground + (ink - ground) / 255 * np.asarray(picture, dtype=np.float32)
    return Image.fromarray(grey.round().astype(np.uint8))


def _pairs(items: list[tuple[str, str, int]], characters: list[str], generator: np.random.Generator) -> list[Pair]:
    """Pairs of images of two fonts, half of them of one character; no character is in two folds, as in LFW."""
    by_character: dict[str, list[int]] = {character: [] for character in characters}
    for index, (character, _, _) in enumerate(items):
        by_character[character].append(index)
    pairs = []
    for fold in range(_FOLDS):
        own = characters[fold::_FOLDS]
        for number in range(_PAIRS_PER_FOLD):
            same = number % 2 == 0
            first_character, other_character = generator.choice(own, 2, replace=False)
            first = generator.choice(by_character[first_character])
            candidates = by_character[first_character if same else other_character]
            second = generator.choice([index for index in candidates if items[index][1] != items[first][1]])
            pairs.append(Pair(fold=fold, first=int(first), second=int(second), same=same))
    return pairs
