"""Proposals from the outputs of the region proposal network."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msvmamba_jax.models.detection.anchors import STRIDES, level_anchors
from msvmamba_jax.models.detection.boxes import RPN_DEVIATIONS, clip, decode, iou
from msvmamba_jax.models.detection.rpn import ProposalLimits, propose

SIZES = [(16, 24), (8, 12), (4, 6), (2, 3), (1, 2)]  # of 64 x 96 pixels
LARGER = [(24, 32), (12, 16), (6, 8), (3, 4), (2, 2)]
IMAGES = ((64, 96), (41, 70))  # the second with its own padding: 64 x 96
LIMITS = ProposalLimits(60, 40)


@pytest.fixture(scope="module")
def maps() -> list[np.ndarray]:
    """Logits and offsets (2, rows, columns, 3, 5) of each level."""
    rng = np.random.default_rng(0)
    return [rng.standard_normal((2, *size, 3, 5)).astype(np.float32) for size in LARGER]


def run(maps, sizes, limits=LIMITS):
    x = np.concatenate([x[:, :h, :w].reshape(2, -1, 5) for x, (h, w) in zip(maps, sizes, strict=True)], 1)
    propose_images = jax.jit(functools.partial(propose, sizes=sizes, limits=limits))
    return jax.device_get(propose_images(x[..., 0], x[..., 1:], image_sizes=jnp.asarray(IMAGES)))


def by_loop(maps, image: int, limits: ProposalLimits) -> tuple[np.ndarray, np.ndarray]:
    """Boxes and scores by falling score, one level and one box after the other."""
    found = []
    for x, (height, width), stride in zip(maps, SIZES, STRIDES, strict=True):
        own = x[image, :height, :width].reshape(-1, 5)
        best = np.argsort(-own[:, 0], kind="stable")[: limits.before]
        boxes = clip(decode(level_anchors(height, width, stride), own[:, 1:], RPN_DEVIATIONS), IMAGES[image])
        overlap, boxes, kept = np.asarray(iou(boxes[:, None], boxes)), np.asarray(boxes), []
        for i in best:
            if (boxes[i, 2:] > boxes[i, :2]).all() and not any(overlap[i, j] > 0.7 for j in kept):
                kept.append(i)
        found += [(1 / (1 + np.exp(-own[i, 0].astype(np.float64))), boxes[i]) for i in kept]
    found.sort(key=lambda x: -x[0])
    scores, boxes = zip(*found[: limits.after], strict=True)
    return np.asarray(boxes), np.asarray(scores)


@pytest.mark.parametrize("limits", [LIMITS, ProposalLimits(2000, 100)])
def test_against_a_loop(maps, limits):
    found = run(maps, SIZES, limits)
    for image in range(2):
        boxes, scores = by_loop(maps, image, limits)
        assert found.valid[image].sum() == len(boxes) > 30
        np.testing.assert_allclose(found.box[image][: len(boxes)], boxes, atol=1e-3)
        np.testing.assert_allclose(found.score[image][: len(boxes)], scores, rtol=1e-5)


def test_a_larger_batch_shape_changes_nothing(maps):
    jax.tree.map(np.testing.assert_array_equal, run(maps, SIZES), run(maps, LARGER))


def test_fewer_than_wanted(maps):
    """Anchors behind the image come out of the clipping without area, and are no proposals."""
    found = run(maps, SIZES, ProposalLimits(2000, 3000))
    assert found.box.shape == (2, 3000, 4)
    anchors = sum(3 * h * w for h, w in SIZES)
    for image, (height, width) in enumerate(IMAGES):
        valid = found.valid[image]
        assert 100 < valid.sum() < anchors
        assert not found.box[image][~valid].any()
        assert not found.score[image][~valid].any()
        size = found.box[image, :, 2:] - found.box[image, :, :2]
        assert (size[valid] > 0).all()
        assert (found.box[image] <= [width, height, width, height]).all()
