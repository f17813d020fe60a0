"""Mixup (arXiv:1710.09412) and CutMix (arXiv:1905.04899) on the device, as timm's mode "batch" does it."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from msvmamba_jax.errors import InputError
from msvmamba_jax.tasks.base import Mirror
from msvmamba_jax.tasks.erasing import inside

_STREAM = 0x6D6978  # the keys of this file; beyond the index of any example, whose keys are folded in from 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixing:
    """How the images of a batch are mixed with their partners; off by default.

    One weight, and one box, is drawn for the whole batch.

    Attributes:
        mixup: alpha of mixup's weight, from Beta(alpha, alpha); 0: no mixup.
        cutmix: alpha of CutMix's weight; 0: no CutMix.
        switch_probability: where both are on, the probability that a batch takes CutMix.
        probability: that a batch is mixed at all.

    Raises:
        InputError: on construction, when a value is out of range.
    """

    mixup: float = 0.0
    cutmix: float = 0.0
    switch_probability: float = 0.5
    probability: float = 1.0

    def __post_init__(self) -> None:
        for name in ("mixup", "cutmix"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise InputError(f"config.mix.{name} must be a number of at least 0; got {getattr(self, name)}")
        for name in ("switch_probability", "probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"config.mix.{name} must be a probability in 0..1; got {getattr(self, name)}")

    @property
    def on(self) -> bool:
        """Whether any batch is mixed."""
        return bool((self.mixup or self.cutmix) and self.probability)

    def draw(self, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Draws the weight of an image against its partner (float32) and whether a batch takes CutMix (bool)."""
        mix_key, switch_key, weight_key = jax.random.split(key, 3)
        if self.mixup and self.cutmix:
            cut = jax.random.bernoulli(switch_key, self.switch_probability)
        else:
            cut = jnp.asarray(bool(self.cutmix))
        alpha = jnp.where(cut, jnp.float32(self.cutmix), jnp.float32(self.mixup))
        mixed = jax.random.bernoulli(mix_key, self.probability)
        weight = jnp.where(mixed, jax.random.beta(weight_key, alpha, alpha, dtype=jnp.float32), jnp.float32(1))
        return weight, cut & mixed

    def __call__(
        self, images: jax.Array, targets: jax.Array, batch_key: jax.Array, mirror: Mirror
    ) -> tuple[jax.Array, jax.Array]:
        """Mixes a batch.

        Args:
            images: (b, h, w, c), floating point.
            targets: (b, classes), distributions.
            batch_key: the random key of the whole batch.
            mirror: see `Task.prepare`.

        Returns:
            Images and targets of the same shapes and dtypes.
        """
        if not self.on:
            return images, targets
        draw_key, box_key = jax.random.split(jax.random.fold_in(batch_key, _STREAM))
        weight, cut = self.draw(draw_key)
        height, width = images.shape[1:3]
        top, left, rows, columns = cut_box(box_key, weight, height, width)
        # What the border cuts off the box belongs to the image again.
        weight = jnp.where(cut, 1 - (rows * columns).astype(jnp.float32) / (height * width), weight)
        from_partner = inside(height, width, top, left, rows, columns).astype(images.dtype)
        share = jnp.where(cut, 1 - from_partner, weight.astype(images.dtype))
        return images * share + mirror(images) * (1 - share), mix_targets(targets, weight, mirror)


def mix_targets(targets: jax.Array, weight: jax.Array, mirror: Mirror) -> jax.Array:
    """weight * target + (1 - weight) * the partner's target, for distributions (b, classes)."""
    return targets * weight + mirror(targets) * (1 - weight)


def cut_box(
    key: jax.Array, weight: jax.Array, height: int, width: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Draws CutMix's box, of an area of about 1 - weight, around a pixel anywhere in the image; the border clips it.

    Returns:
        top, left, rows, columns: int32 scalars.
    """
    side = jnp.sqrt(1 - weight)
    centre_keys = jax.random.split(key)

    def span(centre_key: jax.Array, length: int) -> tuple[jax.Array, jax.Array]:
        half = (length * side).astype(jnp.int32) // 2
        centre = jax.random.randint(centre_key, (), 0, length)
        low, high = jnp.clip(centre - half, 0, length), jnp.clip(centre + half, 0, length)
        return low, high - low

    (top, rows), (left, columns) = span(centre_keys[0], height), span(centre_keys[1], width)
    return top, left, rows, columns
