"""Augmentation for segmentation: each step by hand, the rules in distribution, a function of the generator alone."""

from __future__ import annotations

import math
import pickle
from typing import Any

import cv2
import numpy as np
import pytest

from msvmamba_jax.data import segmentation_augment
from msvmamba_jax.data.resizing import rescale_size, resize_image, resize_labels
from msvmamba_jax.data.segmentation_augment import (
    PhotometricDistortion,
    SegmentationAugmentation,
    change_hue,
    change_saturation,
    random_crop,
    scale_and_shift,
)
from msvmamba_jax.errors import InputError

DRAWS = 4000


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([height, width, seed]).integers(0, 256, (height, width, 3), np.uint8)


def blocks(height: int, width: int, side: int = 4, classes: int = 5) -> np.ndarray:
    """Labels in square blocks, so that every window holds several."""
    rows, columns = np.mgrid[:height, :width] // side
    return ((rows * 3 + columns) % classes).astype(np.uint8)


def record(height: int, width: int) -> dict[str, Any]:
    return {"image": noise(height, width), "labels": blocks(height, width), "corrupt": 0, "name": "one.jpg"}


def plain(**options: Any) -> SegmentationAugmentation:
    """Without what is not named."""
    settings = {"factor": (1.0, 1.0), "max_class_part": 1.0, "flip": 0.0, "distortion": None, **options}
    return SegmentationAugmentation(**settings)


def uniform(values: np.ndarray, low: float, high: float) -> bool:
    """The Kolmogorov-Smirnov distance from the uniform distribution; beyond 2.5 in one of 10^5 samples."""
    expected = (np.sort(values) - low) / (high - low)
    distance = np.abs(expected - (np.arange(len(values)) + 0.5) / len(values)).max()
    return bool(distance * math.sqrt(len(values)) < 2.5)


def share(flags: Any, probability: float) -> bool:
    """Whether as many are true as there should be, within five standard deviations."""
    flags = np.asarray(flags, float)
    return bool(abs(flags.mean() - probability) < 5 * math.sqrt(probability * (1 - probability) / flags.size))


# Size and place


def test_factors_are_uniform_and_keep_the_aspect_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
        sizes.append((height, width))
        return np.zeros((height, width, *image.shape[2:]), np.uint8)

    monkeypatch.setattr(segmentation_augment, "resize_image", resize)
    monkeypatch.setattr(segmentation_augment, "resize_labels", resize)
    augment = plain(crop=1, scale=(2000, 1000), factor=(0.5, 2.0))
    rng = np.random.default_rng(0)
    for _ in range(DRAWS):
        augment({"image": np.zeros((30, 40, 3), np.uint8), "labels": np.zeros((30, 40), np.uint8)}, rng)
    assert sizes[::2] == sizes[1::2]
    height, width = np.array(sizes[::2]).T
    assert uniform(height, 500, 2000)  # the short side decides: 1000 times the factor
    np.testing.assert_allclose(width / height, 4 / 3, atol=2e-3)


def test_image_and_labels_are_resized_and_cut_alike() -> None:
    given = record(40, 60)
    original = {key: np.copy(value) for key, value in given.items()}
    augment = plain(crop=48, scale=(200, 50), factor=(0.5, 1.7), max_class_part=0.75)
    extents = set()
    for seed in range(20):
        rng = np.random.default_rng(seed)
        factor = rng.uniform(0.5, 1.7)
        size = rescale_size(40, 60, (int(200 * factor), int(50 * factor)))
        image, labels = resize_image(given["image"], *size), resize_labels(given["labels"], *size)
        top, left = random_crop(labels, 48, rng)
        rows, columns = (min(48, side) for side in size)
        result = augment(given, np.random.default_rng(seed))
        assert result["extent"].dtype == np.int32
        assert result["extent"].tolist() == [rows, columns]
        assert (result["image"].shape, result["image"].dtype) == ((48, 48, 3), np.uint8)
        assert (result["labels"].shape, result["labels"].dtype) == ((48, 48), np.uint8)
        np.testing.assert_array_equal(result["image"][:rows, :columns], image[top : top + 48, left : left + 48])
        np.testing.assert_array_equal(result["labels"][:rows, :columns], labels[top : top + 48, left : left + 48])
        assert not result["image"][rows:].any()
        assert not result["image"][:, columns:].any()
        assert (result["labels"][rows:] == 255).all()
        assert (result["labels"][:, columns:] == 255).all()
        assert (result["name"], result["corrupt"]) == ("one.jpg", 0)
        extents.add((rows, columns))
    assert len(extents) > 3
    for key, value in original.items():
        np.testing.assert_array_equal(given[key], value)


def test_an_image_smaller_than_the_crop_is_padded_below_and_right() -> None:
    result = plain(crop=16, scale=(8, 4))(record(20, 30), np.random.default_rng(0))
    assert result["extent"].tolist() == [4, 6]
    assert (result["labels"] == 255).sum() == 16 * 16 - 24


