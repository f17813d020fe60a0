"""Checkpoints that explain themselves: what is in one, how to write one, and `load_model`.

A checkpoint folder holds two Orbax items: `state` (at least `params`, the weights; a training run adds `ema`, the
averaged weights, and what it needs to go on) and `model`, a small JSON that says how to build the model, what its
classes are called and how images are prepared for it.

What differs between tasks (which function builds a model, how its images are prepared) stands in the table `KINDS`.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from jax.typing import DTypeLike

from msvmamba_jax.data.detection_preprocessing import DetectionPreprocessing
from msvmamba_jax.data.preprocessing import Preprocessing
from msvmamba_jax.data.segmentation_preprocessing import SegmentationPreprocessing
from msvmamba_jax.errors import InputError, writing
from msvmamba_jax.models.backbone import BackboneConfig
from msvmamba_jax.models.flops import Flops, classifier_flops, detector_flops, segmenter_flops
from msvmamba_jax.models.parameters import SHAPE_KEYS, Tree, abstract_model, bind, merge
from msvmamba_jax.models.variants import backbone_config, create_detector, create_model, create_segmenter

FORMAT = 1
BACKBONE_OPTIONS = ("width", "depths", "states", "drop_path")  # of a variant, those that can be given other values
Weights = Literal["ema", "raw"]
_TREES: dict[Weights, str] = {"ema": "ema", "raw": "params"}
_STATISTICS = "batch_stats"  # of the raw weights; the averaged ones hold their own


@dataclasses.dataclass(frozen=True)
class Kind:
    """The models of a task.

    Attributes:
        create: builds one, such as `create_model`.
        options: names of the options of `create` that a checkpoint remembers, beside `name`, `num_classes` and those of
            the backbone.
        class_layers: beginnings of the names of the weights of layers with an output for each class.
        preprocessing: how images are prepared: a class with `to_json`, `from_json` and `nominal_size`.
        flops: of a model: (backbone, the description's `model`, height, width).
        batch_normalised: whether models have batch statistics, and `create` takes the `axis` that they average over.
    """

    create: Callable[..., Any]
    options: tuple[str, ...]
    class_layers: tuple[str, ...]
    preprocessing: Any
    flops: Callable[[BackboneConfig, Mapping[str, Any], int, int], Flops]
    batch_normalised: bool = False

    @property
    def model_options(self) -> tuple[str, ...]:
        """All that `Description.model` may hold beside `name` and `num_classes`."""
        return (*BACKBONE_OPTIONS, *self.options)


KINDS: dict[str, Kind] = {
    "classification": Kind(
        create=create_model,
        options=(),
        class_layers=("head.",),
        preprocessing=Preprocessing,
        flops=lambda config, model, height, width: classifier_flops(config, model["num_classes"], height, width),
    ),
    "segmentation": Kind(
        create=create_segmenter,
        options=("channels", "auxiliary_channels"),
        class_layers=("decode_head.classifier.", "auxiliary_head.classifier."),
        preprocessing=SegmentationPreprocessing,
        flops=lambda config, model, height, width: segmenter_flops(
            config, model["num_classes"], height, width, **{k: v for k, v in model.items() if k == "channels"}
        ),
        batch_normalised=True,
    ),
    "detection": Kind(
        create=create_detector,
        options=("channels", "hidden"),
        class_layers=("box_head.score.", "box_head.delta.", "mask_head.score."),
        preprocessing=DetectionPreprocessing,
        flops=lambda config, model, height, width: detector_flops(
            config, model["num_classes"], height, width, **{k: model[k] for k in ("channels", "hidden") if k in model}
        ),
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Description:
    """What a checkpoint is.

    Attributes:
        model: keyword arguments of the function that builds it (`create_model` for classification): the name and every
            option that makes the parameters what they are.
        task: a key of `KINDS`.
        class_names: one for each class of the model.
        preprocessing: how images are prepared.
        source: where the weights come from, such as the name and SHA-256 of a converted file.
    """

    model: Mapping[str, Any]
    task: str = "classification"
    class_names: tuple[str, ...]
    preprocessing: Any
    source: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.class_names) != self.model["num_classes"]:
            raise InputError(f"{self.model['num_classes']} classes have {len(self.class_names)} names")

    @property
    def backbone(self) -> BackboneConfig:
        """The configuration of the model's backbone."""
        return backbone_config(self.model["name"], **{k: v for k, v in self.model.items() if k in BACKBONE_OPTIONS})

    def build(self, **options: Any) -> nnx.Module:
        """The model, freshly initialised; `options` as for `create_model` (dtype, remat, rngs, ...)."""
        return KINDS[self.task].create(**{**self.model, **options})

    def flops(self, height: int, width: int) -> Flops:
        """Multiply-adds of the model on one image of height x width pixels."""
        return KINDS[self.task].flops(self.backbone, self.model, height, width)

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "format": FORMAT,
            "task": self.task,
            "model": {k: list(v) if isinstance(v, tuple) else v for k, v in self.model.items()},
            "class_names": list(self.class_names),
            "preprocessing": self.preprocessing.to_json(),
            "source": dict(self.source),
        }

    @classmethod
    def from_json(cls, values: Any) -> Description:
        """The inverse of `to_json`.

        Raises:
            InputError: not such a description, or one of a newer format.
        """
        try:
            if values["format"] > FORMAT:
                raise InputError("the checkpoint was written by a newer version of msvmamba_jax: upgrade to read it")
            if values["task"] not in KINDS:
                raise InputError(f"the checkpoint is for the task {values['task']!r}, which this version does not know")
            kind = KINDS[values["task"]]
            model: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values["model"].items()}
            unknown = set(model) - {"name", "num_classes", *kind.model_options}
            if unknown:
                raise InputError(f"the checkpoint's model has unknown options: {', '.join(sorted(unknown))}")
            description = cls(
                model=model,
                task=values["task"],
                class_names=tuple(map(str, values["class_names"])),
                preprocessing=kind.preprocessing.from_json(values["preprocessing"]),
                source={str(k): str(v) for k, v in values["source"].items()},
            )
            description.backbone  # noqa: B018 - raises where the options make none
            return description
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"the checkpoint's description is damaged ({type(error).__name__}: {error})") from error


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint folder that `path` means.

    Args:
        path: a checkpoint folder, or the workdir of a training run (or its `checkpoints` folder): then the checkpoint
            with the best score, or the latest where none has been evaluated.

    Raises:
        InputError: there is no checkpoint.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"there is no checkpoint at {path}: no such folder")
    if path.is_file():
        hint = f"; convert it first: python -m msvmamba_jax.convert {path} OUTPUT" if path.suffix != ".json" else ""
        raise InputError(f"{path} is a file, but a checkpoint is a folder{hint}")
    if _is_checkpoint(path):
        return path
    root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    steps = sorted((p for p in root.iterdir() if p.name.isdigit() and _is_checkpoint(p)), key=lambda p: int(p.name))
    if not steps:
        raise InputError(f"there is no checkpoint in {path}: it has no `state` and `model`, nor a run's `checkpoints`")
    return max(steps, key=lambda step: (_score(step), int(step.name)))


