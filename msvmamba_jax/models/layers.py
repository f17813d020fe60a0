"""Layers and initialisers that the blocks are made of.

Parameters are float32; `dtype` is the dtype of the computation. Statistics of normalisations are float32.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax.typing import DTypeLike

from msvmamba_jax.models.depthwise import accumulator_dtype, depthwise_conv
from msvmamba_jax.models.initializers import constant, normal, uniform_fan_in, zeros


def linear(inputs: int, outputs: int, *, bias: bool, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Linear:
    """A linear layer with the original's initialisation: normal(0.02), zero bias."""
    init = normal(0.02)
    return nnx.Linear(inputs, outputs, use_bias=bias, kernel_init=init, bias_init=zeros, dtype=dtype, rngs=rngs)


def pointwise_conv(inputs: int, outputs: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Linear:
    """A 1x1 convolution: a linear layer with a convolution's initialisation."""
    init = uniform_fan_in(inputs)
    return nnx.Linear(inputs, outputs, kernel_init=init, bias_init=init, dtype=dtype, rngs=rngs)


class LayerNorm(nnx.Module):
    """LayerNorm over channels with epsilon 1e-5; the variance takes two passes and does not cancel for large means.

    Flax's own fails on bfloat16 under strict dtype promotion.
    """

    EPSILON = 1e-5

    def __init__(self, features: int, *, dtype: DTypeLike):
        self.scale = nnx.Param(constant(np.ones(features)))
        self.bias = nnx.Param(constant(np.zeros(features)))
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        """(..., c) -> the same shape."""
        shape = x.shape
        dtype = accumulator_dtype(x.dtype)
        # As rows: XLA for GPUs spends up to 15 seconds on each normalisation of an array of four or five axes.
        x = x.reshape(-1, shape[-1]).astype(dtype)
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.EPSILON)
        return (x * self.scale[...].astype(dtype) + self.bias[...].astype(dtype)).astype(self.dtype).reshape(shape)


class DepthwiseConv(nnx.Module):
    """Depthwise k x k convolution with bias; `kernel` (k, k, d), `bias` (d,)."""

    def __init__(self, features: int, size: int, *, stride: int = 1, dtype: DTypeLike, rngs: nnx.Rngs):
        init = uniform_fan_in(size * size)
        self.kernel = nnx.Param(init(rngs.params(), (size, size, features)))
        self.bias = nnx.Param(init(rngs.params(), (features,)))
        self.stride = stride
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        """(b, h, w, d) -> (b, ceil(h / stride), ceil(w / stride), d)."""
        x = x.astype(self.dtype)
        return depthwise_conv(x, self.kernel[...].astype(self.dtype), self.stride) + self.bias[...].astype(self.dtype)


class PatchEmbedding(nnx.Module):
    """Non-overlapping patches of 4 x 4 pixels, a linear map of each, LayerNorm. Partial patches are cut off."""

    SIZE = 4

    def __init__(self, features: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.projection = pointwise_conv(self.SIZE * self.SIZE * 3, features, dtype=dtype, rngs=rngs)
        self.norm = LayerNorm(features, dtype=dtype)

    def __call__(self, images: jax.Array) -> jax.Array:
        """(b, height, width, 3) -> (b, height // 4, width // 4, c).

        Raises:
            ValueError: images are not RGB channels last, or smaller than one patch.
        """
        if images.ndim != 4 or images.shape[-1] != 3 or min(images.shape[1:3]) < self.SIZE:
            raise ValueError(
                f"images must be (batch, height, width, 3) with at least {self.SIZE} x {self.SIZE} pixels; "
                f"got shape {images.shape}"
            )
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise ValueError(f"images must be normalised floating-point values; got {images.dtype}")
        height, width = (size // self.SIZE * self.SIZE for size in images.shape[1:3])
        patches = rearrange(images[:, :height, :width], "b (h p) (w q) c -> b h w (p q c)", p=self.SIZE, q=self.SIZE)
        return self.norm(self.projection(patches))


class Downsampling(nnx.Module):
    """Merges 2 x 2 neighbours: (b, h, w, c) -> (b, ceil(h / 2), ceil(w / 2), 2 c)."""

    def __init__(self, features: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.norm = LayerNorm(4 * features, dtype=dtype)
        self.reduction = linear(4 * features, 2 * features, bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Odd sizes are filled up with zeros at the bottom and the right."""
        x = jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, x.shape[2] % 2), (0, 0)))
        # The original concatenates the offsets (row, column) = (0,0), (1,0), (0,1), (1,1).
        merged = rearrange(x, "b (h p) (w q) c -> b h w (q p c)", p=2, q=2)
        return self.reduction(self.norm(merged))


def _keep(keys: jax.Array, site: int, rate: float, shape: tuple[int, ...]) -> jax.Array:
    """Decisions of `shape` for each key, (b, *shape): false with probability `rate`."""
    return jax.vmap(lambda key: jax.random.bernoulli(jax.random.fold_in(key, site), 1.0 - rate, shape))(keys)


def _scaled_where(keep: jax.Array, x: jax.Array, rate: float) -> jax.Array:
    return jnp.where(keep, x * jnp.asarray(1.0 / (1.0 - rate), x.dtype), jnp.zeros((), x.dtype))


class DropPath(nnx.Module):
    """Stochastic depth (Huang et al., arXiv:1603.09382), one decision for each image.

    Decisions are a function of the image's key and of `site` alone, so they depend neither on how a batch is split over
    devices nor on accumulation of gradients.
    """

    def __init__(self, rate: float, site: int):
        self.rate = rate
        self.site = site

    def __call__(self, x: jax.Array, keys: jax.Array | None) -> jax.Array:
        """x (b, ...), or zeros for an image whose branch is dropped; the rest is scaled by 1 / (1 - rate).

        Args:
            x: (b, ...).
            keys: one typed random key for each image (b,); None leaves `x` as it is.
        """
        if keys is None or self.rate == 0.0:
            return x
        return _scaled_where(_keep(keys, self.site, self.rate, (1,) * (x.ndim - 1)), x, self.rate)


class ChannelDropout(nnx.Module):
    """Dropout of whole channels (Tompson et al., arXiv:1411.4280), decided for each image as in `DropPath`."""

    def __init__(self, rate: float, site: int):
        self.rate = rate
        self.site = site

    def __call__(self, x: jax.Array, keys: jax.Array | None) -> jax.Array:
        """x (b, h, w, c) with some channels of some images zero; the rest is scaled by 1 / (1 - rate).

        Args:
            x: (b, h, w, c).
            keys: as for `DropPath`.
        """
        if keys is None or self.rate == 0.0:
            return x
        return _scaled_where(_keep(keys, self.site, self.rate, (1, 1, x.shape[-1])), x, self.rate)
