"""Batch normalisation over the whole batch, however it is spread over devices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from msvmamba_jax.errors import InputError
from msvmamba_jax.models.depthwise import accumulator_dtype
from msvmamba_jax.models.initializers import constant


class BatchNorm(nnx.Module):
    """Batch normalisation (Ioffe and Szegedy, arXiv:1502.03167) as PyTorch computes it.

    Parameters: `scale` and `bias` (c,). Statistics: the running `mean` and unbiased `var` (c,), float32.

    Args:
        features: number of channels c.
        axis: name of the mapped axis over which the batch is spread (`jax.pmap`). None where the batch is one array,
            which under `jax.jit` is the global one.
        dtype: of the output.
    """

    EPSILON = 1e-5
    MOMENTUM = 0.1  # weight of the new batch in the running statistics

    def __init__(self, features: int, *, axis: str | None, dtype: DTypeLike):
        self.scale = nnx.Param(constant(np.ones(features)))
        self.bias = nnx.Param(constant(np.zeros(features)))
        self.mean = nnx.BatchStat(constant(np.zeros(features)))
        self.var = nnx.BatchStat(constant(np.ones(features)))
        self.axis = axis
        self.dtype = dtype

    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Normalises each channel of x (..., c) to the same shape.

        Args:
            x: any number of axes; statistics go over all but the last.
            train: normalise by the statistics of the batch, and move the running ones towards them. Otherwise the
                running ones serve.

        Raises:
            InputError: training on a single value per channel, whose variance is nothing.
        """
        shape = x.shape
        dtype = accumulator_dtype(x.dtype)
        rows = x.reshape(-1, shape[-1]).astype(dtype)
        if train:
            mean, var = self._batch_statistics(rows)
        else:
            mean, var = self.mean[...].astype(dtype), self.var[...].astype(dtype)
        rows = (rows - mean) * (jax.lax.rsqrt(var + self.EPSILON) * self.scale[...].astype(dtype))
        return (rows + self.bias[...].astype(dtype)).astype(self.dtype).reshape(shape)

    def _batch_statistics(self, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Mean and biased variance of (n, c), which also move the running ones."""
        count = rows.shape[0] * (1 if self.axis is None else jax.lax.axis_size(self.axis))
        if count < 2:
            raise InputError(
                "batch normalisation cannot train on one image where its map has one position: use a batch of 2 or more"
            )
        # Two passes, which do not cancel for large means; the second one needs the mean of the whole batch.
        mean = self._mean_over_devices(jnp.mean(rows, axis=0))
        var = self._mean_over_devices(jnp.mean(jnp.square(rows - mean), axis=0))
        for running, new in ((self.mean, mean), (self.var, var * (count / (count - 1)))):
            moved = (1 - self.MOMENTUM) * running[...].astype(new.dtype) + self.MOMENTUM * jax.lax.stop_gradient(new)
            running.set_value(moved.astype(running[...].dtype))  # not in place: it may be an array of NumPy
        return mean, var

    def _mean_over_devices(self, x: jax.Array) -> jax.Array:
        return x if self.axis is None else jax.lax.pmean(x, self.axis)
