"""The original's optimiser: AdamW with clipping, linear warm-up and cosine decay, and its weight-decay groups."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from msvmamba_jax.errors import InputError
from msvmamba_jax.models.parameters import Tree, flatten, unflatten


def cosine_schedule(
    *, peak: float, warmup_start: float, minimum: float, warmup_steps: int, total_steps: int
) -> optax.Schedule:
    """Linear warm-up from `warmup_start` to `peak`, then half a cosine down to `minimum` at `total_steps`.

    Step 0 is the first update.

    Raises:
        InputError: the warm-up is not shorter than the run, or a rate is negative or not finite.
    """
    if not 0 <= warmup_steps < total_steps:
        raise InputError(f"warmup_steps must be in 0..{total_steps - 1} (fewer than the {total_steps} steps in all)")
    for name, value in (("peak", peak), ("warmup_start", warmup_start), ("minimum", minimum)):
        if not (math.isfinite(value) and value >= 0):
            raise InputError(f"the {name} learning rate must be a number of at least 0; got {value}")

    def rate(step: jax.Array | int) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        warm = warmup_start + (peak - warmup_start) * step / max(warmup_steps, 1)
        progress = jnp.clip((step - warmup_steps) / (total_steps - warmup_steps), 0.0, 1.0)
        decayed = minimum + 0.5 * (peak - minimum) * (1.0 + jnp.cos(jnp.pi * progress))
        return jnp.where(step < warmup_steps, warm, decayed)

    return rate


def schedule_of(config: Any, total_steps: int) -> optax.Schedule:
    """The schedule that `config.optimizer` describes for a run of `total_steps`, scaled to `config.batch_size`.

    Raises:
        InputError: see `cosine_schedule`.
    """
    options = config.optimizer
    scale = config.batch_size / options.batch_size
    return cosine_schedule(
        peak=options.learning_rate * scale,
        warmup_start=options.warmup_start * scale,
        minimum=options.minimum * scale,
        warmup_steps=round(options.warmup_fraction * total_steps),
        total_steps=total_steps,
    )


def decay_mask(parameters: Tree) -> Tree:
    """Which parameters are subject to weight decay: a tree of booleans.

    The original exempts one-dimensional tensors and biases. Its step-size biases are stacked by route, hence
    two-dimensional and not named `bias`: they decay, ours as well.
    """
    return unflatten({name: jnp.ndim(leaf) > 1 or name.endswith("delta_bias") for name, leaf in flatten(parameters)})


def adamw(schedule: optax.Schedule, *, weight_decay: float, clip_norm: float) -> optax.GradientTransformation:
    """AdamW (0.9, 0.999) after clipping the global norm of the gradient to `clip_norm` (0: no clipping)."""
    clip: list[Any] = [optax.clip_by_global_norm(clip_norm)] if clip_norm else []
    return optax.chain(*clip, optax.adamw(schedule, weight_decay=weight_decay, mask=decay_mask))
