"""The forward over a small map, which is read from device memory once and stays in shared memory for all routes.

A block is a warpgroup that takes one image and 32 channels. Copies of u and delta are under way from the start; then,
for each route, the block works on four lines (rows or columns) at a time: a warp takes a line, a lane takes a channel.
A warp first finds what its line does to the state, as if entered with zero: the state that it leaves and the product
of its decays. Warps exchange these through shared memory, each works out the state that enters its line, and
scans the line once more, now truly, from decays and drives that are still in registers.

A vector is a (4, 32) array: a warp's line, a lane's channel, one float32 in each thread.
"""

from __future__ import annotations

import functools
import math
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
    RESERVED,
    ROW,
    THREADS,
    Geometry,
    Operands,
    as_step,
    in_place_of_delta,
    ordered,
)
from msvmamba_jax.kernels.selective_scan.mosaic_lines import b_and_c, chunks_of_a_line, load_words, of_lines
from msvmamba_jax.kernels.selective_scan.recurrence import LOG2_E, decays, softplus
from msvmamba_jax.kernels.selective_scan.routes import Route, along_rows
from msvmamba_jax.kernels.selective_scan.tiles import LONGEST_CHUNK, Tiles, tiles

CHANNELS = 32  # of a block: lanes of a warp
_LINES = 4  # warps of a warpgroup
_LONGEST = 40  # positions of a line whose decays, drives and u fit in registers
_SHORT, _LONG = 12, 20  # positions of a line; see `docs/selective_scan.md` for the lengths that have been measured
_AT_ONCE = 8  # positions whose step sizes are worked out side by side
_BYTES_OF_A_PAUSE = 84  # that a block reads and writes, for each multiply-add of a pause; fitted

_VECTOR = plgpu.Layout.TILED(plgpu.Tiling(((_LINES, CHANNELS), (1,))), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)
_OF_LINES = _VECTOR.reduce(1)  # (4,): all lanes of a warp hold its value
_OF_CHANNELS = _VECTOR.reduce(0)  # (32,): every warp holds them


class _Visit(NamedTuple):
    """Vectors for each position of four lines, in the order of travel."""

    kept: list[jax.Array]  # decays
    steps: list[jax.Array]
    drives: list[jax.Array]  # step u B
    Cs: list[jax.Array]
    skipped: list[jax.Array]  # D u


def supports(problem: Problem, shared_memory: int) -> bool:
    """Whether `scan` takes the problem, given the bytes of shared memory that a block can have.

    That is, if B and C have the dtype of u.
    """
    sides = (problem.height, problem.width)
    return (
        problem.direction == "forward"
        and problem.states == 1
        and problem.delta_dtype is None
        and min(sides) >= _LINES
        and max(sides) <= _LONGEST
        and _shared_bytes(problem) <= shared_memory
    )


