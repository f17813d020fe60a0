"""RoIAlign's sampling points, one at a time in float64: the definition that faster versions are compared with."""

from __future__ import annotations

import math

import numpy as np


def points(low: float, high: float, scale: float, bins: int) -> list[np.ndarray]:
    """Coordinates of each bin's points, from the paper's words."""
    start, length = low * scale - 0.5, (high - low) * scale / bins
    count = max(math.ceil(length), 0)
    return [start + (p + (np.arange(count) + 0.5) / max(count, 1)) * length for p in range(bins)]


def bilinear(point: float, size: int) -> dict[int, float]:
    """Weights of positions for one point of an axis."""
    if not -1 <= point <= size:
        return {}
    point = min(max(point, 0), size - 1)
    low = min(int(point), size - 1)
    return {low: 1 - (point - low), **({low + 1: point - low} if low + 1 < size else {})}


def weights_by_loop(low: float, high: float, scale: float, size: int, bins: int) -> np.ndarray:
    """Weights (bins, size) of all positions in the mean over each bin's points."""
    matrix = np.zeros((bins, size))
    for p, own in enumerate(points(low, high, scale, bins)):
        for point in own:
            for position, weight in bilinear(point, size).items():
                matrix[p, position] += weight / len(own)
    return matrix
