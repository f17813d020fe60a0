"""Resizing as the original's detection and segmentation stacks do it, with OpenCV: sizes, images and label maps.

Bilinear, OpenCV's fixed-point arithmetic, not antialiased: the released weights were trained and are evaluated on
exactly these pixels. Sizes are (height, width) throughout; only scales and scale factors keep the field's order,
(long, short) and (width, height).
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from msvmamba_jax.errors import InputError


@functools.cache
def opencv() -> Any:
    """The module `cv2`, with its own threads off: images are read by many threads or workers already.

    Raises:
        InputError: OpenCV is not installed.
    """
    try:
        import cv2
    except ImportError as error:
        raise InputError("Images are resized with OpenCV: pip install 'msvmamba_jax[data]'.") from error
    cv2.setNumThreads(0)
    return cv2


def rescale_size(height: int, width: int, scale: tuple[int, int]) -> tuple[int, int]:
    """The largest size of an image's aspect ratio within `scale`, by mmcv's rule: ``int(side * factor + 0.5)``.

    Args:
        height: of the image, in pixels.
        width: of the image, in pixels.
        scale: bounds of the long and of the short side, in pixels; their order does not matter.

    Returns:
        Height and width, at least 1 each.
    """
    factor = min(max(scale) / max(height, width), min(scale) / min(height, width))
    return _scaled(height, factor), _scaled(width, factor)


def rescale_size_by_ratio(height: int, width: int, ratio: float) -> tuple[int, int]:
    """The size of an image for one ratio of test-time augmentation.

    The sides times the ratio, rounded, only bound the result, which `rescale_size` then makes of the image's own aspect
    ratio: a side may come out one pixel shorter.

    Args:
        height: of the image, in pixels.
        width: of the image, in pixels.
        ratio: positive.

    Returns:
        Height and width, at least 1 each.
    """
    return rescale_size(height, width, (_scaled(height, ratio), _scaled(width, ratio)))


def scale_factors(size: tuple[int, int], resized: tuple[int, int]) -> tuple[float, float]:
    """What x and y coordinates are multiplied by when (height, width) `size` becomes `resized`: (width, height)."""
    return resized[1] / size[1], resized[0] / size[0]


def resize_image(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resizes an image bilinearly, without antialiasing.

    Args:
        image: uint8 (h, w, 3).
        height: of the result, in pixels.
        width: of the result, in pixels.

    Returns:
        uint8 (height, width, 3); the image itself where it has that size.

    Raises:
        InputError: OpenCV is not installed.
    """
    cv2 = opencv()
    return _resize(image, height, width, cv2.INTER_LINEAR)


def resize_labels(labels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resizes a label map, or a mask, without making new values.

    Row i of the result is row ``floor(i * (1 / (height / h)))`` in double precision, and columns likewise: neither the
    centre of a pixel nor exact thirds, but what the original was trained on.

    Args:
        labels: uint8 (h, w).
        height: of the result, in pixels.
        width: of the result, in pixels.

    Returns:
        uint8 (height, width); the labels themselves where they have that size.

    Raises:
        InputError: OpenCV is not installed.
    """
    cv2 = opencv()
    return _resize(labels, height, width, cv2.INTER_NEAREST)


def _scaled(side: int, factor: float) -> int:
    return max(1, int(side * float(factor) + 0.5))


def _resize(array: np.ndarray, height: int, width: int, interpolation: int) -> np.ndarray:
    if array.shape[:2] == (height, width):
        return array
    return opencv().resize(array, (width, height), interpolation=interpolation)