def read_description(path: str | Path) -> Description:
    """What the checkpoint at `path` is, without its weights.

    Args:
        path: see `find_checkpoint`.

    Raises:
        InputError: there is no checkpoint, or its description cannot be read.
    """
    folder = find_checkpoint(path)
    try:
        return Description.from_json(json.loads((folder / "model" / "metadata").read_text()))
    except InputError as error:
        raise InputError(f"cannot read the checkpoint {folder}: {error}") from error
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read the checkpoint {folder}: it is damaged or incomplete ({error})") from error


def load_checkpoint(path: str | Path, weights: Weights | None = None) -> tuple[Description, Tree]:
    """Reads a checkpoint's description and one set of its weights as NumPy arrays.

    Args:
        path: see `find_checkpoint`.
        weights: "ema" for the averaged weights, "raw" for the others; None takes the averaged ones where there are any.

    Raises:
        InputError: there is no checkpoint, it lacks these weights, or it cannot be read.
    """
    folder = find_checkpoint(path)
    description = read_description(folder)
    try:
        trees = _stored_trees(folder)
        name = _TREES[weights or ("ema" if "ema" in trees else "raw")]
        if name not in trees:
            raise InputError(f"it holds no {'averaged' if name == 'ema' else 'raw'} weights")
        wanted = {key: trees[key] for key in (name, _STATISTICS) if key in trees and (key == name or name == "params")}
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
        restore = ocp.args.PyTreeRestore(item=wanted, restore_args=as_numpy, partial_restore=True)
        restored = ocp.PyTreeCheckpointHandler().restore((folder / "state").absolute(), args=restore)
    except InputError as error:
        raise InputError(f"cannot read the checkpoint {folder}: {error}") from error
    except Exception as error:  # Orbax and TensorStore raise many kinds for missing and damaged files
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"cannot read the checkpoint {folder}: it is damaged or incomplete ({reason:.200})") from error
    return description, merge(restored[name], restored.get(_STATISTICS, {}))


