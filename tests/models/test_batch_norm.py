"""Batch normalisation against its definition, in one piece and spread over devices."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from msvmamba_jax.errors import InputError
from msvmamba_jax.models.batch_norm import BatchNorm
from msvmamba_jax.models.parameters import bind, get_statistics, get_weights

WEIGHTS = {
    "scale": np.float32([1, 2, -0.5]),
    "bias": np.float32([0, 0.5, 3]),
    "mean": np.float32([1, -2, 0]),
    "var": np.float32([0.25, 4, 1]),
}


def norm(axis: str | None = None, dtype: str = "float32") -> BatchNorm:
    return bind(BatchNorm(3, axis=axis, dtype=jnp.dtype(dtype)), WEIGHTS)


for _array in WEIGHTS.values():
    _array.flags.writeable = False  # what a model is bound to stays as it is


def values(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(2, 3, shape).astype(np.float32)


def expected(x: np.ndarray, mean: np.ndarray, var: np.ndarray) -> np.ndarray:
    return (x - mean) / np.sqrt(var + 1e-5) * WEIGHTS["scale"] + WEIGHTS["bias"]


def test_evaluation_uses_the_running_statistics_and_keeps_them():
    x, module = values(4, 5, 6, 3), norm()
    np.testing.assert_allclose(module(jnp.asarray(x)), expected(x, WEIGHTS["mean"], WEIGHTS["var"]), atol=1e-5)
    for name, value in get_statistics(module).items():
        np.testing.assert_array_equal(value, WEIGHTS[name])


@pytest.mark.parametrize("shape", [(4, 5, 6, 3), (7, 3), (1, 1, 2, 3)])
def test_training_uses_those_of_the_batch_and_moves_the_running_ones(shape):
    x, module = values(*shape), norm()
    rows = x.reshape(-1, 3).astype(np.float64)
    np.testing.assert_allclose(module(jnp.asarray(x), train=True), expected(x, rows.mean(0), rows.var(0)), atol=1e-4)
    moved = get_statistics(module)
    np.testing.assert_allclose(moved["mean"], 0.9 * WEIGHTS["mean"] + 0.1 * rows.mean(0), rtol=1e-5)
    np.testing.assert_allclose(moved["var"], 0.9 * WEIGHTS["var"] + 0.1 * rows.var(0, ddof=1), rtol=1e-5)
    again = norm()
    again(jnp.asarray(x), train=True)
    again(jnp.asarray(x), train=True)
    np.testing.assert_allclose(get_statistics(again)["mean"], 0.81 * WEIGHTS["mean"] + 0.19 * rows.mean(0), rtol=1e-5)


def test_fresh_ones():
    fresh = get_weights(BatchNorm(3, axis=None, dtype=jnp.bfloat16))
    assert {name: x.tolist() for name, x in fresh.items()} == {
        "scale": [1] * 3,
        "bias": [0] * 3,
        "mean": [0] * 3,
        "var": [1] * 3,
    }
    assert {x.dtype.name for x in fresh.values()} == {"float32"}


def test_a_large_mean_does_not_cancel():
    x = values(64, 3) + np.float32(1e4)
    y = norm()(jnp.asarray(x), train=True)
    rows = x.astype(np.float64)
    np.testing.assert_allclose(y, expected(x, rows.mean(0), rows.var(0)), atol=2e-3)


def test_bfloat16_comes_and_goes_but_statistics_are_float32():
    x, module = jnp.asarray(values(512, 3), jnp.bfloat16), norm(dtype="bfloat16")
    assert module(x, train=True).dtype == jnp.bfloat16
    assert {x.dtype.name for x in get_statistics(module).values()} == {"float32"}
    rows = np.asarray(x, np.float64)
    np.testing.assert_allclose(get_statistics(module)["mean"], 0.9 * WEIGHTS["mean"] + 0.1 * rows.mean(0), rtol=1e-5)


def test_one_value_per_channel_cannot_train():
    with pytest.raises(InputError, match="use a batch of 2 or more"):
        norm()(jnp.ones((1, 1, 1, 3)), train=True)
    assert norm()(jnp.ones((1, 1, 1, 3))).shape == (1, 1, 1, 3)


def step(weights, x, axis=None):
    """A loss that is no function of the normalised values' first two moments, its gradients, and the statistics."""

    def loss(weights, x):
        module = bind(BatchNorm(3, axis=axis, dtype=jnp.float32), weights)
        return jnp.mean(jnp.sin(module(x, train=True)) * x), get_statistics(module)

    (value, statistics), (gradients, dx) = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(weights, x)
    if axis is not None:
        value, gradients = jax.lax.pmean((value, gradients), axis)
        dx = dx / jax.lax.axis_size(axis)  # of the mean over devices
    return value, gradients["scale"], gradients["bias"], dx, statistics


@pytest.mark.parametrize("parallelism", ["pmap", "jit"])
def test_a_batch_on_four_devices_is_one_batch(parallelism):
    """Rows of different devices differ in mean, so that averaging the devices' own variances would be wrong."""
    if jax.device_count() < 4:
        pytest.skip("needs four devices")
    x = values(8, 2, 5, 3) + 3 * np.arange(8, dtype=np.float32)[:, None, None, None]
    one = jax.device_get(jax.jit(step)(WEIGHTS, x))
    if parallelism == "pmap":
        run = jax.pmap(
            functools.partial(step, axis="data"), "data", in_axes=(None, 0), out_axes=(None, None, None, 0, None)
        )
        found = jax.device_get(run(WEIGHTS, x.reshape(4, 2, *x.shape[1:])))
        found = (*found[:3], found[3].reshape(x.shape), found[4])
    else:
        mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        shards = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
        found = jax.device_get(jax.jit(step)(jax.device_put(WEIGHTS, NamedSharding(mesh, PartitionSpec())), shards))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max())
