"""From a configuration to its task."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from msvmamba_jax.checkpoint import KINDS, Description
from msvmamba_jax.data.coco import CocoRecords
from msvmamba_jax.data.labels import placeholder_class_names
from msvmamba_jax.data.pipeline import Dataset
from msvmamba_jax.errors import InputError
from msvmamba_jax.models.detection.rpn import ProposalLimits
from msvmamba_jax.tasks.base import Task
from msvmamba_jax.tasks.classification import Classification
from msvmamba_jax.tasks.detection import Detection
from msvmamba_jax.tasks.mixing import Mixing
from msvmamba_jax.tasks.segmentation import Segmentation


def make_task(config: Any, dataset: Dataset) -> Task:
    """The task that `config.task` names, for the classes and images of `dataset`.

    Raises:
        InputError: an unknown task, model or option, or a value out of range.
    """
    if config.task not in _TASKS:
        raise InputError(f"unknown config.task {config.task!r}; there are {', '.join(_TASKS)}")
    options = {key: value for key, value in config.model.to_dict().items() if value is not None}
    _reject_unknown("config.model", options, {"name", *KINDS[config.task].model_options})
    if not isinstance(dataset.preprocessing, KINDS[config.task].preprocessing):
        raise InputError(f"the data of config.data.source {config.data.source!r} are not for the task {config.task!r}")
    description = Description(
        model={**options, "num_classes": len(dataset.class_names)},
        task=config.task,
        class_names=dataset.class_names,
        preprocessing=dataset.preprocessing,
    )
    return _TASKS[config.task](config, description, dataset)


def task_of_checkpoint(config: Any, description: Description, dataset: Dataset) -> Task:
    """The task that a checkpoint's model is for, with the options of `config`, to be evaluated on `dataset`.

    Raises:
        InputError: the checkpoint is for another task or other classes than the configuration.
    """
    if description.task != config.task:
        raise InputError(
            f"the checkpoint is for the task {description.task!r}, but the configuration for {config.task!r}"
        )
    if len(description.class_names) != len(dataset.class_names):
        raise InputError(
            f"the checkpoint knows {len(description.class_names)} classes, but the data of this configuration has "
            f"{len(dataset.class_names)}: evaluate with the configuration it was trained with"
        )
    if description.class_names not in (dataset.class_names, placeholder_class_names(len(dataset.class_names))):
        pairs = zip(description.class_names, dataset.class_names, strict=True)
        label, (theirs, ours) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
        raise InputError(
            f"the checkpoint's classes are others than those of the data, or in another order: label {label} is "
            f"{theirs!r} there and {ours!r} here"
        )
    return _TASKS[config.task](config, description, dataset)


def _classification(config: Any, description: Description, dataset: Dataset) -> Task:
    mixing = config.mix.to_dict()
    _reject_unknown("config.mix", mixing, {field.name for field in dataclasses.fields(Mixing)})
    return Classification(
        description=description,
        label_smoothing=config.label_smoothing,
        erase_probability=config.erase_probability,
        mixing=Mixing(**mixing),
    )


def _segmentation(config: Any, description: Description, dataset: Dataset) -> Task:
    return Segmentation(description=description, tta=config.data.tta)


def _detection(config: Any, description: Description, dataset: Dataset) -> Task:
    if not isinstance(dataset.evaluation, CocoRecords):
        raise InputError("detectors are evaluated on data in COCO's form: config.data.source=coco or coco_tfds")
    regions = config.regions.to_dict()
    names = ("proposals", "evaluation_proposals", "anchor_samples", "region_samples")
    _reject_unknown("config.regions", regions, set(names))
    if missing := [name for name in names if name not in regions]:
        raise InputError(f"config.regions lacks {', '.join(missing)}")
    for name in names[:2]:
        if np.shape(regions[name]) != (2,):
            raise InputError(f"config.regions.{name} must be two numbers, before and after; got {regions[name]!r}")
    return Detection(
        description=description,
        records=dataset.evaluation,
        proposals=ProposalLimits(*regions["proposals"]),
        evaluation_proposals=ProposalLimits(*regions["evaluation_proposals"]),
        anchor_samples=regions["anchor_samples"],
        region_samples=regions["region_samples"],
    )


def _reject_unknown(key: str, options: Mapping[str, Any], known: set[str]) -> None:
    if unknown := sorted(set(options) - known):
        raise InputError(f"unknown option of {key}: {', '.join(unknown)}; there are {', '.join(sorted(known))}")


# By the name that a configuration gives them; each takes the configuration, the model's description and the data.
_TASKS: dict[str, Callable[[Any, Description, Dataset], Task]] = {
    "classification": _classification,
    "segmentation": _segmentation,
    "detection": _detection,
}
