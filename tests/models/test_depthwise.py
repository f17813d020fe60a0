"""The depthwise convolution against XLA's grouped convolution."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from msvmamba_jax.models.depthwise import depthwise_conv

SIZES = [(1, 1), (1, 9), (2, 3), (3, 2), (4, 4), (5, 8), (6, 7), (7, 6), (8, 5), (9, 9)]

pytestmark = pytest.mark.shifted_sums


def grouped_conv(x, kernel, stride):
    edge = kernel.shape[0] // 2
    return lax.conv_general_dilated(
        x,
        kernel[:, :, None],
        (stride, stride),
        [(edge, edge)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
        precision=lax.Precision.HIGHEST,
    )


def arrays(h, w, k, stride, dtype="float32"):
    rng = np.random.default_rng(h * 100 + w * 10 + k)
    shapes = (2, h, w, 5), (k, k, 5), (2, -(-h // stride), -(-w // stride), 5)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def with_gradients(convolve, stride):
    def run(x, kernel, dy):
        y, pull_back = jax.vjp(lambda x, kernel: convolve(x, kernel, stride), x, kernel)
        return y, *pull_back(dy)

    return run


@pytest.mark.parametrize("k", [3, 7])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("h", "w"), SIZES)
def test_forward_and_gradients(h, w, stride, k):
    inputs = arrays(h, w, k, stride)
    found = jax.jit(with_gradients(depthwise_conv, stride))(*inputs)
    expected = jax.jit(with_gradients(grouped_conv, stride))(*inputs)
    for name, x, reference in zip(("y", "dx", "dkernel"), found, expected, strict=True):
        np.testing.assert_allclose(x, reference, atol=5e-5, err_msg=name)


def test_by_hand():
    """A 3 x 3 map of ones: each output counts the kernel's elements that lie on the map."""
    kernel = jnp.arange(1.0, 10.0).reshape(3, 3, 1)
    y = depthwise_conv(jnp.ones((1, 3, 3, 1)), kernel)
    assert y[0, :, :, 0].tolist() == [[28.0, 39.0, 24.0], [33.0, 45.0, 27.0], [16.0, 21.0, 12.0]]
    assert depthwise_conv(jnp.ones((1, 3, 3, 1)), kernel, 2)[0, :, :, 0].tolist() == [[28.0, 24.0], [16.0, 12.0]]


def test_bfloat16_sums_in_float32():
    inputs = arrays(6, 7, 7, 2, "bfloat16")
    found = jax.jit(with_gradients(depthwise_conv, 2))(*inputs)
    expected = jax.jit(with_gradients(grouped_conv, 2))(*(x.astype(jnp.float32) for x in inputs))
    for x, reference in zip(found, expected, strict=True):
        assert x.dtype == jnp.bfloat16
        np.testing.assert_allclose(x.astype(jnp.float32), reference, rtol=2.0**-8, atol=1e-4)  # rounded once


def test_vmap():
    x, kernel, _ = arrays(4, 5, 3, 1)
    stacked = jnp.stack([kernel, 2 * kernel])
    y = jax.vmap(depthwise_conv, (None, 0))(x, stacked)
    np.testing.assert_allclose(y[1], 2 * depthwise_conv(x, kernel), rtol=1e-6)
