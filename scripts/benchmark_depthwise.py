"""Time the depthwise convolution beside XLA's grouped convolution, on this machine, in one run.

python scripts/benchmark_depthwise.py
"""

from __future__ import annotations

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from msvmamba_jax.models.depthwise import depthwise_conv

Conv = Callable[[jax.Array, jax.Array, int], jax.Array]
SHAPES = [(64, 8, 64, 3, 1), (64, 8, 64, 7, 2), (1, 56, 96, 3, 1), (1, 56, 96, 7, 2), (1, 14, 384, 3, 1)]
REPEATS = 10


def grouped_conv(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """XLA's own."""
    edge = kernel.shape[0] // 2
    return lax.conv_general_dilated(
        x,
        kernel[:, :, None],
        (stride, stride),
        [(edge, edge)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )


def milliseconds(function: Callable[..., object], *arguments: jax.Array) -> float:
    """The shortest of several runs, after one that compiles."""
    jax.block_until_ready(function(*arguments))
    best = float("inf")
    for _ in range(REPEATS):
        began = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        best = min(best, time.perf_counter() - began)
    return 1e3 * best


def _forward(conv: Conv, stride: int) -> Callable[..., object]:
    return jax.jit(lambda x, kernel: conv(x, kernel, stride))


def _forward_and_backward(conv: Conv, stride: int) -> Callable[..., object]:
    return jax.jit(jax.grad(lambda x, kernel: jnp.sum(conv(x, kernel, stride) ** 2), (0, 1)))


def main() -> None:
    """The command."""
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, float32, milliseconds (XLA / ours = ratio)")
    for batch, side, channels, size, stride in SHAPES:
        x = jax.random.normal(jax.random.key(0), (batch, side, side, channels))
        kernel = jax.random.normal(jax.random.key(1), (size, size, channels))
        row = f"{batch} x {side} x {side} x {channels}, kernel {size}, stride {stride}:"
        for name, make in (("forward", _forward), ("forward and backward", _forward_and_backward)):
            xla, ours = (milliseconds(make(conv, stride), x, kernel) for conv in (grouped_conv, depthwise_conv))
            row += f"  {name} {xla:.2f} / {ours:.2f} = {xla / ours:.1f}"
        print(row)


if __name__ == "__main__":
    main()
