"""What of the Mosaic GPU kernels can be tested without a GPU: their tiles, their arithmetic, and that they lower.

On a GPU, `test_selective_scan.py` runs them.
"""

from __future__ import annotations

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msvmamba_jax.kernels.selective_scan import mosaic, mosaic_block, mosaic_resident, xla
from msvmamba_jax.kernels.selective_scan.config import H100, Problem
from msvmamba_jax.kernels.selective_scan.partitioning import vary_alike
from msvmamba_jax.kernels.selective_scan.recurrence import (
    LOG2_E,
    advance,
    decays,
    retreat,
    softplus,
    softplus_slopes,
)
from msvmamba_jax.kernels.selective_scan.reference import selective_scan_2d_reference
from msvmamba_jax.kernels.selective_scan.routes import ROUTES, ScanInputs, visiting_order
from msvmamba_jax.kernels.selective_scan.tiles import LONGEST_CHUNK, Tiles, tiles

HALF = ("row_reversed", "column", "column_reversed")
SHAPES = [(1, 1), (1, 7), (7, 1), (5, 3), (14, 14), (7, 7), (28, 28), (17, 19), (40, 3), (3, 100), (1, 300), (301, 1)]

maps = pytest.mark.parametrize(("height", "width"), SHAPES)
every_route = pytest.mark.parametrize("route", ROUTES)
targets = pytest.mark.parametrize("target", [16, 32])


def chunks_of(tiling: Tiles, against: bool = False):
    """(tile, chunk, positions of the tile) in the order of travel, as the kernels walk."""
    backwards = tiling.reversed != against
    for step in range(tiling.count):
        tile = tiling.count - 1 - step if backwards else step
        for c in range(tiling.chunks):
            chunk = tiling.chunks - 1 - c if backwards else c
            positions = [chunk * tiling.chunk + k for k in range(tiling.chunk)]
            yield tile, chunk, positions[::-1] if tiling.reversed else positions


def on_the_map(tiling: Tiles, tile: int, position: int, height: int, width: int) -> int | None:
    """Flat position on the map, found through the tile's box as the copy engine lays it out; None outside."""
    row, column = tiling.corner(tile)
    place = tiling.place(position)
    row, column = row + place // tiling.box[1], column + place % tiling.box[1]
    return row * width + column if row < height and column < width else None


class TestTiles:
    @maps
    @every_route
    @targets
    def test_they_visit_every_position_in_the_order_of_the_route(self, route, height, width, target):
        tiling = tiles(route, height, width, target)
        visited = []
        for tile, _, positions in chunks_of(tiling):
            for position in positions:
                place = on_the_map(tiling, tile, position, height, width)
                assert bool(tiling.inside(tile, position)) == (place is not None)
                visited.append(place)
        assert [place for place in visited if place is not None] == visiting_order(route, height, width).tolist()
        assert tiling.exact == (None not in visited)

    @maps
    @every_route
    @targets
    def test_sizes(self, route, height, width, target):
        tiling = tiles(route, height, width, target)
        assert tiling.span % tiling.chunk == 0
        assert tiling.chunk <= LONGEST_CHUNK
        assert tiling.positions <= max(target, LONGEST_CHUNK)
        assert tiling.depth == 1 or tiling.pieces == 1

    @pytest.mark.parametrize("side", [56, 28, 14, 64, 32, 16, 128])
    def test_usual_maps_are_covered_exactly(self, side):
        assert all(tiles(route, side, side, 16).exact for route in ROUTES)

    def test_by_hand(self):
        assert dataclasses.astuple(tiles("row", 56, 56, 32)) == ("row", 56, 56, 28, 1, 14)
        assert tiles("column", 14, 14, 32).box == (14, 2)
        assert tiles("column", 14, 14, 32).corner(3) == (0, 6)
        assert tiles("row", 56, 56, 32).corner(3) == (1, 28)
        assert tiles("column", 1, 300, 16).route == "row"  # columns of one position are a row


