"""The image classifier: backbone, LayerNorm, mean over positions, linear layer."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from msvmamba_jax.errors import InputError
from msvmamba_jax.models.backbone import Backbone, BackboneConfig
from msvmamba_jax.models.compiled import compiled
from msvmamba_jax.models.layers import LayerNorm, linear


class Classifier(nnx.Module):
    """An image classifier; arguments as for `Backbone`, and `num_classes`."""

    def __init__(
        self,
        config: BackboneConfig,
        *,
        num_classes: int,
        dtype: DTypeLike = jnp.float32,
        remat: bool = False,
        scan_implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        if num_classes < 1:
            raise InputError(f"num_classes must be at least 1; got {num_classes}")
        self.num_classes = num_classes
        self.backbone = Backbone(config, dtype=dtype, remat=remat, scan_implementation=scan_implementation, rngs=rngs)
        self.norm = LayerNorm(config.widths[-1], dtype=dtype)
        self.head = linear(config.widths[-1], num_classes, bias=True, dtype=jnp.float32, rngs=rngs)

    @compiled
    def __call__(self, images: jax.Array, keys: jax.Array | None = None) -> jax.Array:
        """Normalised images (b, height, width, 3) -> logits (b, num_classes), float32; `keys` as for `Backbone`."""
        x = self.norm(self.backbone(images, keys)[-1])
        return self.head(jnp.mean(x, axis=(1, 2), dtype=jnp.float32))

    @compiled
    def features(self, images: jax.Array, keys: jax.Array | None = None) -> list[jax.Array]:
        """The maps of the four stages, strides 4, 8, 16 and 32; see `Backbone`."""
        return self.backbone(images, keys)
