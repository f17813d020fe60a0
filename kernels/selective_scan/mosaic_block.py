"""What the Pallas Mosaic GPU kernels share: their geometry, and a block that walks along the path.

A block is one warpgroup that takes one image, some neighbouring channels and one segment of the path (or all of it). A
vector is one float32 for each of the block's channels, in registers.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from msvmamba_jax.kernels.selective_scan.recurrence import LOG2_E, decays, softplus
from msvmamba_jax.kernels.selective_scan.routes import along_rows
from msvmamba_jax.kernels.selective_scan.tiles import Tiles

THREADS = 128  # of a warpgroup
WARPS = 4  # of a warpgroup

# A thread reads back from shared memory only what it wrote itself; where threads exchange values, or the copy engine
# takes over, there is a fence. So none need be inserted around every single access.
COMPILER_PARAMETERS = plgpu.CompilerParams(
    approx_math=True, unsafe_no_auto_barriers=True, lowering_semantics=plgpu.LoweringSemantics.Lane
)
_FOLDED = 8  # segments whose ends are loaded at a time
ALIGNMENT = 1024  # bytes; where Mosaic GPU lets each buffer in shared memory begin
_BARRIER = 8  # bytes
_LARGEST_KEPT_STEP = 65504.0**2  # the square of the largest float16
_TINY = 1e-30
RESERVED = 1024  # bytes of shared memory that the system takes of each block
ROW = 32  # floats; the copy engine is asked for multiples of 128 bytes


@dataclasses.dataclass(frozen=True)
class Geometry:
    """What the kernels are specialised for."""

    routes: tuple[Tiles, ...]
    batch: int
    height: int
    width: int
    channels: int  # of the maps
    block: int  # channels of a block
    states: int
    stages: int  # tiles of the inputs that are in shared memory or on the way
    parts: int  # segments of a route; 1: the path is whole
    dtype: Any  # of u
    delta_dtype: Any

    @property
    def blocks(self) -> int:
        """Blocks of channels."""
        return -(-self.channels // self.block)

    @property
    def lanes(self) -> int:
        """Channels of all blocks; the last block may reach over those of the maps."""
        return self.blocks * self.block

    @property
    def segments(self) -> int:
        """Of the path."""
        return len(self.routes) * self.parts if self.parts > 1 else 1

    @property
    def merges(self) -> bool:
        """Whether the backward adds up the gradients of u and delta over routes as it goes.

        A block that takes the whole path comes by each position once for each route.
        """
        return len(self.routes) > 1 and self.parts == 1

    @property
    def positions(self) -> int:
        """Of the largest tile."""
        return max(route.positions for route in self.routes)

    @property
    def first_chunk(self) -> list[int]:
        """Number of each route's first chunk on the path, then the number of chunks of the path."""
        return [0, *itertools.accumulate(route.count * route.chunks for route in self.routes)]

    @property
    def chunks(self) -> int:
        """Of the tile with most of them."""
        return max(route.chunks for route in self.routes)

    @property
    def first_tile(self) -> list[int]:
        """Number of each route's first tile on the path, then the number of tiles of the path."""
        return [0, *itertools.accumulate(route.count for route in self.routes)]

    @property
    def packed(self) -> int:
        """Floats of a tile's B and C, in whole rows."""
        floats = 2 * self.states * self.positions
        return floats + -floats % ROW

    @property
    def sums(self) -> int:
        """Rows for a chunk's products that are to be summed over channels: two for each position, in whole warps."""
        rows = 2 * max(route.chunk for route in self.routes)
        return rows + -rows % WARPS


class Parameters(NamedTuple):
    """A, D and the bias: arrays of their own, or all three the same one, with A's rows, then D, then the bias."""

    A: jax.Array  # (n or n + 2, lanes), float32
    D: jax.Array  # (1 or n + 2, lanes), float32
    bias: jax.Array  # (1 or n + 2, lanes), float32

    @property
    def row_of_skip(self) -> int:
        """Which row of `D` D is."""
        return max(self.D.shape[0] - 2, 0)

    @property
    def row_of_bias(self) -> int:
        """Which row of `bias` the bias is."""
        return self.bias.shape[0] - 1