class TestRecurrence:
    @pytest.mark.parametrize(("precise", "tolerance"), [(True, 3e-7), (False, 1e-5)])
    def test_softplus(self, precise, tolerance):
        x = np.concatenate([np.linspace(-30, 30, 20_001), [-80.0, 100.0]]).astype(np.float32)
        (found,) = softplus([x], precise=precise)
        expected = np.logaddexp(x.astype(np.float64), 0)
        assert found.dtype == jnp.float32
        error = np.abs(np.asarray(found, np.float64) / expected - 1)
        assert np.all(error < tolerance + 1e-7 * np.abs(x))  # the exponent is rounded to float32

    def test_softplus_slope(self):
        x = np.linspace(-30, 30, 20_001).astype(np.float32)
        (found,) = softplus_slopes([x], softplus([x], precise=True))
        assert np.all(np.abs(np.asarray(found) * (1 + np.exp(-x.astype(np.float64))) - 1) < 4e-7 + 1.5e-7 * np.abs(x))

    def test_far_from_zero(self):
        x = np.asarray([-1e30, -200.0, 200.0, 1e30], np.float32)
        (step,) = softplus([x], precise=True)
        np.testing.assert_array_equal(step, np.maximum(x, 0))
        np.testing.assert_array_equal(softplus_slopes([x], [step])[0], [0, 0, 1, 1])

    @pytest.mark.parametrize("n", [1, 3])
    @pytest.mark.parametrize(("height", "width"), [(5, 3), (9, 14), (17, 19)])
    def test_a_walk_over_tiles_is_the_scan(self, height, width, n):
        """The kernels' walk, forward and backward, in NumPy float64, against the definition and its derivative."""
        rng = np.random.default_rng(0)
        batch, d = 2, 3
        inputs = ScanInputs(
            u=rng.standard_normal((batch, height, width, d)),
            delta=rng.standard_normal((batch, height, width, d)),
            A=-np.exp(0.5 * rng.standard_normal((d, n))),
            B=rng.standard_normal((batch, height, width, n)),
            C=rng.standard_normal((batch, height, width, n)),
            D=rng.standard_normal(d),
            delta_bias=rng.uniform(-4.0, -2.0, d),
        )
        dy = rng.standard_normal((batch, 3, height, width, d))
        with jax.enable_x64(True):
            y, gradients = walk(inputs, dy, HALF)
            np.testing.assert_allclose(y, selective_scan_2d_reference(*inputs, routes=HALF), rtol=1e-6, atol=1e-7)
            scan = functools.partial(reference_in_jax, routes=HALF)
            expected = jax.jit(lambda inputs, dy: jax.vjp(scan, inputs)[1](dy)[0])(inputs, dy)
        for name, found, reference in zip(ScanInputs._fields, gradients, expected, strict=True):
            np.testing.assert_allclose(found, reference, rtol=1e-5, atol=1e-6, err_msg=name)


def reference_in_jax(inputs: ScanInputs, routes) -> jax.Array:
    """The definition, position by position."""
    b, h, w, d = inputs.u.shape
    step = jax.nn.softplus(inputs.delta + inputs.delta_bias).reshape(b, h * w, d)
    u, B, C = (x.reshape(b, h * w, -1) for x in (inputs.u, inputs.B, inputs.C))
    path = np.concatenate([visiting_order(route, h, w) for route in routes])

    def visit(state, t):
        state = jnp.exp(step[:, t, :, None] * inputs.A) * state + (step[:, t] * u[:, t])[..., None] * B[:, t, None]
        return state, jnp.sum(state * C[:, t, None], -1) + inputs.D * u[:, t]

    _, y = jax.lax.scan(visit, jnp.zeros((b, *inputs.A.shape)), path)
    y = y.reshape(len(routes), h * w, b, d)
    back = [y[i, np.argsort(visiting_order(route, h, w))] for i, route in enumerate(routes)]
    return jnp.moveaxis(jnp.stack(back), 2, 0).reshape(b, len(routes), h, w, d)


