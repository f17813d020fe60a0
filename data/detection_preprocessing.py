"""From a whole image to a detector's input: resized, at the top left of a canvas of a few sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from msvmamba_jax.data.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Settings, three_numbers
from msvmamba_jax.data.resizing import rescale_size, resize_image, scale_factors
from msvmamba_jax.data.segmentation_preprocessing import check_image, checked_scale
from msvmamba_jax.errors import InputError

SCALE = (1333, 800)  # of COCO's recipe
DIVISOR = 32  # the coarsest stride of the feature pyramid's input


@dataclasses.dataclass(frozen=True)
class DetectionPreprocessing(Settings):
    """How an image is prepared for evaluation and prediction.

    Attributes:
        scale: bounds of the long and the short side, in pixels; see `rescale_size`.
        divisor: height and width of the padded image are multiples of it.
        mean: per channel (red, green, blue), of values in 0..1.
        std: likewise; positive.

    Raises:
        InputError: on construction, when a value is of the wrong kind or range.
    """

    scale: tuple[int, int] = SCALE
    divisor: int = DIVISOR
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", checked_scale("Preprocessing", self.scale))
        checked_divisor("Preprocessing", self.divisor)
        for name in ("mean", "std"):
            object.__setattr__(self, name, three_numbers(name, getattr(self, name)))
        if min(self.std) <= 0:
            raise InputError(f"Preprocessing: std must be positive, not {self.std!r}.")

    @property
    def nominal_size(self) -> tuple[int, int]:
        """Height and width for which costs are stated: those of the scale, on its side and padded."""
        return round_up(self.scale[1], self.divisor), round_up(self.scale[0], self.divisor)

    def prepared_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width to which an image of this height and width is resized."""
        return rescale_size(height, width, self.scale)

    def padded_size(self, height: int, width: int, bucket: int = 0) -> tuple[int, int]:
        """Height and width of the canvas that `prepare` puts an image of this height and width on."""
        height, width = self.prepared_size(height, width)
        step = bucket or self.divisor
        return round_up(height, step), round_up(width, step)

    def prepare(self, image: np.ndarray, bucket: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Resizes an image within `scale`, keeping its aspect ratio, and pads it.

        Args:
            image: uint8 (height, width, 3).
            bucket: what height and width of the result are multiples of; 0: `divisor`.

        Returns:
            - the canvas, uint8 (height', width', 3), RGB, not yet normalised, with the resized image at the top left
              and 0 beyond, where the network's input must be 0 too: whoever normalises the image zeroes it again;
            - the rows and columns that the image fills, int32 (2,);
            - what x and what y coordinates were multiplied by, float32 (2,).

        Raises:
            InputError: the array is not a uint8 RGB image, or OpenCV is not installed.
        """
        check_image(image)
        height, width = image.shape[:2]
        size = self.prepared_size(height, width)
        canvas = np.zeros((*self.padded_size(height, width, bucket), 3), np.uint8)
        canvas[: size[0], : size[1]] = resize_image(image, *size)
        return canvas, np.array(size, np.int32), np.array(scale_factors((height, width), size), np.float32)


def detection_example(preprocessing: DetectionPreprocessing, bucket: int, record: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of an evaluation example.

    Args:
        preprocessing: of the image.
        bucket: 0 pads the image to multiples of the preprocessing's divisor, which is exact. Otherwise it is padded to
            multiples of `bucket` pixels, so that there are few shapes.
        record: with ``"image"`` uint8 (height, width, 3) and ``"index"``.

    Returns:
        ``"image"`` uint8, ``"extent"`` int32 (2,) and ``"scale"`` float32 (2,), see `DetectionPreprocessing.prepare`,
        and ``"index"`` int32, the number of the record.
    """
    image, extent, scale = preprocessing.prepare(record["image"], bucket)
    return {"image": image, "extent": extent, "scale": scale, "index": np.int32(record["index"])}


def detection_shapes(preprocessing: DetectionPreprocessing, bucket: int, sizes: np.ndarray) -> list[tuple[int, int]]:
    """Height and width of the images in the examples of `detection_example`, for images of these sizes.

    Args:
        preprocessing: of the images.
        bucket: as there.
        sizes: height and width in pixels, integers (n, 2).
    """
    return [preprocessing.padded_size(height, width, bucket) for height, width in sizes.tolist()]


def checked_bucket(bucket: Any, divisor: int) -> int:
    """Checks the `bucket` of `detection_example`: 0, or a multiple of the preprocessing's divisor.

    Raises:
        InputError: it is neither.
    """
    if isinstance(bucket, bool) or not isinstance(bucket, int) or bucket < 0 or bucket % divisor:
        raise InputError(f"The bucket must be 0 or a multiple of {divisor} pixels, not {bucket!r}.")
    return bucket


def checked_divisor(owner: str, divisor: Any) -> int:
    """Checks a divisor: a positive whole number of pixels.

    Raises:
        InputError: it is none; `owner` begins the message.
    """
    if isinstance(divisor, bool) or not isinstance(divisor, int) or divisor < 1:
        raise InputError(f"{owner}: divisor must be a positive whole number of pixels, not {divisor!r}.")
    return divisor


def round_up(length: int, step: int) -> int:
    """The least multiple of `step` that is not below `length`."""
    return -(-length // step) * step
