"""Who takes the backward over a map in shared memory, and what is there.

The kernel is in `mosaic_resident_backward`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from msvmamba_jax.kernels.selective_scan.config import Device
from msvmamba_jax.kernels.selective_scan.mosaic_block import (
    ALIGNMENT,
    COMPILER_PARAMETERS,
    RESERVED,
    ROW,
    THREADS,
    WARPS,
    Geometry,
)
from msvmamba_jax.kernels.selective_scan.mosaic_lines import chunks_of_a_line
from msvmamba_jax.kernels.selective_scan.routes import along_rows

KEPT = 4  # values for each place
_LONGEST = 32  # positions of a line: what is known of more does not fit in registers
_MOST_ROUTES = 4  # likewise
_LONG = 20  # positions of the shorter lines from which on a single route is taken for fewer images only
_BANKS = 128  # bytes that shared memory delivers at once, and a multiple of which the copy engine is asked for
_SUMMED = 8  # channels that a thread sums up by itself, at most
_BARRIERS = 4 * 8  # bytes


class Layouts(NamedTuple):
    """How arrays lie in the registers of a warpgroup."""

    vector: Any  # (lines, channels)
    of_lines: Any  # (lines,)
    of_channels: Any  # (channels,)
    summands: Any  # (places, channels)


class Team(NamedTuple):
    """The threads of a block, and what each takes.

    Attributes:
        channels: of the block.
        together: channels of a thread.
        warpgroups: in the block.
        padded: whether there is room for rows outside the map, as there always is for columns.
    """

    channels: int
    together: int
    warpgroups: int
    padded: bool

    @property
    def lines(self) -> int:
        """That a warpgroup works on side by side."""
        return THREADS * self.together // self.channels

    def box(self, height: int, width: int, dtype: Any) -> tuple[int, int]:
        """Rows and columns of the buffer of a map: whole groups of lines, and a multiple of 128 bytes.

        If a warp works on several rows, the number of columns is odd, so that these begin in different places of shared
        memory. Mosaic GPU does not store them otherwise.
        """
        rows = height + -height % (self.lines * self.warpgroups) if self.padded else height
        rows += -rows % max(1, _BANKS // (self.channels * jnp.dtype(dtype).itemsize))
        columns = width + -width % self.lines
        return rows, columns + (self.lines > WARPS and columns % 2 == 0)

    def summed_at_once(self, places: int) -> tuple[int, int]:
        """Places whose channels a warpgroup sums up at once, at most all, and channels that a thread takes."""
        for each in (_SUMMED, _SUMMED // 2, _SUMMED // 4):
            at_once = THREADS * each // self.channels
            if 2 * each <= self.channels and at_once <= places:
                return at_once, each
        raise ValueError(f"{places} places are too few to be summed by the threads of {self}")

    def parts(self, places: int, warpgroup: Any) -> list[Any]:
        """Where the parts begin that a warpgroup sums up at once; the last may have places that others have, too."""
        at_once, _ = self.summed_at_once(places)
        rounds = -(-places // (at_once * self.warpgroups))
        numbers = [number * self.warpgroups + warpgroup for number in range(rounds)]
        return [jnp.minimum(number * at_once, places - at_once) for number in numbers]

    def layouts(self, places: int) -> Layouts:
        """Of vectors, and of what is summed up at once."""
        vector = _layout(self.lines, self.channels, self.together)
        at_once, each = self.summed_at_once(places)
        return Layouts(vector, vector.reduce(1), vector.reduce(0), _layout(at_once, self.channels, each))


def _layout(lines: int, channels: int, together: int) -> Any:
    if lines == WARPS:
        tiling = plgpu.Tiling(((lines, channels), (together,)))
        return plgpu.Layout.TILED(tiling, warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)
    tiling = plgpu.Tiling(((lines, channels), (lines // WARPS, channels), (together,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)


def team_for(geometry: Geometry, words: int, device: Device) -> Team | None:
    """Who takes a problem; None if nobody can, or if other kernels are expected to need less time.

    As measured, speed is a matter of how many warps a multiprocessor has at work. So a block takes few channels, 32
    bytes of each place, or more where the map is so small that its threads have little to do otherwise. If two blocks
    fit on a multiprocessor, there is room for rows outside the map; if only one does, there is none, and two
    warpgroups share the rows if there are enough of them.

    If there are multiprocessors enough for it, a block of bfloat16 maps takes half as many channels, and so twice as
    many lines side by side; then there is room for rows outside the map even if only one block fits.

    A single route, along which a map passes but once anyway, is taken if images and channels are few.

    Args:
        geometry: of the problem.
        words: that hold B and C of a position, see `mosaic_lines.packed`.
        device: where.
    """
    g, shared_memory = geometry, device.shared_memory
    longest, chunks = max(g.height, g.width), {chunks_of_a_line(route) for route in g.routes}
    if g.states > 1 or g.delta_dtype != g.dtype or longest > _LONGEST or len(chunks) > 1:
        return None
    if len(g.routes) > _MOST_ROUTES or (len(g.routes) == 1 and not _few(g, device)):
        return None
    if longest <= 4 and g.dtype == jnp.bfloat16:
        preferred = [Team(64, 2, 1, padded=True)]
    elif longest <= 8:
        preferred = [Team(32, 1, 1, padded=True)]
    else:
        few = 32 // g.dtype.itemsize
        preferred = [
            Team(channels, 1, warpgroups, padded)
            for channels in (few, 2 * few)
            for warpgroups, padded in ((1, True), (2, False), (1, False))
        ]
    fewer = preferred[0].channels // 2
    if longest > 4 and g.dtype == jnp.bfloat16 and g.batch * -(-g.channels // fewer) <= device.multiprocessors:
        preferred.insert(0, Team(fewer, 1, 2 if longest > THREADS // fewer else 1, padded=True))

    def fits(team: Team) -> bool:
        shared = team.padded and team.warpgroups == 1
        return shared_bytes(g, team, words) <= (shared_memory // 2 - RESERVED if shared else shared_memory)

    return next((team for team in preferred if fits(team) and _possible(g, team)), None)


def _few(geometry: Geometry, device: Device) -> bool:
    """Whether blocks of 128 channels would leave some multiprocessors idle; as measured, most if lines are long."""
    g = geometry
    blocks = g.batch * -(-g.channels // THREADS)
    return blocks * (1 if min(g.height, g.width) < _LONG else 8) < device.multiprocessors


def _possible(geometry: Geometry, team: Team) -> bool:
    """Whether rows are enough for the warpgroups, and what lies outside the map is not written.

    Pallas writes a box that is contiguous in memory as one piece, and so past the last row of a map.
    """
    g = geometry
    if not team.padded and (g.height % team.warpgroups or g.height // team.warpgroups < team.lines):
        return False
    rows, columns = team.box(g.height, g.width, g.dtype)
    return rows == g.height or columns != g.width or g.channels != team.channels


def shared_bytes(geometry: Geometry, team: Team, words: int) -> int:
    """Of a block, as Mosaic GPU lays it out, or a few more."""
    by_row = (words, geometry.width + -geometry.width % ROW)
    sizes = [
        math.prod(buffer.shape) * jnp.dtype(buffer.dtype).itemsize
        for buffer in buffers(geometry, team, by_row, jnp.int32).values()
    ]
    sizes.append(COMPILER_PARAMETERS.reduction_scratch_bytes)
    return sum(size + -size % ALIGNMENT for size in sizes) + _BARRIERS


def buffers(geometry: Geometry, team: Team, by_row: tuple[int, int], dtype: Any) -> dict[str, Any]:
    """In shared memory; of B and C, for words (1 or 2, w') of each row, of that dtype."""
    g = geometry
    rows, columns = team.box(g.height, g.width, g.dtype)
    along_columns = sum(not along_rows(route.route) for route in g.routes)
    lines = _room_for_lines(g, team)
    states = _in_copies(max(first_states(g, team)) + lines, team)
    return {
        "u": plgpu.SMEM((rows, columns, team.channels), g.dtype),
        "delta": plgpu.SMEM((rows, columns, team.channels), g.dtype),
        "dy": plgpu.SMEM((len(g.routes) + max(0, KEPT - along_columns), rows, columns, team.channels), g.dtype),
        "BC": plgpu.SMEM((by_row[0], rows, by_row[1]), dtype),
        "states": plgpu.SMEM((states, team.channels), jnp.float32),
        "r": plgpu.SMEM((len(g.routes), lines, team.channels), jnp.float32),
        "decays": plgpu.SMEM((2, lines, team.channels), jnp.float32),
    }


def first_states(geometry: Geometry, team: Team) -> list[int]:
    """Where the state before the first line of each route is kept, before those of the other lines.

    States of lines that are not cut into chunks come all at once, as they lie in memory.
    """
    if chunks_of_a_line(geometry.routes[0]) == 1:
        return geometry.first_chunk[:-1]
    return [index * _room_for_lines(geometry, team) for index in range(len(geometry.routes))]


def _room_for_lines(geometry: Geometry, team: Team) -> int:
    """Of a route: for whole groups of them."""
    rows, _ = team.box(geometry.height, geometry.width, geometry.dtype)
    return _in_copies(max(rows, geometry.width + -geometry.width % team.lines), team)


def _in_copies(lines: int, team: Team) -> int:
    """As many lines of float32 or a few more: the copy engine is asked for multiples of 128 bytes."""
    return lines + -lines % max(1, ROW // team.channels)
