"""The table of variants, `create_model`, `create_segmenter` and `create_detector`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from msvmamba_jax.errors import InputError
from msvmamba_jax.kernels.selective_scan import requested_implementation
from msvmamba_jax.models.backbone import BackboneConfig
from msvmamba_jax.models.classifier import Classifier
from msvmamba_jax.models.detector import Detector
from msvmamba_jax.models.segmenter import Segmenter


@dataclasses.dataclass(frozen=True)
class Variant:
    """A named model.

    Attributes:
        backbone: its configuration, with the stochastic depth of its ImageNet recipe.
        reported_top1: ImageNet-1k top-1 accuracy in per cent at 224 x 224 that the original's authors report, if any.
        segmentation_drop_path: stochastic depth of its ADE20K recipe, where it is not that of ImageNet.
    """

    backbone: BackboneConfig
    reported_top1: float | None = None
    segmentation_drop_path: float | None = None


VARIANTS: dict[str, Variant] = {
    # arXiv:2405.14174, table 1.
    "msvmamba_nano": Variant(BackboneConfig(width=48, depths=(1, 2, 5, 2), drop_path=0.2), 77.3, 0.3),
    "msvmamba_micro": Variant(BackboneConfig(width=64, depths=(1, 2, 5, 2), drop_path=0.2), 79.8, 0.3),
    "msvmamba_tiny": Variant(BackboneConfig(width=96, depths=(1, 2, 9, 2), drop_path=0.2), 82.8),
    # The plain VMamba baselines (arXiv:2401.10166, first version).
    "vssm_tiny": Variant(BackboneConfig(width=96, depths=(2, 2, 9, 2), mixer="cross_scan", states=16, drop_path=0.2)),
    "vssm_small": Variant(BackboneConfig(width=96, depths=(2, 2, 27, 2), mixer="cross_scan", states=16, drop_path=0.3)),
    "vssm_base": Variant(BackboneConfig(width=128, depths=(2, 2, 27, 2), mixer="cross_scan", states=16, drop_path=0.5)),
}


def list_models() -> list[str]:
    """Names that `create_model` accepts."""
    return list(VARIANTS)


def backbone_config(
    name: str,
    *,
    width: int | None = None,
    depths: Sequence[int] | None = None,
    states: int | None = None,
    drop_path: float | None = None,
) -> BackboneConfig:
    """The configuration of variant `name`, with the options that are not None in place of its own.

    Raises:
        InputError: an unknown name, or options that make no model.
    """
    if name not in VARIANTS:
        raise InputError(f"there is no model {name!r}; choose one of {', '.join(VARIANTS)}")
    options: dict[str, Any] = {"width": width, "depths": depths, "states": states, "drop_path": drop_path}
    return dataclasses.replace(VARIANTS[name].backbone, **{k: v for k, v in options.items() if v is not None})


def create_model(
    name: str,
    *,
    num_classes: int = 1000,
    width: int | None = None,
    depths: Sequence[int] | None = None,
    states: int | None = None,
    drop_path: float | None = None,
    dtype: DTypeLike | Literal["float32", "bfloat16"] = jnp.float32,
    remat: bool = False,
    scan_implementation: str | None = None,
    rngs: nnx.Rngs,
) -> Classifier:
    """Builds a model with freshly initialised parameters.

    Args:
        name: a variant, see `list_models`.
        num_classes: outputs of the classifier.
        width: channels of the first stage, instead of the variant's.
        depths: blocks of the four stages, instead of the variant's.
        states: states per channel, instead of the variant's.
        drop_path: highest rate of stochastic depth, instead of the variant's ImageNet recipe. It acts only where keys
            are passed to the model.
        dtype: dtype of the computation (float32 or bfloat16); parameters are float32.
        remat: recompute blocks in the backward pass: less memory, about a third more time.
        scan_implementation: see `kernels.selective_scan.selective_scan_2d`.
        rngs: keys, such as `nnx.Rngs(0)`.

    Returns:
        A Flax NNX module: `model(images)` gives logits, `model.features(images)` four maps.

    Raises:
        InputError: an unknown name, options that make no model, or a scan implementation that cannot run here.
    """
    config = backbone_config(name, width=width, depths=depths, states=states, drop_path=drop_path)
    return Classifier(config, num_classes=num_classes, **_how(dtype, remat, scan_implementation), rngs=rngs)


def create_segmenter(
    name: str,
    *,
    num_classes: int = 150,
    channels: int = 512,
    auxiliary_channels: int = 256,
    width: int | None = None,
    depths: Sequence[int] | None = None,
    states: int | None = None,
    drop_path: float | None = None,
    dtype: DTypeLike | Literal["float32", "bfloat16"] = jnp.float32,
    remat: bool = False,
    scan_implementation: str | None = None,
    axis: str | None = None,
    rngs: nnx.Rngs,
) -> Segmenter:
    """Builds a semantic segmenter with freshly initialised parameters.

    Args:
        name: the variant of the backbone, see `list_models`.
        num_classes: outputs for each pixel.
        channels: width of the UperNet head.
        auxiliary_channels: width of the auxiliary head, which serves in training only.
        width: see `create_model`.
        depths: see `create_model`.
        states: see `create_model`.
        drop_path: highest rate of stochastic depth, instead of the variant's ADE20K recipe. It acts only where keys are
            passed to the model.
        dtype: see `create_model`.
        remat: see `create_model`.
        scan_implementation: see `create_model`.
        axis: under `jax.pmap`, the name of the mapped axis, over which batch normalisation averages.
        rngs: keys, such as `nnx.Rngs(0)`.

    Returns:
        A Flax NNX module: `model(images)` gives logits at a quarter of the images' size, `model.features(images)` four
        maps.

    Raises:
        InputError: as `create_model`, and for more than 255 classes.
    """
    if num_classes > 255:
        raise InputError(f"label maps are bytes in which 255 means no class: at most 255 classes; got {num_classes}")
    config = backbone_config(name, width=width, depths=depths, states=states, drop_path=drop_path)
    if drop_path is None and (recipe := VARIANTS[name].segmentation_drop_path) is not None:
        config = dataclasses.replace(config, drop_path=recipe)
    return Segmenter(
        config,
        num_classes=num_classes,
        channels=channels,
        auxiliary_channels=auxiliary_channels,
        axis=axis,
        **_how(dtype, remat, scan_implementation),
        rngs=rngs,
    )


def create_detector(
    name: str,
    *,
    num_classes: int = 80,
    channels: int = 256,
    hidden: int = 1024,
    width: int | None = None,
    depths: Sequence[int] | None = None,
    states: int | None = None,
    drop_path: float | None = None,
    dtype: DTypeLike | Literal["float32", "bfloat16"] = jnp.float32,
    remat: bool = False,
    scan_implementation: str | None = None,
    rngs: nnx.Rngs,
) -> Detector:
    """Builds a detector, Mask R-CNN, with freshly initialised parameters.

    Args:
        name: the variant of the backbone, see `list_models`.
        num_classes: classes of objects, without the background.
        channels: width of the feature pyramid, of the region proposal network and of the mask head.
        hidden: width of the box head.
        width: see `create_model`.
        depths: see `create_model`.
        states: see `create_model`.
        drop_path: highest rate of stochastic depth, instead of the variant's ImageNet recipe, which COCO shares. It
            acts only where keys are passed to the model.
        dtype: see `create_model`.
        remat: see `create_model`.
        scan_implementation: see `create_model`.
        rngs: keys, such as `nnx.Rngs(0)`.

    Returns:
        A Flax NNX module for `models.detection.inference.detect`; `model.pyramid(images)` gives five maps.

    Raises:
        InputError: as `create_model`.
    """
    config = backbone_config(name, width=width, depths=depths, states=states, drop_path=drop_path)
    how = _how(dtype, remat, scan_implementation)
    return Detector(config, num_classes=num_classes, channels=channels, hidden=hidden, **how, rngs=rngs)


def _how(dtype: DTypeLike, remat: bool, scan_implementation: str | None) -> dict[str, Any]:
    """The options of every model that say how it computes and not what, checked."""
    try:
        requested_implementation(scan_implementation)
    except ValueError as error:
        raise InputError(str(error)) from error
    return {"dtype": _compute_dtype(dtype), "remat": remat, "scan_implementation": scan_implementation}


def _compute_dtype(dtype: DTypeLike) -> np.dtype:
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found not in (jnp.float32, jnp.bfloat16, jnp.float64):
        raise InputError(f"dtype must be float32 or bfloat16; got {dtype!r}")
    return found
