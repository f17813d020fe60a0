"""Non-maximum suppression."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msvmamba_jax.models.detection import nms as module
from msvmamba_jax.models.detection.nms import multiclass_nms, nms, overlaps, select


def survivors(boxes, scores, threshold, **options) -> np.ndarray:
    """Indices by falling score."""
    scores = jnp.asarray(scores)
    run = lambda boxes, scores, options: select(scores, nms(boxes, scores, threshold, **options), len(scores))  # noqa: E731
    chosen = jax.jit(run)(jnp.asarray(boxes), scores, options)
    return np.asarray(chosen.place)[np.asarray(chosen.valid)]


def greedy(boxes, scores, threshold, groups, valid) -> np.ndarray:
    """The definition, one box at a time."""
    pairs = np.asarray(overlaps(jnp.asarray(boxes)[:, None], jnp.asarray(boxes), threshold))
    alive, kept = valid.copy(), []
    for i in np.argsort(-scores, kind="stable"):
        if alive[i]:
            kept.append(i)
            alive &= ~(pairs[i] & (groups == groups[i]))
    return np.asarray(kept, int)


@pytest.mark.parametrize("threshold", [0.5, 0.7])
def test_as_recorded(recorded, threshold, largest_error):
    boxes, scores, ids = recorded["nms/boxes"], recorded["nms/scores"], jnp.asarray(recorded["nms/ids"], jnp.int32)
    found = survivors(boxes, scores, threshold, groups=ids)
    np.testing.assert_array_equal(found, recorded[f"nms/{threshold}/keep"])
    detections = np.concatenate([boxes[found], scores[found, None]], 1)
    assert largest_error(detections, recorded[f"nms/{threshold}/dets"]) < 1e-5
    np.testing.assert_array_equal(survivors(boxes, scores, threshold), recorded[f"nms/{threshold}/keep_agnostic"])


def test_edge_cases_as_recorded(recorded):
    """Overlap equal to the threshold, equal scores, boxes that are empty or inside out."""
    found = nms(jnp.asarray(recorded["nms/edge/boxes"]), jnp.asarray(recorded["nms/edge/scores"]), 0.5)
    np.testing.assert_array_equal(np.flatnonzero(found), np.sort(recorded["nms/edge/keep"]))


@pytest.mark.parametrize("count", [1, 37, 256, 700])
def test_against_a_loop(random_boxes, count):
    rng = np.random.default_rng(count)
    boxes = random_boxes(rng, count)
    scores = rng.integers(0, 50, count).astype(np.float32)  # with ties
    groups, valid = rng.integers(0, 3, count), rng.random(count) < 0.9
    for threshold in (0.1, 0.3, 0.7):
        found = survivors(boxes, scores, threshold, groups=jnp.asarray(groups), valid=jnp.asarray(valid))
        np.testing.assert_array_equal(found, greedy(boxes, scores, threshold, groups, valid))


def test_a_chain_through_all_blocks(monkeypatch):
    """Each box overlaps its neighbours only, so every second one survives: the longest way to the answer."""
    monkeypatch.setattr(module, "BLOCK", 16)
    left = np.arange(100, dtype=np.float32)[:, None] * 4
    boxes = np.concatenate([left, left * 0, left + 10, left * 0 + 10], 1)  # 6 of 14 in common with the next
    scores = np.linspace(1, 0, 100, dtype=np.float32)
    np.testing.assert_array_equal(survivors(boxes, scores, 0.4), np.arange(0, 100, 2))


def test_invalid_boxes_change_nothing(random_boxes):
    rng = np.random.default_rng(2)
    boxes, scores = random_boxes(rng, 100), rng.random(100).astype(np.float32)
    more_boxes = np.concatenate([boxes, boxes[:30]])
    more_scores = np.concatenate([scores, np.full(30, 9, np.float32)])
    found = survivors(more_boxes, more_scores, 0.3, valid=jnp.arange(130) < 100)
    np.testing.assert_array_equal(found, survivors(boxes, scores, 0.3))


def test_a_batch_is_its_images(random_boxes):
    rng = np.random.default_rng(3)
    boxes, scores = random_boxes(rng, 2, 3, 60), rng.random((2, 3, 60)).astype(np.float32)
    run = lambda boxes, scores: nms(boxes, scores, 0.3)  # noqa: E731
    found = jax.jit(jax.vmap(jax.vmap(run)))(boxes, scores)
    for i in np.ndindex(2, 3):
        np.testing.assert_array_equal(found[i], run(boxes[i], scores[i]))


def test_selection_is_padded():
    chosen = select(jnp.asarray([0.1, 0.9, 0.5]), jnp.asarray([True, False, True]), 5)
    np.testing.assert_array_equal(chosen.place, [2, 0, 0, 0, 0])
    np.testing.assert_array_equal(chosen.valid, [True, True, False, False, False])


OPTIONS = {"score_threshold": 0.05, "threshold": 0.5}
classwise = jax.jit(multiclass_nms, static_argnames=("score_threshold", "threshold", "count"))


class TestClasses:
    def test_as_recorded(self, recorded, largest_error):
        boxes = jnp.asarray(recorded["multiclass/boxes"]).reshape(60, 6, 4)
        scores = jax.nn.softmax(jnp.asarray(recorded["multiclass/logits"]))[:, :-1]
        found = classwise(boxes, scores, count=100, **OPTIONS)
        assert found.valid.all()
        np.testing.assert_array_equal(found.label, recorded["multiclass/labels"])
        np.testing.assert_array_equal(found.source * 6 + found.label, recorded["multiclass/inds"])
        detections = np.concatenate([found.box, found.score[:, None]], 1)
        assert largest_error(detections, recorded["multiclass/dets"]) < 1e-5

    @pytest.mark.parametrize("count", [20, 500])
    def test_against_suppression_of_all_candidates(self, random_boxes, count):
        rng = np.random.default_rng(count)
        boxes = random_boxes(rng, 40, 5)
        scores = (rng.integers(0, 30, (40, 5)) / 40).astype(np.float32)  # with ties, some below the threshold
        found = classwise(jnp.asarray(boxes), jnp.asarray(scores), count=count, **OPTIONS)
        groups, flat = np.tile(np.arange(5), 40), scores.reshape(-1)
        expected = greedy(boxes.reshape(-1, 4), flat, 0.5, groups, flat > 0.05)[:count]
        assert (len(expected) == count) == (count == 20)
        assert found.valid.sum() == len(expected)
        np.testing.assert_array_equal((found.source * 5 + found.label)[: len(expected)], expected)
        np.testing.assert_array_equal(found.box[: len(expected)], boxes.reshape(-1, 4)[expected])
        assert not found.box[len(expected) :].any()
        assert not found.score[len(expected) :].any()

    def test_a_box_without_area_is_found_once(self):
        """Although it does not overlap itself."""
        boxes = jnp.asarray([[[5.0, 5.0, 5.0, 9.0]], [[0.0, 0.0, 9.0, 9.0]]])
        found = classwise(boxes, jnp.asarray([[0.9], [0.8]]), count=4, **OPTIONS)
        np.testing.assert_array_equal(found.source[found.valid], [0, 1])

    def test_nothing_to_find(self):
        found = classwise(jnp.zeros((3, 2, 4)), jnp.full((3, 2), 0.05), count=4, **OPTIONS)
        assert not found.valid.any()
