"""The backward that keeps a small map in shared memory: who takes it, that it lowers, and its results interpreted.

On a GPU, `test_selective_scan.py` runs it.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msvmamba_jax.kernels.selective_scan import (
    mosaic,
    mosaic_lines,
    mosaic_resident,
    mosaic_resident_backward,
    mosaic_small,
    mosaic_team,
    xla,
)
from msvmamba_jax.kernels.selective_scan.config import H100, Problem
from msvmamba_jax.kernels.selective_scan.mosaic_team import Team
from msvmamba_jax.kernels.selective_scan.routes import ScanInputs

HALF = ("row_reversed", "column", "column_reversed")
ALL = ("column", "row_reversed", "row", "column_reversed")
NAMES = ScanInputs._fields
MULTIPROCESSOR = 228 * 1024  # bytes of shared memory
RESERVED = 2 * 1024  # of each block, by the system and by Pallas


def geometry(shape, dtype="bfloat16", routes=HALF, states=1, delta_dtype=None):
    problem = Problem("backward", *shape, states=states, routes=len(routes), dtype=dtype, delta_dtype=delta_dtype)
    return mosaic._geometry(problem, routes, mosaic.Config(2, 1), H100)


def team(shape, dtype="bfloat16", routes=HALF, *, words=None, **options) -> Team | None:
    words = words or (1 if dtype == "bfloat16" else 2)
    return mosaic_team.team_for(geometry(shape, dtype, routes, **options), words, mosaic.local_device())


def shared_bytes(shape, dtype, routes=HALF) -> int:
    words = 1 if dtype == "bfloat16" else 2
    return mosaic_team.shared_bytes(geometry(shape, dtype, routes), team(shape, dtype, routes), words)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    "shape",
    [
        (128, 28, 28, 192),
        (128, 14, 14, 384),
        (128, 7, 7, 768),
        (128, 4, 4, 1536),
        (128, 17, 21, 24),  # rows that two warpgroups cannot share
        (5, 28, 28, 192),
        (1, 14, 14, 384),
        (1, 1, 2, 3),
    ],
)
def test_takes_small_maps_of_several_routes(shape, dtype):
    assert shared_bytes(shape, dtype) <= H100.shared_memory


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((128, 56, 56, 96), {}),
        ((128, 14, 14, 768), {"routes": ("row",)}),
        ((8, 28, 28, 384), {"routes": ("row",)}),
        ((2, 7, 7, 192), {"states": 2}),
        ((2, 7, 7, 192), {"delta_dtype": "float32"}),
        ((2, 4, 33, 192), {}),
        ((2, 13, 21, 192), {}),  # rows are cut into chunks, columns are not
        ((128, 7, 8, 32), {}),  # the box of a map is contiguous in memory, and holds a row more
        ((128, 28, 28, 192), {"words": 2}),  # float32 B and C, for which there is no room beside bfloat16 maps
        ((2, 7, 7, 192), {"routes": ("row", "column") * 3}),
    ],
    ids=[
        "large",
        "one route",
        "one long route",
        "states",
        "delta",
        "long",
        "chunks",
        "contiguous",
        "words",
        "many routes",
    ],
)
def test_leaves_others(shape, options):
    assert team(shape, **options) is None


@pytest.mark.parametrize(
    ("shape", "dtype", "blocks"),
    [
        ((128, 28, 28, 192), "bfloat16", 1),
        ((128, 28, 28, 192), "float32", 1),
        ((128, 14, 14, 384), "bfloat16", 3),
        ((128, 14, 14, 384), "float32", 3),
        ((128, 7, 7, 768), "bfloat16", 5),
        ((128, 7, 7, 768), "float32", 3),
        ((128, 4, 4, 1536), "bfloat16", 6),
    ],
)
def test_blocks_of_a_multiprocessor(shape, dtype, blocks):
    needed = shared_bytes(shape, dtype)
    assert MULTIPROCESSOR // (needed + RESERVED) >= blocks


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_shared_memory_is_what_mosaic_lays_out(laid_out, random_inputs, dtype):
    shape, routes = (2, 9, 10, 96), ("column", "row")
    lowered(random_inputs, shape, routes, dtype)
    needed = shared_bytes(shape, dtype, routes)
    assert needed - 32 < laid_out[-1] <= needed


def test_boxes():
    """Whole copies, and lines of a warp that begin in different places of shared memory where that can be."""
    for height, width, dtype in itertools.product(range(1, 33), range(1, 33, 3), ("bfloat16", "float32")):
        found = team((1, height, width, 192), dtype)
        if found is not None:
            rows, columns = found.box(height, width, dtype)
            assert rows * columns * found.channels * jnp.dtype(dtype).itemsize % 128 == 0
            assert columns >= width + -width % found.lines
            assert rows >= height
            assert rows % (found.lines * found.warpgroups) == 0 or not found.padded
            starts = {
                line * columns * found.channels * jnp.dtype(dtype).itemsize % 128 for line in range(found.lines // 4)
            }
            assert len(starts) == found.lines // 4


@pytest.mark.parametrize("d", [8, 16, 32, 64])
def test_no_store_reaches_over_the_edge(d):
    for height, width, dtype in itertools.product(range(1, 18), range(1, 18), ("bfloat16", "float32")):
        found = team((2, height, width, d), dtype)
        if found is not None and found.channels == d:
            assert found.box(height, width, dtype)[0] == height or found.box(height, width, dtype)[1] > width


def lowered(random_inputs, shape, routes, dtype) -> str:
    """StableHLO for CUDA of the backward."""
    inputs = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), jax.eval_shape(lambda: random_inputs(shape, dtype))
    )
    y, states = jax.eval_shape(functools.partial(mosaic._forward_of_images, routes, True), *inputs)
    backward = jax.jit(functools.partial(mosaic._backward_of_images, routes))
    return backward.trace(*inputs, states, y).lower(lowering_platforms=("cuda",)).as_text()


LOWERED = [
    ((128, 28, 28, 192), HALF, "bfloat16"),
    ((128, 7, 7, 768), HALF, "float32"),
    ((2, 5, 12, 12), ALL, "bfloat16"),  # channels that do not fill 16 bytes
    ((128, 9, 5, 40), ("row", "row_reversed"), "float32"),
    ((128, 20, 17, 24), HALF, "bfloat16"),  # groups of columns that two warpgroups cannot share evenly
    ((2, 20, 1, 8), HALF, "float32"),  # whose rows in a row are a column
    ((1, 14, 14, 768), ("row",), "bfloat16"),
]
MORE_LOWERED = [
    ((128, 28, 28, 192), HALF, "float32"),
    ((128, 14, 14, 384), HALF, "bfloat16"),
    ((128, 14, 14, 384), HALF, "float32"),
    ((128, 7, 7, 768), HALF, "bfloat16"),
    ((128, 4, 4, 1536), HALF, "bfloat16"),
    ((128, 4, 4, 1536), HALF, "float32"),
    ((128, 5, 12, 12), ALL, "float32"),
    ((2, 9, 5, 40), ("row", "row_reversed"), "bfloat16"),
    ((2, 5, 9, 40), ("column", "column_reversed"), "bfloat16"),
    ((128, 5, 9, 40), ("column", "column_reversed"), "float32"),
    ((1, 20, 31, 24), HALF, "bfloat16"),  # groups of rows that cannot be shared evenly, of fewer channels
    ((2, 17, 18, 24), HALF, "bfloat16"),  # whose rows are no multiple of 128 bytes
    ((128, 17, 18, 24), HALF, "float32"),
    ((1, 14, 14, 768), ("row",), "float32"),
]


@pytest.mark.parametrize(
    ("shape", "routes", "dtype"),
    [*LOWERED, *(pytest.param(*case, marks=pytest.mark.nightly) for case in MORE_LOWERED)],
)
def test_lowers_for_cuda_without_a_gpu(monkeypatch, random_inputs, shape, routes, dtype):
    calls = []
    scan = mosaic_resident_backward.scan_backward
    monkeypatch.setattr(mosaic_resident_backward, "scan_backward", lambda *a: calls.append(1) or scan(*a))
    assert "mosaic_gpu" in lowered(random_inputs, shape, routes, dtype)
    assert calls


def test_float32_b_and_c_beside_bfloat16_maps_lower(random_inputs):
    routes = ("column", "row")
    inputs = random_inputs((2, 9, 10, 16), "bfloat16")
    inputs = inputs._replace(B=inputs.B.astype(jnp.float32), C=inputs.C.astype(jnp.float32))
    y, states = jax.eval_shape(functools.partial(mosaic._forward_of_images, routes, True), *inputs)
    backward = jax.jit(functools.partial(mosaic._backward_of_images, routes))
    assert "mosaic_gpu" in backward.trace(*inputs, states, y).lower(lowering_platforms=("cuda",)).as_text()


def test_all_places_are_summed_up():
    """By the warpgroups of a block, some places at once, in all boxes that maps have."""
    for height, width, dtype in itertools.product(range(1, 33), range(1, 33, 3), ("bfloat16", "float32")):
        found = team((1, height, width, 192), dtype)
        if found is not None:
            rows, columns = found.box(height, width, dtype)
            at_once, _ = found.summed_at_once(rows * columns)
            starts = [int(x) for group in range(found.warpgroups) for x in found.parts(rows * columns, group)]
            assert {start + k for start in starts for k in range(at_once)} == set(range(rows * columns))


INTERPRETED = {
    "a row outside the map, two channels of a thread": ((2, 3, 4, 72), HALF, "bfloat16"),
    "float32": ((1, 6, 7, 40), HALF, "float32"),
    "rows": ((1, 9, 3, 12), ("row", "row_reversed"), "float32"),
    "one route along columns": ((1, 4, 9, 16), ("column",), "float32"),
}
MORE_INTERPRETED = {
    "all routes": ((1, 11, 9, 20), ALL, "bfloat16"),
    "columns": ((1, 5, 9, 16), ("column", "column_reversed"), "float32"),
    "one route along rows": ((1, 10, 6, 16), ("row_reversed",), "bfloat16"),
    "two warpgroups of few channels, chunks of lines": ((1, 20, 17, 24), HALF, "bfloat16"),
    "two warpgroups, rows that come twice": ((1, 20, 17, 48), HALF, "bfloat16"),
    "no room for rows outside the map": ((1, 17, 18, 8), HALF, "float32"),
}


@pytest.fixture
def few_multiprocessors(monkeypatch):
    """So few that small problems are split as large ones are on a GPU."""
    monkeypatch.setattr(mosaic, "local_device", lambda: dataclasses.replace(H100, multiprocessors=5))


@pytest.mark.parametrize(
    "case", [*INTERPRETED, *(pytest.param(case, marks=pytest.mark.nightly) for case in MORE_INTERPRETED)]
)
def test_interpreted_kernel(
    interpreted, sums_that_can_be_interpreted, request, random_inputs, states_before_chunks, case
):
    """All gradients against xla, from states before chunks that were worked out position by position."""
    shape, routes, dtype = (INTERPRETED | MORE_INTERPRETED)[case]
    if len(routes) > 1:  # a single one would be left to another kernel
        request.getfixturevalue("few_multiprocessors")
    assert team(shape, dtype, routes) is not None
    inputs = random_inputs(shape, dtype)
    y, residuals = xla.forward(inputs, routes)
    dy = jnp.asarray(np.random.default_rng(1).standard_normal(y.shape), dtype)
    g = geometry(shape, dtype, routes)
    states = states_before_chunks(inputs, routes, g.first_chunk[-1])
    states = jnp.pad(jnp.asarray(states, jnp.float32), ((0, 0), (0, 0), (0, 0), (0, g.lanes - shape[-1])))
    check_gradients(inputs, states, dy, routes, xla.backward(residuals, dy, routes))


def check_gradients(inputs, states, dy, routes, expected) -> None:
    backward = jax.jit(functools.partial(mosaic._backward_of_images, routes))
    du, ddelta, dB, dC, dA, dD, dbias = backward(*inputs, states, dy)
    found = ScanInputs(du, ddelta, dA.sum(0).T, dB, dC, dD.sum(0), dbias.sum(0))
    rounded = inputs.u.dtype == jnp.bfloat16
    for name, gradient, reference in zip(NAMES, found, expected, strict=True):
        assert gradient.shape == reference.shape, name
        error = np.linalg.norm(np.float64(gradient) - np.float64(reference)) / np.linalg.norm(np.float64(reference))
        # What is added up over places in float32 feels only that step sizes are kept as float16.
        bound = {"A": 1e-3, "D": 2e-6}.get(name, 4e-3) if rounded else 2e-6
        assert error < bound, f"{name}: {error:.1e}"


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((1, 5, 4, 24), id="small"),
        pytest.param((1, 12, 12, 24), id="resident", marks=pytest.mark.nightly),
        pytest.param((1, 20, 1, 8), id="narrow", marks=pytest.mark.nightly),
    ],
)
def test_interpreted_after_the_forward(interpreted, sums_that_can_be_interpreted, monkeypatch, random_inputs, shape):
    """With the states that the kernels of the forward keep, which have more channels than the map."""
    monkeypatch.setattr(mosaic_small, "faster", lambda problem, device: True)
    monkeypatch.setattr(mosaic_resident, "faster", lambda problem, device: True)
    inputs = random_inputs(shape, "float32")
    y, states = jax.jit(functools.partial(mosaic._forward_of_images, HALF, True))(*inputs)
    dy = jnp.asarray(np.random.default_rng(1).standard_normal(y.shape), jnp.float32)
    _, residuals = xla.forward(inputs, HALF)
    assert team(shape, "float32") is not None
    check_gradients(inputs, states, dy, HALF, xla.backward(residuals, dy, HALF))


def test_words_of_b_and_c(random_inputs):
    for dtype in ("bfloat16", "float32"):
        inputs = random_inputs((2, 3, 5, 8), dtype)
        words = mosaic_lines.packed(inputs)
        assert words.shape == (2, 1 if dtype == "bfloat16" else 2, 3, 32)
        B, C = mosaic_lines.b_and_c([words[:, i, :, :5] for i in range(words.shape[1])])
        np.testing.assert_array_equal(B, inputs.B[..., 0].astype(jnp.float32))
        np.testing.assert_array_equal(C, inputs.C[..., 0].astype(jnp.float32))
