"""Boxes: areas, overlaps, and their coding as offsets from a reference box."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

# Scales of the four offsets. The RPN codes in units of the anchor, the box head in tenths and fifths of the proposal.
RPN_DEVIATIONS = (1.0, 1.0, 1.0, 1.0)
HEAD_DEVIATIONS = (0.1, 0.1, 0.2, 0.2)

MAX_LOG_RATIO = math.log(1000 / 16)  # a decoded side is at most 62.5 times, or at least 1 / 62.5 of, the reference's


def area(boxes: jax.Array) -> jax.Array:
    """Areas (...,) of boxes (..., 4)."""
    # What compilers may not do to an absolute value, or to a choice as below: fuse the product with a sum that follows,
    # which would round otherwise. Whether overlaps are equal decides in assignment and suppression.
    return jnp.abs((boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1]))


def intersection(a: jax.Array, b: jax.Array) -> jax.Array:
    """Common areas (...,) of boxes a (..., 4) and b (..., 4), element by element with broadcasting."""
    width = jnp.minimum(a[..., 2], b[..., 2]) - jnp.maximum(a[..., 0], b[..., 0])
    height = jnp.minimum(a[..., 3], b[..., 3]) - jnp.maximum(a[..., 1], b[..., 1])
    return jnp.where((width > 0.0) & (height > 0.0), width * height, 0.0)


def iou(a: jax.Array, b: jax.Array) -> jax.Array:
    """Intersection over union (...,) of boxes a (..., 4) and b (..., 4), element by element with broadcasting.

    `iou(a[:, None], b)` is the matrix of all pairs. Two boxes without area have overlap 0.
    """
    common = intersection(a, b)
    return common / jnp.maximum(area(a) + area(b) - common, 1e-6)


def encode(references: jax.Array, boxes: jax.Array, deviations: tuple[float, float, float, float]) -> jax.Array:
    """Offsets that lead from references to boxes: R-CNN (arXiv:1311.2524), appendix C, divided by `deviations`.

    dx = (x - x_r) / w_r, dy = (y - y_r) / h_r, dw = ln(w / w_r), dh = ln(h / h_r), where x, y is the centre.

    Args:
        references: anchors or proposals (..., 4) of positive width and height.
        boxes: (..., 4), of positive width and height.
        deviations: scales of the four offsets.

    Returns:
        (..., 4), float32.
    """
    reference_centre, reference_size = _centre_and_size(references)
    centre, size = _centre_and_size(boxes)
    shift = (centre - reference_centre) / reference_size
    return jnp.concatenate([shift, jnp.log(size / reference_size)], -1) / jnp.asarray(deviations, boxes.dtype)


def decode(references: jax.Array, deltas: jax.Array, deviations: tuple[float, float, float, float]) -> jax.Array:
    """The inverse of `encode`; changes of size beyond `MAX_LOG_RATIO` are limited to it.

    Args:
        references: (..., 4); (n, 1, 4) for deltas (n, classes, 4) of several classes.
        deltas: (..., 4), float32.
        deviations: scales of the four offsets.

    Returns:
        Boxes (..., 4), float32; not clipped, see `clip`.
    """
    deltas = deltas * jnp.asarray(deviations, deltas.dtype)
    reference_centre, reference_size = _centre_and_size(references)
    centre = reference_centre + reference_size * deltas[..., :2]
    size = reference_size * jnp.exp(jnp.clip(deltas[..., 2:], -MAX_LOG_RATIO, MAX_LOG_RATIO))
    return jnp.concatenate([centre - 0.5 * size, centre + 0.5 * size], -1)


def clip(boxes: jax.Array, size: jax.Array) -> jax.Array:
    """Boxes (..., 4) cut to an image of `size` (height, width): a pair, or an array (..., 2) that broadcasts."""
    size = jnp.asarray(size, boxes.dtype)
    height, width = size[..., 0], size[..., 1]
    return jnp.clip(boxes, 0.0, jnp.stack([width, height, width, height], -1))


def _centre_and_size(boxes: jax.Array) -> tuple[jax.Array, jax.Array]:
    return (boxes[..., :2] + boxes[..., 2:]) * 0.5, boxes[..., 2:] - boxes[..., :2]
