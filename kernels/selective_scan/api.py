"""The selective scan as users call it: checks, and the derivative."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from msvmamba_jax.kernels.selective_scan.partitioning import vary_alike
from msvmamba_jax.kernels.selective_scan.routes import ROUTES, Route, ScanInputs
from msvmamba_jax.kernels.selective_scan.selection import choose, load


def selective_scan_2d(
    u: jax.Array,
    delta: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    D: jax.Array | None = None,
    delta_bias: jax.Array | None = None,
    *,
    routes: Sequence[Route] = ("row",),
    implementation: str | None = None,
) -> jax.Array:
    """Scans a map with input-dependent parameters along one or more routes.

    With t counting the positions in the order of the routes, the state is *not* reset between routes:

        step_t = softplus(delta_t + delta_bias)
        h_t = exp(step_t A) h_{t-1} + step_t B_t u_t        (one scalar state for each channel and state index)
        y_t = sum over states of C_t h_t, plus D u_t

    `u`, `delta`, `B` and `C` belong to positions, so several routes share them. Independent recurrences (as in VMamba's
    cross-scan) are independent calls.

    Args:
        u: input (b, h, w, d), float32 or bfloat16 (float64 where enabled).
        delta: step sizes before bias and softplus (b, h, w, d), of any floating dtype, as all that follow.
        A: (d, n), negative for a decaying state.
        B: input projection (b, h, w, n).
        C: output projection (b, h, w, n).
        D: skip connection (d,); none by default.
        delta_bias: (d,); none by default.
        routes: orders of travel, each `row`, `row_reversed`, `column` or `column_reversed`.
        implementation: a name from `implementations()`. None: the one that the environment variable MSVMAMBA_SCAN names
            when the program is traced or else the fastest that runs on the default device (`jax.default_device`, or
            a device of the default backend) and takes this scan: GPU ones take no float64, and `mosaic` takes only so
            many states as shared memory holds; neither has a second derivative. A program for the CPU of a machine with
            a GPU must therefore ask for `xla`, or be traced with a CPU as the default device.

    Returns:
        y (b, len(routes), h, w, d) in the dtype of `u`: for each route the output at every position *of the map*.
        The state is kept in float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes do not fit together, an unknown route, or an implementation that does not exist, cannot run
            here or does not take this scan.

    Source: Gu and Dao, arXiv:2312.00752, algorithm 2, with the simplified (Euler) discretisation of B; chained routes
    as in MSVMamba, arXiv:2405.14174.
    """
    inputs = _checked(u, delta, A, B, C, D, delta_bias)
    routes = tuple(routes)
    unknown = [route for route in routes if route not in ROUTES]
    if unknown or not routes:
        raise ValueError(f"routes must be one or more of {', '.join(ROUTES)}; got {list(routes)}")
    chosen = choose(implementation, inputs, routes)
    return _scan(chosen, routes, ScanInputs(*vary_alike(inputs)))


def selective_scan(
    u: jax.Array,
    delta: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    D: jax.Array | None = None,
    delta_bias: jax.Array | None = None,
    *,
    implementation: str | None = None,
) -> jax.Array:
    """Scans sequences: `selective_scan_2d` on maps of one row.

    Args:
        u: input (b, length, d), float32 or bfloat16.
        delta: step sizes before bias and softplus (b, length, d).
        A: (d, n).
        B: (b, length, n).
        C: (b, length, n).
        D: (d,); none by default.
        delta_bias: (d,); none by default.
        implementation: as for `selective_scan_2d`.

    Returns:
        y (b, length, d) in the dtype of `u`.

    Raises:
        ValueError: as `selective_scan_2d`.
    """
    if u.ndim != 3:
        raise ValueError(f"u must be (batch, length, channels); got shape {u.shape}")
    as_map = [x[:, None] for x in (u, delta, B, C)]
    y = selective_scan_2d(as_map[0], as_map[1], A, as_map[2], as_map[3], D, delta_bias, implementation=implementation)
    return y[:, 0, 0]


def _checked(
    u: jax.Array,
    delta: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    D: jax.Array | None,
    delta_bias: jax.Array | None,
) -> ScanInputs:
    if u.ndim != 4:
        raise ValueError(f"u must be (batch, height, width, channels); got shape {u.shape}")
    if A.ndim != 2:
        raise ValueError(f"A must be (channels, states); got shape {A.shape}")
    *positions, channels = u.shape
    if not all(positions) or not channels:
        raise ValueError(f"u must not be empty; got shape {u.shape}")
    states = A.shape[1]
    D = jnp.zeros(channels, A.dtype) if D is None else D
    delta_bias = jnp.zeros(channels, A.dtype) if delta_bias is None else delta_bias
    inputs = ScanInputs(u, delta, A, B, C, D, delta_bias)
    of_states, of_channels = (*positions, states), (channels,)
    shapes = (u.shape, u.shape, (channels, states), of_states, of_states, of_channels, of_channels)
    for name, array, shape in zip(ScanInputs._fields, inputs, shapes, strict=True):
        if array.shape != shape:
            raise ValueError(f"{name} must have shape {shape} to fit u {u.shape}; got {array.shape}")
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{name} must be a floating-point array; got {array.dtype}")
    return inputs


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _scan(implementation: str, routes: tuple[Route, ...], inputs: ScanInputs) -> jax.Array:
    return load(implementation).run(inputs, routes)


def _scan_forward(implementation: str, routes: tuple[Route, ...], inputs: ScanInputs) -> tuple[jax.Array, Any]:
    return load(implementation).forward(inputs, routes)


def _scan_backward(implementation: str, routes: tuple[Route, ...], residuals: Any, dy: jax.Array) -> tuple[ScanInputs]:
    return (load(implementation).backward(residuals, dy, routes),)


_scan.defvjp(_scan_forward, _scan_backward)
