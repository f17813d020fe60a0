"""Predictions as a pure, jitted function of arrays, for use in other JAX programs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike, DTypeLike

from msvmamba_jax.checkpoint import Description, Weights, build_model, load_checkpoint
from msvmamba_jax.errors import InputError
from msvmamba_jax.models.detection.inference import detect
from msvmamba_jax.models.parameters import Tree, bind, get_weights
from msvmamba_jax.programs import ManyShapes, keep_compiled_programs
from msvmamba_jax.tasks.pixels import normalise, resize_and_crop, resize_within
from msvmamba_jax.tasks.segmentation import best_classes

Predictions = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class InferenceFunction:
    """A jitted model: `f(images)` is `f.apply(f.parameters, images)`.

    Attributes:
        apply: pure function of (parameters, images), jitted. Inside another jitted function pass the parameters as an
            argument of that function; those of `f(images)` would become constants of the compiled program.
        parameters: the weights.
        description: what the checkpoint is: its task, classes and preprocessing.
    """

    apply: Callable[[Tree, jax.Array], Predictions]
    parameters: Tree
    description: Description

    @property
    def class_names(self) -> tuple[str, ...]:
        """The name of each label."""
        return self.description.class_names

    @property
    def preprocessing(self) -> Any:
        """How files are to be prepared; `apply` does the same on arrays."""
        return self.description.preprocessing

    def __call__(self, images: ArrayLike) -> Predictions:
        """As `apply`, with the checkpoint's weights."""
        return self._apply(self.parameters, jnp.asarray(images))

    @functools.cached_property
    def _apply(self) -> ManyShapes:
        return ManyShapes(self.apply)


def inference_function(
    checkpoint: str | Path,
    *,
    resize: bool = True,
    weights: Weights | None = None,
    dtype: DTypeLike | Literal["float32", "bfloat16"] = jnp.float32,
    scan_implementation: str | None = None,
) -> InferenceFunction:
    """Makes a checkpoint a function from images to predictions.

    The function takes images (b, height, width, 3), RGB, either uint8 or floating point in 0..1, and compiles once for
    each shape, or reads the program that an earlier process kept (`programs.keep_compiled_programs`). It returns

    - for classification: `probabilities` float32 (b, classes) and `labels` int32 (b,), the most probable class of each
      image;
    - for segmentation: `labels` int32 (b, height, width), the most probable class of each pixel of the images that were
      given, and `probabilities` float32 (b, height, width), that of this class;
    - for detection: of the up to 100 objects of each image, by falling score, `boxes` float32 (b, 100, 4), x1, y1, x2
      and y2 in pixels of the images that were given; `labels` int32, `scores` float32 and `valid` bool, (b, 100), False
      where there are fewer; and `masks` float32 (b, 100, 28, 28), probabilities over the box, which
      `models.detection.masks.paste_masks` puts on an image.

    Args:
        checkpoint: a checkpoint folder or a training run's workdir.
        resize: resize the images as the checkpoint says (classification: the short side, then the centre is cut out;
            segmentation and detection: into its scale, keeping the ratio). False feeds them as they are, at any size.
        weights: "ema", "raw", or None for the averaged weights where there are any.
        dtype: dtype of the computation.
        scan_implementation: see `create_model`.

    Raises:
        InputError: there is no checkpoint, or it cannot be read. The function raises it for arrays that are no images.
    """
    keep_compiled_programs()
    description, parameters = load_checkpoint(checkpoint, weights)
    model = build_model(description, parameters, dtype=dtype, scan_implementation=scan_implementation)
    abstract = nnx.eval_shape(lambda: model)
    of_task = _APPLY[description.task]

    @jax.jit
    def apply(parameters: Tree, images: jax.Array) -> Predictions:
        _check(images)
        return of_task(bind(abstract, parameters), images, description.preprocessing, resize)

    return InferenceFunction(apply, get_weights(model), description)


def _classify(model: Any, images: jax.Array, preprocessing: Any, resize: bool) -> Predictions:
    if resize:
        images = resize_and_crop(images, preprocessing)
    logits = model(normalise(images, preprocessing))
    return {"probabilities": jax.nn.softmax(logits), "labels": jnp.argmax(logits, axis=-1).astype(jnp.int32)}


def _segment(model: Any, images: jax.Array, preprocessing: Any, resize: bool) -> Predictions:
    resized = resize_within(images, preprocessing) if resize else images
    _, height, width, _ = images.shape
    labels, probabilities = best_classes(model, normalise(resized, preprocessing), height, width)
    return {"probabilities": probabilities, "labels": labels}


def _detect(model: Any, images: jax.Array, preprocessing: Any, resize: bool) -> Predictions:
    resized = resize_within(images, preprocessing) if resize else images
    count, height, width, _ = resized.shape
    padding = [(0, -side % preprocessing.divisor) for side in (height, width)]
    padded = jnp.pad(normalise(resized, preprocessing), [(0, 0), *padding, (0, 0)])
    extent = jnp.tile(jnp.array([height, width], jnp.int32), (count, 1))
    scale = jnp.tile(jnp.array([width / images.shape[2], height / images.shape[1]], jnp.float32), (count, 1))
    found = detect(model, padded, extent, scale)
    return {
        "boxes": found.box,
        "labels": found.label,
        "scores": found.score,
        "masks": found.mask,
        "valid": found.valid,
    }


_APPLY: dict[str, Callable[[Any, jax.Array, Any, bool], Predictions]] = {
    "classification": _classify,
    "segmentation": _segment,
    "detection": _detect,
}


def _check(images: jax.Array) -> None:
    if images.ndim != 4 or images.shape[-1] != 3:
        raise InputError(f"images must have the shape (batch, height, width, 3); got {images.shape}")
    if images.dtype != jnp.uint8 and not jnp.issubdtype(images.dtype, jnp.floating):
        raise InputError(f"images must be uint8 or floating point in 0..1; got {images.dtype}")
