"""UperNet's decoder (Xiao et al., arXiv:1807.10221) and the auxiliary FCN head, as mmsegmentation builds them."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike

from msvmamba_jax.models.batch_norm import BatchNorm
from msvmamba_jax.models.initializers import kaiming_normal, normal, zeros
from msvmamba_jax.models.layers import ChannelDropout
from msvmamba_jax.models.resize import adaptive_average_pool, resize_bilinear

BINS = (1, 2, 3, 6)
DROPOUT = 0.1


class ConvUnit(nnx.Module):
    """Convolution without bias (`kernel` (i, o) of size 1, or (k, k, i, o)), batch normalisation, ReLU."""

    def __init__(self, inputs: int, outputs: int, size: int, *, axis: str | None, dtype: DTypeLike, rngs: nnx.Rngs):
        shape = (inputs, outputs) if size == 1 else (size, size, inputs, outputs)
        self.kernel = nnx.Param(kaiming_normal(size * size * outputs)(rngs.params(), shape))
        self.bn = BatchNorm(outputs, axis=axis, dtype=dtype)
        self.dtype = dtype

    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """(b, h, w, i) -> (b, h, w, o); `train` as for `BatchNorm`."""
        x, kernel = x.astype(self.dtype), self.kernel[...].astype(self.dtype)
        if kernel.ndim == 2:
            x = x @ kernel
        else:
            x = lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return jax.nn.relu(self.bn(x, train))


class UperNet(nnx.Module):
    """Pyramid pooling on the last stage, a feature pyramid from it down to the first, all levels fused and classified.

    Args:
        widths: channels of the stages' maps.
        channels: channels of every layer.
        num_classes: outputs for each position.
        dropout_site: see `ChannelDropout`.
        axis: see `BatchNorm`.
        dtype: dtype of the computation; logits are float32.
        rngs: keys for the parameters.
    """

    def __init__(
        self,
        widths: Sequence[int],
        *,
        channels: int,
        num_classes: int,
        dropout_site: int,
        axis: str | None,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        def unit(inputs: int, size: int) -> ConvUnit:
            return ConvUnit(inputs, channels, size, axis=axis, dtype=dtype, rngs=rngs)

        *lower, last = widths
        self.pyramid = nnx.List(unit(last, 1) for _ in BINS)
        self.bottleneck = unit(last + len(BINS) * channels, 3)
        self.laterals = nnx.List(unit(width, 1) for width in lower)
        self.outputs = nnx.List(unit(channels, 3) for _ in lower)
        self.fusion = unit(len(widths) * channels, 3)
        self.dropout = ChannelDropout(DROPOUT, dropout_site)
        self.classifier = classifier(channels, num_classes, rngs=rngs)

    def __call__(
        self, features: Sequence[jax.Array], keys: jax.Array | None = None, *, train: bool = False
    ) -> jax.Array:
        """Logits at the size of the first map.

        Args:
            features: maps (b, h_i, w_i, widths[i]), from the largest to the smallest.
            keys: one random key for each image, for dropout; None for none.
            train: see `BatchNorm`.

        Returns:
            (b, h_0, w_0, num_classes), float32.
        """
        return self.classifier(self.dropout(self.fused(features, train), keys))

    def fused(self, features: Sequence[jax.Array], train: bool = False) -> jax.Array:
        """What is classified: (b, h_0, w_0, channels)."""
        levels = [lateral(x, train) for lateral, x in zip(self.laterals, features, strict=False)]
        levels.append(self.pool(features[-1], train))
        for i in reversed(range(len(levels) - 1)):
            levels[i] = levels[i] + resize_bilinear(levels[i + 1], *levels[i].shape[1:3])
        outputs = [output(x, train) for output, x in zip(self.outputs, levels, strict=False)] + levels[-1:]
        height, width = outputs[0].shape[1:3]
        return self.fusion(jnp.concatenate([resize_bilinear(x, height, width) for x in outputs], axis=-1), train)

    def pool(self, x: jax.Array, train: bool = False) -> jax.Array:
        """The last map with its means over coarse grids: (b, h, w, widths[-1]) -> (b, h, w, channels)."""
        height, width = x.shape[1:3]
        pooled = [unit(adaptive_average_pool(x, size), train) for unit, size in zip(self.pyramid, BINS, strict=True)]
        return self.bottleneck(
            jnp.concatenate([x, *(resize_bilinear(y, height, width) for y in pooled)], axis=-1), train
        )


class AuxiliaryHead(nnx.Module):
    """A 3x3 convolution and a classifier on one map: helps the backbone to learn, and is not used afterwards."""

    def __init__(
        self,
        width: int,
        *,
        channels: int,
        num_classes: int,
        dropout_site: int,
        axis: str | None,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.conv = ConvUnit(width, channels, 3, axis=axis, dtype=dtype, rngs=rngs)
        self.dropout = ChannelDropout(DROPOUT, dropout_site)
        self.classifier = classifier(channels, num_classes, rngs=rngs)

    def __call__(self, x: jax.Array, keys: jax.Array | None = None, *, train: bool = False) -> jax.Array:
        """(b, h, w, width) -> logits (b, h, w, num_classes), float32; `keys` and `train` as for `UperNet`."""
        return self.classifier(self.dropout(self.conv(x, train), keys))


def classifier(channels: int, num_classes: int, *, rngs: nnx.Rngs) -> nnx.Linear:
    """A 1x1 convolution in float32, initialised with normal(0.01) and zero bias."""
    init = normal(0.01)
    return nnx.Linear(channels, num_classes, kernel_init=init, bias_init=zeros, dtype=jnp.float32, rngs=rngs)
