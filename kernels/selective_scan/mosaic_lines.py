"""What the kernels share that keep a map in shared memory and work on several of its lines side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from msvmamba_jax.kernels.selective_scan.mosaic_block import ROW
from msvmamba_jax.kernels.selective_scan.routes import ScanInputs
from msvmamba_jax.kernels.selective_scan.tiles import Tiles

_HIGH_HALF = -(1 << 16)  # of a word


def words_of(inputs: ScanInputs) -> int:
    """That hold B and C of a position."""
    return 1 if inputs.B.dtype == inputs.C.dtype == jnp.bfloat16 else 2


def packed(inputs: ScanInputs) -> jax.Array:
    """B and C as these kernels take them, rows padded to 128 bytes: words (b, 1 or 2, h, w').

    If both are bfloat16, a word holds B in its low half and C in its high one, otherwise float32 B, then C.
    """
    B, C = (jnp.squeeze(x, -1) for x in (inputs.B, inputs.C))
    if words_of(inputs) == 1:
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


def of_lines(ref: Any, are_rows: bool, lines: Any, position: int) -> Any:
    """The places of some lines (an index) at a position, of a map in shared memory."""
    return ref.at[lines, position] if are_rows else ref.at[position, lines]


def load_words(ref: Any, layout: Any) -> jax.Array:
    """An array of which a thread gets single words."""
    index = (...,) if jax.__version_info__ < (0, 11) else ()  # that jax takes no reference alone
    return plgpu.load(ref, *index, layout=layout, optimized=False)
