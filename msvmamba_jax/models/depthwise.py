"""Depthwise convolution, on a CPU as a sum of shifted, scaled maps.

Each output reads k * k neighbours of its own channel, so there is no matrix product to win. On a CPU, XLA fuses the sum
into one loop, which is 8 to 60 times faster than its grouped convolution (README.md, Performance); a GPU's own grouped
convolution is the faster one there.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike


def accumulator_dtype(dtype: DTypeLike) -> DTypeLike:
    """In which to sum values of `dtype`: float32, or float64 where it is in use."""
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def depthwise_conv(x: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
    """Convolves each channel with its own odd k x k kernel, padding k // 2 zeros on every side.

    Args:
        x: (b, h, w, d).
        kernel: (k, k, d), in the dtype of `x`.
        stride: step between outputs in both directions.

    Returns:
        (b, ceil(h / stride), ceil(w / stride), d) in the dtype of `x`; sums are float32.
    """
    cpu, default = (functools.partial(conv, stride=stride) for conv in (_shifted_sum, _grouped_conv))
    return lax.platform_dependent(x, kernel, cpu=cpu, default=default)


def _forward(x: jax.Array, kernel: jax.Array, stride: int) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return depthwise_conv(x, kernel, stride), (x, kernel)


def _backward(stride: int, residuals: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    cpu, default = (functools.partial(f, stride=stride) for f in (_shifted_sum_vjp, _grouped_conv_vjp))
    return lax.platform_dependent(*residuals, dy, cpu=cpu, default=default)


depthwise_conv.defvjp(_forward, _backward)


def _grouped_conv(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    edge = kernel.shape[0] // 2
    return lax.conv_general_dilated(
        x,
        kernel[:, :, None],
        (stride, stride),
        [(edge, edge)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )


def _grouped_conv_vjp(x: jax.Array, kernel: jax.Array, dy: jax.Array, stride: int) -> tuple[jax.Array, jax.Array]:
    return jax.vjp(functools.partial(_grouped_conv, stride=stride), x, kernel)[1](dy)


def _shifted_sum(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    height, width = (-(-size // stride) for size in x.shape[1:3])
    return _weighted_shifts(_pad(x, kernel), kernel, stride, height, width).astype(x.dtype)


def _shifted_sum_vjp(x: jax.Array, kernel: jax.Array, dy: jax.Array, stride: int) -> tuple[jax.Array, jax.Array]:
    size = kernel.shape[0]
    height, width = x.shape[1:3]
    rows, columns = ((n - 1) * stride + 1 for n in dy.shape[1:3])

    # The input's gradient is the convolution of the spread-out dy with the kernel turned by 180 degrees.
    edge = size // 2
    spread = [(0, 0, 0), *((edge, n + edge, stride - 1) for n in (height - rows, width - columns)), (0, 0, 0)]
    dx = _weighted_shifts(lax.pad(dy, jnp.zeros((), dy.dtype), spread), kernel[::-1, ::-1], 1, height, width)

    padded = _pad(x, kernel)
    dy_sum = dy.astype(accumulator_dtype(dy.dtype))

    def kernel_row(i: jax.Array) -> jax.Array:
        row = lax.dynamic_slice_in_dim(padded, i, rows, axis=1)[:, ::stride]
        row = row.astype(dy_sum.dtype)
        return jnp.stack([jnp.sum(row[:, :, j : j + columns : stride] * dy_sum, (0, 1, 2)) for j in range(size)])

    # A loop over the rows of the kernel: unrolled, the k * k reductions take XLA seconds to compile.
    dkernel = lax.map(kernel_row, jnp.arange(size))
    return dx.astype(x.dtype), dkernel.astype(kernel.dtype)


def _pad(x: jax.Array, kernel: jax.Array) -> jax.Array:
    edge = kernel.shape[0] // 2
    return jnp.pad(x, ((0, 0), (edge, edge), (edge, edge), (0, 0)))


def _weighted_shifts(padded: jax.Array, kernel: jax.Array, stride: int, height: int, width: int) -> jax.Array:
    dtype = accumulator_dtype(padded.dtype)
    rows, columns = (height - 1) * stride + 1, (width - 1) * stride + 1
    total = jnp.zeros((), dtype)
    for i in range(kernel.shape[0]):
        for j in range(kernel.shape[1]):
            shifted = padded[:, i : i + rows : stride, j : j + columns : stride]
            total = total + shifted.astype(dtype) * kernel[i, j].astype(dtype)
    return total
