"""Feature pyramid network (Lin et al., arXiv:1612.03144, section 3), with a fifth level for the largest anchors."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from msvmamba_jax.models.detection.layers import Convolution, linear
from msvmamba_jax.models.initializers import xavier_uniform


class FPN(nnx.Module):
    """Lateral 1x1 convolutions, a path from coarse to fine, and a 3x3 convolution on each level; no normalisation.

    Args:
        widths: channels of the backbone's maps.
        channels: channels of every level.
        dtype: dtype of the computation.
        rngs: keys for the parameters.
    """

    def __init__(self, widths: Sequence[int], channels: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        init = xavier_uniform()
        self.laterals = nnx.List(linear(width, channels, init, dtype=dtype, rngs=rngs) for width in widths)
        self.outputs = nnx.List(Convolution(channels, channels, init, dtype=dtype, rngs=rngs) for _ in widths)

    @jax.named_scope("fpn")
    def __call__(self, features: Sequence[jax.Array]) -> list[jax.Array]:
        """Maps (b, h_i, w_i, widths[i]), finest first -> as many levels (b, h_i, w_i, channels) and one more.

        The last is every second position of the one before: (b, ceil(h / 2), ceil(w / 2), channels).
        """
        levels = [lateral(x) for lateral, x in zip(self.laterals, features, strict=True)]
        for i in reversed(range(len(levels) - 1)):
            levels[i] = levels[i] + resize_nearest(levels[i + 1], *levels[i].shape[1:3])
        levels = [output(x) for output, x in zip(self.outputs, levels, strict=True)]
        return [*levels, levels[-1][:, ::2, ::2]]


def resize_nearest(x: jax.Array, height: int, width: int) -> jax.Array:
    """(b, h, w, c) -> (b, height, width, c); position i shows position floor(i old / new), as in PyTorch."""
    for axis, size in ((1, height), (2, width)):
        old = x.shape[axis]
        if size == 2 * old:
            x = jnp.repeat(x, 2, axis)
        elif size != old:
            x = jnp.take(x, np.arange(size) * old // size, axis)
    return x
