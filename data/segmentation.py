"""Images with a label for every pixel, in folders as ADE20K's scene parsing benchmark lies.

``root/images/training/*.jpg`` with ``root/annotations/training/*.png`` of the same names, and likewise ``validation``.
A label map is a PNG of one channel (or with a colour table, whose indices count). In ADE20K's, 0 is everything beyond
its 150 classes; with `reduce_zero_label` it becomes `IGNORED`, and 1..150 become 0..149. A 255 is ignored in every data
set. Other data sets of this form name their classes in ``root/classes.txt``, one a line.

Damaged files are treated as in `encoded`: in training the next record takes their place, in evaluation the record is
marked. What is whole but does not fit (a label beyond the classes, sizes that differ) ends the run, since it says that
the data set is not what the configuration takes it for.
"""

from __future__ import annotations

import dataclasses
import io
import os
from collections.abc import Sequence
from typing import IO, Any, Protocol

import numpy as np
from PIL import Image

from msvmamba_jax.data.ade20k import ade20k_class_names
from msvmamba_jax.data.encoded import decode_or_substitute
from msvmamba_jax.data.images import EXTENSIONS, DamagedImageError, decode_image, image_files, image_size
from msvmamba_jax.errors import InputError

TRAIN, EVALUATION = "training", "validation"
CLASSES_FILE = "classes.txt"

IGNORED = 255  # the label of pixels that count nowhere

_UNKNOWN_SIZE = (32, 32)  # of the black image in the place of one whose size cannot be read; any network takes it


class EncodedSegmentation(Protocol):
    """Random access to encoded images and their label maps; picklable."""

    def __len__(self) -> int: ...

    def encoded(self, index: int, /) -> tuple[bytes, bytes, str, str]:
        """The content of an image and of its label map, and how messages call the two, such as their paths.

        Raises:
            InputError: a file cannot be read.
        """

    def image(self, index: int, /) -> IO[bytes]:
        """The image alone, open at its start.

        Raises:
            InputError: it cannot be opened.
        """


