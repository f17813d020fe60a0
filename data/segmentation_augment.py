"""Augmentation of training images and their label maps on the host, as mmsegmentation's recipe for ADE20K has it.

Resize, crop, flip, distort the colours, pad: in this order. What mmsegmentation does to BGR images is done to RGB ones
here, with the same results: OpenCV's conversions to HSV and back only differ in where they find the channels.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from msvmamba_jax.data.resizing import opencv, rescale_size, resize_image, resize_labels
from msvmamba_jax.data.segmentation import IGNORED
from msvmamba_jax.data.segmentation_preprocessing import SCALE, checked_scale
from msvmamba_jax.errors import InputError

_CROP_TRIES = 10
_HUES = 180  # OpenCV's circle of hues in 8 bits: steps of two degrees


@dataclasses.dataclass(frozen=True)
class PhotometricDistortion:
    """Brightness, contrast, saturation and hue, each changed with probability 1/2; as mmsegmentation rounds them.

    Brightness comes first, then saturation and hue; contrast comes before these two or after them, by a fair draw. Each
    step ends in uint8: values are clipped and their fractions cut off.

    Attributes:
        brightness: greatest change, of values in 0..255.
        contrast: least and greatest factor.
        saturation: least and greatest factor.
        hue: greatest change, in steps of two degrees; whole steps in -hue..hue - 1 are drawn.
    """

    brightness: float = 32.0
    contrast: tuple[float, float] = (0.5, 1.5)
    saturation: tuple[float, float] = (0.5, 1.5)
    hue: int = 18

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Distorts an image.

        Args:
            image: uint8 (height, width, 3), RGB; it is not changed.
            rng: the only source of randomness.

        Returns:
            uint8 of the same shape; the image itself where nothing was drawn.
        """
        if rng.random() < 0.5:
            image = scale_and_shift(image, shift=rng.uniform(-self.brightness, self.brightness))
        contrast_first = rng.random() < 0.5
        if contrast_first:
            image = self._contrast(image, rng)
        if rng.random() < 0.5:
            image = change_saturation(image, rng.uniform(*self.saturation))
        if rng.random() < 0.5:
            image = change_hue(image, int(rng.integers(-self.hue, self.hue)))
        return image if contrast_first else self._contrast(image, rng)

    def _contrast(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return scale_and_shift(image, scale=rng.uniform(*self.contrast)) if rng.random() < 0.5 else image


def scale_and_shift(values: np.ndarray, *, scale: float = 1.0, shift: float = 0.0) -> np.ndarray:
    """values * scale + shift in float32, clipped to 0..255, the fraction cut off.

    Args:
        values: uint8 of any shape.
        scale: the factor.
        shift: the summand.

    Returns:
        uint8 of the same shape.
    """
    table = np.arange(256, dtype=np.float32) * np.float32(scale) + np.float32(shift)
    found = opencv().LUT(values, table.clip(0, 255).astype(np.uint8))
    return found.reshape(values.shape)  # OpenCV 4 gives a vector a second axis


def change_saturation(image: np.ndarray, factor: float) -> np.ndarray:
    """Scales the saturation of a uint8 RGB image (height, width, 3), by way of OpenCV's 8-bit HSV."""
    cv2 = opencv()
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
    hsv[..., 1] = scale_and_shift(hsv[..., 1], scale=factor)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)


def change_hue(image: np.ndarray, steps: int) -> np.ndarray:
    """Turns the hue of a uint8 RGB image (height, width, 3) by steps of two degrees, by way of OpenCV's 8-bit HSV."""
    cv2 = opencv()
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
    turned = ((np.arange(256) + steps) % _HUES).astype(np.uint8)
    hsv[..., 0] = cv2.LUT(hsv[..., 0], turned)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)


