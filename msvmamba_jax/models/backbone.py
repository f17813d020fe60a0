"""The hierarchical backbone: patch embedding, four stages of blocks, downsampling between them."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from msvmamba_jax.errors import InputError
from msvmamba_jax.models.compiled import compiled
from msvmamba_jax.models.layers import DepthwiseConv, Downsampling, DropPath, LayerNorm, PatchEmbedding, pointwise_conv
from msvmamba_jax.models.mixers import CrossScanMixer, MultiScaleMixer

STAGES = 4
MAX_DEPTH = 1000  # beyond any use; a damaged description must not build for ever
FIRST_FREE_SITE = 2 * STAGES * MAX_DEPTH  # of random decisions outside of the backbone, see `DropPath`


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """What makes a backbone.

    Attributes:
        width: channels of the first stage; every stage doubles them.
        depths: blocks in each of the four stages.
        mixer: "multi_scale" (MSVMamba: with convolutional feed-forward network) or "cross_scan" (VMamba: mixer only).
        states: states per channel.
        drop_path: rate of stochastic depth in the last block; it rises linearly from 0 in the first.
    """

    width: int
    depths: tuple[int, ...]
    mixer: Literal["multi_scale", "cross_scan"] = "multi_scale"
    states: int = 1
    drop_path: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "depths", tuple(self.depths))
        if self.width < 8 or self.width % 4:
            raise InputError(f"width must be a multiple of 4, at least 8; got {self.width}")
        if len(self.depths) != STAGES or min(self.depths) < 1 or max(self.depths) > MAX_DEPTH:
            raise InputError(f"depths must be {STAGES} numbers from 1 to {MAX_DEPTH}; got {self.depths}")
        if self.mixer not in ("multi_scale", "cross_scan"):
            raise InputError(f"mixer must be 'multi_scale' or 'cross_scan'; got {self.mixer!r}")
        if self.states < 1:
            raise InputError(f"states must be at least 1; got {self.states}")
        if not 0.0 <= self.drop_path < 1.0:
            raise InputError(f"drop_path must be in [0, 1); got {self.drop_path}")

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each stage."""
        return tuple(self.width * 2**stage for stage in range(STAGES))


class ConvFFN(nnx.Module):
    """Feed-forward network with a depthwise convolution: 1x1 to twice the width, h + conv(h), GELU, 1x1 back."""

    def __init__(self, features: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.expand = pointwise_conv(features, 2 * features, dtype=dtype, rngs=rngs)
        self.conv = DepthwiseConv(2 * features, 3, dtype=dtype, rngs=rngs)
        self.reduce = pointwise_conv(2 * features, features, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """(b, h, w, c) -> the same shape."""
        h = self.expand(x)
        h = jax.nn.gelu(h + self.conv(h), approximate=False)
        return self.reduce(h)


class Block(nnx.Module):
    """x + drop_path(mixer(norm(x))), then x + drop_path(ffn(norm(x))) where there is a feed-forward network."""

    def __init__(
        self,
        features: int,
        config: BackboneConfig,
        *,
        index: int,
        dtype: DTypeLike,
        scan_implementation: str | None,
        rngs: nnx.Rngs,
    ):
        rate = float(np.linspace(0.0, config.drop_path, sum(config.depths))[index])
        mixer = MultiScaleMixer if config.mixer == "multi_scale" else CrossScanMixer
        self.norm = LayerNorm(features, dtype=dtype)
        self.mixer = mixer(
            features, states=config.states, dtype=dtype, scan_implementation=scan_implementation, rngs=rngs
        )
        self.mixer_drop_path = DropPath(rate, 2 * index)
        if config.mixer == "cross_scan":
            self.ffn = None
        else:
            self.ffn_norm = LayerNorm(features, dtype=dtype)
            self.ffn = ConvFFN(features, dtype=dtype, rngs=rngs)
            self.ffn_drop_path = DropPath(rate, 2 * index + 1)

    def __call__(self, x: jax.Array, keys: jax.Array | None = None) -> jax.Array:
        """(b, h, w, c) -> the same shape; `keys` as for `Backbone`."""
        x = x + self.mixer_drop_path(self.mixer(self.norm(x)), keys)
        if self.ffn is not None:
            x = x + self.ffn_drop_path(self.ffn(self.ffn_norm(x)), keys)
        return x


class Stage(nnx.Module):
    """Blocks of one resolution."""

    def __init__(self, blocks: list[Block], *, remat: bool):
        self.blocks = nnx.List(blocks)
        self.remat = remat

    def __call__(self, x: jax.Array, keys: jax.Array | None = None) -> jax.Array:
        """(b, h, w, c) -> the same shape; `keys` as for `Backbone`."""
        for block in self.blocks:
            x = nnx.remat(Block.__call__)(block, x, keys) if self.remat else block(x, keys)
        return x


class Backbone(nnx.Module):
    """MSVMamba or VMamba without a head.

    Args:
        config: what to build.
        dtype: dtype of the computation; parameters are float32 and so is the scan's state.
        remat: recompute each block in the backward pass instead of keeping its activations.
        scan_implementation: see `kernels.selective_scan.selective_scan_2d`.
        rngs: keys for the parameters.
    """

    def __init__(
        self,
        config: BackboneConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        remat: bool = False,
        scan_implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        self.config = config
        self.dtype = dtype
        self.patch_embedding = PatchEmbedding(config.width, dtype=dtype, rngs=rngs)
        stages, downsamplings, index = [], [], 0
        for stage, (features, depth) in enumerate(zip(config.widths, config.depths, strict=True)):
            if stage:
                downsamplings.append(Downsampling(features // 2, dtype=dtype, rngs=rngs))
            blocks = [
                Block(features, config, index=i, dtype=dtype, scan_implementation=scan_implementation, rngs=rngs)
                for i in range(index, index + depth)
            ]
            stages.append(Stage(blocks, remat=remat))
            index += depth
        self.stages = nnx.List(stages)
        self.downsamplings = nnx.List(downsamplings)

    @compiled
    def __call__(self, images: jax.Array, keys: jax.Array | None = None) -> list[jax.Array]:
        """The output of each stage.

        Args:
            images: normalised RGB images (b, height, width, 3), any size from 4 x 4 pixels.
            keys: None for evaluation. For training with stochastic depth: a typed random key for each image (b,), or
                one key, from which each image's is derived by its place in the batch.

        Returns:
            Four maps (b, h_i, w_i, c_i): h_0 = height // 4, then each half of the one before, rounded up; c_i is
            `config.widths[i]`. In `dtype`.
        """
        keys = keys_of_images(keys, images.shape[0])
        x = self.patch_embedding(images)
        features = []
        for index, stage in enumerate(self.stages):
            if index:
                x = self.downsamplings[index - 1](x)
            x = stage(x, keys)
            features.append(x)
        return features


def keys_of_images(keys: jax.Array | None, count: int) -> jax.Array | None:
    """One key for each of `count` images, from as many (which are returned as they are), from one, or from None."""
    if keys is None or keys.ndim:
        return keys
    return jax.vmap(jax.random.fold_in, (None, 0))(keys, jnp.arange(count))