@dataclasses.dataclass(frozen=True)
class SegmentationRecords:
    """The records of one split; a `pipeline.Source`.

    Attributes:
        files: the encoded images and label maps.
        num_classes: the labels are 0..num_classes - 1 and `IGNORED`.
        reduce_zero_label: whether the stored labels are 1..num_classes, with 0 for what is ignored.
        training: whether another record takes the place of a damaged one.
    """

    files: EncodedSegmentation
    num_classes: int
    reduce_zero_label: bool
    training: bool

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Decodes a record.

        Returns:
            ``{"image": uint8 (height, width, 3), "labels": uint8 (height, width), "corrupt": 0 or 1, "name": str}``;
            "name" is that of the image in the record. Where nothing takes the place of a damaged record the image is
            black, of the size that `image_size` says, and all labels are `IGNORED`.

        Raises:
            IndexError: there is no such record.
            InputError: a file cannot be opened, a label map does not fit, or 100 records in a row are damaged.
        """
        record, corrupt = decode_or_substitute(self._decode, index, len(self), training=self.training)
        if record is None:
            size = self.image_size(index)
            image, labels = np.zeros((*size, 3), np.uint8), np.full(size, IGNORED, np.uint8)
            record = {"image": image, "labels": labels, "name": self.files.encoded(index)[2]}
        return {**record, "corrupt": int(corrupt)}

    def image_size(self, index: int) -> tuple[int, int]:
        """Height and width of a record's image from the head of its file alone, in pixels; 32 x 32 if that is damaged.

        In training the record may be another one's; see the class.

        Raises:
            InputError: the file cannot be opened.
        """
        try:
            with self.files.image(index) as file:
                return image_size(file, name=f"of record {index}")
        except DamagedImageError:
            return _UNKNOWN_SIZE

    def _decode(self, index: int) -> dict[str, Any]:
        image_content, labels_content, image_name, labels_name = self.files.encoded(index)
        image = decode_image(image_content, name=image_name)
        values = _decode_label_map(labels_content, name=labels_name)
        if values.shape != image.shape[:2]:
            raise InputError(
                f"The label map {labels_name} has {values.shape[1]} x {values.shape[0]} pixels but its image "
                f"{image_name} {image.shape[1]} x {image.shape[0]}: they must lie over each other."
            )
        return {"image": image, "labels": self._labels(values, labels_name), "name": image_name}

    def _labels(self, values: np.ndarray, name: str) -> np.ndarray:
        """Checks the stored values and numbers the classes from 0."""
        top = self.num_classes if self.reduce_zero_label else self.num_classes - 1
        wrong = (values > top) & (values != IGNORED)
        if wrong.any():
            hint = "" if self.reduce_zero_label else ", or set reduce_zero_label where 0 stands for no class"
            raise InputError(
                f"The label map {name} holds the value {values[wrong][0]}, but {self.num_classes} classes only allow 0 "
                f"to {top} and {IGNORED}: name all classes in {CLASSES_FILE}{hint}."
            )
        labels = values.astype(np.uint8)
        if self.reduce_zero_label:
            ignored = labels == IGNORED
            labels -= 1  # 0 becomes 255
            labels[ignored] = IGNORED
        return labels


@dataclasses.dataclass(frozen=True, eq=False)
class SegmentationFolder:
    """The files of one split in sorted order; an `EncodedSegmentation`.

    Attributes:
        images_folder: the split's folder of images.
        labels_folder: its folder of label maps.
        files: paths of the images below `images_folder`; label maps have the same but for their extension.
    """

    images_folder: str
    labels_folder: str
    files: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.files)

    def encoded(self, index: int) -> tuple[bytes, bytes, str, str]:
        """See `EncodedSegmentation`."""
        labels_path = os.path.join(self.labels_folder, labels_file(self.files[index]))
        with self.image(index) as image, _open(labels_path, "label map") as labels:
            return image.read(), labels.read(), self._image_path(index), labels_path

    def image(self, index: int) -> IO[bytes]:
        """See `EncodedSegmentation`."""
        return _open(self._image_path(index), "image")

    def _image_path(self, index: int) -> str:
        return os.path.join(self.images_folder, self.files[index])


def load_segmentation_folder(
    root: Any, *, class_names: Sequence[str] | None = None, reduce_zero_label: bool | None = None
) -> tuple[SegmentationRecords, SegmentationRecords, tuple[str, ...]]:
    """Lists a data set in folders; see the module.

    Args:
        root: the folder with ``images`` and ``annotations``.
        class_names: the name of every label; None: those in ``root/classes.txt``, or ADE20K's where there is no such
            file.
        reduce_zero_label: whether 0 is stored for no class and 1 for the first one; None: only where the classes are
            ADE20K's.

    Returns:
        The training split, the evaluation split, and the name of every label.

    Raises:
        InputError: a folder, a label map or the class names are missing, or a split is empty.
    """
    if not isinstance(root, str | os.PathLike) or not os.fspath(root):
        raise InputError(
            "The data set needs a root, the folder with images/ and annotations/: --config.data.root=/path/to/it."
        )
    root = os.path.expanduser(root)
    if not os.path.isdir(root):
        raise InputError(
            f"There is no folder {root}: set --config.data.root to the folder with images/ and annotations/."
        )
    names = _class_names(root, class_names)
    if reduce_zero_label is None:
        reduce_zero_label = names == ade20k_class_names()
    check_class_count(names, reduce_zero_label=reduce_zero_label)
    train, evaluation = (
        SegmentationRecords(_list_files(root, split), len(names), reduce_zero_label, training=split == TRAIN)
        for split in (TRAIN, EVALUATION)
    )
    return train, evaluation, names


def check_class_count(class_names: Sequence[str], *, reduce_zero_label: bool) -> None:
    """Checks that the labels of all classes fit into label maps of 8 bits, beside `IGNORED`.

    Raises:
        InputError: they do not, or there is no class.
    """
    most = IGNORED - reduce_zero_label
    if not 1 <= len(class_names) <= most:
        raise InputError(f"There must be 1 to {most} classes to label pixels with, but there are {len(class_names)}.")


def _class_names(root: str, given: Sequence[str] | None) -> tuple[str, ...]:
    path = os.path.join(root, CLASSES_FILE)
    if given is not None:
        names, source = list(given), "class_names"
    elif os.path.isfile(path):
        try:
            with open(path, encoding="utf-8") as file:
                names, source = file.read().strip("\n").split("\n"), path
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"Cannot read the class names in {path}: {error}.") from error
    else:
        return ade20k_class_names()
    names = [name.strip() if isinstance(name, str) else "" for name in names]
    if not all(names):
        raise InputError(f"Class {names.index('')} has no name in {source}: give every label one, in their order.")
    if repeated := [name for name in names if names.count(name) > 1]:
        raise InputError(f"Two classes are called {repeated[0]!r} in {source}: give every label a name of its own.")
    return tuple(names)


def _list_files(root: str, split: str) -> SegmentationFolder:
    images, annotations = (os.path.join(root, kind, split) for kind in ("images", "annotations"))
    for folder in (images, annotations):
        if not os.path.isdir(folder):
            raise InputError(
                f"There is no folder {folder}: {root} must hold images/ and annotations/, each with {TRAIN}/ and "
                f"{EVALUATION}/."
            )
    files = sorted(path[len(os.path.join(images, "")) :] for path in image_files(images))
    if not files:
        raise InputError(f"The folder {images} holds no image ({', '.join(EXTENSIONS)}).")
    have = {path[len(os.path.join(annotations, "")) :] for path in image_files(annotations)}
    if missing := [file for file in files if labels_file(file) not in have]:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise InputError(
            f"The image {os.path.join(images, missing[0])}{more} has no label map: add "
            f"{os.path.join(annotations, labels_file(missing[0]))}, or remove the image."
        )
    return SegmentationFolder(images, annotations, tuple(files))


def labels_file(file: str) -> str:
    """The label map's path for an image's."""
    return f"{os.path.splitext(file)[0]}.png"


def _open(path: str, kind: str) -> IO[bytes]:
    try:
        return open(path, "rb")
    except OSError as error:
        raise InputError(f"Cannot open the {kind} {path}: {error.strerror or error}.") from error


def _decode_label_map(content: bytes, *, name: str) -> np.ndarray:
    """The values of a label map: unsigned integers (height, width).

    Raises:
        DamagedImageError: the content cannot be decoded.
        InputError: it has colours, or no whole numbers.
    """
    try:
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            mode = image.mode
            values = np.array(image)
    except Exception as error:  # see `decode_image`
        raise DamagedImageError(f"The label map {name} is damaged or no PNG: make it anew.") from error
    if mode not in ("L", "P", "1") and not mode.startswith("I"):
        raise InputError(
            f"The label map {name} has colours ({mode}): it must hold the index of a class in every pixel."
        )
    return values.astype(np.uint16 if mode.startswith("I") else np.uint8)
