"""Mean intersection over union and its relatives, from one confusion matrix over the whole split."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


def confusion(prediction: jax.Array, labels: jax.Array, classes: int) -> jax.Array:
    """Counts the pixels of one image by true and predicted class; traced.

    Args:
        prediction: integers (height, width) in 0..classes - 1.
        labels: integers (height, width); pixels with any other value than 0..classes - 1 count nowhere.
        classes: how many there are.

    Returns:
        int32 (classes, classes): at (i, j) the pixels of class i that were taken for class j.
    """
    truth, prediction = labels.astype(jnp.int32), prediction.astype(jnp.int32)
    labelled = (truth >= 0) & (truth < classes)
    # What lies out of bounds is dropped.
    cell = jnp.where(labelled, truth * classes + prediction, classes * classes)
    counts = jnp.zeros(classes * classes, jnp.int32).at[cell.ravel()].add(1, mode="drop")
    return counts.reshape(classes, classes)


class ClassScore(NamedTuple):
    """The scores of one class over a split; `_asdict()` is ready for JSON.

    Attributes:
        name: of the class.
        iou: intersection over union in 0..1; None where the class neither occurs nor was predicted.
        accuracy: the part of its pixels that were found; None where it does not occur.
        pixels: how many there are of it.
    """

    name: str
    iou: float | None
    accuracy: float | None
    pixels: int


class SegmentationEvaluator:
    """Sums confusion matrices over a split, on the host; exact.

    Attributes:
        class_names: the name of every label.
        confusion: int64 (classes, classes), rows for the true classes.
        images: how many were counted.
    """

    def __init__(self, class_names: Sequence[str]) -> None:
        self.class_names = tuple(class_names)
        self.confusion = np.zeros((len(self.class_names),) * 2, np.int64)
        self.images = 0

    def update(self, predictions: Mapping[str, np.ndarray], mask: np.ndarray) -> None:
        """Adds one batch.

        Args:
            predictions: ``"confusion"``, integers (b, classes, classes): see `confusion`.
            mask: bool (b,), False where a row is padding.
        """
        mask = np.asarray(mask, bool)
        self.confusion += np.asarray(predictions["confusion"])[mask].sum(axis=0, dtype=np.int64)
        self.images += int(mask.sum())

    def result(self) -> dict[str, float]:
        """The metrics as mmsegmentation defines them, in 0..1, and the number of images.

        `mIoU` is the mean over the classes that occur in the labels or the predictions, `mean_accuracy` that over the
        classes that occur in the labels, `pixel_accuracy` counts all labelled pixels alike.
        """
        scores = self.scores()
        return {
            "mIoU": _mean([score.iou for score in scores]),
            "mean_accuracy": _mean([score.accuracy for score in scores]),
            "pixel_accuracy": int(self.confusion.trace()) / max(int(self.confusion.sum()), 1),
            "images": self.images,
        }

    def scores(self) -> list[ClassScore]:
        """The scores of every class, in the order of the labels."""
        found, truth, predicted = self.confusion.diagonal(), self.confusion.sum(axis=1), self.confusion.sum(axis=0)
        return [
            ClassScore(name, _ratio(hits, pixels + taken - hits), _ratio(hits, pixels), pixels)
            for name, hits, pixels, taken in zip(
                self.class_names, found.tolist(), truth.tolist(), predicted.tolist(), strict=True
            )
        ]

    def per_class(self) -> list[dict[str, Any]]:
        """`scores` as plain JSON values."""
        return [score._asdict() for score in self.scores()]

    def sentence(self) -> str:
        """See `Evaluator`."""
        result = self.result()
        return (
            f"mIoU {result['mIoU']:.2%}, mean accuracy {result['mean_accuracy']:.2%}, "
            f"pixel accuracy {result['pixel_accuracy']:.2%} on {self.images:,} images"
        )


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _mean(values: Sequence[float | None]) -> float:
    """Of those that are defined; 0 where none is."""
    defined = [value for value in values if value is not None]
    return math.fsum(defined) / max(len(defined), 1)
