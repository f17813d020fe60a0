"""Fine-tuning: a new run that starts from the weights of a checkpoint."""

from __future__ import annotations

import dataclasses
import functools
import json
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from msvmamba_jax.checkpoint import KINDS, Description, Weights, available_weights, find_checkpoint, load_checkpoint
from msvmamba_jax.convert.checkpoint import convert_file
from msvmamba_jax.data.labels import placeholder_class_names
from msvmamba_jax.errors import InputError
from msvmamba_jax.models.backbone import BackboneConfig
from msvmamba_jax.models.parameters import check_fit, count, flatten, unflatten
from msvmamba_jax.training.processes import is_main, same
from msvmamba_jax.training.step import State, weights_of

_SIZES = ("mixer", "width", "depths", "states")  # of the options of a backbone, those that its parameters depend on


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """What a checkpoint has for a model.

    Attributes:
        path: the checkpoint folder or the released file.
        source: where the checkpoint's own weights come from, see `Description`.
        weights: which of its weights are taken.
        leaves: the parameters that fit, by dotted name.
        unused: the names of those that do not.
        difference: why less than the whole model was taken, as a clause; empty where nothing stood against it.
    """

    path: Path
    source: Mapping[str, str]
    weights: Weights
    leaves: Mapping[str, np.ndarray]
    unused: tuple[str, ...]
    difference: str


def find_pretrained(config: Any, description: Description, shapes: Mapping[str, Any]) -> Pretrained | None:
    """What a new run starts from: `read_pretrained` of `config.pretrained`, or None where it names no checkpoint.

    Args:
        config: `pretrained` and the options that need it.
        description: the run's model and classes.
        shapes: the model's weights, or anything with their shapes, by dotted name.

    Raises:
        InputError: see `read_pretrained`; or an option needs a checkpoint and none is given.
    """
    if config.pretrained:
        return read_pretrained(Path(config.pretrained).expanduser(), description, shapes)
    if config.freeze_backbone or config.optimizer.layer_decay != 1:
        option = "freeze_backbone" if config.freeze_backbone else "optimizer.layer_decay"
        raise InputError(
            f"config.{option} is for a backbone that has been trained already: give it as "
            f"--config.pretrained=CHECKPOINT, or set --config.{option}={'false' if config.freeze_backbone else 1.0}"
        )
    return None


def with_pretrained(state: State, found: Pretrained, workdir: Path) -> State:
    """The state of a new run with the weights that were found, the averaged ones too.

    Prints one line that says how many parameters come from the checkpoint; `pretrained.json` in `workdir` lists them.
    Everything stays on its devices as it was sharded.

    Args:
        state: see `initial_state`.
        found: what goes into it.
        workdir: the run's folder.

    Raises:
        InputError: the processes of the run have found different weights. All must call it.
    """
    checksum = functools.reduce(lambda value, x: zlib.crc32(x.tobytes(), value), found.leaves.values(), 0)
    if not same(checksum >> 1):
        raise InputError(
            f"{found.path} (config.pretrained) is not the same on all processes: put it where they all read one file"
        )
    shapes = dict(flatten(weights_of(state, "raw")))
    if is_main():
        _report(found, {name: leaf for name, leaf in shapes.items() if name not in found.leaves}, workdir)
    filled = {
        tree: {
            name: _placed(found.leaves[name], old.sharding) if name in found.leaves else old
            for name, old in flatten(state[tree])
        }
        for tree in ("params", "batch_stats", "ema")
        if tree in state
    }
    return {**state, **{tree: unflatten(leaves) for tree, leaves in filled.items()}}


def _placed(leaf: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    # With several processes `device_put` would compare every array among them.
    return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])


def read_pretrained(path: Path, description: Description, shapes: Mapping[str, Any]) -> Pretrained:
    """Reads what fits a model: the whole backbone, and of the rest what has the same name and shape.

    Of a model of another task the backbone alone is taken. The layers with an output for each class are left out where
    the checkpoint's classes are others, or in another order; names that a converter made up ("class 0", ...) contradict
    none. The averaged weights are taken where there are any.

    Args:
        path: a checkpoint folder, a run's workdir (its best checkpoint is taken), or a released PyTorch file, which is
            converted in memory.
        description: the model to be trained and its classes.
        shapes: its weights, or anything with their shapes, by dotted name.

    Raises:
        InputError: there is no checkpoint, it cannot be read, or its backbone is another one.
    """
    if not path.exists():
        raise InputError(f"there is no checkpoint at {path} (config.pretrained): no such file or folder")
    if path.is_file():
        conversion = convert_file(path)
        theirs, parameters, weights = conversion.description, conversion.parameters, conversion.weights
    else:
        path = find_checkpoint(path)
        weights = "ema" if "ema" in available_weights(path) else "raw"
        theirs, parameters = load_checkpoint(path, weights)
    have, want = theirs.backbone, description.backbone
    if different := [key for key in _SIZES if getattr(have, key) != getattr(want, key)]:
        raise InputError(
            f"{path} (config.pretrained) is another model than the one to be trained: it is "
            f"{_name(theirs, have, different)}, not {_name(description, want, different)}; "
            "give config.model as it is there, or choose another checkpoint"
        )
    found = dict(flatten(parameters))
    try:
        check_fit(_part("backbone", shapes), _part("backbone", found))
    except InputError as error:
        raise InputError(f"cannot start from {path} (config.pretrained): {error}") from error
    agree = theirs.class_names in (description.class_names, placeholder_class_names(len(description.class_names)))
    excluded = () if agree else KINDS[theirs.task].class_layers
    leaves = {
        name: leaf
        for name, leaf in found.items()
        if name in shapes
        and np.shape(leaf) == np.shape(shapes[name])
        and (theirs.task == description.task or name.startswith("backbone."))
        and not name.startswith(excluded)
    }
    difference = "" if agree else "the classes are others"
    if theirs.task != description.task:
        difference = f"the checkpoint is for {theirs.task}"
    return Pretrained(path, theirs.source, weights, leaves, tuple(n for n in found if n not in leaves), difference)


def _report(found: Pretrained, new: Mapping[str, Any], workdir: Path) -> None:
    listed = {
        "checkpoint": str(found.path),
        "source": dict(found.source),
        "weights": found.weights,
        "loaded": list(found.leaves),
        "new": list(new),
        "unused": list(found.unused),
    }
    (workdir / "pretrained.json").write_text(json.dumps(listed, indent=2) + "\n")
    kind = "averaged" if found.weights == "ema" else "raw"
    line = f"Starting from {found.path} ({kind} weights): {_amount(found.leaves)} loaded"
    if new:
        line += f", {_amount(new)} new"
        line += f", since {found.difference}" if found.difference else ""
    print(f"{line}; {workdir / 'pretrained.json'} lists them.", flush=True)


def _amount(leaves: Mapping[str, Any]) -> str:
    return f"{count(dict(leaves)):,} parameters ({', '.join(_tops(leaves))})"


def _tops(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(name.partition(".")[0] for name in names))


def _part(module: str, leaves: Mapping[str, Any]) -> dict[str, Any]:
    return {name: leaf for name, leaf in leaves.items() if name.partition(".")[0] == module}


def _name(description: Description, config: BackboneConfig, keys: list[str]) -> str:
    """Such as "msvmamba_nano (width 48)"."""
    return f"{description.model['name']} ({', '.join(f'{key} {getattr(config, key)}' for key in keys)})"
