"""The detector: backbone, a LayerNorm behind each stage, and Mask R-CNN (He et al., arXiv:1703.06870) with FPN."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from msvmamba_jax.errors import InputError
from msvmamba_jax.models.backbone import Backbone, BackboneConfig
from msvmamba_jax.models.compiled import compiled
from msvmamba_jax.models.detection.anchors import STRIDES
from msvmamba_jax.models.detection.fpn import FPN
from msvmamba_jax.models.detection.heads import BOX_BINS, MASK_BINS, BoxHead, MaskHead
from msvmamba_jax.models.detection.roi_align import roi_align
from msvmamba_jax.models.detection.rpn import RPNHead
from msvmamba_jax.models.layers import LayerNorm

ROI_LEVELS = 4  # regions are read from these; the fifth level has anchors only


class Detector(nnx.Module):
    """Mask R-CNN. Its parts are called one after the other: see `models.detection.inference` and the task's losses.

    Args:
        config: the backbone.
        num_classes: classes of objects, without the background.
        channels: width of the pyramid, of the RPN and of the mask head.
        hidden: width of the box head.
        dtype: dtype of the computation; parameters, and what the heads give, are float32.
        remat: see `Backbone`.
        scan_implementation: see `kernels.selective_scan.selective_scan_2d`.
        rngs: keys for the parameters.
    """

    def __init__(
        self,
        config: BackboneConfig,
        *,
        num_classes: int,
        channels: int = 256,
        hidden: int = 1024,
        dtype: DTypeLike = jnp.float32,
        remat: bool = False,
        scan_implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        for name, value in (("num_classes", num_classes), ("channels", channels), ("hidden", hidden)):
            if value < 1:
                raise InputError(f"{name} must be at least 1; got {value}")
        self.num_classes = num_classes
        self.backbone = Backbone(config, dtype=dtype, remat=remat, scan_implementation=scan_implementation, rngs=rngs)
        self.out_norms = nnx.List(LayerNorm(width, dtype=dtype) for width in config.widths)
        self.fpn = FPN(config.widths, channels, dtype=dtype, rngs=rngs)
        self.rpn_head = RPNHead(channels, dtype=dtype, rngs=rngs)
        self.box_head = BoxHead(channels, hidden, num_classes, dtype=dtype, rngs=rngs)
        self.mask_head = MaskHead(channels, num_classes, dtype=dtype, rngs=rngs)

    @compiled
    @jax.named_scope("backbone")
    def features(self, images: jax.Array, keys: jax.Array | None = None) -> list[jax.Array]:
        """The normalised maps of the four stages, strides 4, 8, 16 and 32; see `Backbone`."""
        return [norm(x) for norm, x in zip(self.out_norms, self.backbone(images, keys), strict=True)]

    @compiled
    def pyramid(self, images: jax.Array, keys: jax.Array | None = None) -> list[jax.Array]:
        """Five maps (b, h_i, w_i, channels), strides 4 to 64.

        Args:
            images: normalised RGB images (b, height, width, 3), any size from 4 x 4 pixels; zero where one is smaller.
            keys: None for evaluation; for training with stochastic depth, see `Backbone`.
        """
        return self.fpn(self.features(images, keys))

    @compiled
    def classify(self, pyramid: Sequence[jax.Array], boxes: jax.Array) -> tuple[jax.Array, jax.Array]:
        """What the box head says of regions.

        Args:
            pyramid: five maps.
            boxes: (b, r, 4).

        Returns:
            Logits (b, r, classes + 1), background last, and offsets (b, r, classes, 4) from the boxes, both float32.
        """
        return self.box_head(_regions(pyramid, boxes, BOX_BINS))

    @compiled
    def segment(self, pyramid: Sequence[jax.Array], boxes: jax.Array) -> jax.Array:
        """Logits of the masks of regions (b, r, 4): (b, r, 28, 28, classes), float32."""
        return self.mask_head(_regions(pyramid, boxes, MASK_BINS))


def pyramid_sizes(pyramid: Sequence[jax.Array]) -> list[tuple[int, int]]:
    """Rows and columns of each map."""
    return [(x.shape[1], x.shape[2]) for x in pyramid]


def _regions(pyramid: Sequence[jax.Array], boxes: jax.Array, bins: int) -> jax.Array:
    return roi_align(pyramid[:ROI_LEVELS], boxes, strides=STRIDES[:ROI_LEVELS], bins=bins)
