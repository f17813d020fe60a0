"""Preparing images on the device: what `data` does to files, for arrays in a traced program."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from msvmamba_jax.data.detection_preprocessing import DetectionPreprocessing
from msvmamba_jax.data.preprocessing import Preprocessing
from msvmamba_jax.data.segmentation_preprocessing import SegmentationPreprocessing
from msvmamba_jax.errors import InputError
from msvmamba_jax.models.resize import resize_bilinear

AnyPreprocessing = Preprocessing | SegmentationPreprocessing | DetectionPreprocessing

_METHODS = {"nearest": "nearest", "bilinear": "linear", "bicubic": "cubic", "lanczos": "lanczos3"}


def normalise(images: jax.Array, preprocessing: AnyPreprocessing) -> jax.Array:
    """Images (..., 3), uint8 or floating point in 0..1, to float32 (x - mean) / std."""
    scaled = images.astype(jnp.float32)
    if images.dtype == jnp.uint8:
        scaled = scaled / 255.0
    return (scaled - jnp.asarray(preprocessing.mean)) / jnp.asarray(preprocessing.std)


def zero_beyond(images: jax.Array, extent: jax.Array) -> jax.Array:
    """Zeroes the padding of normalised images.

    Args:
        images: (b, h, w, 3), each with its pixels at the top left.
        extent: (b, 2), the rows and columns that they fill.
    """
    rows = jax.lax.broadcasted_iota(jnp.int32, images.shape[:3], 1) < extent[:, :1, None]
    columns = jax.lax.broadcasted_iota(jnp.int32, images.shape[:3], 2) < extent[:, 1:, None]
    return jnp.where((rows & columns)[..., None], images, 0)


def resize_and_crop(images: jax.Array, preprocessing: Preprocessing) -> jax.Array:
    """`Preprocessing.crop` on a batch of arrays: the short side to `resize`, then the centre of `size` x `size`.

    Filters are Pillow's, antialiased; uint8 images are rounded after each direction as Pillow does, so that few values
    differ from it, and those by one step.

    Args:
        images: (b, height, width, 3), uint8 or floating point.
        preprocessing: the sizes and the interpolation.

    Returns:
        (b, size, size, 3) in the dtype of `images`.

    Raises:
        InputError: the interpolation has no counterpart in JAX.
    """
    short = min(images.shape[1:3])
    target = [
        preprocessing.resize if length == short else int(preprocessing.resize * length / short)
        for length in images.shape[1:3]
    ]
    if preprocessing.interpolation not in _METHODS:
        raise InputError(
            f"arrays cannot be resized with interpolation {preprocessing.interpolation!r}: resize them on the host "
            "(Preprocessing.crop) and pass resize=False"
        )
    method = _METHODS[preprocessing.interpolation]
    for axis in (2, 1):
        images = _resize_axis(images, axis, target[axis - 1], method)
    top, left = (round((length - preprocessing.size) / 2.0) for length in target)
    return images[:, top : top + preprocessing.size, left : left + preprocessing.size]


def resize_within(images: jax.Array, preprocessing: SegmentationPreprocessing | DetectionPreprocessing) -> jax.Array:
    """What the preprocessing's `prepare` does on a batch of arrays, without padding.

    Bilinear and not antialiased, as OpenCV; uint8 images are rounded, and differ from its fixed-point result by one
    step in few values.

    Args:
        images: (b, height, width, 3), uint8 or floating point.
        preprocessing: the scale.

    Returns:
        (b, height', width', 3) in the dtype of `images`.
    """
    size = preprocessing.prepared_size(*images.shape[1:3])
    if size == images.shape[1:3]:
        return images
    resized = resize_bilinear(images.astype(jnp.float32), *size)
    if images.dtype == jnp.uint8:
        resized = jnp.clip(jnp.floor(resized + 0.5), 0, 255)
    return resized.astype(images.dtype)


def _resize_axis(images: jax.Array, axis: int, size: int, method: str) -> jax.Array:
    if images.shape[axis] == size:
        return images
    shape = [*images.shape]
    shape[axis] = size
    resized = jax.image.resize(images.astype(jnp.float32), shape, method, precision=jax.lax.Precision.HIGHEST)
    if images.dtype == jnp.uint8:
        resized = jnp.clip(jnp.floor(resized + 0.5), 0, 255)  # a half goes up, as in Pillow
    return resized.astype(images.dtype)