def faster(problem: Problem, device: Device) -> bool:
    """Whether `scan` is expected to need less time for a problem than the kernel that walks over tiles.

    Measured: what each group of lines costs beside its positions pays for lines of 14 and more along several routes. It
    does not for shorter ones or a single route, unless images and channels are so few that blocks of 128 channels leave
    multiprocessors idle. Where they are far fewer still, a long path is better cut, which this kernel cannot do.
    """
    blocks = problem.batch * -(-problem.channels // THREADS)
    side = min(problem.height, problem.width)
    if (side < _SHORT or problem.routes == 1) and blocks >= device.multiprocessors:
        return False
    return side < _LONG or 8 * blocks > device.multiprocessors


def _shared_bytes(problem: Problem) -> int:
    """At most: whatever the routes, and with states."""
    height, width = problem.height, problem.width
    axes: tuple[Route, ...] = ("row", "column")
    chunks = max(chunks_of_a_line(tiles(route, height, width, LONGEST_CHUNK)) for route in axes)
    return _bytes(_buffers(height, width, jnp.dtype(problem.dtype), chunks), height)


def _bytes(buffers: dict[str, Any], height: int) -> int:
    """Of these and of barriers, as Mosaic GPU lays them out."""
    sizes = (math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in buffers.values())
    return sum(size + -size % ALIGNMENT for size in sizes) + 8 * (_padded(height) // _LINES + 1)


def _buffers(height: int, width: int, dtype: Any, chunks: int) -> dict[str, Any]:
    """In shared memory: for whole groups of rows and columns, and states of so many chunks of a line (or none)."""
    rows, columns, words = _padded(height), _padded(width), 1 if dtype == jnp.bfloat16 else 2
    # y of four lines, as they lie on the map: one copy takes them all.
    by_row, by_column = (plgpu.SMEM((*box, CHANNELS), dtype) for box in ((_LINES, width), (height, _LINES)))
    buffers = {
        "u": plgpu.SMEM((rows, columns, CHANNELS), dtype),
        "delta": plgpu.SMEM((rows, columns, CHANNELS), dtype),
        "BC": plgpu.SMEM((words, rows, width + -width % ROW), jnp.int32 if words == 1 else jnp.float32),
        "y": plgpu.RefUnion(by_row, by_column),
        "exchange": plgpu.SMEM((2, _LINES, CHANNELS), jnp.float32),
    }
    if chunks:
        buffers["states"] = plgpu.SMEM((_LINES, chunks, CHANNELS), jnp.float32)
    return buffers


class Queue(NamedTuple):
    """The blocks that start at once, if more follow: those of a multiprocessor wait for each other.

    Otherwise all of them would ask for memory at the same time, and leave it idle at others.

    Attributes:
        multiprocessors: which get a block in turn.
        blocks: that a multiprocessor works on at a time.
        pause: by which a block starts later than the one before it, in multiply-adds that wait for each other.
    """

    multiprocessors: int
    blocks: int
    pause: int


def queue_for(geometry: Geometry, shared_bytes: int, device: Device) -> Queue | None:
    """How blocks start, given the shared memory of each, which limits their number; None if too few for it to pay.

    The pause is in proportion to what a block reads and writes. For 28 x 28 positions and bfloat16 some 3,000
    multiply-adds measured best, 60 % of the time that a multiprocessor's share of the memory's bandwidth takes for it.
    """
    g = geometry
    blocks = (device.shared_memory + RESERVED) // (shared_bytes + RESERVED)
    if blocks < 2 or g.batch * -(-g.channels // CHANNELS) < 2 * blocks * device.multiprocessors:
        return None
    passed = (2 + len(g.routes)) * g.height * g.width * CHANNELS * g.dtype.itemsize
    return Queue(device.multiprocessors, blocks, passed // _BYTES_OF_A_PAUSE)


def scan(geometry: Geometry, operands: Operands, device: Device, *, save: bool) -> tuple[jax.Array, ...]:
    """The scan of a problem that is supported.

    Args:
        geometry: of the problem.
        operands: the inputs, with `mosaic_lines.packed` for BC.
        device: where.
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
    chunks = max(chunks_of_a_line(route) for route in g.routes) if save else 0
    barriers = {
        "map": plgpu.Barrier(num_arrivals=2, num_barriers=_padded(g.height) // _LINES),
        "BC ready": plgpu.Barrier(num_arrivals=1),
    }
    buffers = _buffers(g.height, g.width, g.dtype, chunks)
    queue = queue_for(g, _bytes(buffers, g.height), device)

    def body(*refs: Any, **scratch: Any) -> None:
        block = _Block(g, Operands.of(refs), refs[6], refs[7] if save else None, scratch)
        if queue is not None:
            block.queue(queue)
        block.run()

    call = plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=buffers | barriers,
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
        self._zero = self._image * 0  # where a slice starts that may reach over the edge: JAX refuses a constant

    def queue(self, queue: Queue) -> None:
        """Waits for the blocks before this one on the multiprocessor, if all of them start at once."""
        block = lax.axis_index("block")
        before = lax.div(block, queue.multiprocessors)
        # The remainder makes little difference, but a number of steps that compilers do not know, and do not unroll.
        count = before * queue.pause + lax.rem(block, queue.multiprocessors)
        one = plgpu.layout_cast(jnp.ones((CHANNELS,), jnp.float32), _OF_CHANNELS)

        def wait() -> None:
            # In shared memory, so that no compiler finds that nobody needs the number.
            self._scratch["exchange"][0, 0] = lax.fori_loop(0, count, lambda _, x: 0.5 * x + 1.0, one)
            plgpu.commit_smem()  # all threads have written before one needs the place

        pl.when(before < queue.blocks)(wait)

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
        in_step = along_rows(first.route)  # the first route starts before the whole map has come
        if not in_step:
            for group in range(_padded(g.height) // _LINES):
                plgpu.barrier_wait(self._scratch["map"].at[group])
        h = plgpu.layout_cast(jnp.zeros((CHANNELS,), jnp.float32), _OF_CHANNELS)
        for index, route in enumerate(g.routes):
            h = self._along_route(index, route, in_step and index == 0, h)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def _fetch(self, backwards: bool) -> None:
        """Starts the copies to shared memory, four rows at a time, in the order of the map or against it.

        Rows and columns may lie outside the map.
        """
        rows, columns, _ = self._scratch["u"].shape
        BC: Any = self._operands.BC.at[self._image, :, pl.ds(self._zero, rows)]
        plgpu.copy_gmem_to_smem(BC, self._scratch["BC"], self._scratch["BC ready"])
        groups = rows // _LINES

        def fetch(number: Any, _: Any) -> Any:
            group = groups - 1 - number if backwards else number
            rows = pl.ds(group * _LINES, _LINES)
            for name in ("u", "delta"):
                source: Any = getattr(self._operands, name)
                source = source.at[self._image, rows, pl.ds(self._zero, columns), self._channels]
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
        groups = _padded(route.lines) // _LINES

        def group(number: Any, h: jax.Array) -> jax.Array:
            at = groups - 1 - number if route.reversed else number
            if in_step:
                plgpu.barrier_wait(self._scratch["map"].at[at])
            return self._four_lines(index, route, at * _LINES, h)

        h = lax.fori_loop(0, groups, group, h)
        if not route.reversed:
            for save in outside:
                save(h)
        return h

    def _four_lines(self, index: int, route: Tiles, first: Any, h: jax.Array) -> jax.Array:
        """The state (32,) after four lines of a route, given the one before; `first` is the first of them on the map.

        Lines outside the map pass the state on.
        """
        visit = self._positions(index, route, first)
        end, decay = self._through(visit)
        warp = plgpu.broadcasted_iota(jnp.int32, (_LINES, CHANNELS), 0, layout=_VECTOR)
        if route.lines % _LINES:
            counts = first + warp < route.lines
            end, decay = jnp.where(counts, end, 0.0), jnp.where(counts, decay, 1.0)
        exchange = self._scratch["exchange"]
        exchange[0] = end
        exchange[1] = decay
        # Every thread waits here: the last outputs have left their buffers, and what was exchanged is there.
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        state = None
        for line in ordered(_LINES, route.reversed):
            state = _spread(h, 1) if state is None else jnp.where(warp == line, _spread(h, 1), state)
            end, decay = (load_words(exchange.at[i, line], _OF_CHANNELS) for i in range(2))
            h = decay * h + end
        self._finish(route, visit, state)
        plgpu.commit_smem()
        self._write(index, route, first)
        return h

    def _through(self, visit: _Visit) -> tuple[jax.Array, jax.Array]:
        """The states that leave four lines entered with zero, and the products of decays."""
        end, total = visit.drives[0], visit.steps[0]
        for keep, step, drive in zip(visit.kept[1:], visit.steps[1:], visit.drives[1:], strict=True):
            end, total = keep * end + drive, total + step
        (decay,) = decays([total], self._a)
        return end, decay

    def _finish(self, route: Tiles, visit: _Visit, state: Any) -> None:
        """Puts y and states of four lines into their buffers, given the states that enter the lines."""
        along = along_rows(route.route)
        y = self._scratch["y"][0 if along else 1]
        for k, keep, drive, C, skip in zip(
            ordered(route.length, route.reversed), visit.kept, visit.drives, visit.Cs, visit.skipped, strict=True
        ):
            if self._states is not None and _enters_chunk(route, k):
                self._scratch["states"][:, k // route.chunk] = state
            state = keep * state + drive
            of_lines(y, along, slice(None), k)[...] = (C * state + skip).astype(self._geometry.dtype)

    def _positions(self, index: int, route: Tiles, first: Any) -> _Visit:
        """Positions of four lines from the `first` on. On the first route, step sizes are written over delta.

        All that a line needs from shared memory is loaded here, since loads cannot pass the stores of results.
        """
        visit, order = _Visit([], [], [], [], []), ordered(route.length, route.reversed)
        for start in range(0, len(order), _AT_ONCE):
            positions = order[start : start + _AT_ONCE]
            us, deltas = (
                [self._at(self._scratch[name], route, first, p, _VECTOR) for p in positions] for name in ("u", "delta")
            )
            us = [u.astype(jnp.float32) for u in us]
            if index == 0:
                raws = [delta.astype(jnp.float32) + self._bias for delta in deltas]
                steps = softplus(raws, precise=self._geometry.dtype == jnp.float32)
            else:
                steps = [as_step(delta) for delta in deltas]
            visit.kept.extend(decays(steps, self._a))
            visit.steps.extend(steps)
            for p, step, u in zip(positions, steps, us, strict=True):
                B, C = self._b_and_c(route, first, p)
                visit.drives.append(step * u * B)
                visit.Cs.append(C)
            visit.skipped.extend(self._D * u for u in us)
        if index == 0:
            for position, step in zip(order, visit.steps, strict=True):
                at = of_lines(self._scratch["delta"], along_rows(route.route), pl.ds(first, _LINES), position)
                at[...] = in_place_of_delta(step, self._geometry.dtype)
        return visit

    def _b_and_c(self, route: Tiles, first: Any, position: Any) -> tuple[jax.Array, jax.Array]:
        """B and C at a position of four lines, as vectors."""
        BC = self._scratch["BC"]
        B, C = b_and_c([self._at(BC.at[i], route, first, position, _OF_LINES) for i in range(BC.shape[0])])
        return _spread(B, 0), _spread(C, 0)

    @staticmethod
    def _at(ref: Any, route: Tiles, first: Any, position: Any, layout: Any) -> jax.Array:
        """A position of four lines from the `first` on, of a map in shared memory."""
        return load_words(of_lines(ref, along_rows(route.route), pl.ds(first, _LINES), position), layout)

    def _write(self, index: int, route: Tiles, first: Any) -> None:
        """Starts the copies of y and of the states of four lines to device memory."""
        some = route.lines % _LINES
        copy = functools.partial(self._copy_lines, index, route, first)
        if some:
            last = first + _LINES > route.lines
            pl.when(last)(functools.partial(copy, some))
            pl.when(jnp.logical_not(last))(functools.partial(copy, _LINES))
        else:
            copy(_LINES)
        plgpu.commit_smem_to_gmem_group()

    def _copy_lines(self, index: int, route: Tiles, first: Any, count: int) -> None:
        """Starts them for `count` lines.

        Columns may reach over the edge of the map. Rows may not: Pallas writes a box that is contiguous in memory, as
        that of rows is where a block has all channels, as one piece.
        """
        y = self._y.at[self._image, index]
        if along_rows(route.route):
            source = self._scratch["y"][0].at[pl.ds(0, count)]
            y = y.at[pl.ds(first, count), :, self._channels]
        else:
            source = self._scratch["y"][1]
            y = y.at[:, pl.ds(first, _LINES), self._channels]
        plgpu.copy_smem_to_gmem(source, y, commit_group=False)
        if self._states is None:
            return
        chunks, start = chunks_of_a_line(route), self._geometry.first_chunk[index]
        states = self._states.at[self._image, :, 0, self._channels]
        if self._scratch["states"].shape[1] == 1:  # otherwise those of several lines do not lie side by side
            source = self._scratch["states"].at[pl.ds(0, count), 0]
            plgpu.copy_smem_to_gmem(source, states.at[pl.ds(start + first, count)], commit_group=False)
            return
        for line in range(count):
            at = pl.ds(start + (first + line) * chunks, chunks)
            source = self._scratch["states"].at[line, pl.ds(0, chunks)]
            plgpu.copy_smem_to_gmem(source, states.at[at], commit_group=False)

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


def _padded(lines: int) -> int:
    """In whole groups of four."""
    return lines + -lines % _LINES


def _enters_chunk(route: Tiles, position: int) -> bool:
    """Whether a position of a line is the first of its chunk that the route visits."""
    if route.reversed:
        return position == route.length - 1 or position % route.chunk == route.chunk - 1
    return position % route.chunk == 0


def _spread(x: jax.Array, dimension: int) -> jax.Array:
    """A vector, from the values of its lines (dimension 0) or channels (1)."""
    return plgpu.layout_cast(lax.broadcast_in_dim(x, (_LINES, CHANNELS), (dimension,)), _VECTOR)