def walk(inputs: ScanInputs, dy: np.ndarray, routes) -> tuple[np.ndarray, ScanInputs]:
    """y and the gradients, by the kernels' geometry and arithmetic: chunk by chunk, the state kept before each."""
    b, h, w, d = inputs.u.shape
    n = inputs.A.shape[1]
    tilings = [tiles(route, h, w, 16) for route in routes]
    padded = lambda x: np.concatenate([x.reshape(b, h * w, -1), np.zeros((b, 1, x.shape[-1]))], 1)  # noqa: E731
    u, delta, B, C = (padded(x) for x in (inputs.u, inputs.delta, inputs.B, inputs.C))
    dy = np.stack([padded(dy[:, i]) for i in range(len(routes))], 1)
    y = np.zeros((b, len(routes), h * w + 1, d))
    grads = ScanInputs(*(np.zeros_like(x) for x in (u, delta, inputs.A, B, C, inputs.D, inputs.delta_bias)))

    def chunk_values(tiling, tile, positions):
        places = [on_the_map(tiling, tile, p, h, w) for p in positions]
        inside = [float(p is not None) for p in places]
        places = [h * w if p is None else p for p in places]
        raws = [delta[:, p] + inputs.delta_bias for p in places]
        steps = [np.asarray(s) * keep for s, keep in zip(softplus(raws, precise=True), inside, strict=True)]
        return places, inside, raws, steps, [u[:, p] for p in places]

    kept_states = {}
    hs = [np.zeros((b, d)) for _ in range(n)]
    for r, tiling in enumerate(tilings):
        for tile, chunk, positions in chunks_of(tiling):
            places, _, _, steps, us = chunk_values(tiling, tile, positions)
            kept_states[r, tile, chunk] = list(hs)
            drives = [s * x for s, x in zip(steps, us, strict=True)]
            for p, x in zip(places, us, strict=True):
                y[:, r, p] = inputs.D * x
            for i in range(n):
                states = advance(
                    hs[i], decays(steps, inputs.A[:, i] * LOG2_E), drives, [B[:, p, i : i + 1] for p in places]
                )
                hs[i] = states[-1]
                for p, state in zip(places, states[1:], strict=True):
                    y[:, r, p] += C[:, p, i : i + 1] * state
    rs = [np.zeros((b, d)) for _ in range(n)]
    for r, tiling in reversed(list(enumerate(tilings))):
        for tile, chunk, positions in chunks_of(tiling, against=True):
            places, inside, raws, steps, us = chunk_values(tiling, tile, positions)
            drives = [s * x for s, x in zip(steps, us, strict=True)]
            dys = [dy[:, r, p] for p in places]
            dsteps = [np.zeros((b, d)) for _ in places]
            for i in range(n):
                kept = decays(steps, inputs.A[:, i] * LOG2_E)
                Bs, Cs = ([x[:, p, i : i + 1] for p in places] for x in (B, C))
                states = advance(kept_states[r, tile, chunk][i], kept, drives, Bs)
                part = retreat(rs[i], states, kept, dys, us, steps, drives, Bs, Cs, inputs.A[:, i])
                rs[i] = part.r
                grads.A[:, i] += np.sum(part.dA, 0)
                for k, p in enumerate(places):
                    grads.u[:, p] += part.dus[k]
                    dsteps[k] = dsteps[k] + part.dsteps[k]
                    grads.B[:, p, i] += np.sum(part.dBs[k], -1)
                    grads.C[:, p, i] += np.sum(part.dCs[k], -1)
            slopes = softplus_slopes(raws, steps)
            for k, p in enumerate(places):
                draw = dsteps[k] * slopes[k] * inside[k]
                grads.delta[:, p] += draw
                grads.delta_bias[:] += np.sum(draw, 0)
                grads.D[:] += np.sum(dys[k] * us[k], 0)
                grads.u[:, p] += inputs.D * dys[k]
    on_map = lambda x: x[:, : h * w].reshape(b, h, w, -1)  # noqa: E731
    of_positions = {name: on_map(getattr(grads, name)) for name in ("u", "delta", "B", "C")}
    return y[:, :, : h * w].reshape(b, len(routes), h, w, d), grads._replace(**of_positions)


def problem(direction, *shape, states=1, routes=1, dtype="bfloat16") -> Problem:
    return Problem(direction, *shape, states=states, routes=routes, dtype=dtype)


