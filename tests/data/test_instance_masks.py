"""Instance masks: pixel for pixel those of COCO's tools, whatever form they come in; every error in one sentence."""

from __future__ import annotations

import pickle
import sys
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco

from msvmamba_jax.data.instance_masks import (
    check_run_length_size,
    decompress_runs,
    instance_mask,
    run_length_size,
    whole_polygons,
)
from msvmamba_jax.errors import InputError

SIZES = [(1, 1), (7, 5), (13, 40), (37, 29), (60, 80)]


def polygon(rng: np.random.Generator, height: int, width: int) -> list[float]:
    """Of 3 to 9 points with two decimals, as in COCO; some lie beyond the image."""
    points = rng.uniform(-0.2, 1.2, (rng.integers(3, 10), 2)) * (width, height)
    return [round(value, 2) for value in points.ravel().tolist()]


def shape(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A mask with few runs or many."""
    return (rng.random((height, width)) < rng.choice([0, 0.02, 0.5, 0.97, 1])).astype(np.uint8)


def compressed(pixels: np.ndarray) -> dict[str, Any]:
    code = coco.encode(np.asfortranarray(pixels))
    return {"size": code["size"], "counts": code["counts"].decode()}


def uncompressed(pixels: np.ndarray) -> dict[str, Any]:
    values = pixels.T.ravel()
    changes = np.flatnonzero(np.diff(values, prepend=0)).tolist()
    return {"size": list(pixels.shape), "counts": np.diff([0, *changes, values.size]).tolist()}


def fails(call: Any) -> str:
    with pytest.raises(InputError) as error:
        call()
    message = str(error.value)
    assert message.endswith(".")
    assert "\n" not in message
    return message


# Pixels


@pytest.mark.parametrize("size", SIZES)
def test_polygons_are_those_of_the_tools(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(size)
    filled = 0
    for _ in range(60):
        parts = [polygon(rng, *size) for _ in range(rng.integers(1, 4))]
        expected = coco.decode(coco.merge(coco.frPyObjects(parts, *size)))
        found = instance_mask(parts, *size, owner="it").pixels()
        assert (found.dtype, found.shape) == (np.uint8, size)
        np.testing.assert_array_equal(found, expected)
        filled += found.any()
    assert filled > 20


def test_decimals_of_the_file_decide() -> None:
    # In single precision 0.3 is more than 0.3, and this polygon would begin a column later.
    rng = np.random.default_rng(0)
    differ = 0
    for _ in range(300):
        part = (rng.integers(0, 200, 8) / 10).tolist()
        single = np.array(part, np.float32).astype(np.float64)
        expected = coco.decode(coco.merge(coco.frPyObjects([part], 20, 20)))
        np.testing.assert_array_equal(instance_mask([part], 20, 20, owner="it").pixels(), expected)
        differ += not np.array_equal(coco.decode(coco.merge(coco.frPyObjects([single], 20, 20))), expected)
    assert differ


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("code", [compressed, uncompressed])
def test_run_lengths_are_those_of_the_tools(size: tuple[int, int], code: Any) -> None:
    rng = np.random.default_rng(size)
    for _ in range(30):
        pixels = shape(rng, *size)
        found = instance_mask(code(pixels), *size, owner="it").pixels()
        assert (found.dtype, found.flags.c_contiguous) == (np.uint8, True)
        np.testing.assert_array_equal(found, pixels)
        if code is uncompressed:
            np.testing.assert_array_equal(found, coco.decode(coco.frPyObjects(code(pixels), *size)))


def test_long_runs_are_decompressed() -> None:
    for runs in ([3_000_000_000 % 2**31, 5, 2_000_000_000, 1], [0, 1, 2, 3, 4, 500, 6, 7_000_000], [1], [0, 0, 0, 0]):
        code = coco.frPyObjects({"size": [sum(runs), 1], "counts": runs}, sum(runs), 1)
        np.testing.assert_array_equal(decompress_runs(code["counts"].decode()), runs)
    assert decompress_runs("").size == 0


def test_polygons_with_fewer_than_three_points_are_left_out() -> None:
    rng = np.random.default_rng(0)
    good = polygon(rng, 20, 30)
    parts = [[1, 2], [1, 2, 3, 4], good, [1, 2, 3, 4, 5], [1.0] * 7, good[:6]]
    assert whole_polygons(parts) == [good, good[:6]]
    expected = coco.decode(coco.merge(coco.frPyObjects([good, good[:6]], 20, 30)))
    np.testing.assert_array_equal(instance_mask(parts, 20, 30, owner="it").pixels(), expected)


def test_pickle_and_what_it_takes() -> None:
    rng = np.random.default_rng(0)
    for segmentation in ([polygon(rng, 20, 30)], uncompressed(shape(rng, 20, 30))):
        mask = instance_mask(segmentation, 20, 30, owner="it")
        np.testing.assert_array_equal(pickle.loads(pickle.dumps(mask)).pixels(), mask.pixels())


# Errors


@pytest.mark.parametrize("segmentation", [[], [[1, 2, 3, 4]], [[1, 2, 3, 4, 5]], [1, 2, 3, 4, 5, 6], None, "x", 3])
def test_nothing_to_draw(segmentation: Any) -> None:
    message = fails(lambda: instance_mask(segmentation, 9, 9, owner="Annotation 5"))
    assert message.startswith("Annotation 5 has no polygon of three points or more")


@pytest.mark.parametrize("value", ["a", None, [1], float("nan"), float("inf"), 1e30, -2e6])
def test_points_that_are_none(value: Any) -> None:
    message = fails(lambda: instance_mask([[1, 2, 3, 4, 5, value]], 9, 9, owner="Annotation 5"))
    assert message.startswith("Annotation 5 has a polygon whose points are no pixels")


@pytest.mark.parametrize(
    "segmentation",
    [{}, {"size": [9, 9]}, {"counts": [81]}, {"size": [9], "counts": [81]}, {"size": [9, 9.0], "counts": [81]},
     {"size": [0, 0], "counts": [81]}, {"size": [9, 9], "counts": 81}, {"size": [9, True], "counts": [81]}],
)  # fmt: skip
def test_run_lengths_of_another_form(segmentation: Any) -> None:
    assert fails(lambda: run_length_size(segmentation, owner="Annotation 5")).startswith("Annotation 5 has run lengths")
    fails(lambda: instance_mask(segmentation, 9, 9, owner="Annotation 5"))


def test_run_lengths_of_another_size() -> None:
    code = uncompressed(np.eye(9, 8, dtype=np.uint8))
    assert run_length_size(code, owner="it") == (9, 8)
    message = fails(lambda: instance_mask(code, 8, 9, owner="Annotation 5"))
    assert message.startswith("Annotation 5 has a mask of 8 x 9 pixels, but its image has 9 x 8")
    check_run_length_size((9, 8), 9, 8, owner="it")


@pytest.mark.parametrize("counts", [[80], [81, 1], [40, 40], []])
def test_run_lengths_that_do_not_fill_the_image(counts: list[int]) -> None:
    segmentation = {"size": [9, 9], "counts": counts}
    message = fails(lambda: instance_mask(segmentation, 9, 9, owner="Annotation 5"))
    if counts:
        assert f"Annotation 5 has run lengths of {sum(counts)} pixels in all, but its image has 81" in message


@pytest.mark.parametrize(
    "counts", [[-1, 82], [1.5, 79.5], ["a"], [[81]], [None], "é", "\x00", "1/", "P", "o" * 30 + "0"]
)
def test_run_lengths_that_cannot_be_decoded(counts: Any) -> None:
    segmentation = {"size": [9, 9], "counts": counts}
    message = fails(lambda: instance_mask(segmentation, 9, 9, owner="Annotation 5"))
    assert message.startswith("Annotation 5 has run lengths that cannot be decoded")


def test_a_compressed_mask_that_is_cut_off() -> None:
    code = compressed(shape(np.random.default_rng(3), 60, 80) | np.eye(60, 80, dtype=np.uint8))
    for end in range(len(code["counts"])):
        fails(lambda end=end: instance_mask({**code, "counts": code["counts"][:end]}, 60, 80, owner="Annotation 5"))


def test_the_tools_are_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = instance_mask([[1, 1, 5, 1, 5, 5]], 9, 9, owner="it")
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    assert "pip install 'msvmamba_jax[data]'" in fails(mask.pixels)
