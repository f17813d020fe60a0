"""Made-up scenes for detection: the objects of `scenes`, of all sizes, that hide one another, also in crowds.

Most objects have sides of 20 to 90 pixels; a few are tiny, a few nearly fill the image. Bars that are no objects lie
over some and cut them in two. A crowd is a heap of small objects of one class that nobody would mark one by one. The
ground is the `scenes`' own with less contrast, so that a small detector learns the objects in minutes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from msvmamba_jax.data.scenes import THINGS, draw_ground, draw_line, draw_thing, lit
from msvmamba_jax.data.textures import Rng

_EMPTY, _TINY, _HUGE, _CROWD, _BAR = 0.02, 0.05, 0.04, 0.1, 0.25  # how often, of images or (tiny, huge) of objects
_CONTRAST = 0.6  # of the ground
_ATTEMPTS = 12  # to place an object
_MIN_AREA = 20  # pixels of an object that can be seen
_SEEN = 0.5  # part of an object inside the image that stays to be seen


class Instance(NamedTuple):
    """An object, or a crowd of one class.

    Attributes:
        label: index into `scenes.THINGS`.
        mask: bool (height, width), the pixels that can be seen.
        crowd: whether it is a crowd.
    """

    label: int
    mask: np.ndarray
    crowd: bool


class ObjectScene(NamedTuple):
    """A drawn scene.

    Attributes:
        image: uint8 (height, width, 3), RGB.
        instances: all objects there are, later ones in front; no pixel belongs to two.
    """

    image: np.ndarray
    instances: list[Instance]


def draw_object_scene(rng: Rng, height: int, width: int) -> ObjectScene:
    """Draws a scene with three to eight objects; a few have none.

    Args:
        rng: the only source of randomness.
        height: in pixels; likewise the width. From about 96 on most objects find a place.
        width: in pixels.
    """
    canvas = _Canvas(rng, height, width)
    crowd = rng.random() < _CROWD
    bar = rng.random() < _BAR
    for number in range(rng.integers(3, 9) if rng.random() >= _EMPTY else 0):
        label = int(rng.integers(len(THINGS)))
        if number == 0 and crowd:  # behind all others
            canvas.add(*_crowd(label, rng, height, width), label=label, crowd=True)
            continue
        for _ in range(_ATTEMPTS):
            radius = _radius(rng, min(height, width))
            centre = (rng.uniform(0.08, 0.92) * width, rng.uniform(0.08, 0.92) * height)
            colours, part = draw_thing(THINGS[label], rng, radius, centre, height, width)
            if canvas.add(colours, part, label=label):
                break
    if bar:
        colours = np.broadcast_to(rng.uniform(0, 90, 3), (height, width, 3))
        canvas.add(colours, draw_line(rng, (3, 7), height, width))
    return ObjectScene(lit(canvas.pixels, rng), canvas.instances)


class _Canvas:
    """Ground, and what lies on it so far."""

    def __init__(self, rng: Rng, height: int, width: int) -> None:
        ground, _ = draw_ground(rng, height, width)
        mean = ground.mean(axis=(0, 1))
        self.pixels = mean + _CONTRAST * (ground - mean)
        self.instances: list[Instance] = []
        self._least: list[float] = []  # pixels of each that must stay to be seen

    def add(self, colours: np.ndarray, part: np.ndarray, *, label: int | None = None, crowd: bool = False) -> bool:
        """Lays something over all else, an instance where it has a label, unless it hides too much; whether it did."""
        mask = part > 0.5
        left = [instance._replace(mask=instance.mask & ~mask) for instance in self.instances]
        if mask.sum() < _MIN_AREA or any(
            instance.mask.sum() < few for instance, few in zip(left, self._least, strict=True)
        ):
            return False
        self.pixels += part[..., None] * (colours - self.pixels)
        self.instances = left
        if label is not None:
            self.instances.append(Instance(label, mask, crowd))
            self._least.append(max(_SEEN * float(mask.sum()), _MIN_AREA))
        return True


def _radius(rng: Rng, side: int) -> float:
    """Of an object, in pixels: about half its own sides; `side` is the image's shorter one."""
    kind = rng.random()
    if kind < _TINY:
        return rng.uniform(3.5, 6)
    if kind < _TINY + _HUGE:
        return rng.uniform(0.4, 0.55) * side
    return float(np.exp(rng.uniform(np.log(11), np.log(42))))


def _crowd(label: int, rng: Rng, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Colours, and how much of every pixel is filled, of a dozen small objects in a heap."""
    colours, filled = np.zeros((height, width, 3)), np.zeros((height, width))
    middle = rng.uniform(0.25, 0.75, 2) * (width, height)
    for _ in range(rng.integers(11, 19)):
        x, y = rng.normal(middle, 13)
        new, part = draw_thing(THINGS[label], rng, rng.uniform(4.5, 8), (x, y), height, width)
        colours = np.where(filled[..., None] > 0, colours + part[..., None] * (new - colours), new)
        filled = np.maximum(filled, part)
    return colours, filled
