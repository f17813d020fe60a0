"""From a whole image to a segmentation network's input: one scale, or the ratios of test-time augmentation."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from msvmamba_jax.data.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Settings, three_numbers
from msvmamba_jax.data.resizing import rescale_size, rescale_size_by_ratio, resize_image
from msvmamba_jax.errors import InputError

SCALE = (2048, 512)  # of ADE20K's recipe
LEAST_SIDE = 4  # pixels; narrower images are widened to this, since networks start with patches of so many
TTA_RATIOS = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)  # mmsegmentation's; each without and with a horizontal flip


@dataclasses.dataclass(frozen=True)
class SegmentationPreprocessing(Settings):
    """How an image is prepared for evaluation and prediction.

    Attributes:
        scale: bounds of the long and the short side, in pixels; see `rescale_size`.
        mean: per channel (red, green, blue), of values in 0..1.
        std: likewise; positive.

    Raises:
        InputError: on construction, when a value is of the wrong kind or range.
    """

    scale: tuple[int, int] = SCALE
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", checked_scale("Preprocessing", self.scale))
        for name in ("mean", "std"):
            object.__setattr__(self, name, three_numbers(name, getattr(self, name)))
        if min(self.std) <= 0:
            raise InputError(f"Preprocessing: std must be positive, not {self.std!r}.")

    @property
    def nominal_size(self) -> tuple[int, int]:
        """Height and width for which costs are stated: those of the scale, on its side."""
        return self.scale[1], self.scale[0]

    def prepared_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width that `prepare` gives an image of this height and width."""
        return _wide_enough(rescale_size(height, width, self.scale))

    def prepare(self, image: np.ndarray) -> np.ndarray:
        """Resizes an image within `scale`, keeping its aspect ratio.

        Args:
            image: uint8 (height, width, 3).

        Returns:
            uint8 (height', width', 3), RGB, not yet normalised.

        Raises:
            InputError: the array is not a uint8 RGB image, or OpenCV is not installed.
        """
        check_image(image)
        return resize_image(image, *self.prepared_size(*image.shape[:2]))


def prepare_tta(image: np.ndarray, ratios: Sequence[float] = TTA_RATIOS) -> list[np.ndarray]:
    """Resizes an image for test-time augmentation, by ratios of its own size (whatever the scale of one pass).

    Args:
        image: uint8 (height, width, 3).
        ratios: of the sides; positive.

    Returns:
        For each ratio uint8 (height', width', 3). Flipped copies are left to whoever takes them.

    Raises:
        InputError: the array is not a uint8 RGB image, or OpenCV is not installed.
    """
    check_image(image)
    height, width = image.shape[:2]
    return [resize_image(image, *_wide_enough(rescale_size_by_ratio(height, width, ratio))) for ratio in ratios]


def _wide_enough(size: tuple[int, int]) -> tuple[int, int]:
    height, width = size
    return max(height, LEAST_SIDE), max(width, LEAST_SIDE)


def checked_scale(owner: str, values: Any) -> tuple[int, int]:
    """Checks a scale: two whole numbers of pixels, the long side first.

    Raises:
        InputError: it is none; `owner` begins the message.
    """
    try:
        long, short = values
    except (TypeError, ValueError):
        raise InputError(f"{owner}: scale must be a long and a short side in pixels, not {values!r}.") from None
    if any(isinstance(side, bool) or not isinstance(side, int) for side in (long, short)) or not 1 <= short <= long:
        raise InputError(
            f"{owner}: scale must be a long and a short side, two positive whole numbers of pixels in falling order, "
            f"not {values!r}."
        )
    return long, short


def check_image(image: np.ndarray) -> None:
    """Checks that an array is an image, uint8 (height, width, 3).

    Raises:
        InputError: it is none.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise InputError(
            f"An image must be a uint8 array of shape (height, width, 3), not {image.dtype} of shape {image.shape}."
        )
