"""The gradient, mostly of several routes, over a map that is read once and stays in shared memory.

A block takes one image and a few channels. A warpgroup works on several lines (rows or columns) side by side, of which
a thread takes one channel or two:

1. Step sizes are worked out and written over delta. Of each line is found what it does to a gradient: the one that
   leaves the line if none comes to it, and the product of the decays.
2. From these follows, from line to line, the gradient that comes to each. The state before a line is one that the
   forward kept. So from here on no line waits for another one, or for another route.
3. Columns: what each place gives to the gradients, added up over the routes along columns. It is written over the
   gradients of y, of which a place needs none but its own.
4. Rows: what the routes along rows give is added. Of the sums become the gradients of u, delta, B and C.
5. Sums over channels, and over places.

A vector is a (lines, channels) array, float32, in the registers of a warpgroup.
"""

from __future__ import annotations

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

from msvmamba_jax.kernels.selective_scan.mosaic_block import (
    COMPILER_PARAMETERS,
    Geometry,
    Operands,
    as_step,
    in_place_of_delta,
    ordered,
    store_words,
)
from msvmamba_jax.kernels.selective_scan.mosaic_lines import b_and_c, chunks_of_a_line, load_words, of_lines
from msvmamba_jax.kernels.selective_scan.mosaic_team import KEPT, Team, buffers, first_states
from msvmamba_jax.kernels.selective_scan.recurrence import LOG2_E, advance, decays, softplus, softplus_slopes_of
from msvmamba_jax.kernels.selective_scan.routes import along_rows

_TOGETHER = 7  # positions that are worked on side by side where each takes many registers


