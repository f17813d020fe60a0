"""What the kernels share that keep a map in shared memory and work on several of its lines side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from msvmamba_jax.kernels.selective_scan.mosaic_block import ROW, THREADS, WARPS
from msvmamba_jax.kernels.selective_scan.routes import ScanInputs
from msvmamba_jax.kernels.selective_scan.tiles import Tiles

_HIGH_HALF = -(1 << 16)  # of a word
_BANKS = 128  # bytes that shared memory delivers at once, each from a place of its own
_SUMMED = 8  # channels that a thread sums up by itself, at most


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
        """Rows and columns of the buffer of a map: whole groups of lines, and whole multiples of 128 bytes.

        Maybe with a few columns more, so that the lines of a warp begin in different places of shared memory.
        """
        size = self.channels * jnp.dtype(dtype).itemsize
        rows = height + -height % self.lines if self.padded else height
        least = width + -width % self.lines
        possible = [columns for columns in range(least, least + 4) if rows * columns * size % _BANKS == 0]

        def starts(columns: int) -> int:
            return len({line * columns * size % _BANKS for line in range(self.lines // WARPS)})

        return rows, min(possible, key=lambda columns: (-starts(columns), columns))

    def summed_at_once(self, places: int) -> tuple[int, int]:
        """Places whose channels a warpgroup sums up at once, at most all, and channels that a thread takes."""
        for each in (_SUMMED, _SUMMED // 2, _SUMMED // 4):
            at_once = THREADS * each // self.channels
            if 2 * each <= self.channels and at_once <= places:
                return at_once, each
        raise ValueError(f"{places} places are too few to be summed by the threads of {self}")

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


def packed(inputs: ScanInputs) -> jax.Array:
    """B and C as these kernels take them, rows padded to 128 bytes: words (b, 1 or 2, h, w').

    If both are bfloat16, a word holds B in its low half and C in its high one, otherwise float32 B, then C.
    """
    B, C = (jnp.squeeze(x, -1) for x in (inputs.B, inputs.C))
    if B.dtype == C.dtype == jnp.bfloat16:
        low, high = (lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32) for x in (B, C))
        words = lax.bitcast_convert_type(low | high << 16, jnp.int32)[:, None]
    else:
        words = jnp.stack([B.astype(jnp.float32), C.astype(jnp.float32)], axis=1)
    return jnp.pad(words, ((0, 0), (0, 0), (0, 0), (0, -words.shape[-1] % ROW)))


def b_and_c(words: Sequence[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """B and C, float32, of the one or two words that `packed` made of them."""
    if len(words) == 2:
        return words[0], words[1]
    B, C = (lax.bitcast_convert_type(x, jnp.float32) for x in (words[0] << 16, words[0] & _HIGH_HALF))
    return B, C


def chunks_of_a_line(route: Tiles) -> int:
    """Of which a state is kept for each."""
    return route.pieces * route.span // route.chunk


def load_words(ref: Any, layout: Any) -> jax.Array:
    """An array of which a thread gets single words."""
    index = (...,) if jax.__version_info__ < (0, 11) else ()  # that jax takes no reference alone
    return plgpu.load(ref, *index, layout=layout, optimized=False)
