"""From images to detections: proposals, boxes with classes, suppression, masks. One pure function, static shapes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from msvmamba_jax.models.detection.boxes import HEAD_DEVIATIONS, clip, decode
from msvmamba_jax.models.detection.nms import multiclass_nms
from msvmamba_jax.models.detection.rpn import TEST_LIMITS, ProposalLimits, Proposals, propose
from msvmamba_jax.models.detector import Detector, pyramid_sizes

SCORE_THRESHOLD = 0.05
THRESHOLD = 0.5  # overlap of detections of one class
PER_IMAGE = 100


class Predictions(NamedTuple):
    """Of b images, each by falling score; `models.detection.masks.paste_masks` puts the masks on an image.

    Attributes:
        box: (b, 100, 4), float32, in pixels of the original images.
        score: (b, 100), float32; 0 where `valid` is False.
        label: (b, 100), int32.
        mask: (b, 100, 28, 28), float32: probabilities over the box.
        valid: (b, 100), bool: False where there were fewer detections.
    """

    box: jax.Array
    score: jax.Array
    label: jax.Array
    mask: jax.Array
    valid: jax.Array


def detect(
    model: Detector,
    images: jax.Array,
    image_sizes: jax.Array,
    scales: jax.Array,
    limits: ProposalLimits = TEST_LIMITS,
) -> Predictions:
    """Detects objects.

    Args:
        model: the detector.
        images: (b, height, width, 3), normalised, then padded with zeros at the bottom and the right.
        image_sizes: (b, 2), int, heights and widths without padding.
        scales: (b, 2), float32: by how much width and height were resized from those of the original images.
        limits: of the proposals.
    """
    pyramid = model.pyramid(images)
    proposals = propose(*model.rpn_head(pyramid), pyramid_sizes(pyramid), image_sizes, limits)
    return detect_in(model, pyramid, proposals, image_sizes, scales)


def detect_in(
    model: Detector, pyramid: Sequence[jax.Array], proposals: Proposals, image_sizes: jax.Array, scales: jax.Array
) -> Predictions:
    """`detect` with a given pyramid and given proposals."""
    logits, deltas = model.classify(pyramid, proposals.box)
    scores = jnp.where(proposals.valid[..., None], jax.nn.softmax(logits)[..., :-1], 0.0)
    boxes = decode(proposals.box[:, :, None], deltas, HEAD_DEVIATIONS)
    boxes = clip(boxes, jnp.asarray(image_sizes)[:, None, None])
    found = jax.vmap(
        lambda boxes, scores: multiclass_nms(
            boxes, scores, score_threshold=SCORE_THRESHOLD, threshold=THRESHOLD, count=PER_IMAGE
        )
    )(boxes, scores)
    masks = model.segment(pyramid, found.box)
    masks = jnp.take_along_axis(masks, found.label[:, :, None, None, None], axis=-1)[..., 0]
    scales = jnp.concatenate([scales, scales], -1)[:, None]
    return Predictions(found.box / scales, found.score, found.label, jax.nn.sigmoid(masks), found.valid)
