"""Layers of the detection heads. Kernels and biases are float32; `dtype` is that of the computation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike

from msvmamba_jax.models.initializers import kaiming_normal, zeros


def linear(inputs: int, outputs: int, init: nnx.Initializer, *, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Linear:
    """A linear layer (on maps: a 1x1 convolution) with zero bias."""
    return nnx.Linear(inputs, outputs, kernel_init=init, bias_init=zeros, dtype=dtype, rngs=rngs)


class Convolution(nnx.Module):
    """3x3 convolution with zero padding; `kernel` (3, 3, i, o), `bias` (o,)."""

    def __init__(self, inputs: int, outputs: int, init: nnx.Initializer, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.kernel = nnx.Param(init(rngs.params(), (3, 3, inputs, outputs)))
        self.bias = nnx.Param(zeros(rngs.params(), (outputs,)))
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        """(b, h, w, i) -> (b, h, w, o)."""
        x, kernel = x.astype(self.dtype), self.kernel[...].astype(self.dtype)
        x = lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return x + self.bias[...].astype(self.dtype)


class Deconvolution(nnx.Module):
    """2x2 transposed convolution of stride 2, whose outputs do not overlap; `kernel` (i, 2, 2, o), `bias` (o,)."""

    def __init__(self, inputs: int, outputs: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        # PyTorch takes the transposed kernel's first axis, the inputs, for its outputs.
        self.kernel = nnx.Param(kaiming_normal(4 * inputs)(rngs.params(), (inputs, 2, 2, outputs)))
        self.bias = nnx.Param(zeros(rngs.params(), (outputs,)))
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        """(b, h, w, i) -> (b, 2 h, 2 w, o)."""
        b, h, w, _ = x.shape
        x = jnp.einsum("bhwi,ipqo->bhpwqo", x.astype(self.dtype), self.kernel[...].astype(self.dtype))
        return x.reshape(b, 2 * h, 2 * w, -1) + self.bias[...].astype(self.dtype)
