"""Made-up scenes whose every pixel has a true label: textured ground, and shapes that lie on it and hide one another.

Ten classes are ground ("stuff") and differ by their texture, with colours that several of them share, as the sky and
the water do. Ten are objects ("things"): eight differ by their shape, with colours that two or three share, and two are
a disc and a square again, of any colour but with a pattern. A few thin lines belong to no class. Labels have hard
edges, images soft ones.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from msvmamba_jax.data.textures import TEXTURES, Rng

NOTHING = 255  # the label of pixels that belong to no class

Range = tuple[float, float]


class Scene(NamedTuple):
    """A drawn scene.

    Attributes:
        image: uint8 (height, width, 3), RGB.
        labels: uint8 (height, width), indices into `CLASSES`, or `NOTHING`.
        instances: for every object its class and its mask, bool (height, width), of the pixels that can be seen: at
            least a third of the object's.
    """

    image: np.ndarray
    labels: np.ndarray
    instances: list[tuple[int, np.ndarray]]


class _Stuff(NamedTuple):
    """How a ground is drawn: two colours mixed by a field.

    Attributes:
        field: a key of `TEXTURES`.
        period: of the field's x, in pixels.
        squeeze: the period of its x over that of its y.
        angle: between its x and the image's rows, in radians.
        hue: of the figure, in turns.
        saturation: of the figure, in 0..1; likewise the value.
        value: brightness of the figure.
        ground: brightness of the ground over that of the figure.
        sharpness: of the step between the two.
        grain: standard deviation of the noise, of values in 0..255.
    """

    field: str
    period: Range
    squeeze: float
    angle: Range
    hue: Range
    saturation: Range
    value: Range
    ground: Range
    sharpness: float
    grain: Range


_LEVEL, _UPRIGHT, _ANY = (-0.15, 0.15), (np.pi / 2 - 0.15, np.pi / 2 + 0.15), (0, 2 * np.pi)
_STUFF = {
    "sky": _Stuff("clouds", (50, 80), 2.5, _LEVEL, (0.52, 0.62), (0.1, 0.5), (0.8, 1), (0.8, 0.95), 1.5, (1, 3)),
    "water": _Stuff("waves", (8, 13), 0.5, _UPRIGHT, (0.5, 0.64), (0.3, 0.7), (0.6, 1), (0.5, 0.75), 1.5, (2, 6)),
    "grass": _Stuff("clouds", (6, 8), 0.25, _LEVEL, (0.2, 0.38), (0.4, 0.8), (0.6, 1), (0.35, 0.55), 2, (4, 9)),
    "leaves": _Stuff("dots", (6, 9), 1.0, _ANY, (0.2, 0.4), (0.4, 0.8), (0.6, 1), (0.3, 0.5), 3, (4, 9)),
    "bricks": _Stuff("bricks", (6, 9), 1.0, _LEVEL, (0.0, 0.08), (0.4, 0.8), (0.5, 0.8), (1.25, 1.7), 6, (3, 9)),
    "planks": _Stuff("stripes", (9, 15), 1.0, _UPRIGHT, (0.03, 0.11), (0.3, 0.7), (0.6, 1), (0.5, 0.7), 1.5, (3, 7)),
    "sand": _Stuff("clouds", (2, 3), 1.0, _ANY, (0.07, 0.14), (0.2, 0.5), (0.8, 1), (0.7, 0.85), 1, (8, 14)),
    "tiles": _Stuff("grid", (11, 17), 1.0, _LEVEL, (0, 1), (0, 0.3), (0.3, 0.5), (1.6, 2), 6, (1, 5)),
    "checks": _Stuff("checks", (9, 14), 1.0, _ANY, (0, 1), (0.1, 0.6), (0.7, 1), (0.3, 0.6), 8, (1, 5)),
    "gravel": _Stuff("triangles", (7, 10), 1.0, _ANY, (0, 1), (0, 0.2), (0.6, 1), (0.3, 0.5), 3, (4, 9)),
}


def _disc(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return 1 - np.hypot(u, v)


def _square(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return 0.85 - np.maximum(np.abs(u), np.abs(v))


def _triangle(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return 0.55 - np.maximum(v, np.abs(u) * np.sqrt(0.75) - v / 2)


def _star(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Five points: between the tip of a ray and the notch beside it the border is a straight line."""
    fifth = 2 * np.pi / 5
    angle = np.abs((np.arctan2(v, u) + fifth / 2) % fifth - fifth / 2)  # from the nearest tip
    x, y = np.hypot(u, v) * np.cos(angle), np.hypot(u, v) * np.sin(angle)
    tip, notch = np.array((1.1, 0)), 0.45 * np.array((np.cos(fifth / 2), np.sin(fifth / 2)))
    along = (notch - tip) / np.linalg.norm(notch - tip)
    return y * along[0] - (x - tip[0]) * along[1]


