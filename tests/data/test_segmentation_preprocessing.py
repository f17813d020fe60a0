"""Preprocessing for segmentation: recorded sizes and pixels, and settings that survive JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from msvmamba_jax.data.segmentation_preprocessing import TTA_RATIOS, SegmentationPreprocessing, prepare_tta
from msvmamba_jax.errors import InputError

RECORDED = Path(__file__).parents[1] / "parity" / "segmentation" / "resize.npz"


@pytest.fixture(scope="module")
def recorded() -> dict[str, np.ndarray]:
    with np.load(RECORDED) as file:
        return dict(file)


def test_recorded_sizes_of_one_pass(recorded: dict[str, np.ndarray]) -> None:
    preprocessing = SegmentationPreprocessing()
    for height, width, *expected in recorded["resize/test_h_w_outh_outw_sfw_sfh"].astype(int)[:, :4]:
        assert preprocessing.prepared_size(int(height), int(width)) == tuple(expected)


def test_prepare_resizes_the_whole_image(recorded: dict[str, np.ndarray]) -> None:
    # The recorded image of ratio 1.25 is also what a scale bound by its height gives.
    expected = recorded["resized/6"]
    preprocessing = SegmentationPreprocessing(scale=(1000, 76))
    assert preprocessing.prepared_size(61, 95) == expected.shape[:2] == (76, 118)
    np.testing.assert_array_equal(preprocessing.prepare(recorded["raw"]), expected)


def test_recorded_images_of_test_time_augmentation(recorded: dict[str, np.ndarray]) -> None:
    images = prepare_tta(recorded["raw"])
    assert len(images) == len(TTA_RATIOS) == 6
    for number, image in enumerate(images):
        np.testing.assert_array_equal(image, recorded[f"resized/{2 * number}"])
    (whole,) = prepare_tta(recorded["raw"], (1.0,))
    np.testing.assert_array_equal(whole, recorded["raw"])


def test_json() -> None:
    preprocessing = SegmentationPreprocessing(scale=(512, 128), mean=(0.1, 0.2, 0.3), std=(1, 2, 3))
    settings = json.loads(json.dumps(preprocessing.to_json()))
    assert settings == {"scale": [512, 128], "mean": [0.1, 0.2, 0.3], "std": [1.0, 2.0, 3.0]}
    assert SegmentationPreprocessing.from_json(settings) == preprocessing
    assert SegmentationPreprocessing.from_json({}) == SegmentationPreprocessing()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scale": [512, 2048]}, "falling order"),
        ({"scale": [512.0, 128]}, "whole numbers"),
        ({"scale": [512, 0]}, "positive"),
        ({"scale": 512}, "a long and a short side"),
        ({"mean": [1, 2]}, "mean"),
        ({"std": [1, 2, 0]}, "std must be positive"),
        ({"size": 224}, "unknown key size; known are scale, mean, std"),
        ([], "table"),
    ],
)
def test_impossible_settings(settings: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        SegmentationPreprocessing.from_json(settings)


@pytest.mark.parametrize(
    "image", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros((0, 4, 3), "u1")]
)
def test_what_is_no_image(image: np.ndarray) -> None:
    for prepare in (SegmentationPreprocessing().prepare, prepare_tta):
        with pytest.raises(InputError, match="uint8 array of shape"):
            prepare(image)
