"""The original's optimisers: AdamW with clipping, the tasks' learning-rate schedules and weight-decay groups.

For fine-tuning, rates that differ by layer, and a backbone that is not trained.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from msvmamba_jax.errors import InputError
from msvmamba_jax.models.parameters import Tree, flatten, unflatten
from msvmamba_jax.training.durations import Clock


def cosine_schedule(
    *, peak: float, warmup_start: float, minimum: float, warmup_steps: int, total_steps: int
) -> optax.Schedule:
    """Linear warm-up from `warmup_start` to `peak`, then half a cosine down to `minimum` at `total_steps`.

    Step 0 is the first update.
    """

    def rate(step: jax.Array | int) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        warm = warmup_start + (peak - warmup_start) * step / max(warmup_steps, 1)
        progress = jnp.clip((step - warmup_steps) / (total_steps - warmup_steps), 0.0, 1.0)
        decayed = minimum + 0.5 * (peak - minimum) * (1.0 + jnp.cos(jnp.pi * progress))
        return jnp.where(step < warmup_steps, warm, decayed)

    return rate


def linear_schedule(
    *, peak: float, warmup_start: float, minimum: float, warmup_steps: int, total_steps: int
) -> optax.Schedule:
    """Linear warm-up from `warmup_start` to `peak`, then a straight line to `minimum`, as MMEngine does it.

    Both lines arrive at their ends with the last step of their part: `peak` is the rate of step `warmup_steps` - 1, and
    of the next one too; `minimum` is that of step `total_steps` - 1.
    """

    def rate(step: jax.Array | int) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        progress = jnp.clip((step - warmup_steps) / max(total_steps - warmup_steps - 1, 1), 0.0, 1.0)
        return jnp.where(
            step < warmup_steps,
            _mmengine_warmup(step, warmup_start, peak, warmup_steps),
            peak + (minimum - peak) * progress,
        )

    return rate


def step_schedule(
    *, peak: float, warmup_start: float, warmup_steps: int, drops: Sequence[int], factor: float = 0.1
) -> optax.Schedule:
    """Linear warm-up from `warmup_start` to `peak`, as MMEngine does it; each step of `drops` scales by `factor`."""

    def rate(step: jax.Array | int) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        dropped = jnp.sum(step >= jnp.asarray(drops, jnp.float32))
        warm = _mmengine_warmup(step, warmup_start, peak, warmup_steps)
        return jnp.where(step < warmup_steps, warm, peak) * factor**dropped

    return rate


def _mmengine_warmup(step: jax.Array, start: float, peak: float, steps: int) -> jax.Array:
    return start + (peak - start) * step / max(steps - 1, 1)


def schedule_of(config: Any, clock: Clock) -> optax.Schedule:
    """The schedule that `config.optimizer` describes, scaled to `config.batch_size`.

    Raises:
        InputError: an unknown schedule, the warm-up is not shorter than the run, or a rate is negative or not finite.
    """
    options = config.optimizer
    if options.batch_size < 1:
        raise InputError(f"config.optimizer.batch_size must be at least 1; got {options.batch_size}")
    scale = config.batch_size / options.batch_size
    rates = {"peak": peak_rate(config), "warmup_start": options.warmup_start * scale}
    rates["minimum"] = options.minimum * scale
    for name, value in rates.items():
        if not (math.isfinite(value) and value >= 0):
            raise InputError(f"the {name} learning rate must be a number of at least 0; got {value}")
    warmup = warmup_steps(config, clock)
    if warmup >= clock.steps:
        raise InputError(
            f"config.optimizer.warmup is {options.warmup!r}, which is not shorter than the run of {clock.steps} steps"
        )
    match options.schedule:
        case "cosine":
            return cosine_schedule(**rates, warmup_steps=warmup, total_steps=clock.steps)
        case "linear":
            return linear_schedule(**rates, warmup_steps=warmup, total_steps=clock.steps)
        case "steps":
            drops = [clock.steps_of("optimizer.drops", drop) for drop in options.drops]
            del rates["minimum"]
            return step_schedule(**rates, warmup_steps=warmup, drops=drops)
    raise InputError(f"unknown config.optimizer.schedule {options.schedule!r}; there are cosine, linear, steps")


def peak_rate(config: Any) -> float:
    """The highest learning rate of `schedule_of`."""
    return config.optimizer.learning_rate * (config.batch_size / config.optimizer.batch_size)


def warmup_steps(config: Any, clock: Clock) -> int:
    """The steps that `schedule_of` warms up for."""
    return clock.steps_of("optimizer.warmup", config.optimizer.warmup, least=0)


def all_but_vectors(parameters: Tree) -> Tree:
    """Which parameters are subject to weight decay in classification: a tree of booleans.

    The original exempts one-dimensional tensors and biases. Its step-size biases are stacked by route, hence
    two-dimensional and not named `bias`: they decay, ours as well.
    """
    return unflatten({name: jnp.ndim(leaf) > 1 or name.endswith("delta_bias") for name, leaf in flatten(parameters)})


def all_but_norms(parameters: Tree) -> Tree:
    """Which parameters are subject to weight decay in segmentation and detection: a tree of booleans.

    The original exempts the tensors with "norm" in their names there. The norm of its patch embedding has a number for
    a name, and the heads' batch normalisations are called "bn": these decay.
    """

    def decays(name: str) -> bool:
        of_backbone = name.startswith(("backbone.", "out_norms."))
        return not of_backbone or "norm" not in name or name.startswith("backbone.patch_embedding.")

    return unflatten({name: decays(name) for name, _ in flatten(parameters)})


def layers(parameters: Tree) -> Tree:
    """The layer of each parameter, counted from the images: a tree of integers.

    Layer 0 is the patch embedding; each block is a layer, with the downsampling before it where there is one; the last
    layer is the head: all that is outside of `backbone`.
    """
    stages = parameters["backbone"]["stages"]
    depths = [len(stages[str(stage)]["blocks"]) for stage in range(len(stages))]
    first = [1 + sum(depths[:stage]) for stage in range(len(depths))]

    def layer(name: str) -> int:
        match name.split("."):
            case ["backbone", "patch_embedding", *_]:
                return 0
            case ["backbone", "downsamplings", index, *_]:
                return first[int(index) + 1]
            case ["backbone", "stages", stage, "blocks", block, *_]:
                return first[int(stage)] + int(block)
        return 1 + sum(depths)

    return unflatten({name: layer(name) for name, _ in flatten(parameters)})


def adamw(
    schedule: optax.Schedule,
    *,
    weight_decay: float,
    clip_norm: float,
    no_decay: str = "vectors",
    layer_decay: float = 1.0,
    freeze_backbone: bool = False,
) -> optax.GradientTransformation:
    """AdamW (0.9, 0.999) after clipping the global norm of the gradient to `clip_norm` (0: no clipping).

    Args:
        schedule: the learning rate, of the head where `layer_decay` is not 1.
        weight_decay: times the learning rate, is taken off all parameters but those of `no_decay`.
        clip_norm: in L2, over all parameters that are trained.
        no_decay: "vectors" (see `all_but_vectors`) or "norms" (see `all_but_norms`).
        layer_decay: the update of a layer, weight decay included, is scaled by this once more than that of the next one
            (as BEiT is fine-tuned, arXiv:2106.08254); see `layers`. 1: all alike, and the state is plain AdamW's.
        freeze_backbone: parameters in `backbone` stay as they are and the state holds nothing of them.

    Raises:
        InputError: `layer_decay` is not in (0, 1], `weight_decay` or `clip_norm` is negative or not finite, or
            `no_decay` is unknown.
    """
    masks: dict[str, Callable[[Tree], Tree]] = {"vectors": all_but_vectors, "norms": all_but_norms}
    if no_decay not in masks:
        raise InputError(f"unknown config.optimizer.no_decay {no_decay!r}; there are {', '.join(masks)}")
    if not 0 < layer_decay <= 1:
        raise InputError(f"config.optimizer.layer_decay must be above 0 and at most 1; got {layer_decay}")
    for name, value in (("weight_decay", weight_decay), ("clip_norm", clip_norm)):
        if not 0 <= value < float("inf"):
            raise InputError(f"config.optimizer.{name} must not be negative, and finite; got {value}")
    clip: list[Any] = [optax.clip_by_global_norm(clip_norm)] if clip_norm else []
    rule = optax.chain(*clip, optax.adamw(schedule, weight_decay=weight_decay, mask=masks[no_decay]))
    if freeze_backbone:  # all that is trained is the head, whose rate is the schedule's
        return _without_backbone(rule)
    return rule if layer_decay == 1 else optax.chain(rule, _scale_by_layer(layer_decay))


def _scale_by_layer(decay: float) -> optax.GradientTransformation:
    def scale(updates: Any, params: Any = None) -> Any:
        of = layers(updates)
        last = max(jax.tree.leaves(of))
        return jax.tree.map(lambda update, layer: update * decay ** (last - layer), updates, of)

    return optax.stateless(scale)


def _without_backbone(rule: optax.GradientTransformation) -> optax.GradientTransformation:
    """`rule` for what is outside of `backbone`, and updates of zero for the rest."""

    def rest(tree: Any) -> Tree:
        return {name: value for name, value in tree.items() if name != "backbone"}

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        trained, state = rule.update(rest(updates), state, rest(params))
        return {**trained, "backbone": jax.tree.map(jnp.zeros_like, updates["backbone"])}, state

    return optax.GradientTransformation(lambda params: rule.init(rest(params)), update)
