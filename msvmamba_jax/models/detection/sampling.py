"""A random, balanced choice of examples for a loss (Faster R-CNN, arXiv:1506.01497, section 3.1.3).

Random numbers belong to candidates, not to positions in an array, so a choice does not change with padding.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from msvmamba_jax.models.detection.assignment import NEGATIVE


class Quota(NamedTuple):
    """How many examples an image gives.

    Attributes:
        total: positives and negatives together.
        positives: at most this many; negatives fill the rest as far as there are any.
    """

    total: int
    positives: int


RPN_QUOTA = Quota(256, 128)
HEAD_QUOTA = Quota(512, 128)


def everything(candidates: int) -> Quota:
    """The quota that takes all of so many candidates."""
    return Quota(candidates, candidates)


class Sample(NamedTuple):
    """`total` chosen examples: positives by rising index, then negatives by rising index, then empty places.

    Attributes:
        candidate: (total,), int32; 0 in empty places.
        positive: (total,), bool.
        negative: (total,), bool.
    """

    candidate: jax.Array
    positive: jax.Array
    negative: jax.Array

    @property
    def valid(self) -> jax.Array:
        """(total,), bool: places that are not empty."""
        return self.positive | self.negative


def priorities(key: jax.Array, places: jax.Array) -> jax.Array:
    """A random number from 0 to 2^31 - 1 for each candidate: a function of `key` and the candidate's place alone.

    Args:
        key: typed random key of one image.
        places: (n,), uint32, different for every candidate.

    Returns:
        (n,), int32.
    """
    bits = jax.vmap(lambda place: jax.random.bits(jax.random.fold_in(key, place), dtype=jnp.uint32))(places)
    return (bits >> 1).astype(jnp.int32)


def sample(truth: jax.Array, priority: jax.Array, quota: Quota) -> Sample:
    """Takes the positives of highest priority, then the negatives of highest priority.

    Args:
        truth: (n,), int32, an `Assignment`'s.
        priority: (n,), int32, not negative; see `priorities`.
        quota: how many.
    """
    candidates = truth.shape[0]
    positives, positive = _highest(truth >= 0, priority, min(quota.positives, candidates))
    negatives, negative = _highest(truth == NEGATIVE, priority, min(quota.total, candidates))
    negative &= jnp.arange(negative.shape[0]) < quota.total - jnp.sum(positive)
    # One number for class and index sorts both: positives, negatives, empty places.
    order = jnp.concatenate(
        [jnp.where(positive, positives, 2 * candidates), jnp.where(negative, negatives + candidates, 2 * candidates)]
    )
    order = jnp.sort(jnp.pad(order, (0, quota.total), constant_values=2 * candidates))[: quota.total]
    positive, negative = order < candidates, (order >= candidates) & (order < 2 * candidates)
    index = jnp.where(positive, order, jnp.where(negative, order - candidates, 0))
    return Sample(index, positive, negative)


def _highest(wanted: jax.Array, priority: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Indices (count,) of the wanted candidates of highest priority, highest first, and which of them are wanted."""
    priority, index = lax.top_k(jnp.where(wanted, priority, -1), count)
    return index, priority >= 0
