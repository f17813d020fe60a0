"""Which ground-truth box each anchor or proposal is responsible for (Faster R-CNN, arXiv:1506.01497, section 3.1.2)."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from msvmamba_jax.kernels.selective_scan.partitioning import by_image, vary_alike
from msvmamba_jax.models.detection.boxes import iou

Best = tuple[jax.Array, jax.Array, jax.Array]

NEGATIVE = -1  # background
IGNORED = -2  # neither a positive nor a negative example


class Thresholds(NamedTuple):
    """Overlaps (intersection over union) that decide.

    Attributes:
        positive: from here on a candidate belongs to the box that it overlaps most.
        negative: below this it is background; between both it is ignored.
        low_quality: a box whose best overlap reaches this takes every candidate with exactly that overlap, whatever the
            candidate overlaps more. Where several boxes do so, the last one has it.
    """

    positive: float
    negative: float
    low_quality: float


RPN_THRESHOLDS = Thresholds(0.7, 0.3, 0.3)
HEAD_THRESHOLDS = Thresholds(0.5, 0.5, 0.5)


class Assignment(NamedTuple):
    """Of n candidates.

    Attributes:
        truth: (n,), int32: index of the ground-truth box, `NEGATIVE` or `IGNORED`.
        overlap: (n,), float32: the largest overlap with any valid ground-truth box, 0 if there is none.
    """

    truth: jax.Array
    overlap: jax.Array


def assign(
    candidates: jax.Array,
    truths: jax.Array,
    thresholds: Thresholds,
    *,
    valid_candidates: jax.Array | None = None,
    valid_truths: jax.Array | None = None,
) -> Assignment:
    """Assigns candidates of one image to its ground-truth boxes; no gradient flows.

    One ground-truth box is compared with all candidates at a time, so that memory grows with n alone, and the loop ends
    with the last valid box, so that padding costs nothing.

    Args:
        candidates: (n, 4), anchors or proposals.
        truths: (g, 4), ground-truth boxes.
        thresholds: see there.
        valid_candidates: (n,), bool; the others are ignored and decide nothing. None: all are valid.
        valid_truths: (g,), bool; the others (padding, crowds) do not exist. None: all are valid.
    """
    candidates, truths = lax.stop_gradient((candidates, truths))
    if valid_candidates is None:
        valid_candidates = jnp.ones(candidates.shape[0], bool)
    if valid_truths is None:
        valid_truths = jnp.ones(truths.shape[0], bool)
    limits = jnp.asarray(thresholds, candidates.dtype)
    [truth], [overlap] = _assign_images(
        candidates[None], truths[None], valid_candidates[None], valid_truths[None], limits
    )
    return Assignment(truth, overlap)


def _assign_image(
    candidates: jax.Array,
    truths: jax.Array,
    valid_candidates: jax.Array,
    valid_truths: jax.Array,
    thresholds: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    positive, negative, low_quality = thresholds

    def compare(index: jax.Array, best: Best) -> Best:
        overlap, truth, taken_by = best
        own = jnp.where(valid_candidates & valid_truths[index], iou(candidates, truths[index]), -1.0)
        # The test for equality below must see the very numbers whose maximum is taken, not a second evaluation.
        own = lax.optimization_barrier(own)
        highest = jnp.max(own)
        takes = (own == highest) & (highest >= low_quality)
        better = own > overlap
        return (
            jnp.where(better, own, overlap),
            jnp.where(better, index, truth),
            jnp.where(takes, index, taken_by),
        )

    count = jnp.max(jnp.where(valid_truths, jnp.arange(1, truths.shape[0] + 1), 0), initial=0)
    zeros = jnp.zeros(candidates.shape[0], jnp.int32)
    nothing, zeros, _ = vary_alike((jnp.zeros(candidates.shape[0], candidates.dtype), zeros, candidates))
    overlap, truth, taken_by = lax.fori_loop(0, count, compare, (nothing, zeros, zeros - 1))
    truth = jnp.where(overlap >= positive, truth, jnp.where(overlap < negative, NEGATIVE, IGNORED))
    truth = jnp.where(taken_by >= 0, taken_by, truth)
    return jnp.where(valid_candidates, truth, IGNORED), overlap


# Without this, devices that hold different images would have to agree before every step of the loop.
_assign_images = by_image(jax.vmap(_assign_image, in_axes=(0, 0, 0, 0, None)), shared=(4,))