@dataclasses.dataclass(frozen=True)
class SegmentationAugmentation:
    """The whole augmentation, as `Dataset.augment`; picklable.

    Attributes:
        crop: side of the square result, in pixels.
        scale: bounds of the long and the short side that the factor applies to, in pixels.
        factor: least and greatest factor; it is drawn uniformly, and the image keeps its aspect ratio.
        max_class_part: greatest part of a crop's pixels that one class may have, ignored ones apart; 1 for no limit.
        flip: probability of the horizontal flip.
        distortion: of the colours; None for none.

    Raises:
        InputError: on construction, when a value is of the wrong kind or range.
    """

    crop: int = 512
    scale: tuple[int, int] = SCALE
    factor: tuple[float, float] = (0.5, 2.0)
    max_class_part: float = 0.75
    flip: float = 0.5
    distortion: PhotometricDistortion | None = dataclasses.field(default_factory=PhotometricDistortion)

    def __post_init__(self) -> None:
        if isinstance(self.crop, bool) or not isinstance(self.crop, int) or self.crop < 1:
            raise InputError(f"Augmentation: crop must be a positive whole number of pixels, not {self.crop!r}.")
        object.__setattr__(self, "scale", checked_scale("Augmentation", self.scale))
        try:
            low, high = map(float, self.factor)
        except (TypeError, ValueError):
            raise InputError(f"Augmentation: factor must be two numbers, not {self.factor!r}.") from None
        if not 0 < low <= high < math.inf:
            raise InputError(f"Augmentation: factor must be two positive numbers in rising order, not {self.factor!r}.")
        object.__setattr__(self, "factor", (low, high))
        if not isinstance(self.max_class_part, int | float) or not 0 < self.max_class_part <= 1:
            raise InputError(f"Augmentation: max_class_part must be in 0..1, not {self.max_class_part!r}.")
        if not isinstance(self.flip, int | float) or not 0 <= self.flip <= 1:
            raise InputError(f"Augmentation: flip must be a probability in 0..1, not {self.flip!r}.")

    def __call__(self, record: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        """Augments a training record.

        Args:
            record: with ``"image"`` uint8 (height, width, 3) and ``"labels"`` uint8 (height, width), of any size; it is
                not changed.
            rng: the only source of randomness.

        Returns:
            The record with new values: ``"image"`` uint8 (crop, crop, 3), ``"labels"`` uint8 (crop, crop), and
            ``"extent"`` int32 (2,), the rows and columns that are filled. Beyond them the image is 0 and the labels are
            `IGNORED`; there the network's input must be 0, so whoever normalises the image zeroes it again.
        """
        image, labels = record["image"], record["labels"]
        factor = rng.uniform(*self.factor)
        scale = max(1, int(self.scale[0] * factor)), max(1, int(self.scale[1] * factor))
        height, width = labels.shape
        size = rescale_size(height, width, scale)
        image, labels = resize_image(image, *size), resize_labels(labels, *size)
        top, left = random_crop(labels, self.crop, rng, max_class_part=self.max_class_part)
        window = slice(top, top + self.crop), slice(left, left + self.crop)
        image, labels = image[window], labels[window]
        if rng.random() < self.flip:
            image, labels = image[:, ::-1], labels[:, ::-1]
        if self.distortion is not None:
            image = self.distortion(np.ascontiguousarray(image), rng)
        rows, columns = labels.shape
        padding = (0, self.crop - rows), (0, self.crop - columns)
        return {
            **record,
            "image": np.pad(image, (*padding, (0, 0))),
            "labels": np.pad(labels, padding, constant_values=IGNORED),
            "extent": np.array((rows, columns), np.int32),
        }


def random_crop(
    labels: np.ndarray, crop: int, rng: np.random.Generator, *, max_class_part: float = 0.75
) -> tuple[int, int]:
    """Draws where to cut a square window, by mmsegmentation's rule.

    The position is uniform. A window is drawn anew while it holds fewer than two classes, or one of them has
    `max_class_part` of its labelled pixels or more; the eleventh one is taken as it is. Along an axis where the window
    is larger than the image it begins at 0.

    Args:
        labels: uint8 (height, width), with `IGNORED` where there is none.
        crop: side of the window, in pixels.
        rng: the only source of randomness.
        max_class_part: 1 takes the first window.

    Returns:
        Top and left of the window.
    """
    height, width = labels.shape

    def draw() -> tuple[int, int]:
        top = int(rng.integers(max(height - crop, 0) + 1))
        return top, int(rng.integers(max(width - crop, 0) + 1))

    top, left = draw()
    if max_class_part < 1:
        for _ in range(_CROP_TRIES):
            counts = np.bincount(labels[top : top + crop, left : left + crop].ravel(), minlength=256)[:IGNORED]
            if np.count_nonzero(counts) > 1 and counts.max() / counts.sum() < max_class_part:
                break
            top, left = draw()
    return top, left
