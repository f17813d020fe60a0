"""What the Triton programs of the GPU selective scan share: addresses, loads and arithmetic of a chunk of positions.

`triton_kernels.py` says what a program, a chunk and a line are.
"""

# Triton has its own types, and knows no star in a tuple.
# mypy: ignore-errors
# ruff: noqa: RUF005

from __future__ import annotations

import triton
import triton.language as tl

from msvmamba_jax.kernels.selective_scan import recurrence

LOG2_E = tl.constexpr(recurrence.LOG2_E)
_LOG1P = tl.constexpr(recurrence.LOG1P_PRECISE)
_LOG1P_TERMS = tl.constexpr(len(recurrence.LOG1P_PRECISE))


# Addresses and masks


@triton.jit
def program_indices(PLAN: tl.constexpr):
    """Image (in 64 bits, since it scales offsets), segment and tile; the tiles of a segment run side by side."""
    program = tl.program_id(0)
    image = (program // (PLAN.segments * PLAN.tiles)).to(tl.int64)
    return image, (program // PLAN.tiles) % PLAN.segments, program % PLAN.tiles


@triton.jit
def indices(start, SIZE: tl.constexpr, LIMIT: tl.constexpr):
    """SIZE indices from `start`, a multiple of SIZE, and the mask of those below LIMIT."""
    index = start + tl.arange(0, SIZE)
    # The compiler drops the constant, unlike a comparison that is always true.
    return index, tl.full((SIZE,), True, tl.int1) if LIMIT % SIZE == 0 else index < LIMIT


@triton.jit
def segment_chunks(segment, PLAN: tl.constexpr):
    """First and last (exclusive) chunk of a segment."""
    first = tl.minimum(segment * PLAN.chunks_per_segment, PLAN.chunks)
    return first, tl.minimum(first + PLAN.chunks_per_segment, PLAN.chunks)


@triton.jit
def chunk_start(index, PLAN: tl.constexpr):
    """First map position (64 bits) of a chunk, its line, and how far into the line it starts."""
    line = index // PLAN.chunks_per_line
    offset = (index % PLAN.chunks_per_line) * PLAN.unroll
    position = PLAN.start + line * PLAN.line_step + offset * PLAN.step
    return position.to(tl.int64), line, offset


@triton.jit
def saved_state(line, offset, PLAN: tl.constexpr):
    """Offset in the saved states of the one before the position `offset` of a line."""
    return (line * PLAN.saved_per_line + offset // PLAN.interval).to(tl.int64) * (PLAN.states * PLAN.channels)


@triton.jit
def on_line(mask, position, PLAN: tl.constexpr):
    """`mask` where `position` of a line exists."""
    if PLAN.whole:
        return mask
    else:
        return mask & (position < PLAN.length)


@triton.jit
def load_chunk(pointers, mask, index, SPACING: tl.constexpr, PLAN: tl.constexpr):
    """One vector for each position of a chunk, zeros past the end of its line.

    Args:
        pointers: to the vector of map position 0.
        mask: of the vector's elements.
        index: of the chunk.
        SPACING: elements between the vectors of neighbours on the map.
        PLAN: what is computed.
    """
    UNROLL: tl.constexpr = PLAN.unroll
    position, _, offset = chunk_start(index, PLAN)
    pointers += position * SPACING
    values = ()
    for k in tl.static_range(UNROLL):
        here = on_line(mask, offset + k, PLAN)
        values = values + (tl.load(pointers + k * PLAN.step * SPACING, mask=here, other=0.0),)
    return values


@triton.jit
def state_offsets(channel, PLAN: tl.constexpr):
    """Offsets (padded, tile) in a (states, channels) array."""
    return tl.arange(0, PLAN.padded)[:, None] * PLAN.channels + channel[None, :]


@triton.jit
def load_scaled_a(A, channel, tile_mask, PLAN: tl.constexpr):
    """A (padded, tile) in units of log(2), so that decays are powers of two."""
    pointers = A + channel[None, :] * PLAN.states + tl.arange(0, PLAN.padded)[:, None]
    return tl.load(pointers, mask=tile_mask, other=0.0) * LOG2_E


@triton.jit
def load_bias(bias, channel_mask):
    """The bias (tile,), loaded after all loads that come before it in the program.

    Every chunk loads it anew, from the cache. The assembler would otherwise delay the loads of the next chunk, to save
    registers, until after the computations of this one, which nothing keeps behind them: then every chunk would wait
    for memory. Loads do not move across a barrier, and the computations cannot start without the bias.
    """
    tl.debug_barrier()
    return tl.load(bias, mask=channel_mask, other=0.0)


# Arithmetic


@triton.jit
def log1p_exp(x):
    """log(1 + exp(-|x|)): what softplus(x) adds to max(x, 0)."""
    e = tl.exp2(tl.abs(x) * -LOG2_E)
    polynomial = e * _LOG1P[_LOG1P_TERMS - 1] + _LOG1P[_LOG1P_TERMS - 2]
    for i in tl.static_range(2, _LOG1P_TERMS):
        polynomial = polynomial * e + _LOG1P[_LOG1P_TERMS - 1 - i]
    return e * polynomial


@triton.jit
def or_zero(x, position, PLAN: tl.constexpr):
    """`x`, or zero past the end of a line. A step of zero makes the decay 1 and the drive 0."""
    if PLAN.whole:
        return x
    else:
        return tl.where(position < PLAN.length, x, 0.0)


@triton.jit
def step_size(delta, bias, position, PLAN: tl.constexpr):
    """softplus(delta + bias), or zero past the end of a line."""
    raw = delta.to(tl.float32) + bias
    return or_zero(tl.maximum(raw, 0.0) + log1p_exp(raw), position, PLAN)


@triton.jit
def times_states(x, y):
    """Outer product (padded, tile) of x (tile,) and y (padded,) in float32."""
    return x.to(tl.float32)[None, :] * y.to(tl.float32)[:, None]
