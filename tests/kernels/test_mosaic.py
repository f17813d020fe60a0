"""What of the Mosaic GPU kernels can be tested without a GPU: how they are launched, that they lower, and interpreted.

`test_walk.py` tests their tiles and their arithmetic. On a GPU, `test_selective_scan.py` runs them.
"""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msvmamba_jax.kernels.selective_scan import (
    api,
    mosaic,
    mosaic_kernels,
    mosaic_resident,
    mosaic_small,
    mosaic_team,
    selection,
    xla,
)
from msvmamba_jax.kernels.selective_scan.config import H100, Device, Problem
from msvmamba_jax.kernels.selective_scan.partitioning import vary_alike
from msvmamba_jax.kernels.selective_scan.routes import ScanInputs
from msvmamba_jax.kernels.selective_scan.tiles import tiles

HALF = ("row_reversed", "column", "column_reversed")


def problem(direction, *shape, states=1, routes=1, dtype="bfloat16", delta_dtype=None) -> Problem:
    return Problem(direction, *shape, states=states, routes=routes, dtype=dtype, delta_dtype=delta_dtype)


def scan_inputs(shape, n, dtype, delta_dtype=None) -> ScanInputs:
    """Shapes and dtypes of the inputs on maps (b, h, w, d)."""
    b, h, w, d = shape
    spec = jax.ShapeDtypeStruct
    small, vector = spec((b, h, w, n), dtype), spec((d,), "float32")
    return ScanInputs(
        spec(shape, dtype), spec(shape, delta_dtype or dtype), spec((d, n), "float32"), small, small, vector, vector
    )


class TestHeuristic:
    @pytest.mark.parametrize("direction", ["forward", "backward"])
    @pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
    @pytest.mark.parametrize("states", [1, 16])
    @pytest.mark.parametrize("routes", [("column",), HALF])
    @pytest.mark.parametrize("shape", [(128, 56, 56, 192), (128, 7, 7, 768), (2, 5, 3, 20), (1, 200, 336, 96)])
    def test_shared_memory_suffices(self, direction, dtype, states, routes, shape):
        asked = problem(direction, *shape, states=states, routes=len(routes), dtype=dtype)
        config = mosaic.heuristic(asked, H100)
        geometry = mosaic._geometry(asked, routes, config, H100)
        used = mosaic_kernels.shared_bytes(geometry, backward=direction == "backward")
        assert used <= 227 * 1024
        if states == 1 and dtype == "bfloat16":
            assert used <= 227 * 1024 // 2  # two blocks to a multiprocessor

    @pytest.mark.parametrize("d", [3, 8, 16, 32, 64, 96, 120, 128, 130, 192, 256, 384])
    def test_no_store_reaches_over_the_edge(self, d):
        """A contiguous box would be written as one piece, over the edge of the map or of its channels."""
        for h, w in [
            (1, 1),
            (13, 25),
            (7, 7),
            (25, 9),
            (20, 2),
            (20, 4),
            (17, 16),
            (25, 2),
            (2, 25),
            (14, 14),
            (1, 300),
        ]:
            geometry = mosaic._geometry(problem("forward", 2, h, w, d, routes=3), HALF, mosaic.Config(2, 1), H100)
            for tiling in geometry.routes:
                sizes, strides = (*tiling.box, geometry.block), (w * geometry.channels, geometry.channels, 1)
                expected, contiguous = 1, True
                for size, stride in zip(sizes[::-1], strides[::-1], strict=True):
                    contiguous &= size == 1 or stride == expected
                    expected *= size
                inside = tiling.exact and geometry.channels % geometry.block == 0
                assert inside or not contiguous, (h, w, tiling)

    @pytest.mark.parametrize(
        ("shape", "routes", "dtype", "delta_dtype"),
        [
            ((128, 14, 14, 96), HALF, "bfloat16", None),
            ((128, 14, 14, 96), ("row",), "float32", None),
            ((1, 56, 56, 96), ("column",), "bfloat16", "float32"),
            ((2, 13, 25, 128), HALF, "float32", None),
            ((2, 13, 25, 128), ("column",), "bfloat16", None),
            ((2, 9, 11, 20), HALF, "bfloat16", "float32"),
        ],
    )
    def test_what_is_not_refused_has_room(self, monkeypatch, dtype, delta_dtype, routes, shape):
        """On a data centre's GPU, and on one of compute capability 12.0."""
        fitted = {}
        for device in (H100, Device("NVIDIA GeForce RTX 5090", 170, 99 * 1024)):
            monkeypatch.setattr(mosaic, "local_device", lambda device=device: device)
            fitted[device] = []
            for n in (1, 2, 8, 16, 32, 48, 64, 128):
                inputs = scan_inputs(shape, n, dtype, delta_dtype)
                if mosaic.refusal(inputs, routes) is not None:
                    continue
                fitted[device].append(n)
                for direction in ("forward", "backward"):
                    asked = Problem.of(direction, inputs, routes)
                    for config in (mosaic.heuristic(asked, device), *mosaic.candidates(asked, device)):
                        geometry = mosaic._geometry(asked, routes, config, device)
                        used = mosaic_kernels.shared_bytes(geometry, backward=direction == "backward")
                        assert used <= device.shared_memory, (n, config)
        large, small = fitted.values()
        assert large[-1] >= 48
        assert small[-1] >= 2
        assert small[-1] < large[-1] < 128

    def test_large_batches_stay_whole(self):
        assert mosaic.heuristic(problem("forward", 128, 56, 56, 96), H100).parts == 1
        assert mosaic.heuristic(problem("forward", 128, 7, 7, 1536, routes=3), H100).parts == 1

    def test_small_batches_are_cut(self):
        for routes in (1, 3):
            one = mosaic.heuristic(problem("forward", 1, 200, 336, 96, routes=routes), H100)
            assert routes * one.parts >= H100.multiprocessors
        assert mosaic.heuristic(problem("forward", 1, 7, 7, 768), H100).parts == 1  # too short to be cut


