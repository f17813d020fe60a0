"""Bilinear resizing of feature maps with PyTorch's align_corners=False coordinates."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def resize_bilinear(x: jax.Array, height: int, width: int) -> jax.Array:
    """Resizes x (b, h, w, d) to (b, height, width, d), without antialiasing, in the dtype of `x`."""
    return _resize_axis(_resize_axis(x, 1, height), 2, width)


def _resize_axis(x: jax.Array, axis: int, size: int) -> jax.Array:
    old = x.shape[axis]
    if size == old:
        return x
    if size == 2 * old:
        return _double(x, axis)
    weights = jnp.asarray(_interpolation_matrix(old, size), x.dtype)
    resized = jnp.tensordot(weights, x, axes=(1, axis), precision=jax.lax.Precision.HIGHEST)
    return jnp.moveaxis(resized, 0, axis)


def _double(x: jax.Array, axis: int) -> jax.Array:
    """Twice the size: every output is 3/4 of the nearer and 1/4 of the farther neighbour, edges repeated."""
    size = x.shape[axis]
    take = lambda start, stop: jax.lax.slice_in_dim(x, start, stop, axis=axis)  # noqa: E731
    before = jnp.concatenate([take(0, 1), take(0, size - 1)], axis)
    after = jnp.concatenate([take(1, size), take(size - 1, size)], axis)
    pairs = jnp.stack([0.25 * before + 0.75 * x, 0.75 * x + 0.25 * after], axis + 1)
    return pairs.reshape(*x.shape[:axis], 2 * size, *x.shape[axis + 1 :])


def _interpolation_matrix(old: int, new: int) -> np.ndarray:
    """(new, old) weights; each row has at most two that are not zero."""
    centre = np.maximum((np.arange(new) + 0.5) * old / new - 0.5, 0.0)
    lower = np.minimum(centre.astype(np.int64), old - 1)
    upper = np.minimum(lower + 1, old - 1)
    fraction = centre - lower
    matrix = np.zeros((new, old))
    np.add.at(matrix, (np.arange(new), lower), 1.0 - fraction)
    np.add.at(matrix, (np.arange(new), upper), fraction)
    return matrix
