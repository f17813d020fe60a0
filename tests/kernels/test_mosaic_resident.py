"""The forward that keeps a small map in shared memory: that it lowers for CUDA, and its results in JAX's interpreter.

On a GPU, `test_selective_scan.py` runs it.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msvmamba_jax.kernels.selective_scan import mosaic, mosaic_resident, mosaic_small, xla
from msvmamba_jax.kernels.selective_scan.config import H100, Problem
from msvmamba_jax.kernels.selective_scan.routes import ScanInputs

HALF = ("row_reversed", "column", "column_reversed")
SHARED_MEMORY = 227 * 1024


def problem(*shape, states=1, routes=3, dtype="bfloat16") -> Problem:
    return Problem("forward", *shape, states=states, routes=routes, dtype=dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("shape", [(128, 28, 28, 192), (128, 14, 14, 384), (2, 7, 7, 768), (1, 4, 20, 8)])
def test_takes_small_maps(shape, dtype):
    assert mosaic_resident.supports(problem(*shape, dtype=dtype), SHARED_MEMORY)
    assert not mosaic_resident.supports(problem(*shape, dtype=dtype, states=2), SHARED_MEMORY)
    assert mosaic_resident.supports(problem(*shape, dtype=dtype, routes=1), SHARED_MEMORY)


@pytest.mark.parametrize("shape", [(128, 56, 56, 192), (2, 3, 20, 192), (2, 20, 3, 192), (1, 8, 64, 192)])
def test_leaves_others_to_the_tiled_kernel(shape):
    assert not mosaic_resident.supports(problem(*shape), SHARED_MEMORY)


@pytest.mark.parametrize(
    ("shape", "routes", "faster"),
    [
        ((128, 28, 28, 192), 3, True),
        ((16, 28, 28, 192), 3, True),
        ((1, 28, 28, 192), 3, False),
        ((2, 32, 32, 384), 3, False),
        ((8, 32, 32, 384), 3, True),
        ((128, 14, 14, 384), 3, True),
        ((16, 14, 14, 384), 3, True),
        ((1, 14, 14, 384), 3, True),
        ((128, 7, 7, 768), 3, False),
        ((1, 7, 7, 768), 3, True),
        ((1, 14, 14, 768), 1, True),
        ((16, 14, 14, 768), 1, True),
        ((32, 14, 14, 768), 1, False),
        ((1, 28, 28, 384), 1, False),
        ((8, 28, 28, 384), 1, True),
        ((128, 28, 28, 384), 1, False),
    ],
)
def test_takes_over_where_it_measured_faster(shape, routes, faster):
    assert mosaic_resident.faster(problem(*shape, routes=routes), H100) == faster


def test_two_blocks_share_a_multiprocessor():
    reserved = 1024  # of each block, by the system
    assert mosaic_resident.supports(problem(128, 28, 28, 192), 228 * 1024 // 2 - reserved)


@pytest.mark.parametrize(
    ("shape", "dtype", "blocks"),
    [
        ((128, 28, 28, 192), "bfloat16", 2),
        ((128, 14, 14, 384), "bfloat16", 5),
        ((128, 14, 14, 384), "float32", 2),
    ],
)
def test_blocks_that_start_at_once_queue(shape, dtype, blocks):
    queue = queue_for(shape, dtype)
    assert queue.multiprocessors == H100.multiprocessors
    assert queue.blocks == blocks
    passed = 5 * shape[1] * shape[2] * 32 * jnp.dtype(dtype).itemsize
    assert queue.pause == pytest.approx(3000 * passed / 250_880, rel=0.02)  # 3,000 for 28 x 28, bfloat16


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((128, 28, 28, 192), "float32"), ((16, 28, 28, 192), "bfloat16"), ((1, 14, 14, 384), "bfloat16")],
    ids=["a block for each multiprocessor", "one wave", "few"],
)
def test_others_do_not_queue(shape, dtype):
    assert queue_for(shape, dtype) is None


def queue_for(shape, dtype) -> mosaic_resident.Queue | None:
    geometry = mosaic._geometry(problem(*shape, dtype=dtype), HALF, mosaic.Config(2, 1), H100)
    buffers = mosaic_resident._buffers(*shape[1:3], jnp.dtype(dtype), 0)
    return mosaic_resident.queue_for(geometry, mosaic_resident._bytes(buffers, shape[1]), H100)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_shared_memory_is_what_mosaic_lays_out(laid_out, random_inputs, dtype):
    inputs = jax.eval_shape(lambda: random_inputs((2, 14, 14, 96), dtype))
    forward = jax.jit(functools.partial(mosaic._forward_of_images, HALF, True))
    forward.trace(*inputs).lower(lowering_platforms=("cuda",))
    needed = mosaic_resident._shared_bytes(problem(2, 14, 14, 96, dtype=dtype))
    assert needed - 64 < laid_out[-1] <= needed


@pytest.mark.parametrize("save", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    "shape",
    [
        (128, 28, 28, 192),
        (16, 14, 14, 384),
        (16, 7, 7, 768),
        (2, 9, 11, 20),
        (2, 9, 20, 96),  # rows of two chunks, columns of one
        (2, 20, 9, 96),
        (2, 8, 4, 8),  # a column has as many bytes as the channels of a block
    ],
)
def test_lowers_for_cuda_without_a_gpu(monkeypatch, shape, dtype, save):
    calls = []
    scan = mosaic_resident.scan
    monkeypatch.setattr(mosaic_resident, "scan", lambda *a, **options: calls.append(1) or scan(*a, **options))
    monkeypatch.setattr(mosaic_resident, "faster", lambda problem, device: True)
    monkeypatch.setattr(mosaic_small, "faster", lambda problem, device: False)
    spec, (b, h, w, d) = jax.ShapeDtypeStruct, shape
    maps, small, vector = spec(shape, dtype), spec((b, h, w, 1), dtype), spec((d,), "float32")
    inputs = ScanInputs(maps, maps, spec((d, 1), "float32"), small, small, vector, vector)
    forward = jax.jit(functools.partial(mosaic._forward_of_images, HALF, save))
    text = forward.trace(*inputs).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text
    assert calls


@pytest.mark.parametrize(
    ("shape", "routes", "dtype"),
    [
        ((2, 8, 12, 32), HALF, "float32"),
        ((1, 8, 8, 40), HALF, "bfloat16"),  # channels beyond those of a block
        ((2, 7, 7, 8), HALF, "float32"),  # lines outside the map
        ((1, 9, 20, 8), ("column", "row"), "bfloat16"),  # the first route goes down columns; two chunks of a line
        ((1, 14, 5, 16), ("row", "column_reversed"), "float32"),
        ((1, 7, 8, 32), HALF, "float32"),  # some rows are contiguous in memory
        ((2, 9, 6, 8), ("row",), "float32"),
    ],
    ids=["rectangular", "channels", "odd", "column first", "row first", "contiguous", "one route"],
)
def test_interpreted_kernel(interpreted, monkeypatch, random_inputs, states_before_chunks, shape, routes, dtype):
    """y against xla, and the states that were kept against those of a walk from position to position."""
    monkeypatch.setattr(mosaic_resident, "queue_for", lambda *_: mosaic_resident.Queue(1, 2, 3))
    monkeypatch.setattr(mosaic_resident, "faster", lambda problem, device: True)
    monkeypatch.setattr(mosaic_small, "faster", lambda problem, device: False)
    inputs = random_inputs(shape, dtype)
    y, states = jax.jit(functools.partial(mosaic._forward_of_images, routes, True))(*inputs)
    (y_alone,) = jax.jit(functools.partial(mosaic._forward_of_images, routes, False))(*inputs)
    expected, _ = xla.forward(inputs, routes)
    y, y_alone, expected = (np.asarray(x, np.float32) for x in (y, y_alone, expected))
    np.testing.assert_array_equal(y_alone, y)
    assert np.linalg.norm(y - expected) < (2e-6 if dtype == "float32" else 1e-3) * np.linalg.norm(expected)
    atol = 2e-4 if dtype == "float32" else 2e-3  # step sizes are kept as float16
    np.testing.assert_allclose(
        states[..., : shape[-1]], states_before_chunks(inputs, routes, states.shape[1]), atol=atol
    )
    np.testing.assert_array_equal(states[..., -(-shape[-1] // 32) * 32 :], 0.0)
