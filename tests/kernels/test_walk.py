"""The tiles and the arithmetic of the Mosaic GPU kernels, in NumPy."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from float64_scan import scan_and_gradients

from msvmamba_jax.kernels.selective_scan.recurrence import (
    LOG2_E,
    advance,
    decays,
    retreat,
    softplus,
    softplus_slopes,
    softplus_slopes_of,
)
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
    def test_chunks_and_positions_of_the_map(self, route, height, width, target):
        tiling = tiles(route, height, width, target)
        chunk, position = (x.reshape(-1) for x in tiling.chunk_and_position(height, width))
        for tile, number, positions in chunks_of(tiling):
            for of_tile in positions:
                place = on_the_map(tiling, tile, of_tile, height, width)
                if place is not None:
                    assert chunk[place] == tile * tiling.chunks + number
                    assert position[place] == of_tile % tiling.chunk

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

    @pytest.mark.parametrize("precise", [True, False])
    def test_softplus_slope_from_the_step(self, precise):
        step = np.concatenate([np.geomspace(1e-30, 30, 20_001), [0.0, 200.0]]).astype(np.float32)
        (found,) = softplus_slopes_of([step], precise=precise)
        expected = -np.expm1(-step.astype(np.float64))
        assert found.dtype == jnp.float32
        assert np.all(np.abs(np.asarray(found, np.float64) - expected) < (3e-7 if precise else 3e-5) * expected + 1e-37)

    def test_far_from_zero(self):
        x = np.asarray([-1e30, -200.0, 200.0, 1e30], np.float32)
        (step,) = softplus([x], precise=True)
        np.testing.assert_array_equal(step, np.maximum(x, 0))
        np.testing.assert_array_equal(softplus_slopes([x], [step])[0], [0, 0, 1, 1])

    @pytest.mark.parametrize("n", [1, 3])
    @pytest.mark.parametrize(("height", "width"), [(5, 3), (9, 14), (17, 3)])
    def test_a_walk_over_tiles_is_the_scan(self, height, width, n):
        """The kernels' walk, forward and backward, in NumPy float64, against the recurrence."""
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
        expected_y, expected = scan_and_gradients(inputs, dy, HALF)
        np.testing.assert_allclose(y, expected_y, rtol=1e-6, atol=1e-7)
        for name, found, reference in zip(ScanInputs._fields, gradients, expected, strict=True):
            np.testing.assert_allclose(found, reference, rtol=1e-5, atol=1e-6, err_msg=name)


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
