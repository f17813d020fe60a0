"""Predictions as a pure, jitted function of arrays, for use in other JAX programs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike, DTypeLike

from msvmamba_jax.checkpoint import Weights, build_model, load_checkpoint
from msvmamba_jax.data.preprocessing import Preprocessing
from msvmamba_jax.errors import InputError
from msvmamba_jax.models.parameters import Tree, bind, get_parameters

Predictions = dict[str, jax.Array]

_METHODS = {"nearest": "nearest", "bilinear": "linear", "bicubic": "cubic", "lanczos": "lanczos3"}


@dataclasses.dataclass(frozen=True)
class InferenceFunction:
    """A jitted classifier: `f(images)` is `f.apply(f.parameters, images)`.

    Attributes:
        apply: pure function of (parameters, images), jitted. Inside another jitted function pass the parameters as an
            argument of that function; those of `f(images)` would become constants of the compiled program.
        parameters: the weights.
        class_names: the name of each label.
        preprocessing: how files are to be prepared; `apply` does the same on arrays.
    """

    apply: Callable[[Tree, jax.Array], Predictions]
    parameters: Tree
    class_names: tuple[str, ...]
    preprocessing: Preprocessing

    def __call__(self, images: ArrayLike) -> Predictions:
        """As `apply`, with the checkpoint's weights."""
        return self.apply(self.parameters, jnp.asarray(images))


def inference_function(
    checkpoint: str | Path,
    *,
    resize: bool = True,
    weights: Weights | None = None,
    dtype: DTypeLike | Literal["float32", "bfloat16"] = jnp.float32,
    scan_implementation: str | None = None,
) -> InferenceFunction:
    """Makes a checkpoint a function from images to predictions.

    The function takes images (b, height, width, 3), RGB, either uint8 or floating point in 0..1, and returns
    `probabilities` float32 (b, classes) and `labels` int32 (b,), the most probable class of each image. It compiles
    once for each shape.

    Args:
        checkpoint: a checkpoint folder or a training run's workdir.
        resize: resize and crop the images as the checkpoint says (short side, then the centre). False feeds them as
            they are, at any size.
        weights: "ema", "raw", or None for the averaged weights where there are any.
        dtype: dtype of the computation.
        scan_implementation: see `create_model`.

    Raises:
        InputError: there is no checkpoint, or it cannot be read. The function raises it for arrays that are no images.
    """
    description, parameters = load_checkpoint(checkpoint, weights)
    model = build_model(description, parameters, dtype=dtype, scan_implementation=scan_implementation)
    preprocessing = description.preprocessing
    abstract = nnx.eval_shape(lambda: model)

    @jax.jit
    def apply(parameters: Tree, images: jax.Array) -> Predictions:
        _check(images)
        if resize:
            images = resize_and_crop(images, preprocessing)
        logits = bind(abstract, parameters)(normalise(images, preprocessing))
        return {
            "probabilities": jax.nn.softmax(logits),
            "labels": jnp.argmax(logits, axis=-1).astype(jnp.int32),
        }

    return InferenceFunction(apply, get_parameters(model), description.class_names, preprocessing)


def _check(images: jax.Array) -> None:
    if images.ndim != 4 or images.shape[-1] != 3:
        raise InputError(f"images must have the shape (batch, height, width, 3); got {images.shape}")
    if images.dtype != jnp.uint8 and not jnp.issubdtype(images.dtype, jnp.floating):
        raise InputError(f"images must be uint8 or floating point in 0..1; got {images.dtype}")


def normalise(images: jax.Array, preprocessing: Preprocessing) -> jax.Array:
    """Images (..., 3), uint8 or floating point in 0..1, to float32 (x - mean) / std."""
    scaled = images.astype(jnp.float32)
    if images.dtype == jnp.uint8:
        scaled = scaled / 255.0
    return (scaled - jnp.asarray(preprocessing.mean)) / jnp.asarray(preprocessing.std)


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


def _resize_axis(images: jax.Array, axis: int, size: int, method: str) -> jax.Array:
    if images.shape[axis] == size:
        return images
    shape = [*images.shape]
    shape[axis] = size
    resized = jax.image.resize(images.astype(jnp.float32), shape, method, precision=jax.lax.Precision.HIGHEST)
    if images.dtype == jnp.uint8:
        resized = jnp.clip(jnp.floor(resized + 0.5), 0, 255)  # a half goes up, as in Pillow
    return resized.astype(images.dtype)
