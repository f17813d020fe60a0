"""One pass over the evaluation split."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import jax
import numpy as np

from msvmamba_jax.models.parameters import Tree
from msvmamba_jax.tasks.base import Batch, Task
from msvmamba_jax.training.devices import Layout


def evaluate(
    predict: Callable[[Tree, Batch], dict[str, jax.Array]],
    params: Tree,
    batches: Iterable[Mapping[str, np.ndarray]],
    task: Task,
    layout: Layout,
) -> dict[str, float]:
    """Metrics of `params` over all `batches`.

    Args:
        predict: a jitted `predict_step`.
        params: the weights.
        batches: host batches with `mask`, False where a row is padding.
        task: gives the evaluator.
        layout: of the devices.
    """
    evaluator = task.evaluator()
    for batch in batches:
        predictions = predict(params, layout.put({k: v for k, v in batch.items() if k != "mask"}))
        evaluator.update(jax.device_get(predictions), batch)
    return evaluator.result()
