"""The selective scan as Pallas Mosaic GPU kernels, for NVIDIA Hopper and newer.

A block is a warpgroup that takes one image and a block of channels along the whole path (all routes, one after the
other), its states in registers. Tiles of u and delta come in, and tiles of y go out, through asynchronous copies
between device and shared memory that run ahead of the arithmetic; a route is only a rule for the next tile's address.
Where images and channels are too few to fill the GPU, each route is cut into segments: a first kernel finds the state
that each segment leaves when entered with zero and the sum of its step sizes, from which every block of the second
kernel works out the state that enters its segment. The backward does the same from both ends.

The forward of several routes over a map that fits in shared memory has a kernel of its own, `mosaic_resident`.

The backward travels against the routes. The forward kept the state before every chunk of positions; the states in
between are recomputed. A block that takes the whole path adds up the gradients of u and delta over routes as it comes
by a position again. Sums over channels (for B and C) are taken within a block; those over blocks and images outside.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from msvmamba_jax.kernels.selective_scan import mosaic_block, mosaic_kernels, mosaic_resident
from msvmamba_jax.kernels.selective_scan.config import Device, Problem, choose, compute_capability, local_device
from msvmamba_jax.kernels.selective_scan.partitioning import by_image
from msvmamba_jax.kernels.selective_scan.recurrence import LOG2_E
from msvmamba_jax.kernels.selective_scan.routes import SHARED, Route, ScanInputs, along_rows
from msvmamba_jax.kernels.selective_scan.tiles import Tiles, tiles

_WORD = 8  # channels; the copy engine addresses 16 bytes


@dataclasses.dataclass(frozen=True)
class Config:
    """How a kernel is launched.

    What the forward keeps must not depend on it: on several devices XLA expects of each a part of what one would keep.

    Attributes:
        stages: tiles of the inputs that are in shared memory or on the way.
        parts: segments that each route is cut into; 1 leaves the path whole, in one launch.
    """

    stages: int
    parts: int


_SHARED_MEMORY = 227 * 1024  # bytes of a multiprocessor that blocks can use
_BLOCK = mosaic_block.THREADS  # channels
_POSITIONS = 16  # of a tile, about: copies of 4 or 8 KiB


def heuristic(problem: Problem, device: Device) -> Config:
    """Enough blocks for the GPU, and enough bytes on the way to each multiprocessor.

    As many stages (up to four) as let two blocks share a multiprocessor. The path stays whole if there is a block for
    every second multiprocessor, since cutting it reads the inputs twice; otherwise each route is cut for two blocks to
    a multiprocessor, but into segments of four tiles at least.
    """
    blocks = problem.batch * -(-problem.channels // _BLOCK)
    parts = 1
    if 2 * blocks < device.multiprocessors:
        wanted = -(-2 * device.multiprocessors // (blocks * problem.routes))
        parts = max(1, min(wanted, problem.height * problem.width // (4 * _POSITIONS)))
    choices = [Config(stages, parts) for stages in (4, 3, 2)]
    for share in (_SHARED_MEMORY // 2 - 1024, _SHARED_MEMORY):
        for config in choices:
            if _shared_bytes(problem, config) <= share:
                return config
    return choices[-1]


def candidates(problem: Problem, device: Device) -> list[Config]:
    """Configurations worth measuring; `mosaic_resident` has but one."""
    if mosaic_resident.supports(problem, _SHARED_MEMORY):
        return [heuristic(problem, device)]
    parts = {heuristic(problem, device).parts}
    if parts != {1}:
        parts |= {part for start in parts for part in (start // 2, start * 2)}
    found = (Config(stages, part) for stages in (2, 3, 4, 6) for part in sorted(parts))
    return [config for config in found if _shared_bytes(problem, config) <= _SHARED_MEMORY]


def _shared_bytes(problem: Problem, config: Config) -> int:
    geometry = _geometry(problem, _both_ways(problem), config)
    return mosaic_block.shared_bytes(geometry, backward=problem.direction == "backward")


def _both_ways(problem: Problem) -> tuple[Route, ...]:
    """Routes that need as much shared memory as any so many."""
    routes: tuple[Route, ...] = ("row", "column")
    return routes * -(-problem.routes // 2)


class Residuals(NamedTuple):
    """What the backward needs of the forward."""

    inputs: ScanInputs
    states: jax.Array  # see `mosaic_kernels.scan`


def unavailable() -> str | None:
    """Why this backend cannot run here, or None if it can."""
    if any((compute_capability(device) or 0) >= 9.0 for device in jax.local_devices()):
        return None
    return "it needs an NVIDIA GPU of compute capability 9.0 (Hopper) or newer"


def run(inputs: ScanInputs, routes: tuple[Route, ...]) -> jax.Array:
    """Scans the map along `routes` without keeping states: y (b, routes, h, w, d) in the dtype of `inputs.u`."""
    return _forward(inputs, routes, save=False)[0]


def forward(inputs: ScanInputs, routes: tuple[Route, ...]) -> tuple[jax.Array, Residuals]:
    """Scans the map along `routes`: y (b, routes, h, w, d) in the dtype of `inputs.u`, and the residuals."""
    y, states = _forward(inputs, routes, save=True)
    return y, Residuals(inputs, states)


def backward(residuals: Residuals, dy: jax.Array, routes: tuple[Route, ...]) -> ScanInputs:
    """The gradient of `forward` with respect to every input, given dy (b, routes, h, w, d)."""
    inputs, states = residuals
    arrays = (*_in_kernel_dtypes(inputs), states, dy)
    du, ddelta, dBC, dparameters = _launch(_backward_of_images, routes)(*arrays)
    n = inputs.A.shape[1]
    dparameters = jnp.sum(dparameters, axis=0)
    gradients = ScanInputs(
        u=du,
        delta=ddelta,
        A=dparameters[:n].T,
        B=dBC[..., :n],
        C=dBC[..., n:],
        D=dparameters[n],
        delta_bias=dparameters[n + 1],
    )
    return ScanInputs(*(g.astype(x.dtype) for g, x in zip(gradients, inputs, strict=True)))


def _forward(inputs: ScanInputs, routes: tuple[Route, ...], save: bool) -> tuple[jax.Array, ...]:
    y, *residuals = _launch(_forward_of_images, routes, save)(*_in_kernel_dtypes(inputs))
    return (y.astype(inputs.u.dtype), *residuals)


@functools.cache
def _launch(function: Callable[..., tuple[jax.Array, ...]], *options: Any) -> Callable[..., tuple[jax.Array, ...]]:
    return by_image(functools.partial(function, *options), shared=SHARED)


def _in_kernel_dtypes(inputs: ScanInputs) -> ScanInputs:
    if jnp.float64 in (x.dtype for x in inputs):
        raise ValueError("the mosaic scan computes in float32; for float64 choose implementation='xla'")
    u, delta = (x if x.dtype in (jnp.float32, jnp.bfloat16) else x.astype(jnp.float32) for x in inputs[:2])
    return inputs._replace(u=u, delta=delta)


def _forward_of_images(routes: tuple[Route, ...], save: bool, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """y, and with `save` the states."""
    inputs = ScanInputs(*arrays)
    problem = Problem.of("forward", inputs, routes)
    geometry = _geometry(problem, routes, _config(problem))
    alike = all(x.dtype == inputs.u.dtype for x in (inputs.delta, inputs.B, inputs.C))
    if alike and mosaic_resident.supports(problem, _SHARED_MEMORY):
        operands = _operands(inputs, geometry, mosaic_resident.packed(inputs))
        y, *states = mosaic_resident.scan(geometry, operands, save=save)
        return (y[..., : inputs.u.shape[-1]], *states)
    operands = _operands(inputs, geometry, _tiled(inputs, geometry))
    ends = mosaic_kernels.segment_ends(geometry, operands) if geometry.parts > 1 else None
    y, *states = mosaic_kernels.scan(geometry, operands, ends, save=save)
    return (y[..., : inputs.u.shape[-1]], *states)


def _backward_of_images(routes: tuple[Route, ...], *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """du, ddelta (b, h, w, d), dBC (b, h, w, 2n), and the gradients of A, D and the bias (b, n + 2, d)."""
    inputs = ScanInputs(*arrays[:7])
    states, dy = arrays[7:]
    problem = Problem.of("backward", inputs, routes)
    geometry = _geometry(problem, routes, _config(problem))
    operands, dy = _operands(inputs, geometry, _tiled(inputs, geometry)), _fill_up(dy, geometry.channels)
    ends = later = None
    if geometry.parts > 1:
        ends = mosaic_kernels.segment_ends(geometry, operands)
        later = mosaic_kernels.later_segment_ends(geometry, operands, dy)
    du, ddelta, dBC, dparameters = mosaic_kernels.scan_backward(geometry, operands, dy, states, ends, later)
    channels = inputs.u.shape[-1]
    du, ddelta = (_sum_over_routes(x)[..., :channels] for x in (du, ddelta))
    return du, ddelta, _sums_on_the_map(geometry, dBC), jnp.sum(dparameters, axis=1)[..., :channels]


def _config(problem: Problem) -> Config:
    return choose("mosaic", problem, local_device(), heuristic)


def _geometry(problem: Problem, routes: tuple[Route, ...], config: Config) -> mosaic_block.Geometry:
    route_tiles = tuple(tiles(route, problem.height, problem.width, _POSITIONS) for route in routes)
    channels = problem.channels + -problem.channels % _WORD
    # Pallas writes a box that is contiguous in memory as one piece, so that what reaches over the edge of the map or of
    # its channels would fall on what lies next. So choose blocks, and if need be channels, for which no such box is.
    choices = ((channels, _BLOCK), (channels, 2 * _BLOCK), (channels + _WORD, _BLOCK))
    channels, block = next(
        choice for choice in choices if not any(_spills(route, problem.width, *choice) for route in route_tiles)
    )
    return mosaic_block.Geometry(
        routes=route_tiles,
        batch=problem.batch,
        height=problem.height,
        width=problem.width,
        channels=channels,
        block=block,
        states=problem.states,
        stages=config.stages,
        parts=config.parts,
        dtype=jnp.dtype(problem.dtype),
    )


def _spills(route: Tiles, width: int, channels: int, block: int) -> bool:
    """Whether boxes of a route reach over an edge and are contiguous in a map of so many channels."""
    if route.exact and channels % block == 0:
        return False
    expected = 1
    for size, stride in ((block, 1), (route.box[1], channels), (route.box[0], width * channels)):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True


def _operands(inputs: ScanInputs, geometry: mosaic_block.Geometry, BC: jax.Array) -> mosaic_block.Operands:
    """Fills up the small arrays. The maps pass as they are, unless channels do not fill words."""
    missing = geometry.lanes - inputs.u.shape[-1]
    return mosaic_block.Operands(
        u=_fill_up(inputs.u, geometry.channels),
        delta=_fill_up(inputs.delta, geometry.channels),
        BC=BC,
        A=jnp.pad(inputs.A.astype(jnp.float32).T * LOG2_E, ((0, 0), (0, missing))),
        D=jnp.pad(inputs.D.astype(jnp.float32), (0, missing)),
        bias=jnp.pad(inputs.delta_bias.astype(jnp.float32), (0, missing)),
    )


def _tiled(inputs: ScanInputs, geometry: mosaic_block.Geometry) -> jax.Array:
    """B and C as the tiles of all routes hold them: (b, tiles of the path, rows, 32), float32."""
    BC = jnp.concatenate([inputs.B.astype(jnp.float32), inputs.C.astype(jnp.float32)], axis=-1)
    tiled = [_to_tiles(BC, route).reshape(geometry.batch, route.count, -1) for route in geometry.routes]
    tiled = [jnp.pad(x, ((0, 0), (0, 0), (0, geometry.packed - x.shape[-1]))) for x in tiled]
    return jnp.concatenate(tiled, axis=1).reshape(
        geometry.batch, -1, geometry.packed // mosaic_block.ROW, mosaic_block.ROW
    )


def _fill_up(x: jax.Array, channels: int) -> jax.Array:
    missing = channels - x.shape[-1]
    return jnp.pad(x, (*((0, 0) for _ in x.shape[:-1]), (0, missing))) if missing else x


def _sum_over_routes(x: jax.Array) -> jax.Array:
    return x[:, 0] if x.shape[1] == 1 else jnp.sum(x, axis=1, dtype=jnp.float32).astype(x.dtype)


def _sums_on_the_map(geometry: mosaic_block.Geometry, dBC: jax.Array) -> jax.Array:
    """(b, blocks of channels, chunks of the path, n, sums) -> (b, h, w, 2n), summed over blocks and routes."""
    dBC = jnp.sum(dBC, axis=1)
    total: Any = 0.0
    for route, (first, last) in zip(geometry.routes, itertools.pairwise(geometry.first_chunk), strict=True):
        x = dBC[:, first:last, :, : 2 * route.chunk].reshape(*dBC.shape[:1], last - first, -1, 2, route.chunk)
        x = jnp.transpose(x, (0, 1, 4, 3, 2))  # chunks, positions of a chunk, B or C, states
        total += _from_tiles(x.reshape(geometry.batch, route.count, route.positions, -1), route)
    return total


def _to_tiles(x: jax.Array, route: Tiles) -> jax.Array:
    """(b, h, w, m) -> (b, tiles, positions, m): small arrays as a route's tiles hold them."""
    x = x if along_rows(route.route) else jnp.swapaxes(x, 1, 2)
    lines, length = -route.lines % route.depth, -route.length % route.span
    x = jnp.pad(x, ((0, 0), (0, lines), (0, length), (0, 0)))
    x = x.reshape(x.shape[0], -1, route.depth, route.pieces, route.span, x.shape[-1])
    return jnp.swapaxes(x, 2, 3).reshape(x.shape[0], route.count, route.positions, x.shape[-1])


def _from_tiles(x: jax.Array, route: Tiles) -> jax.Array:
    """The inverse of `_to_tiles`."""
    x = x.reshape(x.shape[0], -1, route.pieces, route.depth, route.span, x.shape[-1])
    x = jnp.swapaxes(x, 2, 3).reshape(x.shape[0], -1, route.pieces * route.span, x.shape[-1])
    x = x[:, : route.lines, : route.length]
    return x if along_rows(route.route) else jnp.swapaxes(x, 1, 2)
