"""The scan of maps so small that a block of channels keeps one in shared memory for all routes.

A block is a warpgroup that takes one image and 128 channels, of which each thread scans one by itself. Each map comes
from device memory once, and the step sizes of several routes are worked out once. B and C are read as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from msvmamba_jax.kernels.selective_scan.config import Device, Problem
from msvmamba_jax.kernels.selective_scan.mosaic_block import (
    ALIGNMENT,
    COMPILER_PARAMETERS,
    THREADS,
    Geometry,
    Parameters,
    as_step,
    in_place_of_delta,
    ordered,
)
from msvmamba_jax.kernels.selective_scan.recurrence import LOG2_E, advance, decays, softplus
from msvmamba_jax.kernels.selective_scan.routes import along_rows
from msvmamba_jax.kernels.selective_scan.tiles import LONGEST_CHUNK, Tiles

_LARGEST = 64  # positions of a map, which are all unrolled

_OPERANDS = 4 + len(Parameters._fields)  # arrays of the operands

Place = tuple[Any, Any]  # row and column


class Operands(NamedTuple):
    """The inputs as these kernels take them."""

    u: jax.Array  # (b, h, w, d)
    delta: jax.Array  # (b, h, w, d), in the dtype of u
    B: jax.Array  # see `flat`
    C: jax.Array
    parameters: Parameters

    @classmethod
    def of(cls, refs: Sequence[Any]) -> Operands:
        """The first references that a kernel is given, where its first arguments are `jax.tree.leaves(operands)`."""
        u, delta, B, C, *parameters = refs[:_OPERANDS]
        return cls(u, delta, B, C, Parameters(*parameters))


def supports(problem: Problem, shared_memory: int) -> bool:
    """Whether `scan` takes the problem, given the bytes of shared memory that a block can have.

    A state is kept for each line, so lines must not have several chunks. The box of a row of a single position would be
    contiguous in memory, and Pallas would copy it as one piece, past the channels of the map.
    """
    return (
        problem.direction == "forward"
        and problem.states == 1
        and problem.delta_dtype is None
        and problem.width > 1
        and problem.height * problem.width <= _LARGEST
        and max(problem.height, problem.width) <= LONGEST_CHUNK
        and _shared_bytes(problem) <= shared_memory
    )


def faster(problem: Problem, device: Device) -> bool:
    """Whether `scan` is expected to need less time for a problem than the other kernels, if these can take it.

    Measured. `mosaic_resident`, where warps share a path, takes less time along several routes if there are blocks for
    an eighth of the multiprocessors at most, and along one if B and C would have to be filled up, see `flat`.
    """
    if problem.routes > 1:
        blocks = problem.batch * -(-problem.channels // THREADS)
        return 8 * blocks > device.multiprocessors
    return problem.batch * problem.height * problem.width >= THREADS


def _shared_bytes(problem: Problem) -> int:
    positions = problem.height * problem.width
    one_map, floats = positions * THREADS * jnp.dtype(problem.dtype).itemsize, THREADS * 4
    buffers = [one_map, one_map, 2 * one_map, floats, floats]
    return sum(size + -size % ALIGNMENT for size in buffers) + 8 * problem.height


def flat(B: jax.Array, C: jax.Array) -> tuple[jax.Array, jax.Array]:
    """B and C (b, h, w, 1) for `Operands`: all positions in a row, float32 or bfloat16.

    Where these are fewer than the threads of a block, B and C come as one array, each filled up.
    """
    if B.dtype != C.dtype or B.dtype not in (jnp.float32, jnp.bfloat16):
        B, C = B.astype(jnp.float32), C.astype(jnp.float32)
    missing = THREADS - B.size
    if missing <= 0:
        return B.reshape(-1), C.reshape(-1)
    joined = jnp.concatenate([jnp.pad(x.reshape(-1), (0, missing)) for x in (B, C)])
    return joined, joined


def scan(geometry: Geometry, operands: Operands, *, save: bool) -> tuple[jax.Array, ...]:
    """The scan of a problem that is supported: what `mosaic_kernels.scan` returns."""
    g = geometry
    out_type = [jax.ShapeDtypeStruct((g.batch, len(g.routes), g.height, g.width, g.channels), g.dtype)]
    if save:
        out_type.append(jax.ShapeDtypeStruct((g.batch, g.first_chunk[-1], 1, g.lanes), jnp.float32))

    def body(*refs: Any, **scratch: Any) -> None:
        block = _Block(g, refs, scratch)
        y, states = refs[_OPERANDS], refs[_OPERANDS + 1] if save else None
        if not along_rows(g.routes[0].route):
            block.await_map()
            if len(g.routes) > 1:
                block.keep_steps()
        h = block.zeros()
        for index in range(len(g.routes)):
            out = scratch["y"].at[index % 2]
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            h = _along_route(block, index, out, states, h)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out, block.whole(y.at[:, index]))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    call = plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types={
            "u": plgpu.SMEM((g.height, g.width, g.block), g.dtype),
            "delta": plgpu.SMEM((g.height, g.width, g.block), g.dtype),
            "y": plgpu.SMEM((2, g.height, g.width, g.block), g.dtype),
            "B": plgpu.SMEM((THREADS,), jnp.float32),
            "C": plgpu.SMEM((THREADS,), jnp.float32),
            "rows": plgpu.Barrier(num_arrivals=2, num_barriers=g.height),
        },
        grid=(g.batch * g.blocks,),
        grid_names=("block",),
        compiler_params=COMPILER_PARAMETERS,
    )
    return tuple(call(*jax.tree.leaves(operands)))


def _along_route(block: _Block, index: int, out: Any, states: Any, h: jax.Array) -> jax.Array:
    """The state after a route, given the one before it; writes y to `out` (h, w, channels)."""
    g, route = block.geometry, block.geometry.routes[index]
    kept = route.lines if states is None else route.count * route.depth  # tiles may have lines outside the map
    for line in ordered(kept, route.reversed):
        if states is not None:
            states[block.image, g.first_chunk[index] + line, 0, block.channels] = h
        if line < route.lines:
            h, ys = _along_line(block, index, line, h)
            for place, value in ys:
                out[place] = value.astype(g.dtype)
    return h


def _along_line(block: _Block, index: int, line: int, h: jax.Array) -> tuple[jax.Array, list[tuple[Place, Any]]]:
    """The state after a line of a route, given the one before it, and y at each place.

    The first route starts before the whole map has come, if it goes along the rows that come one after the other.
    """
    route, chained = block.geometry.routes[index], len(block.geometry.routes) > 1
    arrives = index == 0 and along_rows(route.route)
    if arrives:
        block.await_row(line)
    places = _places(route, line)
    # All loads come first, since none can pass a store.
    us = [block.u(place) for place in places]
    steps = block.steps(places) if arrives or not chained else [block.kept_step(place) for place in places]
    Bs, Cs = block.b_and_c(places)
    drives = [step * u for step, u in zip(steps, us, strict=True)]
    hs = advance(h, decays(steps, block.a), drives, Bs)
    ys = [C * h + block.D * u for C, h, u in zip(Cs, hs[1:], us, strict=True)]
    if arrives and chained:
        block.keep(places, steps)
    return hs[-1], list(zip(places, ys, strict=True))


class _Block:
    """A block at work: which copies it starts, and what it knows of a place."""

    def __init__(self, geometry: Geometry, refs: Sequence[Any], scratch: dict[str, Any]):
        self.geometry, self.scratch = geometry, scratch
        operands = Operands.of(refs)
        block = lax.axis_index("block")
        self.image = lax.div(block, geometry.blocks)
        self.channels = pl.ds(lax.rem(block, geometry.blocks) * geometry.block, geometry.block)
        self._fetch(operands)
        self._load_b_and_c(operands)
        A, D, bias = operands.parameters
        self.a = A[0, self.channels] * LOG2_E
        self.D = D[operands.parameters.row_of_skip, self.channels]
        self._bias = bias[operands.parameters.row_of_bias, self.channels]
        plgpu.commit_smem()  # B and C are there for every thread

    def _fetch(self, operands: Operands) -> None:
        """Starts the copies of u and delta, row by row, from the end on which a first route along rows starts."""
        g = self.geometry

        def fetch(number: Any, _: Any) -> Any:
            row = g.height - 1 - number if g.routes[0].reversed else number
            for name in ("u", "delta"):
                source = getattr(operands, name).at[self.image, row, pl.ds(0, g.width), self.channels]
                plgpu.copy_gmem_to_smem(source, self.scratch[name].at[row], self.scratch["rows"].at[row])
            return _

        lax.fori_loop(0, g.height, fetch, None)

    def await_row(self, row: Any) -> None:
        """Waits for u and delta of a row."""
        plgpu.barrier_wait(self.scratch["rows"].at[row])

    def await_map(self) -> None:
        """Waits for u and delta of all rows."""
        lax.fori_loop(0, self.geometry.height, lambda row, _: self.await_row(row), None)

    def _load_b_and_c(self, operands: Operands) -> None:
        """B and C of the image, from the first of its positions on or from before, where the array ends sooner."""
        positions = self.geometry.height * self.geometry.width
        first, count = self.image * positions, self.geometry.batch * positions
        start = jnp.minimum(first, max(count - THREADS, 0))
        self._offset = first - start
        joined = count < THREADS
        for name, x, before in (("B", operands.B, 0), ("C", operands.C, THREADS if joined else 0)):
            self.scratch[name][...] = x[pl.ds(before + start, THREADS)].astype(jnp.float32)

    def whole(self, maps: Any) -> Any:
        """The block's part of an array (b, h, w, d)."""
        g = self.geometry
        return maps.at[self.image, pl.ds(0, g.height), pl.ds(0, g.width), self.channels]

    def zeros(self) -> jax.Array:
        """A vector: one float32 for each channel."""
        layout = plgpu.Layout.WG_STRIDED((self.geometry.block,), vec_size=1)
        return plgpu.layout_cast(jnp.zeros((self.geometry.block,), jnp.float32), layout)

    def u(self, place: Place) -> jax.Array:
        """u at a place, float32 as all that follows."""
        return self.scratch["u"][place].astype(jnp.float32)

    def b_and_c(self, places: Sequence[Place]) -> tuple[list[jax.Array], list[jax.Array]]:
        """B and C at each place, the same for all channels."""
        at = [self._offset + row * self.geometry.width + column for row, column in places]
        B, C = ([self.scratch[name][index] for index in at] for name in ("B", "C"))
        return B, C

    def steps(self, places: Sequence[Place]) -> list[jax.Array]:
        """Step sizes at each place."""
        raws = [self.scratch["delta"][place].astype(jnp.float32) + self._bias for place in places]
        return softplus(raws, precise=self.geometry.dtype == jnp.float32)

    def keep_steps(self) -> None:
        """Works out all step sizes and keeps them."""

        def row(number: Any, _: Any) -> Any:
            places = [(number, column) for column in range(self.geometry.width)]
            self.keep(places, self.steps(places))
            return _

        lax.fori_loop(0, self.geometry.height, row, None)

    def keep(self, places: Sequence[Place], steps: Sequence[jax.Array]) -> None:
        """Keeps step sizes in place of delta."""
        for place, step in zip(places, steps, strict=True):
            self.scratch["delta"][place] = in_place_of_delta(step, self.geometry.dtype)

    def kept_step(self, place: Place) -> jax.Array:
        """A step size that was kept."""
        return as_step(self.scratch["delta"][place])


def _places(route: Tiles, line: int) -> list[Place]:
    """Of a line, in the order of travel."""
    positions = ordered(route.length, route.reversed)
    return [(line, position) if along_rows(route.route) else (position, line) for position in positions]