class TestHeuristic:
    @pytest.mark.parametrize("direction", ["forward", "backward"])
    @pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
    @pytest.mark.parametrize("states", [1, 16])
    @pytest.mark.parametrize("routes", [("column",), HALF])
    @pytest.mark.parametrize("shape", [(128, 56, 56, 192), (128, 7, 7, 768), (2, 5, 3, 20), (1, 200, 336, 96)])
    def test_shared_memory_suffices(self, direction, dtype, states, routes, shape):
        asked = problem(direction, *shape, states=states, routes=len(routes), dtype=dtype)
        config = mosaic.heuristic(asked, H100)
        geometry = mosaic._geometry(asked, routes, config)
        used = mosaic_block.shared_bytes(geometry, backward=direction == "backward")
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
            geometry = mosaic._geometry(problem("forward", 2, h, w, d, routes=3), HALF, mosaic.Config(2, 1))
            for tiling in geometry.routes:
                sizes, strides = (*tiling.box, geometry.block), (w * geometry.channels, geometry.channels, 1)
                expected, contiguous = 1, True
                for size, stride in zip(sizes[::-1], strides[::-1], strict=True):
                    contiguous &= size == 1 or stride == expected
                    expected *= size
                inside = tiling.exact and geometry.channels % geometry.block == 0
                assert inside or not contiguous, (h, w, tiling)

    def test_large_batches_stay_whole(self):
        assert mosaic.heuristic(problem("forward", 128, 56, 56, 96), H100).parts == 1
        assert mosaic.heuristic(problem("forward", 128, 7, 7, 1536, routes=3), H100).parts == 1

    def test_small_batches_are_cut(self):
        one = mosaic.heuristic(problem("forward", 1, 200, 336, 96), H100)
        assert one.parts == 2 * H100.multiprocessors
        assert mosaic.heuristic(problem("forward", 1, 200, 336, 96, routes=3), H100).parts == one.parts // 3
        assert mosaic.heuristic(problem("forward", 1, 7, 7, 768), H100).parts == 1  # too short to be cut


CASES = {
    "full branch": ((128, 56, 56, 192), 1, ("row",), "bfloat16"),
    "half branch": ((128, 28, 28, 192), 1, HALF, "float32"),
    "half branch, large": ((128, 64, 64, 192), 1, HALF, "bfloat16"),
    "last stage": ((128, 7, 7, 768), 1, HALF, "bfloat16"),
    "detection, cut": ((1, 100, 168, 192), 1, HALF, "bfloat16"),
    "16 states": ((2, 56, 56, 192), 16, ("column",), "bfloat16"),
    "odd": ((2, 9, 11, 20), 2, HALF, "float32"),
}


def lowered(shape, n, routes, dtype) -> tuple[str, str]:
    """StableHLO for CUDA of the inference, and of the forward and backward."""
    b, h, w, d = shape
    spec = jax.ShapeDtypeStruct
    maps, small, vector = spec(shape, dtype), spec((b, h, w, n), dtype), spec((d,), "float32")
    inputs = ScanInputs(maps, maps, spec((d, n), "float32"), small, small, vector, vector)
    dy = spec((b, len(routes), h, w, d), dtype)

    def train(inputs, dy):
        y, residuals = mosaic.forward(inputs, routes)
        return y, mosaic.backward(residuals, dy, routes)

    infer = jax.jit(lambda inputs: mosaic.run(inputs, routes))
    return tuple(
        jax.jit(f).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
        for f, arguments in ((infer, (inputs,)), (train, (inputs, dy)))
    )


@pytest.mark.parametrize("case", CASES)
def test_lowers_for_cuda_without_a_gpu(case):
    """And around the kernels no map is reversed, transposed, joined or padded; only sums over routes touch maps."""
    shape, n, routes, dtype = CASES[case]
    for text in lowered(shape, n, routes, dtype):
        assert "mosaic_gpu" in text
        if shape[-1] % 8:
            continue  # such channels are padded for the copy engine
        for line in text.splitlines():
            if re.search(r"stablehlo\.(reverse|transpose|concatenate|pad|gather|slice)\b", line):
                result = [int(x) for x in re.findall(r"(\d+)x", line.rsplit("tensor<", 1)[1])]
                assert np.prod(result) < np.prod(shape), line


