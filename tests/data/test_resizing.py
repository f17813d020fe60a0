"""Sizes and pixels equal those recorded from mmcv; labels follow OpenCV's rule."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from msvmamba_jax.data import resizing
from msvmamba_jax.errors import InputError

PARITY = Path(__file__).parents[1] / "parity"
RATIOS = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)


def arrays(task: str) -> dict[str, np.ndarray]:
    with np.load(PARITY / task / "resize.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def segmentation() -> dict[str, np.ndarray]:
    return arrays("segmentation")


@pytest.fixture(scope="module")
def detection() -> dict[str, np.ndarray]:
    return arrays("detection")


def test_sizes_within_a_scale(segmentation: dict[str, np.ndarray], detection: dict[str, np.ndarray]) -> None:
    for height, width, *expected, factor_w, factor_h in segmentation["resize/test_h_w_outh_outw_sfw_sfh"]:
        size = int(height), int(width)
        assert resizing.rescale_size(*size, (2048, 512)) == tuple(expected)
        assert resizing.rescale_size(*size, (512, 2048)) == tuple(expected)
        assert resizing.scale_factors(size, (int(expected[0]), int(expected[1]))) == (factor_w, factor_h)
    for height, width, *expected, factor_w, factor_h in detection["resize/in_h_in_w_out_h_out_w_sf_w_sf_h"]:
        size = int(height), int(width)
        assert resizing.rescale_size(*size, (1333, 800)) == tuple(expected)
        assert resizing.scale_factors(size, (int(expected[0]), int(expected[1]))) == (factor_w, factor_h)


def test_sizes_by_ratio(segmentation: dict[str, np.ndarray]) -> None:
    rows = segmentation["resize/ratio_h_w_r_outh_outw_sfw_sfh"]
    plain = 0
    for height, width, ratio, *expected, factor_w, factor_h in rows:
        size = int(height), int(width)
        assert resizing.rescale_size_by_ratio(*size, float(ratio)) == tuple(expected)
        assert resizing.scale_factors(size, (int(expected[0]), int(expected[1]))) == (factor_w, factor_h)
        plain += (int(height * ratio + 0.5), int(width * ratio + 0.5)) == tuple(expected)
    assert plain < len(rows)  # some tell the two steps of the rule from one


def test_no_side_vanishes() -> None:
    assert resizing.rescale_size(1, 5000, (100, 50)) == (1, 100)
    assert resizing.rescale_size_by_ratio(1, 1, 0.1) == (1, 1)


def test_images(segmentation: dict[str, np.ndarray], detection: dict[str, np.ndarray]) -> None:
    for number, ratio in enumerate(RATIOS):
        size = resizing.rescale_size_by_ratio(*segmentation["raw"].shape[:2], ratio)
        assert size == tuple(segmentation["shapes"][2 * number])
        found = resizing.resize_image(segmentation["raw"], *size)
        np.testing.assert_array_equal(found, segmentation[f"resized/{2 * number}"])
    for name in ("image_48x32", "image_20x13"):
        expected = detection[f"resize/{name}"]
        np.testing.assert_array_equal(resizing.resize_image(detection["resize/image"], *expected.shape[:2]), expected)


def test_labels_take_the_row_and_column_of_the_rule() -> None:
    rng = np.random.default_rng(0)
    thirds = 0
    for _ in range(200):
        height, width, rows, columns = (int(side) for side in rng.integers(1, 90, 4))
        labels = rng.integers(0, 256, (height, width), np.uint8)
        i = np.minimum(np.floor(np.arange(rows) * (1 / (rows / height))).astype(int), height - 1)
        j = np.minimum(np.floor(np.arange(columns) * (1 / (columns / width))).astype(int), width - 1)
        found = resizing.resize_labels(labels, rows, columns)
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found, labels[i][:, j])
        thirds += (i != np.arange(rows) * height // rows).any()
    assert thirds  # double precision shows


def test_the_same_size_is_no_work() -> None:
    image = np.zeros((4, 5, 3), np.uint8)
    assert resizing.resize_image(image, 4, 5) is image
    assert resizing.resize_labels(image[..., 0], 4, 5).base is image


def test_opencv_works_on_the_calling_thread_alone() -> None:
    import cv2

    resizing.opencv.cache_clear()
    cv2.setNumThreads(2)
    resizing.resize_image(np.zeros((4, 5, 3), np.uint8), 8, 8)
    assert cv2.getNumThreads() == 1


def test_opencv_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    resizing.opencv.cache_clear()
    with pytest.raises(InputError, match=r"pip install 'msvmamba_jax\[data\]'"):
        resizing.resize_image(np.zeros((4, 5, 3), np.uint8), 8, 8)
