"""Resize, flip and crop an image with its boxes and masks, as mmdetection does, to the same numbers.

Every step changes the image, the boxes (x1, y1, x2, y2 in pixels, float32) and the masks by itself, since masks are
drawn and changed only where an object is left.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import numpy as np

from msvmamba_jax.data.resizing import opencv, resize_image, resize_labels, scale_factors


class Step(Protocol):
    """One change; sizes are (height, width)."""

    def size(self, size: tuple[int, int], /) -> tuple[int, int]:
        """That of the result."""

    def image(self, image: np.ndarray, /) -> np.ndarray:
        """uint8 (height, width, 3) -> the same of another size."""

    def mask(self, mask: np.ndarray, /) -> np.ndarray:
        """uint8 (height, width) -> the same of another size."""

    def boxes(self, boxes: np.ndarray, size: tuple[int, int], /) -> np.ndarray:
        """float32 (n, 4) on an image of `size` -> (n, 4)."""

    def touches(self, boxes: np.ndarray, /) -> np.ndarray:
        """Which boxes of the result have a part on the image, where that is checked: bool (n,)."""


@dataclasses.dataclass(frozen=True)
class Resize:
    """To a size: the image bilinearly, masks to the nearest pixel; boxes are cut off at the image's edges."""

    height: int
    width: int

    def size(self, size: tuple[int, int]) -> tuple[int, int]:
        """See `Step`."""
        return self.height, self.width

    def image(self, image: np.ndarray) -> np.ndarray:
        """See `Step`."""
        return resize_image(image, self.height, self.width)

    def mask(self, mask: np.ndarray) -> np.ndarray:
        """See `Step`."""
        return resize_labels(mask, self.height, self.width)

    def boxes(self, boxes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """See `Step`."""
        factors = np.array(scale_factors(size, (self.height, self.width)) * 2, np.float32)
        return clip(boxes * factors, self.height, self.width)

    def touches(self, boxes: np.ndarray) -> np.ndarray:
        """See `Step`."""
        return np.ones(len(boxes), bool)


@dataclasses.dataclass(frozen=True)
class Flip:
    """From left to right."""

    def size(self, size: tuple[int, int]) -> tuple[int, int]:
        """See `Step`."""
        return size

    def image(self, image: np.ndarray) -> np.ndarray:
        """See `Step`."""
        return opencv().flip(image, 1)

    def mask(self, mask: np.ndarray) -> np.ndarray:
        """See `Step`."""
        return opencv().flip(mask, 1)

    def boxes(self, boxes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """See `Step`."""
        left, top, right, bottom = boxes.T
        width = np.float32(size[1])
        return np.stack([width - right, top, width - left, bottom], axis=1)

    def touches(self, boxes: np.ndarray) -> np.ndarray:
        """See `Step`."""
        return np.ones(len(boxes), bool)


@dataclasses.dataclass(frozen=True)
class Crop:
    """A window that lies on the image; boxes are cut off at its edges."""

    top: int
    left: int
    height: int
    width: int

    def size(self, size: tuple[int, int]) -> tuple[int, int]:
        """See `Step`."""
        return self.height, self.width

    def image(self, image: np.ndarray) -> np.ndarray:
        """See `Step`."""
        return image[self.top : self.top + self.height, self.left : self.left + self.width]

    def mask(self, mask: np.ndarray) -> np.ndarray:
        """See `Step`."""
        return mask[self.top : self.top + self.height, self.left : self.left + self.width]

    def boxes(self, boxes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """See `Step`."""
        return clip(boxes - np.array([self.left, self.top] * 2, np.float32), self.height, self.width)

    def touches(self, boxes: np.ndarray) -> np.ndarray:
        """See `Step`."""
        left, top, right, bottom = boxes.T
        return (left < self.width) & (top < self.height) & (right > 0) & (bottom > 0)


def clip(boxes: np.ndarray, height: int, width: int) -> np.ndarray:
    """Boxes (n, 4), cut off at the edges of an image."""
    return boxes.clip(0, np.array([width, height] * 2, boxes.dtype))
