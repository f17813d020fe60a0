"""One pass over the evaluation split."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import jax
import numpy as np

from msvmamba_jax.models.parameters import Tree
from msvmamba_jax.tasks.base import Batch, Task
from msvmamba_jax.training.parallelism import Layout
from msvmamba_jax.training.processes import gather_rows


def evaluate(
    predict: Callable[[Tree, Batch], dict[str, jax.Array]],
    params: Tree,
    batches: Iterable[Mapping[str, np.ndarray]],
    task: Task,
    layout: Layout,
) -> dict[str, float]:
    """Metrics of `params` over all `batches`.

    Args:
        predict: `predict_step`, compiled by `layout`.
        params: the weights.
        batches: this process's rows of host batches, with `mask`, False where a row is padding. With several processes
            each evaluates all rows, and comes to the same metrics.
        task: gives the evaluator.
        layout: of the devices.
    """
    evaluator = task.evaluator()
    params = layout.place(params)
    for batch in batches:
        predictions = predict(params, layout.put({k: v for k, v in batch.items() if k != "mask"}))
        evaluator.update(jax.device_get(predictions), gather_rows({k: v for k, v in batch.items() if k != "image"}))
    return evaluator.result()
