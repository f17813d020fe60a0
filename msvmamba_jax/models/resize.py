"""Bilinear resizing of feature maps with PyTorch's align_corners=False coordinates, and its adaptive pooling."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from msvmamba_jax.models.depthwise import accumulator_dtype

LARGEST_FACTOR = 8  # of enlargements that are unrolled


def resize_bilinear(x: jax.Array, height: int, width: int) -> jax.Array:
    """Resizes x (b, h, w, d) to (b, height, width, d), without antialiasing, in the dtype of `x`."""
    return _resize_axis(_resize_axis(x, 1, height), 2, width)


def resize_bilinear_twice(x: jax.Array, between: tuple[int, int], height: int, width: int) -> jax.Array:
    """`resize_bilinear` to the size `between`, then to (height, width), without a map of the size in between.

    Both are linear and separate along the axes, so two matrices make one.
    """
    for axis, middle, size in ((1, between[0], height), (2, between[1], width)):
        x = _times(jnp.asarray(two_step_matrix(x.shape[axis], middle, size), x.dtype), x, axis)
    return x


def two_step_matrix(old: int, middle: int, new: int) -> np.ndarray:
    """(new, old): the weights of a resize to `middle` positions and then to `new`, along one axis."""
    return _interpolation_matrix(middle, new) @ _interpolation_matrix(old, middle)


def adaptive_average_pool(x: jax.Array, size: int) -> jax.Array:
    """Means of x (b, h, w, d) over a grid of size x size cells, (b, size, size, d), in the dtype of `x`.

    Cell i of n positions covers floor(i n / size) to ceil((i + 1) n / size): neighbours overlap where `size` does not
    divide n, and a map smaller than the grid is repeated.
    """
    dtype = accumulator_dtype(x.dtype)
    rows, columns = (jnp.asarray(_pooling_matrix(n, size), dtype) for n in x.shape[1:3])
    pooled = jnp.einsum("bhwd,ph,qw->bpqd", x.astype(dtype), rows, columns, precision=jax.lax.Precision.HIGHEST)
    return pooled.astype(x.dtype)


def _pooling_matrix(old: int, new: int) -> np.ndarray:
    """(new, old) weights; each row is the mean over one cell."""
    matrix = np.zeros((new, old))
    for i in range(new):
        start, stop = i * old // new, -(-(i + 1) * old // new)
        matrix[i, start:stop] = 1.0 / (stop - start)
    return matrix


def _resize_axis(x: jax.Array, axis: int, size: int) -> jax.Array:
    old = x.shape[axis]
    if size == old:
        return x
    if size % old == 0 and size // old <= LARGEST_FACTOR:
        return _enlarge(x, axis, size // old)
    weights = jnp.asarray(_interpolation_matrix(old, size), x.dtype)
    return _times(weights, x, axis)


def _times(matrix: jax.Array, x: jax.Array, axis: int) -> jax.Array:
    """The matrix (new, old) applied along an axis of length old."""
    product = jnp.tensordot(matrix, x, axes=(1, axis), precision=jax.lax.Precision.HIGHEST)
    return jnp.moveaxis(product, 0, axis)


def _enlarge(x: jax.Array, axis: int, factor: int) -> jax.Array:
    """A whole number of times the size: the outputs around a position are fixed mixtures of it and a neighbour.

    Twice the size, they are 3/4 of it and 1/4 of the one before or after. Edges are repeated. Sums of shifted maps are
    fused with what follows, and cost less than products with matrices that are nearly all zero.
    """
    size = x.shape[axis]
    take = lambda start, stop: jax.lax.slice_in_dim(x, start, stop, axis=axis)  # noqa: E731
    before = jnp.concatenate([take(0, 1), take(0, size - 1)], axis)
    after = jnp.concatenate([take(1, size), take(size - 1, size)], axis)
    outputs = []
    for place in range(factor):
        offset = (place + 0.5) / factor - 0.5  # of the output's centre from that of the position
        neighbour = before if offset < 0 else after
        outputs.append((1 - abs(offset)) * x + abs(offset) * neighbour if offset else x)
    return jnp.stack(outputs, axis + 1).reshape(*x.shape[:axis], factor * size, *x.shape[axis + 1 :])


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
