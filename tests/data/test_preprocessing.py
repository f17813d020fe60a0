"""The evaluation transform equals the reference's, and a checkpoint's settings survive a round trip."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from msvmamba_jax.data.preprocessing import INTERPOLATIONS, Preprocessing
from msvmamba_jax.errors import InputError

# Images and results of the original PyTorch recipe: resize 256 bicubic, centre crop 224, ImageNet mean and std.
REFERENCE = Path(__file__).parents[1] / "parity" / "recipe" / "eval_transform.npz"


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize("index", range(3))
def test_reference_transform(index: int) -> None:
    with np.load(REFERENCE) as reference:
        image, mean, part = (reference[f"eval{index}_{name}"] for name in ("image", "mean", "slice"))
    preprocessing = Preprocessing()
    result = preprocessing.normalise(preprocessing.crop(image)).transpose(2, 0, 1)
    assert result.shape == (3, 224, 224)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result[:, ::16, ::16], part, atol=1e-5, rtol=0)
    np.testing.assert_allclose(result.mean((1, 2)), mean, atol=1e-5, rtol=0)


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_image_of_the_right_size_is_unchanged(interpolation: str) -> None:
    image = noise(32, 32)
    preprocessing = Preprocessing(size=32, resize=32, interpolation=interpolation)
    np.testing.assert_array_equal(preprocessing.crop(image), image)


def test_centre_window_by_hand() -> None:
    image = noise(9, 14)
    # Short side unchanged. Rows: (9 - 6) / 2 = 1.5, rounded to the even 2; columns: (14 - 6) / 2 = 4.
    np.testing.assert_array_equal(Preprocessing(size=6, resize=9).crop(image), image[2:8, 4:10])
    # (9 - 8) / 2 = 0.5 is rounded to 0.
    np.testing.assert_array_equal(Preprocessing(size=8, resize=9).crop(image), image[0:8, 3:11])


@pytest.mark.parametrize(("height", "width", "resized"), [(50, 77, (20, 30)), (77, 50, (30, 20)), (7, 7, (20, 20))])
def test_long_side_is_rounded_down(height: int, width: int, resized: tuple[int, int]) -> None:
    image = noise(height, width)  # 20 * 77 / 50 = 30.8
    whole = np.asarray(Image.fromarray(image).resize(resized[::-1], Image.Resampling.BICUBIC))
    top, left = ((length - 20) // 2 for length in resized)
    np.testing.assert_array_equal(
        Preprocessing(size=20, resize=20).crop(image), whole[top : top + 20, left : left + 20]
    )


def test_interpolation_matters() -> None:
    image = noise(80, 60)
    results = [Preprocessing(size=24, resize=24, interpolation=name).crop(image) for name in INTERPOLATIONS]
    assert len({result.tobytes() for result in results}) == len(INTERPOLATIONS)


@pytest.mark.parametrize("shape", [(1, 3_000_000), (3_000_000, 1), (1, 1), (2, 500)])
def test_extreme_shapes(shape: tuple[int, int]) -> None:
    image = np.full((*shape, 3), 9, np.uint8)
    np.testing.assert_array_equal(Preprocessing().crop(image), np.full((224, 224, 3), 9))


def test_normalise_by_hand() -> None:
    preprocessing = Preprocessing(mean=(0.0, 0.5, 1.0), std=(1.0, 0.5, 0.25))
    images = np.array([[[0, 0, 0], [255, 255, 255], [51, 51, 51]]], np.uint8)
    expected = [[[0, -1, -4], [1, 1, 0], [0.2, -0.6, -3.2]]]
    np.testing.assert_allclose(preprocessing.normalise(images), expected, atol=1e-6)


def test_json_round_trip() -> None:
    preprocessing = Preprocessing(size=96, resize=100, interpolation="bilinear", mean=(0.1, 0.2, 0.3), std=(1, 2, 3))
    text = json.dumps(preprocessing.to_json())
    assert Preprocessing.from_json(json.loads(text)) == preprocessing
    assert json.loads(text) == preprocessing.to_json()
    assert Preprocessing.from_json({}) == Preprocessing()
    assert hash(Preprocessing.from_json(json.loads(text))) == hash(preprocessing)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 0}, "size"),
        ({"size": 224.0}, "size"),
        ({"resize": True}, "resize"),
        ({"size": 300}, "at least size"),
        ({"interpolation": "cubic"}, "bicubic"),
        ({"mean": (0.5, 0.5)}, "mean"),
        ({"mean": 0.5}, "mean"),
        ({"mean": ("a", "b", "c")}, "mean"),
        ({"mean": (0.5, 0.5, float("nan"))}, "mean"),
        ({"std": (1.0, 0.0, 1.0)}, "std"),
        ({"crop_pct": 0.875}, "crop_pct"),
    ],
)
def test_impossible_settings(settings: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Preprocessing.from_json(settings)


@pytest.mark.parametrize(
    "image", [np.zeros((4, 4, 3), np.float32), np.zeros((4, 4), np.uint8), np.zeros((4, 0, 3), np.uint8)]
)
def test_only_rgb_images_are_cropped(image: np.ndarray) -> None:
    with pytest.raises(InputError, match="uint8"):
        Preprocessing().crop(image)


def test_only_uint8_is_normalised() -> None:
    with pytest.raises(InputError, match="float32"):
        Preprocessing().normalise(np.zeros((4, 4, 3), np.float32))
