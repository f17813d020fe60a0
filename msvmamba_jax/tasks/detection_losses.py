"""The losses of Mask R-CNN (arXiv:1703.06870, section 3) on a batch: targets, examples, and what they cost.

Everything from the network's outputs to the losses has static shapes, so that a training step is one compiled function.
Padding, of ground truths as of images, changes no loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from msvmamba_jax.models.backbone import FIRST_FREE_SITE, keys_of_images
from msvmamba_jax.models.detection.anchors import (
    STRIDES,
    inside,
    level_of_anchors,
    padded_size,
    places_of_anchors,
    pyramid_anchors,
)
from msvmamba_jax.models.detection.assignment import HEAD_THRESHOLDS, IGNORED, RPN_THRESHOLDS, assign
from msvmamba_jax.models.detection.boxes import HEAD_DEVIATIONS, RPN_DEVIATIONS, encode
from msvmamba_jax.models.detection.masks import mask_targets
from msvmamba_jax.models.detection.rpn import TRAINING_LIMITS, ProposalLimits, Proposals, Sizes, propose
from msvmamba_jax.models.detection.sampling import HEAD_QUOTA, RPN_QUOTA, Quota, priorities, sample
from msvmamba_jax.models.detector import Detector, pyramid_sizes

RPN_SITE = FIRST_FREE_SITE  # of the random choices, see `DropPath`
HEAD_SITE = FIRST_FREE_SITE + 1
TRUTH_PLACE = 1 << 24  # of the first ground truth among the candidates, behind any number of proposals


class Truth(NamedTuple):
    """The ground truth of b images, g instances each.

    Attributes:
        box: (b, g, 4), float32, in pixels of the (resized) images, of positive width and height.
        label: (b, g), int32.
        valid: (b, g), bool: False for padding and for crowds, which take no part in training.
        mask: (b, g, height, ceil(width / 8)), uint8: bits, see `models.detection.masks`.
        image_size: (b, 2), int, heights and widths of the images without padding.
    """

    box: jax.Array
    label: jax.Array
    valid: jax.Array
    mask: jax.Array
    image_size: jax.Array


class RPNLosses(NamedTuple):
    """Of each pyramid level (levels,), float32: cross-entropy of anchors' scores, and L1 of their offsets."""

    score: jax.Array
    box: jax.Array


class HeadLosses(NamedTuple):
    """Scalars, float32: entropy of classes, L1 of offsets, entropy of masks; fraction of regions classified right."""

    score: jax.Array
    box: jax.Array
    mask: jax.Array
    accuracy: jax.Array


def detection_loss(
    model: Detector,
    images: jax.Array,
    truth: Truth,
    keys: jax.Array,
    *,
    limits: ProposalLimits = TRAINING_LIMITS,
    rpn_quota: Quota = RPN_QUOTA,
    head_quota: Quota = HEAD_QUOTA,
) -> tuple[jax.Array, Mapping[str, jax.Array]]:
    """The sum of all losses of a batch, and each of them by name, with `head_accuracy`.

    Args:
        model: the detector.
        images: (b, height, width, 3), normalised, then padded with zeros at the bottom and the right.
        truth: the ground truth.
        keys: a typed random key for each image (b,), or one: for stochastic depth and the choice of examples.
        limits: of the proposals.
        rpn_quota: how many anchors of an image count.
        head_quota: how many regions of an image count.
    """
    each = keys_of_images(keys, images.shape[0])
    pyramid = model.pyramid(images, each)
    logits, deltas = model.rpn_head(pyramid)
    sizes = pyramid_sizes(pyramid)
    rpn = rpn_losses(logits, deltas, sizes, truth, each, rpn_quota)
    proposals = propose(logits, deltas, sizes, truth.image_size, limits)
    head = head_losses(model, pyramid, proposals, truth, each, head_quota)
    losses = {
        "rpn_score_loss": jnp.sum(rpn.score),
        "rpn_box_loss": jnp.sum(rpn.box),
        "score_loss": head.score,
        "box_loss": head.box,
        "mask_loss": head.mask,
    }
    return sum(losses.values(), jnp.zeros(())), losses | {"head_accuracy": head.accuracy}


