"""Augmentation of training images on the host: random resized crop, horizontal flip, RandAugment."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
from PIL import Image

from msvmamba_jax.data.preprocessing import INTERPOLATIONS
from msvmamba_jax.data.randaugment import IMAGENET_FILL, Colour, RandAugment
from msvmamba_jax.errors import InputError

_TRIES = 10


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """The ImageNet recipe's half that runs on the host, as `Dataset.augment`; picklable.

    Attributes:
        size: side of the square result, in pixels.
        interpolation: Pillow's resampling filter, a key of `INTERPOLATIONS`; antialiased when it shrinks. RandAugment
            uses it too where it can, and otherwise (as for "lanczos") bicubic.
        randaugment: a policy such as "rand-m9-mstd0.5-inc1" (see `RandAugment.from_string`); None for none.
        scale: least and largest area of the crop, as a part of the image's.
        ratio: least and largest width over height of the crop, before it is resized to a square.
        flip: probability of the horizontal flip.
        fill: colour of what RandAugment brings in from outside the image, in 0..255.

    Raises:
        InputError: on construction, when a value is of the wrong kind or range.
    """

    size: int = 224
    interpolation: str = "bicubic"
    randaugment: str | None = "rand-m9-mstd0.5-inc1"
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    fill: Colour = IMAGENET_FILL
    _policy: RandAugment | None = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.size, bool) or not isinstance(self.size, int) or self.size < 1:
            raise InputError(f"Augmentation: size must be a positive whole number of pixels, not {self.size!r}.")
        if self.interpolation not in INTERPOLATIONS:
            known = ", ".join(INTERPOLATIONS)
            raise InputError(f"Augmentation: unknown interpolation {self.interpolation!r}; known are {known}.")
        for name in ("scale", "ratio"):
            object.__setattr__(self, name, _range(name, getattr(self, name)))
        if self.scale[1] > 1:
            raise InputError(f"Augmentation: scale must not exceed 1, the whole image, but is {self.scale}.")
        if not isinstance(self.flip, int | float) or not 0 <= self.flip <= 1:
            raise InputError(f"Augmentation: flip must be a probability in 0..1, not {self.flip!r}.")
        policy = None
        if self.randaugment is not None:
            interpolation = self.interpolation if self.interpolation in ("nearest", "bilinear") else "bicubic"
            policy = RandAugment.from_string(self.randaugment, interpolation=interpolation, fill=self.fill)
        object.__setattr__(self, "_policy", policy)

    def __call__(self, record: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        """Augments the image of a training record.

        Args:
            record: with ``"image"``, uint8 (height, width, 3) of any size, or Pillow's RGB image; it is not changed.
            rng: the only source of randomness.

        Returns:
            The record with a new image, uint8 (size, size, 3).
        """
        image = record["image"]
        picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
        top, left, height, width = random_crop(picture.height, picture.width, rng, scale=self.scale, ratio=self.ratio)
        # Cut first, as torchvision does: a filter that saw beyond the crop's border would give other pixels there.
        crop = picture.crop((left, top, left + width, top + height))
        crop = crop.resize((self.size, self.size), INTERPOLATIONS[self.interpolation])
        if rng.random() < self.flip:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self._policy is not None:
            crop = self._policy.apply(crop, rng)
        return {**record, "image": np.array(crop)}


def random_crop(
    height: int,
    width: int,
    rng: np.random.Generator,
    *,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> tuple[int, int, int, int]:
    """Draws a window by the rules of torchvision's `RandomResizedCrop`.

    The area is uniform in `scale`, the aspect ratio log-uniform in `ratio`, the position uniform. A window that does
    not fit into the image is drawn anew, ten times at most; then the largest central window with an aspect ratio in
    `ratio` is taken.

    Args:
        height: of the image, in pixels.
        width: of the image, in pixels.
        rng: the only source of randomness.
        scale: least and largest area, as a part of the image's.
        ratio: least and largest width over height.

    Returns:
        Top, left, height and width of the window.
    """
    low, high = ratio
    for _ in range(_TRIES):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(low), math.log(high)))
        crop_width = round(math.sqrt(area * aspect))
        crop_height = round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = int(rng.integers(height - crop_height + 1))
            left = int(rng.integers(width - crop_width + 1))
            return top, left, crop_height, crop_width
    crop_width = min(width, max(1, round(height * high)))
    crop_height = min(height, max(1, round(width / low)))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def _range(name: str, values: Any) -> tuple[float, float]:
    try:
        low, high = map(float, values)
    except (TypeError, ValueError):
        raise InputError(f"Augmentation: {name} must be two numbers, not {values!r}.") from None
    if not 0 < low <= high < math.inf:
        raise InputError(f"Augmentation: {name} must be two positive numbers in rising order, not {values!r}.")
    return low, high
