"""Anchors: the reference boxes of the region proposal network (Faster R-CNN, arXiv:1506.01497, section 3.1.1).

As in FPN (arXiv:1612.03144, section 4.1), every pyramid level has one size and three shapes. Anchors of a level are in
the order row, column, ratio; those of a pyramid in the order of its levels, finest first.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

STRIDES = (4, 8, 16, 32, 64)  # pixels between neighbouring positions of each pyramid level
SCALE = 8  # side of the square anchor in strides
RATIOS = (0.5, 1.0, 2.0)  # height / width
PER_POSITION = len(RATIOS)

IMAGE_MULTIPLE = 32  # an image is padded to a multiple of this; positions behind its own padding do not count


def base_anchors(stride: int) -> np.ndarray:
    """Anchors (3, 4) of the position at (0, 0): equal areas of (8 stride)^2, centred at 0."""
    ratio = np.sqrt(np.asarray(RATIOS, np.float32))
    half_width, half_height = 0.5 * stride * SCALE / ratio, 0.5 * stride * SCALE * ratio
    return np.stack([-half_width, -half_height, half_width, half_height], -1).astype(np.float32)


def level_anchors(height: int, width: int, stride: int) -> jax.Array:
    """Anchors (height * width * 3, 4) of a map of height x width positions; position 1 is at pixel `stride`."""
    y = jnp.arange(height, dtype=jnp.float32) * stride
    x = jnp.arange(width, dtype=jnp.float32) * stride
    y, x = jnp.meshgrid(y, x, indexing="ij")
    shifts = jnp.stack([x, y, x, y], -1)[:, :, None]
    return (shifts + base_anchors(stride)).reshape(-1, 4)


def pyramid_anchors(sizes: Sequence[tuple[int, int]], strides: Sequence[int] = STRIDES) -> jax.Array:
    """Anchors (n, 4) of maps of these sizes (rows, columns), one for each stride."""
    return jnp.concatenate([level_anchors(*size, stride) for size, stride in zip(sizes, strides, strict=True)])


def level_of_anchors(sizes: Sequence[tuple[int, int]]) -> np.ndarray:
    """The level (n,), int32, of each anchor of a pyramid."""
    counts = [height * width * PER_POSITION for height, width in sizes]
    return np.repeat(np.arange(len(sizes), dtype=np.int32), counts)


def places_of_anchors(sizes: Sequence[tuple[int, int]]) -> jax.Array:
    """A number (n,), uint32, for each anchor of a pyramid that tells level, row, column and ratio.

    Unlike its index it does not depend on the size of the maps: random decisions keyed by it survive padding.
    """

    def level(index: int, height: int, width: int) -> jax.Array:
        row = jnp.arange(height, dtype=jnp.uint32)[:, None, None] << 14
        column = jnp.arange(width, dtype=jnp.uint32)[:, None] << 2
        return (jnp.uint32(index << 29) + row + column + jnp.arange(PER_POSITION, dtype=jnp.uint32)).reshape(-1)

    return jnp.concatenate([level(index, *size) for index, size in enumerate(sizes)])


def padded_size(image_size: jax.Array) -> jax.Array:
    """Sizes (..., 2), int32, of images (..., 2) that are padded at the bottom and right to a multiple of 32."""
    return -(-jnp.asarray(image_size, jnp.int32) // IMAGE_MULTIPLE) * IMAGE_MULTIPLE


def inside(sizes: Sequence[tuple[int, int]], size: jax.Array, strides: Sequence[int] = STRIDES) -> jax.Array:
    """Which anchors (n,), bool, of a pyramid sit on an image of `size` pixels.

    Args:
        sizes: rows and columns of the maps, which may be larger because other images of the batch are.
        size: (2,), int, height and width of this image with its own padding, see `padded_size`.
        strides: one for each map.
    """
    masks = []
    for (height, width), stride in zip(sizes, strides, strict=True):
        rows, columns = -(-size[0] // stride), -(-size[1] // stride)
        mask = (jnp.arange(height) < rows)[:, None] & (jnp.arange(width) < columns)
        masks.append(jnp.broadcast_to(mask[..., None], (height, width, PER_POSITION)).reshape(-1))
    return jnp.concatenate(masks)