def available_weights(path: str | Path) -> list[Weights]:
    """Which weights the checkpoint at `path` holds, "raw" first.

    Raises:
        InputError: as `load_checkpoint`.
    """
    folder = find_checkpoint(path)
    try:
        trees = _stored_trees(folder)
    except Exception as error:
        raise InputError(f"cannot read the checkpoint {folder}: it is damaged or incomplete") from error
    found: list[Weights] = [name for name, tree in reversed(_TREES.items()) if tree in trees]
    if not found:
        raise InputError(f"cannot read the checkpoint {folder}: it holds no weights")
    return found


def load_model(
    path: str | Path,
    *,
    weights: Weights | None = None,
    dtype: DTypeLike | Literal["float32", "bfloat16"] = jnp.float32,
    remat: bool = False,
    scan_implementation: str | None = None,
) -> Any:
    """The model of a converted or trained checkpoint, with its weights.

    Args:
        path: a checkpoint folder or a training run's workdir, see `find_checkpoint`.
        weights: "ema", "raw", or None for the averaged weights where there are any.
        dtype: dtype of the computation.
        remat: see `create_model`.
        scan_implementation: see `create_model`.

    Returns:
        A Flax NNX module, see `create_model`.

    Raises:
        InputError: there is no checkpoint, or it cannot be read.
    """
    description, parameters = load_checkpoint(path, weights)
    return build_model(description, parameters, dtype=dtype, remat=remat, scan_implementation=scan_implementation)


def build_model(description: Description, parameters: Tree, **options: Any) -> Any:
    """The described model with `parameters`; `options` as for `create_model`.

    Raises:
        InputError: the parameters do not fit the description.
    """
    model = abstract_model(lambda: description.build(rngs=SHAPE_KEYS, **options))
    return bind(model, jax.device_put(parameters))  # `jnp.asarray` would compile a program for every shape


def save_checkpoint(path: str | Path, description: Description, parameters: Tree, *, overwrite: bool = False) -> None:
    """Writes a checkpoint with one set of weights; a failure leaves no half-written folder behind.

    Args:
        path: the folder to make.
        description: what it is.
        parameters: nested dictionary of arrays.
        overwrite: replace an existing checkpoint folder.

    Raises:
        InputError: `path` exists (and is not a checkpoint to be overwritten), or cannot be written.
    """
    path = Path(path).absolute()
    check_output(path, overwrite)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as temporary:
            with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as writer:
                items = ocp.args.Composite(
                    state=ocp.args.StandardSave({"params": parameters}), model=ocp.args.JsonSave(description.to_json())
                )
                writer.save(Path(temporary) / "new", args=items)
            _replace(path, Path(temporary) / "new", Path(temporary) / "old")


def check_output(path: str | Path, overwrite: bool) -> None:
    """Makes sure that `save_checkpoint` may write to `path`.

    Raises:
        InputError: it may not.
    """
    path = Path(path)
    if path.is_dir() and not any(path.iterdir()):
        return
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists already: choose another output, or pass --overwrite to replace it")
    # `state` and `model` alone could be anybody's folders
    if path.exists() and not (_is_checkpoint(path) and (path / "_CHECKPOINT_METADATA").is_file()):
        raise InputError(f"{path} exists and is not a checkpoint: it is left as it is, choose another output")


def _replace(path: Path, new: Path, old: Path) -> None:
    """Moves `new` to `path`, and what was there to `old`; after a failure it is back."""
    replaced = path.exists()
    if replaced:
        path.rename(old)
    try:
        new.rename(path)
    except BaseException:
        if replaced:
            old.rename(path)
        raise


def _stored_trees(folder: Path) -> dict[str, Any]:
    metadata = ocp.PyTreeCheckpointHandler().metadata((folder / "state").absolute())
    return getattr(metadata, "tree", metadata)


def _is_checkpoint(path: Path) -> bool:
    return (path / "state").is_dir() and (path / "model").is_dir()


def _score(step: Path) -> float:
    """The score that a training run saved with this checkpoint; minus infinity where it saved none."""
    try:
        return float(json.loads((step / "metrics" / "metrics").read_text())["score"])
    except (OSError, ValueError, KeyError, TypeError):
        return float("-inf")
