"""Semantic segmentation: cross-entropy of every pixel, with an auxiliary head; mean intersection over union."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from msvmamba_jax.checkpoint import Description
from msvmamba_jax.models.resize import resize_bilinear, resize_bilinear_twice, two_step_matrix
from msvmamba_jax.pictures_segmentation import segmentation_sheet
from msvmamba_jax.tasks.base import Batch, Mirror
from msvmamba_jax.tasks.pixels import normalise, zero_beyond
from msvmamba_jax.tasks.segmentation_metrics import SegmentationEvaluator, confusion

IGNORED = 255  # the label of pixels that nobody is asked about
AUXILIARY_WEIGHT = 0.4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Segmentation:
    """The semantic segmentation task; see `Task`.

    Attributes:
        description: the model and its classes.
        tta: average the probabilities of an image and of its mirror image; the ratios of test-time augmentation are
            those of the batch.
    """

    description: Description
    tta: bool = False
    score: str = "mIoU"

    def prepare(self, batch: Batch, keys: jax.Array, batch_key: jax.Array, mirror: Mirror) -> Batch:
        """See `Task`. Batch: `image` uint8 (b, h, w, 3), `labels` uint8 (b, h, w), `extent` int32 (b, 2).

        Returns:
            `image` float32 (b, h, w, 3), normalised, and 0 in the rows and columns beyond `extent`; `labels`.
        """
        images = normalise(batch["image"], self.description.preprocessing)
        return {"image": zero_beyond(images, batch["extent"]), "labels": batch["labels"]}

    def loss(self, model: Any, batch: Batch, keys: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """See `Task`: the loss of the head, and `AUXILIARY_WEIGHT` times that of the auxiliary head."""
        logits, auxiliary_logits = model.with_auxiliary(batch["image"], keys, train=True)
        loss, accuracy = pixel_cross_entropy(logits, batch["labels"])
        auxiliary, _ = pixel_cross_entropy(auxiliary_logits, batch["labels"])
        auxiliary = AUXILIARY_WEIGHT * auxiliary
        return loss + auxiliary, {"pixel_accuracy": accuracy, "decode_loss": loss, "auxiliary_loss": auxiliary}

    def predict(self, model: Any, batch: Batch) -> dict[str, jax.Array]:
        """See `Task`.

        Args:
            model: the model.
            batch: `labels` uint8 (b, height, width), of the size that predictions are wanted in; `image` uint8
                (b, h, w, 3), or several of different sizes (`image_0`, ...), whose probabilities are averaged.

        Returns:
            `prediction` uint8 (b, height, width), the most probable class of each pixel; `labels`; `confusion` int32
            (b, classes, classes), see `segmentation_metrics.confusion`.
        """
        labels = batch["labels"]
        images = [images for name, images in sorted(batch.items()) if name.startswith("image")]
        prediction = self.classify(model, images, *labels.shape[1:])
        count = jax.vmap(lambda prediction, labels: confusion(prediction, labels, model.num_classes))
        return {"prediction": prediction, "labels": labels, "confusion": count(prediction, labels)}

    def classify(self, model: Any, images: Sequence[jax.Array], height: int, width: int) -> jax.Array:
        """The most probable class of each pixel, uint8 (b, height, width).

        Args:
            model: the model.
            images: of one or several sizes, each uint8 (b, h, w, 3).
            height: of the result.
            width: of the result.
        """
        normalised = [normalise(image, self.description.preprocessing) for image in images]
        if self.tta:
            views = [view for image in normalised for view in both_ways(model, image, height, width)]
        else:
            views = [pixel_logits(model, image, height, width) for image in normalised]
        scores = functools.reduce(jnp.add, map(jax.nn.softmax, views)) if len(views) > 1 else views[0]
        return jnp.argmax(scores, axis=-1).astype(jnp.uint8)

    def evaluator(self) -> SegmentationEvaluator:
        """See `Task`."""
        return SegmentationEvaluator(self.description.class_names)

    def draw(self, examples: Sequence[tuple[Batch, Batch]]) -> Image.Image:
        """See `Task`: for each image the predicted classes over it, and the true ones beside it."""
        name = "image" if "image" in examples[0][0] else "image_0"
        return segmentation_sheet(
            [(np.asarray(batch[name]), found["prediction"], found["labels"]) for batch, found in examples],
            self.description.class_names,
        )


def pixel_logits(model: Any, images: jax.Array, height: int, width: int) -> jax.Array:
    """The logits of all classes in each pixel.

    As in the original, they are resized to the size of the images, and from there to the size asked for.

    Args:
        model: a segmenter.
        images: (b, h, w, 3), normalised.
        height: of the result.
        width: of the result.

    Returns:
        (b, height, width, classes), float32.
    """
    return _to_pixels(model(images), images, height, width)


def both_ways(model: Any, images: jax.Array, height: int, width: int) -> tuple[jax.Array, jax.Array]:
    """`pixel_logits` of images, and those of their mirror images turned back.

    The model sees both at once, so that it is compiled once and not twice.
    """
    # Beside each other, not one half after the other: what is split over devices stays on them.
    pairs = jnp.stack([images, images[:, :, ::-1]], axis=1)
    logits = model(pairs.reshape(-1, *images.shape[1:]))
    logits = logits.reshape(*pairs.shape[:2], *logits.shape[1:])
    # Turned back before resizing, which knows no left and right.
    plain, mirrored = logits[:, 0], logits[:, 1, :, ::-1]
    return _to_pixels(plain, images, height, width), _to_pixels(mirrored, images, height, width)


def _to_pixels(logits: jax.Array, images: jax.Array, height: int, width: int) -> jax.Array:
    _, rows, columns, _ = images.shape
    return resize_bilinear_twice(logits, (rows, columns), height, width)


def best_classes(model: Any, images: jax.Array, height: int, width: int, rows: int = 64) -> tuple[jax.Array, jax.Array]:
    """The most probable class of each pixel and its probability, a band of rows at a time.

    All logits of a photograph of 12 megapixels would fill 7 GB with 150 classes; this needs a tenth.

    Args:
        model: a segmenter.
        images: (b, h, w, 3), normalised.
        height: of the result.
        width: of the result.
        rows: of a band.

    Returns:
        int32 and float32 (b, height, width); see `pixel_logits`.
    """
    logits = model(images)
    map_height, (image_height, image_width) = logits.shape[1], images.shape[1:3]
    # Only the columns: no row is resized yet.
    wide = resize_bilinear_twice(logits, (map_height, image_width), map_height, width)
    matrix = two_step_matrix(map_height, image_height, height)
    bands = np.pad(matrix, ((0, -height % rows), (0, 0))).reshape(-1, rows, map_height)

    def classify(band: jax.Array) -> tuple[jax.Array, jax.Array]:
        values = jnp.einsum("rh,bhwc->brwc", band, wide, precision=jax.lax.Precision.HIGHEST)
        probability = jnp.exp(jnp.max(values, axis=-1) - jax.nn.logsumexp(values, axis=-1))
        return jnp.argmax(values, axis=-1).astype(jnp.int32), probability

    found = jax.lax.map(classify, jnp.asarray(bands, logits.dtype))
    labels, probabilities = (jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, width)[:, :height] for x in found)
    return labels, probabilities


def pixel_cross_entropy(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean cross-entropy over all pixels, to which ignored ones add nothing but their number, and the pixel accuracy.

    This is mmsegmentation's loss with `avg_non_ignore=False`, and its `acc_seg` as a fraction.

    Args:
        logits: (b, h, w, classes), float; resized bilinearly to the size of the labels.
        labels: (b, height, width), integer; a class, or `IGNORED`.

    Returns:
        The loss, and the fraction of the pixels that are not ignored whose largest logit is the label's; 0 where there
        are none. Scalars in the dtype of the logits.
    """
    labels = labels.astype(jnp.int32)
    logits = resize_bilinear(logits, *labels.shape[1:])
    counted = labels != IGNORED
    # One-hot by comparison: a gather of one element per pixel would be a scatter in the backward pass.
    hot = labels[..., None] == jnp.arange(logits.shape[-1], dtype=jnp.int32)
    of_label = jnp.sum(jnp.where(hot, logits, 0), axis=-1)
    entropy = jnp.where(counted, jax.nn.logsumexp(logits, axis=-1) - of_label, 0)
    correct = jnp.sum(counted & (jnp.argmax(logits, axis=-1).astype(labels.dtype) == labels), dtype=logits.dtype)
    accuracy = correct / jnp.maximum(jnp.sum(counted, dtype=logits.dtype), 1)
    return jnp.mean(entropy), accuracy
