"""The Triton programs of the GPU selective scan; `triton.py` launches them and lays out their arguments.

A launch walks one route. One program, a single warp, owns one image, `PLAN.tile` channels and one segment of the route.
It walks its positions one after another with the state in registers; only channels are spread over lanes. The route is
cut into lines of evenly spaced positions (a whole map for a row route, one column for a column route), and lines into
chunks of `PLAN.unroll` positions whose addresses differ by constants. All loads of a chunk are issued before the chunk
ahead of it is computed. Positions past the end of a line get a step of zero, which leaves the state as it is.

Tiles of states are (PLAN.padded, PLAN.tile); padded states have A = B = C = 0 and stay zero. Chunks start at 64-bit
offsets, so arrays may be of any size.

Every tensor operation that touches memory makes the compiler look at all others of the program, and at what connects
them: the time to compile grows with the cube of `PLAN.unroll`, and would with that of the routes of a launch.
"""

# Triton has its own types, and knows no star in a tuple.
# mypy: ignore-errors
# ruff: noqa: RUF005

from __future__ import annotations

import triton
import triton.language as tl

from msvmamba_jax.kernels.selective_scan.triton_chunk import (
    LOG2_E,
    chunk_start,
    indices,
    load_bias,
    load_chunk,
    load_scaled_a,
    log1p_exp,
    on_line,
    or_zero,
    program_indices,
    saved_state,
    segment_chunks,
    state_offsets,
    step_size,
    times_states,
)

_LN_2 = tl.constexpr(0.6931471805599453)
_LANES = tl.constexpr(32)
_SUMMARIES_AT_ONCE = tl.constexpr(8)  # whose loads are in flight together


@triton.constexpr_function
def _bit_length(number):
    return number.bit_length()


@triton.constexpr_function
def _may_be_due(plan, k):
    """Whether the state before position k of a chunk, or of some chunks, is to be saved."""
    return plan.interval > 0 and k % plan.interval == 0


# Segments: from its first position to its last, one makes `exp2(total * A) * state + end` of a state


