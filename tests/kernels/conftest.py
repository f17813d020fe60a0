"""What the tests of several kernels need."""

from __future__ import annotations

import functools
import importlib

import jax
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu


@pytest.fixture
def interpreted(monkeypatch):
    """Mosaic GPU kernels run on the CPU, one step of a thread after another. Tiles of several lines cannot."""
    if jax.__version_info__ < (0, 11):
        pytest.skip("this JAX's interpreter of Mosaic GPU kernels lacks layouts")
    # No `importorskip`: a JAX that has moved this must not silently take the test along.
    parameters = importlib.import_module("jax._src.pallas.mosaic_gpu.interpret.params")
    interpreter = parameters.InterpretGPUParams()
    monkeypatch.setattr(plgpu, "kernel", functools.partial(plgpu.kernel, interpret=interpreter))
