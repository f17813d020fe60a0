"""The benchmark's problems: numbers by hand, and that the models really run these scans."""

from __future__ import annotations

from collections import Counter

import jax
import jax.numpy as jnp
import pytest

from msvmamba_jax.kernels.selective_scan.costs import special_functions, traffic
from msvmamba_jax.kernels.selective_scan.shapes import BATCHES, VARIANTS, ScanShape, model_scans, shapes
from msvmamba_jax.models import mixers
from msvmamba_jax.models.parameters import SHAPE_KEYS
from msvmamba_jax.models.variants import create_model

FULL, HALF = ("row",), ("row_reversed", "column", "column_reversed")


def problems(**filters) -> list[tuple]:
    return [(s.batch, s.height, s.width, s.channels, s.states, s.routes) for s in shapes(**filters)]


def test_nano_at_224():
    assert problems(tasks=["classification"], variants=["msvmamba_nano"], batches=[16]) == [
        (16, 56, 56, 96, 1, FULL),
        (16, 28, 28, 96, 1, HALF),
        (16, 28, 28, 192, 1, FULL),
        (16, 14, 14, 192, 1, HALF),
        (16, 14, 14, 384, 1, FULL),
        (16, 7, 7, 384, 1, HALF),
        (16, 7, 7, 768, 1, FULL),
        (16, 4, 4, 768, 1, HALF),
    ]


def test_tiny_on_detection_images():
    """800 x 1344 pixels are 200 x 336 patches."""
    assert problems(tasks=["detection"], variants=["msvmamba_tiny"], batches=[2]) == [
        (2, 200, 336, 192, 1, FULL),
        (2, 100, 168, 192, 1, HALF),
        (2, 100, 168, 384, 1, FULL),
        (2, 50, 84, 384, 1, HALF),
        (2, 50, 84, 768, 1, FULL),
        (2, 25, 42, 768, 1, HALF),
        (2, 25, 42, 1536, 1, FULL),
        (2, 13, 21, 1536, 1, HALF),
    ]


def test_micro_on_segmentation_images():
    found = problems(tasks=["segmentation"], variants=["msvmamba_micro"], batches=[8], stages=[0, 3])
    assert [shape[:4] for shape in found] == [(8, 128, 128, 128), (8, 64, 64, 128), (8, 16, 16, 1024), (8, 8, 8, 1024)]


def test_the_plain_baseline():
    found = problems(variants=["vssm_tiny"], stages=[1])
    assert found == [(128, 28, 28, 384, 16, (route,)) for route in ("row", "column", "row_reversed", "column_reversed")]


def test_all_of_them():
    """Three variants of four stages and two scans, at three, two and two batches, and sixteen of the baseline."""
    found = shapes()
    assert len(found) == 3 * 4 * 2 * (3 + 2 + 2) + 16
    assert len({shape.name for shape in found}) == len(found)
    assert {shape.batch for shape in found} == set(BATCHES)


def test_filters():
    assert shapes(tasks=["detection"], batches=[128]) == []
    assert shapes(variants=["vssm_tiny"], tasks=["segmentation"]) == []
    assert {shape.batch for shape in shapes(batches=[2])} == {2}


def test_partial_patches_are_cut_off():
    shape, blocks = model_scans("msvmamba_nano", 3, 227, 130)[0]
    assert (shape.batch, shape.height, shape.width, blocks) == (3, 56, 32, 1)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_models_run_these_scans(variant, monkeypatch):
    """On an image of which stages and patches leave a remainder."""
    height, width = 140, 103
    called: Counter[tuple] = Counter()

    def record(u, delta, A, B, C, D, delta_bias, *, routes, implementation):
        called[(*u.shape, A.shape[1], routes)] += 1
        return jnp.zeros((u.shape[0], len(routes), *u.shape[1:]), u.dtype)

    monkeypatch.setattr(mixers, "selective_scan_2d", record)

    def run(images: jax.Array) -> jax.Array:
        return create_model(variant, num_classes=2, rngs=SHAPE_KEYS)(images)

    jax.eval_shape(run, jax.ShapeDtypeStruct((2, height, width, 3), jnp.float32))
    expected: Counter[tuple] = Counter()
    for shape, blocks in model_scans(variant, 2, height, width):
        expected[shape.batch, shape.height, shape.width, shape.channels, shape.states, shape.routes] += blocks
    assert called == expected


def test_costs_by_hand():
    """2 maps of 3 x 4 positions, 5 channels, 2 states, 3 routes."""
    shape = ScanShape("", 2, 3, 4, 5, 2, HALF)
    assert (shape.positions, shape.elements, shape.visits) == (24, 120, 360)
    u_delta, B_C, y, parameters = 2 * 120, 2 * 48, 360, 5 * 2 + 5 + 5
    assert traffic(shape, "float32", "forward") == 4 * (u_delta + B_C + y + parameters)
    assert traffic(shape, "bfloat16", "forward") == 2 * (u_delta + B_C + y) + 4 * parameters
    assert traffic(shape, "bfloat16", "backward") == 2 * (2 * u_delta + 2 * B_C + y) + 2 * 4 * parameters
    assert special_functions(shape, "forward") == 360 * 3
    assert special_functions(shape, "backward") == 360 * 4
