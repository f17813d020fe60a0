"""Assignment of anchors and proposals to ground truth."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msvmamba_jax.models.detection.assignment import (
    HEAD_THRESHOLDS,
    IGNORED,
    NEGATIVE,
    RPN_THRESHOLDS,
    Thresholds,
)
from msvmamba_jax.models.detection.assignment import (
    assign as assign_eagerly,
)
from msvmamba_jax.models.detection.boxes import iou

assign = jax.jit(assign_eagerly, static_argnums=2)
THRESHOLDS = {"rpn": RPN_THRESHOLDS, "rcnn": HEAD_THRESHOLDS}


@pytest.mark.parametrize("kind", THRESHOLDS)
def test_as_recorded(recorded, largest_error, kind):
    found = assign(jnp.asarray(recorded["assign/anchors"]), jnp.asarray(recorded["assign/gt"]), THRESHOLDS[kind])
    reference = recorded[f"assign/{kind}/gt_inds"]
    assert {-1, 0} <= set(reference) or kind == "rcnn"  # with one threshold nothing is between
    np.testing.assert_array_equal(found.truth + 1, reference)
    assert largest_error(found.overlap, recorded[f"assign/{kind}/max_overlaps"]) < 1e-5
    # The recorded labels say the same: one for each positive.
    np.testing.assert_array_equal(found.truth >= 0, recorded[f"assign/{kind}/labels"] >= 0)


def loop(candidates, truths, thresholds, valid_candidates, valid_truths):
    """The definition, one pair at a time."""
    overlaps = np.asarray(jax.jit(lambda a, b: iou(a[:, None], b))(candidates, truths))
    found = np.full(len(candidates), IGNORED)
    for i in np.flatnonzero(valid_candidates):
        own = [(overlaps[i, g], -g) for g in np.flatnonzero(valid_truths)]
        best, index = max(own, default=(0.0, 0))
        if best >= thresholds.positive:
            found[i] = -index
        elif best < thresholds.negative:
            found[i] = NEGATIVE
    for g in np.flatnonzero(valid_truths):
        best = max(overlaps[valid_candidates, g], default=-1)
        if best >= thresholds.low_quality:
            found[valid_candidates & (overlaps[:, g] == best)] = g
    return found


@pytest.mark.parametrize("seed", range(4))
def test_against_a_loop(random_boxes, seed):
    rng = np.random.default_rng(seed)
    candidates, truths = random_boxes(rng, 200), random_boxes(rng, 7)
    candidates[50:60] = candidates[10:20]  # ties
    candidates[60:67] = truths
    truths[6] = truths[2]
    valid_candidates, valid_truths = rng.random(200) < 0.9, rng.random(7) < 0.8
    for thresholds in (*THRESHOLDS.values(), Thresholds(0.4, 0.2, 0.1)):
        found = assign(
            candidates, truths, thresholds, valid_candidates=valid_candidates, valid_truths=jnp.asarray(valid_truths)
        )
        expected = loop(candidates, truths, thresholds, valid_candidates, valid_truths)
        np.testing.assert_array_equal(found.truth, expected)


def test_a_box_without_a_good_anchor_takes_its_best_ones_all_of_them():
    truths = jnp.asarray([[0.0, 0.0, 10.0, 10.0]])
    anchors = jnp.asarray(
        [[0.0, 0.0, 10.0, 5.0], [0.0, 5.0, 10.0, 10.0], [0.0, 0.0, 10.0, 4.0], [50.0, 0.0, 60.0, 9.0]]
    )
    np.testing.assert_array_equal(assign(anchors, truths, RPN_THRESHOLDS).truth, [0, 0, IGNORED, NEGATIVE])


def test_of_equal_overlaps_the_first_box_wins_but_the_last_takes():
    truths = jnp.asarray([[0, 0, 10, 10]] * 2, jnp.float32)
    candidates = jnp.asarray([[0, 0, 10, 8], [0, 0, 10, 10]], jnp.float32)
    np.testing.assert_array_equal(assign(candidates, truths, RPN_THRESHOLDS).truth, [0, 1])


def test_without_ground_truth_all_are_negative():
    boxes = jnp.asarray([[0.0, 0.0, 10.0, 10.0]] * 3)
    found = assign(boxes, boxes[:2], RPN_THRESHOLDS, valid_truths=jnp.zeros(2, bool))
    np.testing.assert_array_equal(found.truth, [NEGATIVE] * 3)
    np.testing.assert_array_equal(found.overlap, [0.0] * 3)


def test_padding_changes_nothing(random_boxes):
    rng = np.random.default_rng(5)
    candidates, truths = random_boxes(rng, 80), random_boxes(rng, 5)
    expected = assign(candidates, jnp.asarray(truths), RPN_THRESHOLDS)
    more_candidates, more_truths = np.concatenate([candidates, truths]), np.concatenate([truths, candidates[:9]])
    found = assign(
        more_candidates,
        jnp.asarray(more_truths),
        RPN_THRESHOLDS,
        valid_candidates=jnp.arange(85) < 80,
        valid_truths=jnp.arange(14) < 5,
    )
    np.testing.assert_array_equal(found.truth[:80], expected.truth)
    np.testing.assert_array_equal(found.overlap[:80], expected.overlap)
    np.testing.assert_array_equal(found.truth[80:], [IGNORED] * 5)
