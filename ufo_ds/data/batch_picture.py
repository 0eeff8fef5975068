"""The first images of a training as a picture: as training sees them, and as evaluation would."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ufo_ds.data.source import TrainSource
from ufo_ds.data.transforms import CorruptImage
from ufo_ds.recipe_task import Task

_WIDTH = 1112  # for the images of a row, ten square ones
_LONGEST = 104  # side of an image as drawn; the shorter one follows
_GAP, _MARGIN = 8, 28
_ROW_NAMES = 96  # width of the column that names the rows
_INK, _GREY, _LINE, _PAPER = "#1a202c", "#718096", "#cbd5e0", "#ffffff"


def draw(tasks: Sequence[Task], sources: dict[str, TrainSource], title: str) -> Image.Image:
    """Per task two rows of the first images of step 0, above as evaluation sees them and below as training does, and
    their labels.

    Raises:
        UserError: none of a task's images can be read.
    """
    panels = [_panel(task, sources[task.name]) for task in tasks]
    width = max(panel.width for panel in panels) + 2 * _MARGIN
    top = _MARGIN + 44
    height = top + sum(panel.height + 22 for panel in panels) + _MARGIN - 22
    page = Image.new("RGB", (width, height), _PAPER)
    pen = ImageDraw.Draw(page)
    pen.text(
        (_MARGIN, _MARGIN), _shortened(title, _font(20, bold=True), width - 2 * _MARGIN), _INK, _font(20, bold=True)
    )
    for panel in panels:
        page.paste(panel, (_MARGIN, top))
        top += panel.height + 22
    return page


def _panel(task: Task, source: TrainSource) -> Image.Image:
    (input_height, input_width), longest = task.input, max(task.input)
    width, height = (max(1, round(side * _LONGEST / longest)) for side in (input_width, input_height))
    step = max(width, 48) + _GAP  # room for a label under narrow images
    count = min((_WIDTH + _GAP) // step, task.samples_per_step)
    size = _ROW_NAMES + _WIDTH, 34 + 2 * (height + _GAP) + 18
    panel = Image.new("RGB", size, _PAPER)
    pen = ImageDraw.Draw(panel)
    pen.line([(0, 0), (size[0], 0)], _LINE)
    pen.text((0, 9), task.name, _INK, _font(15, bold=True))
    name_width = pen.textlength(task.name, _font(15, bold=True))
    pen.text((name_width + 12, 12), _about(task), _GREY, _font(12))
    rows = [34, 34 + height + _GAP]
    for name, row in zip(("evaluation", "training"), rows, strict=True):
        pen.text((0, row + height / 2), name, _GREY, _font(12), anchor="lm")
    for draw_index in range(count):
        left = _ROW_NAMES + draw_index * step
        trained, label, _ = source.load(draw_index)
        evaluated = _evaluated(source, draw_index)
        for pixels, row in zip((evaluated, trained), rows, strict=True):
            if pixels is None:
                pen.rectangle([left, row, left + width - 1, row + height - 1], "#edf2f7")
                pen.text((left + width / 2, row + height / 2), "unreadable", _GREY, _font(9), anchor="mm")
                continue
            image = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
            panel.paste(image.resize((width, height), Image.Resampling.LANCZOS), (left, row))
            pen.rectangle([left, row, left + width - 1, row + height - 1], outline=_LINE)  # white ones need an edge
        text = _shortened(source.name_of(label), _font(11), step - _GAP)
        pen.text((left, rows[1] + height + 4), text, _INK, _font(11))
    return panel


def _evaluated(source: TrainSource, draw_index: int) -> np.ndarray | None:
    try:
        return source.pixels(source.index(draw_index) % len(source))
    except CorruptImage:  # training takes another in its place
        return None


def _about(task: Task) -> str:
    size = f"{task.input[0]} × {task.input[1]}"
    if not task.identities_per_step:
        return f"{size}, {task.samples_per_step} a step"
    each = task.samples_per_step // task.identities_per_step
    return f"{size}, {task.samples_per_step} a step: {task.identities_per_step} identities × {each} images"


def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", name)), size)


def _shortened(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """The text, or as much of its begin and end as fits: the end of a label often says more."""
    if font.getlength(text) <= width:
        return text
    kept = len(text) - 1
    while kept > 1 and font.getlength(text[: kept // 2] + "…" + text[len(text) - (kept - kept // 2) :]) > width:
        kept -= 1
    return text[: kept // 2] + "…" + text[len(text) - (kept - kept // 2) :]
