"""The segmentation task: what the network is fed in training, and what it says of a pixel."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msvmamba_jax.checkpoint import Description
from msvmamba_jax.data.segmentation_preprocessing import SegmentationPreprocessing
from msvmamba_jax.models.resize import resize_bilinear, resize_bilinear_twice
from msvmamba_jax.tasks.segmentation import IGNORED, Segmentation, best_classes, pixel_logits

CLASSES = 3


def task(**options):
    description = Description(
        model={"name": "msvmamba_nano", "num_classes": CLASSES},
        task="segmentation",
        class_names=tuple("abc"),
        preprocessing=SegmentationPreprocessing(),
    )
    return Segmentation(description=description, **options)


class Slanted:
    """Logits at a quarter of the size, from the mean colour of 4 x 4 pixels and the place: not alike in a mirror."""

    num_classes = CLASSES

    def __call__(self, images, keys=None):
        b, h, w, _ = images.shape
        means = images[:, : h // 4 * 4, : w // 4 * 4].reshape(b, h // 4, 4, w // 4, 4, 3).mean((2, 4))
        slope = jnp.arange(w // 4, dtype=jnp.float32) / w
        return means * jnp.array([1.0, -2.0, 0.5]) + slope[:, None] * jnp.array([3.0, 0.0, -3.0])

    def with_auxiliary(self, images, keys=None, *, train=False):
        assert train
        logits = self(images)
        return logits, 2 * logits[:, ::2, ::2]


@pytest.fixture
def images():
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (2, 20, 28, 3), np.uint8)


def test_padding_is_zero_after_normalisation(images):
    batch = {
        "image": images,
        "labels": np.zeros((2, 20, 28), np.uint8),
        "extent": np.array([[20, 28], [13, 9]], np.int32),
    }
    prepared = task().prepare(batch, None, None, None)
    expected = SegmentationPreprocessing()
    whole = (images / 255 - np.array(expected.mean)) / np.array(expected.std)
    np.testing.assert_allclose(prepared["image"][0], whole[0], atol=1e-5)
    np.testing.assert_allclose(prepared["image"][1, :13, :9], whole[1, :13, :9], atol=1e-5)
    assert not prepared["image"][1, 13:].any()
    assert not prepared["image"][1, :, 9:].any()
    assert prepared["labels"] is batch["labels"]


def test_loss_is_that_of_both_heads(images):
    labels = np.random.default_rng(1).integers(0, CLASSES, (2, 20, 28)).astype(np.uint8)
    labels[:, :4] = IGNORED
    normalised = (images.astype(np.float32) - 128) / 64
    loss, metrics = task().loss(Slanted(), {"image": jnp.asarray(normalised), "labels": labels}, None)

    def entropy(logits):
        logits = np.asarray(resize_bilinear(logits, 20, 28), np.float64)
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        own = np.take_along_axis(log_p, np.minimum(labels, CLASSES - 1)[..., None].astype(int), -1)[..., 0]
        return -own[labels != IGNORED].sum() / labels.size

    logits, auxiliary = Slanted().with_auxiliary(jnp.asarray(normalised), train=True)
    np.testing.assert_allclose(metrics["decode_loss"], entropy(logits), rtol=1e-5)
    np.testing.assert_allclose(metrics["auxiliary_loss"], 0.4 * entropy(auxiliary), rtol=1e-5)
    np.testing.assert_allclose(loss, metrics["decode_loss"] + metrics["auxiliary_loss"], rtol=1e-6)


def test_prediction_at_the_size_of_the_labels(images):
    labels = np.full((2, 31, 25), IGNORED, np.uint8)
    labels[:, 3:20] = 1
    found = task().predict(Slanted(), {"image": images, "labels": labels})
    normalised = (images / 255 - np.array(SegmentationPreprocessing().mean)) / np.array(SegmentationPreprocessing().std)
    logits = resize_bilinear(resize_bilinear(Slanted()(jnp.asarray(normalised, jnp.float32)), 20, 28), 31, 25)
    expected = np.asarray(logits).argmax(-1)
    assert (np.asarray(found["prediction"]) == expected).mean() > 0.999
    assert len(np.unique(expected)) == CLASSES
    assert found["prediction"].dtype == jnp.uint8
    counts = np.stack([np.bincount(p[3:20].ravel(), minlength=3) for p in np.asarray(found["prediction"])])
    np.testing.assert_array_equal(found["confusion"][:, 1], counts)
    assert not np.asarray(found["confusion"])[:, [0, 2]].any()


def test_views_of_test_time_augmentation_are_averaged(images):
    smaller = images[:, ::2, ::2]
    found = task(tta=True).classify(Slanted(), [images, smaller], 17, 19)
    total = 0
    for view in (images, smaller):
        pixels = (view / 255 - np.array(SegmentationPreprocessing().mean)) / np.array(SegmentationPreprocessing().std)
        pixels = jnp.asarray(pixels, jnp.float32)
        for flip in (False, True):
            logits = resize_bilinear(Slanted()(pixels[:, :, ::-1] if flip else pixels), *view.shape[1:3])
            logits = logits[:, :, ::-1] if flip else logits
            total = total + np.asarray(jax.nn.softmax(resize_bilinear(logits, 17, 19)))
    assert (np.asarray(found) == total.argmax(-1)).mean() > 0.999
    single = task().classify(Slanted(), [images], 17, 19)
    assert (np.asarray(single) != np.asarray(found)).mean() > 0.01


@pytest.mark.parametrize(("between", "size"), [((20, 28), (31, 25)), ((8, 9), (3, 40)), ((5, 7), (5, 7))])
def test_resizing_twice_in_one(between, size):
    x = jax.random.normal(jax.random.key(0), (2, 5, 7, 4))
    expected = resize_bilinear(resize_bilinear(x, *between), *size)
    np.testing.assert_allclose(resize_bilinear_twice(x, between, *size), expected, atol=1e-5)


@pytest.mark.parametrize(("height", "rows"), [(31, 8), (16, 16), (5, 64)])
def test_classes_in_bands(images, height, rows):
    pixels = jnp.asarray(images, jnp.float32) / 64 - 2
    logits = pixel_logits(Slanted(), pixels, height, 25)
    labels, probabilities = best_classes(Slanted(), pixels, height, 25, rows)
    assert labels.shape == probabilities.shape == (2, height, 25)
    assert (np.asarray(labels) == np.asarray(logits).argmax(-1)).mean() > 0.999
    np.testing.assert_allclose(probabilities, np.asarray(jax.nn.softmax(logits)).max(-1), rtol=1e-5)
