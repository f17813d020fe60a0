"""Checks of COCO's images, categories and annotations, and which annotations are objects to train on."""

from __future__ import annotations

import array
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from msvmamba_jax.data.instance_masks import run_length_size, whole_polygons
from msvmamba_jax.errors import InputError

_LARGEST = 2**63 - 1


class Images:
    """Columns of images, in the order in which they are added.

    Attributes:
        name: of the file, for messages.
        ids: int64.
        sizes: heights and widths in turn.
        files: paths below the folder of images.
        spans: where each begins and ends in the JSON file, in turn.
    """

    def __init__(self, name: str):
        self.name = name
        self.ids, self.sizes, self.spans = array.array("q"), array.array("q"), array.array("q")
        self.files: list[str] = []

    def add(self, image: Any, begin: int, end: int) -> None:
        """Checks an image and adds it.

        Raises:
            InputError: a value is missing or of the wrong kind.
        """
        identifier = _identifier(image, "image", self.name)
        file, size = image.get("file_name"), [image.get("height"), image.get("width")]
        if not isinstance(file, str) or not file:
            raise InputError(f"Image {identifier} in {self.name} has no file_name: add it.")
        if any(isinstance(side, bool) or not isinstance(side, int) or not 1 <= side < 2**31 for side in size):
            raise InputError(
                f"Image {identifier} in {self.name} has no height and width in whole pixels, but {size[0]!r} and "
                f"{size[1]!r}: correct them."
            )
        self.ids.append(identifier)
        self.sizes.extend(size)
        self.files.append(file)
        self.spans.extend((begin, end))


