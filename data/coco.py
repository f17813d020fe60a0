"""Objects with boxes and masks, in files as COCO's detection benchmark lies.

``root/annotations/instances_train2017.json`` with the images in ``root/train2017``, and likewise ``val2017``. Own data
sets of this form work too: the classes are the file's categories, in the order of their ids, which may have gaps.

Training leaves out what mmdetection leaves out: images whose short side is under 32 pixels or without an object, and
annotations that are smaller than a pixel, lie beyond their image, have no area, are to be ignored, or whose polygons
all have fewer than three points; these are counted in a warning. Crowd regions are kept apart. In evaluation everything
counts as COCO's tools count it.

Damaged images are treated as in `encoded`. What does not fit together (an annotation of no image, a mask of another
size) ends the run, since it says that the data set is not what it seems.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from msvmamba_jax.data.coco_annotations import Annotations
from msvmamba_jax.data.coco_index import CocoIndex, read_coco
from msvmamba_jax.data.detection_augment import aspect_groups, slots
from msvmamba_jax.data.encoded import decode_or_substitute
from msvmamba_jax.data.images import DamagedImageError, decode_image
from msvmamba_jax.data.instance_masks import instance_mask, whole_polygons
from msvmamba_jax.errors import InputError

MIN_SIDE = 32  # of training images, in pixels

# Where COCO has its images and annotations.
FILES: Mapping[str, str] = {
    "train_images": "train2017",
    "train_annotations": "annotations/instances_train2017.json",
    "evaluation_images": "val2017",
    "evaluation_annotations": "annotations/instances_val2017.json",
}


class AnnotatedImages(Protocol):
    """Random access to encoded images and to their annotations as COCO's JSON has them; picklable."""

    def encoded(self, index: int, /) -> tuple[bytes, list[dict[str, Any]], str]:
        """The content of an image file, its annotations, and how messages call the image, such as its path.

        Raises:
            InputError: they cannot be read.
        """

    def annotations(self, index: int, /) -> list[dict[str, Any]]:
        """The annotations alone.

        Raises:
            InputError: they cannot be read.
        """


