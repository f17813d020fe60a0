"""The selective scan in plain JAX operations: any device, any shape, memory linear in the number of positions.

The map is walked by lines (rows, or columns for the column routes). All lines advance together, one position at a
time, from a zero state, keeping the product of the decays; a short scan over the lines then yields the state that
enters each line, and the product carries it to each position. A map of h by w positions so takes about h + w dependent
steps instead of h * w, and no flipped or transposed copy of it is made.

States are handled one at a time: a channel's n states obey n independent scalar recurrences, so the scratch memory
does not grow with n.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from msvmamba_jax.kernels.selective_scan.routes import Route, ScanInputs, along_rows, is_reversed, visiting_order


class Residuals(NamedTuple):
    """What the backward needs of the forward. States are recomputed, so the inputs are enough."""

    inputs: ScanInputs


def unavailable() -> str | None:
    """Why this cannot run here: it always can."""
    return None


def refusal(inputs: ScanInputs, routes: tuple[Route, ...]) -> str | None:
    """Why this does not take a scan: it takes every one."""
    return None


def run(inputs: ScanInputs, routes: tuple[Route, ...]) -> jax.Array:
    """As `forward`, without residuals."""
    return forward(inputs, routes)[0]


def forward(inputs: ScanInputs, routes: tuple[Route, ...]) -> tuple[jax.Array, Residuals]:
    """Scans the map along `routes`, one recurrence through all of them.

    Returns:
        y (b, routes, h, w, d) in the dtype of `inputs.u`, and the residuals.
    """
    u, step = _u_and_step(inputs)
    per_state = _per_state(inputs, u.dtype)

    def add_state(y: tuple[jax.Array, ...], state: _State) -> tuple[tuple[jax.Array, ...], None]:
        decay, drive = _recurrence(u, step, state)
        entering = _entering_states(decay, drive, routes)
        return tuple(y_r + (decay * h + drive) * state.C for y_r, h in zip(y, entering, strict=True)), None

    skip = tuple(inputs.D.astype(u.dtype) * u for _ in routes)
    y, _ = lax.scan(add_state, skip, per_state, unroll=inputs.A.shape[1] == 1)
    return jnp.stack(y, axis=1).astype(inputs.u.dtype), Residuals(inputs)


def backward(residuals: Residuals, dy: jax.Array, routes: tuple[Route, ...]) -> ScanInputs:
    """The gradient of `forward` with respect to every input, given dy (b, routes, h, w, d)."""
    inputs = residuals.inputs
    u, step = _u_and_step(inputs)
    per_state = _per_state(inputs, u.dtype)
    dy_routes = tuple(dy[:, index].astype(u.dtype) for index in range(len(routes)))

    def add_state(
        carry: tuple[jax.Array, jax.Array], state: _State
    ) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array, jax.Array]]:
        du, dstep = carry
        decay, drive = _recurrence(u, step, state)
        entering = _entering_states(decay, drive, routes)
        dh = tuple(dy_r * state.C for dy_r in dy_routes)
        # With r_t the gradient that reaches h_t from later positions, r_{t-1} = decay_t (dh_t + r_t): the same
        # recurrence against the direction of travel, last route first.
        later = _entering_states(decay, tuple(decay * x for x in dh), routes, against=True)
        ddrive = sum((x + r for x, r in zip(dh, later, strict=True)), jnp.zeros_like(u))
        ddecay = sum(((x + r) * h for x, r, h in zip(dh, later, entering, strict=True)), jnp.zeros_like(u))
        dC = sum(
            (jnp.sum(dy_r * (decay * h + drive), axis=-1) for dy_r, h in zip(dy_routes, entering, strict=True)),
            jnp.zeros(u.shape[:-1], u.dtype),
        )
        dB = jnp.sum(ddrive * step * u, axis=-1)
        dA = jnp.sum(ddecay * decay * step, axis=(0, 1, 2))
        du += ddrive * step * state.B
        dstep += ddrive * u * state.B + ddecay * decay * state.A
        return (du, dstep), (dA, dB, dC)

    dy_sum = sum(dy_routes[1:], dy_routes[0])
    du = inputs.D.astype(u.dtype) * dy_sum
    (du, dstep), (dA, dB, dC) = lax.scan(add_state, (du, jnp.zeros_like(u)), per_state, unroll=inputs.A.shape[1] == 1)
    draw = dstep * jax.nn.sigmoid(_raw_step(inputs, u.dtype))
    gradients = ScanInputs(
        u=du,
        delta=draw,
        A=dA.T,
        B=jnp.moveaxis(dB, 0, -1),
        C=jnp.moveaxis(dC, 0, -1),
        D=jnp.sum(dy_sum * u, axis=(0, 1, 2)),
        delta_bias=jnp.sum(draw, axis=(0, 1, 2)),
    )
    return ScanInputs(*(g.astype(x.dtype) for g, x in zip(gradients, inputs, strict=True)))


class _Walk(NamedTuple):
    """All lines of a map after the same number of steps, each from a zero state."""

    h: jax.Array  # (b, lines, d), the state
    product: jax.Array  # (b, lines, d), of the decays so far
    entering_h: jax.Array  # (b, h, w, d), the state before each position
    entering_product: jax.Array  # (b, h, w, d)


class _State(NamedTuple):
    """One state of every channel."""

    A: jax.Array  # (d,)
    B: jax.Array  # (b, h, w, 1)
    C: jax.Array  # (b, h, w, 1)


def _u_and_step(inputs: ScanInputs) -> tuple[jax.Array, jax.Array]:
    """u and the step size delta, in the dtype of the state (float32; float64 for float64 inputs)."""
    dtype = jnp.float64 if inputs.u.dtype == jnp.float64 else jnp.float32
    return inputs.u.astype(dtype), jax.nn.softplus(_raw_step(inputs, dtype))


def _raw_step(inputs: ScanInputs, dtype: jnp.dtype) -> jax.Array:
    return inputs.delta.astype(dtype) + inputs.delta_bias.astype(dtype)


def _per_state(inputs: ScanInputs, dtype: jnp.dtype) -> _State:
    """A, B and C with the state as the leading axis, for a scan over states."""
    B, C = (jnp.moveaxis(x.astype(dtype), -1, 0)[..., None] for x in (inputs.B, inputs.C))
    return _State(A=inputs.A.astype(dtype).T, B=B, C=C)


def _recurrence(u: jax.Array, step: jax.Array, state: _State) -> tuple[jax.Array, jax.Array]:
    """Decay and drive (b, h, w, d) of h_t = decay_t h_{t-1} + drive_t."""
    return jnp.exp(step * state.A), step * state.B * u


def _entering_states(
    decay: jax.Array, drive: jax.Array | tuple[jax.Array, ...], routes: tuple[Route, ...], *, against: bool = False
) -> tuple[jax.Array, ...]:
    """The state just before each position, for each route; one recurrence through all routes.

    Args:
        decay: (b, h, w, d).
        drive: (b, h, w, d) for all routes, or one such array for each.
        routes: the orders of travel.
        against: travel backwards through the last route, then backwards through the one before it, and so on.

    Returns:
        A (b, h, w, d) array for each route, in the order of `routes`.
    """
    drives = drive if isinstance(drive, tuple) else (drive,) * len(routes)
    if decay.shape[1] * decay.shape[2] * len(routes) <= _SHORT_WALK:
        return _position_by_position(decay, drives, routes, against)
    state = jnp.zeros_like(decay[:, 0, 0])
    result: list[jax.Array] = []
    travel = list(zip(routes, drives, strict=True))
    for route, route_drive in reversed(travel) if against else travel:
        entering, state = _scan_route(decay, route_drive, state, along_rows(route), is_reversed(route) != against)
        result.append(entering)
    return tuple(reversed(result) if against else result)


_SHORT_WALK = 256
"""Up to so many steps one loop over all positions is used: little to gain from lines, and far less to compile."""


def _position_by_position(
    decay: jax.Array, drives: tuple[jax.Array, ...], routes: tuple[Route, ...], against: bool
) -> tuple[jax.Array, ...]:
    """`_entering_states` with one dependent step for each position of each route."""
    batch, height, width, channels = decay.shape
    positions = np.concatenate([visiting_order(route, height, width) for route in routes])
    places = np.stack([np.repeat(np.arange(len(routes)), height * width), positions], axis=1)
    path = jnp.asarray(places[::-1] if against else places)  # (steps, 2): index of the route, position
    decay = decay.reshape(batch, -1, channels)
    drive = jnp.stack(drives).reshape(len(routes), batch, -1, channels)

    def step(t: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        h, entering = carry
        route, position = path[t, 0], path[t, 1]
        entering = lax.dynamic_update_slice(entering, h[None, :, None], (route, 0, position, 0))
        drive_t = lax.dynamic_slice(drive, (route, 0, position, 0), (1, batch, 1, channels))[0, :, 0]
        return lax.dynamic_index_in_dim(decay, position, 1, keepdims=False) * h + drive_t, entering

    _, entering = lax.fori_loop(0, len(path), step, (jnp.zeros_like(decay[:, 0]), jnp.zeros_like(drive)))
    return tuple(entering.reshape(len(routes), batch, height, width, channels))


def _scan_route(
    decay: jax.Array, drive: jax.Array, state: jax.Array, rows: bool, backwards: bool
) -> tuple[jax.Array, jax.Array]:
    """Entering states (b, h, w, d) of one route that starts from `state` (b, d), and the state after it."""
    shape = decay.shape
    folded = min(shape[1:3]) == 1 and max(shape[1:3]) > _LONGEST_LINE
    if folded:  # a sequence: there is one line only, so cut it into lines
        rows = True
        decay, drive = _fold(decay, 1.0), _fold(drive, 0.0)
    axis = 2 if rows else 1
    zero = jnp.zeros_like(lax.index_in_dim(decay, 0, axis, keepdims=False))

    def walk(t: jax.Array, carry: _Walk) -> _Walk:
        index = decay.shape[axis] - 1 - t if backwards else t
        decay_t = lax.dynamic_index_in_dim(decay, index, axis, keepdims=False)
        drive_t = lax.dynamic_index_in_dim(drive, index, axis, keepdims=False)
        return _Walk(
            h=decay_t * carry.h + drive_t,
            product=decay_t * carry.product,
            entering_h=lax.dynamic_update_index_in_dim(carry.entering_h, carry.h, index, axis),
            entering_product=lax.dynamic_update_index_in_dim(carry.entering_product, carry.product, index, axis),
        )

    start = _Walk(zero, jnp.ones_like(zero), jnp.zeros_like(decay), jnp.zeros_like(decay))
    line = lax.fori_loop(0, decay.shape[axis], walk, start)

    def next_line(h: jax.Array, line: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        product, drive = line
        return product * h + drive, h

    lines = (jnp.moveaxis(line.product, 1, 0), jnp.moveaxis(line.h, 1, 0))
    final, at_line_start = lax.scan(next_line, state, lines, reverse=backwards)
    at_line_start = jnp.expand_dims(jnp.moveaxis(at_line_start, 0, 1), axis)
    entering = line.entering_h + line.entering_product * at_line_start
    if folded:
        entering = entering.reshape(shape[0], -1, shape[3])[:, : shape[1] * shape[2]].reshape(shape)
    return entering, final


_LONGEST_LINE = 64
"""A sequence longer than this is folded into a square map, so that the number of dependent steps is about 2 sqrt(L)."""


def _fold(x: jax.Array, identity: float) -> jax.Array:
    """A (b, 1, L, d) or (b, L, 1, d) sequence as a near-square map, filled up with the recurrence's identity."""
    batch, height, width, channels = x.shape
    length = height * width
    columns = round(length**0.5)
    lines = -(-length // columns)
    x = x.reshape(batch, length, channels)
    x = jnp.pad(x, ((0, 0), (0, lines * columns - length), (0, 0)), constant_values=identity)
    return x.reshape(batch, lines, columns, channels)
