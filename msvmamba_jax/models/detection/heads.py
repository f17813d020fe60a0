"""The box head (FPN, arXiv:1612.03144, section 4.2) and the mask head (Mask R-CNN, arXiv:1703.06870, figure 4)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from msvmamba_jax.models.detection.layers import Convolution, Deconvolution, linear
from msvmamba_jax.models.initializers import kaiming_normal, normal, xavier_uniform

BOX_BINS = 7
MASK_BINS = 14
MASK_LAYERS = 4


class BoxHead(nnx.Module):
    """Two layers, then the class of a region and a box for each class.

    Args:
        channels: of the region's features.
        hidden: width of the two layers.
        num_classes: without the background.
        dtype: dtype of the computation; the outputs are float32.
        rngs: keys for the parameters.
    """

    def __init__(self, channels: int, hidden: int, num_classes: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        inputs = BOX_BINS * BOX_BINS * channels
        self.first = linear(inputs, hidden, xavier_uniform(), dtype=dtype, rngs=rngs)
        self.second = linear(hidden, hidden, xavier_uniform(), dtype=dtype, rngs=rngs)
        self.score = linear(hidden, num_classes + 1, normal(0.01), dtype=jnp.float32, rngs=rngs)
        self.delta = linear(hidden, num_classes * 4, normal(0.001), dtype=jnp.float32, rngs=rngs)

    @jax.named_scope("box_head")
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Regions (..., 7, 7, c) -> logits (..., classes + 1), background last, offsets (..., classes, 4); float32."""
        leading = x.shape[:-3]
        x = x.reshape(*leading, -1)
        x = jax.nn.relu(self.second(jax.nn.relu(self.first(x)))).astype(jnp.float32)
        return self.score(x), self.delta(x).reshape(*leading, -1, 4)


class MaskHead(nnx.Module):
    """Four 3x3 convolutions, twice the resolution, and a mask for each class.

    Args:
        channels: of the region's features, and of every layer.
        num_classes: without the background.
        dtype: dtype of the computation; the output is float32.
        rngs: keys for the parameters.
    """

    def __init__(self, channels: int, num_classes: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        init = kaiming_normal(9 * channels)
        self.convs = nnx.List(Convolution(channels, channels, init, dtype=dtype, rngs=rngs) for _ in range(MASK_LAYERS))
        self.upsample = Deconvolution(channels, channels, dtype=dtype, rngs=rngs)
        self.score = linear(channels, num_classes, kaiming_normal(num_classes), dtype=jnp.float32, rngs=rngs)

    @jax.named_scope("mask_head")
    def __call__(self, x: jax.Array) -> jax.Array:
        """Regions (..., 14, 14, c) -> logits (..., 28, 28, classes), float32."""
        leading = x.shape[:-3]
        x = x.reshape(-1, *x.shape[-3:])
        for conv in self.convs:
            x = jax.nn.relu(conv(x))
        x = jax.nn.relu(self.upsample(x)).astype(jnp.float32)
        return self.score(x).reshape(*leading, 2 * MASK_BINS, 2 * MASK_BINS, -1)
