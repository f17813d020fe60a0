"""Random resized crop, flip and RandAugment: by hand, in distribution, and a function of the generator alone."""

from __future__ import annotations

import math
import pickle
from typing import Any

import numpy as np
import pytest
from PIL import Image

from msvmamba_jax.data.augment import Augmentation, random_crop
from msvmamba_jax.data.randaugment import RandAugment
from msvmamba_jax.errors import InputError

CROPS = 20_000


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width, 3), np.uint8)


def kolmogorov_smirnov(values: np.ndarray, low: float, high: float) -> float:
    """Largest distance of the values' distribution from the uniform one, in units of 1 / sqrt(count)."""
    expected = (np.sort(values) - low) / (high - low)
    return float(np.abs(expected - np.arange(len(values)) / len(values)).max()) * math.sqrt(len(values))


def crops(height: int, width: int, **options: Any) -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.array([random_crop(height, width, rng, **options) for _ in range(CROPS)], np.float64)


def test_areas_aspects_and_positions() -> None:
    # So large that rounding to pixels does not show; up to half the area every aspect ratio fits, so no draw is lost.
    side = 100_000
    top, left, height, width = crops(side, side, scale=(0.08, 0.5)).T
    # Beyond 2.5 in one of 10^5 samples.
    assert kolmogorov_smirnov(height * width / side**2, 0.08, 0.5) < 2.5
    assert kolmogorov_smirnov(np.log(width / height), math.log(3 / 4), math.log(4 / 3)) < 2.5
    assert kolmogorov_smirnov(top / (side - height), 0, 1) < 2.5
    assert kolmogorov_smirnov(left / (side - width), 0, 1) < 2.5
    assert abs(np.corrcoef(height * width, np.log(width / height))[0, 1]) < 5 / math.sqrt(CROPS)


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 333), (7, 9), (1, 1), (3, 400), (400, 3)])
def test_windows_lie_inside(height: int, width: int) -> None:
    top, left, crop_height, crop_width = crops(height, width).T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (crop_height >= 1).all()
    assert (crop_width >= 1).all()
    assert (top + crop_height <= height).all()
    assert (left + crop_width <= width).all()


def test_default_areas_reach_the_whole_image() -> None:
    _, _, height, width = crops(500, 500).T
    area = height * width / 250_000
    assert 0.079 < area.min() < 0.085
    assert area.max() > 0.98
    assert (width / height > 0.74).all()
    assert (width / height < 1.35).all()


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((30, 300), (0, 130, 30, 40)),  # too wide: 30 * 4 / 3 = 40 columns in the middle
        ((300, 30), (130, 0, 40, 30)),  # too tall: 30 / (3 / 4) = 40 rows
        ((300, 301), (0, 0, 300, 301)),  # of an aspect ratio that is allowed: the whole image
    ],
)
def test_central_fallback(size: tuple[int, int], expected: tuple[int, int, int, int]) -> None:
    class TooLarge:
        """Draws an area that does not fit, and counts."""

        draws = 0

        def uniform(self, low: float, high: float) -> float:
            self.draws += 1
            return 100.0 if self.draws % 2 else 0.0

    rng = TooLarge()
    assert random_crop(*size, rng) == expected  # type: ignore[arg-type]
    assert rng.draws == 20  # area and aspect ratio, ten times


def test_crop_and_resize_equal_pillow_on_the_cut_window() -> None:
    image = noise(90, 120)
    augment = Augmentation(size=32, randaugment=None, flip=0.0)
    for seed in range(10):
        top, left, height, width = random_crop(90, 120, np.random.default_rng(seed))
        window = Image.fromarray(image).crop((left, top, left + width, top + height))
        expected = np.asarray(window.resize((32, 32), Image.Resampling.BICUBIC))
        result = augment({"image": image}, np.random.default_rng(seed))["image"]
        assert (result.dtype, result.shape) == (np.uint8, (32, 32, 3))
        np.testing.assert_array_equal(result, expected)


def test_shrinking_is_antialiased() -> None:
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 255
    augment = Augmentation(size=32, randaugment=None, scale=(1.0, 1.0), ratio=(1.0, 1.0))
    assert np.abs(augment({"image": stripes}, np.random.default_rng(0))["image"].astype(int) - 127)[:, 1:-1].max() < 12


def test_flip_rate() -> None:
    image = np.zeros((4, 4, 3), np.uint8)
    image[:, :2] = 255

    def flipped(probability: float) -> float:
        augment = Augmentation(size=4, randaugment=None, scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=probability)
        rng = np.random.default_rng(0)
        results = np.stack([augment({"image": image}, rng)["image"] for _ in range(4000)])
        mirrored = (results == image[:, ::-1]).all((1, 2, 3))
        assert (mirrored | (results == image).all((1, 2, 3))).all()
        return float(mirrored.mean())

    assert abs(flipped(0.5) - 0.5) < 5 * math.sqrt(0.25 / 4000)
    assert abs(flipped(0.2) - 0.2) < 5 * math.sqrt(0.16 / 4000)
    assert flipped(0.0) == 0
    assert flipped(1.0) == 1


@pytest.mark.parametrize(
    ("interpolation", "used"), [("bicubic", "bicubic"), ("bilinear", "bilinear"), ("lanczos", "bicubic")]
)
def test_randaugment_comes_last_with_the_same_filter(interpolation: str, used: str) -> None:
    image = noise(60, 50)
    policy = RandAugment.from_string("rand-m9-mstd0.5-inc1", interpolation=used, fill=(9, 8, 7))
    plain = Augmentation(size=24, interpolation=interpolation, randaugment=None)
    whole = Augmentation(size=24, interpolation=interpolation, fill=(9, 8, 7))
    for seed in range(40):
        rng = np.random.default_rng(seed)
        expected = policy(plain({"image": image}, rng)["image"], rng)
        np.testing.assert_array_equal(whole({"image": image}, np.random.default_rng(seed))["image"], expected)


def test_a_function_of_the_generator_alone() -> None:
    augment = Augmentation(size=16)
    record = {"image": noise(40, 30), "label": 3, "corrupt": 0}
    original = record["image"].copy()
    again = pickle.loads(pickle.dumps(augment))
    assert again == augment
    results = set()
    for seed in range(20):
        first, second = (transform(record, np.random.default_rng(seed)) for transform in (augment, again))
        np.testing.assert_array_equal(first["image"], second["image"])
        assert first["image"].flags.c_contiguous
        assert (first["label"], first["corrupt"]) == (3, 0)
        results.add(first["image"].tobytes())
    assert len(results) == 20
    np.testing.assert_array_equal(record["image"], original)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 0}, "size"),
        ({"size": 224.0}, "size"),
        ({"interpolation": "cubic"}, "bicubic"),
        ({"scale": (0.5, 1.5)}, "scale"),
        ({"scale": (0.5, 0.1)}, "rising"),
        ({"scale": 0.5}, "scale"),
        ({"ratio": (0.0, 1.0)}, "ratio"),
        ({"ratio": (1, 2, 3)}, "ratio"),
        ({"flip": 1.5}, "flip"),
        ({"flip": "yes"}, "flip"),
        ({"randaugment": "rand-m9"}, "RandAugment"),
    ],
)
def test_impossible_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Augmentation(**settings)
