"""Random erasing on the device (arXiv:1708.04896), in the form of timm's mode "pixel"."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

AREA = (0.02, 1.0 / 3.0)  # of the box, as a part of the image's
ASPECT = (0.3, 1.0 / 0.3)  # height over width of the box
ATTEMPTS = 10


def erase(images: jax.Array, keys: jax.Array, probability: float) -> jax.Array:
    """Fills one box of some images with standard normal noise, another value in every pixel and channel.

    Args:
        images: (b, h, w, c), normalised, floating point.
        keys: (b,), a random key for each image.
        probability: that an image is erased; 0 returns the images as they are.

    Returns:
        Of the shape and dtype of `images`.
    """
    if not probability:
        return images
    return jax.vmap(lambda image, key: _erase_one(image, key, probability))(images, keys)


def draw_box(key: jax.Array, height: int, width: int) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Draws the box of one image of `height` x `width` pixels.

    The area is uniform in `AREA`, the logarithm of the aspect ratio uniform in that of `ASPECT`. The first of
    `ATTEMPTS` boxes that is both lower and narrower than the image is taken.

    Returns:
        top, left, rows, columns: int32 scalars; no rows and no columns where every attempt failed.
    """
    area_key, aspect_key, top_key, left_key = jax.random.split(key, 4)
    area = jax.random.uniform(area_key, (ATTEMPTS,), minval=AREA[0], maxval=AREA[1]) * (height * width)
    bounds = math.log(ASPECT[0]), math.log(ASPECT[1])
    aspect = jnp.exp(jax.random.uniform(aspect_key, (ATTEMPTS,), minval=bounds[0], maxval=bounds[1]))
    all_rows = jnp.round(jnp.sqrt(area * aspect)).astype(jnp.int32)
    all_columns = jnp.round(jnp.sqrt(area / aspect)).astype(jnp.int32)
    fits = (all_rows < height) & (all_columns < width)
    first = jnp.argmax(fits)
    rows = jnp.where(jnp.any(fits), all_rows[first], 0)
    columns = jnp.where(jnp.any(fits), all_columns[first], 0)
    top = jax.random.randint(top_key, (), 0, height - rows + 1)
    left = jax.random.randint(left_key, (), 0, width - columns + 1)
    return top, left, rows, columns


def inside(height: int, width: int, top: jax.Array, left: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
    """Which pixels lie in a box: bool (height, width, 1)."""
    y = jax.lax.broadcasted_iota(jnp.int32, (height, width, 1), 0)
    x = jax.lax.broadcasted_iota(jnp.int32, (height, width, 1), 1)
    return (y >= top) & (y < top + rows) & (x >= left) & (x < left + columns)


def _erase_one(image: jax.Array, key: jax.Array, probability: float) -> jax.Array:
    chosen_key, box_key, noise_key = jax.random.split(key, 3)
    height, width, _ = image.shape
    mask = inside(height, width, *draw_box(box_key, height, width)) & jax.random.bernoulli(chosen_key, probability)
    return jnp.where(mask, jax.random.normal(noise_key, image.shape, image.dtype), image)
