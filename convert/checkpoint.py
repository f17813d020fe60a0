"""From a released file to a checkpoint: recognise the model, rename every tensor, use each exactly once."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from msvmamba_jax.checkpoint import KINDS, Description, Weights, check_output, save_checkpoint
from msvmamba_jax.convert.names import current_name, has_counterpart, to_original, to_ours
from msvmamba_jax.convert.torch_file import StateFile, read_state_file
from msvmamba_jax.data.ade20k import ade20k_class_names
from msvmamba_jax.data.labels import coco_class_names, imagenet_class_names, placeholder_class_names
from msvmamba_jax.errors import InputError
from msvmamba_jax.models.backbone import STAGES
from msvmamba_jax.models.parameters import (
    SHAPE_KEYS,
    Tree,
    abstract_model,
    check_fit,
    count,
    flatten,
    get_parameters,
    get_weights,
    unflatten,
)
from msvmamba_jax.models.variants import VARIANTS

_SECTIONS: dict[Weights, tuple[str, ...]] = {
    "ema": ("model_ema", "ema_state_dict", "state_dict_ema"),
    "raw": ("model", "state_dict", ""),
}

# What tells the model of a dense task: the beginning of a tensor's name.
_MARKS = {"decode_head.": "segmentation", "rpn_head.": "detection", "roi_head.": "detection"}

# The options of a task's models beside those of the backbone: the tensor that shows them, and its axis.
_HEAD_OPTIONS: dict[str, dict[str, tuple[str, int]]] = {
    "classification": {"num_classes": ("classifier.head.weight", 0)},
    "segmentation": {
        "num_classes": ("decode_head.conv_seg.weight", 0),
        "channels": ("decode_head.conv_seg.weight", 1),
        "auxiliary_channels": ("auxiliary_head.conv_seg.weight", 1),
    },
    "detection": {
        "num_classes": ("roi_head.mask_head.conv_logits.weight", 0),
        "channels": ("roi_head.mask_head.conv_logits.weight", 1),
        "hidden": ("roi_head.bbox_head.fc_cls.weight", 1),
    },
}

# The classes of the released models, by task and number.
_CLASS_NAMES: dict[tuple[str, int], Callable[[], tuple[str, ...]]] = {
    ("classification", 1000): imagenet_class_names,
    ("segmentation", 150): ade20k_class_names,
    ("detection", 80): coco_class_names,
}


@dataclasses.dataclass(frozen=True)
class Conversion:
    """A converted file.

    Attributes:
        description: what it is.
        parameters: its weights, running statistics included; float32.
        weights: which of the file's weights they are.
        size: number of trained scalars.
    """

    description: Description
    parameters: Tree
    weights: Weights
    size: int


def convert_file(path: str | Path, weights: Weights | None = None) -> Conversion:
    """Reads a released file as a model of this package; nothing in the file is executed, PyTorch is not needed.

    Args:
        path: a `torch.save` zip file (a training checkpoint with `model` and perhaps `model_ema`, one of mmsegmentation
            with `state_dict`, or a bare state dict) or a safetensors file.
        weights: "ema" or "raw"; None takes the averaged weights where the file has any.

    Raises:
        InputError: the file cannot be read, is of another model, lacks the wanted weights, or tensors are missing, left
            over, of another shape or not finite; the sentence lists all that do not fit.
    """
    path = Path(path)
    file = read_state_file(path)
    state, chosen = _section(path, file, weights)
    try:
        state = _with_current_names(state)
        task, model, mixer = _recognise(state)
        state = {name: tensor for name, tensor in state.items() if has_counterpart(name, task)}
        built = abstract_model(lambda: KINDS[task].create(**model, rngs=SHAPE_KEYS))
        expected = get_weights(built)
        _check(_original(expected, mixer, task), state)
        weights_found = unflatten(to_ours(state, mixer, task))
        check_fit(expected, weights_found)
    except InputError as error:
        raise InputError(f"cannot convert {path}: {error}") from error
    description = Description(
        model=model,
        task=task,
        class_names=_class_names(task, model["num_classes"]),
        preprocessing=KINDS[task].preprocessing(),
        source={"file": path.name, "sha256": file.sha256, "weights": chosen},
    )
    return Conversion(description, weights_found, chosen, count(get_parameters(built)))


def convert(
    path: str | Path, output: str | Path, *, weights: Weights | None = None, overwrite: bool = False
) -> Conversion:
    """`convert_file`, saved as the checkpoint folder `output`.

    Raises:
        InputError: as `convert_file`, or `output` exists or cannot be written. Nothing is written then.
    """
    check_output(output, overwrite)
    conversion = convert_file(path, weights)
    save_checkpoint(output, conversion.description, conversion.parameters, overwrite=overwrite)
    return conversion


def _section(path: Path, file: StateFile, weights: Weights | None) -> tuple[Mapping[str, np.ndarray], Weights]:
    available: dict[Weights, str] = {
        kind: name for kind, names in _SECTIONS.items() for name in names if name in file.tensors_by_section
    }
    if weights is None:
        weights = "ema" if "ema" in available else "raw"
    if weights not in available:
        has = " and ".join("averaged" if kind == "ema" else "raw" for kind in available)
        raise InputError(f"{path} has only {has} weights: pass --weights {next(iter(available))}")
    return file.tensors_by_section[available[weights]], weights


def _with_current_names(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The state dict in float32, under the names of the current release."""
    olds: dict[str, list[str]] = {}
    for old in state:
        olds.setdefault(current_name(old), []).append(old)
    if twice := [" and ".join(names) for names in olds.values() if len(names) > 1]:
        raise InputError(f"tensors that mean the same: {_listed(twice)}")
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite and is reported later
        return {name: np.asarray(state[old], np.float32) for name, [old] in olds.items()}