class Operands(NamedTuple):
    """The inputs of the scan as the kernels take them; some have the BC of `mosaic_lines`."""

    u: jax.Array  # (b, h, w, d)
    delta: jax.Array  # (b, h, w, d)
    BC: jax.Array  # (b, tiles of the path, rows, 32), float32: for each position of a tile n of B, then n of C
    parameters: Parameters

    @classmethod
    def of(cls, refs: Sequence[Any]) -> Operands:
        """The first references that a kernel is given, where its first arguments are `jax.tree.leaves(operands)`."""
        u, delta, BC, A, D, bias = refs[:6]
        return cls(u, delta, BC, Parameters(A, D, bias))


class Visits(NamedTuple):
    """A chunk's positions in the order in which the route visits them, one vector of u and of delta for each."""

    positions: list[int]
    us: list[jax.Array]
    deltas: list[jax.Array]


class Copy(NamedTuple):
    """Where a tile lies in device memory, given its number, and in shared memory, given its slot."""

    device: Callable[[Any], Any]
    shared: Callable[[Any], Any]


class Block:
    """A block at work: where it is, and what it does at a position."""

    def __init__(self, geometry: Geometry, operands: Operands, scratch: dict[str, Any]):
        self._geometry, self._operands, self._scratch = geometry, operands, scratch
        block = lax.axis_index("block")
        self.image = lax.div(block, geometry.blocks)
        self.number = lax.rem(block, geometry.blocks)
        self.channels = pl.ds(self.number * geometry.block, geometry.block)
        A, D, bias = operands.parameters
        self._bias = bias[operands.parameters.row_of_bias, self.channels]
        self.D = D[operands.parameters.row_of_skip, self.channels]
        if geometry.states == 1:
            self._a = A[0, self.channels] * LOG2_E
        else:
            self.each_state(lambda i, carry: self.put("A", carry, i, A[i, self.channels] * LOG2_E), ())

    def full(self, value: float) -> jax.Array:
        """A vector of equal values."""
        block = self._geometry.block
        layout = plgpu.Layout.WG_STRIDED((block,), vec_size=block // THREADS)
        return plgpu.layout_cast(jnp.full((block,), value, jnp.float32), layout)

    # Positions

    def visits_by_chunk(self, tiles: Tiles, slot: Any, backwards: bool) -> list[tuple[int, Visits]]:
        """The tile in `slot`, chunk by chunk. All is loaded first, since loads cannot pass the stores of results."""
        loaded = []
        for chunk in ordered(tiles.chunks, backwards):
            positions = [chunk * tiles.chunk + k for k in ordered(tiles.chunk, tiles.reversed)]
            u, delta = ([self._scratch[name][slot, tiles.place(p)] for p in positions] for name in ("u", "delta"))
            loaded.append((chunk, Visits(positions, [x.astype(jnp.float32) for x in u], delta)))
        return loaded

    def raws_and_steps(self, tiles: Tiles, tile: Any, visits: Visits) -> tuple[list[jax.Array], list[jax.Array]]:
        """delta plus bias, and its softplus: 0 outside the map, so that the state passes unchanged."""
        raws = [delta.astype(jnp.float32) + self._bias for delta in visits.deltas]
        steps = softplus(raws, precise=self._geometry.dtype == jnp.float32)
        return raws, self.masked(tiles, tile, visits, steps)

    def masked(self, tiles: Tiles, tile: Any, visits: Visits, xs: list[jax.Array]) -> list[jax.Array]:
        """The vectors, zero at positions outside the map."""
        if tiles.exact:
            return xs
        inside = [jnp.where(tiles.inside(tile, position), 1.0, 0.0) for position in visits.positions]
        return [x * keep for x, keep in zip(xs, inside, strict=True)]

    def b_and_c(self, slot: Any, visits: Visits, i: Any) -> tuple[list[jax.Array], list[jax.Array]]:
        """B and C of state i at each position, one float32 for all channels."""
        states = self._geometry.states

        def read(index: Any) -> jax.Array:
            return self._scratch["BC"][slot, lax.div(index, ROW), lax.rem(index, ROW)]

        first = [jnp.int32(2 * states * position) + i for position in visits.positions]
        return [read(index) for index in first], [read(index + states) for index in first]

    def dys(self, tiles: Tiles, slot: Any, visits: Visits) -> list[jax.Array]:
        """The gradients of y."""
        return [self._scratch["dy"][slot, tiles.place(p)].astype(jnp.float32) for p in visits.positions]

    def plus(self, xs: Sequence[jax.Array], name: str, tiles: Tiles, slot: Any, visits: Visits) -> list[jax.Array]:
        """The vectors, each plus the one of its position in another input."""
        places = [tiles.place(position) for position in visits.positions]
        return [x + self._scratch[name][slot, p].astype(jnp.float32) for x, p in zip(xs, places, strict=True)]

    # Values for each state: carried in registers if there is one, in shared memory otherwise

    def a(self, i: Any) -> jax.Array:
        """A log2(e) of state i."""
        return self._a if self._geometry.states == 1 else self._scratch["A"][i]

    def each_state(self, body: Callable[[Any, Any], Any], carry: Any) -> Any:
        """body(i, carry) for one state after the other."""
        return body(0, carry) if self._geometry.states == 1 else lax.fori_loop(0, self._geometry.states, body, carry)

    def get(self, name: str, carry: tuple[jax.Array, ...], i: Any) -> jax.Array:
        """The value of state i."""
        return carry[0] if self._geometry.states == 1 else self._scratch[name][i]

    def put(self, name: str, carry: tuple[jax.Array, ...], i: Any, value: jax.Array) -> tuple[jax.Array, ...]:
        """The carry with another value for state i."""
        if self._geometry.states == 1:
            return (value,)
        self._scratch[name][i] = value
        return carry

    def zero_states(self, name: str) -> tuple[jax.Array, ...]:
        """A carry of zeros."""
        empty = (self.full(0.0),) if self._geometry.states == 1 else ()
        return self.each_state(lambda i, carry: self.put(name, carry, i, self.full(0.0)), empty)

    def store_states(self, name: str, carry: tuple[jax.Array, ...], place: Callable[[Any], Any]) -> None:
        """Writes the value of each state i to `place(i)` in device memory."""

        def store(i: Any, _: Any) -> Any:
            place(i)[...] = self.get(name, carry, i)
            return _

        self.each_state(store, ())

    def entering(self, ends: Any, segment: Any) -> tuple[jax.Array, ...]:
        """The states that enter a segment, from the ends of those before it."""
        return self._fold("h", ends, ends, 0, segment)

    def leaving(self, ends: Any, later: Any, segment: Any) -> tuple[jax.Array, ...]:
        """The gradients that reach the end of a segment, from those after it."""
        return self._fold("r", ends, later, self._geometry.segments - 1, self._geometry.segments - 1 - segment)

    def _fold(self, name: str, ends: Any, values: Any, first: int, count: Any) -> tuple[jax.Array, ...]:
        """The states after `count` segments, from number `first` on: upwards from 0, downwards from the last."""
        start, last = self.zero_states(name), self._geometry.segments - 1
        if ends is None:
            return start

        def group(number: Any, x: jax.Array, i: Any) -> jax.Array:
            steps = [number * _FOLDED + k for k in range(_FOLDED)]
            segments = [jnp.minimum(step, last) for step in steps]
            segments = [first - segment if first else segment for segment in segments]
            # Chosen, not multiplied by zero: a NaN of a segment that does not count must not come through.
            only = lambda step, value: jnp.where(step < count, value, self.full(0.0))  # noqa: E731
            totals = [ends[self.image, segment, self._geometry.states, self.channels] for segment in segments]
            added = [values[self.image, segment, i, self.channels] for segment in segments]
            kept = decays([only(step, total) for step, total in zip(steps, totals, strict=True)], self.a(i))
            for step, keep, value in zip(steps, kept, added, strict=True):
                x = keep * x + only(step, value)
            return x

        groups = lax.div(count + _FOLDED - 1, _FOLDED)

        def fold(i: Any, carry: Any) -> Any:
            x = lax.fori_loop(0, groups, lambda number, x: group(number, x, i), self.full(0.0))
            return self.put(name, carry, i, x)

        return self.each_state(fold, start)

    # Sums over channels

    def turn(self, at: Any, i: Any) -> Any:
        """Which half of the buffer for sums takes state i of chunk `at`: never the half that was read last."""
        return lax.rem(at * self._geometry.states + i, 2)

    def sum_over_channels(
        self, tiles: Tiles, visits: Visits, dBs: list[jax.Array], dCs: list[jax.Array], half: Any, target: Any
    ) -> None:
        """Sums vectors over their channels: `target` (sums,) gets the sums of dBs, then of dCs, by position."""
        rows = self._scratch["sums"].at[half]
        for position, dB, dC in zip(visits.positions, dBs, dCs, strict=True):
            rows[position % tiles.chunk] = dB
            rows[tiles.chunk + position % tiles.chunk] = dC
        plgpu.commit_smem()
        sum_rows(rows, target)

    # Travel

    def along_path(
        self,
        against: bool,
        start: Callable[[Any], Any],
        route: Callable[[int, Tiles, Any, Any, Any], Any],
        finish: Callable[[Any, Any], None],
    ) -> None:
        """Travels along the block's segment: all routes, or a part of one.

        Args:
            against: against the direction of travel.
            start: carry at the start of a segment.
            route: takes (number of the route, its tiles, first step, number of steps, carry) to the next carry.
            finish: takes the segment and the last carry.
        """
        g = self._geometry
        if g.parts == 1:
            carry = start(0)
            for index in ordered(len(g.routes), against):
                carry = route(index, g.routes[index], 0, g.routes[index].count, carry)
            finish(0, carry)
            return
        segment = lax.axis_index("segment")
        for index, tiles in enumerate(g.routes):

            @pl.when(lax.div(segment, g.parts) == index)
            def _(index: int = index, tiles: Tiles = tiles) -> None:
                size = -(-tiles.count // g.parts)
                part = lax.rem(segment, g.parts)
                first = jnp.minimum(part * size, tiles.count)
                count = jnp.minimum(tiles.count - first, size)
                if against:  # the same tiles, counted from the other end
                    first = tiles.count - first - count
                finish(segment, route(index, tiles, first, count, start(segment)))

    def map_copy(self, tiles: Tiles, image: Any, buffer: Any) -> Copy:
        """Of the block's channels of a map (h, w, d). What lies outside the map reads as zero and is not written."""

        def device(tile: Any) -> Any:
            row, column = tiles.corner(tile)
            if tiles.depth == 1 and along_rows(tiles.route):
                return image.at[row, pl.ds(column, tiles.span), self.channels]
            if tiles.depth == 1:
                return image.at[pl.ds(row, tiles.span), column, self.channels]
            return image.at[pl.ds(row, tiles.box[0]), pl.ds(column, tiles.box[1]), self.channels]

        def shared(slot: Any) -> Any:
            tile = buffer.at[slot, pl.ds(0, tiles.positions)]
            return tile if tiles.depth == 1 else tile.reshape(*tiles.box, self._geometry.block)

        return Copy(device, shared)

    def inputs(self, index: int) -> list[Copy]:
        """Of u, delta, B and C, on route `index`."""
        tiles, first = self._geometry.routes[index], self._geometry.first_tile[index]
        return [
            self.map_copy(tiles, self._operands.u.at[self.image], self._scratch["u"]),
            self.map_copy(tiles, self._operands.delta.at[self.image], self._scratch["delta"]),
            Copy(
                lambda tile: self._operands.BC.at[self.image, first + tile], lambda slot: self._scratch["BC"].at[slot]
            ),
        ]

    def states_copy(self, index: int, states: Any) -> Copy:
        """Of the states that were kept of route `index`."""
        chunks, first = self._geometry.routes[index].chunks, self._geometry.first_chunk[index]
        return Copy(
            lambda tile: states.at[self.image, pl.ds(first + tile * chunks, chunks), :, self.channels],
            lambda slot: self._scratch["states"].at[slot, pl.ds(0, chunks)],
        )

    def walk(
        self,
        tiles: Tiles,
        against: bool,
        first: Any,
        count: Any,
        inputs: Sequence[Copy],
        outputs: Sequence[Copy],
        body: Callable[[Any, Any, Any, Any], Any],
        carry: Any,
    ) -> Any:
        """Visits `count` tiles from the `first` on, with copies to and from shared memory under way meanwhile.

        `body` takes (tile, slot of the inputs, slot of the outputs, carry) to the next carry.
        """
        stages, ready = self._geometry.stages, self._scratch[_barrier(len(inputs))]
        backwards = tiles.reversed != against

        def tile_at(step: Any) -> Any:
            return tiles.count - 1 - first - step if backwards else first + step

        def fetch(step: Any) -> None:
            slot = lax.rem(step, stages)
            for copy in inputs:
                plgpu.copy_gmem_to_smem(copy.device(tile_at(step)), copy.shared(slot), ready.at[slot])

        def visit(step: Any, carry: Any) -> Any:
            slot, out = lax.rem(step, stages), lax.rem(step, 2)
            plgpu.barrier_wait(ready.at[slot])
            if outputs:
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            carry = body(tile_at(step), slot, out, carry)
            plgpu.commit_smem()  # the outputs are written, and every thread is done with the inputs
            for copy in outputs:
                last = copy is outputs[-1]
                plgpu.copy_smem_to_gmem(copy.shared(out), copy.device(tile_at(step)), commit_group=last)
            pl.when(step + stages < count)(lambda: fetch(step + stages))
            return carry

        for step in range(stages):
            pl.when(step < count)(functools.partial(fetch, jnp.int32(step)))
        carry = lax.fori_loop(0, count, visit, carry)
        if outputs:  # out of their buffers; or in device memory, if the next route backwards reads them again
            plgpu.wait_smem_to_gmem(0, wait_read_only=not (against and self._geometry.merges))
        return carry


def in_place_of_delta(step: jax.Array, dtype: Any) -> jax.Array:
    """A step size as it may be kept where delta, of that dtype, was; `as_step` is the inverse.

    In place of a bfloat16 goes the square root as a float16: relative errors are at most 2^-10 for step sizes from 4e-9
    to 4e9, to which larger ones are cut, and smaller ones have an absolute error of at most 4e-12.
    """
    if dtype != jnp.bfloat16:
        return step
    step = jnp.minimum(step, _LARGEST_KEPT_STEP)
    root = step * lax.rsqrt(jnp.maximum(step, _TINY))  # Mosaic GPU has no square root before jax 0.11
    return lax.bitcast_convert_type(root.astype(jnp.float16), jnp.bfloat16)


def as_step(kept: jax.Array) -> jax.Array:
    """The step size, float32, of what `in_place_of_delta` made of it."""
    if kept.dtype != jnp.bfloat16:
        return kept
    root = lax.bitcast_convert_type(kept, jnp.float16).astype(jnp.float32)
    return root * root


def sum_rows(rows: Any, target: Any) -> None:
    """Sums rows (m, 128 or 256) in shared memory, m a multiple of four, to `target` (m,) in device memory."""
    # A warp takes whole rows, a thread four neighbouring channels.
    layout = plgpu.Layout.TILED(plgpu.Tiling(((WARPS, THREADS), (4,))), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)
    store_words(target, jnp.sum(plgpu.layout_cast(rows[...], layout), axis=1))


def store_words(target: Any, x: jax.Array) -> None:
    """Writes an array of which a thread has single words to device memory."""
    if hasattr(plgpu, "store"):  # from jax 0.12 on, which refuses that by default
        plgpu.store(target, x, optimized=False)
    else:
        target[...] = x


def ordered(count: int, backwards: bool) -> range:
    """Numbers from 0 on, or from the last to 0."""
    return range(count - 1, -1, -1) if backwards else range(count)


def input_buffer(geometry: Geometry, dtype: Any) -> Any:
    """For tiles of a map that come in."""
    return plgpu.SMEM((geometry.stages, geometry.positions, geometry.block), dtype)


def output_buffer(geometry: Geometry, dtype: Any) -> Any:
    """For tiles of a map that go out, while the next is written."""
    return plgpu.SMEM((2, geometry.positions, geometry.block), dtype)


def input_buffers(geometry: Geometry) -> dict[str, Any]:
    """What every kernel needs."""
    return {
        "u": input_buffer(geometry, geometry.dtype),
        "delta": input_buffer(geometry, geometry.delta_dtype),
        "BC": plgpu.SMEM((geometry.stages, geometry.packed // ROW, ROW), jnp.float32),
        **state_buffers(geometry, "A"),
    }


def state_buffers(geometry: Geometry, *names: str) -> dict[str, Any]:
    """Where values for each state are kept, unless they are in registers."""
    if geometry.states == 1:
        return {}
    return {name: plgpu.SMEM((geometry.states, geometry.block), jnp.float32) for name in names}


class Scratch(NamedTuple):
    """What a block of a kernel has in shared memory."""

    buffers: dict[str, Any]
    inputs: tuple[int, ...]  # numbers of inputs with which it walks: each has barriers of its own
    sums: bool = False  # whether it sums over channels

    def bytes(self, stages: int) -> int:
        """As Mosaic GPU lays it out."""
        sizes = (math.prod(buffer.shape) * jnp.dtype(buffer.dtype).itemsize for buffer in self.buffers.values())
        sums = (
            COMPILER_PARAMETERS.reduction_scratch_bytes if self.sums else 0
        )  # set aside even where none of it is used
        aligned = sum(size + -size % ALIGNMENT for size in (*sizes, sums))
        return aligned + _BARRIER * stages * len(self.inputs)


def kernel(geometry: Geometry, body: Callable[..., None], out_type: Any, scratch: Scratch) -> Callable[..., Any]:
    """A kernel with a block for each image, block of channels and segment.

    Args:
        geometry: of the problem.
        body: takes references to the arrays and results, and those to the buffers as the dictionary `scratch`.
        out_type: of the results.
        scratch: in shared memory.
    """
    barriers = {_barrier(n): plgpu.Barrier(num_arrivals=n, num_barriers=geometry.stages) for n in scratch.inputs}
    return plgpu.kernel(
        lambda *refs, **buffers: body(*refs, scratch=buffers),
        out_type=out_type,
        scratch_types=scratch.buffers | barriers,
        # The last axis becomes CUDA's x, the only one that may be longer than 65535 and the one that advances first. So
        # images lie on it, and blocks of channels within an image: these read the same B and C, and maps whose channels
        # lie side by side in memory, at about the same time, so that the second finds them in the L2 cache.
        grid=(geometry.segments, geometry.batch * geometry.blocks),
        grid_names=("segment", "block"),
        compiler_params=COMPILER_PARAMETERS,
    )


def _barrier(inputs: int) -> str:
    """Of the slots that so many copies fill."""
    return f"{inputs} inputs"