def scan_backward(
    geometry: Geometry, team: Team, operands: Operands, dy: jax.Array, states: jax.Array
) -> tuple[jax.Array, ...]:
    """The gradients, up to sums.

    Args:
        geometry: of the problem.
        team: that takes it, see `mosaic_team`.
        operands: the inputs, with `mosaic_lines.packed` for BC.
        dy: gradient of y (b, routes, h, w, d), in the dtype of u.
        states: those that the forward kept (b, chunks of the path, 1, lanes).

    Returns:
        du and ddelta (b, h, w, d) in the dtype of u; the gradients of B and C as `on_the_map` takes them; and those of
        A, D and the bias, each (b, d or a few more). All but the maps in float32.
    """
    g = geometry
    blocks = -(-g.channels // team.channels)
    rows, columns = team.box(g.height, g.width, g.dtype)
    map_type = jax.ShapeDtypeStruct((g.batch, g.height, g.width, g.channels), g.dtype)
    of_places = jax.ShapeDtypeStruct((g.batch, blocks, 2, rows * columns), jnp.float32)
    of_channels = jax.ShapeDtypeStruct((g.batch, blocks * team.channels), jnp.float32)
    chunks, given = chunks_of_a_line(g.routes[0]), len(jax.tree.leaves(operands))

    def body(*refs: Any, **scratch: Any) -> None:
        _Block(g, team, Operands.of(refs), refs[given : given + 2], refs[given + 2 :], scratch).run()

    _, words, _, row = operands.BC.shape
    dys = _neighbours(g)
    barriers = {
        "rows": plgpu.Barrier(num_arrivals=2 + sum(are_rows for are_rows, _ in dys)),
        "columns": plgpu.Barrier(num_arrivals=max(1, sum(not are_rows for are_rows, _ in dys))),
        "rest": plgpu.Barrier(num_arrivals=1 + (1 if chunks == 1 else len(g.routes))),
    }
    together: dict[str, Any] = {}
    if team.warpgroups > 1:
        barriers["all"] = plgpu.Barrier(num_arrivals=team.warpgroups)
        together = {"num_threads": team.warpgroups, "thread_name": "warpgroup"}
    call = plgpu.kernel(
        body,
        out_type=[map_type, map_type, of_places, *(of_channels,) * 3],
        scratch_types=buffers(g, team, (words, row), operands.BC.dtype) | barriers,
        grid=(g.batch * blocks,),  # blocks of an image read the same B and C at about the same time
        grid_names=("block",),
        compiler_params=COMPILER_PARAMETERS,
        **together,
    )
    by_line = states.reshape(g.batch, g.first_chunk[-1] // chunks, chunks, g.lanes)
    return tuple(call(*jax.tree.leaves(operands), dy, by_line))


def on_the_map(geometry: Geometry, team: Team, dBC: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The gradients of B and C (b, h, w, 1), float32, from those of `scan_backward`, summed over blocks."""
    g = geometry
    box = team.box(g.height, g.width, g.dtype)
    by_place = dBC.reshape(g.batch, -1, 2, *box)[..., : g.height, : g.width, None]
    dB, dC = (jnp.sum(by_place[:, :, i], axis=1) for i in range(2))
    return dB, dC


def _neighbours(geometry: Geometry) -> list[tuple[bool, list[int]]]:
    """Routes one after the other that all go along rows, or all along columns, and whether it is rows."""
    by_direction = itertools.groupby(enumerate(geometry.routes), lambda item: along_rows(item[1].route))
    return [(rows, [index for index, _ in routes]) for rows, routes in by_direction]


class _Sums(NamedTuple):
    """Vectors for each position of a line, added up over routes."""

    dh: dict[int, jax.Array]  # gradients with respect to the states
    dexponent: dict[int, jax.Array]  # with respect to the exponents of the decays
    dC: dict[int, jax.Array]  # with respect to C, for each channel
    dy: dict[int, jax.Array]

    def add(self, position: int, *values: jax.Array) -> None:
        """Adds one value to each."""
        for sums, value in zip(self, values, strict=True):
            sums[position] = sums[position] + value if position in sums else value


class _Lines(NamedTuple):
    """Some lines side by side."""

    are_rows: bool
    first: Any
    at_once: int
    length: int  # positions of each

    @property
    def numbers(self) -> Any:
        """As an index."""
        return pl.ds(self.first, self.at_once)

    def of(self, ref: Any, position: int) -> Any:
        """Their places at a position, of a map."""
        return of_lines(ref, self.are_rows, self.numbers, position)


class _Block:
    """A block at work."""

    def __init__(
        self,
        geometry: Geometry,
        team: Team,
        operands: Operands,
        gradient_and_states: Sequence[Any],
        results: Sequence[Any],
        scratch: dict[str, Any],
    ):
        self._geometry, self._team, self._operands, self._scratch = geometry, team, operands, scratch
        self._dy, self._states = gradient_and_states
        self._du, self._ddelta, self._dBC, *self._dparameters = results
        self._box = team.box(geometry.height, geometry.width, geometry.dtype)
        self._layouts = team.layouts(math.prod(self._box))
        blocks = -(-geometry.channels // team.channels)
        block = lax.axis_index("block")
        self._image, self._number = lax.div(block, blocks), lax.rem(block, blocks)
        self._channels = pl.ds(self._number * team.channels, team.channels)
        self._warpgroup = lax.axis_index("warpgroup") if team.warpgroups > 1 else 0
        self._zero = self._image * 0  # where a slice starts that may reach over the edge: JAX refuses a constant
        # What is kept for a place takes that of the gradients of y along columns, and more if these are not enough:
        # `_Sums` of the routes along columns, then the gradients of B (for each channel), delta, C (likewise) and u.
        more = range(len(geometry.routes), scratch["dy"].shape[0])
        self._kept = [scratch["dy"].at[i] for i in [*self._routes(rows=False), *more][:KEPT]]

    def run(self) -> None:
        """From the copies in to the copies out."""
        self._alone(self._fetch)
        parameters = self._operands.parameters
        rows = (0, parameters.row_of_skip, parameters.row_of_bias)
        self._A, self._D, self._bias = (
            self._spread(load_words(ref.at[row, self._channels], self._layouts.of_channels), 1)
            for ref, row in zip(parameters, rows, strict=True)
        )
        self._a = self._A * LOG2_E
        zero = plgpu.layout_cast(jnp.zeros((self._team.lines, self._team.channels), jnp.float32), self._layouts.vector)
        plgpu.barrier_wait(self._scratch["rows"])
        self._along_rows(self._start_rows, ())
        self._meet()
        if self._routes(rows=False):
            plgpu.barrier_wait(self._scratch["columns"])
            self._along_columns(self._find_ends_of_columns, ())
            self._meet()
        self._find_arrivals()
        self._meet()
        plgpu.barrier_wait(self._scratch["rest"])
        totals = (zero, zero, zero)
        if self._routes(rows=False):
            totals = self._along_columns(self._finish_columns, totals)
            self._meet()
        totals = self._along_rows(self._finish_rows, totals)
        self._meet()
        self._alone(self._write_maps)
        self._sum_over_channels()
        self._sum_over_lines(totals)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def _routes(self, *, rows: bool) -> list[int]:
        return [index for index, route in enumerate(self._geometry.routes) if along_rows(route.route) == rows]

    # The team

    def _alone(self, body: Callable[[], None]) -> None:
        """One warpgroup does something."""
        if self._team.warpgroups > 1:
            pl.when(self._warpgroup == 0)(body)
        else:
            body()

    def _meet(self) -> None:
        """All threads wait for each other, and what they wrote to shared memory is there."""
        plgpu.commit_smem()
        if self._team.warpgroups > 1:
            plgpu.barrier_arrive(self._scratch["all"])
            plgpu.barrier_wait(self._scratch["all"])

    def _along_rows(self, body: Callable[[_Lines, jax.Array | None, Any], Any], carry: Any) -> Any:
        """Calls `body` with a group of rows after the other, with those that count if not all do, and with the carry.

        A last group that is not full has rows outside the map, or some that came before.
        """
        g, at_once, warpgroups = self._geometry, self._team.lines, self._team.warpgroups
        shape = (at_once, self._team.channels)
        row = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=self._layouts.vector)
        own = g.height // warpgroups

        def group(number: Any, carry: Any) -> Any:
            if self._team.padded:
                start, some = (number * warpgroups + self._warpgroup) * at_once, g.height % at_once
                counts = start + row < g.height
            else:
                first, some = jnp.minimum(number * at_once, own - at_once), own % at_once
                counts = first + row >= number * at_once
                start = self._warpgroup * own + first
                if some:
                    plgpu.commit_smem()  # whoever had these rows in the last group is done with them
            lines = _Lines(True, start, at_once, g.width)
            return body(lines, counts if some else None, carry)

        return lax.fori_loop(0, -(-g.height // (warpgroups * at_once)), group, carry)

    def _along_columns(self, body: Callable[[_Lines, Any], Any], carry: Any) -> Any:
        """Calls `body` with a group of columns after the other, of which some may be outside the map, and the carry."""
        g, at_once, warpgroups = self._geometry, self._team.lines, self._team.warpgroups
        groups = -(-g.width // at_once)

        def group(number: Any, carry: Any) -> Any:
            first = (number * warpgroups + self._warpgroup) * at_once
            lines = _Lines(False, first, at_once, g.height)
            if groups % warpgroups == 0:
                return body(lines, carry)
            return lax.cond(first < g.width, lambda carry: body(lines, carry), lambda carry: carry, carry)

        return lax.fori_loop(0, -(-groups // warpgroups), group, carry)

    # Copies

    def _fetch(self) -> None:
        """Starts all copies to shared memory, those that are needed first before the others."""
        g, scratch, image = self._geometry, self._scratch, self._image
        BC: Any = self._operands.BC.at[image, :, pl.ds(self._zero, self._box[0])]
        plgpu.copy_gmem_to_smem(BC, scratch["BC"], scratch["rows"])
        plgpu.copy_gmem_to_smem(self._on_device(self._operands.delta.at[image]), scratch["delta"], scratch["rows"])
        for rows, routes in sorted(_neighbours(g), reverse=True):
            some = pl.ds(routes[0], len(routes))
            dy = self._on_device(self._dy.at[image, some], 1)
            plgpu.copy_gmem_to_smem(dy, scratch["dy"].at[some], scratch["rows" if rows else "columns"])
        plgpu.copy_gmem_to_smem(self._on_device(self._operands.u.at[image]), scratch["u"], scratch["rest"])
        chunks, first = chunks_of_a_line(g.routes[0]), first_states(g, self._team)
        if chunks == 1:
            states = self._states.at[image, pl.ds(self._zero, scratch["states"].shape[0]), 0, self._channels]
            plgpu.copy_gmem_to_smem(states, scratch["states"], scratch["rest"])
            return
        for index, route in enumerate(g.routes):
            entered = (route.length - 1) // route.chunk if route.reversed else 0
            lines = pl.ds(self._zero + g.first_chunk[index] // chunks, scratch["r"].shape[1])
            states = self._states.at[image, lines, entered, self._channels]
            target = scratch["states"].at[pl.ds(first[index], scratch["r"].shape[1])]
            plgpu.copy_gmem_to_smem(states, target, scratch["rest"])

    def _on_device(self, maps: Any, before: int = 0) -> Any:
        """The block's part of a map, or of several: with so many axes `before`."""
        rows, columns = (pl.ds(self._zero, size) for size in self._box)
        return maps.at[(slice(None),) * before + (rows, columns, self._channels)]

    def _write_maps(self) -> None:
        """Starts the copies of du and ddelta, which are where `_finish_rows` put them."""
        for result, kept in ((self._du, 3), (self._ddelta, 1)):
            plgpu.copy_smem_to_gmem(self._kept[kept], self._on_device(result.at[self._image]))

    # Values in shared memory

    def _spread(self, x: jax.Array, dimension: int) -> jax.Array:
        """A vector, from the values of its lines (dimension 0) or channels (1)."""
        shape = (self._team.lines, self._team.channels)
        return plgpu.layout_cast(lax.broadcast_in_dim(x, shape, (dimension,)), self._layouts.vector)

    def _get(self, ref: Any, lines: _Lines, position: int) -> jax.Array:
        return load_words(lines.of(ref, position), self._layouts.vector)

    def _floats(self, ref: Any, lines: _Lines) -> list[jax.Array]:
        return [self._get(ref, lines, position).astype(jnp.float32) for position in range(lines.length)]

    def _steps(self, lines: _Lines) -> list[jax.Array]:
        return [as_step(self._get(self._scratch["delta"], lines, position)) for position in range(lines.length)]

    def _b_and_c(self, lines: _Lines, position: int) -> tuple[jax.Array, jax.Array]:
        BC = self._scratch["BC"]
        words = [load_words(lines.of(BC.at[i], position), self._layouts.of_lines) for i in range(BC.shape[0])]
        B, C = (self._spread(x, 0) for x in b_and_c(words))
        return B, C

    # 1. What lines do

    def _start_rows(self, lines: _Lines, counts: jax.Array | None, carry: Any) -> Any:
        """Writes step sizes over delta, and finds the ends of rows."""
        g, delta = self._geometry, self._scratch["delta"]
        steps = []
        for positions in _parts(lines.length):
            raws = [self._get(delta, lines, position) for position in positions]
            found = softplus([raw.astype(jnp.float32) + self._bias for raw in raws], precise=g.dtype == jnp.float32)
            if counts is not None and not self._team.padded:  # others are step sizes already
                found = [jnp.where(counts, step, as_step(raw)) for step, raw in zip(found, raws, strict=True)]
            steps += found
        if self._routes(rows=True):
            self._find_ends(lines, steps)
        for position, step in enumerate(steps):
            lines.of(delta, position)[...] = in_place_of_delta(step, g.dtype)
        return carry

    def _find_ends_of_columns(self, lines: _Lines, carry: Any) -> Any:
        self._find_ends(lines, self._steps(lines))
        return carry

    def _find_ends(self, lines: _Lines, steps: Sequence[jax.Array]) -> None:
        """Keeps what leaves lines if nothing comes to them, for each route, and the products of their decays."""
        kept = decays(steps, self._a)
        Cs = [self._b_and_c(lines, position)[1] for position in range(lines.length)]
        for index in self._routes(rows=lines.are_rows):
            dys, r = self._floats(self._scratch["dy"].at[index], lines), None
            for k in ordered(lines.length, not self._geometry.routes[index].reversed):
                r = kept[k] * (dys[k] * Cs[k] if r is None else dys[k] * Cs[k] + r)
            self._scratch["r"][index, lines.numbers] = r
        (product,) = decays([functools.reduce(jnp.add, steps)], self._a)
        self._scratch["decays"][int(lines.are_rows), lines.numbers] = product

    # 2. What comes to lines

    def _find_arrivals(self) -> None:
        """Puts the gradients that come to lines in place of those that leave them."""
        r = plgpu.layout_cast(jnp.zeros((self._team.channels,), jnp.float32), self._layouts.of_channels)
        arrivals = []
        for index, route in reversed(list(enumerate(self._geometry.routes))):
            ends, products = self._scratch["r"].at[index], self._scratch["decays"].at[int(along_rows(route.route))]
            for line in ordered(route.lines, not route.reversed):
                arrivals.append((index, line, r))
                end, product = (load_words(ref.at[line], self._layouts.of_channels) for ref in (ends, products))
                r = product * r + end
        self._meet()  # all have been read
        for index, line, arriving in arrivals:
            self._scratch["r"][index, line] = arriving

    # 3. and 4. Gradients

    def _finish_columns(self, lines: _Lines, totals: Any) -> Any:
        """Adds up over routes along columns.

        Returns:
            `totals`; plus the gradients of A and D, if what is kept has a shorter format than float32. These are sums
            over all places, of which little may remain. (That of the bias is the sum of what delta gets.)
        """
        sums, (us, steps, _) = self._add_up(lines)
        dA, dD, dbias = totals
        for k in range(lines.length):
            if self._geometry.dtype != jnp.float32:
                dA, dD = sums.dexponent[k] * steps[k] + dA, sums.dy[k] * us[k] + dD
            for kept, values in zip(self._kept, sums, strict=True):
                lines.of(kept, k)[...] = values[k].astype(self._geometry.dtype)
        return dA, dD, dbias

    def _add_up(self, lines: _Lines) -> tuple[_Sums, tuple[Sequence[jax.Array], ...]]:
        """What the routes along these lines give, and u, step sizes and B at each position."""
        us, steps = self._floats(self._scratch["u"], lines), self._steps(lines)
        Bs, Cs = zip(*(self._b_and_c(lines, position) for position in range(lines.length)), strict=True)
        kept, drives = decays(steps, self._a), [step * u for step, u in zip(steps, us, strict=True)]
        sums = _Sums({}, {}, {}, {})
        for index in self._routes(rows=lines.are_rows):
            order = ordered(lines.length, self._geometry.routes[index].reversed)
            before = first_states(self._geometry, self._team)[index] + lines.first
            h = load_words(self._scratch["states"].at[pl.ds(before, lines.at_once)], self._layouts.vector)
            hs = advance(h, *([xs[k] for k in order] for xs in (kept, drives, Bs)))
            r = load_words(self._scratch["r"].at[index, lines.numbers], self._layouts.vector)
            dys = self._floats(self._scratch["dy"].at[index], lines)
            for step in reversed(range(lines.length)):
                k = order[step]
                dh = dys[k] * Cs[k] + r
                r = kept[k] * dh
                sums.add(k, dh, r * hs[step], dys[k] * hs[step + 1], dys[k])
        return sums, (us, steps, Bs)

    def _finish_rows(self, lines: _Lines, counts: jax.Array | None, totals: Any) -> Any:
        """Adds what columns gave, and puts the gradients of B, delta, C and u in its place.

        Returns:
            `totals` plus the gradients of A, D and the bias, unless `_finish_columns` has added their part of A and D.
        """
        g = self._geometry
        sums, (us, steps, Bs) = self._add_up(lines)
        dA: Any = 0.0
        dD: Any = 0.0
        dbias: Any = 0.0
        for positions in _parts(lines.length):
            before = [[self._get(kept, lines, k).astype(jnp.float32) for kept in self._kept] for k in positions]
            slopes = softplus_slopes_of([steps[k] for k in positions], precise=g.dtype == jnp.float32)
            for k, old, slope in zip(positions, before, slopes, strict=True):
                of_rows = [values.get(k, 0.0) for values in sums]
                if self._routes(rows=False):
                    sums.add(k, *old)
                dh, dexponent, dC, dy = (values[k] for values in sums)
                _, of_A, _, of_D = (dh, dexponent, dC, dy) if g.dtype == jnp.float32 else of_rows
                dA, dD = of_A * steps[k] + dA, of_D * us[k] + dD
                ddrive = dh * Bs[k]
                draw = (ddrive * us[k] + dexponent * self._A) * slope
                results = [dh * (steps[k] * us[k]), draw, dC, ddrive * steps[k] + self._D * dy]
                if counts is not None and not self._team.padded:  # others are results already
                    results = [jnp.where(counts, *pair) for pair in zip(results, old, strict=True)]
                for kept, value in zip(self._kept, results, strict=True):
                    lines.of(kept, k)[...] = value.astype(g.dtype)
                dbias = draw + dbias
        added = [x if counts is None else jnp.where(counts, x, 0.0) for x in (dA, dD, dbias)]
        return tuple(x + y for x, y in zip(totals, added, strict=True))

    # 5. Sums

    def _sum_over_channels(self) -> None:
        """Of the gradients of B and C, for each place."""
        places = math.prod(self._box)
        at_once, _ = self._team.summed_at_once(places)
        parts = [pl.ds(start, at_once) for start in self._team.parts(places, self._warpgroup)]
        kept = [self._kept[i].reshape(places, self._team.channels) for i in (0, 2)]
        # Loads come first, since none can pass a store.
        summands = [[load_words(ref.at[part], self._layouts.summands) for part in parts] for ref in kept]
        for i, values in enumerate(summands):
            for part, x in zip(parts, values, strict=True):
                sums = jnp.sum(x.astype(jnp.float32), axis=1)
                store_words(self._dBC.at[self._image, self._number, i, part], sums)

    def _sum_over_lines(self, totals: Sequence[jax.Array]) -> None:
        """Of the gradients of A, D and the bias, in buffers that are free."""
        lines = self._team.lines
        buffers = [self._scratch["r"].at[0], self._scratch["decays"].at[0], self._scratch["states"]]
        for buffer, total in zip(buffers, totals, strict=True):
            buffer[pl.ds(self._warpgroup * lines, lines)] = total
        self._meet()

        def write() -> None:
            for buffer, target in zip(buffers, self._dparameters, strict=True):
                rows = range(lines * self._team.warpgroups)
                values = [load_words(buffer.at[row], self._layouts.of_channels) for row in rows]
                store_words(target.at[self._image, self._channels], functools.reduce(jnp.add, values))

        self._alone(write)


def _parts(positions: int) -> list[range]:
    return [range(start, min(start + _TOGETHER, positions)) for start in range(0, positions, _TOGETHER)]
