"""Preprocessing for detection: recorded sizes and pixels, padding, shapes without images, settings in JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from msvmamba_jax.data.detection_preprocessing import (
    DetectionPreprocessing,
    checked_bucket,
    detection_example,
    detection_shapes,
)
from msvmamba_jax.errors import InputError

RECORDED = Path(__file__).parents[1] / "parity" / "detection" / "resize.npz"
PREPROCESSING = DetectionPreprocessing()
SMALL = DetectionPreprocessing(scale=(60, 40), divisor=8)


@pytest.fixture(scope="module")
def recorded() -> dict[str, np.ndarray]:
    with np.load(RECORDED) as file:
        return dict(file)


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng([height, width]).integers(0, 256, (height, width, 3), np.uint8)


def test_recorded_sizes(recorded: dict[str, np.ndarray]) -> None:
    rows = recorded["resize/in_h_in_w_out_h_out_w_sf_w_sf_h"]
    for height, width, *expected in rows[:, :4].astype(int).tolist():
        assert PREPROCESSING.prepared_size(height, width) == tuple(expected)
        padded = PREPROCESSING.padded_size(height, width)
        assert [side % 32 for side in padded] == [0, 0]
        assert all(0 <= side - inner < 32 for side, inner in zip(padded, expected, strict=True))
    assert PREPROCESSING.padded_size(480, 640) == (800, 1088)
    assert PREPROCESSING.padded_size(800, 1333) == PREPROCESSING.nominal_size == (800, 1344)
    assert SMALL.nominal_size == (40, 64)


def test_recorded_image_and_factors(recorded: dict[str, np.ndarray]) -> None:
    expected = recorded["resize/image_48x32"]
    canvas, extent, scale = DetectionPreprocessing(scale=(48, 40), divisor=20).prepare(recorded["resize/image"])
    assert canvas.shape == (40, 60, 3)
    assert (canvas.dtype, extent.dtype, scale.dtype) == (np.uint8, np.int32, np.float32)
    assert extent.tolist() == [31, 48]
    np.testing.assert_array_equal(canvas[:31, :48], expected)
    assert not canvas[31:].any()
    assert not canvas[:, 48:].any()
    np.testing.assert_array_equal(scale, np.float32([48 / 31, 31 / 20]))  # width, height


def test_recorded_factors(recorded: dict[str, np.ndarray]) -> None:
    for height, width, _, _, factor_w, factor_h in recorded["resize/in_h_in_w_out_h_out_w_sf_w_sf_h"][[0, 7]]:
        _, _, scale = PREPROCESSING.prepare(np.zeros((int(height), int(width), 3), np.uint8))
        np.testing.assert_array_equal(scale, np.float32([factor_w, factor_h]))


def test_images_of_the_size_of_the_scale_stay_as_they_are() -> None:
    image = noise(40, 60)
    canvas, extent, scale = SMALL.prepare(image)
    np.testing.assert_array_equal(canvas[:, :60], image)
    assert (extent.tolist(), scale.tolist()) == ([40, 60], [1, 1])


@pytest.mark.parametrize("bucket", [0, 8, 16, 40])
def test_examples_and_their_shapes(bucket: int) -> None:
    sizes = np.array([(30, 30), (20, 60), (61, 33), (1, 90), (40, 60), (300, 200)], np.int32)
    shapes = detection_shapes(SMALL, bucket, sizes)
    for index, (size, shape) in enumerate(zip(sizes.tolist(), shapes, strict=True)):
        record = {"image": noise(*size), "index": index, "name": "x", "boxes": np.zeros((0, 4))}
        example = detection_example(SMALL, bucket, record)
        assert example.keys() == {"image", "extent", "scale", "index"}
        assert example["image"].shape == (*shape, 3)
        assert (example["index"], example["index"].dtype) == (index, np.int32)
        rows, columns = example["extent"]
        assert (rows, columns) == SMALL.prepared_size(*size)
        resized = cv2.resize(record["image"], (int(columns), int(rows)), interpolation=cv2.INTER_LINEAR)
        np.testing.assert_array_equal(example["image"][:rows, :columns], resized)
        assert example["image"].sum() == resized.sum()
        step = bucket or 8
        assert shape == (-(-rows // step) * step, -(-columns // step) * step)
        np.testing.assert_allclose(example["scale"], [columns / size[1], rows / size[0]], rtol=1e-6)
    assert len(set(detection_shapes(SMALL, 40, sizes))) < len(set(detection_shapes(SMALL, 0, sizes)))


def test_buckets() -> None:
    assert [checked_bucket(bucket, 32) for bucket in (0, 32, 320)] == [0, 32, 320]
    for bucket in (-32, 33, 16, 32.0, True, None, "32"):
        with pytest.raises(InputError, match="0 or a multiple of 32"):
            checked_bucket(bucket, 32)


def test_json() -> None:
    preprocessing = DetectionPreprocessing(scale=(512, 128), divisor=64, mean=(0.1, 0.2, 0.3), std=(1, 2, 3))
    settings = json.loads(json.dumps(preprocessing.to_json()))
    assert settings == {"scale": [512, 128], "divisor": 64, "mean": [0.1, 0.2, 0.3], "std": [1.0, 2.0, 3.0]}
    assert DetectionPreprocessing.from_json(settings) == preprocessing
    assert DetectionPreprocessing.from_json({}) == DetectionPreprocessing()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scale": [512, 2048]}, "falling order"),
        ({"scale": 512}, "a long and a short side"),
        ({"divisor": 0}, "divisor must be a positive whole number"),
        ({"divisor": 32.0}, "divisor must be a positive whole number"),
        ({"mean": [1, 2]}, "mean"),
        ({"std": [1, 2, 0]}, "std must be positive"),
        ({"size": 224}, "unknown key size; known are scale, divisor, mean, std"),
        ([], "table"),
    ],
)
def test_impossible_settings(settings: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        DetectionPreprocessing.from_json(settings)


def test_what_is_no_image() -> None:
    with pytest.raises(InputError, match="uint8 array of shape"):
        PREPROCESSING.prepare(np.zeros((4, 4), np.uint8))