def _cross(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    u, v = np.abs(u), np.abs(v)
    return np.maximum(np.minimum(0.32 - u, 1 - v), np.minimum(1 - u, 0.32 - v))


def _ring(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return 0.25 - np.abs(np.hypot(u, v) - 0.75)


def _crescent(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.minimum(1 - np.hypot(u, v), np.hypot(u - 0.55, v) - 0.8)


def _heart(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """The sextic (x^2 + y^2 - 1)^3 = x^2 y^3, as a height that is about 1 in the middle."""
    x, y = 1.15 * u, 0.15 - 1.15 * v
    return np.cbrt(x**2 * y**3) - (x**2 + y**2 - 1)


class _Thing(NamedTuple):
    """How an object is drawn.

    Attributes:
        shape: positive inside it, of positions in radii from its centre.
        hue: in turns.
        pattern: a key of `TEXTURES`, in a second colour; None: plain.
        periods: of the pattern in a radius.
    """

    shape: Callable[[np.ndarray, np.ndarray], np.ndarray]
    hue: Range
    pattern: str | None = None
    periods: Range = (1, 1)


_THINGS = {
    "disc": _Thing(_disc, (0.0, 0.3)),
    "square": _Thing(_square, (0.35, 0.6)),
    "triangle": _Thing(_triangle, (0.55, 0.75)),
    "star": _Thing(_star, (0.1, 0.2)),
    "cross": _Thing(_cross, (0.95, 1.1)),
    "ring": _Thing(_ring, (0.7, 0.9)),
    "crescent": _Thing(_crescent, (0.2, 0.35)),
    "heart": _Thing(_heart, (0.85, 1.0)),
    "target": _Thing(_disc, (0, 1), "rings", (1.6, 2.2)),
    "dice": _Thing(_square, (0, 1), "dots", (2.8, 3.6)),
}

STUFF, THINGS = tuple(_STUFF), tuple(_THINGS)
CLASSES = STUFF + THINGS

_MIN_AREA = 20  # pixels of an object inside the image


def draw_scene(rng: Rng, height: int, width: int) -> Scene:
    """Draws a scene.

    Args:
        rng: the only source of randomness.
        height: in pixels; likewise the width. From about 64 on objects keep their shapes.
        width: in pixels.
    """
    pixels, labels = draw_ground(rng, height, width)
    for _ in range(rng.integers(0, 3)):
        part = draw_line(rng, (1.5, 3), height, width)
        pixels += part[..., None] * (rng.uniform(0, 120, 3) - pixels)
        labels[part > 0.5] = NOTHING
    instances: list[tuple[int, np.ndarray]] = []
    least: list[float] = []  # pixels of each that must stay to be seen
    for _ in range(rng.integers(3, 8)):
        label = CLASSES.index(THINGS[rng.integers(len(THINGS))])
        radius = rng.uniform(0.16, 0.3) * min(height, width)
        x, y = rng.uniform(0.1, 0.9) * width, rng.uniform(0.1, 0.9) * height
        colours, part = draw_thing(CLASSES[label], rng, radius, (x, y), height, width)
        mask = part > 0.5
        left = [(other, seen & ~mask) for other, seen in instances]
        if mask.sum() < _MIN_AREA or any(seen.sum() < few for (_, seen), few in zip(left, least, strict=True)):
            continue
        pixels += part[..., None] * (colours - pixels)
        labels[mask] = label
        instances = [*left, (label, mask)]
        least.append(float(mask.sum()) / 3)
    return Scene(lit(pixels, rng), labels, instances)


def draw_ground(rng: Rng, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Regions of different ground: colours in 0..255, float64 (height, width, 3), and labels, uint8 (height, width)."""
    regions = _regions(rng, height, width)
    names = [STUFF[i] for i in rng.permutation(len(STUFF))[: regions.max() + 1]]
    if "sky" in names:  # above all others where there are others
        names.remove("sky")
        names.insert(0, "sky")
    pixels, labels = np.zeros((height, width, 3)), np.zeros((height, width), np.uint8)
    for region, name in enumerate(names):
        inside = regions == region
        pixels[inside] = _ground(_STUFF[name], rng, height, width)[inside]
        labels[inside] = CLASSES.index(name)
    return pixels, labels


def draw_thing(
    name: str, rng: Rng, radius: float, centre: tuple[float, float], height: int, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """An object, turned and coloured at random.

    Args:
        name: one of `THINGS`.
        radius: in pixels; its sides are about twice as long.
        centre: x and y in pixels.
        rng, height, width: see `draw_scene`.

    Returns:
        Its colours in 0..255, (height, width, 3), and how much it fills of every pixel, (height, width); float64.
    """
    thing = _THINGS[name]
    y, x = _positions(height, width)
    u, v = _turned((x - centre[0]) / radius, (y - centre[1]) / radius, rng.uniform(0, 2 * np.pi))
    inside = thing.shape(u, v)
    # Its distance from the border in pixels, near it: 0.5 outside to 0.5 inside is the soft edge.
    slope = np.hypot(*np.gradient(inside)) + 1e-6
    part = np.clip(0.5 + inside / slope, 0, 1)
    hue = rng.uniform(*thing.hue)
    colours = np.broadcast_to(_colour(hue, rng.uniform(0.4, 1), rng.uniform(0.5, 1)), (height, width, 3))
    if thing.pattern is not None:
        other = _colour(hue + rng.uniform(0.2, 0.8), rng.uniform(0, 1), rng.choice((0.2, 1)))
        scale = rng.uniform(*thing.periods)
        figure = TEXTURES[thing.pattern](u * scale, v * scale, rng) > 0
        colours = np.where(figure[..., None], other, colours)
    shade = 1 + rng.uniform(0.1, 0.25) * np.clip(u + v, -1.5, 1.5)
    return colours * shade[..., None] + rng.normal(0, rng.uniform(1, 5), (height, width, 1)), part


def draw_line(rng: Rng, thickness: Range, height: int, width: int) -> np.ndarray:
    """How much a straight line at a random place fills of every pixel: (height, width). Its thickness is in pixels."""
    y, x = _positions(height, width)
    _, across = _turned(x - rng.uniform(0, 1) * width, y - rng.uniform(0, 1) * height, rng.uniform(0, np.pi))
    return np.clip(0.5 + rng.uniform(*thickness) / 2 - np.abs(across), 0, 1)


def lit(pixels: np.ndarray, rng: Rng) -> np.ndarray:
    """An image, uint8 (height, width, 3), of colours in 0..255 in a light that falls from a side."""
    height, width = pixels.shape[:2]
    y, x = _positions(height, width)
    light = rng.uniform(-0.3, 0.3, 2)
    pixels = pixels * (1 + light[0] * (x / width - 0.5) + light[1] * (y / height - 0.5))[..., None]
    return np.rint(pixels.clip(0, 255)).astype(np.uint8)


def _positions(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the pixels' centres, in pixels."""
    y, x = np.mgrid[:height, :width] + 0.5
    return y, x


def _turned(x: np.ndarray, y: np.ndarray, angle: float) -> tuple[np.ndarray, np.ndarray]:
    return x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)


def _colour(hue: float, saturation: float, value: float) -> np.ndarray:
    return 255 * np.array(colorsys.hsv_to_rgb(hue % 1, min(saturation, 1), min(value, 1)))


def _regions(rng: Rng, height: int, width: int) -> np.ndarray:
    """Two to four regions from top to bottom: int (height, width). Strips with curved borders, or cells."""
    y, x = _positions(height, width)
    x, y = x / width, y / height
    if rng.random() < 0.5:
        count = rng.integers(1, 4)
        heights = (np.arange(count) + rng.uniform(0.7, 1.3, count)) / (count + 1)
        regions = np.zeros((height, width), int)
        for start in heights:
            slope, swing, waves, phase = rng.uniform((-0.15, 0, 0.5, 0), (0.15, 0.06, 2, 2 * np.pi))
            regions += y > start + slope * (x - 0.5) + swing * np.sin(2 * np.pi * waves * x + phase)
        return regions
    count = rng.integers(3, 5)
    seeds = rng.uniform(0, 1, (count, 2))
    seeds = seeds[np.argsort(seeds[:, 0])]
    sway = rng.uniform(0, 2 * np.pi, 2)
    y, x = y + 0.05 * np.sin(8 * x + sway[0]), x + 0.05 * np.sin(8 * y + sway[1])
    return np.argmin([np.hypot(y - row, x - column) for row, column in seeds], axis=0)


def _ground(stuff: _Stuff, rng: Rng, height: int, width: int) -> np.ndarray:
    """Colours in 0..255 of a whole image of the stuff: (height, width, 3)."""
    y, x = _positions(height, width)
    x, y = _turned(x - rng.uniform(0, width), y - rng.uniform(0, height), rng.uniform(*stuff.angle))
    period = rng.uniform(*stuff.period)
    field = TEXTURES[stuff.field](x / period, y / period * stuff.squeeze, rng)
    part = 1 / (1 + np.exp(-np.clip(stuff.sharpness * (field - np.median(field)), -30, 30)))
    hue, saturation, value = rng.uniform(*stuff.hue), rng.uniform(*stuff.saturation), rng.uniform(*stuff.value)
    figure = _colour(hue, saturation, value)
    ground = _colour(hue + rng.uniform(-0.03, 0.03), saturation, value * rng.uniform(*stuff.ground))
    noise = rng.normal(0, rng.uniform(*stuff.grain), (height, width, 1))
    return ground + part[..., None] * (figure - ground) + noise
