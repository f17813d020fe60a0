"""What the tests of several kernels need."""

from __future__ import annotations

import functools
import importlib
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from msvmamba_jax.kernels.selective_scan import mosaic, mosaic_resident_backward
from msvmamba_jax.kernels.selective_scan.config import H100, Problem
from msvmamba_jax.kernels.selective_scan.routes import ScanInputs


@pytest.fixture
def interpreted(monkeypatch, record_property):
    """Mosaic GPU kernels run on the CPU, one step of a thread after another. Tiles of several lines cannot."""
    if jax.__version_info__ < (0, 11):
        pytest.skip("this JAX's interpreter of Mosaic GPU kernels lacks layouts")
    # No `importorskip`: a JAX that has moved this must not silently take the test along.
    parameters = importlib.import_module("jax._src.pallas.mosaic_gpu.interpret.params")
    interpreter = parameters.InterpretGPUParams()
    monkeypatch.setattr(plgpu, "kernel", functools.partial(plgpu.kernel, interpret=interpreter))
    record_property("compared", "mosaic:interpreted")


@pytest.fixture
def sums_that_can_be_interpreted(monkeypatch):
    """JAX's interpreter cannot reshape a reference, as the sums over channels do."""

    def place_by_place(block):
        rows, columns = block._box

        def sums():
            for row, column, (i, kept) in itertools.product(range(rows), range(columns), enumerate((0, 2))):
                values = block._kept[kept].at[row, column][...]
                total = jnp.sum(values.astype(jnp.float32))
                block._dBC.at[block._image, block._number, i, row * columns + column][...] = total

        block._alone(sums)

    monkeypatch.setattr(mosaic_resident_backward._Block, "_sum_over_channels", place_by_place)


@pytest.fixture
def interpreted_scan(interpreted, sums_that_can_be_interpreted):
    """A function from inputs, dy and routes to [y] and the gradients, by the Mosaic GPU kernels that take the scan."""

    @functools.cache
    def compiled(routes):
        forward = jax.jit(functools.partial(mosaic._forward_of_images, routes, True))
        return forward, jax.jit(functools.partial(mosaic._backward_of_images, routes))

    def scan(inputs: ScanInputs, dy: jax.Array, routes) -> tuple[list[jax.Array], ScanInputs]:
        forward, backward = compiled(routes)
        y, states = forward(*inputs)
        du, ddelta, dB, dC, dA, dD, dbias = backward(*inputs, states, dy)
        gradients = (du, ddelta, dA.sum(0).T, dB, dC, dD.sum(0), dbias.sum(0))
        return [y], ScanInputs(*(g.astype(x.dtype) for g, x in zip(gradients, inputs, strict=True)))

    return scan


@pytest.fixture
def laid_out(monkeypatch) -> list[int]:
    """Collects the shared memory of each kernel that Mosaic GPU lowers."""
    core = pytest.importorskip("jax.experimental.mosaic.gpu.core")
    if not hasattr(core, "_smem_tree_size"):
        pytest.skip("this JAX adds up shared memory elsewhere")
    found, measure = [], core._smem_tree_size

    def measured(buffers):
        found.append(measure(buffers))
        return found[-1]

    monkeypatch.setattr(core, "_smem_tree_size", measured)
    return found


@pytest.fixture(scope="session")
def random_inputs():
    """A function from the shape and dtype of maps to inputs of a scan with one state."""

    def make(shape: tuple[int, int, int, int], dtype: str) -> ScanInputs:
        rng = np.random.default_rng(0)
        b, h, w, d = shape
        normal = lambda *size: jnp.asarray(rng.standard_normal(size), jnp.float32)  # noqa: E731
        return ScanInputs(
            u=normal(*shape).astype(dtype),
            delta=normal(*shape).astype(dtype),
            A=-jnp.exp(0.5 * normal(d, 1)),
            B=normal(b, h, w, 1).astype(dtype),
            C=normal(b, h, w, 1).astype(dtype),
            D=normal(d),
            delta_bias=normal(d) - 3.0,
        )

    return make


@pytest.fixture(scope="session")
def states_before_chunks():
    """A function from inputs of a scan with one state, routes and the number of chunks to the states before these."""

    def before_chunks(inputs: ScanInputs, routes, chunks: int) -> np.ndarray:
        """(b, chunks, 1, d), position by position; chunks and their positions as the backward's tiles have them."""
        b, _, _, d = inputs.u.shape
        problem = Problem.of("backward", inputs, routes)
        geometry = mosaic._geometry(problem, routes, mosaic.Config(2, 1), H100)
        u, delta, B = (np.asarray(x, np.float64) for x in (inputs.u, inputs.delta, inputs.B))
        step = np.logaddexp(delta + np.asarray(inputs.delta_bias), 0.0)
        keep, drive = np.exp(step * np.asarray(inputs.A)[:, 0]), step * u * B
        state, before = np.zeros((b, d)), np.full((b, chunks, 1, d), np.nan)
        for route, first in zip(geometry.routes, geometry.first_chunk, strict=False):
            for number in reversed(range(route.count)) if route.reversed else range(route.count):
                for chunk in reversed(range(route.chunks)) if route.reversed else range(route.chunks):
                    before[:, first + number * route.chunks + chunk, 0] = state
                    positions = range(chunk * route.chunk, (chunk + 1) * route.chunk)
                    row, column = route.corner(number)
                    for position in reversed(positions) if route.reversed else positions:
                        if route.inside(number, position):
                            place = divmod(route.place(position), route.box[1])
                            at = (slice(None), row + place[0], column + place[1])
                            state = keep[at] * state + drive[at]
        return before

    return before_chunks
