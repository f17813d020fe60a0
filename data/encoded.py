"""Image files that are decoded when they are asked for, and what happens where one cannot be.

Among a million photographs some are truncated. A run of weeks must neither end at one nor hide it, so a damaged file is
reported once by every process that meets it (as a warning, with its name), and then:

- In training the next record in index order that can be decoded takes its place, with that record's label. What stands
  in is a function of the index alone, so batches stay the same for any number of workers and after a restart.
  ``"corrupt"`` is 1 in such a record and 0 in all others; `train_batches` passes it on, to be summed.
- In evaluation nothing takes its place, since an image must not count twice. The record is marked, and
  `evaluation_batches` masks its row: metrics are those of the images that could be read, and their number, which the
  metrics state, shows what is missing.

Only damaged content is treated so. A file that cannot be opened (a lost mount, a missing permission) ends the run: it
can be mended, and the run goes on from its checkpoint.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import numpy as np

from msvmamba_jax.data.images import DamagedImageError, decode_image, decode_picture
from msvmamba_jax.errors import InputError

_LOGGER = logging.getLogger(__name__)
_MAX_SUBSTITUTIONS = 100  # so many damaged neighbours are no accident

T = TypeVar("T")

_reported: set[str] = set()
_reported_lock = threading.Lock()


class EncodedImages(Protocol):
    """Random access to encoded images; picklable."""

    def __len__(self) -> int: ...

    def encoded(self, index: int, /) -> tuple[bytes, int, str]:
        """The content of an image file, its label, and how messages call it, such as its path.

        Raises:
            InputError: the file cannot be read.
        """


@dataclasses.dataclass(frozen=True)
class DecodedImages:
    """The records of `images`, a `pipeline.Source`; see the module for what becomes of damaged ones.

    Attributes:
        images: the encoded images.
        training: whether another record takes the place of a damaged one.
    """

    images: EncodedImages
    training: bool

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Decodes a record.

        Returns:
            ``{"image": uint8 (height, width, 3), "label": int, "corrupt": 0 or 1}``; for training the image is one of
            Pillow's, RGB, as `Augmentation` takes it. Where nothing takes the place of a damaged image it is one black
            pixel.

        Raises:
            IndexError: there is no such record.
            InputError: a file cannot be opened, or 100 records in a row are damaged.
        """

        def decode(index: int) -> dict[str, Any]:
            content, label, name = self.images.encoded(index)
            decoder = decode_picture if self.training else decode_image
            return {"image": decoder(content, name=name), "label": label}

        record, corrupt = decode_or_substitute(decode, index, len(self), training=self.training)
        if record is None:
            record = {"image": np.zeros((1, 1, 3), np.uint8), "label": self.images.encoded(index)[1]}
        return {**record, "corrupt": int(corrupt)}


def decode_or_substitute(
    decode: Callable[[int], T], index: int, count: int, *, training: bool
) -> tuple[T | None, bool]:
    """Decodes a record, or in training, where it is damaged, the next one that can be; damage is reported once.

    Args:
        decode: decodes the record of a number; raises `DamagedImageError` where it is damaged.
        index: number of the record.
        count: of all records.
        training: whether another record takes the place of a damaged one.

    Returns:
        What `decode` returned, or None where nothing takes the place of a damaged record; and whether it is damaged.

    Raises:
        IndexError: there is no such record.
        InputError: 100 records in a row are damaged.
    """
    if not 0 <= index < count:
        raise IndexError(f"index {index} of {count} records")
    tries = min(count, _MAX_SUBSTITUTIONS) if training else 1
    for offset in range(tries):
        try:
            return decode((index + offset) % count), offset > 0
        except DamagedImageError as error:
            last = str(error)
            _report(last)
    if training:
        raise InputError(
            f"{tries} images in a row are damaged: copy or unpack the data set again, then run the same command once "
            f"more (the last: {last.rstrip('.')})."
        )
    return None, True


def _report(message: str) -> None:
    with _reported_lock:
        if message in _reported:
            return
        _reported.add(message)
    _LOGGER.warning("%s", message)