def _check(expected: Mapping[str, np.ndarray], state: Mapping[str, np.ndarray]) -> None:
    problems = []
    try:
        check_fit(dict(expected), dict(state), "the tensors")
    except InputError as error:
        problems.append(str(error))
    if bad := [name for name, tensor in state.items() if not np.isfinite(tensor).all()]:
        problems.append(f"values that are not finite in {_listed(bad)}")
    if problems:
        raise InputError("; ".join(problems))


def _listed(items: Sequence[str]) -> str:
    return ", ".join(items[:10]) + (f" and {len(items) - 10} more" if len(items) > 10 else "")


def _recognise(state: Mapping[str, np.ndarray]) -> tuple[str, dict[str, Any], str]:
    """The task, the arguments that create its model, and the mixer that names and shapes of a state dict stand for."""
    task = next((_MARKS[mark] for mark in _MARKS if any(name.startswith(mark) for name in state)), "classification")
    prefix = "" if task == "classification" else "backbone."
    stem = state.get(f"{prefix}patch_embed.0.weight")
    scans = [state[name] for name in state if name.endswith(".op.A_logs")]
    if stem is None or stem.ndim != 4 or not scans or scans[0].ndim != 2:
        raise InputError(
            f"it is no MSVMamba or VMamba model (no {prefix}patch_embed.0.weight or no scan parameters A_logs)"
        )
    base = {}
    for option, (name, axis) in _HEAD_OPTIONS[task].items():
        tensor = state.get(name)
        if tensor is None or tensor.ndim < 2:
            raise InputError(f"it has no classifier ({name})")
        base[option] = tensor.shape[axis]
    blocks = [re.match(rf"{re.escape(prefix)}layers\.(\d{{1,4}})\.blocks\.(\d{{1,4}})\.", name) for name in state]
    depths = [0] * STAGES
    for match in filter(None, blocks):
        stage, block = map(int, match.groups())
        if stage >= STAGES:
            raise InputError(f"it has more than {STAGES} stages")
        depths[stage] = max(depths[stage], block + 1)
    if sum(depths) > len(scans):
        raise InputError(f"it names {sum(depths)} blocks, but holds {len(scans)}")
    mixer = "multi_scale" if any(".conv2d_b1." in name for name in state) else "cross_scan"
    found = {"width": stem.shape[0], "depths": tuple(depths), "states": scans[0].shape[1]}
    for name, variant in VARIANTS.items():
        config = variant.backbone
        if config.mixer == mixer and all(getattr(config, key) == value for key, value in found.items()):
            return task, {"name": name, **base}, mixer
    name = next(name for name, variant in VARIANTS.items() if variant.backbone.mixer == mixer)
    return task, {"name": name, **base, **found}, mixer


def _original(expected: Tree, mixer: str, task: str) -> dict[str, np.ndarray]:
    """The original's state dict for the same model, all zeros."""
    zeros = {name: np.broadcast_to(np.float32(0), leaf.shape) for name, leaf in flatten(expected)}
    return to_original(zeros, mixer, task)


def _class_names(task: str, count: int) -> tuple[str, ...]:
    names = _CLASS_NAMES.get((task, count))
    return names() if names else placeholder_class_names(count)
