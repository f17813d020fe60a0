"""Pictures of predictions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_TILE, _GAP, _LINE, _SHOWN = 224, 16, 20, 3
INK, PAPER = (28, 30, 33), (255, 255, 255)
_BAR, _TRACK = (143, 186, 226), (226, 232, 240)


def prediction_sheet(images: Sequence[np.ndarray], predictions: Sequence[Mapping[str, Any]]) -> Image.Image:
    """A grid of images, each with its file's name and a bar for each of its three most probable classes.

    Args:
        images: uint8 (height, width, 3), as the model saw them.
        predictions: for each image `file` and `classes`, a list of `name` and `probability`, most probable first.
    """
    columns = min(len(images), max(3, math.ceil(math.sqrt(1.5 * len(images)))), 8)
    rows = math.ceil(len(images) / columns)
    cell_height = _LINE + _TILE + 8 + _SHOWN * _LINE
    size = (columns * (_TILE + _GAP) + _GAP, rows * (cell_height + _GAP) + _GAP)
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(13)
    for index, (image, prediction) in enumerate(zip(images, predictions, strict=True)):
        x = _GAP + index % columns * (_TILE + _GAP)
        y = _GAP + index // columns * (cell_height + _GAP)
        draw.text((x, y), fitted(Path(prediction["file"]).name, font, _TILE), INK, font)
        y += _LINE
        # Small images are enlarged without smoothing: these are the pixels that the model saw.
        enlarged = image.shape[0] < _TILE // 2
        filter_ = Image.Resampling.NEAREST if enlarged else Image.Resampling.BICUBIC
        sheet.paste(Image.fromarray(image).resize((_TILE, _TILE), filter_), (x, y))
        y += _TILE + 8
        for entry in prediction["classes"][:_SHOWN]:
            percent = f"{entry['probability']:.1%}"
            draw.rectangle((x, y, x + _TILE - 1, y + _LINE - 4), _TRACK)
            draw.rectangle((x, y, x + round((_TILE - 1) * entry["probability"]), y + _LINE - 4), _BAR)
            number_width = math.ceil(font.getlength(percent))
            draw.text((x + 5, y), fitted(entry["name"], font, _TILE - number_width - 20), INK, font)
            draw.text((x + _TILE - 5 - number_width, y), percent, INK, font)
            y += _LINE
    return sheet


def stacked(panels: Sequence[Image.Image]) -> Image.Image:
    """The pictures one below the other, along their left sides."""
    sheet = Image.new("RGB", (max(p.width for p in panels), sum(p.height for p in panels)), PAPER)
    for index, panel in enumerate(panels):
        sheet.paste(panel, (0, sum(p.height for p in panels[:index])))
    return sheet


def fitted(text: str, font: Any, width: int) -> str:
    """The text, or as much of its beginning as fits into `width` pixels with an ellipsis."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."
