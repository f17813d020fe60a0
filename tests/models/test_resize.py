"""Resizing and pooling against numbers worked out by hand and against `jax.image.resize`."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from msvmamba_jax.models.resize import adaptive_average_pool, resize_bilinear

SIZES = [1, 2, 3, 4, 5, 7, 8, 13, 14, 16]


def row(values, width):
    return resize_bilinear(jnp.asarray(values, jnp.float32).reshape(1, 1, -1, 1), 1, width).reshape(-1).tolist()


def test_double_by_hand():
    assert row([0, 4, 8], 6) == [0, 1, 3, 5, 7, 8]


def test_odd_enlargement_by_hand():
    """2 -> 3: centres of the new positions lie at -1/6, 1/2 and 7/6 of the old; the outer ones are cut to the edge."""
    np.testing.assert_allclose(row([0, 6], 3), [0, 3, 6], atol=1e-6)
    # 2 -> 5: centres at -0.3, 0.1, 0.5, 0.9, 1.3
    np.testing.assert_allclose(row([0, 10], 5), [0, 1, 5, 9, 10], atol=1e-5)


def test_reduction_by_hand():
    """4 -> 2: centres at 0.5 and 2.5. 5 -> 2: centres at 0.75 and 3.25. No antialiasing."""
    np.testing.assert_allclose(row([0, 2, 10, 20], 2), [1, 15], atol=1e-6)
    np.testing.assert_allclose(row([0, 4, 100, 8, 12], 2), [3, 9], atol=1e-6)


def test_one_value_spreads():
    assert row([7], 5) == [7] * 5
    assert row([7], 1) == [7]


def test_rows_and_columns_by_hand():
    x = jnp.asarray([[0.0, 4.0], [8.0, 12.0]]).reshape(1, 2, 2, 1)
    expected = [[0, 1, 3, 4], [2, 3, 5, 6], [6, 7, 9, 10], [8, 9, 11, 12]]
    np.testing.assert_allclose(resize_bilinear(x, 4, 4)[0, :, :, 0], expected)


def test_many_sizes_against_jax():
    """What the model needs (half of a map, rounded up, back to the map) and any other sizes, rows and columns apart."""
    rng = np.random.default_rng(0)
    pairs = [(old, new) for old in SIZES for new in sorted({2 * old, 2 * old - 1, 1, 3, 5, 16})]
    values = {old: jnp.asarray(rng.standard_normal((1, old, 2, 3)), jnp.float32) for old in SIZES}

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # many small loops
    def resize_all(values):
        rows = [resize_bilinear(values[old], new, 2) for old, new in pairs]
        columns = [resize_bilinear(jnp.swapaxes(values[old], 1, 2), 2, new) for old, new in pairs]
        expected = [
            jax.image.resize(values[old], (1, new, 2, 3), "bilinear", antialias=False, precision=lax.Precision.HIGHEST)
            for old, new in pairs
        ]
        return rows, columns, expected

    for (old, new), rows, columns, expected in zip(pairs, *resize_all(values), strict=True):
        np.testing.assert_allclose(rows, expected, atol=1e-5, err_msg=f"{old} rows to {new}")
        np.testing.assert_allclose(columns.swapaxes(1, 2), expected, atol=1e-5, err_msg=f"{old} columns to {new}")


@pytest.mark.parametrize(("height", "width"), [(8, 14), (7, 13), (7, 14), (3, 20)])
def test_maps_against_jax(height, width):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 4, 7, 3)), jnp.float32)
    expected = jax.image.resize(x, (2, height, width, 3), "bilinear", antialias=False)
    np.testing.assert_allclose(resize_bilinear(x, height, width), expected, atol=1e-5)


@pytest.mark.parametrize(("height", "width"), [(8, 14), (7, 13), (3, 20)])
def test_gradient(height, width):
    """The transpose: <resize(x), dy> = <x, gradient>, and weights sum to one."""
    rng = np.random.default_rng(0)
    x, dy = (jnp.asarray(rng.standard_normal((1, h, w, 2)), jnp.float32) for h, w in ((4, 7), (height, width)))
    y, pull_back = jax.vjp(lambda x: resize_bilinear(x, height, width), x)
    np.testing.assert_allclose(jnp.vdot(y, dy), jnp.vdot(x, pull_back(dy)[0]), rtol=1e-5)
    np.testing.assert_allclose(jnp.sum(pull_back(dy)[0]), jnp.sum(dy), rtol=1e-5)


def test_keeps_bfloat16():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 5, 4)), jnp.bfloat16)
    for height, width in ((6, 10), (5, 9)):
        y = resize_bilinear(x, height, width)
        assert y.dtype == jnp.bfloat16
        expected = resize_bilinear(x.astype(jnp.float32), height, width)
        np.testing.assert_allclose(y.astype(jnp.float32), expected, atol=0.03)


def pooled(values, size):
    x = jnp.asarray(values, jnp.float32)
    return adaptive_average_pool(x.reshape(1, *x.shape, 1), size)[0, ..., 0].tolist()


def test_pooling_where_cells_divide_the_map():
    assert pooled([[1, 3, 5, 7], [3, 5, 7, 9]], 1) == [[5]]
    assert pooled([[1, 3, 5, 7], [3, 5, 7, 9]], 2) == [[2, 6], [4, 8]]


def test_pooling_where_cells_overlap():
    """5 positions in 2 cells: 0 to 2 and 2 to 4; in 3 cells: 0 to 1, 1 to 3 and 3 to 4."""
    column = [[0], [3], [6], [9], [30]]
    np.testing.assert_allclose(pooled(column, 2), [[3, 3], [15, 15]], atol=1e-6)
    np.testing.assert_allclose(pooled(column, 3), [[1.5] * 3, [6] * 3, [19.5] * 3], atol=1e-6)


def test_pooling_a_map_smaller_than_the_grid():
    """2 positions in 3 cells: the first, both, the second."""
    np.testing.assert_allclose(pooled([[0], [8]], 3), [[0] * 3, [4] * 3, [8] * 3], atol=1e-6)


def test_pooling_takes_each_axis_and_image_for_itself():
    x = np.random.default_rng(0).standard_normal((2, 7, 5, 3)).astype(np.float32)
    y = np.asarray(adaptive_average_pool(jnp.asarray(x), 3))
    assert y.shape == (2, 3, 3, 3)
    rows, columns = [(0, 3), (2, 5), (4, 7)], [(0, 2), (1, 4), (3, 5)]
    for i, (top, bottom) in enumerate(rows):
        for j, (left, right) in enumerate(columns):
            np.testing.assert_allclose(y[:, i, j], x[:, top:bottom, left:right].mean((1, 2)), atol=1e-6)


def test_pooling_in_bfloat16_sums_in_float32():
    x = jnp.full((1, 300, 1, 1), 1.0, jnp.bfloat16)  # 257 is no bfloat16
    assert adaptive_average_pool(x, 1).item() == 1
    assert adaptive_average_pool(x, 1).dtype == jnp.bfloat16
