"""Fresh parameters have the distributions that the original draws them from."""

from __future__ import annotations

import math
import re

import jax
import numpy as np
import pytest
from flax import nnx

from msvmamba_jax.models.parameters import flatten, get_parameters
from msvmamba_jax.models.variants import create_model


@pytest.fixture(scope="module", params=["msvmamba_nano", "vssm_tiny"])
def parameters(request):
    model = create_model(request.param, width=32, depths=(1, 1, 1, 1), states=16, num_classes=50, rngs=nnx.Rngs(0))
    return {name: np.asarray(x, np.float64) for name, x in flatten(get_parameters(model))}


def named(parameters, pattern):
    found = {name: x for name, x in parameters.items() if re.search(pattern, name)}
    assert found
    return found


def assert_uniform(x: np.ndarray, low: float, high: float) -> None:
    """Kolmogorov's distance to the uniform distribution; 2 / sqrt(size) is exceeded once in 1,500 tensors."""
    values = np.sort(x.reshape(-1))
    assert low - 1e-6 <= values[0]
    assert values[-1] <= high + 1e-6
    distance = np.abs((values - low) / (high - low) - (np.arange(x.size) + 0.5) / x.size).max()
    assert distance < 2.0 / math.sqrt(x.size)


def test_every_parameter_is_float32(parameters):
    model = create_model("msvmamba_nano", width=8, depths=(1, 1, 1, 1), dtype="bfloat16", rngs=nnx.Rngs(0))
    assert {x.dtype.name for x in jax.tree.leaves(get_parameters(model))} == {"float32"}


def test_linear_layers_are_normal(parameters):
    kernels = named(parameters, r"(in_projection|out_projection|reduction|head)\.kernel$")
    if any("squeeze" in name for name in parameters):
        kernels |= named(parameters, r"squeeze_excitation\.\w+\.kernel$")
    for name, x in kernels.items():
        assert abs(x.mean()) < 4 * 0.02 / math.sqrt(x.size), name
        assert abs(x.std() / 0.02 - 1) < 4 / math.sqrt(2 * x.size), name
        assert x.size < 10_000 or np.abs(x).max() > 0.06, name  # not truncated
    assert not parameters["head.bias"].any()


def test_convolutions_are_uniform(parameters):
    for name, kernel in named(parameters, r"(conv|ffn\.\w+|patch_embedding\.projection)\.kernel$").items():
        fan_in = kernel.shape[0] * kernel.shape[1] if kernel.ndim == 3 else kernel.shape[0]
        bound = fan_in**-0.5
        assert_uniform(kernel, -bound, bound)
        assert_uniform(parameters[name.replace("kernel", "bias")], -bound, bound)


def test_scan_projections_are_uniform(parameters):
    for x in named(parameters, r"ssms?(\.\d+)?\.projection\.kernel$").values():
        bound = x.shape[0] ** -0.5
        assert_uniform(x, -bound, bound)


def test_step_sizes(parameters):
    for x in named(parameters, r"\.delta_kernel$").values():
        assert_uniform(x, -(x.shape[0] ** -0.5), x.shape[0] ** -0.5)
    for x in named(parameters, r"\.delta_bias$").values():
        step = np.log1p(np.exp(x))  # softplus
        assert step.min() > 1e-3 * (1 - 1e-4)
        assert step.max() < 1e-1 * (1 + 1e-4)
        assert_uniform(np.log(step), math.log(1e-3) - 1e-4, math.log(1e-1) + 1e-4)


def test_decay_and_skip(parameters):
    for x in named(parameters, r"\.A_log$").values():
        np.testing.assert_allclose(x, np.tile(np.log(np.arange(1, 17)), (len(x), 1)), rtol=1e-6)
    for x in named(parameters, r"\.D$").values():
        assert (x == 1).all()


def test_norms_are_the_identity(parameters):
    for name, x in named(parameters, r"norm\.(scale|bias)$").items():
        assert (x == name.endswith("scale")).all()


def test_branches_and_seeds_differ(parameters):
    kernels = list(named(parameters, r"stages\.0.*delta_kernel$").values())
    assert all((kernels[0] != other).any() for other in kernels[1:])
    names = [name for name, x in parameters.items() if x.std() > 0 and not name.endswith("A_log")]
    models = [
        dict(flatten(get_parameters(create_model("msvmamba_nano", width=8, depths=(1, 1, 1, 1), rngs=nnx.Rngs(seed)))))
        for seed in (0, 0, 1)
    ]
    for name in set(names) & set(models[0]):
        assert (models[0][name] == models[1][name]).all(), name
        assert (models[0][name] != models[2][name]).any(), name
