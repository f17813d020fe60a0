"""Augmentation for detection: each step by hand, the recipes in distribution, static shapes, no object lost."""

from __future__ import annotations

import math
import pickle
from collections import Counter
from typing import Any

import cv2
import numpy as np
import pytest

from msvmamba_jax.data import detection_augment
from msvmamba_jax.data.detection_augment import (
    MULTI_SCALES,
    CropOption,
    DetectionAugmentation,
    aspect_groups,
    random_window,
    slots,
)
from msvmamba_jax.data.detection_geometry import Crop, Flip, Resize
from msvmamba_jax.data.instance_masks import instance_mask
from msvmamba_jax.data.resizing import rescale_size
from msvmamba_jax.errors import InputError

DRAWS = 3000
RECIPE = DetectionAugmentation(scales=MULTI_SCALES, crop=CropOption())
SMALL_CROP = CropOption(scales=((80, 30), (80, 44)), low=20, high=40)


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng([height, width]).integers(0, 256, (height, width, 3), np.uint8)


def record(height: int, width: int, count: int = 6) -> dict[str, Any]:
    """Objects all over the image; every third one is a crowd."""
    rng = np.random.default_rng([height, width, count])
    corners = np.sort(rng.uniform(-0.1, 1.1, (count, 2, 2)), axis=1) * (width, height)
    boxes = corners.reshape(count, 4).astype(np.float32)
    polygons = [[[x1, y1, x2, y1, x2, y2, (x1 + x2) / 2, y2]] for x1, y1, x2, y2 in boxes.tolist()]
    return {
        "image": noise(height, width),
        "boxes": boxes,
        "labels": rng.integers(0, 80, count).astype(np.int32),
        "crowd": np.arange(count) % 3 == 2,
        "masks": [instance_mask(one, height, width, owner="it") for one in polygons],
        "corrupt": 0,
        "index": 3,
        "name": "one.jpg",
    }


def unpacked(result: dict[str, Any]) -> np.ndarray:
    return np.unpackbits(result["masks"], axis=-1)[..., : result["image"].shape[1]]


def share(flags: Any, probability: float) -> bool:
    """Whether as many are true as there should be, within five standard deviations."""
    flags = np.asarray(flags, float)
    return bool(abs(flags.mean() - probability) <= 5 * math.sqrt(probability * (1 - probability) / flags.size))


def assert_uniform(values: Any, expected: Any) -> None:
    """Whether each of the expected values occurs as often as it should; what is there twice, twice as often."""
    chances = Counter(expected)
    assert Counter(values).keys() == chances.keys()
    for value, chance in chances.items():
        assert share([value == other for other in values], chance / len(expected))


# The steps


def test_resize_by_hand() -> None:
    given = record(40, 60)
    step = Resize(31, 77)
    np.testing.assert_array_equal(step.image(given["image"]), cv2.resize(given["image"], (77, 31)))
    mask = given["masks"][0].pixels()
    np.testing.assert_array_equal(step.mask(mask), cv2.resize(mask, (77, 31), interpolation=cv2.INTER_NEAREST))
    boxes = step.boxes(np.array([[3, 4, 30, 20], [-5, -6, 70, 50], [60, 2, 65, 8]], np.float32), (40, 60))
    x, y = np.float32(77 / 60), np.float32(31 / 40)
    assert boxes.dtype == np.float32
    np.testing.assert_array_equal(
        boxes, np.float32([[3 * x, 4 * y, 30 * x, 20 * y], [0, 0, 77, 31], [77, 2 * y, 77, 8 * y]])
    )
    assert step.touches(boxes).all()  # only a crop drops objects
    assert step.size((40, 60)) == (31, 77)


def test_flip_by_hand() -> None:
    given = record(40, 60)
    step = Flip()
    np.testing.assert_array_equal(step.image(given["image"]), given["image"][:, ::-1])
    mask = given["masks"][0].pixels()
    np.testing.assert_array_equal(step.mask(mask), mask[:, ::-1])
    boxes = step.boxes(np.array([[3, 4, 30, 20], [-5, 1, 70, 2]], np.float32), (40, 60))
    np.testing.assert_array_equal(boxes, np.float32([[30, 4, 57, 20], [-10, 1, 65, 2]]))
    assert step.touches(boxes).all()
    assert step.size((40, 60)) == (40, 60)


