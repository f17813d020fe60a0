"""The digits: a fixed stratified split, faithful enlargement, an augmentation that follows from its generator."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import sklearn.datasets
from PIL import Image

from msvmamba_jax.data import digits
from msvmamba_jax.data.digits import Digits
from msvmamba_jax.errors import InputError


@pytest.fixture(scope="module")
def parts() -> tuple[Digits, Digits]:
    return digits.load_digits()


def images(part: Digits) -> np.ndarray:
    return np.stack([part[index]["image"] for index in range(len(part))])


def labels(part: Digits) -> np.ndarray:
    return np.array([part[index]["label"] for index in range(len(part))])


def test_records(parts: tuple[Digits, Digits]) -> None:
    train, evaluation = parts
    assert (len(train), len(evaluation)) == (1437, 360)
    record = train[np.int64(5)]
    assert record["image"].shape == (32, 32, 3)
    assert record["image"].dtype == np.uint8
    assert type(record["label"]) is int
    with pytest.raises(IndexError):
        train[1437]
    assert digits.CLASS_NAMES == ("0", "1", "2", "3", "4", "5", "6", "7", "8", "9")


def test_split_is_stratified_and_disjoint(parts: tuple[Digits, Digits]) -> None:
    train, evaluation = parts
    np.testing.assert_array_equal(np.bincount(labels(evaluation)), [36] * 10)
    np.testing.assert_array_equal(np.bincount(labels(train)) + 36, np.bincount(sklearn.datasets.load_digits().target))
    seen = {image.tobytes() for image in images(train)} & {image.tobytes() for image in images(evaluation)}
    assert not seen


def test_split_is_fixed(parts: tuple[Digits, Digits]) -> None:
    # A changed split would make scores of different versions incomparable.
    train, evaluation = parts
    assert labels(evaluation)[:20].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 5, 0, 9, 8, 7, 2, 1, 3, 6, 4]
    assert labels(train)[:10].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    again = digits.load_digits()[1]
    np.testing.assert_array_equal(images(again), images(evaluation))


def test_images_are_the_scans_enlarged(parts: tuple[Digits, Digits]) -> None:
    scan = sklearn.datasets.load_digits().images[0]  # the first zero is the first image for evaluation
    image = parts[1][0]["image"]
    assert (image[..., 0] == image[..., 1]).all()
    assert (image[..., 0] == image[..., 2]).all()
    small = np.asarray(Image.fromarray(image[..., 0]).resize((8, 8), Image.Resampling.BOX))
    assert np.corrcoef(small.ravel(), scan.ravel())[0, 1] > 0.98
    assert images(parts[0]).max() == 255


def test_preprocessing_leaves_the_image_and_centres_the_values(parts: tuple[Digits, Digits]) -> None:
    image = parts[0][3]["image"]
    np.testing.assert_array_equal(digits.PREPROCESSING.crop(image), image)
    values = digits.PREPROCESSING.normalise(images(parts[0]))
    assert abs(values.mean()) < 0.02
    assert abs(values.std() - 1) < 0.02


def test_augmentation_depends_on_the_generator_alone(parts: tuple[Digits, Digits]) -> None:
    record = parts[0][7]
    original = record["image"].copy()
    first, again, other = (digits.augment(record, np.random.default_rng(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first["image"], again["image"])
    assert (first["image"] != other["image"]).any()
    np.testing.assert_array_equal(record["image"], original)
    assert first["label"] == record["label"]
    assert first["image"].shape == (32, 32, 3)
    assert first["image"].dtype == np.uint8


class FixedGenerator:
    """Returns given values in the order in which the augmentation draws: angle, scale, shift."""

    def __init__(self, angle: float, scale: float, shift: tuple[float, float]):
        self.values = [angle, scale, np.array(shift)]

    def uniform(self, low: float, high: float, size: int | None = None) -> float | np.ndarray:
        return self.values.pop(0)


def square(top: int, left: int, side: int) -> np.ndarray:
    image = np.zeros((32, 32, 3), np.uint8)
    image[top : top + side, left : left + side] = 255
    return image


@pytest.mark.parametrize(
    ("angle", "scale", "shift", "expected"),
    [
        (0.0, 1.0, (0.0, 0.0), square(4, 8, 4)),
        (0.0, 1.0, (3.0, -2.0), square(2, 11, 4)),  # x to the right, y downwards
        (90.0, 1.0, (0.0, 0.0), square(8, 24, 4)),  # clockwise about the centre (16, 16)
        (180.0, 1.0, (1.0, 0.0), square(24, 21, 4)),
    ],
)
def test_geometry_by_hand(angle: float, scale: float, shift: tuple[float, float], expected: np.ndarray) -> None:
    record = {"image": square(4, 8, 4), "label": 0}
    result = digits.augment(record, FixedGenerator(angle, scale, shift))["image"]  # type: ignore[arg-type]
    np.testing.assert_allclose(result.astype(int), expected, atol=1)


def test_scale_enlarges_about_the_centre() -> None:
    record = {"image": square(12, 12, 8), "label": 0}
    result = digits.augment(record, FixedGenerator(0.0, 2.0, (0.0, 0.0)))["image"]  # type: ignore[arg-type]
    assert (result[9:23, 9:23] == 255).all()
    assert (result[:7] == 0).all()
    assert (result[25:] == 0).all()


def test_missing_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(InputError, match=r"pip install 'msvmamba_jax\[data\]'"):
        digits.load_digits()
