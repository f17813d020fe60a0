"""What a scan costs whoever computes it: bytes of device memory and operations of the special-function units."""

from __future__ import annotations

import jax.numpy as jnp

from msvmamba_jax.kernels.selective_scan.config import Direction
from msvmamba_jax.kernels.selective_scan.shapes import ScanShape

SPECIAL_FUNCTIONS_PER_CLOCK = 16
"""Of one multiprocessor, in float32, on every NVIDIA GPU from Volta to Hopper."""


def traffic(shape: ScanShape, dtype: str, direction: Direction) -> int:
    """Bytes with each input read once and each output written once.

    Forward: u, delta, B, C and the parameters are read, y of every route is written. Backward: u, delta, B, C, dy of
    every route and the parameters are read, their gradients are written. The states that a forward keeps for its
    backward are an implementation's own affair and count nowhere.
    """
    per_position = 2 * shape.elements + 2 * shape.positions * shape.states  # u, delta; B, C
    parameters = 4 * shape.channels * (shape.states + 2)  # A; D, delta_bias: float32
    size = jnp.dtype(dtype).itemsize
    if direction == "forward":
        return size * (per_position + shape.visits) + parameters
    return size * (2 * per_position + shape.visits) + 2 * parameters


def special_functions(shape: ScanShape, direction: Direction) -> int:
    """Exponentials and reciprocals, for each visit of an element.

    Forward: one exponential for the softplus (its logarithm is a polynomial) and one for each state's decay.
    Backward: the same, and one more (a reciprocal, say) for the sigmoid. Several routes count several times: an
    implementation that kept the decays of a whole map between its routes could do with fewer.
    """
    return shape.visits * (1 + shape.states + (direction == "backward"))
