"""Initialisers that draw on the host with NumPy, so that building a model compiles no program.

A key gives the same values on every device, inside and outside of `jax.jit`. They have the signature that Flax asks
for: (key, shape, dtype) -> array.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from numpy.typing import ArrayLike

Draw = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]


def normal(deviation: float) -> nnx.Initializer:
    """Normal with mean 0, not truncated."""
    return _initializer(lambda rng, shape: rng.standard_normal(shape, np.float32) * np.float32(deviation))


def uniform(low: float, high: float) -> nnx.Initializer:
    """Uniform in [low, high)."""
    return _initializer(lambda rng, shape: rng.random(shape, np.float32) * np.float32(high - low) + np.float32(low))


def uniform_fan_in(fan_in: int) -> nnx.Initializer:
    """PyTorch's default for convolutions and linear layers, kernel and bias alike: U(-1, 1) / sqrt(fan_in)."""
    bound = 1.0 / math.sqrt(fan_in)
    return uniform(-bound, bound)


def kaiming_normal(fan_out: int) -> nnx.Initializer:
    """Normal with variance 2 / fan_out: PyTorch's `kaiming_normal_` in mode "fan_out" for ReLU."""
    return normal(math.sqrt(2.0 / fan_out))


def xavier_uniform() -> nnx.Initializer:
    """Uniform with variance 2 / (fan_in + fan_out) for kernels (..., inputs, outputs) (Glorot and Bengio, 2010)."""

    def draw(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        bound = math.sqrt(6.0 / (math.prod(shape[:-2]) * (shape[-2] + shape[-1])))
        return rng.uniform(-bound, bound, shape)

    return _initializer(draw)


def step_bias(low: float, high: float) -> nnx.Initializer:
    """Inverse softplus of step sizes that are log-uniform in [low, high)."""

    def draw(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        step = np.exp(rng.uniform(math.log(low), math.log(high), shape))
        return step + np.log(-np.expm1(-step))

    return _initializer(draw)


def zeros(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32, **_: object) -> jax.Array:
    """Zeros; the key is not used."""
    return jax.device_put(np.zeros(shape, dtype))


def constant(values: ArrayLike) -> jax.Array:
    """`values` as a float32 array."""
    # Not `jnp.asarray`, which compiles a program for every shape.
    return jax.device_put(np.asarray(values, np.float32))


def _initializer(draw: Draw) -> nnx.Initializer:
    def initializer(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32, **_: object) -> jax.Array:
        def values(key_data: jax.Array | np.ndarray) -> np.ndarray:
            rng = np.random.default_rng(np.asarray(key_data).tolist())
            return draw(rng, tuple(shape)).astype(dtype)

        key_data = jax.random.key_data(key)
        if isinstance(key_data, jax.core.Tracer):
            result = jax.ShapeDtypeStruct(shape, dtype)
            return jax.pure_callback(values, result, key_data, vmap_method="sequential")
        return jax.device_put(values(key_data))

    return initializer
