"""The scan of maps so small that a block of channels keeps one in shared memory for all routes; and its gradient.

A block is a warpgroup that takes one image and 128 channels, of which each thread scans one by itself. Each map comes
from device memory once, and the step sizes of several routes are worked out once. B and C are read as they are. In the
backward, what a position has of the gradients of all routes is added up in registers: its maps must be smaller still,
since every position is unrolled.
"""

from __future__ import annotations

import functools
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
    sum_rows,
)
from msvmamba_jax.kernels.selective_scan.recurrence import LOG2_E, advance, decays, softplus, softplus_slopes
from msvmamba_jax.kernels.selective_scan.routes import along_rows
from msvmamba_jax.kernels.selective_scan.tiles import LONGEST_CHUNK, Tiles

_LARGEST = {"forward": 64, "backward": 49}  # positions of a map
_TOGETHER = 4  # positions whose gradients are finished side by side
_SUMMED = 12  # positions whose gradients of B and C are summed together; of more, results would wait in registers
_ROWS = 4  # of which a warp each sums one over channels

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
    """Whether these kernels take the problem, given the bytes of shared memory that a block can have.

    A state is kept for each line, so lines must not have several chunks. The box of a row of a single position would be
    contiguous in memory, and Pallas would copy it as one piece, past the channels of the map.
    """
    return (
        problem.states == 1
        and problem.delta_dtype is None
        and problem.width > 1
        and problem.height * problem.width <= _LARGEST[problem.direction]
        and max(problem.height, problem.width) <= LONGEST_CHUNK
        and _shared_bytes(problem) <= shared_memory
    )