def test_strips_survive() -> None:
    given = {"image": noise(1, 3000), "labels": np.zeros((1, 3000), np.uint8)}
    result = SegmentationAugmentation(crop=32, scale=(100, 20))(given, np.random.default_rng(0))
    assert result["extent"][0] == 1


def test_flips_take_the_labels_along() -> None:
    given = record(16, 16)
    augment = plain(crop=16, scale=(16, 16), flip=0.5)
    flipped = []
    for seed in range(600):
        result = augment(given, np.random.default_rng(seed))
        flipped.append(not np.array_equal(result["image"], given["image"]))
        step = -1 if flipped[-1] else 1
        np.testing.assert_array_equal(result["image"], given["image"][:, ::step])
        np.testing.assert_array_equal(result["labels"], given["labels"][:, ::step])
    assert share(flipped, 0.5)


def test_the_padding_of_a_flipped_image_stays_right() -> None:
    result = plain(crop=16, scale=(8, 8), flip=1.0)(record(8, 8), np.random.default_rng(0))
    np.testing.assert_array_equal(result["image"][:8, :8], noise(8, 8)[:, ::-1])
    assert (result["labels"][:, 8:] == 255).all()


# The rule of the crop


def test_positions_are_uniform() -> None:
    rng = np.random.default_rng(0)
    labels = np.zeros((1000, 1500), np.uint8)
    top, left = np.array([random_crop(labels, 100, rng, max_class_part=1.0) for _ in range(DRAWS)]).T
    assert top.max() <= 900
    assert left.max() <= 1400
    assert uniform(top + 0.5, 0, 901)
    assert uniform(left + 0.5, 0, 1401)
    assert abs(np.corrcoef(top, left)[0, 1]) < 5 / math.sqrt(DRAWS)


class Counting:
    """A generator that counts what is drawn of it."""

    def __init__(self, seed: int):
        self.rng = np.random.default_rng(seed)
        self.windows = 0.0

    def integers(self, high: int) -> int:
        self.windows += 0.5
        return int(self.rng.integers(high))


@pytest.mark.parametrize(
    ("name", "accepted"),
    [
        ("one class", False),
        ("nothing", False),
        ("one class and nothing", False),
        ("three quarters", False),
        ("less", True),
    ],
)
def test_what_a_window_may_hold(name: str, accepted: bool) -> None:
    labels = np.zeros((10, 10), np.uint8)
    if name == "nothing":
        labels[:] = 255
    elif name == "one class and nothing":
        labels[:, :6] = 255
    elif name == "three quarters":  # of the 40 that are labelled: 30
        labels[:] = 255
        labels[:3], labels[3] = 1, 2
    elif name == "less":  # 29 of 40
        labels[:] = 255
        labels[:3], labels[3], labels[0, 0] = 1, 2, 3
    rng = Counting(0)
    random_crop(labels, 10, rng)
    assert rng.windows == (1 if accepted else 11)


def test_a_window_is_drawn_anew_ten_times_at_most() -> None:
    # Only windows across row 150 hold two classes; of these a part p is mixed enough.
    labels = np.zeros((200, 20), np.uint8)
    labels[150:] = 1
    good = [t for t in range(181) if 5 < np.count_nonzero(labels[t : t + 20, 0]) < 15]
    p = len(good) / 181
    tops, windows = [], []
    for seed in range(DRAWS):
        rng = Counting(seed)
        tops.append(random_crop(labels, 20, rng)[0])
        windows.append(rng.windows)
    # Eleven chances: the last window is taken unseen, and is good as often as any other.
    assert share(np.isin(tops, good), 1 - (1 - p) ** 11)
    for count in (1, 2, 5):
        assert share(np.array(windows) == count, p * (1 - p) ** (count - 1))
    assert share(np.array(windows) == 11, (1 - p) ** 10)


def test_no_limit_takes_the_first_window() -> None:
    rng = Counting(0)
    random_crop(np.zeros((10, 10), np.uint8), 4, rng, max_class_part=1.0)
    assert rng.windows == 1


# Colours


def test_scale_and_shift_cut_fractions_off() -> None:
    values = np.arange(256, dtype=np.uint8)
    for scale, shift in ((1.0, -17.3), (1.0, 31.9), (0.5, 0.0), (1.4999, 0.0), (0.731, 0.0)):
        expected = np.clip(values.astype(np.float32) * scale + shift, 0, 255).astype(np.uint8)
        np.testing.assert_array_equal(scale_and_shift(values, scale=scale, shift=shift), expected)
    assert scale_and_shift(np.array([[10]], np.uint8), shift=-0.1).tolist() == [[9]]
    assert scale_and_shift(np.array([[250, 3]], np.uint8), scale=1.5, shift=-9).tolist() == [[255, 0]]


