"""The loss of label maps against numbers worked out by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msvmamba_jax.tasks.segmentation import IGNORED, pixel_cross_entropy

# Four pixels; the right class has the probability 1/2, 1/4, 3/4, and the last one is ignored.
PROBABILITIES = np.float32([[[0.5, 0.25, 0.25], [0.5, 0.25, 0.25]], [[0.125, 0.125, 0.75], [0.8, 0.1, 0.1]]])
LABELS = np.uint8([[0, 1], [2, IGNORED]])


def test_by_hand():
    loss, accuracy = pixel_cross_entropy(jnp.log(PROBABILITIES)[None] + 7, LABELS[None])
    assert (loss.shape, loss.dtype, accuracy.shape) == ((), jnp.float32, ())
    np.testing.assert_allclose(loss, (np.log(2) + np.log(4) + np.log(4 / 3)) / 4, rtol=1e-5)  # of all four pixels
    np.testing.assert_allclose(accuracy, 2 / 3, rtol=1e-6)  # of the three that count


@pytest.mark.parametrize("dtype", ["uint8", "int32"])
def test_any_integer_labels(dtype):
    logits = jnp.log(PROBABILITIES)[None]
    found = pixel_cross_entropy(logits, LABELS[None].astype(dtype))
    np.testing.assert_array_equal(found, pixel_cross_entropy(logits, LABELS[None]))


def test_an_ignored_pixel_has_no_gradient():
    gradient = jax.grad(lambda x: pixel_cross_entropy(x, LABELS[None])[0])(jnp.log(PROBABILITIES)[None])[0]
    expected = (PROBABILITIES - np.eye(3)[np.where(LABELS == IGNORED, 0, LABELS)]) / 4
    np.testing.assert_allclose(gradient, np.where(LABELS[..., None] == IGNORED, 0, expected), atol=1e-6)


def test_all_ignored():
    loss, accuracy = pixel_cross_entropy(jnp.log(PROBABILITIES)[None], np.full((1, 2, 2), IGNORED))
    assert (loss, accuracy) == (0, 0)


def test_logits_are_resized_to_the_labels():
    """One row of two logits to eight: 1, 1, 7/8, 5/8, 3/8, 1/8, 0, 0 of the first; class 0 wins in the first four."""
    logits = jnp.asarray([[[[4.0, 0.0], [-4.0, 0.0]]]])
    labels = np.uint8([[[0, 0, 0, 1, 1, 1, 1, 1]]])
    margin = 8 * np.array([1, 1, 7 / 8, 5 / 8, 3 / 8, 1 / 8, 0, 0]) - 4
    signed = np.where(labels[0, 0] == 0, margin, -margin)
    loss, accuracy = pixel_cross_entropy(logits, labels)
    np.testing.assert_allclose(loss, np.log1p(np.exp(-signed)).mean(), rtol=1e-5)
    assert accuracy == 7 / 8
