"""Pictures of segmented images: the classes in colour over the image, with a legend."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from msvmamba_jax.colours import distinct_colours
from msvmamba_jax.data.ade20k import ade20k_class_names, ade20k_palette
from msvmamba_jax.pictures import INK, PAPER, fitted, stacked

_LONG = 512  # pixels of the long side that small images are enlarged to, at most
_GAP, _LINE, _SWATCH, _NAME = 16, 20, 14, 170  # pixels; _NAME: the greatest width of a name
_SHOWN = 12  # classes that the legend always has room for
_OPACITY = 0.6  # of the colours over the image
_BORDER = (255, 255, 255)


def class_palette(class_names: Sequence[str]) -> np.ndarray:
    """A colour for every class: ADE20K's own where the classes are its, otherwise ones that are easy to tell apart.

    Returns:
        uint8 (classes, 3), RGB; always the same for the same classes.
    """
    if tuple(class_names) == ade20k_class_names():
        return ade20k_palette()
    return distinct_colours()[: len(class_names)]


def segmentation_overlay(
    image: np.ndarray,
    labels: np.ndarray,
    class_names: Sequence[str],
    palette: np.ndarray,
    *,
    truth: np.ndarray | None = None,
) -> Image.Image:
    """Draws the classes over an image, their borders, and a legend of those present, largest first.

    Args:
        image: uint8 (height, width, 3).
        labels: integers (height, width), the predicted classes; where a value is no class the image stays bare.
        class_names: the name of every class.
        palette: uint8 (classes, 3), such as `class_palette(class_names)`.
        truth: integers (height, width), the true classes, drawn beside the prediction.
    """
    maps = {"": labels} if truth is None else {"prediction": labels, "truth": truth}
    enlarged = max(1, _LONG // max(image.shape[:2]))
    panels = [Image.fromarray(_coloured(image, classes, palette, enlarged)) for classes in maps.values()]
    panel_width, panel_height = panels[0].size
    title = 0 if truth is None else _LINE + 2

    shares = np.stack([_shares(classes, len(class_names)) for classes in maps.values()])  # (maps, classes)
    present = np.flatnonzero(shares.any(axis=0))
    present = present[np.lexsort((present, *-shares[::-1, present]))]  # by the prediction, then the truth
    rows = max(_SHOWN, (panel_height + title) // _LINE - (truth is not None))
    if len(present) > rows:
        rows -= 1  # for the number of the others
    font = ImageFont.load_default(13)
    number_width = math.ceil(font.getlength("100.0 %")) + 10
    shown = [fitted(class_names[index], font, _NAME) for index in present[:rows]]
    others = f"{len(present) - rows} more" if len(present) > rows else ""
    name_width = max((math.ceil(font.getlength(name)) for name in (*shown, others)), default=0)

    legend_x = len(panels) * (panel_width + _GAP) + _GAP
    lines = len(shown) + bool(others) + (truth is not None)
    height = max(panel_height + title, lines * _LINE) + 2 * _GAP
    width = legend_x + _SWATCH + 8 + name_width + len(maps) * number_width + _GAP
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    for index, (name, panel) in enumerate(zip(maps, panels, strict=True)):
        x = _GAP + index * (panel_width + _GAP)
        draw.text((x, _GAP), name, INK, font)
        sheet.paste(panel, (x, _GAP + title))

    right = [width - _GAP - (len(maps) - 1 - index) * number_width for index in range(len(maps))]
    y = _GAP
    if truth is not None:
        for x, name in zip(right, ("pred.", "true"), strict=True):
            draw.text((x - font.getlength(name), y), name, INK, font)
        y += _LINE
    for index, name in zip(present[:rows], shown, strict=True):
        draw.rectangle((legend_x, y + 1, legend_x + _SWATCH, y + 1 + _SWATCH), tuple(palette[index].tolist()), INK)
        draw.text((legend_x + _SWATCH + 8, y), name, INK, font)
        _numbers(draw, right, y, shares[:, index], font)
        y += _LINE
    if others:
        draw.text((legend_x + _SWATCH + 8, y), others, INK, font)
        _numbers(draw, right, y, shares[:, present[rows:]].sum(axis=1), font)
    return sheet


def segmentation_sheet(
    examples: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]], class_names: Sequence[str]
) -> Image.Image:
    """Draws several images, one below the other, each with the classes found and the true ones.

    Args:
        examples: for each an image, uint8 (h, w, 3); the predicted classes, (height, width); and the true ones, of the
            same size. The image is enlarged or reduced to that.
        class_names: the name of every class.
    """
    palette = class_palette(class_names)
    panels = [
        segmentation_overlay(
            np.asarray(Image.fromarray(image).resize(labels.shape[::-1])), labels, class_names, palette, truth=truth
        )
        for image, labels, truth in examples
    ]
    return stacked(panels)


def _numbers(draw: ImageDraw.ImageDraw, right: Sequence[float], y: float, shares: np.ndarray, font: Any) -> None:
    for x, share in zip(right, shares, strict=True):
        text = f"{100 * share:.1f} %" if share else "-"
        draw.text((x - font.getlength(text), y), text, INK, font)


def _shares(labels: np.ndarray, classes: int) -> np.ndarray:
    """The part of all pixels that every class has: (classes,)."""
    values = labels[(labels >= 0) & (labels < classes)].astype(np.intp)
    return np.bincount(values, minlength=classes) / labels.size


def _coloured(image: np.ndarray, labels: np.ndarray, palette: np.ndarray, enlarged: int) -> np.ndarray:
    """The classes over the image, with a line of one pixel between them: uint8, `enlarged` times as large."""
    labels = labels.astype(np.int64).repeat(enlarged, axis=0).repeat(enlarged, axis=1)
    pixels = image.astype(np.float32).repeat(enlarged, axis=0).repeat(enlarged, axis=1)
    known = (labels >= 0) & (labels < len(palette))
    # Grey below the colour: otherwise the image's own colours would make another class of it.
    grey = pixels @ np.array((0.299, 0.587, 0.114), np.float32)
    colours = palette[np.where(known, labels, 0)]
    over = (1 - _OPACITY) * grey[..., None] + _OPACITY * colours
    pixels = np.where(known[..., None], over, pixels)
    border = np.zeros(labels.shape, bool)
    border[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    border[1:] |= labels[1:] != labels[:-1]
    pixels[border] = _BORDER
    return np.rint(pixels).astype(np.uint8)