@dataclasses.dataclass(frozen=True, eq=False)
class CocoRecords:
    """The records of one split, a `pipeline.Source`: in training those with objects to train on, else all.

    Attributes:
        files: the encoded images and their annotations.
        name: how messages call the annotations.
        class_names: the name of every label.
        category_ids: the id of every label's category.
        places: of the records in `files`, int64 (n,).
        image_ids: int64 (n,).
        sizes: height and width in pixels, int32 (n, 2).
        counts: objects to train on, crowds apart, int32 (n,).
        training: whether another record takes the place of a damaged one.
        annotations_file: the JSON file, where there is one.
    """

    files: AnnotatedImages
    name: str
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    places: np.ndarray
    image_ids: np.ndarray
    sizes: np.ndarray
    counts: np.ndarray
    training: bool
    annotations_file: str | None

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Decodes a record.

        In training the place of a damaged one is taken by the next that lies or stands as it does and whose objects
        fill no more `slots`, so that it fits where it is expected.

        Returns:
            A dictionary of

            - "image": uint8 (height, width, 3);
            - "boxes": x1, y1, x2, y2 in pixels, float32 (n, 4), which may reach beyond the image;
            - "labels": int32 (n,), and "crowd": bool (n,);
            - "masks": n of `InstanceMask`;
            - "corrupt": 1 where the image is damaged, else 0;
            - "index": int, the number of the record, and "name": str, of the image.

            Where nothing takes the place of a damaged image it is black.

        Raises:
            IndexError: there is no such record.
            InputError: a file cannot be read or is of another size than its annotations say, a mask cannot be drawn, or
                100 records in a row are damaged.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} of {len(self)} records")
        try:
            return {**self._decode(index), "corrupt": 0}
        except DamagedImageError:
            pass
        places = self._substitutes(index)
        record, _ = decode_or_substitute(
            lambda place: self._decode(int(places[place])), 0, len(places), training=self.training
        )
        if record is None:
            _, annotations, name = self.files.encoded(self._place(index))
            image = np.zeros((*self._size(index), 3), np.uint8)
            record = {"image": image, **self._objects(index, annotations), "index": index, "name": name}
        return {**record, "corrupt": 1}

    def ground_truth(self) -> dict[str, Any]:
        """All annotations of the split as COCO's evaluation takes them, `pycocotools.coco.COCO.dataset`.

        They are as in the file but for four things: ids are numbered from 1, since COCO's evaluation takes an object
        with the id 0 for none; an absent area is that of the mask, and an absent "iscrowd" 0; and polygons with fewer
        than three points are left out beside others, since COCO's tools cannot draw all of them.

        Raises:
            InputError: a file cannot be read, or a mask cannot be drawn.
        """
        annotations: list[dict[str, Any]] = []
        for index in range(len(self)):
            for annotation in self.files.annotations(self._place(index)):
                segmentation, area = annotation["segmentation"], annotation.get("area")
                mask = instance_mask(segmentation, *self._size(index), owner=self._owner(annotation["id"]))
                if isinstance(segmentation, list):
                    segmentation = whole_polygons(segmentation)
                if area is None:
                    area = float(mask.pixels().sum())
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": annotation["image_id"],
                        "category_id": annotation["category_id"],
                        "bbox": annotation["bbox"],
                        "area": area,
                        "iscrowd": int(annotation.get("iscrowd", 0)),
                        "segmentation": segmentation,
                    }
                )
        images = [
            {"id": identifier, "height": height, "width": width}
            for identifier, (height, width) in zip(self.image_ids.tolist(), self.sizes.tolist(), strict=True)
        ]
        categories = [
            {"id": identifier, "name": name}
            for identifier, name in zip(self.category_ids, self.class_names, strict=True)
        ]
        return {"info": {}, "images": images, "categories": categories, "annotations": annotations}

    def _place(self, index: int) -> int:
        return int(self.places[index])

    def _size(self, index: int) -> tuple[int, int]:
        height, width = self.sizes[index].tolist()
        return height, width

    def _owner(self, annotation: int) -> str:
        return f"Annotation {annotation} in {self.name}"

    def _decode(self, index: int) -> dict[str, Any]:
        content, annotations, name = self.files.encoded(self._place(index))
        image = decode_image(content, name=name)
        height, width = self._size(index)
        if image.shape[:2] != (height, width):
            raise InputError(
                f"The image {name} has {image.shape[1]} x {image.shape[0]} pixels, but {self.name} says {width} x "
                f"{height} of its id {self.image_ids[index]}: its boxes would not fit."
            )
        return {"image": image, **self._objects(index, annotations), "index": index, "name": name}

    def _objects(self, index: int, annotations: list[dict[str, Any]]) -> dict[str, Any]:
        table = Annotations(self.name)
        for annotation in annotations:
            table.add(annotation)
        columns = table.columns()
        size = self._size(index)
        kept = np.flatnonzero(columns.trainable(np.tile(np.array(size), (len(annotations), 1))))
        return {
            "boxes": columns.corners()[kept],
            "labels": np.searchsorted(self.category_ids, columns.categories[kept]).astype(np.int32),
            "crowd": columns.crowd[kept],
            "masks": [
                instance_mask(annotations[i]["segmentation"], *size, owner=self._owner(annotations[i]["id"]))
                for i in kept
            ],
        }

    def _substitutes(self, index: int) -> np.ndarray:
        """Records that can stand in for one, itself first, then in index order."""
        if not self.training:
            return np.array([index])
        groups = aspect_groups(self.sizes)
        fits = (groups == groups[index]) & (self.counts <= slots(int(self.counts[index])))
        order = np.roll(np.arange(len(self)), -index)
        return order[fits[order]]