CASES = {
    "full branch": ((128, 56, 56, 192), 1, ("row",), "bfloat16"),
    "last stage": ((128, 7, 7, 768), 1, HALF, "bfloat16"),
    "16 states": ((2, 56, 56, 192), 16, ("column",), "bfloat16"),
    "odd": ((2, 9, 11, 20), 2, ("row_reversed", "column"), "float32"),
}
MORE_CASES = {
    "half branch": ((128, 28, 28, 192), 1, HALF, "float32"),
    "half branch, large": ((128, 64, 64, 192), 1, HALF, "bfloat16"),
    "last stage, full branch": ((128, 7, 7, 1536), 1, ("row",), "bfloat16"),
    "detection, cut": ((1, 100, 168, 192), 1, HALF, "bfloat16"),
}


@pytest.fixture
def tiled(monkeypatch):
    """No problem is left to the kernels that keep a map in shared memory."""
    for kernels in (mosaic_resident, mosaic_small):
        monkeypatch.setattr(kernels, "supports", lambda *_: False)
    monkeypatch.setattr(mosaic_team, "team_for", lambda *_: None)


def lowered(shape, n, routes, dtype, delta_dtype=None) -> tuple[str, str]:
    """StableHLO for CUDA of the inference, and of the forward and backward."""
    inputs = scan_inputs(shape, n, dtype, delta_dtype)
    dy = jax.ShapeDtypeStruct((shape[0], len(routes), *shape[1:]), dtype)

    def train(inputs, dy):
        y, residuals = mosaic.forward(inputs, routes)
        return y, mosaic.backward(residuals, dy, routes)

    infer = jax.jit(lambda inputs: mosaic.run(inputs, routes))
    return tuple(
        jax.jit(f).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
        for f, arguments in ((infer, (inputs,)), (train, (inputs, dy)))
    )


