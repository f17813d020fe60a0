"""The recorded inputs and outputs of single operators, and boxes to try them on."""

from __future__ import annotations

import numpy as np
import pytest


@pytest.fixture(scope="session")
def recorded(parity):
    return parity.arrays("detection/postprocess.npz")


def largest_error(found, reference: np.ndarray) -> float:
    """The largest difference relative to the largest value."""
    found = np.asarray(found)
    assert found.shape == reference.shape
    return float(np.max(np.abs(found - reference)) / np.max(np.abs(reference)))


@pytest.fixture(scope="session", name="largest_error")
def largest_error_fixture():
    return largest_error


def random_boxes(rng: np.random.Generator, *shape: int, size: float = 100.0, side: float = 40.0) -> np.ndarray:
    """Boxes (*shape, 4), some of them across the border of an image of `size` pixels."""
    centre = rng.uniform(-0.1 * size, 1.1 * size, (*shape, 2))
    half = rng.uniform(0.5, side / 2, (*shape, 2))
    return np.concatenate([centre - half, centre + half], -1).astype(np.float32)


@pytest.fixture(scope="session", name="random_boxes")
def random_boxes_fixture():
    return random_boxes
