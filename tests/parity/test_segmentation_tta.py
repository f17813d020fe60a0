"""Test-time augmentation gives what the original did: six ratios, each with its mirror image, averaged."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from msvmamba_jax.convert.names import to_ours
from msvmamba_jax.data.segmentation_preprocessing import TTA_RATIOS, SegmentationPreprocessing, prepare_tta
from msvmamba_jax.models.parameters import SHAPE_KEYS, abstract_model, bind, unflatten
from msvmamba_jax.models.variants import create_segmenter
from msvmamba_jax.tasks.pixels import normalise
from msvmamba_jax.tasks.segmentation import both_ways

TOLERANCE = 1e-4  # relative L2

pytest.importorskip("cv2")


@pytest.fixture(scope="module")
def recorded(parity):
    return parity.arrays("segmentation/tta.npz")


@pytest.fixture(scope="module")
def model(parity):
    abstract = abstract_model(lambda: create_segmenter("msvmamba_micro", rngs=SHAPE_KEYS))
    weights = parity.state_dict("segmentation/micro.json")
    return bind(abstract, unflatten(to_ours(weights, "multi_scale", "segmentation")))


@pytest.fixture(scope="module")
def images(recorded):
    """One of each ratio, as RGB."""
    return prepare_tta(recorded["raw"][..., ::-1])


@pytest.mark.nightly
@pytest.mark.shifted_sums  # which run in a tenth of the time
def test_logits_of_every_view_and_their_average(recorded, model, images, relative_error):
    height, width = recorded["raw"].shape[:2]
    assert len(images) == len(TTA_RATIOS) == 6
    total = np.zeros((height, width, 150))
    for index, image in enumerate(images):
        views = jax.jit(lambda image: both_ways(model, normalise(image, SegmentationPreprocessing()), height, width))(
            image[None]
        )
        for flip, [logits] in zip((False, True), views, strict=True):
            number = 2 * index + flip
            assert bool(recorded["flip"][number]) == flip
            found = np.asarray(logits).transpose(2, 0, 1)[None, ::10, ::8, ::8]
            assert relative_error(found, recorded[f"logits/{number}/slice"]) < TOLERANCE, number
            total += np.asarray(jax.nn.softmax(logits))
    probabilities = total / 12
    assert relative_error(probabilities.transpose(2, 0, 1)[None, ::5, ::4, ::4], recorded["prob/slice"]) < TOLERANCE
    clear = recorded["margin"] > 1e-5
    assert clear.mean() > 0.99
    np.testing.assert_array_equal(probabilities.argmax(-1)[clear], recorded["argmax"][clear])