def faster(problem: Problem, device: Device) -> bool:
    """Whether these kernels are expected to need less time for a problem than the others.

    Measured. With several routes, and blocks for an eighth of the multiprocessors at most, the forward takes longer
    than that of `mosaic_resident`, where warps share a path. The backward of a single route gains nothing from what is
    kept for others, and the registers that hold the sums leave room for two blocks on a multiprocessor only.
    """
    if problem.direction == "backward":
        return problem.routes > 1
    blocks = problem.batch * -(-problem.channels // THREADS)
    return problem.routes == 1 or 8 * blocks > device.multiprocessors


def _shared_bytes(problem: Problem) -> int:
    positions = problem.height * problem.width
    vector, floats = THREADS * jnp.dtype(problem.dtype).itemsize, THREADS * 4
    buffers = [positions * vector] * 2 + [floats] * 2
    if problem.direction == "forward":
        buffers.append(2 * positions * vector)
    else:
        sides = ((problem.height, problem.width), (problem.width, problem.height))
        lines = max(lines + LONGEST_CHUNK // length for lines, length in sides)  # at most: tiles may reach over the map
        chunks = problem.routes * lines
        buffers += [(positions + _ROWS) * floats, problem.routes * positions * vector, (chunks + _ROWS) * floats]
        buffers.append(COMPILER_PARAMETERS.reduction_scratch_bytes)
    return sum(size + -size % ALIGNMENT for size in buffers) + 8 * (problem.height + problem.routes + 1)


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
            h = _forward_route(block, index, out, states, h)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out, block.whole(y.at[:, index]))
        plgpu.wait_smem_to_gmem(0)

    return _call(g, body, out_type, {"y": plgpu.SMEM((2, g.height, g.width, g.block), g.dtype)}, operands)


def _forward_route(block: _Block, index: int, out: Any, states: Any, h: jax.Array) -> jax.Array:
    """The state after a route, given the one before it; writes y to `out` (h, w, channels)."""
    g, route = block.geometry, block.geometry.routes[index]
    kept = route.lines if states is None else route.count * route.depth  # tiles may have lines outside the map
    for line in ordered(kept, route.reversed):
        if states is not None:
            states[block.image, g.first_chunk[index] + line, 0, block.channels] = h
        if line < route.lines:
            h, ys = _forward_line(block, index, line, h)
            for place, value in ys:
                out[place] = value.astype(g.dtype)
    return h


def _forward_line(block: _Block, index: int, line: int, h: jax.Array) -> tuple[jax.Array, list[tuple[Place, Any]]]:
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


def scan_backward(geometry: Geometry, operands: Operands, dy: jax.Array, states: jax.Array) -> tuple[jax.Array, ...]:
    """The gradients, up to sums.

    Args:
        geometry: of the problem.
        operands: the inputs.
        dy: gradient of y (b, routes, h, w, d), in the dtype of u.
        states: those that the forward kept.

    Returns:
        du and ddelta (b, h, w, d) in the dtype of u; those of B and C as (b, blocks of channels, 2, positions or a few
        more); and those of A, D and the bias, each (b, lanes). All but the maps in float32.
    """
    g = geometry
    map_type = jax.ShapeDtypeStruct((g.batch, g.height, g.width, g.channels), g.dtype)
    positions, chunks = (count + -count % _ROWS for count in (g.height * g.width, g.first_chunk[-1]))
    of_positions = jax.ShapeDtypeStruct((g.batch, g.blocks, 2, positions), jnp.float32)
    of_channels = jax.ShapeDtypeStruct((g.batch, g.lanes), jnp.float32)
    out_type = [map_type] * 2 + [of_positions] + [of_channels] * 3

    def body(*refs: Any, **scratch: Any) -> None:
        block = _Block(g, refs, scratch)
        dy, states, du, ddelta, dBC, *dparameters = refs[_OPERANDS:]
        kept = states.at[block.image, pl.ds(0, g.first_chunk[-1]), 0, block.channels]
        plgpu.copy_gmem_to_smem(kept, scratch["states"].at[pl.ds(0, g.first_chunk[-1])], scratch["states ready"])
        for index in reversed(range(len(g.routes))):
            of_route = dy.at[block.image, index, pl.ds(0, g.height), pl.ds(0, g.width), block.channels]
            plgpu.copy_gmem_to_smem(of_route, scratch["dy"].at[index], scratch["dy ready"].at[index])
        block.await_map()
        block.keep_steps()
        plgpu.barrier_wait(scratch["states ready"])
        sums, r = _Sums({}, {}, {}), block.zeros()
        for index in reversed(range(len(g.routes))):
            plgpu.barrier_wait(scratch["dy ready"].at[index])
            for line in ordered(g.routes[index].lines, not g.routes[index].reversed):
                r = _backward_line(block, index, line, sums, r)
        parameters = _finish(block, sums, dBC)
        plgpu.commit_smem()
        for result, buffer in ((du, scratch["u"]), (ddelta, scratch["delta"])):
            plgpu.copy_smem_to_gmem(buffer, block.whole(result))
        for target, gradient in zip(dparameters, parameters, strict=True):
            target[block.image, block.channels] = gradient
        plgpu.wait_smem_to_gmem(0)

    buffers = {
        "dy": plgpu.SMEM((len(g.routes), g.height, g.width, g.block), g.dtype),
        "steps": plgpu.SMEM((positions, g.block), jnp.float32),
        "states": plgpu.SMEM((chunks, g.block), jnp.float32),
        "dy ready": plgpu.Barrier(num_arrivals=1, num_barriers=len(g.routes)),
        "states ready": plgpu.Barrier(num_arrivals=1),
    }
    return _call(g, body, out_type, buffers, operands, dy, states)


def on_the_map(geometry: Geometry, dBC: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The gradients of B and C (b, h, w, 1), float32, from those of `scan_backward`, summed over blocks."""
    g = geometry
    # Not `jnp.sum`, of which XLA makes a program before the one that takes the sums apart.
    total = functools.reduce(jnp.add, [dBC[:, block, :, : g.height * g.width] for block in range(g.blocks)])
    dB, dC = (total[:, i].reshape(g.batch, g.height, g.width, 1) for i in range(2))
    return dB, dC


class _Sums(NamedTuple):
    """Vectors for each (row, column), added up over routes."""

    dh: dict[Place, jax.Array]  # gradients with respect to the states
    dexponent: dict[Place, jax.Array]  # with respect to the exponents of the decays
    dC: dict[Place, jax.Array]  # with respect to C, for each channel

    def add(self, place: Place, *values: jax.Array) -> None:
        """Adds one value to each."""
        for sums, value in zip(self, values, strict=True):
            sums[place] = sums[place] + value if place in sums else value


def _backward_line(block: _Block, index: int, line: int, sums: _Sums, r: jax.Array) -> jax.Array:
    """The gradient with respect to the state before a line, given the one with respect to the state after it."""
    route, scratch = block.geometry.routes[index], block.scratch
    places = _places(route, line)
    dys = [scratch["dy"][index, *place].astype(jnp.float32) for place in places]
    steps = [block.kept_step(place) for place in places]
    Bs, Cs = block.b_and_c(places)
    kept = decays(steps, block.a)
    drives = [step * block.u(place) for step, place in zip(steps, places, strict=True)]
    hs = advance(scratch["states"][block.geometry.first_chunk[index] + line], kept, drives, Bs)
    for k in reversed(range(len(places))):
        dh = dys[k] * Cs[k] + r
        r = kept[k] * dh
        sums.add(places[k], dh, r * hs[k], dys[k] * hs[k + 1])
    return r


def _finish(block: _Block, sums: _Sums, dBC: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Writes the gradients of u and delta over these, sums those of B and C; returns those of A, D and the bias.

    What is to be summed over channels is written over step sizes (B) and states (C), in as many parts as these take.
    """
    g, scratch = block.geometry, block.scratch
    A = block.a * (1 / LOG2_E)
    dA = dD = dbias = block.zeros()
    places = [(row, column) for row in range(g.height) for column in range(g.width)]
    part = min(_SUMMED, scratch["states"].shape[0])
    for start in range(0, len(places), _TOGETHER):
        few = places[start : start + _TOGETHER]
        us, raws, steps = [block.u(place) for place in few], block.raws(few), [block.kept_step(p) for p in few]
        dys = [[scratch["dy"][i, *p].astype(jnp.float32) for i in range(len(g.routes))] for p in few]
        dys = [sum(each[1:], each[0]) for each in dys]
        Bs, _ = block.b_and_c(few)
        slopes = softplus_slopes(raws, steps)
        for k, (place, u, step, dy, B, slope) in enumerate(zip(few, us, steps, dys, Bs, slopes, strict=True), start):
            dh, dexponent, dC = (of_places[place] for of_places in sums)
            ddrive = dh * B
            draw = (ddrive * u + dexponent * A) * slope
            dA, dD, dbias = dexponent * step + dA, dy * u + dD, draw + dbias
            scratch["u"][place] = (ddrive * step + block.D * dy).astype(g.dtype)
            scratch["delta"][place] = draw.astype(g.dtype)
            scratch["steps"][k], scratch["states"][k % part] = dh * (step * u), dC
        end = start + len(few)
        if end % part == 0 or end == len(places):
            plgpu.commit_smem()
            first = (end - 1) // part * part
            count = end - first + -(end - first) % _ROWS
            rows = pl.ds(first, count)
            of_block = dBC.at[block.image, block.number]
            sum_rows(scratch["steps"].at[rows], of_block.at[0, rows])
            sum_rows(scratch["states"].at[pl.ds(0, count)], of_block.at[1, rows])
            if end < len(places):
                plgpu.commit_smem()  # the sums have been read
    return dA, dD, dbias


class _Block:
    """A block at work: which copies it starts, and what it knows of a place."""

    def __init__(self, geometry: Geometry, refs: Sequence[Any], scratch: dict[str, Any]):
        self.geometry, self.scratch = geometry, scratch
        operands = Operands.of(refs)
        block = lax.axis_index("block")
        self.image, self.number = lax.div(block, geometry.blocks), lax.rem(block, geometry.blocks)
        self.channels = pl.ds(self.number * geometry.block, geometry.block)
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

    def raws(self, places: Sequence[Place]) -> list[jax.Array]:
        """delta plus bias at each place."""
        return [self.scratch["delta"][place].astype(jnp.float32) + self._bias for place in places]

    def steps(self, places: Sequence[Place]) -> list[jax.Array]:
        """Step sizes at each place."""
        return softplus(self.raws(places), precise=self.geometry.dtype == jnp.float32)

    def keep_steps(self) -> None:
        """Works out all step sizes and keeps them."""

        def row(number: Any, _: Any) -> Any:
            places = [(number, column) for column in range(self.geometry.width)]
            self.keep(places, self.steps(places))
            return _

        lax.fori_loop(0, self.geometry.height, row, None)

    def keep(self, places: Sequence[Place], steps: Sequence[jax.Array]) -> None:
        """Keeps step sizes: over delta, unless there is a buffer for them."""
        for (row, column), step in zip(places, steps, strict=True):
            if "steps" in self.scratch:
                self.scratch["steps"][row * self.geometry.width + column] = step
            else:
                self.scratch["delta"][row, column] = in_place_of_delta(step, self.geometry.dtype)

    def kept_step(self, place: Place) -> jax.Array:
        """A step size that was kept."""
        if "steps" in self.scratch:
            return self.scratch["steps"][place[0] * self.geometry.width + place[1]]
        return as_step(self.scratch["delta"][place])


def _call(
    geometry: Geometry, body: Any, out_type: Any, buffers: dict[str, Any], operands: Operands, *more: jax.Array
) -> tuple[jax.Array, ...]:
    g = geometry
    buffers = {
        "u": plgpu.SMEM((g.height, g.width, g.block), g.dtype),
        "delta": plgpu.SMEM((g.height, g.width, g.block), g.dtype),
        "B": plgpu.SMEM((THREADS,), jnp.float32),
        "C": plgpu.SMEM((THREADS,), jnp.float32),
        "rows": plgpu.Barrier(num_arrivals=2, num_barriers=g.height),
        **buffers,
    }
    call = plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=buffers,
        grid=(g.batch * g.blocks,),
        grid_names=("block",),
        compiler_params=COMPILER_PARAMETERS,
    )
    return tuple(call(*jax.tree.leaves(operands), *more))


def _places(route: Tiles, line: int) -> list[Place]:
    """Of a line, in the order of travel."""
    positions = ordered(route.length, route.reversed)
    return [(line, position) if along_rows(route.route) else (position, line) for position in positions]