class Annotations:
    """Columns of annotations, in the order in which they are added.

    Attributes:
        name: of the file, for messages.
    """

    def __init__(self, name: str):
        self.name = name
        self._ids, self._images, self._categories = (array.array("q") for _ in range(3))
        self._spans, self._run_length_sizes = array.array("q"), array.array("q")
        self._boxes, self._areas = array.array("d"), array.array("d")
        self._flags = array.array("B")

    def add(self, annotation: Any, begin: int = 0, end: int = 0) -> None:
        """Checks an annotation by itself and adds it.

        Raises:
            InputError: a value is missing or of the wrong kind.
        """
        identifier = _identifier(annotation, "annotation", self.name)
        owner = f"Annotation {identifier} in {self.name}"
        image, category = (_reference(annotation, name, owner) for name in ("image_id", "category_id"))
        box, area = annotation.get("bbox"), annotation.get("area")
        if not isinstance(box, list) or len(box) != 4 or not all(map(_is_finite, box)):
            raise InputError(f"{owner} has no bbox of four numbers, but {_short(box)}: correct it.")
        if area is None:
            area = box[2] * box[3]
        if not _is_finite(area):
            raise InputError(f"{owner} has an area that is no number, but {_short(area)}: correct it.")
        crowd = annotation.get("iscrowd", 0)
        if not isinstance(crowd, int) or crowd not in (0, 1):
            raise InputError(f"{owner} has an iscrowd that is neither 0 nor 1, but {_short(crowd)}: correct it.")
        segmentation = annotation.get("segmentation")
        run_lengths = 0, 0
        drawable = True
        if isinstance(segmentation, dict):
            run_lengths = run_length_size(segmentation, owner=owner)
        elif isinstance(segmentation, list):
            drawable = bool(whole_polygons(segmentation))
        else:
            raise InputError(f"{owner} has no segmentation, polygons or run lengths: add it, or remove the annotation.")
        self._ids.append(identifier)
        self._images.append(image)
        self._categories.append(category)
        self._boxes.extend(map(float, box))
        self._areas.append(float(area))
        self._flags.append(crowd | bool(annotation.get("ignore")) << 1 | drawable << 2)
        self._run_length_sizes.extend(run_lengths)
        self._spans.extend((begin, end))

    def columns(self) -> Columns:
        """All annotations that were added."""
        flags = np.array(self._flags, np.uint8)
        return Columns(
            name=self.name,
            ids=np.array(self._ids, np.int64),
            images=np.array(self._images, np.int64),
            categories=np.array(self._categories, np.int64),
            boxes=np.array(self._boxes, np.float64).reshape(-1, 4),
            areas=np.array(self._areas, np.float64),
            crowd=(flags & 1) > 0,
            ignored=(flags & 2) > 0,
            drawable=(flags & 4) > 0,
            run_length_sizes=np.array(self._run_length_sizes, np.int64).reshape(-1, 2),
            spans=np.array(self._spans, np.int64).reshape(-1, 2),
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Columns:
    """Annotations as arrays with the leading axis n.

    Attributes:
        name: of the file, for messages.
        ids: int64.
        images: ids of their images, int64.
        categories: ids of their categories, int64.
        boxes: x, y, width, height in pixels, float64 (n, 4).
        areas: as stated, or else those of the boxes, float64.
        crowd: bool.
        ignored: whether "ignore" is set, bool.
        drawable: whether a polygon of three points or run lengths are there, bool.
        run_length_sizes: height and width of run lengths, int64 (n, 2); 0 for polygons.
        spans: where each begins and ends in the JSON file, int64 (n, 2).
    """

    name: str
    ids: np.ndarray
    images: np.ndarray
    categories: np.ndarray
    boxes: np.ndarray
    areas: np.ndarray
    crowd: np.ndarray
    ignored: np.ndarray
    drawable: np.ndarray
    run_length_sizes: np.ndarray
    spans: np.ndarray

    def has_extent(self, sizes: np.ndarray) -> np.ndarray:
        """Whether an annotation covers something, by mmdetection's rule.

        Its area is positive, its box at least one pixel wide and high, and part of that lies on the image.

        Args:
            sizes: of the images, height and width, integers (n, 2).

        Returns:
            bool (n,).
        """
        x, y, width, height = self.boxes.T
        inside_x = np.maximum(0, np.minimum(x + width, sizes[:, 1]) - np.maximum(x, 0))
        inside_y = np.maximum(0, np.minimum(y + height, sizes[:, 0]) - np.maximum(y, 0))
        return (inside_x * inside_y != 0) & (self.areas > 0) & (width >= 1) & (height >= 1)

    def trainable(self, sizes: np.ndarray) -> np.ndarray:
        """Which annotations are in the records, crowds among them; see `has_extent`."""
        return self.has_extent(sizes) & self.drawable & ~self.ignored

    def corners(self) -> np.ndarray:
        """x1, y1, x2, y2 of the boxes, float32 (n, 4); they may reach beyond the image."""
        return np.concatenate([self.boxes[:, :2], self.boxes[:, :2] + self.boxes[:, 2:]], axis=1).astype(np.float32)


def checked_categories(categories: Sequence[Any], name: str) -> tuple[tuple[int, str], ...]:
    """Ids and names of categories, in the order of the ids.

    Raises:
        InputError: a value is missing or of the wrong kind, or an id or a name occurs twice.
    """
    found: dict[int, str] = {}
    for category in categories:
        identifier = _identifier(category, "category", name)
        title = category.get("name")
        if not isinstance(title, str) or not title.strip():
            raise InputError(f"Category {identifier} in {name} has no name: add it.")
        if identifier in found:
            raise InputError(f"Two categories in {name} have the id {identifier}: give each its own.")
        if title in found.values():
            raise InputError(f"Two categories in {name} are called {title!r}: give each a name of its own.")
        found[identifier] = title
    if not found:
        raise InputError(f"The file {name} has no category: add those of the objects.")
    return tuple(sorted(found.items()))


def check_unique(ids: np.ndarray, kind: str, name: str) -> None:
    """Checks that no id occurs twice.

    Raises:
        InputError: one does.
    """
    ordered = np.sort(ids)
    if (repeated := ordered[1:][ordered[1:] == ordered[:-1]]).size:
        raise InputError(f"Two {kind}s in {name} have the id {repeated[0]}: give each its own.")


def _identifier(entry: Any, kind: str, name: str) -> int:
    if not isinstance(entry, dict):
        raise InputError(f"The file {name} lists {_short(entry)} as {kind}, which is no object with an id: remove it.")
    identifier = entry.get("id")
    if isinstance(identifier, bool) or not isinstance(identifier, int) or abs(identifier) > _LARGEST:
        raise InputError(f"The {kind} {_short(entry)} in {name} has no whole number for an id: give it one.")
    return identifier


def _reference(annotation: dict[str, Any], key: str, owner: str) -> int:
    value = annotation.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) > _LARGEST:
        raise InputError(f"{owner} has no whole number for its {key}, but {_short(value)}: correct it.")
    return value


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -_LARGEST < value < _LARGEST


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