def test_crop_by_hand() -> None:
    given = record(40, 60)
    step = Crop(top=5, left=10, height=20, width=30)
    np.testing.assert_array_equal(step.image(given["image"]), given["image"][5:25, 10:40])
    mask = given["masks"][0].pixels()
    np.testing.assert_array_equal(step.mask(mask), mask[5:25, 10:40])
    boxes = np.float32([[12, 6, 20, 9], [0, 0, 60, 40], [1, 6, 10, 9], [1, 6, 10.5, 9], [40, 6, 50, 9],
                        [39.5, 6, 50, 9], [12, 0, 20, 5], [12, 25, 20, 30]])  # fmt: skip
    found = step.boxes(boxes, (40, 60))
    np.testing.assert_array_equal(found[:2], [[2, 1, 10, 4], [0, 0, 30, 20]])
    assert step.touches(found).tolist() == [True, True, False, True, False, True, False, False]
    assert step.size((40, 60)) == (20, 30)


# The whole


@pytest.mark.parametrize(("height", "width"), [(40, 60), (60, 40), (50, 50), (7, 90)])
@pytest.mark.parametrize("crop", [None, SMALL_CROP])
def test_against_plain_numpy(height: int, width: int, crop: CropOption | None) -> None:
    """Every field, from the steps that were drawn."""
    given = record(height, width)
    original = {key: np.copy(value) for key, value in given.items() if key != "masks"}
    augment = DetectionAugmentation(scales=((60, 36), (60, 44), (50, 20)), crop=crop, divisor=16)
    canvas = (64, 48) if height > width else (48, 64)
    assert augment.canvas(height, width) == canvas
    seen = set()
    for seed in range(40):
        steps = augment.steps(height, width, np.random.default_rng(seed))
        image = given["image"]
        objects = [
            (given["boxes"][i].astype(np.float64), given["labels"][i], given["masks"][i].pixels())
            for i in np.flatnonzero(~given["crowd"])
        ]
        for step in steps:
            h, w = image.shape[:2]
            if isinstance(step, Flip):
                image = image[:, ::-1].copy()
                objects = [((w - b[2], b[1], w - b[0], b[3]), k, m[:, ::-1].copy()) for b, k, m in objects]
            elif isinstance(step, Resize):
                size = step.width, step.height
                image = cv2.resize(image, size)
                scale = np.array([size[0] / w, size[1] / h] * 2)
                objects = [
                    (np.clip(b * scale, 0, [*size, *size]), k, cv2.resize(m, size, interpolation=cv2.INTER_NEAREST))
                    for b, k, m in objects
                ]
            else:
                top, left, rows, columns = step.top, step.left, step.height, step.width
                assert 0 <= top <= h - rows
                assert 0 <= left <= w - columns
                image = image[top : top + rows, left : left + columns]
                objects = [
                    (np.clip(np.subtract(b, [left, top, left, top]), 0, [columns, rows, columns, rows]), k,
                     m[top : top + rows, left : left + columns].copy())
                    for b, k, m in objects
                    if b[0] < left + columns and b[1] < top + rows and b[2] > left and b[3] > top
                ]  # fmt: skip
        seen.add(tuple(type(step).__name__ for step in steps))
        result = augment(given, np.random.default_rng(seed))
        assert result.keys() == {"image", "extent", "boxes", "labels", "valid", "masks", "corrupt"}
        rows, columns = image.shape[:2]
        assert result["extent"].tolist() == [rows, columns]
        assert result["image"].shape == (*canvas, 3)
        np.testing.assert_array_equal(result["image"][:rows, :columns], image)
        assert result["image"].sum() == image.sum()
        count = len(objects)
        assert result["valid"].tolist() == [True] * count + [False] * (8 - count)
        assert result["masks"].shape == (8, canvas[0], canvas[1] // 8)
        masks = unpacked(result)
        for slot, (box, label, mask) in enumerate(objects):
            np.testing.assert_allclose(result["boxes"][slot], box, atol=1e-4)
            assert result["labels"][slot] == label
            np.testing.assert_array_equal(masks[slot, :rows, :columns], mask)
            assert masks[slot].sum() == mask.sum()
        for name in ("boxes", "labels", "masks"):
            assert not result[name][count:].any()
        assert {name: result[name].dtype for name in ("image", "extent", "boxes", "labels", "valid", "masks")} == {
            "image": np.uint8, "extent": np.int32, "boxes": np.float32, "labels": np.int32, "valid": bool,
            "masks": np.uint8,
        }  # fmt: skip
    if crop is None:
        assert seen == {("Resize",), ("Resize", "Flip")}
    else:
        assert seen == {
            (*flip, *way) for flip in ((), ("Flip",)) for way in (("Resize",), ("Resize", "Crop", "Resize"))
        }
    for key, value in original.items():
        np.testing.assert_array_equal(given[key], value)


def test_the_recipe_of_12_epochs_is_the_default() -> None:
    augment = DetectionAugmentation()
    assert augment.canvas(480, 640) == augment.canvas(500, 500) == (800, 1344)
    assert augment.canvas(640, 480) == (1344, 800)
    flips = []
    rng = np.random.default_rng(0)
    for _ in range(DRAWS):
        first, *rest = augment.steps(427, 640, rng)
        assert first == Resize(800, 1199)
        flips.append(rest == [Flip()])
        assert flips[-1] or not rest
    assert share(flips, 0.5)


@pytest.mark.parametrize(("height", "width"), [(480, 640), (640, 427), (500, 500), (250, 1200)])
def test_the_recipe_of_36_epochs(height: int, width: int) -> None:
    """Flip or not; half of the images are resized at once; the others are cut in between."""
    assert [short for _, short in MULTI_SCALES] == [480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800]
    assert {long for long, _ in MULTI_SCALES} == {1333}
    assert CropOption().scales == ((1333, 400), (1333, 500), (1333, 600))
    assert RECIPE.canvas(height, width) == ((1344, 800) if height > width else (800, 1344))
    rng = np.random.default_rng(height)
    flips, cuts, finals, firsts, windows = [], [], [], [], []
    for _ in range(DRAWS):
        steps = RECIPE.steps(height, width, rng)
        flips.append(steps[0] == Flip())
        steps = steps[flips[-1] :]
        cuts.append(len(steps) == 3)
        last = steps[-1]
        assert isinstance(last, Resize)
        if cuts[-1]:
            first, window, _ = steps
            firsts.append(first)
            windows.append((first, window))
            assert last in [Resize(*rescale_size(window.height, window.width, scale)) for scale in MULTI_SCALES]
        else:
            finals.append(last)
        canvas = RECIPE.canvas(height, width)
        assert last.height <= canvas[0]
        assert last.width <= canvas[1]
    assert share(flips, 0.5)
    assert share(cuts, 0.5)
    assert_uniform(firsts, [Resize(*rescale_size(height, width, scale)) for scale in CropOption().scales])
    assert_uniform(finals, [Resize(*rescale_size(height, width, scale)) for scale in MULTI_SCALES])
    for first, window in windows:
        for side, whole in ((window.height, first.height), (window.width, first.width)):
            assert min(384, whole) <= side <= min(600, whole)
    assert len({window for _, window in windows}) > DRAWS / 4


def test_windows_are_uniform() -> None:
    """Sides and places, but that lying images get lying windows: mmdetection's draw, with its sides in order."""
    rng = np.random.default_rng(0)
    windows = [random_window(12, 15, 9, 11, rng, upright=False) for _ in range(DRAWS * 4)]
    sides = Counter((window.height, window.width) for window in windows)
    expected = Counter(tuple(sorted((a, b))) for a in (9, 10, 11) for b in (9, 10, 11))
    assert sides.keys() == expected.keys()
    for key, count in expected.items():
        assert share([(window.height, window.width) == key for window in windows], count / 9)
    for size in ((9, 9), (10, 11)):
        tops, lefts = zip(
            *[(window.top, window.left) for window in windows if (window.height, window.width) == size], strict=True
        )
        assert_uniform(tops, range(12 - size[0] + 1))
        assert_uniform(lefts, range(15 - size[1] + 1))
    upright = [random_window(15, 12, 9, 11, rng, upright=True) for _ in range(200)]
    assert all(window.height >= window.width for window in upright)


def test_small_images_are_not_cut() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        assert random_window(300, 384, 384, 600, rng, upright=False) == Crop(0, 0, 300, 384)
    window = random_window(300, 700, 384, 600, rng, upright=False)
    assert (window.top, window.height) == (0, 300)


def test_a_flipped_mask_is_not_resized_the_same() -> None:
    """Why the order of the two recipes matters, and that each has its own."""
    given = record(37, 53)
    options: dict[str, Any] = {"scales": ((60, 36),), "flip": 1.0, "divisor": 4}
    last = DetectionAugmentation(**options)(given, np.random.default_rng(0))
    never = CropOption(probability=0.0)
    first = DetectionAugmentation(**options, crop=never)(given, np.random.default_rng(0))
    height, width = first["extent"]
    mask = given["masks"][0].pixels()
    resized = cv2.resize(mask, (int(width), int(height)), interpolation=cv2.INTER_NEAREST)
    np.testing.assert_array_equal(unpacked(last)[0, :height, :width], resized[:, ::-1])
    resized = cv2.resize(mask[:, ::-1].copy(), (int(width), int(height)), interpolation=cv2.INTER_NEAREST)
    np.testing.assert_array_equal(unpacked(first)[0, :height, :width], resized)
    assert (unpacked(first)[0] != unpacked(last)[0]).any()


def test_only_masks_that_are_left_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    given = record(40, 60, 30)
    drawn = []
    original = type(given["masks"][0]).pixels
    monkeypatch.setattr(type(given["masks"][0]), "pixels", lambda mask: drawn.append(mask) or original(mask))
    crop = CropOption(scales=((60, 40),), low=4, high=5, probability=1.0)
    result = DetectionAugmentation(scales=((60, 40),), crop=crop)(given, np.random.default_rng(0))
    assert 0 < len(drawn) == result["valid"].sum() < 20


# Room for the objects


def test_slots() -> None:
    assert [slots(count) for count in (0, 1, 7, 8, 9, 16, 17, 32, 33, 65, 128, 129)] == [
        8, 8, 8, 8, 16, 16, 32, 32, 64, 128, 128, 256
    ]  # fmt: skip


@pytest.mark.parametrize("count", [0, 1, 3, 12, 40])
def test_no_object_is_dropped(count: int) -> None:
    given = record(40, 60, count)
    augment = DetectionAugmentation(scales=((60, 40),), divisor=8)
    usable = int((~given["crowd"]).sum())
    result = augment(given, np.random.default_rng(0))
    assert len(result["boxes"]) == slots(usable)
    assert result["valid"].sum() == usable
    wide = augment({**given, "slots": 64}, np.random.default_rng(0))
    for name in ("boxes", "labels", "valid", "masks"):
        assert len(wide[name]) == 64
        np.testing.assert_array_equal(wide[name][: slots(usable)], result[name])
        assert not wide[name][usable:].any()
    if usable > 1:
        with pytest.raises(ValueError, match=f"{usable} objects for {usable - 1} slots"):
            augment({**given, "slots": usable - 1}, np.random.default_rng(0))


def test_groups_are_canvases() -> None:
    sizes = np.array([(480, 640), (640, 480), (500, 500), (1, 2), (2, 1)], np.int32)
    groups = aspect_groups(sizes)
    assert groups.tolist() == [0, 1, 0, 0, 1]
    for group, (height, width) in zip(groups, sizes.tolist(), strict=True):
        assert RECIPE.canvas(height, width) == ((800, 1344), (1344, 800))[group]
    assert aspect_groups(np.zeros((0, 2), np.int32)).shape == (0,)


# A function of the generator alone


def test_pickle_and_determinism() -> None:
    given = record(40, 60)
    augment = DetectionAugmentation(scales=((60, 36), (60, 44)), crop=SMALL_CROP, divisor=8)
    again = pickle.loads(pickle.dumps(augment))
    assert again == augment
    for seed in range(5):
        one, other = (f(given, np.random.default_rng(seed)) for f in (augment, again))
        for key, value in one.items():
            np.testing.assert_array_equal(value, other[key])


def test_records_need_no_more_than_objects() -> None:
    given = {key: value for key, value in record(40, 60).items() if key not in ("corrupt", "index", "name")}
    assert "corrupt" not in DetectionAugmentation(scales=((60, 40),))(given, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scales": ()}, "scales must be pairs"),
        ({"scales": (1333, 800)}, "a long and a short side"),
        ({"scales": "x"}, "scales must be pairs"),
        ({"scales": ((800, 1333),)}, "falling order"),
        ({"flip": 1.5}, "flip must be a probability"),
        ({"flip": None}, "flip must be a probability"),
        ({"divisor": 0}, "divisor must be"),
    ],
)
def test_impossible_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        DetectionAugmentation(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scales": ((1, 2),)}, "falling order"),
        ({"low": 0}, "rising order, not 0 and 600"),
        ({"low": 700}, "rising order"),
        ({"high": 600.0}, "whole numbers"),
        ({"probability": -0.1}, "probability must be a probability"),
    ],
)
def test_impossible_crops(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        CropOption(**options)


def test_lists_of_a_configuration_are_taken() -> None:
    augment = DetectionAugmentation(scales=[[60, 40], [60, 36]], crop=CropOption(scales=[[60, 30]]))
    assert augment.scales == ((60, 40), (60, 36))
    assert augment.crop == CropOption(scales=((60, 30),))
    hash(augment)
    assert detection_augment.SCALE == (1333, 800)
