"""The largest values of each image, found where the image is."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
from jax import lax

from msvmamba_jax.kernels.selective_scan.partitioning import by_image


def top_k(values: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """The largest values (count,) of (n,), falling, and their indices, int32; of equal ones the first is first.

    Of `lax.top_k` alone XLA makes one that first brings all images to every device.
    """
    [largest], [index] = _of_images(count)(values[None])
    return largest, index


@functools.cache
def _of_images(count: int) -> Callable[..., tuple[jax.Array, ...]]:
    return by_image(lambda values: tuple(lax.top_k(values, count)), shared=())
