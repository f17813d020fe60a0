"""The Pallas Mosaic GPU kernels behind `mosaic.py`, which describes how they work together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from msvmamba_jax.kernels.selective_scan.mosaic_block import (
    Block,
    Geometry,
    Operands,
    Scratch,
    input_buffer,
    input_buffers,
    kernel,
    output_buffer,
    state_buffers,
)
from msvmamba_jax.kernels.selective_scan.recurrence import LOG2_E, advance, decays, retreat, softplus_slopes
from msvmamba_jax.kernels.selective_scan.tiles import Tiles


def scan(geometry: Geometry, operands: Operands, ends: jax.Array | None, *, save: bool) -> tuple[jax.Array, ...]:
    """The scan itself.

    Args:
        geometry: of the problem.
        operands: the inputs.
        ends: those of `segment_ends` if the path is cut.
        save: whether to keep states.

    Returns:
        y (b, routes, h, w, d) and, with `save`, the states (b, chunks of the path, n, lanes) before each chunk.
    """
    g = geometry
    out_type = [jax.ShapeDtypeStruct((g.batch, len(g.routes), g.height, g.width, g.channels), g.dtype)]
    if save:
        out_type.append(jax.ShapeDtypeStruct((g.batch, g.first_chunk[-1], g.states, g.lanes), jnp.float32))

    def body(*refs: Any, scratch: dict[str, Any]) -> None:
        block = Block(g, Operands.of(refs), scratch)
        ends_ref = refs[6] if ends is not None else None
        y_ref, *states_ref = refs[6 + (ends is not None) :]

        def route(index: int, tiles: Tiles, first: Any, count: Any, h: Any) -> Any:
            def tile(number: Any, slot: Any, out: Any, h: Any) -> Any:
                for chunk, visits in block.visits_by_chunk(tiles, slot, tiles.reversed):
                    _, steps = block.raws_and_steps(tiles, number, visits)
                    at = g.first_chunk[index] + number * tiles.chunks + chunk

                    def state(i: Any, carry: Any, visits: Any = visits, steps: Any = steps, at: Any = at) -> Any:
                        h, ys = carry
                        before = block.get("h", h, i)
                        if save:  # not in a loop of its own, whose loads the compiler moves before the stores of h
                            states_ref[0][block.image, at, i, block.channels] = before
                        Bs, Cs = block.b_and_c(slot, visits, i)
                        drives = [step * u for step, u in zip(steps, visits.us, strict=True)]
                        hs = advance(before, decays(steps, block.a(i)), drives, Bs)
                        ys = tuple(y + C * h_i for y, C, h_i in zip(ys, Cs, hs[1:], strict=True))
                        return block.put("h", h, i, hs[-1]), ys

                    h, ys = block.each_state(state, (h, tuple(block.D * u for u in visits.us)))
                    for position, y in zip(visits.positions, ys, strict=True):
                        scratch["y"][out, tiles.place(position)] = y.astype(g.dtype)
                return h

            outputs = [block.map_copy(tiles, y_ref.at[block.image, index], scratch["y"])]
            return block.walk(tiles, False, first, count, block.inputs(index), outputs, tile, h)

        block.along_path(False, lambda segment: block.entering(ends_ref, segment), route, lambda segment, h: None)

    arrays = (*jax.tree.leaves(operands), *(() if ends is None else (ends,)))
    return kernel(g, body, out_type, _scan_scratch(g))(*arrays)


def _scan_scratch(geometry: Geometry) -> Scratch:
    g = geometry
    buffers = input_buffers(g) | state_buffers(g, "h") | {"y": output_buffer(g, g.dtype)}
    return Scratch(buffers, inputs=(3,))


def segment_ends(geometry: Geometry, operands: Operands) -> jax.Array:
    """What each segment does to the state: (b, segments, n + 1, lanes), float32.

    The n states it would leave when entered with zero, and the sum S of its step sizes: a state h that enters adds
    exp(S A) h to the one left.
    """
    g = geometry
    out_type = jax.ShapeDtypeStruct((g.batch, g.segments, g.states + 1, g.lanes), jnp.float32)

    def body(*refs: Any, scratch: dict[str, Any]) -> None:
        block = Block(g, Operands.of(refs), scratch)
        ends_ref = refs[6]

        def route(index: int, tiles: Tiles, first: Any, count: Any, carry: Any) -> Any:
            def tile(number: Any, slot: Any, out: Any, carry: Any) -> Any:
                h, total = carry
                for _, visits in block.visits_by_chunk(tiles, slot, tiles.reversed):
                    _, steps = block.raws_and_steps(tiles, number, visits)

                    def state(i: Any, h: Any, visits: Any = visits, steps: Any = steps) -> Any:
                        Bs, _ = block.b_and_c(slot, visits, i)
                        drives = [step * u for step, u in zip(steps, visits.us, strict=True)]
                        hs = advance(block.get("h", h, i), decays(steps, block.a(i)), drives, Bs)
                        return block.put("h", h, i, hs[-1])

                    h = block.each_state(state, h)
                    total = sum(steps, total)
                return h, total

            return block.walk(tiles, False, first, count, block.inputs(index), [], tile, carry)

        def finish(segment: Any, carry: Any) -> None:
            h, total = carry
            block.store_states("h", h, lambda i: ends_ref.at[block.image, segment, i, block.channels])
            ends_ref[block.image, segment, g.states, block.channels] = total

        block.along_path(False, lambda segment: (block.zero_states("h"), block.full(0.0)), route, finish)

    scratch = Scratch(input_buffers(g) | state_buffers(g, "h"), inputs=(3,))
    return kernel(g, body, out_type, scratch)(*jax.tree.leaves(operands))


def later_segment_ends(geometry: Geometry, operands: Operands, dy: jax.Array) -> jax.Array:
    """What each segment does to the gradient that travels back: (b, segments, n, lanes), float32.

    The gradient with respect to the state that enters a segment if none reaches its end from later ones.
    """
    g = geometry
    out_type = jax.ShapeDtypeStruct((g.batch, g.segments, g.states, g.lanes), jnp.float32)

    def body(*refs: Any, scratch: dict[str, Any]) -> None:
        block = Block(g, Operands.of(refs), scratch)
        dy_ref, ends_ref = refs[6:]

        def route(index: int, tiles: Tiles, first: Any, count: Any, r: Any) -> Any:
            def tile(number: Any, slot: Any, out: Any, r: Any) -> Any:
                for _, visits in block.visits_by_chunk(tiles, slot, not tiles.reversed):
                    _, steps = block.raws_and_steps(tiles, number, visits)
                    dys = block.dys(tiles, slot, visits)

                    def state(i: Any, r: Any, visits: Any = visits, steps: Any = steps, dys: Any = dys) -> Any:
                        _, Cs = block.b_and_c(slot, visits, i)
                        kept = decays(steps, block.a(i))
                        # The recurrence of the states, with dy C for the drive, decayed once more.
                        r_i = block.get("r", r, i)
                        for keep, dy, C in zip(kept[::-1], dys[::-1], Cs[::-1], strict=True):
                            r_i = keep * (dy * C + r_i)
                        return block.put("r", r, i, r_i)

                    r = block.each_state(state, r)
                return r

            inputs = [*block.inputs(index), block.map_copy(tiles, dy_ref.at[block.image, index], scratch["dy"])]
            return block.walk(tiles, True, first, count, inputs, [], tile, r)

        def finish(segment: Any, r: Any) -> None:
            block.store_states("r", r, lambda i: ends_ref.at[block.image, segment, i, block.channels])

        block.along_path(True, lambda segment: block.zero_states("r"), route, finish)

    scratch = Scratch(input_buffers(g) | state_buffers(g, "r") | {"dy": input_buffer(g, g.dtype)}, inputs=(4,))
    return kernel(g, body, out_type, scratch)(*jax.tree.leaves(operands), dy)


def scan_backward(
    geometry: Geometry,
    operands: Operands,
    dy: jax.Array,
    states: jax.Array,
    ends: jax.Array | None,
    later: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The gradients, up to sums.

    Args:
        geometry: of the problem.
        operands: the inputs.
        dy: gradient of y (b, routes, h, w, d), in the dtype of u.
        states: those that `scan` kept.
        ends: of `segment_ends` if the path is cut.
        later: of `later_segment_ends` if the path is cut.

    Returns:
        du and ddelta (b, 1, h, w, d) in their dtypes, or (b, routes, h, w, d) if the path is cut; dBC (b, blocks of
        channels, chunks of the path, n, sums) with the gradients of B, then those of C at a chunk's positions; and
        (b, segments, n + 2, lanes) with those of A, D and the bias. All but the maps in float32.
    """
    g = geometry
    maps = (g.batch, 1 if g.merges else len(g.routes), g.height, g.width, g.channels)
    out_type = [
        jax.ShapeDtypeStruct(maps, g.dtype),
        jax.ShapeDtypeStruct(maps, g.delta_dtype),
        jax.ShapeDtypeStruct((g.batch, g.blocks, g.first_chunk[-1], g.states, g.sums), jnp.float32),
        jax.ShapeDtypeStruct((g.batch, g.segments, g.states + 2, g.lanes), jnp.float32),
    ]
    cut = ends is not None

    def body(*refs: Any, scratch: dict[str, Any]) -> None:
        block = Block(g, Operands.of(refs), scratch)
        dy_ref, states_ref = refs[6:8]
        ends_ref, later_ref = refs[8:10] if cut else (None, None)
        du_ref, ddelta_ref, dBC_ref, dparameters_ref = refs[-4:]

        def route(index: int, tiles: Tiles, first: Any, count: Any, carry: Any) -> Any:
            adds = g.merges and index < len(g.routes) - 1  # to what the routes after this one gave

            def tile(number: Any, slot: Any, out: Any, carry: Any) -> Any:
                r, dA, dD, dbias = carry
                for chunk, visits in block.visits_by_chunk(tiles, slot, not tiles.reversed):
                    raws, steps = block.raws_and_steps(tiles, number, visits)
                    dys = block.dys(tiles, slot, visits)
                    at = g.first_chunk[index] + number * tiles.chunks + chunk

                    def state(
                        i: Any, carry: Any, chunk: int = chunk, at: Any = at, v: Any = (visits, steps, dys)
                    ) -> Any:
                        r, dA, dus, dsteps = carry
                        visits, steps, dys = v
                        Bs, Cs = block.b_and_c(slot, visits, i)
                        kept = decays(steps, block.a(i))
                        drives = [step * u for step, u in zip(steps, visits.us, strict=True)]
                        hs = advance(scratch["states"][slot, chunk, i], kept, drives, Bs)
                        A_i = block.a(i) * (1 / LOG2_E)
                        part = retreat(block.get("r", r, i), hs, kept, dys, visits.us, steps, drives, Bs, Cs, A_i)
                        target = dBC_ref.at[block.image, block.number, at, i]
                        block.sum_over_channels(tiles, visits, part.dBs, part.dCs, block.turn(at, i), target)
                        dus = tuple(du + x for du, x in zip(dus, part.dus, strict=True))
                        dsteps = tuple(dstep + x for dstep, x in zip(dsteps, part.dsteps, strict=True))
                        dA = block.put("dA", dA, i, block.get("dA", dA, i) + part.dA)
                        return block.put("r", r, i, part.r), dA, dus, dsteps

                    dus: Sequence[Any] = tuple(block.D * dy for dy in dys)
                    dsteps = tuple(block.full(0.0) for _ in dys)
                    r, dA, dus, dsteps = block.each_state(state, (r, dA, dus, dsteps))
                    slopes = softplus_slopes(raws, steps)
                    draws = [dstep * slope for dstep, slope in zip(dsteps, slopes, strict=True)]
                    draws = block.masked(tiles, number, visits, draws)
                    dbias = sum(draws, dbias)
                    dD = sum((dy * u for dy, u in zip(dys, visits.us, strict=True)), dD)
                    if adds:
                        dus = block.plus(dus, "earlier du", tiles, slot, visits)
                        draws = block.plus(draws, "earlier ddelta", tiles, slot, visits)
                    for position, du, draw in zip(visits.positions, dus, draws, strict=True):
                        scratch["du"][out, tiles.place(position)] = du.astype(scratch["du"].dtype)
                        scratch["ddelta"][out, tiles.place(position)] = draw.astype(scratch["ddelta"].dtype)
                return r, dA, dD, dbias

            inputs = [
                *block.inputs(index),
                block.map_copy(tiles, dy_ref.at[block.image, index], scratch["dy"]),
                block.states_copy(index, states_ref),
            ]
            of_route = 0 if g.merges else index
            du, ddelta = (ref.at[block.image, of_route] for ref in (du_ref, ddelta_ref))
            outputs = [block.map_copy(tiles, du, scratch["du"]), block.map_copy(tiles, ddelta, scratch["ddelta"])]
            if adds:
                inputs.append(block.map_copy(tiles, du, scratch["earlier du"]))
                inputs.append(block.map_copy(tiles, ddelta, scratch["earlier ddelta"]))
            return block.walk(tiles, True, first, count, inputs, outputs, tile, carry)

        def start(segment: Any) -> Any:
            r = block.leaving(ends_ref, later_ref, segment)
            return r, block.zero_states("dA"), block.full(0.0), block.full(0.0)

        def finish(segment: Any, carry: Any) -> None:
            _, dA, dD, dbias = carry
            gradients = dparameters_ref.at[block.image, segment]
            block.store_states("dA", dA, lambda i: gradients.at[i, block.channels])
            gradients[g.states, block.channels] = dD
            gradients[g.states + 1, block.channels] = dbias

        block.along_path(True, start, route, finish)

    more = (ends, later) if cut else ()
    return tuple(kernel(g, body, out_type, _scan_backward_scratch(g))(*jax.tree.leaves(operands), dy, states, *more))


def _scan_backward_scratch(geometry: Geometry) -> Scratch:
    g = geometry
    buffers = input_buffers(g) | state_buffers(g, "r", "dA")
    buffers |= {
        "dy": input_buffer(g, g.dtype),
        "states": plgpu.SMEM((g.stages, g.chunks, g.states, g.block), jnp.float32),
        "du": output_buffer(g, g.dtype),
        "ddelta": output_buffer(g, g.delta_dtype),
        "sums": plgpu.SMEM((2, g.sums, g.block), jnp.float32),
    }
    if g.merges:
        buffers["earlier du"] = input_buffer(g, g.dtype)
        buffers["earlier ddelta"] = input_buffer(g, g.delta_dtype)
    return Scratch(buffers, inputs=(5, 7) if g.merges else (5,), sums=True)


def shared_bytes(geometry: Geometry, *, backward: bool) -> int:
    """Shared memory of a block of `scan` or `scan_backward`; the kernels that run before these take less."""
    scratch = _scan_backward_scratch(geometry) if backward else _scan_scratch(geometry)
    return scratch.bytes(geometry.stages)
