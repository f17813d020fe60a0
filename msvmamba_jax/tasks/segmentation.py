"""Semantic segmentation: the loss and the accuracy of a batch of label maps."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from msvmamba_jax.models.resize import resize_bilinear

IGNORED = 255  # the label of pixels that nobody is asked about
AUXILIARY_WEIGHT = 0.4


def pixel_cross_entropy(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean cross-entropy over all pixels, to which ignored ones add nothing but their number, and the pixel accuracy.

    This is mmsegmentation's loss with `avg_non_ignore=False`, and its `acc_seg` as a fraction.

    Args:
        logits: (b, h, w, classes), float; resized bilinearly to the size of the labels.
        labels: (b, height, width), integer; a class, or `IGNORED`.

    Returns:
        The loss, and the fraction of the pixels that are not ignored whose largest logit is the label's; 0 where there
        are none. Scalars in the dtype of the logits.
    """
    labels = labels.astype(jnp.int32)
    logits = resize_bilinear(logits, *labels.shape[1:])
    counted = labels != IGNORED
    # One-hot by comparison: a gather of one element per pixel would be a scatter in the backward pass.
    hot = labels[..., None] == jnp.arange(logits.shape[-1], dtype=jnp.int32)
    of_label = jnp.sum(jnp.where(hot, logits, 0), axis=-1)
    entropy = jnp.where(counted, jax.nn.logsumexp(logits, axis=-1) - of_label, 0)
    correct = jnp.sum(counted & (jnp.argmax(logits, axis=-1).astype(labels.dtype) == labels), dtype=logits.dtype)
    accuracy = correct / jnp.maximum(jnp.sum(counted, dtype=logits.dtype), 1)
    return jnp.mean(entropy), accuracy
