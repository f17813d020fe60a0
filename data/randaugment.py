"""RandAugment with the operations and magnitudes of ImageNet recipes, under the names that timm gave them.

`RandAugment.from_string("rand-m9-mstd0.5-inc1")` is the policy that DeiT, Swin and VMamba train with: two operations
for every image, drawn from `OPERATIONS` with replacement, each left out half of the time. The method is that of Cubuk
et al., "RandAugment: Practical automated data augmentation with a reduced search space" (2020); operations and
constants are those of timm's "increasing" set, in which a higher magnitude always distorts more.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from msvmamba_jax.data.preprocessing import IMAGENET_MEAN, INTERPOLATIONS
from msvmamba_jax.errors import InputError

Colour = tuple[int, int, int]

MAX_MAGNITUDE = 10.0

# The mean colour of ImageNet, in 0..255: what comes in from outside when an image is turned, sheared or shifted.
IMAGENET_FILL: Colour = (
    round(255 * IMAGENET_MEAN[0]),
    round(255 * IMAGENET_MEAN[1]),
    round(255 * IMAGENET_MEAN[2]),
)

_PROBABILITY = 0.5  # of each operation that was drawn
_SETTING = re.compile(r"(mstd|inc|m|n)(\d+(?:\.\d+)?)")


@dataclasses.dataclass(frozen=True)
class RandAugment:
    """Random operations on an image; picklable.

    Attributes:
        magnitude: mean of the magnitudes, 0..10.
        magnitude_std: their standard deviation; every operation draws its own, which is clipped to 0..10.
        layers: how many operations are drawn for an image.
        interpolation: of turned, sheared and shifted images: "nearest", "bilinear" or "bicubic".
        fill: the colour of what lies outside the image, in 0..255.

    Raises:
        InputError: on construction, when a value is out of range.
    """

    magnitude: float = 9.0
    magnitude_std: float = 0.0
    layers: int = 2
    interpolation: str = "bicubic"
    fill: Colour = IMAGENET_FILL

    def __post_init__(self) -> None:
        if not 0 <= self.magnitude <= MAX_MAGNITUDE:
            raise InputError(f"RandAugment: the magnitude must be in 0..10, not {self.magnitude:g}.")
        if not 0 <= self.magnitude_std < math.inf:
            raise InputError(f"RandAugment: the magnitude's deviation must not be negative: {self.magnitude_std:g}.")
        if self.layers < 1:
            raise InputError(f"RandAugment: at least one operation must be drawn, not {self.layers}.")
        # The other filters of Pillow only change sizes.
        if self.interpolation not in ("nearest", "bilinear", "bicubic"):
            raise InputError(
                f"RandAugment: interpolation must be 'nearest', 'bilinear' or 'bicubic', not {self.interpolation!r}."
            )

    @classmethod
    def from_string(cls, text: str, *, interpolation: str = "bicubic", fill: Colour = IMAGENET_FILL) -> RandAugment:
        """Reads timm's notation.

        Args:
            text: "rand", then settings separated by "-" in any order: ``m`` the magnitude, ``mstd`` its standard
                deviation, ``n`` the number of operations, and ``inc1``, which must be there.
            interpolation: see the class.
            fill: see the class.

        Raises:
            InputError: the text is none of these, or a value is out of range.
        """
        kind, *parts = text.split("-")
        matches = [_SETTING.fullmatch(part) for part in parts]
        settings = {match[1]: float(match[2]) for match in matches if match}
        layers = settings.get("n", 2.0)
        if kind != "rand" or len(settings) < len(parts) or settings.get("inc") != 1 or not layers.is_integer():
            raise InputError(
                f"Cannot read the RandAugment policy {text!r}: write it as in 'rand-m9-mstd0.5-inc1', with m "
                "(magnitude, 0..10), mstd (its deviation), n (operations for an image) and inc1."
            )
        return cls(
            magnitude=settings.get("m", cls.magnitude),
            magnitude_std=settings.get("mstd", cls.magnitude_std),
            layers=int(layers),
            interpolation=interpolation,
            fill=fill,
        )

    def draw(self, rng: np.random.Generator) -> list[tuple[str, float, int]]:
        """Draws what happens to one image.

        Returns:
            In the order of their application, each operation's name, magnitude in 0..10 and sign (1 or -1).
        """
        names = list(OPERATIONS)
        drawn = []
        for index in rng.integers(len(names), size=self.layers):
            if rng.random() < _PROBABILITY:
                magnitude = float(np.clip(rng.normal(self.magnitude, self.magnitude_std), 0.0, MAX_MAGNITUDE))
                drawn.append((names[index], magnitude, 1 if rng.random() < 0.5 else -1))
        return drawn

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Applies operations that are drawn for this image.

        Args:
            image: uint8 array of shape (height, width, 3); it is not changed.
            rng: the only source of randomness.

        Returns:
            uint8 array of the same shape; `image` itself where no operation is applied.
        """
        picture = Image.fromarray(image)
        result = self.apply(picture, rng)
        return image if result is picture else np.array(result)

    def apply(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """As calling the policy, but from one RGB image of Pillow's to another."""
        for name, magnitude, sign in self.draw(rng):
            image = _apply(image, name, magnitude, sign, self.interpolation, self.fill)
        return image


def apply_operation(
    image: np.ndarray,
    name: str,
    magnitude: float,
    *,
    sign: int = 1,
    interpolation: str = "bicubic",
    fill: Colour = IMAGENET_FILL,
) -> np.ndarray:
    """Applies one operation.

    Args:
        image: uint8 array of shape (height, width, 3).
        name: a key of `OPERATIONS`.
        magnitude: 0..10.
        sign: -1 turns, shears or shifts the other way, or weakens instead of strengthening; the operations without a
            direction ignore it.
        interpolation: see `RandAugment`.
        fill: see `RandAugment`.

    Returns:
        uint8 array of the same shape.
    """
    return np.array(_apply(Image.fromarray(image), name, magnitude, sign, interpolation, fill))


def operation_argument(name: str, magnitude: float, *, sign: int = 1) -> float | None:
    """What an operation is given at a magnitude: degrees, bits, a threshold, a factor; None where it takes nothing.

    Args:
        name: a key of `OPERATIONS`.
        magnitude: 0..10.
        sign: 1 or -1.
    """
    return OPERATIONS[name][0](magnitude / MAX_MAGNITUDE, sign)


def _apply(image: Image.Image, name: str, magnitude: float, sign: int, interpolation: str, fill: Colour) -> Image.Image:
    level, operation = OPERATIONS[name]
    return operation(image, level(magnitude / MAX_MAGNITUDE, sign), INTERPOLATIONS[interpolation], fill)


# Levels: from the strength, 0..1, and the sign to an operation's argument.


def _nothing(strength: float, sign: int) -> None:
    return None


def _signed(largest: float) -> Callable[[float, int], float]:
    return lambda strength, sign: sign * strength * largest


def _enhancement(strength: float, sign: int) -> float:
    return max(0.1, 1.0 + sign * strength * 0.9)  # 1 leaves the image as it is


def _bits(strength: float, sign: int) -> int:
    # At full strength the formula gives no bit at all. Pillow once painted such an image black and now rejects it: one
    # bit is the least that leaves an image.
    return max(1, 4 - int(strength * 4))


def _threshold(strength: float, sign: int) -> int:
    return 256 - int(strength * 256)


def _addition(strength: float, sign: int) -> int:
    return int(strength * 110)


# Operations: (image, argument, resampling, fill) -> image.

_Level = Callable[[float, int], float | None]
_Operation = Callable[[Image.Image, Any, Image.Resampling, Colour], Image.Image]


def _by_value(function: Callable[..., Image.Image]) -> _Operation:
    """An operation on the pixels' values, from Pillow's function of the image and the argument, where it takes one."""
    return lambda image, argument, *_: function(image) if argument is None else function(image, argument)


def _solarize_add(image: Image.Image, addition: int) -> Image.Image:
    """Adds to the dark half of the values."""
    table = [min(255, value + addition) if value < 128 else value for value in range(256)]
    return image.point(table * 3)


def _enhance(enhancer: Callable[[Image.Image], Any]) -> _Operation:
    return _by_value(lambda image, factor: enhancer(image).enhance(factor))


def _rotate(image: Image.Image, degrees: float, resampling: Image.Resampling, fill: Colour) -> Image.Image:
    return image.rotate(degrees, resampling, fillcolor=fill)  # anticlockwise


def _affine(matrix: Callable[[float, Image.Image], tuple[float, ...]]) -> _Operation:
    """From the map of a pixel of the result to where it came from."""

    def operation(image: Image.Image, argument: float, resampling: Image.Resampling, fill: Colour) -> Image.Image:
        data = matrix(argument, image)
        return image.transform(image.size, Image.Transform.AFFINE, data, resampling, fillcolor=fill)

    return operation


OPERATIONS: dict[str, tuple[_Level, _Operation]] = {
    "AutoContrast": (_nothing, _by_value(ImageOps.autocontrast)),
    "Equalize": (_nothing, _by_value(ImageOps.equalize)),
    "Invert": (_nothing, _by_value(ImageOps.invert)),
    "Rotate": (_signed(30.0), _rotate),
    "PosterizeIncreasing": (_bits, _by_value(ImageOps.posterize)),
    "SolarizeIncreasing": (_threshold, _by_value(ImageOps.solarize)),
    "SolarizeAdd": (_addition, _by_value(_solarize_add)),
    "ColorIncreasing": (_enhancement, _enhance(ImageEnhance.Color)),
    "ContrastIncreasing": (_enhancement, _enhance(ImageEnhance.Contrast)),
    "BrightnessIncreasing": (_enhancement, _enhance(ImageEnhance.Brightness)),
    "SharpnessIncreasing": (_enhancement, _enhance(ImageEnhance.Sharpness)),
    "ShearX": (_signed(0.3), _affine(lambda shear, _: (1, shear, 0, 0, 1, 0))),
    "ShearY": (_signed(0.3), _affine(lambda shear, _: (1, 0, 0, shear, 1, 0))),
    "TranslateXRel": (_signed(0.45), _affine(lambda part, image: (1, 0, part * image.width, 0, 1, 0))),
    "TranslateYRel": (_signed(0.45), _affine(lambda part, image: (1, 0, 0, 0, 1, part * image.height))),
}
"""Every operation by timm's name: its level (strength in 0..1 and sign to argument), and what it does."""