def test_saturation_and_hue_equal_those_of_bgr_images() -> None:
    image = noise(64, 64)
    bgr = np.ascontiguousarray(image[..., ::-1])
    for factor in (0.5, 0.83, 1.5):
        hsv = cv2.cvtColor(bgr, cv2.COLOR_BGR2HSV)
        hsv[..., 1] = np.clip(hsv[..., 1].astype(np.float32) * factor, 0, 255).astype(np.uint8)
        expected = cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)[..., ::-1]
        np.testing.assert_array_equal(change_saturation(image, factor), expected)
    for steps in (-18, -1, 0, 17):
        hsv = cv2.cvtColor(bgr, cv2.COLOR_BGR2HSV)
        hsv[..., 0] = (hsv[..., 0].astype(int) + steps) % 180
        expected = cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)[..., ::-1]
        np.testing.assert_array_equal(change_hue(image, steps), expected)


def test_known_colours() -> None:
    red = np.full((1, 1, 3), (200, 0, 0), np.uint8)
    assert change_hue(red, 60).tolist() == [[[0, 200, 0]]]  # by 120 degrees
    assert change_saturation(red, 0.5).tolist() == [[[200, 100, 100]]]  # 127 of 255, rounded


def test_distortion_draws_as_often_and_as_strongly_as_it_should(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, float]] = []

    def logged(image: np.ndarray, *, scale: float = 1.0, shift: float = 0.0) -> np.ndarray:
        calls.append(("brightness", shift) if shift else ("contrast", scale))
        return image

    def step(name: str) -> Any:
        return lambda image, value: (calls.append((name, value)), image)[1]

    monkeypatch.setattr(segmentation_augment, "scale_and_shift", logged)
    monkeypatch.setattr(segmentation_augment, "change_saturation", step("saturation"))
    monkeypatch.setattr(segmentation_augment, "change_hue", step("hue"))
    rng = np.random.default_rng(0)
    image, orders = noise(2, 2), []
    drawn: dict[str, list[float]] = {name: [] for name in ("brightness", "contrast", "saturation", "hue")}
    for _ in range(DRAWS):
        calls.clear()
        PhotometricDistortion()(image, rng)
        orders.append(tuple(name for name, _ in calls))
        for name, value in calls:
            drawn[name].append(value)
    for name, values in drawn.items():
        assert share(np.arange(DRAWS) < len(values), 0.5), name
    assert uniform(np.array(drawn["brightness"]), -32, 32)
    assert uniform(np.array(drawn["contrast"]), 0.5, 1.5)
    assert uniform(np.array(drawn["saturation"]), 0.5, 1.5)
    assert set(drawn["hue"]) == set(range(-18, 18))
    assert uniform(np.array(drawn["hue"]) + 0.5, -18, 18)
    # Four fair choices and the contrast's place: 2^5 ways, of which two look alike without contrast or the other two.
    for order in (("brightness", "contrast", "saturation", "hue"), ("brightness", "saturation", "hue", "contrast")):
        assert share([found == order for found in orders], 1 / 32)
    assert share([found == () for found in orders], 1 / 16)


def test_distortion_works_on_what_is_not_padding() -> None:
    given = {"image": np.full((8, 8, 3), 100, np.uint8), "labels": np.zeros((8, 8), np.uint8)}
    augment = plain(crop=16, scale=(8, 8), distortion=PhotometricDistortion())
    changed = 0
    for seed in range(50):
        image = augment(given, np.random.default_rng(seed))["image"]
        assert not image[8:].any()
        assert not image[:, 8:].any()
        changed += (image[:8, :8] != 100).any()
    assert changed > 20


# The whole


def test_a_function_of_the_generator_alone() -> None:
    augment = SegmentationAugmentation(crop=24, scale=(100, 30))
    again = pickle.loads(pickle.dumps(augment))
    assert again == augment
    given, results = record(40, 60), set()
    for seed in range(20):
        first, second = (transform(given, np.random.default_rng(seed)) for transform in (augment, again))
        for key in ("image", "labels", "extent"):
            np.testing.assert_array_equal(first[key], second[key])
            assert first[key].flags.c_contiguous
            assert first[key].flags.owndata
        results.add(first["image"].tobytes())
    assert len(results) == 20


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"crop": 0}, "crop"),
        ({"crop": 512.0}, "crop"),
        ({"scale": (512, 2048)}, "falling order"),
        ({"scale": 512}, "scale"),
        ({"factor": (2.0, 0.5)}, "rising"),
        ({"factor": 1.0}, "two numbers"),
        ({"max_class_part": 75}, "max_class_part"),
        ({"flip": 1.5}, "flip"),
    ],
)
def test_impossible_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SegmentationAugmentation(**settings)
