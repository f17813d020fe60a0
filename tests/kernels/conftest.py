"""What the tests of several kernels need."""

from __future__ import annotations

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from msvmamba_jax.kernels.selective_scan import mosaic
from msvmamba_jax.kernels.selective_scan.config import H100, Problem
from msvmamba_jax.kernels.selective_scan.routes import ScanInputs


@pytest.fixture
def interpreted(monkeypatch):
    """Mosaic GPU kernels run on the CPU, one step of a thread after another. Tiles of several lines cannot."""
    if jax.__version_info__ < (0, 11):
        pytest.skip("this JAX's interpreter of Mosaic GPU kernels lacks layouts")
    # No `importorskip`: a JAX that has moved this must not silently take the test along.
    parameters = importlib.import_module("jax._src.pallas.mosaic_gpu.interpret.params")
    interpreter = parameters.InterpretGPUParams()
    monkeypatch.setattr(plgpu, "kernel", functools.partial(plgpu.kernel, interpret=interpreter))


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
