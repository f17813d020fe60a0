"""From a released file to a checkpoint: recognise the model, rename every tensor, use each exactly once."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from msvmamba_jax.checkpoint import Description, Weights, check_output, save_checkpoint
from msvmamba_jax.convert.names import current_name, to_original, to_ours
from msvmamba_jax.convert.torch_file import StateFile, read_state_file
from msvmamba_jax.data.labels import imagenet_class_names, placeholder_class_names
from msvmamba_jax.data.preprocessing import Preprocessing
from msvmamba_jax.errors import InputError
from msvmamba_jax.models.backbone import STAGES
from msvmamba_jax.models.parameters import (
    SHAPE_KEYS,
    Tree,
    abstract_model,
    check_fit,
    flatten,
    get_parameters,
    unflatten,
)
from msvmamba_jax.models.variants import VARIANTS, create_model

_SECTIONS: dict[Weights, tuple[str, ...]] = {
    "ema": ("model_ema", "ema_state_dict", "state_dict_ema"),
    "raw": ("model", "state_dict", ""),
}


@dataclasses.dataclass(frozen=True)
class Conversion:
    """A converted file: what it is, its weights (float32), and which of the file's weights they are."""

    description: Description
    parameters: Tree
    weights: Weights


def convert_file(path: str | Path, weights: Weights | None = None) -> Conversion:
    """Reads a released file as a model of this package; nothing in the file is executed, PyTorch is not needed.

    Args:
        path: a `torch.save` zip file (a training checkpoint with `model` and perhaps `model_ema`, or a bare state dict)
            or a safetensors file.
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
        model, mixer = _recognise(state)
        expected = get_parameters(abstract_model(lambda: create_model(**model, rngs=SHAPE_KEYS)))
        _check(_original(expected, mixer), state)
        flat = to_ours(state, mixer)
        parameters = unflatten(flat)
        check_fit(expected, parameters)
    except InputError as error:
        raise InputError(f"cannot convert {path}: {error}") from error
    description = Description(
        model=model,
        class_names=_class_names(model["num_classes"]),
        preprocessing=Preprocessing(),
        source={"file": path.name, "sha256": file.sha256, "weights": chosen},
    )
    return Conversion(description, parameters, chosen)


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


def _recognise(state: Mapping[str, np.ndarray]) -> tuple[dict[str, Any], str]:
    """The arguments of `create_model` and the mixer that the names and shapes of a state dict stand for."""
    for prefix, task in (("decode_head.", "segmentation"), ("rpn_head.", "detection"), ("roi_head.", "detection")):
        if any(name.startswith(prefix) for name in state):
            raise InputError(f"it is a {task} model, and only classification models can be converted so far")
    stem, head = state.get("patch_embed.0.weight"), state.get("classifier.head.weight")
    scans = [state[name] for name in state if name.endswith(".op.A_logs")]
    if stem is None or stem.ndim != 4 or not scans or scans[0].ndim != 2:
        raise InputError("it is no MSVMamba or VMamba model (no patch_embed.0.weight or no scan parameters A_logs)")
    if head is None or head.ndim != 2:
        raise InputError("it has no classifier (classifier.head.weight)")
    blocks = [re.match(r"layers\.(\d{1,4})\.blocks\.(\d{1,4})\.", name) for name in state]
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
    base = {"num_classes": head.shape[0]}
    for name, variant in VARIANTS.items():
        config = variant.backbone
        if config.mixer == mixer and all(getattr(config, key) == value for key, value in found.items()):
            return {"name": name, **base}, mixer
    name = next(name for name, variant in VARIANTS.items() if variant.backbone.mixer == mixer)
    return {"name": name, **base, **found}, mixer


def _original(expected: Tree, mixer: str) -> dict[str, np.ndarray]:
    """The original's state dict for the same model, all zeros."""
    return to_original({name: np.broadcast_to(np.float32(0), leaf.shape) for name, leaf in flatten(expected)}, mixer)


def _class_names(count: int) -> tuple[str, ...]:
    return imagenet_class_names() if count == 1000 else placeholder_class_names(count)