@jax.named_scope("rpn_losses")
def rpn_losses(
    logits: jax.Array,
    deltas: jax.Array,
    sizes: Sizes,
    truth: Truth,
    keys: jax.Array | None,
    quota: Quota = RPN_QUOTA,
) -> RPNLosses:
    """Losses of the region proposal network, divided by the number of chosen anchors of the batch.

    As in the original, an image without any positive (or any negative) example counts one more.

    Args:
        logits: (b, n), of `RPNHead`.
        deltas: (b, n, 4), of `RPNHead`.
        sizes: rows and columns of each level.
        truth: the ground truth.
        keys: (b,); None where the quota takes every anchor.
        quota: how many anchors of an image count.
    """
    anchors, places = pyramid_anchors(sizes), places_of_anchors(sizes)
    strides = STRIDES[: len(sizes)]

    def of_image(
        logits: jax.Array, deltas: jax.Array, truth: Truth, key: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        valid = inside(sizes, padded_size(truth.image_size), strides)
        assigned = assign(anchors, truth.box, RPN_THRESHOLDS, valid_candidates=valid, valid_truths=truth.valid)
        chosen = sample(assigned.truth, _priorities(key, RPN_SITE, places), quota)
        own = anchors[chosen.candidate]
        goal = _offsets(own, truth.box[assigned.truth[chosen.candidate]], chosen.positive, RPN_DEVIATIONS)
        score = jnp.where(chosen.valid, _sigmoid_entropy(logits[chosen.candidate], chosen.positive), 0.0)
        box = jnp.where(chosen.positive, jnp.sum(jnp.abs(deltas[chosen.candidate] - goal), -1), 0.0)
        count = jnp.maximum(jnp.sum(chosen.positive), 1) + jnp.maximum(jnp.sum(chosen.negative), 1)
        return score, box, chosen.candidate, count

    score, box, candidate, count = jax.vmap(of_image)(logits, deltas, truth, keys)
    level = jnp.asarray(level_of_anchors(sizes))[candidate]
    of_level = level[..., None] == jnp.arange(len(sizes))
    divisor = jnp.sum(count).astype(logits.dtype)
    total = lambda x: jnp.sum(jnp.where(of_level, x[..., None], 0.0), axis=(0, 1)) / divisor  # noqa: E731
    return RPNLosses(total(score), total(box))


class Regions(NamedTuple):
    """Regions that the heads learn from, n of each of b images: positives, then negatives, then empty places.

    Attributes:
        box: (b, n, 4).
        truth: (b, n), int32, index of the ground truth; 0 where the region is not positive.
        positive: (b, n), bool.
        valid: (b, n), bool: positive or negative.
    """

    box: jax.Array
    truth: jax.Array
    positive: jax.Array
    valid: jax.Array


@jax.named_scope("regions")
def choose_regions(proposals: Proposals, truth: Truth, keys: jax.Array | None, quota: Quota = HEAD_QUOTA) -> Regions:
    """Chooses regions among the ground-truth boxes and the proposals; `keys` (b,), None if the quota takes all."""
    count = proposals.box.shape[1]

    def of_image(proposals: Proposals, truth: Truth, key: jax.Array | None) -> Regions:
        truths = jnp.arange(truth.valid.size, dtype=jnp.int32)
        assigned = assign(
            proposals.box, truth.box, HEAD_THRESHOLDS, valid_candidates=proposals.valid, valid_truths=truth.valid
        )
        boxes = jnp.concatenate([truth.box, proposals.box])
        owner = jnp.concatenate([jnp.where(truth.valid, truths, IGNORED), assigned.truth])
        places = jnp.concatenate([TRUTH_PLACE + truths, jnp.arange(count, dtype=jnp.int32)]).astype(jnp.uint32)
        chosen = sample(owner, _priorities(key, HEAD_SITE, places), quota)
        return Regions(
            jnp.where(chosen.valid[:, None], boxes[chosen.candidate], 0.0),
            jnp.where(chosen.positive, owner[chosen.candidate], 0),
            chosen.positive,
            chosen.valid,
        )

    return jax.vmap(of_image)(lax.stop_gradient(proposals), truth, keys)


def head_losses(
    model: Detector,
    pyramid: Sequence[jax.Array],
    proposals: Proposals,
    truth: Truth,
    keys: jax.Array | None,
    quota: Quota = HEAD_QUOTA,
) -> HeadLosses:
    """Losses of the box head and the mask head on regions chosen among the proposals; arguments as before."""
    regions = choose_regions(proposals, truth, keys, quota)
    score, box, accuracy = box_losses(*model.classify(pyramid, regions.box), regions, truth)
    # Positives come first, so no other place can hold one.
    first = jax.tree.map(lambda x: x[:, : quota.positives], regions)
    return HeadLosses(score, box, mask_loss(model.segment(pyramid, first.box), first, truth), accuracy)


def box_losses(
    logits: jax.Array, deltas: jax.Array, regions: Regions, truth: Truth
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Losses of the box head, divided by the number of regions of the batch, and the fraction classified correctly.

    Args:
        logits: (b, n, classes + 1), background last.
        deltas: (b, n, classes, 4).
        regions: the n regions.
        truth: the ground truth.
    """
    background = deltas.shape[2]
    label = jnp.take_along_axis(truth.label, regions.truth, axis=1)
    goal_class = jnp.where(regions.positive, label, background)
    goal = _offsets(regions.box, _of_regions(truth.box, regions), regions.positive, HEAD_DEVIATIONS)
    own = jnp.take_along_axis(deltas, label[..., None, None], axis=2)[:, :, 0]

    entropy = jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, goal_class[..., None], axis=-1)[..., 0]
    distance = jnp.sum(jnp.abs(own - goal), -1)
    correct = regions.valid & (jnp.argmax(logits, -1) == goal_class)
    divisor = jnp.maximum(jnp.sum(regions.valid), 1).astype(logits.dtype)
    return (
        jnp.sum(jnp.where(regions.valid, entropy, 0.0)) / divisor,
        jnp.sum(jnp.where(regions.positive, distance, 0.0)) / divisor,
        jnp.sum(correct, dtype=logits.dtype) / divisor,
    )


def mask_loss(logits: jax.Array, regions: Regions, truth: Truth) -> jax.Array:
    """Mean cross-entropy of the pixels of the positive regions' masks, each in the layer of its class; 0 without any.

    Args:
        logits: (b, n, 28, 28, classes).
        regions: the n regions.
        truth: the ground truth.
    """
    goal = jax.vmap(mask_targets)(truth.mask, regions.box, regions.truth, padded_size(truth.image_size))
    label = jnp.take_along_axis(truth.label, regions.truth, axis=1)
    # One-hot by comparison: a gather of one element per pixel would be a scatter in the backward pass.
    hot = label[..., None, None, None] == jnp.arange(logits.shape[-1])
    own = jnp.sum(jnp.where(hot, logits, 0.0), axis=-1)
    mean = jnp.mean(_sigmoid_entropy(own, goal), axis=(2, 3))
    count = jnp.maximum(jnp.sum(regions.positive), 1).astype(logits.dtype)
    return jnp.sum(jnp.where(regions.positive, mean, 0.0)) / count


def _priorities(key: jax.Array | None, site: int, places: jax.Array) -> jax.Array:
    if key is None:
        return jnp.zeros(places.shape, jnp.int32)
    return priorities(jax.random.fold_in(key, site), places)


def _of_regions(boxes: jax.Array, regions: Regions) -> jax.Array:
    """The ground-truth boxes (b, g, 4) that belong to the regions: (b, n, 4)."""
    return jnp.take_along_axis(boxes, regions.truth[..., None], axis=1)


def _offsets(
    references: jax.Array, boxes: jax.Array, positive: jax.Array, deviations: tuple[float, float, float, float]
) -> jax.Array:
    """`encode` where positive; elsewhere boxes may have no size, and the offsets are 0."""
    unit = jnp.asarray([0.0, 0.0, 1.0, 1.0], boxes.dtype)
    references, boxes = (jnp.where(positive[..., None], x, unit) for x in (references, boxes))
    return lax.stop_gradient(encode(references, boxes, deviations))


def _sigmoid_entropy(logits: jax.Array, target: jax.Array) -> jax.Array:
    """Binary cross-entropy of logits with boolean targets, element by element."""
    return jax.nn.softplus(jnp.where(target, -logits, logits))