@pytest.mark.parametrize("shape", [(14, 14, 128), (56, 56, 96), (9, 25, 128)])
def test_what_is_kept_does_not_depend_on_the_batch(shape):
    """On several devices XLA takes what each keeps for a part of what one would keep."""

    def kept(batch: int) -> list[tuple[tuple[int, ...], str]]:
        spec = jax.ShapeDtypeStruct
        maps, small = spec((batch, *shape), "bfloat16"), spec((batch, *shape[:2], 1), "bfloat16")
        vector = spec(shape[-1:], "float32")
        inputs = ScanInputs(maps, maps, spec((shape[-1], 1), "float32"), small, small, vector, vector)
        y, states = jax.eval_shape(functools.partial(mosaic._forward_of_images, HALF, True), *inputs)
        gradients = jax.eval_shape(functools.partial(mosaic._backward_of_images, HALF), *inputs, states, y)
        return [(x.shape[1:], x.dtype.name) for x in (y, states, *gradients)]

    assert kept(1) == kept(16) == kept(256)


@pytest.mark.parametrize(
    ("routes", "n", "parts"),
    [(HALF, 1, 1), (("column",), 2, 1), (("row_reversed", "column"), 1, 2)],
    ids=["chained", "two states", "cut"],
)
def test_interpreted_kernels(interpreted, monkeypatch, routes, n, parts):
    monkeypatch.setattr(mosaic, "heuristic", lambda problem, device: mosaic.Config(2, parts))
    monkeypatch.setattr(mosaic_resident, "supports", lambda *_: False)
    rng = np.random.default_rng(0)
    b, h, w, d = 2, 20, 17, 8
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
    du, ddelta, dBC, dparameters = jax.jit(functools.partial(mosaic._backward_of_images, routes))(*inputs, states, dy)
    dparameters = jnp.sum(dparameters, 0)
    found = (du, ddelta, dparameters[:n].T, dBC[..., :n], dBC[..., n:], dparameters[n], dparameters[n + 1])

    expected_y, residuals = xla.forward(inputs, routes)
    np.testing.assert_allclose(y, expected_y, rtol=1e-4, atol=1e-4)
    expected = xla.backward(residuals, dy, routes)
    for name, x, reference in zip(ScanInputs._fields, found, expected, strict=True):
        error = np.linalg.norm(x - reference) / np.linalg.norm(reference)
        assert error < 1e-5, f"{name}: {error:.1e}"


def test_gradient_traces_inside_shard_map(monkeypatch):
    """Where a kernel's results must be known to differ between shards."""
    if len(jax.devices()) < 4:
        pytest.skip("needs four devices")
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.ShapeDtypeStruct
    maps, small, vector = spec((8, 14, 14, 8), "float32"), spec((8, 14, 14, 1), "float32"), spec((8,), "float32")
    inputs = ScanInputs(maps, maps, spec((8, 1), "float32"), small, small, vector, vector)
    split, whole = jax.P("data"), jax.P()
    specs = ScanInputs(split, split, whole, split, split, whole, whole)

    @jax.custom_vjp
    def scan(inputs):
        return mosaic.run(inputs, HALF)

    scan.defvjp(lambda inputs: mosaic.forward(inputs, HALF), lambda kept, dy: (mosaic.backward(kept, dy, HALF),))

    def loss(inputs):
        inputs = ScanInputs(*vary_alike(inputs))
        return jax.lax.psum(jnp.sum(scan(inputs)), "data")

    sharded = jax.shard_map(loss, mesh=mesh, in_specs=(specs,), out_specs=whole)
    jax.jit(jax.grad(sharded)).trace(inputs)


def test_float64_is_refused():
    with jax.enable_x64(True):
        x = jnp.ones((1, 2, 2, 8))
        inputs = ScanInputs(x, x, -jnp.ones((8, 1)), x[..., :1], x[..., :1], jnp.ones(8), jnp.ones(8))
        with pytest.raises(ValueError, match="for float64 choose implementation='xla'"):
            mosaic.run(inputs, ("row",))


def test_says_what_it_needs():
    if jax.default_backend() == "gpu":
        pytest.skip("there is a GPU")
    assert "compute capability 9.0" in mosaic.unavailable()
