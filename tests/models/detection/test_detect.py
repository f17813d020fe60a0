"""From proposals to detections, with heads that answer what they are told."""

from __future__ import annotations

import types

import jax
import jax.numpy as jnp
import numpy as np

from msvmamba_jax.models.detection.inference import detect_in
from msvmamba_jax.models.detection.rpn import Proposals

CLASSES = 3
BOXES = np.asarray([[10, 10, 30, 30], [11, 10, 31, 30], [50, 20, 90, 60], [5, 40, 25, 80]], np.float32)
LOGITS = np.asarray([[4, 0, 0, 0], [3, 0, 0, 0], [0, 2, 2, 0], [0, 0, 0, 9]], np.float32)


def model() -> types.SimpleNamespace:
    """Scores follow from where a box begins; boxes move half a width to the right; masks of class c are c - 1."""

    def classify(pyramid, boxes):
        near = jnp.argmin(jnp.abs(boxes[..., None, 0] - BOXES[:, 0]), -1)
        deltas = jnp.broadcast_to(jnp.asarray([5.0, 0.0, 0.0, 0.0]), (*boxes.shape[:2], CLASSES, 4))
        return jnp.asarray(LOGITS)[near], deltas

    def segment(pyramid, boxes):
        return jnp.broadcast_to(jnp.arange(CLASSES, dtype=jnp.float32) - 1.0, (*boxes.shape[:2], 28, 28, CLASSES))

    return types.SimpleNamespace(classify=classify, segment=segment)


def run(boxes: np.ndarray, valid: np.ndarray, size=(70, 100), scale=(2.0, 0.5)):
    proposals = Proposals(jnp.asarray(boxes)[None], jnp.ones((1, len(boxes))), jnp.asarray(valid)[None])
    detect = jax.jit(lambda proposals, size, scale: detect_in(model(), [], proposals, size, scale))
    found = jax.device_get(detect(proposals, jnp.asarray([size]), jnp.asarray([scale])))
    return jax.tree.map(lambda x: x[0], found)


def test_by_hand():
    """The second box falls to the first, the third is of two classes, the last is background."""
    found = run(BOXES, np.ones(4, bool))
    softmax = np.exp(LOGITS) / np.exp(LOGITS).sum(1, keepdims=True)
    expected = [
        (softmax[0, 0], 0, [20, 10, 40, 30]),
        (softmax[2, 1], 1, [70, 20, 100, 60]),  # cut at the image's width
        (softmax[2, 2], 2, [70, 20, 100, 60]),
        (softmax[2, 0], 0, [70, 20, 100, 60]),
    ]
    assert softmax[2, 0] > 0.05 > softmax[0, 1]
    assert found.valid.sum() == len(expected)
    for i, (score, label, box) in enumerate(expected):
        np.testing.assert_allclose(found.score[i], score, rtol=1e-5)
        assert found.label[i] == label
        np.testing.assert_allclose(found.box[i], np.asarray(box) / [2, 0.5, 2, 0.5], rtol=1e-5)
        np.testing.assert_allclose(found.mask[i], 1 / (1 + np.exp(1 - label)), rtol=1e-5)


def test_proposals_that_are_not_valid_do_not_exist():
    more = np.concatenate([BOXES, BOXES + np.float32(20)])
    a, b = run(BOXES, np.ones(4, bool)), run(more, np.arange(8) < 4)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_nothing_to_find():
    found = run(BOXES, np.zeros(4, bool))
    assert not found.valid.any()
    assert not found.score.any()
