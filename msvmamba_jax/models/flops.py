"""Multiply-adds of a forward pass, worked out from shapes, with the rules that the original's published figures follow.

One multiply-add counts as one; biases, activations, sums and products by element do not count. Figures are for one
image. A task's count is a sum of `Flops`: the backbone's at its image size, plus that of each layer of its head.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping

from msvmamba_jax.models.backbone import BackboneConfig
from msvmamba_jax.models.detection.anchors import PER_POSITION
from msvmamba_jax.models.detection.heads import BOX_BINS, MASK_BINS, MASK_LAYERS
from msvmamba_jax.models.layers import PatchEmbedding
from msvmamba_jax.models.mixers import CROSS_ROUTES, FULL_ROUTES, HALF_ROUTES, SqueezeExcitation, delta_rank
from msvmamba_jax.models.upernet import BINS


@dataclasses.dataclass(frozen=True)
class Flops:
    """Multiply-adds of some layers; two of them add up.

    Attributes:
        by_operator: count for each kind of operation.
        einsum_exact: count of the scans' input projections. `by_operator["einsum"]` is the same as the original's tool
            reports it, which reads each figure with four significant digits.
    """

    by_operator: Mapping[str, int] = dataclasses.field(default_factory=dict)
    einsum_exact: int = 0

    def __add__(self, other: Flops) -> Flops:
        by_operator = Counter(self.by_operator)
        by_operator.update(other.by_operator)
        return Flops(dict(by_operator), self.einsum_exact + other.einsum_exact)

    @property
    def total(self) -> int:
        """The figure that the original's tool prints."""
        return sum(self.by_operator.values())

    @property
    def total_with_exact_einsum(self) -> int:
        """The figure without that tool's rounding."""
        return self.total - self.by_operator.get("einsum", 0) + self.einsum_exact


def classifier_flops(config: BackboneConfig, num_classes: int, height: int, width: int) -> Flops:
    """Of `Classifier` on one image of height x width pixels."""
    h, w = stage_sizes(height, width)[-1]
    features = config.widths[-1]
    head = layer_norm(h * w * features) + adaptive_avg_pool(h * w * features) + linear(1, features, num_classes)
    return backbone_flops(config, height, width) + head


def segmenter_flops(config: BackboneConfig, num_classes: int, height: int, width: int, *, channels: int = 512) -> Flops:
    """Of `Segmenter` on one image of height x width pixels, up to its logits, without the auxiliary head."""
    sizes = stage_sizes(height, width)
    positions = [h * w for h, w in sizes]
    total = backbone_flops(config, height, width) + out_norms_flops(config, height, width)

    last = config.widths[-1]
    for cells in BINS:
        total += adaptive_avg_pool(positions[-1] * last) + _conv_unit(last, channels, 1, cells * cells)
        total += upsample_bilinear(positions[-1] * channels)
    total += _conv_unit(last + len(BINS) * channels, channels, 3, positions[-1])
    for features, count in zip(config.widths[:-1], positions[:-1], strict=True):
        # The lateral layer, the level above resized to this one's size, and the output layer.
        total += _conv_unit(features, channels, 1, count) + upsample_bilinear(count * channels)
        total += _conv_unit(channels, channels, 3, count)
    total += upsample_bilinear((len(positions) - 1) * positions[0] * channels)
    total += _conv_unit(len(positions) * channels, channels, 3, positions[0])
    return total + conv(channels, num_classes, 1, positions[0])


def detector_flops(
    config: BackboneConfig,
    num_classes: int,
    height: int,
    width: int,
    *,
    channels: int = 256,
    hidden: int = 1024,
    proposals: int = 1000,
    detections: int = 100,
) -> Flops:
    """Of `Detector` on one image of height x width pixels, with that many proposals, and masks of that many detections.

    RoIAlign and suppression do not count.
    """
    sizes = stage_sizes(height, width)
    positions = [h * w for h, w in sizes]
    total = backbone_flops(config, height, width) + out_norms_flops(config, height, width)

    for features, count in zip(config.widths, positions, strict=True):
        total += conv(features, channels, 1, count) + conv(channels, channels, 3, count)
    total += upsample_nearest(sum(positions[:-1]) * channels)

    anchored = sum(positions) + _half(sizes[-1][0]) * _half(sizes[-1][1])
    total += conv(channels, channels, 3, anchored) + conv(channels, PER_POSITION * (1 + 4), 1, anchored)

    total += linear(proposals, BOX_BINS**2 * channels, hidden) + linear(proposals, hidden, hidden)
    total += linear(proposals, hidden, num_classes + 1) + linear(proposals, hidden, 4 * num_classes)

    cells = detections * MASK_BINS**2
    for _ in range(MASK_LAYERS):
        total += conv(channels, channels, 3, cells)
    return total + conv(channels, channels, 2, cells) + conv(channels, num_classes, 1, 4 * cells)


