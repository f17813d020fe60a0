"""Instance masks as COCO writes them, polygons or run lengths, and as arrays of pixels or bits.

Polygons become pixels by the rule of COCO's own tools, which draws on a raster five times finer. Nothing is drawn
before it is asked for, and always at the image's own size: training resizes the pixels, not the polygons.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import numpy as np

from msvmamba_jax.errors import InputError

_MAX_COORDINATE = 1e6  # COCO's tools take memory in proportion to a polygon's length


class InstanceMask(Protocol):
    """A mask that is drawn when it is asked for; picklable."""

    def pixels(self) -> np.ndarray:
        """Ones inside and zeros outside, uint8 (height, width), as of its image."""


@dataclasses.dataclass(frozen=True, eq=False)
class PolygonMask:
    """The union of polygons.

    Attributes:
        polygons: float64 (2 n,) each, x and y in turn, in pixels, n at least 3.
        height: of the image, in pixels.
        width: of the image, in pixels.
    """

    polygons: tuple[np.ndarray, ...]
    height: int
    width: int

    def pixels(self) -> np.ndarray:
        """See `InstanceMask`.

        Raises:
            InputError: COCO's tools are not installed.
        """
        try:
            from pycocotools import mask
        except ImportError as error:
            raise InputError("Polygons are drawn with COCO's tools: pip install 'msvmamba_jax[data]'.") from error
        drawn = mask.decode(mask.merge(mask.frPyObjects(list(self.polygons), self.height, self.width)))
        return np.ascontiguousarray(drawn)  # it comes column by column


@dataclasses.dataclass(frozen=True, eq=False)
class RunLengthMask:
    """Pixels column by column, each from top to bottom, as lengths of runs of zeros and ones in turn.

    Attributes:
        runs: int64 (n,), not negative; their sum is height * width.
        height: of the image, in pixels.
        width: of the image, in pixels.
    """

    runs: np.ndarray
    height: int
    width: int

    def pixels(self) -> np.ndarray:
        """See `InstanceMask`."""
        values = (np.arange(len(self.runs)) % 2).astype(np.uint8)
        return np.ascontiguousarray(np.repeat(values, self.runs).reshape(self.width, self.height).T)


def whole_polygons(segmentation: list[Any]) -> list[Any]:
    """Those polygons of a COCO segmentation that have three points or more; two numbers make a point."""
    return [part for part in segmentation if isinstance(part, list) and len(part) >= 6 and len(part) % 2 == 0]


def instance_mask(segmentation: Any, height: int, width: int, *, owner: str) -> InstanceMask:
    """The mask that a COCO segmentation describes.

    Args:
        segmentation: a list of polygons, of which those with fewer than three points are left out, or run lengths,
            ``{"size": [height, width], "counts": a list or COCO's compressed string}``.
        height: of the image, in pixels.
        width: of the image, in pixels.
        owner: whose it is, to begin messages with.

    Raises:
        InputError: it is neither, no polygon is left, a coordinate is no number of pixels, or run lengths are of
            another size than the image.
    """
    if isinstance(segmentation, dict):
        return RunLengthMask(_runs(segmentation, height, width, owner), height, width)
    parts = whole_polygons(segmentation) if isinstance(segmentation, list) else []
    if not parts:
        raise InputError(f"{owner} has no polygon of three points or more, and no run lengths: mend or remove it.")
    polygons = []
    for part in parts:
        try:
            polygon = np.array(part, np.float64)
        except (TypeError, ValueError):
            polygon = np.full(1, np.nan)
        if polygon.ndim != 1 or not (np.abs(polygon) <= _MAX_COORDINATE).all():
            raise InputError(f"{owner} has a polygon whose points are no pixels: mend or remove it.")
        polygons.append(polygon)
    return PolygonMask(tuple(polygons), height, width)


def run_length_size(segmentation: dict[str, Any], *, owner: str) -> tuple[int, int]:
    """Height and width of run lengths in COCO's form.

    Raises:
        InputError: they are of another form; `owner` begins the message.
    """
    size, counts = segmentation.get("size"), segmentation.get("counts")
    if (
        not isinstance(counts, list | str)
        or not isinstance(size, list)
        or len(size) != 2
        or any(isinstance(side, bool) or not isinstance(side, int) or side < 1 for side in size)
    ):
        raise InputError(f"{owner} has run lengths without 'size' (height and width) and 'counts': mend or remove it.")
    return size[0], size[1]


def check_run_length_size(found: tuple[int, int], height: int, width: int, *, owner: str) -> None:
    """Checks the size (height, width) of run lengths against that of their image.

    Raises:
        InputError: they differ; `owner` begins the message.
    """
    if found != (height, width):
        raise InputError(
            f"{owner} has a mask of {found[1]} x {found[0]} pixels, but its image has {width} x {height}: mend or "
            "remove it."
        )


def decompress_runs(counts: str) -> np.ndarray:
    """Decodes COCO's compressed run lengths, int64 (n,).

    A number is made of digits in base 32, the lowest first; a character holds one from 48 on, and 32 more where another
    one follows. Bit 16 of the last is the sign. From the fourth number on each is the difference from the one two
    before it.

    Raises:
        ValueError: the text is no such code.
    """
    digits = np.frombuffer(counts.encode("ascii"), np.uint8).astype(np.int64) - 48
    if not digits.size:
        return digits
    more = (digits & 32) > 0
    ends = np.flatnonzero(~more)
    if ((digits < 0) | (digits > 63)).any() or not ends.size or ends[-1] != digits.size - 1:
        raise ValueError("no run lengths")
    begins = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - begins + 1
    if lengths.max() > 12:  # beyond 60 bits
        raise ValueError("no run lengths")
    places = np.arange(digits.size) - np.repeat(begins, lengths)
    numbers = np.add.reduceat((digits & 31) << (5 * places), begins)
    numbers -= np.where(digits[ends] & 16, np.int64(1) << (5 * lengths), 0)
    numbers[1::2] = np.cumsum(numbers[1::2])
    numbers[2::2] = np.cumsum(numbers[2::2])
    return numbers


def _runs(segmentation: dict[str, Any], height: int, width: int, owner: str) -> np.ndarray:
    check_run_length_size(run_length_size(segmentation, owner=owner), height, width, owner=owner)
    counts = segmentation["counts"]
    try:
        runs = decompress_runs(counts) if isinstance(counts, str) else np.array(counts)
        if runs.ndim != 1 or not np.issubdtype(runs.dtype, np.integer) or (runs < 0).any():
            raise ValueError
    except ValueError:
        raise InputError(f"{owner} has run lengths that cannot be decoded: mend or remove it.") from None
    if (total := int(runs.sum())) != height * width:
        raise InputError(
            f"{owner} has run lengths of {total} pixels in all, but its image has {height * width}: mend or remove it."
        )
    return runs.astype(np.int64)
