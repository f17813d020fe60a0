"""What the tests of several kernels need."""

from __future__ import annotations

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

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
