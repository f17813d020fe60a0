"""The semantic segmenter: backbone, a LayerNorm behind each stage, UperNet, and an auxiliary head for training."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from msvmamba_jax.errors import InputError
from msvmamba_jax.models.backbone import FIRST_FREE_SITE, Backbone, BackboneConfig, keys_of_images
from msvmamba_jax.models.compiled import compiled
from msvmamba_jax.models.layers import LayerNorm
from msvmamba_jax.models.upernet import AuxiliaryHead, UperNet

AUXILIARY_STAGE = 2


class Segmenter(nnx.Module):
    """A semantic segmenter.

    Args:
        config: the backbone.
        num_classes: outputs for each pixel.
        channels: width of UperNet.
        auxiliary_channels: width of the auxiliary head.
        axis: see `BatchNorm`.
        dtype: dtype of the computation; parameters, statistics and logits are float32.
        remat: see `Backbone`.
        scan_implementation: see `kernels.selective_scan.selective_scan_2d`.
        rngs: keys for the parameters.
    """

    def __init__(
        self,
        config: BackboneConfig,
        *,
        num_classes: int,
        channels: int = 512,
        auxiliary_channels: int = 256,
        axis: str | None = None,
        dtype: DTypeLike = jnp.float32,
        remat: bool = False,
        scan_implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        for name, value in (
            ("num_classes", num_classes),
            ("channels", channels),
            ("auxiliary_channels", auxiliary_channels),
        ):
            if value < 1:
                raise InputError(f"{name} must be at least 1; got {value}")
        self.num_classes = num_classes
        self.backbone = Backbone(config, dtype=dtype, remat=remat, scan_implementation=scan_implementation, rngs=rngs)
        self.out_norms = nnx.List(LayerNorm(width, dtype=dtype) for width in config.widths)
        self.decode_head = UperNet(
            config.widths,
            channels=channels,
            num_classes=num_classes,
            dropout_site=FIRST_FREE_SITE,
            axis=axis,
            dtype=dtype,
            rngs=rngs,
        )
        self.auxiliary_head = AuxiliaryHead(
            config.widths[AUXILIARY_STAGE],
            channels=auxiliary_channels,
            num_classes=num_classes,
            dropout_site=FIRST_FREE_SITE + 1,
            axis=axis,
            dtype=dtype,
            rngs=rngs,
        )

    @compiled
    def __call__(self, images: jax.Array, keys: jax.Array | None = None, *, train: bool = False) -> jax.Array:
        """Logits of the classes at a quarter of the images' size.

        Args:
            images: normalised RGB images (b, height, width, 3), any size from 4 x 4 pixels.
            keys: None for evaluation; for training with stochastic depth and dropout, see `Backbone`.
            train: normalise by the statistics of the batch and move the running ones, which this module then holds
                (`get_statistics`).

        Returns:
            (b, height // 4, width // 4, num_classes), float32.
        """
        keys = keys_of_images(keys, images.shape[0])
        return self.decode_head(self.features(images, keys), keys, train=train)

    @compiled
    def with_auxiliary(
        self, images: jax.Array, keys: jax.Array | None = None, *, train: bool = False
    ) -> tuple[jax.Array, jax.Array]:
        """The logits and those of the auxiliary head, at the size of the third stage's map; arguments as for a call."""
        keys = keys_of_images(keys, images.shape[0])
        features = self.features(images, keys)
        logits = self.decode_head(features, keys, train=train)
        return logits, self.auxiliary_head(features[AUXILIARY_STAGE], keys, train=train)

    @compiled
    def features(self, images: jax.Array, keys: jax.Array | None = None) -> list[jax.Array]:
        """The normalised maps of the four stages, strides 4, 8, 16 and 32; see `Backbone`."""
        return [norm(x) for norm, x in zip(self.out_norms, self.backbone(images, keys), strict=True)]
