"""Segmentation metrics: the matrix against counting by hand, the scores against mmsegmentation's formulas."""

import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msvmamba_jax.command import table
from msvmamba_jax.tasks.segmentation_metrics import ClassScore, SegmentationEvaluator, confusion


def counted(prediction, labels, classes):
    matrix = np.zeros((classes, classes), np.int64)
    for truth, found in zip(labels.ravel().tolist(), prediction.ravel().tolist(), strict=True):
        if truth < classes:
            matrix[truth, found] += 1
    return matrix


@pytest.mark.parametrize("classes", [1, 3, 150, 254])
def test_confusion_counts_every_labelled_pixel(classes):
    rng = np.random.default_rng(classes)
    labels = rng.integers(0, classes, (4, 13, 17), np.uint8)
    labels[rng.random(labels.shape) < 0.2] = 255
    prediction = rng.integers(0, classes, labels.shape, np.int32)
    found = jax.jit(jax.vmap(lambda p, t: confusion(p, t, classes)))(prediction, labels)
    assert found.dtype == jnp.int32
    for one, p, t in zip(found, prediction, labels, strict=True):
        np.testing.assert_array_equal(one, counted(p, t, classes))


def test_counts_beyond_float32_and_bytes():
    side = 4200  # more pixels than float32 can count one by one
    found = jax.jit(lambda p, t: confusion(p, t, 2))(
        jnp.ones((side, side), jnp.uint8), jnp.ones((side, side), jnp.uint8)
    )
    np.testing.assert_array_equal(found, [[0, 0], [0, side * side]])


def test_labels_beyond_the_classes_count_nowhere():
    labels = jnp.array([[0, 1, 2, 255, -1]], jnp.int32)
    np.testing.assert_array_equal(confusion(jnp.zeros((1, 5), jnp.int32), labels, 2), [[1, 0], [1, 0]])


MATRIX = np.array([[6, 2, 0, 1, 0], [1, 7, 0, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 0], [4, 0, 0, 0, 0]])
NAMES = ("sky", "sea", "never", "only predicted", "always missed")


def evaluated(matrix=MATRIX, names=NAMES):
    evaluator = SegmentationEvaluator(names)
    evaluator.update({"confusion": matrix[None].astype(np.int32)}, np.array([True]))
    return evaluator


def test_scores_by_hand():
    # Unions: 6 + 3 + 5 = 14, 8 + 9 - 7 = 10, none, 1, 4. Truth: 9, 8, none, none, 4.
    scores = evaluated().scores()
    assert scores == [
        ClassScore("sky", 6 / 14, 6 / 9, 9),
        ClassScore("sea", 7 / 10, 7 / 8, 8),
        ClassScore("never", None, None, 0),
        ClassScore("only predicted", 0.0, None, 0),
        ClassScore("always missed", 0.0, 0.0, 4),
    ]
    result = evaluated().result()
    assert result == {
        "mIoU": pytest.approx((6 / 14 + 7 / 10 + 0 + 0) / 4, rel=1e-12),
        "mean_accuracy": pytest.approx((6 / 9 + 7 / 8 + 0) / 3, rel=1e-12),
        "pixel_accuracy": 13 / 21,
        "images": 1,
    }
    assert json.loads(json.dumps([score._asdict() for score in scores]))[2] == {
        "name": "never",
        "iou": None,
        "accuracy": None,
        "pixels": 0,
    }


def test_means_equal_mmsegmentations_over_many_batches():
    rng = np.random.default_rng(0)
    classes = 12
    matrices = rng.integers(0, 2**30, (20, classes, classes), np.int32) * (rng.random((classes, classes)) < 0.2)
    matrices[:, 5] = matrices[:, :, 5] = 0
    mask = rng.random(20) < 0.7
    evaluator = SegmentationEvaluator([f"class {i}" for i in range(classes)])
    for part in (slice(0, 8), slice(8, 20)):
        evaluator.update({"confusion": matrices[part]}, mask[part])
    whole = matrices[mask].astype(object).sum(axis=0)  # Python's integers: the sums exceed 32 bits
    assert whole.max() > 2**31
    np.testing.assert_array_equal(evaluator.confusion, whole.astype(np.int64))
    total = whole.astype(np.float64)
    intersect, truth, predicted = np.diag(total), total.sum(1), total.sum(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        expected = {
            "mIoU": np.nanmean(intersect / (truth + predicted - intersect)),
            "mean_accuracy": np.nanmean(intersect / truth),
            "pixel_accuracy": intersect.sum() / truth.sum(),
            "images": mask.sum(),
        }
    assert evaluator.result() == pytest.approx(expected, rel=1e-12)


def test_perfect_and_empty():
    assert evaluated(np.diag([3, 0, 5]), "abc").result() == {
        "mIoU": 1.0,
        "mean_accuracy": 1.0,
        "pixel_accuracy": 1.0,
        "images": 1,
    }
    empty = SegmentationEvaluator("abc")
    assert empty.result() == {"mIoU": 0.0, "mean_accuracy": 0.0, "pixel_accuracy": 0.0, "images": 0}
    empty.update({"confusion": np.ones((2, 3, 3), np.int32)}, np.zeros(2, bool))
    assert empty.result()["images"] == 0


def test_rows_of_a_table():
    assert table(evaluated().per_class()) == (
        "name               iou  accuracy  pixels\n"
        "sky             42.86%    66.67%       9\n"
        "sea             70.00%    87.50%       8\n"
        "never                -         -       0\n"
        "only predicted   0.00%         -       0\n"
        "always missed    0.00%     0.00%       4"
    )
    assert evaluated().sentence().startswith("mIoU 28.21%, mean accuracy 51.39%, pixel accuracy 61.90% on ")
