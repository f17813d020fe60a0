"""Augmentation of training images with boxes and masks, as mmdetection's recipes for COCO have it.

The recipe of 12 epochs ("1x") resizes the image and flips it. That of 36 epochs ("3x", after DETR) flips it and then
either resizes it to one of several sizes, or resizes it, takes a random window and resizes that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from msvmamba_jax.data.detection_geometry import Crop, Flip, Resize, Step
from msvmamba_jax.data.detection_preprocessing import DIVISOR, SCALE, checked_divisor, round_up
from msvmamba_jax.data.resizing import rescale_size
from msvmamba_jax.data.segmentation_preprocessing import checked_scale
from msvmamba_jax.errors import InputError

MULTI_SCALES = tuple((1333, short) for short in range(480, 801, 32))  # of the recipe of 36 epochs

_MIN_SLOTS = 8


@dataclasses.dataclass(frozen=True)
class CropOption:
    """What the recipe of 36 epochs does to half of the images before they are resized to their final size.

    mmdetection draws both sides of the window alike, so that an image that lies may yield a window that stands. Here
    the sides are then exchanged: windows, like images, come in two shapes, known before anything is drawn.

    Attributes:
        scales: bounds of the long and the short side, in pixels; one is drawn, for the first resize.
        low: least height and width of the window, in pixels; smaller images keep theirs.
        high: greatest.
        probability: of taking a window at all.

    Raises:
        InputError: on construction, when a value is of the wrong kind or range.
    """

    scales: tuple[tuple[int, int], ...] = ((1333, 400), (1333, 500), (1333, 600))
    low: int = 384
    high: int = 600
    probability: float = 0.5

    def __post_init__(self) -> None:
        object.__setattr__(self, "scales", _checked_scales(self.scales))
        sides = self.low, self.high
        if any(isinstance(side, bool) or not isinstance(side, int) for side in sides) or not 1 <= self.low <= self.high:
            raise InputError(
                f"Augmentation: low and high must be two positive whole numbers of pixels in rising order, not "
                f"{self.low!r} and {self.high!r}."
            )
        _check_probability("probability", self.probability)


@dataclasses.dataclass(frozen=True)
class DetectionAugmentation:
    """The whole augmentation, as `Dataset.augment`; picklable.

    Without `crop` the flip comes last, with it first, as in the two recipes: a mask that is resized to the nearest
    pixel differs.

    Attributes:
        scales: bounds of the long and the short side, in pixels; one is drawn, and the image keeps its aspect ratio.
        crop: a window that some images are cut to first; None for none.
        flip: probability of the horizontal flip.
        divisor: height and width of the result are multiples of it.

    Raises:
        InputError: on construction, when a value is of the wrong kind or range.
    """

    scales: tuple[tuple[int, int], ...] = (SCALE,)
    crop: CropOption | None = None
    flip: float = 0.5
    divisor: int = DIVISOR

    def __post_init__(self) -> None:
        object.__setattr__(self, "scales", _checked_scales(self.scales))
        checked_divisor("Augmentation", self.divisor)
        _check_probability("flip", self.flip)

    def canvas(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the result for an image of this height and width: one of two, by `aspect_groups`."""
        long, short = (round_up(max(sides), self.divisor) for sides in zip(*self.scales, strict=True))
        return (long, short) if height > width else (short, long)

    def steps(self, height: int, width: int, rng: np.random.Generator) -> list[Step]:
        """Draws what is done to an image of this height and width."""
        flip: list[Step] = [Flip()] if rng.random() < self.flip else []
        steps: list[Step] = []
        size = height, width
        if self.crop is not None and rng.random() < self.crop.probability:
            resize = self._resize(size, self.crop.scales, rng)
            window = random_window(*resize.size(size), self.crop.low, self.crop.high, rng, upright=height > width)
            steps += [resize, window]
            size = window.size(size)
        steps.append(self._resize(size, self.scales, rng))
        return steps + flip if self.crop is None else flip + steps

    def __call__(self, record: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        """Augments a training record.

        Args:
            record: of `coco.CocoRecords`; it is not changed. ``"slots"``, g, is how many objects there is room for;
                absent: `slots` of those in the record.
            rng: the only source of randomness.

        Returns:
            With (H, W) of `canvas`:

            - "image": uint8 (H, W, 3), RGB, at the top left of the canvas, 0 beyond, where the network's input must be
              0 too: whoever normalises the image zeroes it again;
            - "extent": int32 (2,), the rows and columns that are filled;
            - "boxes": x1, y1, x2, y2 in pixels, float32 (g, 4), and "labels": int32 (g,), of the objects that are on
              the image, in their order; crowds are none. 0 beyond;
            - "valid": bool (g,), False beyond the objects;
            - "masks": uint8 (g, H, ceil(W / 8)), the objects' masks with the columns packed as `numpy.packbits` does;
            - "corrupt": as in the record, where it is there.

        Raises:
            ValueError: there are more objects than `record["slots"]`.
        """
        image, kept = record["image"], np.flatnonzero(~record["crowd"])
        size = height, width = image.shape[:2]
        room = record.get("slots", slots(len(kept)))
        if len(kept) > room:
            raise ValueError(f"there are {len(kept)} objects for {room} slots")
        boxes = record["boxes"][kept]
        steps = self.steps(height, width, rng)
        for step in steps:
            image, boxes, size = step.image(image), step.boxes(boxes, size), step.size(size)
            touching = step.touches(boxes)
            boxes, kept = boxes[touching], kept[touching]

        rows, columns = self.canvas(height, width)
        canvas = np.zeros((rows, columns, 3), np.uint8)
        canvas[: size[0], : size[1]] = image
        masks = np.zeros((room, rows, -(-columns // 8)), np.uint8)
        for slot, number in enumerate(kept):
            mask = record["masks"][number].pixels()
            for step in steps:
                mask = step.mask(mask)
            bits = np.packbits(mask, axis=1)
            masks[slot, : size[0], : bits.shape[1]] = bits
        padding = (0, room - len(kept))
        result = {
            "image": canvas,
            "extent": np.array(size, np.int32),
            "boxes": np.pad(boxes, (padding, (0, 0))),
            "labels": np.pad(record["labels"][kept], padding),
            "valid": np.arange(room) < len(kept),
            "masks": masks,
        }
        return {**result, "corrupt": record["corrupt"]} if "corrupt" in record else result

    @staticmethod
    def _resize(size: tuple[int, int], scales: Sequence[tuple[int, int]], rng: np.random.Generator) -> Resize:
        scale = scales[int(rng.integers(len(scales)))] if len(scales) > 1 else scales[0]
        return Resize(*rescale_size(*size, scale))


def random_window(height: int, width: int, low: int, high: int, rng: np.random.Generator, *, upright: bool) -> Crop:
    """Draws a window by mmdetection's rule (``absolute_range``), but for the exchange that `CropOption` tells of.

    Its sides are uniform whole numbers from `low` to `high`, bounded by those of the image; its place is uniform.

    Args:
        height: of the image, in pixels.
        width: of the image, in pixels.
        low: least side.
        high: greatest side.
        rng: the only source of randomness.
        upright: whether the image stands (and its window shall), else it lies.
    """
    rows, columns = (int(rng.integers(min(side, low), min(side, high) + 1)) for side in (height, width))
    if (rows < columns) if upright else (rows > columns):
        rows, columns = columns, rows
    top, left = int(rng.integers(height - rows + 1)), int(rng.integers(width - columns + 1))
    return Crop(top, left, rows, columns)


def aspect_groups(sizes: np.ndarray) -> np.ndarray:
    """Which images have the same canvas.

    Args:
        sizes: height and width, integers (n, 2).

    Returns:
        int64 (n,): 1 where the image stands (is higher than wide), 0 where it lies or is square.
    """
    return (sizes[:, 0] > sizes[:, 1]).astype(np.int64)


def slots(count: int) -> int:
    """How many objects to make room for where there are up to `count`: a power of two, at least 8.

    Few different ones, since a training step is compiled for each.
    """
    return max(_MIN_SLOTS, 1 << (count - 1).bit_length()) if count > 0 else _MIN_SLOTS


def _checked_scales(values: Any) -> tuple[tuple[int, int], ...]:
    if not isinstance(values, Sequence) or isinstance(values, str) or not values:
        raise InputError(f"Augmentation: scales must be pairs of a long and a short side in pixels, not {values!r}.")
    return tuple(checked_scale("Augmentation", scale) for scale in values)


def _check_probability(name: str, value: Any) -> None:
    if not isinstance(value, int | float) or not 0 <= value <= 1:
        raise InputError(f"Augmentation: {name} must be a probability in 0..1, not {value!r}.")
