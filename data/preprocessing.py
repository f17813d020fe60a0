"""From an image to a network's input: resize, centre crop, normalisation, and how a checkpoint states them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
from PIL import Image

from msvmamba_jax.errors import InputError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "hamming": Image.Resampling.HAMMING,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}

# Beyond this ratio of the sides an image is trimmed before it is resized: the centre crop never sees what is trimmed,
# and a resized strip of one by a million pixels would not fit into memory.
_MAX_ASPECT = 64


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings that a checkpoint remembers: the fields of a frozen dataclass, to JSON and back."""

    def to_json(self) -> dict[str, Any]:
        """The settings as numbers, strings and lists, as `json` writes and reads them."""
        fields = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}

    @classmethod
    def from_json(cls, settings: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`; settings that are absent keep their defaults.

        Raises:
            InputError: a key is unknown, or a value is of the wrong kind or range.
        """
        if not isinstance(settings, Mapping):
            raise InputError(f"Preprocessing: the settings must be a table of names and values, not {settings!r}.")
        known = [field.name for field in dataclasses.fields(cls)]
        if unknown := [str(key) for key in settings if key not in known]:
            raise InputError(f"Preprocessing: unknown key {', '.join(unknown)}; known are {', '.join(known)}.")
        return cls(**settings)


@dataclasses.dataclass(frozen=True)
class Preprocessing(Settings):
    """How an image is prepared for evaluation and prediction.

    Attributes:
        size: side of the square crop, in pixels.
        resize: length of the image's short side before the crop, in pixels; at least `size`.
        interpolation: Pillow's resampling filter, a key of `INTERPOLATIONS`; antialiased when it shrinks.
        mean: per channel (red, green, blue), of values in 0..1.
        std: likewise; positive.

    Raises:
        InputError: on construction, when a value is of the wrong kind or range.
    """

    size: int = 224
    resize: int = 256
    interpolation: str = "bicubic"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        for name in ("size", "resize"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"Preprocessing: {name} must be a positive whole number of pixels, not {value!r}.")
        if self.resize < self.size:
            raise InputError(f"Preprocessing: resize ({self.resize}) must be at least size ({self.size}).")
        if self.interpolation not in INTERPOLATIONS:
            known = ", ".join(INTERPOLATIONS)
            raise InputError(f"Preprocessing: unknown interpolation {self.interpolation!r}; known are {known}.")
        for name in ("mean", "std"):
            object.__setattr__(self, name, three_numbers(name, getattr(self, name)))
        if min(self.std) <= 0:
            raise InputError(f"Preprocessing: std must be positive, not {self.std!r}.")

    @property
    def nominal_size(self) -> tuple[int, int]:
        """Height and width of what a model is fed."""
        return self.size, self.size

    def crop(self, image: np.ndarray) -> np.ndarray:
        """Resizes the short side to `resize` and cuts the square centre, by the rules of torchvision's transforms.

        Args:
            image: uint8 array of shape (height, width, 3).

        Returns:
            uint8 array of shape (size, size, 3).

        Raises:
            InputError: the array is not a uint8 RGB image.
        """
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
            raise InputError(
                f"An image must be a uint8 array of shape (height, width, 3), not {image.dtype} of shape {image.shape}."
            )
        short = min(image.shape[:2])
        image = _centre(image, *(min(length, _MAX_ASPECT * short) for length in image.shape[:2]))
        height, width = (
            self.resize if length == short else int(self.resize * length / short) for length in image.shape[:2]
        )
        if (height, width) != image.shape[:2]:
            resized = Image.fromarray(image).resize((width, height), INTERPOLATIONS[self.interpolation])
            image = np.asarray(resized)
        return np.ascontiguousarray(_centre(image, self.size, self.size))

    def normalise(self, images: np.ndarray) -> np.ndarray:
        """(images / 255 - mean) / std.

        Args:
            images: uint8 array of shape (..., 3).

        Returns:
            float32 array of the same shape.

        Raises:
            InputError: the array is not uint8 with three channels last.
        """
        if images.dtype != np.uint8 or images.ndim < 1 or images.shape[-1] != 3:
            raise InputError(f"Images must be uint8 of shape (..., 3), not {images.dtype} of shape {images.shape}.")
        scaled = images.astype(np.float32) / np.float32(255)
        return (scaled - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)


def three_numbers(name: str, values: Sequence[float]) -> tuple[float, float, float]:
    """Checks the setting `name`, one finite number for each channel.

    Raises:
        InputError: the values are of another kind or number.
    """
    try:
        red, green, blue = map(float, values)
    except (TypeError, ValueError):
        raise InputError(f"Preprocessing: {name} must be three numbers, not {values!r}.") from None
    if not all(map(math.isfinite, (red, green, blue))):
        raise InputError(f"Preprocessing: {name} must be finite, not {values!r}.")
    return red, green, blue


def _centre(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """The central `height` x `width` window; half a pixel is rounded to the even offset, as torchvision does."""
    top = round((image.shape[0] - height) / 2.0)
    left = round((image.shape[1] - width) / 2.0)
    return image[top : top + height, left : left + width]
