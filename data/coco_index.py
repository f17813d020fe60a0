"""The index of a COCO data set: one pass over its JSON file, after which a split takes a few bytes an annotation."""

from __future__ import annotations

import dataclasses
import logging
import os
from typing import Any

import numpy as np

from msvmamba_jax.data.coco_annotations import Annotations, Columns, Images, check_unique, checked_categories
from msvmamba_jax.data.coco_json import JsonFile, Visitor, scan_lists
from msvmamba_jax.data.instance_masks import check_run_length_size
from msvmamba_jax.errors import InputError

_LOGGER = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, eq=False)
class CocoIndex:
    """What is known of a split without opening an image; images in the order of their ids.

    Attributes:
        name: how messages call it, such as the path of the JSON file.
        categories: their ids and names, in the order of the ids.
        image_ids: int64 (n,).
        sizes: height and width of each image in pixels, int32 (n, 2).
        counts: objects of each image to train on, int32 (n,).
    """

    name: str
    categories: tuple[tuple[int, str], ...]
    image_ids: np.ndarray
    sizes: np.ndarray
    counts: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class CocoFiles:
    """A split's images in a folder and its annotations in a JSON file; a `coco.AnnotatedImages`.

    Attributes:
        folder: of the images.
        file: the JSON file.
        image_spans: where each image is in it, int64 (n, 2).
        annotation_spans: where each annotation is, int64 (m, 2), image by image.
        bounds: those of image i are number bounds[i] to bounds[i + 1] - 1, int64 (n + 1,).
    """

    folder: str
    file: JsonFile
    image_spans: np.ndarray
    annotation_spans: np.ndarray
    bounds: np.ndarray

    def encoded(self, index: int) -> tuple[bytes, list[dict[str, Any]], str]:
        """See `coco.AnnotatedImages`."""
        spans = [self.image_spans[index : index + 1], self._annotation_spans(index)]
        image, *annotations = self.file.read(np.concatenate(spans))
        path = os.path.join(self.folder, image["file_name"])
        try:
            with open(path, "rb") as file:
                return file.read(), annotations, path
        except OSError as error:
            raise InputError(f"Cannot open the image {path}: {error.strerror or error}.") from error

    def annotations(self, index: int) -> list[dict[str, Any]]:
        """See `coco.AnnotatedImages`."""
        return self.file.read(self._annotation_spans(index))

    def _annotation_spans(self, index: int) -> np.ndarray:
        return self.annotation_spans[self.bounds[index] : self.bounds[index + 1]]


def read_coco(path: str, folder: str, *, training: bool) -> tuple[CocoIndex, CocoFiles, list[str]]:
    """Reads and checks a JSON file.

    Args:
        path: of the JSON file.
        folder: of its images.
        training: report annotations that are not trained on; otherwise reject those that COCO's tools cannot evaluate.

    Returns:
        What is known of the split, its files, and the path of each image below `folder`.

    Raises:
        InputError: the file is missing, is damaged or does not fit together.
    """
    images, annotations, categories = Images(path), Annotations(path), list[Any]()
    visitors: dict[str, Visitor] = {
        "images": images.add,
        "annotations": annotations.add,
        "categories": lambda category, begin, end: categories.append(category),
    }
    file = scan_lists(path, visitors)
    names = checked_categories(categories, path)
    order = np.argsort(np.array(images.ids, np.int64), kind="stable")
    image_ids = np.array(images.ids, np.int64)[order]
    sizes = np.array(images.sizes, np.int32).reshape(-1, 2)[order]
    check_unique(image_ids, "image", path)
    columns = annotations.columns()
    check_unique(columns.ids, "annotation", path)
    owners = _images_of(columns, image_ids, names)
    owner_sizes = sizes[owners]
    _check_run_lengths(columns, owner_sizes)
    kept = columns.trainable(owner_sizes)
    if training:
        _report(columns, owner_sizes)
    elif not columns.drawable.all():
        raise InputError(
            f"Annotation {columns.ids[~columns.drawable][0]} in {path} has no polygon of three points or more, so that "
            "COCO's evaluation cannot draw it: mend or remove it."
        )
    counts = np.bincount(owners[kept & ~columns.crowd], minlength=len(image_ids)).astype(np.int32)
    by_image = np.argsort(owners, kind="stable")
    bounds = np.searchsorted(owners[by_image], np.arange(len(image_ids) + 1))
    image_spans = np.array(images.spans, np.int64).reshape(-1, 2)[order]
    return (
        CocoIndex(path, names, image_ids, sizes, counts),
        CocoFiles(folder, file, image_spans, columns.spans[by_image], bounds),
        [images.files[place] for place in order],
    )


def _images_of(columns: Columns, image_ids: np.ndarray, categories: tuple[tuple[int, str], ...]) -> np.ndarray:
    """The place of every annotation's image; checks that image and category are there."""
    known = np.array([identifier for identifier, _ in categories], np.int64)
    for kind, wanted, have in (("image", columns.images, image_ids), ("category", columns.categories, known)):
        if (lost := np.flatnonzero(~np.isin(wanted, have))).size:
            plural = {"image": "images", "category": "categories"}[kind]
            raise InputError(
                f"Annotation {columns.ids[lost[0]]} in {columns.name} has the {kind}_id {wanted[lost[0]]}, which is "
                f"not among its {plural}: correct or remove it."
            )
    return np.searchsorted(image_ids, columns.images)


def _check_run_lengths(columns: Columns, sizes: np.ndarray) -> None:
    found = columns.run_length_sizes
    wrong = np.flatnonzero((found != 0).any(axis=1) & (found != sizes).any(axis=1))
    for place in wrong[:1]:
        owner = f"Annotation {columns.ids[place]} in {columns.name}"
        check_run_length_size(tuple(found[place].tolist()), *sizes[place].tolist(), owner=owner)


def _report(columns: Columns, sizes: np.ndarray) -> None:
    for flags, why in (
        (~columns.has_extent(sizes), "smaller than a pixel, beyond the image or without an area"),
        (~columns.drawable, "without a polygon of three points or more"),
    ):
        if flags.any():
            _LOGGER.warning(
                "Not trained on, since %s: %d of the annotations in %s (the first has the id %d).",
                why,
                np.count_nonzero(flags),
                columns.name,
                columns.ids[flags][0],
            )
