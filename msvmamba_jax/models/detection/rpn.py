"""The region proposal network (Faster R-CNN, arXiv:1506.01497, section 3) on a feature pyramid."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.typing import DTypeLike

from msvmamba_jax.models.detection.anchors import PER_POSITION, STRIDES, inside, padded_size, pyramid_anchors
from msvmamba_jax.models.detection.boxes import RPN_DEVIATIONS, clip, decode
from msvmamba_jax.models.detection.layers import Convolution, linear
from msvmamba_jax.models.detection.nms import select, suppress_sorted
from msvmamba_jax.models.detection.top_k import top_k
from msvmamba_jax.models.initializers import normal

THRESHOLD = 0.7  # overlap of proposals of one level

Sizes = Sequence[tuple[int, int]]


class RPNHead(nnx.Module):
    """A 3x3 convolution, and for each anchor of a position whether it shows an object, and where; shared by all levels.

    Args:
        channels: of the pyramid's levels, and of the hidden layer.
        dtype: dtype of the computation; the outputs are float32.
        rngs: keys for the parameters.
    """

    def __init__(self, channels: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        init = normal(0.01)
        self.conv = Convolution(channels, channels, init, dtype=dtype, rngs=rngs)
        self.score = linear(channels, PER_POSITION, init, dtype=jnp.float32, rngs=rngs)
        self.delta = linear(channels, PER_POSITION * 4, init, dtype=jnp.float32, rngs=rngs)

    @jax.named_scope("rpn")
    def __call__(self, pyramid: Sequence[jax.Array]) -> tuple[jax.Array, jax.Array]:
        """Levels (b, h_i, w_i, c) -> logits (b, n), offsets (b, n, 4), float32, in the order of `pyramid_anchors`."""
        batch = pyramid[0].shape[0]
        outputs = [self.level(x) for x in pyramid]
        logits = jnp.concatenate([x.reshape(batch, -1) for x, _ in outputs], axis=1)
        return logits, jnp.concatenate([x.reshape(batch, -1, 4) for _, x in outputs], axis=1)

    def level(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """One level (b, h, w, c) -> logits (b, h, w, 3) and offsets (b, h, w, 3 * 4), float32."""
        x = jax.nn.relu(self.conv(x)).astype(jnp.float32)
        return self.score(x), self.delta(x)


class ProposalLimits(NamedTuple):
    """How many proposals there are at most.

    Attributes:
        before: of each level, taken by score before suppression.
        after: of all levels together, after it.
    """

    before: int
    after: int


TRAINING_LIMITS = ProposalLimits(2000, 1000)
TEST_LIMITS = ProposalLimits(1000, 1000)


class Proposals(NamedTuple):
    """Of each image, by falling score.

    Attributes:
        box: (..., after, 4).
        score: (..., after), float32; 0 where `valid` is False.
        valid: (..., after), bool: False where there were fewer.
    """

    box: jax.Array
    score: jax.Array
    valid: jax.Array


@jax.named_scope("proposals")
def propose(
    logits: jax.Array, deltas: jax.Array, sizes: Sizes, image_sizes: jax.Array, limits: ProposalLimits
) -> Proposals:
    """The boxes that the RPN thinks are objects; no gradient flows.

    Anchors behind an image's own padding propose nothing, so a larger batch shape changes nothing. Boxes are cut to the
    image; those without area are dropped.

    Args:
        logits: (b, n), of `RPNHead`.
        deltas: (b, n, 4), of `RPNHead`.
        sizes: rows and columns of each level.
        image_sizes: (b, 2), int, heights and widths of the images without padding.
        limits: how many.
    """
    logits, deltas = lax.stop_gradient((logits, deltas))
    run = functools.partial(_propose, anchors=pyramid_anchors(sizes), sizes=tuple(sizes), limits=limits)
    return jax.vmap(run)(logits, deltas, jnp.asarray(image_sizes))


def _propose(
    logits: jax.Array,
    deltas: jax.Array,
    image_size: jax.Array,
    *,
    anchors: jax.Array,
    sizes: tuple[tuple[int, int], ...],
    limits: ProposalLimits,
) -> Proposals:
    scores = jnp.where(inside(sizes, padded_size(image_size), STRIDES[: len(sizes)]), jax.nn.sigmoid(logits), -1.0)
    counts = [height * width * PER_POSITION for height, width in sizes]
    kept = min(limits.before, max(counts))

    def best(start: int, count: int) -> tuple[jax.Array, jax.Array]:
        """Indices and scores (kept,) of one level's best anchors, by falling score."""
        score, index = top_k(scores[start : start + count], min(kept, count))
        padding = (0, kept - score.size)
        return jnp.pad(index + start, padding), jnp.pad(score, padding, constant_values=-1.0)

    starts = np.cumsum([0, *counts[:-1]]).tolist()
    levels = [best(start, count) for start, count in zip(starts, counts, strict=True)]
    index, score = (jnp.stack(x) for x in zip(*levels, strict=True))
    boxes = clip(decode(anchors[index], deltas[index], RPN_DEVIATIONS), image_size)
    valid = (score >= 0.0) & (boxes[..., 2] > boxes[..., 0]) & (boxes[..., 3] > boxes[..., 1])
    one_group = jnp.zeros(kept, jnp.int32)
    survive = jax.vmap(lambda boxes, valid: suppress_sorted(boxes, valid, one_group, THRESHOLD))(boxes, valid)
    place, valid = select(score.reshape(-1), survive.reshape(-1), limits.after)
    return Proposals(
        jnp.where(valid[:, None], boxes.reshape(-1, 4)[place], 0.0),
        jnp.where(valid, score.reshape(-1)[place], 0.0),
        valid,
    )
