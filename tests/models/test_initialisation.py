"""Fresh parameters have the distributions that the original draws them from."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from msvmamba_jax.models.initializers import normal, step_bias, uniform_fan_in, xavier_uniform
from msvmamba_jax.models.parameters import abstract_model, flatten, get_parameters
from msvmamba_jax.models.variants import create_model


def fresh_model(name: str, rngs: nnx.Rngs):
    return create_model(name, width=32, depths=(1, 1, 1, 1), states=16, num_classes=50, rngs=rngs)


def fresh_parameters(name: str, seed: int) -> dict[str, np.ndarray]:
    parameters = get_parameters(fresh_model(name, nnx.Rngs(seed)))
    return {path: np.asarray(x, np.float64) for path, x in flatten(parameters)}


@pytest.fixture(scope="module", params=["msvmamba_nano", "vssm_tiny"])
def parameters(request):
    return fresh_parameters(request.param, 0)


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


@pytest.mark.parametrize("name", ["msvmamba_nano", "vssm_tiny"])
def test_every_parameter_is_float32(name):
    model = abstract_model(lambda: create_model(name, depths=(1, 1, 1, 1), dtype="bfloat16", rngs=nnx.Rngs(0)))
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


def test_branches_of_a_mixer_differ(parameters):
    kernels = list(named(parameters, r"stages\.0.*delta_kernel$").values())
    assert all((kernels[0] != other).any() for other in kernels[1:])


def test_values_are_the_same_inside_jit():
    key = jax.random.key(3)
    for initializer in (normal(0.5), uniform_fan_in(7), xavier_uniform(), step_bias(1e-3, 1e-1)):
        draw = functools.partial(initializer, shape=(3, 5), dtype=jnp.float32)
        np.testing.assert_array_equal(jax.jit(draw)(key), draw(key))
        keys = jax.random.split(key, 2)
        np.testing.assert_array_equal(jax.vmap(draw)(keys), [draw(k) for k in keys])


def test_no_program_is_compiled_for_a_shape():
    fresh_model("msvmamba_nano", nnx.Rngs(0))
    compiled = []
    with jax.log_compiles(), catch_logs("jax", lambda record: compiled.append(record.getMessage())):
        create_model("msvmamba_nano", width=28, rngs=nnx.Rngs(0))
    assert [message for message in compiled if "Finished XLA compilation" in message] == []


@contextlib.contextmanager
def catch_logs(name, handle):
    handler = logging.Handler()
    handler.emit = handle
    logging.getLogger(name).addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger(name).removeHandler(handler)


def test_the_seed_determines_every_parameter():
    first, again, other = (fresh_parameters("msvmamba_nano", seed) for seed in (0, 0, 1))
    for name, x in first.items():
        assert (x == again[name]).all(), name
        assert (x != other[name]).any() or name.endswith(("A_log", ".D", "norm.scale", "norm.bias", "head.bias")), name
