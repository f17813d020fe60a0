"""Handwritten digits: a small real data set that needs no download.

scikit-learn carries 1797 scans of 8 x 8 pixels with 17 grey levels (the test part of the UCI "Optical Recognition of
Handwritten Digits" data set), white strokes on black. They are enlarged to 32 x 32, so that a network of stride 32 can
be trained on them within minutes. The split is fixed: 36 images of each class, spread evenly over the data set's order,
are for evaluation (360 in all), the other 1437 for training. The scans run writer by writer, so both parts hold writers
that the other one holds too.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from PIL import Image

from msvmamba_jax.data.preprocessing import Preprocessing
from msvmamba_jax.errors import InputError

CLASS_NAMES = tuple("0123456789")
SIZE = 32

# Mean and standard deviation of the training images, rounded; the three channels are equal.
PREPROCESSING = Preprocessing(size=SIZE, resize=SIZE, mean=(0.31, 0.31, 0.31), std=(0.35, 0.35, 0.35))

_EVALUATION_PER_CLASS = 36

# Strong enough that no image repeats, weak enough that a person still reads every digit: the strokes reach the upper
# and lower edge, so a larger shift would cut them off.
_MAX_SHIFT = 3.0  # pixels of 32, each axis
_MAX_ANGLE = 10.0  # degrees
_MAX_SCALE = 1.1  # and at least 0.9


class Digits:
    """One part of the digits in memory: a sequence of records ``{"image": uint8 (32, 32, 3), "label": int}``."""

    def __init__(self, grey: np.ndarray, labels: np.ndarray):
        self._grey = grey  # uint8 (count, 32, 32)
        self._labels = labels  # (count,)

    def __len__(self) -> int:
        return len(self._grey)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The record with this number."""
        return {"image": np.repeat(self._grey[index][..., None], 3, axis=-1), "label": int(self._labels[index])}


def load_digits() -> tuple[Digits, Digits]:
    """Loads the training part (1437 images) and the evaluation part (360 images).

    Raises:
        InputError: scikit-learn is not installed.
    """
    try:
        import sklearn.datasets
    except ImportError as error:
        raise InputError("The digits come with scikit-learn: pip install 'msvmamba_jax[data]'.") from error
    bunch = sklearn.datasets.load_digits()
    labels = np.asarray(bunch.target)
    small = np.rint(np.asarray(bunch.images) * (255 / 16)).astype(np.uint8)  # from 0..16
    # Bicubic keeps the strokes crisper than bilinear, without the ringing of Lanczos.
    grey = np.stack([np.asarray(Image.fromarray(x).resize((SIZE, SIZE), Image.Resampling.BICUBIC)) for x in small])
    evaluation = np.zeros(len(labels), bool)
    for label in range(len(CLASS_NAMES)):
        (members,) = np.nonzero(labels == label)
        evaluation[members[np.arange(_EVALUATION_PER_CLASS) * len(members) // _EVALUATION_PER_CLASS]] = True
    return Digits(grey[~evaluation], labels[~evaluation]), Digits(grey[evaluation], labels[evaluation])


def augment(record: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """Turns, scales and shifts a digit at random; black comes in from outside.

    The rotation is up to 10 degrees either way, the scale 0.9 to 1.1, the shift up to 3 pixels along each axis.

    Args:
        record: a record of `Digits`.
        rng: the only source of randomness.

    Returns:
        A record of the same form with a new image.
    """
    angle = math.radians(rng.uniform(-_MAX_ANGLE, _MAX_ANGLE))
    scale = rng.uniform(2 - _MAX_SCALE, _MAX_SCALE)
    shift = rng.uniform(-_MAX_SHIFT, _MAX_SHIFT, size=2)
    # Pillow asks for the map from a pixel of the output to its origin: undo the shift, then turn and scale about the
    # centre.
    cos, sin = math.cos(angle) / scale, math.sin(angle) / scale
    inverse = np.array([[cos, sin], [-sin, cos]])
    centre = np.full(2, SIZE / 2)
    offset = centre - inverse @ (centre + shift)
    matrix = (*inverse[0], offset[0], *inverse[1], offset[1])
    image = Image.fromarray(record["image"])
    image = image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    return {**record, "image": np.array(image)}