@pytest.mark.parametrize("parts", [1, 2])
def test_a_launch_may_be_of_many_images(tiled, monkeypatch, parts):
    """Only the first axis of a grid may have more than 65,535 blocks."""
    core = pytest.importorskip("jax.experimental.mosaic.gpu.core")
    if not hasattr(core, "_launch"):
        pytest.skip("this JAX launches elsewhere")
    grids, launch = [], core._launch

    def launched(token, grid, *arguments, **options):
        grids.append(tuple(grid))
        return launch(token, grid, *arguments, **options)

    monkeypatch.setattr(core, "_launch", launched)
    monkeypatch.setattr(mosaic, "heuristic", lambda problem, device: mosaic.Config(2, parts))
    jax.clear_caches()
    lowered((70_000, 14, 14, 24), 1, ("row",), "bfloat16")
    assert grids
    assert all(x >= 70_000 and max(y, z) <= 65_535 for x, y, z in grids)


@pytest.mark.parametrize(
    ("shape", "n", "routes", "config", "dtype", "delta_dtype"),
    [
        ((2, 14, 14, 96), 1, ("row",), (4, 1), "bfloat16", "bfloat16"),
        ((2, 5, 7, 96), 1, ("row", "column"), (2, 1), "bfloat16", "float32"),
        ((2, 5, 6, 96), 3, ("column_reversed",), (3, 2), "float32", "bfloat16"),
        ((2, 9, 11, 20), 5, ("column",), (1, 1), "bfloat16", "bfloat16"),
    ],
)
def test_shared_memory_is_what_mosaic_lays_out(
    tiled, laid_out, monkeypatch, shape, n, routes, config, dtype, delta_dtype
):
    config = mosaic.Config(*config)
    monkeypatch.setattr(mosaic, "heuristic", lambda problem, device: config)
    jax.clear_caches()
    lowered(shape, n, routes, dtype, delta_dtype)
    delta_dtype = None if delta_dtype == dtype else delta_dtype
    asked = problem("forward", *shape, states=n, routes=len(routes), dtype=dtype, delta_dtype=delta_dtype)
    geometry = mosaic._geometry(asked, routes, config, H100)
    forward, backward = (mosaic_kernels.shared_bytes(geometry, backward=backward) for backward in (False, True))
    if config.parts == 1:
        assert laid_out == [forward, forward, backward]
    else:  # the kernels that find the ends of segments run before each
        assert [laid_out[i] for i in (1, 3, 6)] == [forward, forward, backward]
        assert max(laid_out) == backward
        assert max(laid_out[0], laid_out[2]) <= forward


@pytest.mark.parametrize("case", [*CASES, *(pytest.param(case, marks=pytest.mark.nightly) for case in MORE_CASES)])
def test_lowers_for_cuda_without_a_gpu(case):
    """And around the kernels no map is reversed, transposed, joined or padded; only sums over routes touch maps."""
    shape, n, routes, dtype = (CASES | MORE_CASES)[case]
    for text in lowered(shape, n, routes, dtype):
        assert "mosaic_gpu" in text
        if shape[-1] % 8:
            continue  # such channels are padded for the copy engine
        for line in text.splitlines():
            if re.search(r"stablehlo\.(reverse|transpose|concatenate|pad|gather|slice)\b", line):
                result = [int(x) for x in re.findall(r"(\d+)x", line.rsplit("tensor<", 1)[1])]
                assert np.prod(result) < np.prod(shape), line