@triton.jit
def summary_kernel(
    x,  # (b, h*w, d): u, or for REVERSE dy (b, routes, h*w, d)
    delta,  # (b, h*w, d)
    A,  # (d, n)
    BC,  # (b, h*w, n): B, or for REVERSE C
    bias,  # (d,)
    summaries,  # (b, segments, n + 1, d): end, then total
    PLAN: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """Summaries of segments, for states that walk forwards, or for REVERSE for gradients that walk backwards."""
    UNROLL: tl.constexpr = PLAN.unroll
    image, segment, tile = program_indices(PLAN)
    channel, channel_mask = indices(tile * PLAN.tile, PLAN.tile, PLAN.channels)
    state, state_mask = indices(0, PLAN.padded, PLAN.states)
    tile_mask = state_mask[:, None] & channel_mask[None, :]
    A_tile = load_scaled_a(A, channel, tile_mask, PLAN)
    x += (image * PLAN.routes + PLAN.route if REVERSE else image) * (PLAN.positions * PLAN.channels) + channel
    delta += image * (PLAN.positions * PLAN.channels) + channel
    BC += image * (PLAN.positions * PLAN.states) + state

    end = tl.full((PLAN.padded, PLAN.tile), 0.0, tl.float32)
    total = tl.full((PLAN.tile,), 0.0, tl.float32)
    first, last = segment_chunks(segment, PLAN)
    start = tl.maximum(last - 1, 0) if REVERSE else tl.minimum(first, PLAN.chunks - 1)
    ahead = _load_three(x, delta, BC, start, channel_mask, state_mask, PLAN)
    for i in range(last - first):
        xs, deltas, BCs = ahead
        index = last - 1 - i if REVERSE else first + i
        following = tl.maximum(index - 1, 0) if REVERSE else tl.minimum(index + 1, PLAN.chunks - 1)
        ahead = _load_three(x, delta, BC, following, channel_mask, state_mask, PLAN)
        bias_tile = load_bias(bias + channel, channel_mask)
        offset = chunk_start(index, PLAN)[2]
        for k in tl.static_range(UNROLL - 1 if REVERSE else 0, -1 if REVERSE else UNROLL, -1 if REVERSE else 1):
            step = step_size(deltas[k], bias_tile, offset + k, PLAN)
            decay = tl.exp2(step[None, :] * A_tile)
            if REVERSE:
                end = decay * (times_states(xs[k], BCs[k]) + end)
            else:
                end = decay * end + times_states(step * xs[k].to(tl.float32), BCs[k])
            total += step

    summaries += (image * PLAN.segments + segment) * ((PLAN.states + 1) * PLAN.channels)
    tl.store(summaries + state_offsets(channel, PLAN), end, mask=tile_mask)
    tl.store(summaries + PLAN.states * PLAN.channels + channel, total, mask=channel_mask)


@triton.jit
def _load_three(x, delta, BC, index, channel_mask, state_mask, PLAN: tl.constexpr):
    return (
        load_chunk(x, channel_mask, index, PLAN.channels, PLAN),
        load_chunk(delta, channel_mask, index, PLAN.channels, PLAN),
        load_chunk(BC, state_mask, index, PLAN.states, PLAN),
    )


@triton.jit
def _state_at_start(
    start, summaries, first, count, A, channel, channel_mask, tile_mask, PLAN: tl.constexpr, DIRECTION: tl.constexpr
):
    """The state (padded, tile) with which a segment begins.

    Args:
        start: pointer to the state (states, channels) with which the route begins; not read unless PLAN.resumes.
        summaries: pointer to those of the image.
        first: the segment that the route begins with.
        count: segments before this one.
        A: (padded, tile).
        channel: (tile,).
        channel_mask: (tile,).
        tile_mask: (padded, tile).
        PLAN: what is computed.
        DIRECTION: from a segment to the next one, 1 or -1.
    """
    if PLAN.resumes:
        state = tl.load(start + state_offsets(channel, PLAN), mask=tile_mask, other=0.0)
    else:
        state = tl.full((PLAN.padded, PLAN.tile), 0.0, tl.float32)
    if PLAN.segments > 1:
        for i in range(0, count, _SUMMARIES_AT_ONCE):
            ends = ()
            totals = ()
            for k in tl.static_range(_SUMMARIES_AT_ONCE):
                exists = i + k < count
                at = summaries + (first + DIRECTION * (i + k)) * ((PLAN.states + 1) * PLAN.channels)
                ends = ends + (tl.load(at + state_offsets(channel, PLAN), mask=tile_mask & exists, other=0.0),)
                total = at + PLAN.states * PLAN.channels + channel
                totals = totals + (tl.load(total, mask=channel_mask & exists, other=0.0),)
            for k in tl.static_range(_SUMMARIES_AT_ONCE):
                state = tl.exp2(totals[k][None, :] * A) * state + ends[k]
    return state


# Forward


@triton.jit
def forward_kernel(
    u,  # (b, h*w, d)
    delta,  # (b, h*w, d)
    A,  # (d, n)
    B,  # (b, h*w, n)
    C,  # (b, h*w, n)
    D,  # (d,)
    bias,  # (d,)
    start,  # (b, n, d), the state that the route before left; not read unless PLAN.resumes
    summaries,  # (b, segments, n + 1, d); not read if there is one segment
    other_routes,  # the memory of y, with what the routes before wrote; not read
    y,  # (b, routes, h*w, d), of which this route's part is written
    final,  # (b, n, d), the state after the route
    states,  # (b, saved, n, d), the state before every PLAN.interval positions; None if PLAN.interval is 0
    PLAN: tl.constexpr,
):
    """y along one route."""
    UNROLL: tl.constexpr = PLAN.unroll
    image, segment, tile = program_indices(PLAN)
    channel, channel_mask = indices(tile * PLAN.tile, PLAN.tile, PLAN.channels)
    state, state_mask = indices(0, PLAN.padded, PLAN.states)
    tile_mask = state_mask[:, None] & channel_mask[None, :]
    A_tile = load_scaled_a(A, channel, tile_mask, PLAN)
    D_tile = tl.load(D + channel, mask=channel_mask, other=0.0)
    start += image * (PLAN.states * PLAN.channels)
    summaries += image * (PLAN.segments * (PLAN.states + 1) * PLAN.channels)
    h = _state_at_start(start, summaries, 0, segment, A_tile, channel, channel_mask, tile_mask, PLAN, 1)
    u += image * (PLAN.positions * PLAN.channels) + channel
    delta += image * (PLAN.positions * PLAN.channels) + channel
    B += image * (PLAN.positions * PLAN.states) + state
    C += image * (PLAN.positions * PLAN.states) + state
    y += (image * PLAN.routes + PLAN.route) * (PLAN.positions * PLAN.channels) + channel
    if PLAN.interval > 0:
        states += image * (PLAN.saved * PLAN.states * PLAN.channels) + state_offsets(channel, PLAN)

    first, last = segment_chunks(segment, PLAN)
    ahead = _load_four(u, delta, B, C, tl.minimum(first, PLAN.chunks - 1), channel_mask, state_mask, PLAN)
    for index in range(first, last):
        us, deltas, Bs, Cs = ahead
        following = tl.minimum(index + 1, PLAN.chunks - 1)
        ahead = _load_four(u, delta, B, C, following, channel_mask, state_mask, PLAN)
        bias_tile = load_bias(bias + channel, channel_mask)
        position, line, offset = chunk_start(index, PLAN)
        for k in tl.static_range(UNROLL):
            if _may_be_due(PLAN, k):
                due = on_line(tile_mask, offset + k, PLAN)
                if PLAN.interval > PLAN.unroll:
                    due = due & (offset % PLAN.interval == 0)
                tl.store(states + saved_state(line, offset + k, PLAN), h, mask=due)
            step = step_size(deltas[k], bias_tile, offset + k, PLAN)
            u_k = us[k].to(tl.float32)
            h = tl.exp2(step[None, :] * A_tile) * h + times_states(step * u_k, Bs[k])
            y_k = tl.sum(h * Cs[k].to(tl.float32)[:, None], axis=0) + D_tile * u_k
            at = y + (position + k * PLAN.step) * PLAN.channels
            tl.store(at, y_k.to(y.dtype.element_ty), mask=on_line(channel_mask, offset + k, PLAN))
    if segment == PLAN.segments - 1:
        tl.store(final + image * (PLAN.states * PLAN.channels) + state_offsets(channel, PLAN), h, mask=tile_mask)


@triton.jit
def _load_four(u, delta, B, C, index, channel_mask, state_mask, PLAN: tl.constexpr):
    return (
        load_chunk(u, channel_mask, index, PLAN.channels, PLAN),
        load_chunk(delta, channel_mask, index, PLAN.channels, PLAN),
        load_chunk(B, state_mask, index, PLAN.states, PLAN),
        load_chunk(C, state_mask, index, PLAN.states, PLAN),
    )


# Backward


@triton.jit
def backward_kernel(
    u,  # (b, h*w, d)
    delta,  # (b, h*w, d)
    A,  # (d, n)
    B,  # (b, h*w, n)
    C,  # (b, h*w, n)
    D,  # (d,)
    bias,  # (d,)
    dy,  # (b, routes, h*w, d)
    states,  # (b, saved, n, d) of the forward along this route
    start,  # (b, n, d), gradient of the state after the route; not read unless PLAN.resumes
    summaries,  # (b, segments, n + 1, d) for walking backwards; not read if there is one segment
    du,  # (b, h*w, d)
    ddelta,  # (b, h*w, d)
    dBC,  # (b, tiles, h*w, 2, n): of B, then C
    dparameters,  # (b, segments, n + 2, d): of A, then D, then the bias
    final,  # (b, n, d), gradient of the state before the route
    scratch,  # (b, segments, tiles, chunks per interval, padded, tile); None if an interval is one chunk
    PLAN: tl.constexpr,
):
    """What one route contributes to the gradients; that of A, D and the bias for every image and segment by itself."""
    image, segment, tile = program_indices(PLAN)
    channel, channel_mask = indices(tile * PLAN.tile, PLAN.tile, PLAN.channels)
    state, state_mask = indices(0, PLAN.padded, PLAN.states)
    tile_mask = state_mask[:, None] & channel_mask[None, :]
    A_tile = load_scaled_a(A, channel, tile_mask, PLAN)
    D_tile = tl.load(D + channel, mask=channel_mask, other=0.0)
    start += image * (PLAN.states * PLAN.channels)
    summaries += image * (PLAN.segments * (PLAN.states + 1) * PLAN.channels)
    before = PLAN.segments - 1 - segment
    later = _state_at_start(
        start, summaries, PLAN.segments - 1, before, A_tile, channel, channel_mask, tile_mask, PLAN, -1
    )
    carry = (
        later,
        tl.full((PLAN.padded, PLAN.tile), 0.0, tl.float32),
        tl.full((PLAN.tile,), 0.0, tl.float32),
        tl.full((PLAN.tile,), 0.0, tl.float32),
    )
    of_image = image * (PLAN.positions * PLAN.channels) + channel
    inputs = (
        u + of_image,
        delta + of_image,
        dy + (image * PLAN.routes + PLAN.route) * (PLAN.positions * PLAN.channels) + channel,
        B + image * (PLAN.positions * PLAN.states) + state,
        C + image * (PLAN.positions * PLAN.states) + state,
        states + image * (PLAN.saved * PLAN.states * PLAN.channels) + state_offsets(channel, PLAN),
    )
    of_tile = (image * PLAN.tiles + tile) * (2 * PLAN.positions * PLAN.states)
    outputs = (du + of_image, ddelta + of_image, dBC + of_tile + state[:, None])
    bias += channel
    first, last = segment_chunks(segment, PLAN)
    if PLAN.chunks_per_interval == 1:
        ahead = _load_six(inputs, tl.maximum(last - 1, 0), channel_mask, state_mask, PLAN)
        for i in range(last - first):
            index = last - 1 - i
            current = ahead
            ahead = _load_six(inputs, tl.maximum(index - 1, 0), channel_mask, state_mask, PLAN)
            bias_tile = load_bias(bias, channel_mask)
            carry = _backward_chunk(
                carry, current, outputs, A_tile, D_tile, bias_tile, index, channel_mask, state_mask, PLAN
            )
    else:
        scratch += ((image * PLAN.segments + segment) * PLAN.tiles + tile) * (
            PLAN.chunks_per_interval * PLAN.padded * PLAN.tile
        )
        scratch += tl.arange(0, PLAN.padded)[:, None] * PLAN.tile + tl.arange(0, PLAN.tile)[None, :]
        bias_tile = load_bias(bias, channel_mask)
        for i in range((last - first) // PLAN.chunks_per_interval):
            index = last - (i + 1) * PLAN.chunks_per_interval
            carry = _backward_interval(
                carry, inputs, outputs, scratch, A_tile, D_tile, bias_tile, index, channel_mask, state_mask, PLAN
            )
    later, dA, dD, dbias = carry
    dparameters += (image * PLAN.segments + segment) * ((PLAN.states + 2) * PLAN.channels)
    tl.store(dparameters + state_offsets(channel, PLAN), dA, mask=tile_mask)
    tl.store(dparameters + PLAN.states * PLAN.channels + channel, dD, mask=channel_mask)
    tl.store(dparameters + (PLAN.states + 1) * PLAN.channels + channel, dbias, mask=channel_mask)
    if segment == 0:
        tl.store(final + image * (PLAN.states * PLAN.channels) + state_offsets(channel, PLAN), later, mask=tile_mask)


@triton.jit
def _load_six(inputs, index, channel_mask, state_mask, PLAN: tl.constexpr):
    """Chunk `index` of the inputs of positions, and the state that was saved before it."""
    _, line, offset = chunk_start(index, PLAN)
    tile_mask = state_mask[:, None] & channel_mask[None, :]
    h = tl.load(inputs[5] + saved_state(line, offset, PLAN), mask=tile_mask, other=0.0)
    return _load_five(inputs, index, channel_mask, state_mask, PLAN) + (h,)


@triton.jit
def _load_five(inputs, index, channel_mask, state_mask, PLAN: tl.constexpr):
    return (
        load_chunk(inputs[0], channel_mask, index, PLAN.channels, PLAN),
        load_chunk(inputs[1], channel_mask, index, PLAN.channels, PLAN),
        load_chunk(inputs[2], channel_mask, index, PLAN.channels, PLAN),
        load_chunk(inputs[3], state_mask, index, PLAN.states, PLAN),
        load_chunk(inputs[4], state_mask, index, PLAN.states, PLAN),
    )


@triton.jit
def _backward_interval(
    carry, inputs, outputs, scratch, A, D, bias, first, channel_mask, state_mask, PLAN: tl.constexpr
):
    """As `_backward_chunk` for the chunks from one saved state to the next, of which `first` is the first.

    The states before the other chunks are computed into `scratch`, which stays in the caches.
    """
    UNROLL: tl.constexpr = PLAN.unroll
    _, line, offset = chunk_start(first, PLAN)
    tile_mask = state_mask[:, None] & channel_mask[None, :]
    h = tl.load(inputs[5] + saved_state(line, offset, PLAN), mask=tile_mask, other=0.0)
    for m in range(PLAN.chunks_per_interval):
        tl.store(scratch + m * (PLAN.padded * PLAN.tile), h)
        us, deltas, Bs = _load_three(inputs[0], inputs[1], inputs[3], first + m, channel_mask, state_mask, PLAN)
        offset = chunk_start(first + m, PLAN)[2]
        for k in tl.static_range(UNROLL):
            step = step_size(deltas[k], bias, offset + k, PLAN)
            h = tl.exp2(step[None, :] * A) * h + times_states(step * us[k].to(tl.float32), Bs[k])
    tl.debug_barrier()
    for i in range(PLAN.chunks_per_interval):
        m = PLAN.chunks_per_interval - 1 - i
        h = tl.load(scratch + m * (PLAN.padded * PLAN.tile))
        current = _load_five(inputs, first + m, channel_mask, state_mask, PLAN) + (h,)
        carry = _backward_chunk(carry, current, outputs, A, D, bias, first + m, channel_mask, state_mask, PLAN)
    tl.debug_barrier()
    return carry


@triton.jit
def _backward_chunk(carry, current, outputs, A, D, bias, index, channel_mask, state_mask, PLAN: tl.constexpr):
    """Gradients of one chunk.

    Args:
        carry: the gradient (padded, tile) that reaches the state after the chunk from later positions; so far the
            gradients of A (padded, tile), of D and of the bias (tile,).
        current: u, delta, dy, B and C of the chunk, and the state before it.
        outputs: pointers to du (tile,), ddelta (tile,), dB and dC (padded, 1) of map position 0.
        A: (padded, tile).
        D: (tile,).
        bias: (tile,).
        index: of the chunk.
        channel_mask: (tile,).
        state_mask: (padded,).
        PLAN: what is computed.

    Returns:
        The carry for the chunk before this one.
    """
    UNROLL: tl.constexpr = PLAN.unroll
    us, deltas, dys, Bs, Cs, h = current
    position, _, offset = chunk_start(index, PLAN)

    steps = ()
    slopes = ()  # derivatives of the softplus
    decays = ()
    hs = (h,)
    for k in tl.static_range(UNROLL):
        raw = deltas[k].to(tl.float32) + bias
        log1p = log1p_exp(raw)
        step = or_zero(tl.maximum(raw, 0.0) + log1p, offset + k, PLAN)
        # The sigmoid is exp(x - softplus(x)), which avoids a division; this form of the difference never cancels.
        slope = or_zero(tl.exp2((tl.minimum(raw, 0.0) - log1p) * LOG2_E), offset + k, PLAN)
        decay = tl.exp2(step[None, :] * A)
        h = decay * h + times_states(step * us[k].to(tl.float32), Bs[k])
        steps = steps + (step,)
        slopes = slopes + (slope,)
        decays = decays + (decay,)
        hs = hs + (h,)

    later, dA, dD, dbias = carry
    du, ddelta, dBC = outputs
    products = ()  # whose sums over channels are dB and dC
    for k in tl.static_range(UNROLL - 1, -1, -1):
        u = us[k].to(tl.float32)
        dy = dys[k].to(tl.float32)
        dh = times_states(dy, Cs[k]) + later
        later = decays[k] * dh
        ddecay = later * hs[k]  # times the decay
        dinput = tl.sum(dh * Bs[k].to(tl.float32)[:, None], axis=0)
        draw = (u * dinput + tl.sum(ddecay * A, axis=0) * _LN_2) * slopes[k]
        dA += ddecay * steps[k][None, :]
        dD += dy * u
        dbias += draw
        products = products + (dh * (steps[k] * u)[None, :], dy[None, :] * hs[k + 1])
        here = on_line(channel_mask, offset + k, PLAN)
        at = (position + k * PLAN.step) * PLAN.channels
        tl.store(du + at, (steps[k] * dinput + D * dy).to(du.dtype.element_ty), mask=here)
        tl.store(ddelta + at, draw.to(ddelta.dtype.element_ty), mask=here)

    # Lane 2 i has dB and lane 2 i + 1 has dC of position UNROLL - 1 - i.
    lane = tl.arange(0, _LANES)
    k = UNROLL - 1 - lane // 2
    at = ((position + k * PLAN.step) * 2 + lane % 2) * PLAN.states
    here = on_line(lane < 2 * UNROLL, offset + k, PLAN)
    sums = _sums_over_channels(products, lane, PLAN)
    tl.store(dBC + at[None, :], sums, mask=state_mask[:, None] & here[None, :])
    return later, dA, dD, dbias


@triton.jit
def _sums_over_channels(values, lane, PLAN: tl.constexpr):
    """Sums of up to 32 values (padded, tile), as (padded, 32): lane i has that of value i.

    Two vectors whose sums are wanted are merged into one that needs one halving less, so that all of them together take
    about as many shuffles as there are values. Lanes beyond the values repeat them or are zero.
    """
    LEVELS: tl.constexpr = _bit_length(len(values) - 1)
    vectors = ()
    for i in tl.static_range(len(values)):
        by_lane = tl.reshape(values[i], (PLAN.padded, _LANES, PLAN.tile // _LANES))
        vectors = vectors + (tl.sum(by_lane, axis=2),)
    for level in tl.static_range(LEVELS):
        if len(vectors) % 2 == 1:
            vectors = vectors + (tl.full((PLAN.padded, _LANES), 0.0, tl.float32),)
        merged = ()
        for i in tl.static_range(0, len(vectors), 2):
            upper = ((lane & (1 << level)) != 0)[None, :]
            keep = tl.where(upper, vectors[i + 1], vectors[i])
            give = tl.where(upper, vectors[i], vectors[i + 1])
            merged = merged + (keep + _from_other_lane(give, lane, 1 << level, PLAN),)
        vectors = merged
    total = vectors[0]
    for level in tl.static_range(LEVELS, 5):
        total += _from_other_lane(total, lane, 1 << level, PLAN)
    return total


@triton.jit
def _from_other_lane(x, lane, BIT: tl.constexpr, PLAN: tl.constexpr):
    """x (padded, 32) of the lane whose number differs in BIT."""
    return tl.gather(x, tl.broadcast_to((lane ^ BIT)[None, :], (PLAN.padded, _LANES)), axis=1)
