"""Greedy non-maximum suppression, exact, with static shapes.

Greedy suppression goes through the boxes by falling score, keeps each that is still alive and removes those that
overlap it by more than the threshold. That a box falls depends on kept boxes of higher score only, so

    kept = alive and not any(kept[j] and overlaps[j, i] for j before i)

has one solution, and iterating it from `kept = alive` reaches that solution in as many steps as the longest chain of
boxes that decide over one another: a handful in practice, each of them one parallel reduction.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from msvmamba_jax.kernels.selective_scan.partitioning import by_image
from msvmamba_jax.models.detection.boxes import area, intersection
from msvmamba_jax.models.detection.top_k import top_k

State = tuple[jax.Array, jax.Array, jax.Array]

BLOCK = 256  # boxes that are decided together; the matrix of their overlaps stays in fast memory


def nms(
    boxes: jax.Array,
    scores: jax.Array,
    threshold: float,
    *,
    groups: jax.Array | None = None,
    valid: jax.Array | None = None,
) -> jax.Array:
    """Which boxes survive; no gradient flows.

    Of equal scores the first counts as higher. Overlap equal to the threshold does not suppress, nor does anything
    suppress, or get suppressed by, a box without area.

    Args:
        boxes: (n, 4).
        scores: (n,), float32.
        threshold: of intersection over union.
        groups: (n,), int: only boxes of one group (class, pyramid level) suppress each other. None: all do.
        valid: (n,), bool: the others do not exist. None: all are valid.

    Returns:
        (n,), bool, in the order of `boxes`.
    """
    boxes, scores = lax.stop_gradient((boxes, scores))
    if groups is None:
        groups = jnp.zeros(scores.shape, jnp.int32)
    if valid is None:
        valid = jnp.ones(scores.shape, bool)
    order = jnp.argsort(jnp.where(valid, scores, -jnp.inf), descending=True)  # stable
    kept = suppress_sorted(boxes[order], valid[order], groups[order], threshold)
    return jnp.zeros_like(kept).at[order].set(kept, unique_indices=True)


def suppress_sorted(boxes: jax.Array, valid: jax.Array, groups: jax.Array, threshold: float) -> jax.Array:
    """`nms` of boxes (n, 4) that come by falling score, with their `valid` (n,), bool, and `groups` (n,), int.

    Time is proportional to n^2, memory to 256 n.
    """
    [[kept]] = _suppress_images(boxes[None], valid[None], groups[None], jnp.asarray(threshold, boxes.dtype))
    return kept


class Selected(NamedTuple):
    """The best of some scores, highest first.

    Attributes:
        place: (count,), int32, where each is among the scores; 0 where `valid` is False.
        valid: (count,), bool: False where there were fewer.
    """

    place: jax.Array
    valid: jax.Array


def select(scores: jax.Array, kept: jax.Array, count: int) -> Selected:
    """The `count` highest of the scores (n,) that are kept (n,), bool; of equal scores the first is the higher."""
    masked = jnp.where(kept, scores, -jnp.inf)
    if scores.shape[0] < count:
        masked = jnp.pad(masked, (0, count - scores.shape[0]), constant_values=-jnp.inf)
    best, index = top_k(masked, count)
    valid = best > -jnp.inf
    return Selected(jnp.where(valid, index, 0), valid)


class Detections(NamedTuple):
    """Of one image, by falling score.

    Attributes:
        box: (count, 4).
        score: (count,), float32; 0 where `valid` is False.
        label: (count,), int32: the class.
        source: (count,), int32: which of the n boxes.
        valid: (count,), bool: False where there were fewer.
    """

    box: jax.Array
    score: jax.Array
    label: jax.Array
    source: jax.Array
    valid: jax.Array


@jax.named_scope("suppression")
def multiclass_nms(
    boxes: jax.Array, scores: jax.Array, *, score_threshold: float, threshold: float, count: int
) -> Detections:
    """Class-wise suppression, of which the first `count` survivors over all classes are wanted.

    Goes through the survivors themselves: `count` times it takes the highest score and removes what the box suppresses
    in its class. That never builds n * classes candidates into pairs, and is exact however many exceed the threshold.

    Args:
        boxes: (n, classes, 4), a box for each class.
        scores: (n, classes), float32.
        score_threshold: scores up to here are dropped.
        threshold: of intersection over union, as for `nms`.
        count: detections at most.
    """
    boxes, scores = lax.stop_gradient((boxes.swapaxes(0, 1), scores.T))
    classes = jnp.arange(scores.shape[0], dtype=jnp.int32)
    alive = jnp.where(scores > score_threshold, scores, -jnp.inf)

    def take(state: State, _: None) -> tuple[State, tuple[jax.Array, ...]]:
        alive, best, best_index = state  # of each class: (classes, n), (classes,), (classes,)
        place = jnp.where(best == jnp.max(best), best_index * classes.size + classes, jnp.iinfo(jnp.int32).max)
        label = lax.argmin(place, 0, jnp.int32)
        index, score = best_index[label], best[label]
        box = boxes[label, index]
        rest = jnp.where(overlaps(box, boxes[label], threshold), -jnp.inf, alive[label]).at[index].set(-jnp.inf)
        winner = lax.argmax(rest, 0, jnp.int32)
        state = alive.at[label].set(rest), best.at[label].set(rest[winner]), best_index.at[label].set(winner)
        return state, (box, score, label, index)

    start = alive, jnp.max(alive, axis=1), lax.argmax(alive, 1, jnp.int32)
    _, (box, score, label, index) = lax.scan(take, start, length=count)
    valid = score > -jnp.inf
    return Detections(
        box=jnp.where(valid[:, None], box, 0.0),
        score=jnp.where(valid, score, 0.0),
        label=jnp.where(valid, label, 0),
        source=jnp.where(valid, index, 0),
        valid=valid,
    )


def overlaps(a: jax.Array, b: jax.Array, threshold: jax.Array | float) -> jax.Array:
    """Whether the overlap of a (..., 4) and b (..., 4) exceeds the threshold; that of a box without area never does."""
    common = intersection(a, b)
    union = area(a) + area(b) - common
    # The quotient rather than common > threshold * union: rounding decides where the overlap equals the threshold.
    return common / jnp.where(common > 0.0, union, 1.0) > threshold


def _suppress_image(boxes: jax.Array, valid: jax.Array, groups: jax.Array, threshold: jax.Array) -> jax.Array:
    count = boxes.shape[0]
    block = min(BLOCK, count)
    blocks = -(-count // block)
    pad = blocks * block - count
    boxes, valid, groups = (jnp.pad(x, ((0, pad), *((0, 0),) * (x.ndim - 1))) for x in (boxes, valid, groups))
    place = jnp.arange(blocks * block)

    def decide(index: jax.Array, alive: jax.Array) -> jax.Array:
        """`alive` is final for earlier blocks and lacks what they suppress; makes it so for one block more."""
        take = lambda x: lax.dynamic_slice_in_dim(x, index * block, block)  # noqa: E731
        against = overlaps(take(boxes)[:, None], boxes, threshold) & (take(groups)[:, None] == groups)
        against &= take(place)[:, None] < place
        within, candidates = lax.dynamic_slice_in_dim(against, index * block, block, axis=1), take(alive)

        def settle(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            kept, _ = state
            new = candidates & ~jnp.any(within & kept[:, None], axis=0)
            return new, jnp.any(new != kept)

        kept, _ = lax.while_loop(lambda state: state[1], settle, (candidates, jnp.any(candidates)))
        return alive & ~jnp.any(against & kept[:, None], axis=0)

    return lax.fori_loop(0, blocks, decide, valid)[:count]


# Without this, devices that hold different images would have to agree before every step of the loop.
_suppress_images = by_image(
    lambda boxes, valid, groups, threshold: (
        jax.vmap(_suppress_image, in_axes=(0, 0, 0, None))(boxes, valid, groups, threshold),
    ),
    shared=(3,),
)
