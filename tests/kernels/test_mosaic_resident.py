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
RESERVED = 1024  # bytes of each block, by the system


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


def test_two_blocks_share_a_multiprocessor():
    assert mosaic_resident.supports(problem(128, 28, 28, 192), 228 * 1024 // 2 - RESERVED)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((128, 28, 28, 192), "bfloat16"), ((128, 14, 14, 384), "bfloat16"), ((128, 14, 14, 384), "float32")],
)
def test_blocks_that_start_at_once_queue(shape, dtype):
    """Blocks queue as many at a time as a multiprocessor has room for, each some time after the one before it."""
    queue, needed = queue_and_bytes(shape, dtype)
    assert queue.multiprocessors == H100.multiprocessors
    assert queue.blocks > 1
    assert queue.blocks * (needed + RESERVED) <= SHARED_MEMORY + RESERVED < (queue.blocks + 1) * (needed + RESERVED)
    assert queue.pause > 0


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((128, 28, 28, 192), "float32"), ((16, 28, 28, 192), "bfloat16"), ((1, 14, 14, 384), "bfloat16")],
    ids=["a block for each multiprocessor", "one wave", "few"],
)
def test_others_do_not_queue(shape, dtype):
    queue, _ = queue_and_bytes(shape, dtype)
    assert queue is None


def queue_and_bytes(shape, dtype) -> tuple[mosaic_resident.Queue | None, int]:
    geometry = mosaic._geometry(problem(*shape, dtype=dtype), HALF, mosaic.Config(2, 1), H100)
    needed = mosaic_resident._bytes(mosaic_resident._buffers(*shape[1:3], jnp.dtype(dtype), 0), shape[1])
    return mosaic_resident.queue_for(geometry, needed, H100), needed


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_shared_memory_is_what_mosaic_lays_out(laid_out, random_inputs, dtype):
    inputs = jax.eval_shape(lambda: random_inputs((2, 14, 13, 96), dtype))
    forward = jax.jit(functools.partial(mosaic._forward_of_images, HALF, True))
    forward.trace(*inputs).lower(lowering_platforms=("cuda",))
    needed = mosaic_resident._shared_bytes(problem(2, 14, 13, 96, dtype=dtype))
    assert needed - 64 < laid_out[-1] <= needed


@pytest.mark.parametrize(
    ("shape", "routes", "dtype", "save"),
    [
        ((128, 28, 28, 192), HALF, "bfloat16", True),
        ((16, 7, 7, 768), HALF, "float32", False),
        ((2, 9, 11, 20), ("row",), "bfloat16", True),
        ((2, 9, 20, 96), ("row", "column_reversed"), "float32", True),  # rows of two chunks, columns of one
        ((2, 8, 4, 8), HALF, "bfloat16", False),  # a column has as many bytes as the channels of a block
    ],
)
def test_lowers_for_cuda_without_a_gpu(monkeypatch, shape, routes, dtype, save):
    calls = []
    scan = mosaic_resident.scan
    monkeypatch.setattr(mosaic_resident, "scan", lambda *a, **options: calls.append(1) or scan(*a, **options))
    monkeypatch.setattr(mosaic_resident, "faster", lambda problem, device: True)
    monkeypatch.setattr(mosaic_small, "faster", lambda problem, device: False)
    spec, (b, h, w, d) = jax.ShapeDtypeStruct, shape
    maps, small, vector = spec(shape, dtype), spec((b, h, w, 1), dtype), spec((d,), "float32")
    inputs = ScanInputs(maps, maps, spec((d, 1), "float32"), small, small, vector, vector)
    forward = jax.jit(functools.partial(mosaic._forward_of_images, routes, save))
    text = forward.trace(*inputs).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text
    assert calls


@pytest.mark.parametrize(
    ("shape", "routes", "dtype"),
    [
        ((1, 8, 8, 40), HALF, "bfloat16"),  # channels beyond those of a block
        ((2, 7, 7, 8), HALF, "float32"),  # lines outside the map
        ((1, 9, 20, 8), ("column", "row"), "bfloat16"),  # the first route goes down columns; two chunks of a line
        ((1, 7, 8, 32), HALF, "float32"),  # some rows are contiguous in memory
        ((2, 9, 6, 8), ("row",), "float32"),
    ],
    ids=["channels", "odd", "column first", "contiguous", "one route"],
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
