"""Textures as scalar fields over the plane, to draw made-up images with.

Every field takes positions in periods (two arrays of one shape) and a generator for its own variations, and returns an
array of that shape, about -1..1: positive is the figure, negative the ground.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Rng = np.random.Generator


def _cell(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Offsets in -0.5..0.5 from the centres of a grid of unit cells, every other row shifted."""
    row = np.floor(y)
    x = x + 0.5 * (row % 2)
    return x - np.floor(x) - 0.5, y - row - 0.5


def _stripes(x: np.ndarray, y: np.ndarray, rng: Rng) -> np.ndarray:
    return np.sin(2 * np.pi * x)


def _waves(x: np.ndarray, y: np.ndarray, rng: Rng) -> np.ndarray:
    return np.sin(2 * np.pi * (x + 0.35 * np.sin(2 * np.pi * y / rng.uniform(1.5, 2.5))))


def _checks(x: np.ndarray, y: np.ndarray, rng: Rng) -> np.ndarray:
    return np.sin(np.pi * x) * np.sin(np.pi * y) * 2


def _dots(x: np.ndarray, y: np.ndarray, rng: Rng) -> np.ndarray:
    u, v = _cell(x, y)
    return (rng.uniform(0.26, 0.36) - np.hypot(u, v)) * 8


def _rings(x: np.ndarray, y: np.ndarray, rng: Rng) -> np.ndarray:
    return np.sin(2 * np.pi * np.hypot(x, y))


def _spirals(x: np.ndarray, y: np.ndarray, rng: Rng) -> np.ndarray:
    arms = int(rng.integers(2, 4)) * rng.choice((-1, 1))
    return np.sin(2 * np.pi * np.hypot(x, y) * 0.7 + arms * np.arctan2(y, x))


def _rays(x: np.ndarray, y: np.ndarray, rng: Rng) -> np.ndarray:
    return np.sin(rng.integers(7, 14) * np.arctan2(y, x))


def _triangles(x: np.ndarray, y: np.ndarray, rng: Rng) -> np.ndarray:
    u, v = _cell(x, y)
    return (np.minimum(0.4 - 2 * np.abs(u) + (v - 0.4) + 0.4, v + 0.35)) * 6


def _bricks(x: np.ndarray, y: np.ndarray, rng: Rng) -> np.ndarray:
    u, v = _cell(x / 2, y)
    joint = rng.uniform(0.07, 0.12)
    return np.minimum(1 - 2 * np.abs(u) - joint, (1 - 2 * np.abs(v)) - 2 * joint) * 8


def _grid(x: np.ndarray, y: np.ndarray, rng: Rng) -> np.ndarray:
    width = rng.uniform(0.08, 0.14)
    return np.maximum(width - np.abs(x - np.round(x)), width - np.abs(y - np.round(y))) * 12


def _crosses(x: np.ndarray, y: np.ndarray, rng: Rng) -> np.ndarray:
    u, v = _cell(x, y)
    arm = np.maximum(np.minimum(0.1 - np.abs(u), 0.36 - np.abs(v)), np.minimum(0.36 - np.abs(u), 0.1 - np.abs(v)))
    return arm * 12


def _clouds(x: np.ndarray, y: np.ndarray, rng: Rng) -> np.ndarray:
    """Octaves of noise."""
    total = np.zeros_like(x)
    for octave in range(4):
        values = rng.normal(size=(64, 64)) / 1.6**octave
        u, v = x * 0.5 * 2**octave, y * 0.5 * 2**octave
        i, j = np.floor(u).astype(int), np.floor(v).astype(int)
        s, t = (a - np.floor(a) for a in (u, v))
        s, t = s * s * (3 - 2 * s), t * t * (3 - 2 * t)
        corner = [[values[(i + a) % 64, (j + b) % 64] for b in (0, 1)] for a in (0, 1)]
        total += (1 - s) * ((1 - t) * corner[0][0] + t * corner[0][1]) + s * ((1 - t) * corner[1][0] + t * corner[1][1])
    return total


TEXTURES: dict[str, Callable[[np.ndarray, np.ndarray, Rng], np.ndarray]] = {
    "bricks": _bricks,
    "checks": _checks,
    "clouds": _clouds,
    "crosses": _crosses,
    "dots": _dots,
    "grid": _grid,
    "rays": _rays,
    "rings": _rings,
    "spirals": _spirals,
    "stripes": _stripes,
    "triangles": _triangles,
    "waves": _waves,
}
"""The field of every texture, from positions x and y in periods; positive is the figure, negative the ground."""
