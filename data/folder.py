"""Image folders: ``root/train/CLASS/*.jpg`` and ``root/val/CLASS/*.jpg``, as ImageNet and most own data sets lie.

The classes are the sub-folders of ``train`` in sorted order, as torchvision's `ImageFolder` numbers them; hidden files
and folders are left out. Images may lie in folders below their class folder too. Only names are read in advance: the
listing of a split takes one `scandir` for every folder and about 30 bytes of memory for every image.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from msvmamba_jax.data.images import EXTENSIONS, image_files
from msvmamba_jax.data.labels import readable_class_names
from msvmamba_jax.errors import InputError

TRAIN, EVALUATION = "train", "val"

_NAMED = 5  # how many of many a message names


@dataclasses.dataclass(frozen=True, eq=False)
class ImageFolder:
    """The image files of one split, class by class and within each sorted by path; an `encoded.EncodedImages`.

    Workers get a copy of it, so the paths are packed: one string object for each of a million would be slow to send.

    Attributes:
        folder: the split's folder.
        names: all paths below `folder` behind each other, in the file system's encoding.
        ends: int64 (count,), where each path ends in `names`.
        labels: int32 (count,).
    """

    folder: str
    names: bytes
    ends: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.ends)

    def path(self, index: int) -> str:
        """The path of an image file."""
        start = self.ends[index - 1] if index else 0
        return os.path.join(self.folder, os.fsdecode(self.names[start : self.ends[index]]))

    def encoded(self, index: int) -> tuple[bytes, int, str]:
        """See `encoded.EncodedImages`."""
        path = self.path(index)
        try:
            with open(path, "rb") as file:
                return file.read(), int(self.labels[index]), path
        except OSError as error:
            raise InputError(f"Cannot open the image {path}: {error.strerror or error}.") from error


def load_folder(root: Any) -> tuple[ImageFolder, ImageFolder, tuple[str, ...]]:
    """Lists a data set in folders.

    Args:
        root: the folder with ``train`` and ``val``.

    Returns:
        The training split, the evaluation split, and the name of every label: the class folders' names, or English
        ones where these are the WordNet identifiers of ImageNet-1k.

    Raises:
        InputError: a folder is missing or empty, the splits differ in their classes, or a class has no image.
    """
    if not isinstance(root, str | os.PathLike) or not os.fspath(root):
        raise InputError(
            "The data source 'folder' needs a root, the folder with train/ and val/: --config.data.root=/path/to/it."
        )
    root = os.path.expanduser(root)
    if not os.path.isdir(root):
        raise InputError(f"There is no folder {root}: set --config.data.root to the folder with train/ and val/.")
    for split in (TRAIN, EVALUATION):
        if not os.path.isdir(os.path.join(root, split)):
            raise InputError(
                f"The folder {root} has no folder {split}: it must hold train/ and val/, each with one folder for "
                "every class."
            )
    folders = [os.path.join(root, split) for split in (TRAIN, EVALUATION)]
    classes, others = map(_class_folders, folders)
    if classes != others:
        raise InputError(_difference(folders, classes, others))
    train, evaluation = (_list_images(folder, classes) for folder in folders)
    return train, evaluation, readable_class_names(classes)


def _class_folders(folder: str) -> list[str]:
    """The names of the class folders, sorted by code point."""
    try:
        with os.scandir(folder) as entries:
            visible = [entry for entry in entries if not entry.name.startswith(".")]
            classes = sorted(entry.name for entry in visible if entry.is_dir())
    except OSError as error:
        raise InputError(f"Cannot list the folder {folder}: {error.strerror}.") from error
    if not classes and any(entry.name.lower().endswith(EXTENSIONS) for entry in visible):
        raise InputError(
            f"The images in {folder} are not sorted into classes: move them into one folder for every class, named as "
            "in the other split."
        )
    if not classes:
        raise InputError(f"The folder {folder} is empty: it must hold one folder with images for every class.")
    return classes


def _difference(folders: Sequence[str], classes: Sequence[str], others: Sequence[str]) -> str:
    parts = []
    for folder, have, lack in ((folders[0], classes, others), (folders[1], others, classes)):
        if only := sorted(set(have) - set(lack)):
            more = f" and {len(only) - _NAMED} more" if len(only) > _NAMED else ""
            parts.append(f"only {folder} has {', '.join(only[:_NAMED])}{more}")
    return f"The class folders of the two splits differ: {'; '.join(parts)}; both must have the same ones."


def _list_images(folder: str, classes: Sequence[str]) -> ImageFolder:
    names: list[bytes] = []
    counts = []
    skip = len(os.path.join(folder, ""))
    for name in classes:
        files = sorted(path[skip:] for path in image_files(os.path.join(folder, name)))
        if not files:
            raise InputError(
                f"The class folder {os.path.join(folder, name)} holds no image ({', '.join(EXTENSIONS)}): add some, or "
                "remove the class from both splits."
            )
        names += map(os.fsencode, files)
        counts.append(len(files))
    ends = np.cumsum([len(name) for name in names], dtype=np.int64)
    labels = np.repeat(np.arange(len(classes), dtype=np.int32), counts)
    return ImageFolder(folder, b"".join(names), ends, labels)
