"""Anchors of a feature pyramid."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msvmamba_jax.models.detection.anchors import (
    STRIDES,
    base_anchors,
    inside,
    level_anchors,
    level_of_anchors,
    padded_size,
    places_of_anchors,
    pyramid_anchors,
)


@pytest.mark.parametrize("image", ["200x336", "64x96"])
def test_as_recorded(recorded, largest_error, image):
    sizes = [(int(h), int(w)) for h, w in recorded[f"anchors/{image}/sizes"]]
    both = jax.jit(lambda size: (pyramid_anchors(sizes), inside(sizes, size)))
    anchors, valid = jax.device_get(both(jnp.asarray([60, 90])))
    levels = level_of_anchors(sizes)
    for level in range(len(STRIDES)):
        own = anchors[levels == level]
        assert len(own) == recorded[f"anchors/{image}/{level}/count"]
        assert largest_error(own[:6], recorded[f"anchors/{image}/{level}/first"]) < 1e-5
        assert largest_error(own[-6:], recorded[f"anchors/{image}/{level}/last"]) < 1e-5
        assert valid[levels == level].sum() == recorded[f"anchors/{image}/valid_60x90"][level]


def test_by_hand():
    """Sides of 8 strides; height / width 1/2, 1 and 2 at equal area; columns run before rows."""
    wide, square, tall = base_anchors(4)
    np.testing.assert_array_equal(square, [-16, -16, 16, 16])
    np.testing.assert_allclose(wide, np.asarray([-16, -8, 16, 8]) * np.sqrt(2), rtol=1e-6)
    np.testing.assert_allclose(tall, wide[[1, 0, 3, 2]], rtol=1e-6)
    anchors = level_anchors(2, 3, 4)
    np.testing.assert_allclose(anchors[3], wide + np.asarray([4, 0, 4, 0]), rtol=1e-6)
    np.testing.assert_allclose(anchors[9], wide + np.asarray([0, 4, 0, 4]), rtol=1e-6)


def test_an_image_reaches_to_its_own_multiple_of_32():
    np.testing.assert_array_equal(padded_size(jnp.asarray([[1, 32], [33, 801]])), [[32, 32], [64, 832]])


def test_places_do_not_depend_on_the_size_of_the_maps():
    small, large = [(3, 4), (2, 2)], [(5, 7), (3, 4)]
    places = np.asarray(places_of_anchors(large))
    assert len(np.unique(places)) == len(places)
    cut = [np.zeros((h, w, 3), bool) for h, w in large]
    for mask, (height, width) in zip(cut, small, strict=True):
        mask[:height, :width] = True
    np.testing.assert_array_equal(places[np.concatenate([m.reshape(-1) for m in cut])], places_of_anchors(small))


def test_places_differ_at_the_largest_supported_maps():
    assert len(np.unique(places_of_anchors([(1, 4096)] * 5))) == 5 * 4096 * 3