@pytest.mark.parametrize(
    ("shape", "routes"),
    [
        ((7, 7, 768), HALF),
        ((28, 28, 384), ("row",)),
        ((9, 25, 128), ("row", "column_reversed")),
        ((56, 56, 96), ("row",)),
    ],
)
def test_what_is_kept_does_not_depend_on_the_batch(shape, routes):
    """On several devices XLA takes what each keeps for a part of what one would keep."""

    def kept(batch: int) -> list[tuple[tuple[int, ...], str]]:
        spec = jax.ShapeDtypeStruct
        maps, small = spec((batch, *shape), "bfloat16"), spec((batch, *shape[:2], 1), "bfloat16")
        vector = spec(shape[-1:], "float32")
        inputs = ScanInputs(maps, maps, spec((shape[-1], 1), "float32"), small, small, vector, vector)
        y, residuals = jax.eval_shape(functools.partial(mosaic.forward, routes=routes), inputs)
        _, states, words = residuals
        gradients = jax.eval_shape(functools.partial(mosaic._backward_of_images, routes), *inputs, states, y, *words)
        return [(x.shape[1:], x.dtype.name) for x in (y, states, *words, *gradients)]

    assert kept(1) == kept(256)


@pytest.mark.parametrize(
    ("shape", "n", "routes", "config"),
    [
        ((1, 18, 9, 8), 1, HALF, (2, 1)),
        ((2, 10, 9, 8), 2, ("column",), (2, 1)),
        ((1, 9, 18, 8), 1, ("row_reversed", "column"), (2, 2)),
        ((1, 9, 10, 136), 2, ("row",), (1, 1)),
    ],
    ids=["chained", "two states", "cut", "one stage, two blocks of channels"],
)
def test_interpreted_kernels(interpreted, tiled, monkeypatch, shape, n, routes, config):
    monkeypatch.setattr(mosaic, "heuristic", lambda problem, device: mosaic.Config(*config))
    rng = np.random.default_rng(0)
    b, h, w, d = shape
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    inputs = ScanInputs(
        u=normal(b, h, w, d),
        delta=normal(b, h, w, d),
        A=-jnp.exp(0.5 * normal(d, n)),
        B=normal(b, h, w, n),
        C=normal(b, h, w, n),
        D=normal(d),
        delta_bias=normal(d) - 3.0,
    )
    assert all(tiles(route, h, w, 16).depth == 1 for route in routes)
    dy = normal(b, len(routes), h, w, d)
    y, states = jax.jit(functools.partial(mosaic._forward_of_images, routes, True))(*inputs)
    du, ddelta, dB, dC, dA, dD, dbias = jax.jit(functools.partial(mosaic._backward_of_images, routes))(
        *inputs, states, dy
    )
    found = (du, ddelta, dA.sum(0).T, dB, dC, dD.sum(0), dbias.sum(0))

    expected_y, residuals = xla.forward(inputs, routes)
    np.testing.assert_allclose(y, expected_y, rtol=1e-4, atol=1e-4)
    expected = xla.backward(residuals, dy, routes)
    for name, x, reference in zip(ScanInputs._fields, found, expected, strict=True):
        error = np.linalg.norm(x - reference) / np.linalg.norm(reference)
        assert error < 1e-5, f"{name}: {error:.1e}"


@pytest.mark.parametrize("routes", [("row",), HALF], ids=["tiled", "resident"])
def test_lowers_where_64_bit_types_are_on(routes):
    with jax.enable_x64(True):
        for text in lowered((2, 5, 6, 8), 1, routes, "bfloat16"):
            assert "mosaic_gpu" in text


def test_there_is_no_second_derivative(monkeypatch):
    """Rather than a wrong one."""
    monkeypatch.setattr(mosaic, "unavailable", lambda: None)
    for module in (api, selection):
        monkeypatch.setattr(module, "load", lambda name: mosaic)
    u, n = jax.ShapeDtypeStruct((1, 4, 5, 8), "float32"), jnp.ones((1, 4, 5, 1))

    def loss(u):
        return jnp.sum(api.selective_scan_2d(u, u, -jnp.ones((8, 1)), n, n, implementation="mosaic"))

    slope = jax.grad(loss)
    jax.make_jaxpr(slope)(u)
    with pytest.raises(NotImplementedError):
        jax.make_jaxpr(jax.grad(lambda u: jnp.sum(slope(u))))(u)


