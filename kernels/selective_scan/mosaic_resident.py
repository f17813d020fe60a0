"""The forward of several routes over a small map, which is read from device memory once and stays in shared memory.

A block is a warpgroup that takes one image and 32 channels. Copies of u and delta are under way from the start; then,
for each route, the block works on four lines (rows or columns) at a time: a warp takes a line, a lane takes a channel.
A warp first finds what its line does to the state, as if entered with zero: the state that it leaves and the product
of its decays. Warps exchange these through shared memory, each works out the state that enters its line, and
scans the line once more, now truly, from decays and drives that are still in registers.

A vector is a (4, 32) array: a warp's line, a lane's channel, one float32 in each thread.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from msvmamba_jax.kernels.selective_scan.config import Device, Problem
from msvmamba_jax.kernels.selective_scan.mosaic_block import (
    ALIGNMENT,
    COMPILER_PARAMETERS,
    ROW,
    THREADS,
    Geometry,
    Operands,
    as_step,
    in_place_of_delta,
)
from msvmamba_jax.kernels.selective_scan.mosaic_lines import b_and_c, chunks_of_a_line, load_words, of_lines
from msvmamba_jax.kernels.selective_scan.recurrence import LOG2_E, decays, softplus
from msvmamba_jax.kernels.selective_scan.routes import along_rows
from msvmamba_jax.kernels.selective_scan.tiles import Tiles

_LINES = 4  # warps of a warpgroup
CHANNELS = 32  # of a block: lanes of a warp
_LONGEST = 40  # positions of a line whose decays, drives and u fit in registers
_SHORT, _LONG = 12, 20  # positions of a line; see `docs/selective_scan.md` for the lengths that have been measured
_AT_ONCE = 8  # positions whose step sizes are worked out side by side

_VECTOR = plgpu.Layout.TILED(plgpu.Tiling(((_LINES, CHANNELS), (1,))), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)
_OF_LINES = _VECTOR.reduce(1)  # (4,): all lanes of a warp hold its value
_OF_CHANNELS = _VECTOR.reduce(0)  # (32,): every warp holds them


def supports(problem: Problem, shared_memory: int) -> bool:
    """Whether `scan` takes the problem, given the bytes of shared memory that a block can have.

    That is, if delta, B and C have the dtype of u.

    Routes are chained, so one alone would gain nothing. Groups of four lines, the last of which may overlap with the
    one before, need four lines in both directions. Pallas writes a box that is contiguous in memory as one piece: that
    of a column must not be, where it reaches over the channels of the map.
    """
    sides = (problem.height, problem.width)
    channels = problem.channels + -problem.channels % 8  # of the maps as `mosaic` fills them up
    return (
        problem.direction == "forward"
        and problem.states == 1
        and problem.routes > 1
        and min(sides) >= _LINES
        and max(sides) <= _LONGEST
        and problem.width * channels != CHANNELS
        and _shared_bytes(problem) <= shared_memory
    )


def faster(problem: Problem, device: Device) -> bool:
    """Whether `scan` is expected to need less time for a problem than the kernel that walks over tiles.

    Measured: what each group of lines costs beside its positions pays for lines of 14 and more. It does not for
    shorter ones, unless images and channels are so few that blocks of 128 channels leave multiprocessors idle. Where
    they are far fewer still, a long path is better cut, which this kernel cannot do.
    """
    blocks = problem.batch * -(-problem.channels // THREADS)
    side = min(problem.height, problem.width)
    if side < _SHORT:
        return blocks < device.multiprocessors
    return side < _LONG or 8 * blocks > device.multiprocessors


def _shared_bytes(problem: Problem) -> int:
    """At most: of several chunks of a line each has eight positions or more."""
    height, width, itemsize = problem.height, problem.width, jnp.dtype(problem.dtype).itemsize
    pitch, line = _pitch(height, width, problem.dtype), _LINES * CHANNELS
    buffers = (
        *(_groups(height) * width * line * itemsize,) * 2,
        height * (width + -width % ROW) * 2 * itemsize,
        pitch * line * itemsize,
        2 * line * 4,
        -(-pitch // 8) * line * 4,
    )
    barriers = 8 * (_groups(height) + 1)
    return sum(size + -size % ALIGNMENT for size in buffers) + barriers


def scan(geometry: Geometry, operands: Operands, *, save: bool) -> tuple[jax.Array, ...]:
    """The scan of a problem that is supported.

    Args:
        geometry: of the problem.
        operands: the inputs, with `mosaic_lines.packed` for BC.
        save: whether to keep states.

    Returns:
        As `mosaic_kernels.scan`: y (b, routes, h, w, d) and, with `save`, the states (b, chunks of the path, 1, lanes)
        before each chunk.
    """
    g = geometry
    out_type = [jax.ShapeDtypeStruct((g.batch, len(g.routes), g.height, g.width, g.channels), g.dtype)]
    if save:
        out_type.append(jax.ShapeDtypeStruct((g.batch, g.first_chunk[-1], 1, g.lanes), jnp.float32))
    blocks = -(-g.channels // CHANNELS)
    rows, pitch = _groups(g.height) * _LINES, _pitch(g.height, g.width, g.dtype)
    buffers: dict[str, Any] = {
        "u": plgpu.SMEM((rows, g.width, CHANNELS), operands.u.dtype),
        "delta": plgpu.SMEM((rows, g.width, CHANNELS), operands.delta.dtype),
        "BC": plgpu.SMEM(operands.BC.shape[1:], operands.BC.dtype),
        "y": plgpu.SMEM((_LINES, pitch, CHANNELS), g.dtype),
        "exchange": plgpu.SMEM((2, _LINES, CHANNELS), jnp.float32),
        "map": plgpu.Barrier(num_arrivals=2, num_barriers=_groups(g.height)),
        "BC ready": plgpu.Barrier(num_arrivals=1),
    }
    if save:
        chunks = max(chunks_of_a_line(route) for route in g.routes)
        buffers["states"] = plgpu.SMEM((_LINES, chunks, CHANNELS), jnp.float32)

    def body(*refs: Any, **scratch: Any) -> None:
        _Block(g, Operands.of(refs), refs[6], refs[7] if save else None, scratch).run()

    call = plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=buffers,
        grid=(g.batch * blocks,),  # blocks of an image read the same B and C at about the same time
        grid_names=("block",),
        compiler_params=COMPILER_PARAMETERS,
    )
    return tuple(call(*jax.tree.leaves(operands)))


class _Block:
    """A block at work."""

    def __init__(self, geometry: Geometry, operands: Operands, y: Any, states: Any, scratch: dict[str, Any]):
        self._geometry, self._operands, self._y, self._states, self._scratch = geometry, operands, y, states, scratch
        self._blocks = -(-geometry.channels // CHANNELS)
        block = lax.axis_index("block")
        self._image, self._number = lax.div(block, self._blocks), lax.rem(block, self._blocks)
        self._channels = pl.ds(self._number * CHANNELS, CHANNELS)

    def run(self) -> None:
        """Scans the image along all routes."""
        g = self._geometry
        first = g.routes[0]
        self._fetch(first.reversed)
        parameters = self._operands.parameters
        rows = (0, parameters.row_of_skip, parameters.row_of_bias)
        a, self._D, self._bias = (
            _spread(load_words(ref.at[row, self._channels], _OF_CHANNELS), 1)
            for ref, row in zip(parameters, rows, strict=True)
        )
        self._a = a * LOG2_E
        if self._states is not None:
            self._clear_surplus_lanes()
        plgpu.barrier_wait(self._scratch["BC ready"])
        # The first route starts before the whole map has come, if its groups of lines are those of the copies.
        in_step = along_rows(first.route) and g.height % _LINES == 0
        if not in_step:
            for group in range(_groups(g.height)):
                plgpu.barrier_wait(self._scratch["map"].at[group])
        h = plgpu.layout_cast(jnp.zeros((CHANNELS,), jnp.float32), _OF_CHANNELS)
        for index, route in enumerate(g.routes):
            h = self._along_route(index, route, in_step and index == 0, h)
        plgpu.wait_smem_to_gmem(0)

    def _fetch(self, backwards: bool) -> None:
        """Starts the copies to shared memory, four rows at a time, in the order of the map or against it.

        The last rows may lie outside the map: the copy engine is asked for multiples of 128 bytes.
        """
        BC: Any = self._operands.BC.at[self._image]
        plgpu.copy_gmem_to_smem(BC, self._scratch["BC"], self._scratch["BC ready"])
        groups = _groups(self._geometry.height)

        def fetch(number: Any, _: Any) -> Any:
            group = groups - 1 - number if backwards else number
            rows = pl.ds(group * _LINES, _LINES)
            for name in ("u", "delta"):
                source: Any = getattr(self._operands, name).at[self._image, rows, :, self._channels]
                plgpu.copy_gmem_to_smem(source, self._scratch[name].at[rows], self._scratch["map"].at[group])
            return _

        lax.fori_loop(0, groups, fetch, None)

    def _along_route(self, index: int, route: Tiles, in_step: bool, h: jax.Array) -> jax.Array:
        """The state (32,) after a route, given the one before it."""
        kept = route.count // route.pieces * route.depth  # lines that the backward's tiles hold
        outside = [
            functools.partial(self._save_outside, self._geometry.first_chunk[index] + line)
            for line in range(route.lines, kept if self._states is not None else 0)
        ]
        if route.reversed:
            for save in outside:
                save(h)

        def group(number: Any, h: jax.Array) -> jax.Array:
            if in_step:
                at = _groups(route.lines) - 1 - number if route.reversed else number
                plgpu.barrier_wait(self._scratch["map"].at[at])
            return self._four_lines(index, route, number, h)

        h = lax.fori_loop(0, _groups(route.lines), group, h)
        if not route.reversed:
            for save in outside:
                save(h)
        return h

    def _four_lines(self, index: int, route: Tiles, number: Any, h: jax.Array) -> jax.Array:
        """The state (32,) after group `number` of a route's lines, given the one before it.

        Of a last group that overlaps with the one before, the first lines have been visited: they pass the state on.
        """
        visited = jnp.minimum(number * _LINES, route.lines - _LINES)  # lines before the first of this group
        again = number * _LINES - visited
        first = route.lines - _LINES - visited if route.reversed else visited
        warps = range(_LINES - 1, -1, -1) if route.reversed else range(_LINES)  # in the order of travel
        order = range(route.length - 1, -1, -1) if route.reversed else range(route.length)

        new = None  # which lines are not visited again
        if route.lines % _LINES:
            rank = plgpu.broadcasted_iota(jnp.int32, (_LINES, CHANNELS), 0, layout=_VECTOR)
            rank = _LINES - 1 - rank if route.reversed else rank
            new = rank >= again
        kept, drives, Cs, skipped = self._positions(index, route, first, order, new)
        end, total = drives[0], kept[0][1]
        for (keep, step), drive in zip(kept[1:], drives[1:], strict=True):
            end, total = keep * end + drive, total + step
        (decay,) = decays([total], self._a)
        if new is not None:
            end, decay = jnp.where(new, end, 0.0), jnp.where(new, decay, 1.0)

        self._scratch["exchange"][0] = end
        self._scratch["exchange"][1] = decay
        # Every thread waits here: the last outputs have left their buffers, and what was exchanged is there.
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        state = _spread(h, 1)
        warp = plgpu.broadcasted_iota(jnp.int32, (_LINES, CHANNELS), 0, layout=_VECTOR)
        for line in warps:
            if line != warps[0]:
                state = jnp.where(warp == line, _spread(h, 1), state)
            end, decay = (load_words(self._scratch["exchange"].at[i, line], _OF_CHANNELS) for i in range(2))
            h = decay * h + end

        for position, (keep, step), drive, C, skip in zip(order, kept, drives, Cs, skipped, strict=True):
            if self._states is not None and _enters_chunk(route, position):
                self._scratch["states"][:, position // route.chunk] = state
            state = keep * state + drive
            self._scratch["y"][:, position] = (C * state + skip).astype(self._geometry.dtype)
            if index == 0:
                self._keep_step(route, first, position, step)
        plgpu.commit_smem()
        for nth, line in enumerate(warps):
            copy = functools.partial(self._copy_line, index, route, line, first + line)
            if route.lines % _LINES:
                pl.when(nth >= again)(copy)
            else:
                copy()
        plgpu.commit_smem_to_gmem_group()
        return h

    def _positions(
        self, index: int, route: Tiles, first: Any, order: Sequence[int], new: jax.Array | None
    ) -> tuple[list[tuple[jax.Array, jax.Array]], list[jax.Array], list[jax.Array], list[jax.Array]]:
        """Vectors for each position of four lines from the `first` on: decays and steps, step u B, C, and D u.

        All that a line needs from shared memory is loaded here, since loads cannot pass the stores of results.
        """
        kept, drives, Cs, skipped = [], [], [], []
        for start in range(0, len(order), _AT_ONCE):
            positions = order[start : start + _AT_ONCE]
            us, deltas = (
                [self._at(self._scratch[name], route, first, p, _VECTOR) for p in positions] for name in ("u", "delta")
            )
            us = [u.astype(jnp.float32) for u in us]
            steps = [as_step(delta) for delta in deltas]
            if index == 0:
                raws = [delta.astype(jnp.float32) + self._bias for delta in deltas]
                found = softplus(raws, precise=self._geometry.dtype == jnp.float32)
                steps = found if new is None else [jnp.where(new, *pair) for pair in zip(found, steps, strict=True)]
            kept += list(zip(decays(steps, self._a), steps, strict=True))
            for p, step, u in zip(positions, steps, us, strict=True):
                B, C = self._b_and_c(route, first, p)
                drives.append(step * u * B)
                Cs.append(C)
            skipped += [self._D * u for u in us]
        return kept, drives, Cs, skipped

    def _b_and_c(self, route: Tiles, first: Any, position: int) -> tuple[jax.Array, jax.Array]:
        """B and C at a position of four lines, as vectors."""
        BC = self._scratch["BC"]
        B, C = b_and_c([self._at(BC.at[i], route, first, position, _OF_LINES) for i in range(BC.shape[0])])
        return _spread(B, 0), _spread(C, 0)

    def _keep_step(self, route: Tiles, first: Any, position: int, step: jax.Array) -> None:
        """Writes the step sizes of a position of four lines over delta, for the routes that follow."""
        at = of_lines(self._scratch["delta"], along_rows(route.route), pl.ds(first, _LINES), position)
        at[...] = in_place_of_delta(step, self._geometry.dtype)

    @staticmethod
    def _at(ref: Any, route: Tiles, first: Any, position: int, layout: Any) -> jax.Array:
        """A position of four lines from the `first` on, of a map in shared memory."""
        return load_words(of_lines(ref, along_rows(route.route), pl.ds(first, _LINES), position), layout)

    def _copy_line(self, index: int, route: Tiles, warp: int, line: Any) -> None:
        """Starts the copies of y and of the states of a line to device memory."""
        y = self._y.at[self._image, index]
        y = y.at[line, :, self._channels] if along_rows(route.route) else y.at[:, line, self._channels]
        plgpu.copy_smem_to_gmem(self._scratch["y"].at[warp, pl.ds(0, route.length)], y, commit_group=False)
        if self._states is not None:
            chunks = chunks_of_a_line(route)
            at = pl.ds(self._geometry.first_chunk[index] + line * chunks, chunks)
            states = self._states.at[self._image, at, 0, self._channels]
            plgpu.copy_smem_to_gmem(self._scratch["states"].at[warp, pl.ds(0, chunks)], states, commit_group=False)

    def _save_outside(self, chunk: int, h: jax.Array) -> None:
        """Keeps a state for a chunk outside the map, which tiles of several lines may have."""
        self._states[self._image, chunk, 0, self._channels] = h

    def _clear_surplus_lanes(self) -> None:
        """Zeroes for the channels that blocks of the backward have beyond those of the map."""
        g = self._geometry
        zero = plgpu.layout_cast(jnp.zeros((_LINES, CHANNELS), jnp.float32), _VECTOR)
        last = g.first_chunk[-1] - _LINES

        def clear(number: Any, _: Any) -> Any:
            for block in range(self._blocks, g.lanes // CHANNELS):
                chunks = pl.ds(jnp.minimum(number * _LINES, last), _LINES)
                self._states[self._image, chunks, 0, pl.ds(block * CHANNELS, CHANNELS)] = zero
            return _

        if g.lanes > self._blocks * CHANNELS:
            groups = -(-g.first_chunk[-1] // _LINES)
            pl.when(self._number == self._blocks - 1)(lambda: lax.fori_loop(0, groups, clear, None))


def _pitch(height: int, width: int, dtype: Any) -> int:
    """Positions that the buffer of y has for a line: those of a copy must start at multiples of 128 bytes."""
    together = max(1, 128 // (CHANNELS * jnp.dtype(dtype).itemsize))
    return max(height, width) + -max(height, width) % together


def _groups(lines: int) -> int:
    return -(-lines // _LINES)


def _enters_chunk(route: Tiles, position: int) -> bool:
    """Whether a position of a line is the first of its chunk that the route visits."""
    if route.reversed:
        return position == route.length - 1 or position % route.chunk == route.chunk - 1
    return position % route.chunk == 0


def _spread(x: jax.Array, dimension: int) -> jax.Array:
    """A vector, from the values of its lines (dimension 0) or channels (1)."""
    return plgpu.layout_cast(lax.broadcast_in_dim(x, (_LINES, CHANNELS), (dimension,)), _VECTOR)
