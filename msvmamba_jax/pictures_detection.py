"""Pictures of detected objects: boxes, masks, names and scores over the image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from msvmamba_jax.colours import distinct_colours
from msvmamba_jax.pictures import INK, PAPER, fitted, stacked

_LONG, _MANY_LONG = 800, 1400  # pixels of the long side that images are enlarged to, at most; with many objects
_MANY = 12  # objects
_OPACITY = 0.4  # of the colours over the image
_BRIGHT = 170  # the least of the largest of red, green and blue: lines must not be lost in the dark
_GAP, _LINE, _NAME = 16, 20, 160  # pixels; _NAME: the greatest width of a name
_REACH = 6  # heights that a name may be away from its box
_SAME = 0.5  # overlap of an object found with a true one, from which they are drawn in one colour

Truth = tuple[np.ndarray, np.ndarray, np.ndarray]
Found = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


class _Object(NamedTuple):
    """An object to draw.

    Attributes:
        box: x1, y1, x2, y2 in pixels of the image.
        mask: bool (height, width).
        text: that stands at it.
        colour: RGB in 0..255.
    """

    box: tuple[float, float, float, float]
    mask: np.ndarray
    text: str
    colour: tuple[int, int, int]


def detection_picture(
    image: np.ndarray,
    boxes: np.ndarray,
    masks: np.ndarray,
    labels: np.ndarray,
    scores: np.ndarray | None,
    class_names: Sequence[str],
    *,
    threshold: float = 0.3,
    truth: Truth | None = None,
) -> Image.Image:
    """Draws the objects found in an image, each in a colour of its own, with its name and score.

    Small images are enlarged, all images with many objects. Names stand where they cover no other one, if there is
    room; a line leads to a name that is not at its box.

    Args:
        image: uint8 (height, width, 3).
        boxes: float (n, 4), x1, y1, x2, y2 in pixels of the image.
        masks: bool (n, height, width).
        labels: integers (n,), indices into `class_names`.
        scores: float (n,); None: all objects are drawn, with their names alone.
        class_names: the name of every label.
        threshold: objects with lower scores are not drawn.
        truth: boxes, masks and labels of the true objects, drawn beside; those that were found are in the same colour.
    """
    texts = [class_names[label] for label in labels.tolist()]
    if scores is not None:
        texts = [f"{text} {score:.2f}" for text, score in zip(texts, scores.tolist(), strict=True)]
        order = np.argsort(-scores, kind="stable")
        order = order[scores[order] >= threshold]
        boxes, masks, texts = boxes[order], masks[order], [texts[index] for index in order]
    found = [
        _Object(tuple(box), mask, text, _colour(index))
        for index, (box, mask, text) in enumerate(zip(boxes.tolist(), masks, texts, strict=True))
    ]
    if truth is None:
        return _panel(image, found, many=len(found) > _MANY)
    true = [
        _Object(tuple(box), mask, class_names[label], _colour(index))
        for box, mask, label, index in zip(
            truth[0].tolist(), truth[1], truth[2].tolist(), _partners(truth[0], boxes), strict=True
        )
    ]
    many = max(len(found), len(true)) > _MANY
    least = "" if scores is None else f" with scores from {threshold:g}"
    panels = {
        f"prediction: {_count(len(found))}{least}": _panel(image, found, many=many),
        f"truth: {_count(len(true))}": _panel(image, true, many=many),
    }
    width, height = next(iter(panels.values())).size
    sheet = Image.new("RGB", (2 * (width + _GAP) + _GAP, height + _LINE + 2 * _GAP), PAPER)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(13)
    for index, (title, panel) in enumerate(panels.items()):
        x = _GAP + index * (width + _GAP)
        draw.text((x, _GAP), fitted(title, font, width), INK, font)
        sheet.paste(panel, (x, _GAP + _LINE))
    return sheet


def detection_sheet(
    examples: Sequence[tuple[np.ndarray, Found, Truth]], class_names: Sequence[str], *, threshold: float = 0.3
) -> Image.Image:
    """Draws several images, one below the other, each with the objects found and the true ones.

    Args:
        examples: for each an image, uint8 (height, width, 3); boxes, masks, labels and scores of what was found; and
            boxes, masks and labels of the truth: see `detection_picture`.
        class_names: the name of every label.
        threshold: objects with lower scores are not drawn.
    """
    panels = [
        detection_picture(image, *found, class_names, threshold=threshold, truth=truth)
        for image, found, truth in examples
    ]
    return stacked(panels)


def _count(number: int) -> str:
    return "1 object" if number == 1 else f"{number} objects"


def _colour(index: int) -> tuple[int, int, int]:
    colours = distinct_colours()
    bright = colours[colours.max(axis=1) >= _BRIGHT]
    red, green, blue = bright[index % len(bright)].tolist()
    return red, green, blue


def _partners(true: np.ndarray, found: np.ndarray) -> list[int]:
    """For each true box the number of the one found there, each at most once; for the others numbers of their own."""
    low = np.maximum(true[:, None, :2], found[None, :, :2])
    high = np.minimum(true[:, None, 2:], found[None, :, 2:])
    common = (high - low).clip(0).prod(axis=-1)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(axis=-1) for boxes in (true, found)]
    overlap = common / np.maximum(areas[0][:, None] + areas[1][None] - common, 1e-9)
    partners = list(range(len(found), len(found) + len(true)))
    for _ in range(min(overlap.shape)):
        row, column = np.unravel_index(np.argmax(overlap), overlap.shape)
        if overlap[row, column] < _SAME:
            break
        partners[row] = int(column)
        overlap[row], overlap[:, column] = 0, 0
    return partners


def _panel(image: np.ndarray, objects: Sequence[_Object], *, many: bool) -> Image.Image:
    """The objects over the image, enlarged by a whole factor."""
    height, width = image.shape[:2]
    factor = max(1, (_MANY_LONG if many else _LONG) // max(height, width))
    size = (factor * width, factor * height)
    pixels = np.array(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))
    # The largest first: what is small stays in sight.
    for item in sorted(objects, key=lambda item: -item.mask.sum()):
        _paint(pixels, item, factor)
    panel = Image.fromarray(pixels)
    draw = ImageDraw.Draw(panel)
    boxes = np.array([item.box for item in objects], np.float64).reshape(-1, 4) * factor
    for (x1, y1, x2, y2), item in zip(boxes.tolist(), objects, strict=True):
        corners = (x1, y1, max(x1, x2 - 1), max(y1, y2 - 1))
        draw.rectangle(corners, outline=item.colour, width=1 if many else 2)
    font: Any = ImageFont.load_default(11 if many else 13)
    texts = [fitted(item.text, font, _NAME) for item in objects]
    line = sum(font.getmetrics())
    chips = _places(boxes, [math.ceil(font.getlength(text)) + 6 for text in texts], line + 1, size)
    for chip, box, item in zip(chips, boxes, objects, strict=True):
        _lead(draw, chip, box, item.colour)
    for (x1, y1, x2, y2), item, text in zip(chips.tolist(), objects, texts, strict=True):
        draw.rectangle((x1, y1, x2 - 1, y2 - 1), item.colour, INK)
        red, green, blue = item.colour
        bright = 0.299 * red + 0.587 * green + 0.114 * blue > 130
        draw.text((x1 + 3, y1), text, INK if bright else PAPER, font)
    return panel


def _paint(pixels: np.ndarray, item: _Object, factor: int) -> None:
    """Lays a mask over the enlarged image, with a line along its border."""
    rows, columns = np.flatnonzero(item.mask.any(axis=1)), np.flatnonzero(item.mask.any(axis=0))
    if not len(rows):
        return
    window = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
    mask = item.mask[window].repeat(factor, axis=0).repeat(factor, axis=1)
    inner = np.pad(mask, 1)
    for _ in range(2):  # pixels of the line
        around = np.pad(inner, 1)
        inner = inner & around[2:, 1:-1] & around[:-2, 1:-1] & around[1:-1, 2:] & around[1:-1, :-2]
    opacity = np.where(inner[1:-1, 1:-1], _OPACITY, 1.0) * mask
    part = pixels[tuple(slice(factor * side.start, factor * side.stop) for side in window)]
    part[:] = np.rint(part + opacity[..., None] * (np.array(item.colour) - part.astype(np.float64)))


def _places(boxes: np.ndarray, widths: Sequence[int], height: int, size: tuple[int, int]) -> np.ndarray:
    """Where the names stand: float (n, 4), x1, y1, x2, y2.

    Each takes the best place that is left, those of small boxes first: at a corner of its box, along its edges, or away
    from it; off other names, and off other objects that it would hide.
    """
    chips = np.zeros((len(boxes), 4))
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    done: list[int] = []
    for index in np.argsort(areas, kind="stable").tolist():
        width = widths[index]
        places, costs = _candidates(boxes[index], width, height)
        chip = np.array((width, height))
        places = places.clip(0, np.maximum(np.array(size) - chip, 0))
        places = np.concatenate([places, places + chip], axis=1)
        names = _common(places, chips[done]).sum(axis=1) / (width * height)
        others = np.arange(len(boxes)) != index
        hidden = (_common(places, boxes[others]) / np.maximum(areas[others], 1.0)).sum(axis=1)
        chips[index] = places[np.argmin(costs + 10 * (names > 1e-6) + 30 * names + 3 * hidden)]
        done.append(index)
    return chips


def _candidates(box: np.ndarray, width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    """Places (k, 2) for the upper left corner of a name at a box, and what is wrong with each: (k,)."""
    x1, y1, x2, y2 = box.tolist()
    places, costs = [], []
    # Above, inside at the top, below, inside at the bottom; from left to right.
    for cost, y in zip((0.0, 0.1, 0.2, 0.3), (y1 - height, y1, y2, y2 - height), strict=True):
        for step in np.linspace(0, 1, 5):
            places.append((x1 + step * max(x2 - width - x1, 0), y))
            costs.append(cost + 0.2 * step)
    for far in np.arange(0.25, _REACH, 0.5):
        up, down = y1 - (1 + far) * height, y2 + far * height
        for step in np.linspace(-1, 1, 9):
            x = (x1 + x2 - width) / 2 + step * (far * height + (x2 - x1 + width) / 2)
            places += [(x, up), (x, down)]
        for y in np.linspace(up, down, 9):
            places += [(x1 - width - far * height, y), (x2 + far * height, y)]
        costs += [1 + far] * 36
    return np.array(places), np.array(costs)


def _common(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The area that each of the boxes (k, 4) has in common with each of (n, 4): (k, n)."""
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum(first[:, None, 2:], second[None, :, 2:])
    return (high - low).clip(0).prod(axis=-1)


def _lead(draw: ImageDraw.ImageDraw, chip: np.ndarray, box: np.ndarray, colour: tuple[int, int, int]) -> None:
    """A line from a name to the nearest point of its box, if they do not touch."""
    if (chip[:2] <= box[2:] + 1).all() and (chip[2:] >= box[:2] - 1).all():
        return
    start = (chip[:2] + chip[2:]) / 2
    end = start.clip(box[:2], box[2:])
    draw.line((*start.tolist(), *end.tolist()), INK, 3)
    draw.line((*start.tolist(), *end.tolist()), colour, 1)
