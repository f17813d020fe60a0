"""From a configuration to its task."""

from __future__ import annotations

import dataclasses
from typing import Any

from msvmamba_jax.checkpoint import MODEL_OPTIONS, Description
from msvmamba_jax.data.pipeline import Dataset
from msvmamba_jax.errors import InputError
from msvmamba_jax.tasks.base import Task
from msvmamba_jax.tasks.classification import Classification
from msvmamba_jax.tasks.mixing import Mixing


def make_task(config: Any, dataset: Dataset) -> Task:
    """The task that `config.task` names, for the classes and images of `dataset`.

    Raises:
        InputError: an unknown task, model or option, or a value out of range.
    """
    if config.task != "classification":
        raise InputError(f"unknown config.task {config.task!r}; there is 'classification'")
    options = {key: value for key, value in config.model.to_dict().items() if value is not None}
    known = {"name", *MODEL_OPTIONS}
    if unknown := sorted(set(options) - known):
        raise InputError(f"unknown option of config.model: {', '.join(unknown)}; there are {', '.join(sorted(known))}")
    mixing = config.mix.to_dict()
    fields = {field.name for field in dataclasses.fields(Mixing)}
    if unknown := sorted(set(mixing) - fields):
        raise InputError(f"unknown option of config.mix: {', '.join(unknown)}; there are {', '.join(sorted(fields))}")
    description = Description(
        model={**options, "num_classes": len(dataset.class_names)},
        class_names=dataset.class_names,
        preprocessing=dataset.preprocessing,
    )
    return Classification(
        description=description,
        label_smoothing=config.label_smoothing,
        erase_probability=config.erase_probability,
        mixing=Mixing(**mixing),
    )
