"""Areas, overlaps and coding of boxes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msvmamba_jax.models.detection.boxes import HEAD_DEVIATIONS, RPN_DEVIATIONS, area, clip, decode, encode, iou

DEVIATIONS = {"rpn": RPN_DEVIATIONS, "head": HEAD_DEVIATIONS}


@pytest.mark.parametrize("kind", DEVIATIONS)
def test_coding_as_recorded(recorded, largest_error, kind):
    proposals, truths = recorded["coder/proposals"], recorded["coder/gt"]
    deltas, deviations = recorded[f"coder/{kind}/deltas"], DEVIATIONS[kind]
    assert largest_error(encode(proposals, truths, deviations), recorded[f"coder/{kind}/encode"]) < 1e-5
    decoded = decode(jnp.asarray(proposals), jnp.asarray(deltas), deviations)
    assert largest_error(decoded, recorded[f"coder/{kind}/decode"]) < 1e-5
    assert largest_error(clip(decoded, (120, 170)), recorded[f"coder/{kind}/decode_clip"]) < 1e-5


def test_boxes_of_several_classes_as_recorded(recorded, largest_error):
    deltas = jnp.asarray(recorded["coder/multi/deltas"]).reshape(5, 3, 4)
    decoded = clip(decode(jnp.asarray(recorded["coder/proposals"])[:5, None], deltas, HEAD_DEVIATIONS), (120, 170))
    assert largest_error(decoded.reshape(5, 12), recorded["coder/multi/decode"]) < 1e-5


def test_overlaps_as_recorded(recorded, largest_error):
    found = iou(jnp.asarray(recorded["assign/gt"])[:, None], jnp.asarray(recorded["assign/anchors"]))
    assert largest_error(found, recorded["assign/iou"]) < 1e-5


def test_by_hand():
    a = jnp.asarray([[0.0, 0.0, 4.0, 2.0], [5.0, 5.0, 5.0, 5.0]])
    b = jnp.asarray([[2.0, 1.0, 6.0, 3.0], [5.0, 5.0, 5.0, 5.0]])
    np.testing.assert_allclose(iou(a, b), [2 / 14, 0.0], rtol=1e-6)
    np.testing.assert_array_equal(area(a), [8.0, 0.0])
    # One width to the right, half a height down; the same width, e times the height; in units of the deviations.
    [moved] = decode(a[:1], jnp.asarray([[10.0, 5.0, 0.0, 5.0]]), HEAD_DEVIATIONS)
    np.testing.assert_allclose(moved, [4.0, 2 - np.e, 8.0, 2 + np.e], rtol=1e-6)


def test_overlaps_are_rounded_after_every_operation(random_boxes):
    """The same bits as operation by operation: a fused multiply-add would break ties that the original has."""
    rng = np.random.default_rng(1)
    a, b = random_boxes(rng, 300)[:, None], random_boxes(rng, 200)
    low, high = np.maximum(a[..., :2], b[..., :2]), np.minimum(a[..., 2:], b[..., 2:])
    common = np.prod(np.maximum(high - low, 0), -1, dtype=np.float32)
    sides_a, sides_b = a[..., 2:] - a[..., :2], b[..., 2:] - b[..., :2]
    union = sides_a[..., 0] * sides_a[..., 1] + sides_b[..., 0] * sides_b[..., 1] - common
    found = jax.jit(iou)(a, b)
    if jax.default_backend() == "gpu":  # where XLA's division is not correctly rounded
        np.testing.assert_array_max_ulp(np.asarray(found), common / union, maxulp=1)
    else:
        np.testing.assert_array_equal(found, common / union)


def test_sides_change_at_most_62_5_times():
    box = jnp.asarray([[0.0, 0.0, 16.0, 16.0]])
    [[x1, y1, x2, y2]] = decode(box, jnp.asarray([[0.0, 0.0, 50.0, -50.0]]), RPN_DEVIATIONS)
    np.testing.assert_allclose([x2 - x1, y2 - y1], [1000.0, 0.256], rtol=1e-5)


def test_decoding_inverts_encoding(random_boxes):
    rng = np.random.default_rng(0)
    references, boxes = random_boxes(rng, 3, 50), random_boxes(rng, 3, 50)
    there = decode(references, encode(references, boxes, HEAD_DEVIATIONS), HEAD_DEVIATIONS)
    np.testing.assert_allclose(there, boxes, atol=1e-3)


def test_every_image_is_cut_to_its_own_size():
    boxes = jnp.broadcast_to(jnp.asarray([-5.0, -5.0, 500.0, 500.0]), (2, 3, 4))
    found = clip(boxes, jnp.asarray([[10, 20], [30, 40]])[:, None])
    np.testing.assert_array_equal(found[:, 0], [[0, 0, 20, 10], [0, 0, 40, 30]])
