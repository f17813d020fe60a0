"""The definition of the selective scan, position by position in NumPy float64. Slow; every implementation is tested
against it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from msvmamba_jax.kernels.selective_scan.routes import Route, visiting_order


def selective_scan_2d_reference(
    u: np.ndarray,
    delta: np.ndarray,
    A: np.ndarray,
    B: np.ndarray,
    C: np.ndarray,
    D: np.ndarray,
    delta_bias: np.ndarray,
    *,
    routes: Sequence[Route] = ("row",),
) -> np.ndarray:
    """As `selective_scan_2d`, in float64: returns (b, routes, h, w, d)."""
    batch, height, width, channels = u.shape
    u, delta, A, B, C, D, delta_bias = (np.asarray(x, np.float64) for x in (u, delta, A, B, C, D, delta_bias))
    step = np.logaddexp(delta + delta_bias, 0.0).reshape(batch, -1, channels)  # softplus
    u, B, C = (x.reshape(batch, height * width, -1) for x in (u, B, C))
    y = np.zeros((batch, len(routes), height * width, channels))
    state = np.zeros((batch, channels, A.shape[1]))
    for index, route in enumerate(routes):
        for t in visiting_order(route, height, width):
            decay = np.exp(step[:, t, :, None] * A)
            state = decay * state + (step[:, t] * u[:, t])[:, :, None] * B[:, t, None, :]
            y[:, index, t] = np.einsum("bdn,bn->bd", state, C[:, t]) + D * u[:, t]
    return y.reshape(batch, len(routes), height, width, channels)