@pytest.mark.parametrize(("n", "parts"), [(1, 1), (2, 2)], ids=["resident", "tiled and cut"])
def test_gradient_lowers_inside_shard_map(monkeypatch, n, parts):
    """Where a kernel's results must be known to differ between shards."""
    if len(jax.devices()) < 4:
        pytest.skip("needs four devices")
    monkeypatch.setattr(mosaic, "heuristic", lambda problem, device: mosaic.Config(2, parts))
    jax.clear_caches()
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.ShapeDtypeStruct
    maps, small, vector = spec((8, 5, 6, 8), "float32"), spec((8, 5, 6, n), "float32"), spec((8,), "float32")
    inputs = ScanInputs(maps, maps, spec((8, n), "float32"), small, small, vector, vector)
    routes = ("row_reversed", "column") if n == 1 else ("column",)
    split, whole = jax.P("data"), jax.P()
    specs = ScanInputs(split, split, whole, split, split, whole, whole)

    @jax.custom_vjp
    def scan(inputs):
        return mosaic.run(inputs, routes)

    scan.defvjp(lambda inputs: mosaic.forward(inputs, routes), lambda kept, dy: (mosaic.backward(kept, dy, routes),))

    def loss(inputs):
        inputs = ScanInputs(*vary_alike(inputs))
        return jax.lax.psum(jnp.sum(scan(inputs)), "data")

    sharded = jax.shard_map(loss, mesh=mesh, in_specs=(specs,), out_specs=whole)
    lowered = jax.jit(jax.grad(sharded)).trace(inputs).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()


class TestRefusal:
    def test_float64(self):
        inputs = scan_inputs((1, 2, 2, 8), 1, "float32")
        assert mosaic.refusal(inputs, ("row",)) is None
        in_float64 = inputs._replace(A=jax.ShapeDtypeStruct((8, 1), "float64"))
        assert mosaic.refusal(in_float64, ("row",)) == "it computes in float32, and A is float64"

    def test_more_states_than_shared_memory_holds(self):
        inputs = scan_inputs((2, 14, 14, 96), 128, "bfloat16")
        reason = mosaic.refusal(inputs, ("row",))
        assert re.fullmatch(
            r"with 128 states on 14 x 14 maps in bfloat16 a block would need \d+ bytes of shared memory, "
            r"and the GPU has 232448",
            reason,
        )

    @pytest.mark.parametrize(
        ("shape", "n", "routes", "dtype"),
        [
            ((2, 14, 14, 96), 64, ("row",), "bfloat16"),
            # Whose channels are padded, since larger blocks have no room.
            ((2, 13, 25, 128), 48, ("row", "column"), "float32"),
        ],
    )
    def test_many_states_lower(self, shape, n, routes, dtype):
        assert mosaic.refusal(scan_inputs(shape, n, dtype), routes) is None
        for text in lowered(shape, n, routes, dtype):
            assert "mosaic_gpu" in text

    @pytest.mark.parametrize("n", [1, 16])
    def test_the_forward_keeps_what_the_backward_reads(self, n):
        """On maps where blocks may be of either size, whatever the configuration."""
        kept = set()
        for direction in ("forward", "backward"):
            for config in (mosaic.Config(2, 1), mosaic.Config(3, 2)):
                asked = problem(direction, 2, 13, 25, 128, states=n, routes=3, dtype="float32")
                geometry = mosaic._geometry(asked, HALF, config, H100)
                kept.add((geometry.channels, geometry.lanes, *geometry.first_chunk))
        assert len(kept) == 1


def test_says_what_it_needs():
    if jax.default_backend() == "gpu":
        pytest.skip("there is a GPU")
    assert "compute capability 9.0" in mosaic.unavailable()