def out_norms_flops(config: BackboneConfig, height: int, width: int) -> Flops:
    """Of the norms that dense tasks put behind the stages."""
    elements = [h * w * c for (h, w), c in zip(stage_sizes(height, width), config.widths, strict=True)]
    return layer_norm(sum(elements))


def backbone_flops(config: BackboneConfig, height: int, width: int) -> Flops:
    """Of `Backbone` on one image of height x width pixels, without the norms that tasks put behind its stages."""
    sizes = stage_sizes(height, width)
    positions = sizes[0][0] * sizes[0][1]
    total = conv(3, config.width, PatchEmbedding.SIZE, positions) + layer_norm(positions * config.width)
    for stage, (features, depth, (h, w)) in enumerate(zip(config.widths, config.depths, sizes, strict=True)):
        if stage:
            total += layer_norm(h * w * 2 * features) + linear(h * w, 2 * features, features)
        for _ in range(depth):
            total += _block(config, features, h, w)
    return total


def stage_sizes(height: int, width: int) -> list[tuple[int, int]]:
    """Rows and columns of the four stages' maps."""
    h, w = height // PatchEmbedding.SIZE, width // PatchEmbedding.SIZE
    sizes = [(h, w)]
    for _ in range(3):
        h, w = _half(h), _half(w)
        sizes.append((h, w))
    return sizes


def conv(inputs: int, outputs: int, size: int, positions: int, groups: int = 1) -> Flops:
    """A size x size convolution with that many output positions (transposed: input positions)."""
    return Flops({"conv": inputs // groups * outputs * size * size * positions})


def linear(positions: int, inputs: int, outputs: int) -> Flops:
    """A linear layer on that many vectors."""
    return Flops({"linear": positions * inputs * outputs})


def layer_norm(elements: int) -> Flops:
    """A LayerNorm over that many numbers."""
    return Flops({"layer_norm": 5 * elements})


def batch_norm(elements: int) -> Flops:
    """A batch normalisation of that many numbers by running statistics."""
    return Flops({"batch_norm": 2 * elements})


def adaptive_avg_pool(elements: int) -> Flops:
    """A mean over that many numbers."""
    return Flops({"adaptive_avg_pool2d": elements})


def upsample_bilinear(elements: int) -> Flops:
    """A bilinear enlargement to that many numbers."""
    return Flops({"upsample": 4 * elements})


def upsample_nearest(elements: int) -> Flops:
    """An enlargement by nearest neighbours to that many numbers."""
    return Flops({"upsample_nearest": elements})


def _conv_unit(inputs: int, outputs: int, size: int, positions: int) -> Flops:
    return conv(inputs, outputs, size, positions) + batch_norm(positions * outputs)


def _block(config: BackboneConfig, features: int, h: int, w: int) -> Flops:
    positions, inner = h * w, 2 * features
    total = layer_norm(positions * features)
    total += linear(positions, features, 2 * inner) + linear(positions, inner, features)
    total += conv(inner, inner, 3, positions, groups=inner)
    if config.mixer == "cross_scan":
        for _ in CROSS_ROUTES:
            total += _selective_ssm(config, features, positions)
        return total + layer_norm(positions * inner)

    half_positions = _half(h) * _half(w)
    total += conv(inner, inner, 7, half_positions, groups=inner)
    for visits in (len(FULL_ROUTES) * positions, len(HALF_ROUTES) * half_positions):
        total += _selective_ssm(config, features, visits) + layer_norm(visits * inner)
    total += upsample_bilinear(positions * inner)
    squeezed = inner // SqueezeExcitation.RATIO
    total += adaptive_avg_pool(positions * inner) + linear(1, inner, squeezed) + linear(1, squeezed, inner)
    # The feed-forward network, whose 1x1 layers are convolutions in the original.
    total += layer_norm(positions * features) + conv(inner, inner, 3, positions, groups=inner)
    return total + conv(features, inner, 1, positions) + conv(inner, features, 1, positions)


def _selective_ssm(config: BackboneConfig, features: int, visits: int) -> Flops:
    """Projections and scan of a sequence of `visits` positions (each visit projects anew in the original)."""
    inner, rank, states = 2 * features, delta_rank(features), config.states
    projections = (visits * inner * (rank + 2 * states), visits * inner * rank)
    scan = 9 * visits * inner * states + visits * inner
    return Flops({"einsum": sum(map(_four_digits, projections)), "scan": scan}, einsum_exact=sum(projections))


def _four_digits(multiply_adds: int) -> int:
    return math.floor(float(f"{2 * multiply_adds:.3e}") / 2)


def _half(size: int) -> int:
    return -(-size // 2)