def load_coco(
    root: Any,
    *,
    train_images: str = FILES["train_images"],
    train_annotations: str = FILES["train_annotations"],
    evaluation_images: str = FILES["evaluation_images"],
    evaluation_annotations: str = FILES["evaluation_annotations"],
) -> tuple[CocoRecords, CocoRecords, tuple[str, ...]]:
    """Reads the annotations of a data set; see the module. For COCO this takes some ten seconds.

    Args:
        root: the folder that the other paths are in.
        train_images: folder of the training images.
        train_annotations: JSON file of the training annotations.
        evaluation_images: folder of the evaluation images.
        evaluation_annotations: JSON file of the evaluation annotations.

    Returns:
        The training split, the evaluation split, and the name of every label.

    Raises:
        InputError: a file is missing, is damaged or does not fit the others, or a split is empty.
    """
    root = coco_root(root)
    parts = []
    for images, file, training in (  # the small file first: what is wrong shall show soon
        (evaluation_images, evaluation_annotations, False),
        (train_images, train_annotations, True),
    ):
        index, files, names = read_coco(os.path.join(root, file), os.path.join(root, images), training=training)
        part = coco_records(index, files, training=training, annotations_file=index.name)
        check_files(files.folder, [names[place] for place in part.places], index.name)
        parts.append((index, part))
    (evaluation_index, evaluation), (train_index, train) = parts
    check_categories(train_index, evaluation_index)
    return train, evaluation, train.class_names


def coco_root(root: Any) -> str:
    """The folder of a data set.

    Raises:
        InputError: there is none.
    """
    if not isinstance(root, str | os.PathLike) or not os.fspath(root):
        raise InputError(
            "The data set needs a root, the folder with the images and annotations: --config.data.root=/path/to/it."
        )
    root = os.path.expanduser(root)
    if not os.path.isdir(root):
        raise InputError(
            f"There is no folder {root}: set --config.data.root to the folder with the images and annotations."
        )
    return root


def coco_records(
    index: CocoIndex, files: AnnotatedImages, *, training: bool, annotations_file: str | None
) -> CocoRecords:
    """The records of a split.

    Args:
        index: what is known of it.
        files: its images and annotations.
        training: whether images without objects and small ones are left out, and damaged ones replaced.
        annotations_file: the JSON file, where there is one.

    Raises:
        InputError: it is empty.
    """
    places = np.arange(len(index.image_ids))
    if training:
        places = places[(index.counts > 0) & (index.sizes.min(axis=1, initial=2**31 - 1) >= MIN_SIDE)]
    if not len(places):
        why = f" with an object and a short side of at least {MIN_SIDE} pixels" if training else ""
        raise InputError(f"There is no image{why} in {index.name}: check that it is the right file.")
    category_ids, class_names = zip(*index.categories, strict=True)
    return CocoRecords(
        files=files,
        name=index.name,
        class_names=class_names,
        category_ids=category_ids,
        places=places,
        image_ids=index.image_ids[places],
        sizes=index.sizes[places],
        counts=index.counts[places],
        training=training,
        annotations_file=annotations_file,
    )


def check_categories(train: CocoIndex, evaluation: CocoIndex) -> None:
    """Checks that both splits have the same categories.

    Raises:
        InputError: they differ.
    """
    if train.categories == evaluation.categories:
        return
    (identifier, name), *_ = sorted(set(train.categories) ^ set(evaluation.categories))
    have, lack = (train, evaluation) if (identifier, name) in train.categories else (evaluation, train)
    raise InputError(
        f"The category {name!r} with the id {identifier} is in {have.name}, but not in {lack.name}: give both "
        "files the same categories."
    )


def check_files(folder: str, files: Sequence[str], name: str) -> None:
    """Checks that image files are there, listing every folder once.

    Args:
        folder: what the paths are below.
        files: their paths.
        name: of the file that lists them.

    Raises:
        InputError: one is missing.
    """
    have: dict[str, set[str]] = {}
    missing = []
    for file in files:
        parent, base = os.path.split(os.path.join(folder, file))
        if parent not in have:
            try:
                have[parent] = set(os.listdir(parent))
            except OSError as error:
                raise InputError(f"Cannot list the folder {parent}: {error.strerror or error}.") from error
        if base not in have[parent]:
            missing.append(os.path.join(parent, base))
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise InputError(f"The image {missing[0]}{more} is listed in {name}, but is not there: add it.")
