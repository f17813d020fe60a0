"""The forward that keeps a map of some tens of positions in shared memory: that it lowers, and its results interpreted.

On a GPU, `test_selective_scan.py` runs it.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msvmamba_jax.kernels.selective_scan import mosaic, mosaic_small, mosaic_team, xla
from msvmamba_jax.kernels.selective_scan.config import H100, Problem
from msvmamba_jax.kernels.selective_scan.mosaic_block import as_step, in_place_of_delta

HALF = ("row_reversed", "column", "column_reversed")
ALL = ("column", "row_reversed", "row", "column_reversed")


def problem(*shape, direction="forward", states=1, routes=3, dtype="bfloat16", delta_dtype=None) -> Problem:
    return Problem(direction, *shape, states=states, routes=routes, dtype=dtype, delta_dtype=delta_dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("shape", [(128, 8, 8, 768), (128, 4, 4, 1536), (1, 7, 7, 8), (2, 16, 3, 40), (1, 1, 2, 3)])
def test_takes_small_maps(shape, dtype):
    assert mosaic_small.supports(problem(*shape, dtype=dtype), H100.shared_memory)


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((128, 14, 14, 384), {}),
        ((2, 2, 20, 192), {}),  # lines of two chunks
        ((2, 7, 1, 192), {}),
        ((2, 7, 7, 192), {"states": 2}),
        ((2, 7, 7, 192), {"delta_dtype": "float32"}),
        ((2, 7, 7, 192), {"direction": "backward"}),
    ],
    ids=["large", "long", "narrow", "states", "delta", "backward"],
)
def test_leaves_others(shape, options):
    assert not mosaic_small.supports(problem(*shape, **options), H100.shared_memory)


def test_two_blocks_share_a_multiprocessor():
    reserved = 1024  # of each block, by the system
    assert mosaic_small.supports(problem(128, 7, 7, 768), 228 * 1024 // 2 - reserved)


@pytest.fixture
def scans(monkeypatch) -> list[int]:
    """One for each scan that the kernel takes, which is all that it supports."""
    calls: list[int] = []
    scan = mosaic_small.scan
    monkeypatch.setattr(mosaic_small, "faster", lambda problem, device: True)
    monkeypatch.setattr(mosaic_small, "scan", lambda *a, **options: calls.append(1) or scan(*a, **options))
    return calls


@pytest.mark.parametrize(
    ("shape", "routes", "dtype"),
    [
        ((128, 7, 7, 1536), ("row",), "float32"),
        ((128, 4, 4, 1536), HALF, "bfloat16"),
        ((3, 3, 4, 40), HALF, "float32"),  # fewer positions than threads
        ((2, 3, 5, 12), ("column", "row"), "bfloat16"),  # channels that do not fill 16 bytes
    ],
)
def test_lowers_for_cuda_without_a_gpu(scans, random_inputs, shape, routes, dtype):
    inputs = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), jax.eval_shape(lambda: random_inputs(shape, dtype))
    )
    for save in (False, True):
        forward = jax.jit(functools.partial(mosaic._forward_of_images, routes, save))
        assert "mosaic_gpu" in forward.trace(*inputs).lower(lowering_platforms=("cuda",)).as_text()
    assert len(scans) == 2


@pytest.mark.parametrize(
    ("shape", "routes", "dtype"),
    [
        ((2, 3, 4, 8), HALF, "float32"),
        ((9, 4, 4, 136), HALF, "bfloat16"),  # a second block of channels; enough positions for a block's threads
        ((1, 5, 3, 12), ALL, "float32"),  # channels that do not fill 16 bytes
        ((2, 1, 6, 8), ("row_reversed",), "bfloat16"),
    ],
    ids=["few", "many", "all routes", "one line"],
)
def test_interpreted_kernel(interpreted, scans, random_inputs, shape, routes, dtype):
    """y against xla."""
    inputs = random_inputs(shape, dtype)
    (y,) = jax.jit(functools.partial(mosaic._forward_of_images, routes, False))(*inputs)
    expected, _ = xla.forward(inputs, routes)
    assert difference(y, expected) < (2e-6 if dtype == "float32" else 1e-3)
    assert scans


def test_states_that_are_kept(interpreted, scans, random_inputs, states_before_chunks):
    """Where tiles hold lines outside the map, at which the backward over tiles passes the state on."""
    inputs = random_inputs((1, 5, 4, 8), "float32")
    _, states = jax.jit(functools.partial(mosaic._forward_of_images, HALF, True))(*inputs)
    assert states.shape[1] > 5 + 2 * 4
    expected = states_before_chunks(inputs, HALF, states.shape[1])
    np.testing.assert_allclose(states[..., :8], expected, rtol=1e-4, atol=1e-5)
    assert scans


def test_states_serve_the_backward_over_tiles(interpreted, scans, monkeypatch, random_inputs):
    monkeypatch.setattr(mosaic_team, "team_for", lambda *_: None)
    inputs, routes = random_inputs((1, 3, 12, 8), "float32"), ("row_reversed", "row")
    y, states = jax.jit(functools.partial(mosaic._forward_of_images, routes, True))(*inputs)
    _, residuals = xla.forward(inputs, routes)
    du, *_ = jax.jit(functools.partial(mosaic._backward_of_images, routes))(*inputs, states, y)
    assert difference(du, xla.backward(residuals, y, routes).u) < 2e-6
    assert scans


def difference(x, reference) -> float:
    x, reference = np.asarray(x, np.float64), np.asarray(reference, np.float64)
    return float(np.linalg.norm(x - reference) / np.linalg.norm(reference))


def test_little_is_lost_where_step_sizes_take_the_place_of_delta():
    steps = jnp.asarray([*np.geomspace(4e-9, 1000.0, 1000), 65504.0], jnp.float32)
    smaller = jnp.asarray([0.0, *np.geomspace(1e-30, 4e-9, 100)], jnp.float32)
    for dtype, tolerance, least in (("bfloat16", 1.01 * 2.0**-10, 4e-12), ("float32", 0.0, 0.0)):
        kept = in_place_of_delta(steps, jnp.dtype(dtype))
        assert kept.dtype == dtype
        np.testing.assert_allclose(as_step(kept), steps, rtol=tolerance)
        np.testing.assert_allclose(as_step(in_place_of_delta(smaller, jnp.dtype(dtype))), smaller, rtol=0, atol=least)
        assert np.isfinite(as_step(in_place_of_delta(jnp.float32(1e30), jnp.dtype(dtype))))
